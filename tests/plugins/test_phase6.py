"""What the adapter before VQ may do to a latent, and what keeps it there."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from snac_core import ConditionedCodec, Conditioning, UserError
from snac_core.testing import Fixtures, small_codec
from snac_core.testing.probes import perturbed

NAME = "phase6_encoder_adapter"
SPEAKER_DIM = 8


def adapted(fixtures: Fixtures, scale: float, **config: object) -> ConditionedCodec:
    """An adapter that has been moved far, its last layer by `scale`."""
    model = perturbed(ConditionedCodec(fixtures.codec, [NAME], speaker_dim=SPEAKER_DIM, config={NAME: config}), seed=0)
    with torch.no_grad():
        for name, parameter in model.trained_parameters():
            if ".output." in name:
                parameter.mul_(scale)
    return model


@given(bound=st.floats(0.1, 3), scale=st.sampled_from([0.1, 1.0, 100.0]))
@settings(max_examples=10, deadline=None)
def test_no_edit_is_larger_than_its_bound(bound: float, scale: float) -> None:
    fixtures = Fixtures(small_codec(), SPEAKER_DIM)
    model = adapted(fixtures, scale, bound=bound)
    with torch.no_grad():
        bare = model.reconstruct(fixtures.audio)
        out = model.reconstruct(fixtures.audio, Conditioning(torch.randn(1, SPEAKER_DIM)))
    spread = bare.z.std(dim=-1, keepdim=True).clamp(min=1e-3)
    assert ((out.z - bare.z).abs() <= bound * spread * (1 + 1e-5)).all()
    assert not torch.equal(out.z, bare.z)


def test_a_channel_that_does_not_move_is_hardly_edited() -> None:
    fixtures = Fixtures(small_codec(), SPEAKER_DIM)
    adapter = adapted(fixtures, 100.0, bound=1.0).attached[NAME].adapters["latent"]
    still = torch.zeros(1, fixtures.codec.latent_dim, 12)
    with torch.no_grad():
        assert (adapter(still, torch.randn(1, SPEAKER_DIM)) - still).abs().max() <= 1e-3


def test_commitment_grows_as_edits_leave_the_codebooks() -> None:
    fixtures = Fixtures(small_codec(), SPEAKER_DIM)
    terms = []
    for scale in (0.0, 10.0, 1000.0):
        model = adapted(fixtures, scale)
        ((_, loss),) = model.callers("loss")
        with torch.no_grad():
            terms.append(float(loss(step=fixtures.step(model, 1))["commitment"]))
    assert terms[2] > 10 * terms[1] > 10 * terms[0]


def test_the_bound_must_leave_room() -> None:
    fixtures = Fixtures(small_codec(), SPEAKER_DIM)
    with pytest.raises(ValueError, match="bound"):
        adapted(fixtures, 1.0, bound=0.0)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"kernel": 4}, "kernel = 4; expected an odd number"),
        ({"adapter_type": "film", "kernel": 3}, "bound and kernel belong to adapter_type = 'conv'"),
        ({"adapter_type": "film", "bound": 1.0}, "bound and kernel belong to adapter_type = 'conv'"),
    ],
)
def test_settings_that_could_not_be_meant_are_refused(config: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        ConditionedCodec(small_codec(), [NAME], speaker_dim=SPEAKER_DIM, config={NAME: config})
