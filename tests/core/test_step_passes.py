"""One training step makes exactly the passes that a frozen base needs: counted, not timed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from snac_core import ConditionedCodec
from snac_core.frozen import FrozenActivations
from snac_core.step import Step
from snac_core.testing import Fixtures, small_codec

B, N, SPEAKER_DIM = 3, 2, 8


@contextmanager
def counted(fixtures: Fixtures) -> Iterator[dict[str, list[int]]]:
    """Rows of every pass, by part: through the encoder's first layer, the quantizer, the decoder's first and last."""
    codec = fixtures.codec
    rows: dict[str, list[int]] = defaultdict(list)
    parts: dict[str, nn.Module] = {
        "encoder": codec.encoder.block[0],
        "encoder end": codec.encoder.block[-1],
        "quantizer": codec.quantizer,
        "decoder": codec.decoder.model[0],
        "decoder end": codec.decoder.model[-1],
        "speaker_encoder": fixtures.speaker_encoder,
    }
    handles = []
    for part, module in parts.items():

        def count(_module: nn.Module, inputs: tuple[Any, ...], _output: Any, part: str = part) -> None:
            rows[part].append(len(inputs[0]))

        handles.append(module.register_forward_hook(count))
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()


def make_step(model: ConditionedCodec, fixtures: Fixtures, bare: FrozenActivations | None = None) -> Step:
    speakers = torch.arange(B)
    return Step(
        model,
        fixtures.audio,
        sample_rate=fixtures.codec.sampling_rate,
        speaker_ids=speakers,
        target_ids=fixtures.sampler.targets(speakers, 1, N),
        speaker_encoder=fixtures.speaker_encoder,
        sampler=fixtures.sampler,
        index=1,
        frozen_activations=bare,
    )


def train(step: Step) -> None:
    """All losses of all arms, backward."""
    total = sum(term for _, loss in step.model.callers("loss") for term in loss(step=step).values())
    total.backward()  # type: ignore[union-attr]


def arm(fixtures: Fixtures, *strategies: str) -> ConditionedCodec:
    return ConditionedCodec(fixtures.codec, [*strategies, "voice_conversion"], speaker_dim=SPEAKER_DIM)


def test_teacher_is_a_read_only_alias_of_the_speaker_encoder() -> None:
    fixtures = Fixtures(small_codec(), SPEAKER_DIM)
    step = fixtures.step(arm(fixtures, "phase4_decoder_film"))
    assert step.teacher is step.speaker_encoder
    with pytest.raises(AttributeError):
        step.teacher = step.speaker_encoder  # type: ignore[misc]


@pytest.mark.parametrize(
    ("strategies", "quantized", "decoder_start"),
    [
        (["phase6_encoder_adapter"], (1 + N) * B, (1 + N) * B),  # edited latents are quantized anew, row by row
        (["phase3_contrastive"], B, (1 + N) * B),
        (["phase4_decoder_film"], B, B),  # what lies before the first edited tap is common to all targets
        (["phase6_encoder_adapter", "phase4_decoder_film", "phase3_contrastive"], (1 + N) * B, (1 + N) * B),
    ],
)
def test_an_arm_makes_one_batched_pass_through_every_part(
    strategies: list[str], quantized: int, decoder_start: int
) -> None:
    fixtures = Fixtures(small_codec(), SPEAKER_DIM)
    model = arm(fixtures, *strategies)
    with counted(fixtures) as rows:
        train(make_step(model, fixtures))
    assert rows == {
        "encoder": [B],
        "encoder end": [B],
        "quantizer": [quantized],
        "decoder": [decoder_start],
        "decoder end": [(1 + N) * B],
        "speaker_encoder": [(1 + N) * B],
    }


def test_arms_side_by_side_share_the_encoder_and_the_bare_quantizer() -> None:
    fixtures = Fixtures(small_codec(), SPEAKER_DIM)
    names = ["phase3_contrastive", "phase4_decoder_film", "phase6_encoder_adapter"]
    models = [arm(fixtures, name) for name in names]
    with counted(fixtures) as rows:
        bare = FrozenActivations(fixtures.codec, fixtures.audio)
        for model in models:
            train(make_step(model, fixtures, bare))
    assert rows["encoder"] == rows["encoder end"] == [B]
    assert sorted(rows["quantizer"]) == [B, (1 + N) * B], "once for both arms after VQ, once for the arm before it"
    assert rows["decoder end"] == rows["speaker_encoder"] == [(1 + N) * B] * 3


def test_everything_a_step_offers_is_computed_once() -> None:
    fixtures = Fixtures(small_codec(), SPEAKER_DIM)
    step = make_step(arm(fixtures, "phase6_encoder_adapter"), fixtures)
    with counted(fixtures) as rows:
        for _ in range(3):
            assert step.identity.audio.shape == step.bare.audio.shape == step.audio.shape
            assert step.converted.audio.shape == (N * B, 1, step.audio.shape[-1])
            assert step.identity_embedding.shape == (B, SPEAKER_DIM)
            assert step.converted_embedding.shape == (N * B, SPEAKER_DIM)
    assert {part: len(calls) for part, calls in rows.items()} == {
        "encoder": 1,
        "encoder end": 1,
        "quantizer": 2,
        "decoder": 2,
        "decoder end": 2,
        "speaker_encoder": 1,
    }
    assert step.bare is step.bare


def test_what_nobody_asks_for_is_not_computed() -> None:
    fixtures = Fixtures(small_codec(), SPEAKER_DIM)
    with counted(fixtures) as rows:
        make_step(arm(fixtures, "phase6_encoder_adapter"), fixtures)
    assert not rows


def test_latents_are_had_without_decoding_and_are_those_of_the_outputs() -> None:
    fixtures = Fixtures(small_codec(), SPEAKER_DIM)
    step = make_step(arm(fixtures, "phase6_encoder_adapter"), fixtures)
    with counted(fixtures) as rows:
        own, converted = step.identity_latents, step.converted_latents
        assert (len(own.z), len(converted.z)) == (B, N * B)
    assert set(rows) == {"encoder", "encoder end", "quantizer"}
    with counted(fixtures) as rows:
        assert step.identity.z is not None
        assert torch.equal(step.identity.z_q, own.z_q)
        assert torch.equal(step.converted.codes[0], converted.codes[0])
    assert set(rows) == {"decoder", "decoder end"}


def test_a_steps_rows_belong_to_their_speakers() -> None:
    fixtures = Fixtures(small_codec(), SPEAKER_DIM)
    model = arm(fixtures, "phase4_decoder_film")
    with torch.no_grad():
        for _, parameter in model.trained_parameters():
            parameter.normal_(std=0.3)
    step, table = make_step(model, fixtures), fixtures.table
    assert torch.equal(step.own.speaker, table.conditioning[step.speaker_ids])
    assert torch.equal(step.target.speaker, table.conditioning[step.target_ids])
    assert torch.equal(step.own_reference, table.reference[step.speaker_ids])
    assert torch.equal(step.target_reference, table.reference[step.target_ids])
    assert step.own.encoder == step.target.encoder == table.encoder
    with model.codec.fixed_noise(1):
        for row in range(N * B):
            audio = step.audio[row % B : row % B + 1]
            alone = model.reconstruct(audio, type(step.target)(step.target.speaker[row : row + 1])).audio
            torch.testing.assert_close(step.converted.audio[row : row + 1], alone, atol=1e-5, rtol=0)


def test_gradients_reach_the_strategy_from_identity_and_converted_and_none_from_the_bare_output() -> None:
    fixtures = Fixtures(small_codec(), SPEAKER_DIM)
    step = make_step(arm(fixtures, "phase6_encoder_adapter"), fixtures)
    assert step.identity.audio.requires_grad
    assert step.converted_embedding.requires_grad
    assert not step.bare.audio.requires_grad
    assert not step.target_reference.requires_grad
