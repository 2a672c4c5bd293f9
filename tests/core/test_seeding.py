"""Random numbers depend on what they are for, and on nothing else."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from snac_core.seeding import derive, generator

parts = st.lists(st.one_of(st.integers(), st.text(max_size=8)), min_size=1, max_size=4)


@given(parts, parts)
def test_equal_parts_make_equal_seeds_and_different_parts_different_ones(one: list, other: list) -> None:
    assert derive(*one) == derive(*one)
    assert (derive(*one) == derive(*other)) == (repr(one) == repr(other))
    assert 0 <= derive(*one) < 2**63


def test_a_seed_is_the_same_in_every_process_and_version() -> None:
    assert derive(0, 7, "crops") == 2_611_879_759_636_776_709, "finished runs and their continuations rest on it"


def test_a_generator_leaves_the_global_stream_alone_and_starts_anew_each_time() -> None:
    before = torch.get_rng_state()
    first = torch.randn(4, generator=generator(0, 1, "targets"))
    assert torch.equal(first, torch.randn(4, generator=generator(0, 1, "targets")))
    assert not torch.equal(first, torch.randn(4, generator=generator(0, 1, "negatives")))
    assert torch.equal(before, torch.get_rng_state())
