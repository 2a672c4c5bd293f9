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
        ({"adapter_type": "film", "kernel": 3}, "kernel belongs to adapter_type = 'conv', 'dilated' or 'codes'"),
        ({"adapter_type": "film", "bound": 1.0}, "bound belongs to adapter_type = 'conv'; 'film' has none"),
        ({"adapter_type": "dilated", "bound": 1.0}, "bound belongs to adapter_type = 'conv'; 'dilated' has none"),
        ({"adapter_type": "dilated", "num_layers": 3}, "'dilated' has one per dilation"),
        ({"adapter_type": "codes", "num_layers": 3}, "'codes' has one per dilation"),
        ({"adapter_type": "codes", "taps": ("encoder_0",)}, "acts at the tap 'latent' only; got taps"),
        ({"source_bias": 1.0}, "source_bias belongs to adapter_type = 'codes'; 'conv' has none"),
        ({"dilations": (1, 2)}, "dilations belong to adapter_type = 'dilated' or 'codes'; 'conv' has none"),
        ({"adapter_type": "dilated", "dilations": ()}, "dilations"),
        ({"adapter_type": "dilated", "dilations": (0,)}, "dilations"),
    ],
)
def test_settings_that_could_not_be_meant_are_refused(config: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        ConditionedCodec(small_codec(), [NAME], speaker_dim=SPEAKER_DIM, config={NAME: config})


@pytest.mark.parametrize(("dilations", "kernel"), [((1,), 3), ((1, 2), 3), ((2, 3), 5)])
def test_a_frame_of_the_dilated_type_sees_as_far_as_its_dilations_reach(
    dilations: tuple[int, ...], kernel: int
) -> None:
    fixtures = Fixtures(small_codec(), SPEAKER_DIM)
    model = adapted(fixtures, 1.0, adapter_type="dilated", hidden_dim=8, dilations=dilations, kernel=kernel)
    strategy = model.attached[NAME]
    adapter, speaker = strategy.adapters["latent"], torch.randn(1, SPEAKER_DIM)
    latent = torch.randn(1, fixtures.codec.latent_dim, 41)
    changed = latent.clone()
    changed[..., 20] += 1
    with torch.no_grad():
        differs = (adapter(changed, speaker) - adapter(latent, speaker)).abs().amax((0, 1)) > 0
    (tap,) = (tap for tap in fixtures.codec.taps if tap.name == "latent")
    reach = int(strategy.receptive_field(tap))
    assert differs.nonzero().flatten().sub(20).abs().max() == reach == sum(dilations) * (kernel // 2)


def test_the_dilated_type_has_a_million_parameters_on_the_bundled_base_and_follows_the_speaker() -> None:
    model = ConditionedCodec(
        "tiny", [NAME], speaker_dim=192, config={NAME: {"adapter_type": "dilated", "hidden_dim": 208}}
    )
    assert 0.9e6 < sum(parameter.numel() for _, parameter in model.trained_parameters()) < 1.1e6
    adapter = perturbed(model, seed=0).attached[NAME].adapters["latent"]
    latent = torch.randn(1, model.codec.latent_dim, 8).expand(2, -1, -1)
    speakers = torch.nn.functional.normalize(torch.randn(2, 192), dim=1)
    with torch.no_grad():
        there, back = adapter(latent, speakers), adapter(latent, speakers.flip(0))
    assert not torch.allclose(there[0], there[1])
    torch.testing.assert_close(there, back.flip(0))
