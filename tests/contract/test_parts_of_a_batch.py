"""Every registered objective with every registered adapter on two processes: the losses and gradients of one."""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_objectives_and_placements import CATALOGUE, PLACEMENTS, SPEAKER_DIM, VARIANTS, conditioned
from torch import Tensor

from snac_core import ConditionedCodec, UserError
from snac_core.speakers.sampling import SpeakerSampler
from snac_core.step import Step
from snac_core.testing import Fixtures, small_codec
from snac_core.testing.probes import perturbed
from snac_runner.distributed import DistributedContext

LATE, TARGETS, ITEMS = 10**6, 2, 3
HOOKS = ("loss", "discriminator_loss")
PARTS = (slice(0, 2), slice(2, 3))


def step_of(around: Fixtures, model: ConditionedCodec, rows: slice) -> Step:
    """A step that sees these items of a batch of three, with two targets each."""
    speakers = torch.arange(ITEMS)
    return Step(
        model, around.audio[rows], sample_rate=16000, speaker_ids=speakers, rows=rows,
        target_ids=around.sampler.targets(speakers, LATE, TARGETS), speaker_encoder=around.speaker_encoder,
        sampler=around.sampler, index=LATE, batch_audio=lambda: around.audio,
    )  # fmt: skip


def losses_and_gradients(around: Fixtures, model: ConditionedCodec, rows: slice) -> dict[str, Tensor]:
    """Each term's value and its gradient, in one vector, weighted by the share of these items in the batch."""
    found: dict[str, Tensor] = {}
    share = len(range(ITEMS)[rows]) / ITEMS
    parameters = [parameter for _, parameter in (*model.trained_parameters(), *model.discriminator_parameters())]
    for hook in HOOKS:
        with model.codec.fixed_noise(0):
            for name, implementation in model.callers(hook):
                for term, value in implementation(step=step_of(around, model, rows)).items():
                    gradients: Any = [None] * len(parameters)
                    if value.requires_grad:
                        gradients = torch.autograd.grad(value, parameters, allow_unused=True, retain_graph=True)
                    flat = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
                    vector = torch.cat([value.detach().reshape(1), *(g.flatten() for g in flat)])
                    found[f"{name}/{term}"] = share * vector
    return found


def pairs(around: Fixtures) -> dict[str, ConditionedCodec]:
    """Every adapter with every objective that works with it."""
    found = {}
    for adapter in PLACEMENTS:
        for number, (objective, settings) in enumerate(VARIANTS):
            torch.manual_seed(0)  # of the discriminators
            model = conditioned(around, adapter, objective, settings)
            try:
                for _, start in model.callers("training_start"):
                    start(context=around.context(model))
            except UserError:
                continue  # test_objectives_and_placements.py looks at what is said
            found[f"{adapter}+{objective} ({number})"] = perturbed(model.double(), seed=0)
    return found


def surroundings() -> Fixtures:
    """In double precision: in float32, rounding moves values across the corner of a ReLU or the edge of a code."""
    around = Fixtures(small_codec(encoder_dim=2, decoder_dim=16), SPEAKER_DIM)
    around.codec.double()
    around.audio, around.speaker_encoder = around.audio.double(), around.speaker_encoder.double()
    table = around.table
    table = replace(table, conditioning=table.conditioning.double(), reference=table.reference.double())
    around.table, around.sampler = table, SpeakerSampler(table, seed=0)
    return around


def one_process(rank: int, port: int, folder: str) -> None:
    """Write the sums over all processes of every pair's losses and gradients."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=len(PARTS))
    context = DistributedContext(torch.device("cpu"), rank, len(PARTS))
    around = surroundings()
    sums = {}
    for pair, model in pairs(around).items():
        terms = losses_and_gradients(around, model, PARTS[rank])
        for vector in terms.values():
            context.add_up(vector)
        sums[pair] = terms
    if context.first:
        torch.save(sums, Path(folder) / "sums.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def around() -> Fixtures:
    return surroundings()


@pytest.fixture(scope="module")
def whole(around: Fixtures) -> dict[str, dict[str, Tensor]]:
    return {pair: losses_and_gradients(around, model, slice(0, ITEMS)) for pair, model in pairs(around).items()}


def assert_equal(whole: dict[str, dict[str, Tensor]], parts: dict[str, dict[str, Tensor]]) -> None:
    assert whole.keys() == parts.keys()
    for pair, terms in whole.items():
        assert terms.keys() == parts[pair].keys()
        for term, wanted in terms.items():
            got = parts[pair][term]
            assert abs(float(got[0] - wanted[0])) <= 1e-6 * max(1, abs(float(wanted[0]))), f"{pair}: {term}"
            scale = float(wanted[1:].abs().max())
            assert float((got[1:] - wanted[1:]).abs().max()) <= 1e-6 * max(1, scale), f"{pair}: gradient of {term}"


def test_there_are_pairs_to_look_at(whole: dict[str, dict[str, Tensor]]) -> None:
    assert len(whole) >= 2 * len(VARIANTS)
    assert {term.split("/")[0] for terms in whole.values() for term in terms} >= {name for name, _ in VARIANTS}
    assert CATALOGUE.strategies


def test_two_processes_give_the_losses_and_gradients_of_the_whole_batch(
    whole: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(one_process, (port, str(tmp_path)), nprocs=len(PARTS))
    assert_equal(whole, torch.load(tmp_path / "sums.pt", weights_only=True))
