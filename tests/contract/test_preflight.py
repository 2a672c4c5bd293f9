"""What a trainer checks before it trains an arm: faults are refused in one line, and nothing is left changed."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from broken_strategies import (
    BatchNormed,
    ChangesShape,
    IgnoresEmbedding,
    MixesBatch,
    NaNAfterPerturbation,
    NoGradient,
    OwnsBase,
    ReturnsNothing,
    SecondLayerUnused,
    Sound,
    TouchesBase,
    WritesIntoInput,
    one_stage,
)
from torch import Tensor, nn

from snac_core import ConditionedCodec, Strategy, UserError, hookimpl
from snac_core.losses import cosine_distance
from snac_core.testing import Fixtures, preflight, small_codec
from snac_core.testing.probes import BaseSnapshot

SPEAKER_DIM = 16


class OnlyALoss(Strategy):
    """An objective."""

    name = "only_a_loss"

    @hookimpl
    def loss(self, step):
        return {"level": step.identity.audio.square().mean()}


class Tuned(Sound):
    """Sound, at another tap and with dropout and running statistics that a check must not move."""

    name = "tuned"

    def __init__(self, config, taps):
        super().__init__(config, taps)
        self.register_buffer("calls", torch.zeros(()))

    def scale(self, x, cond):
        self.calls += 1
        return nn.functional.dropout(super().scale(x, cond), 0.1, self.training)


def arm(*strategies: type[Strategy]) -> tuple[ConditionedCodec, Fixtures]:
    model = ConditionedCodec(one_stage(), strategies, speaker_dim=SPEAKER_DIM).train()
    fixtures = Fixtures(model.codec, SPEAKER_DIM)
    for _, training_start in model.callers("training_start"):
        training_start(context=fixtures.context(model))
    return model, fixtures


def likeness(fixtures: Fixtures) -> Callable[[ConditionedCodec], Tensor]:
    def loss(model: ConditionedCodec) -> Tensor:
        step = fixtures.step(model)
        own = [term for _, hook in model.callers("loss") for term in hook(step=step).values()]
        total = (step.identity.audio - step.audio).abs().mean() + sum(own)
        return total + cosine_distance(step.converted_embedding, step.target_reference).mean()

    return loss


def check(
    model: ConditionedCodec, fixtures: Fixtures, loss: Callable[[ConditionedCodec], Tensor] | None = None
) -> None:
    cond = fixtures.conditioning(len(fixtures.audio))
    preflight(model, loss or likeness(fixtures), fixtures.audio, cond, seed=3)


@pytest.mark.parametrize(
    "names", [["phase3_contrastive"], ["phase4_decoder_film"], ["phase6_encoder_adapter", "phase4_decoder_film"]]
)
def test_arms_of_the_built_in_placements_may_train(names: list[str]) -> None:
    model = ConditionedCodec(small_codec(), [*names, "voice_conversion"], speaker_dim=SPEAKER_DIM)
    check(model, Fixtures(model.codec, SPEAKER_DIM))


def test_a_good_arm_is_left_exactly_as_it_was() -> None:
    model, fixtures = arm(Tuned)
    for parameter in model.strategies.parameters():
        parameter.grad = torch.ones_like(parameter)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    base, stream, plain = BaseSnapshot(model.codec), torch.get_rng_state(), random.getstate()
    check(model, fixtures)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(bool((parameter.grad == 1).all()) for parameter in model.strategies.parameters())
    assert not base.changed()
    assert torch.equal(torch.get_rng_state(), stream)
    assert random.getstate() == plain
    assert model.strategies["tuned"].training
    assert not model.codec.training


def test_the_verdict_does_not_depend_on_what_ran_before() -> None:
    model, fixtures = arm(MixesBatch)
    messages = set()
    for seed in (1, 2):
        torch.manual_seed(seed)
        with pytest.raises(UserError) as caught:
            check(model, fixtures)
        messages.add(str(caught.value))
    assert len(messages) == 1


@pytest.mark.parametrize(
    ("strategy", "words"),
    [
        (ChangesShape, "strategy 'changes_shape' returned .* at tap 'quantized'; expected a tensor"),
        (ReturnsNothing, "strategy 'returns_nothing' returned None at tap 'quantized'"),
        (NoGradient, "strategy 'no_gradient' gets no gradient from any loss term: .*integer codes"),
        (SecondLayerUnused, "strategy 'second_layer_unused': parameter 'unused.weight' gets no gradient"),
        (IgnoresEmbedding, "strategy 'ignores_embedding' ignores its speaker embedding"),
        (MixesBatch, "strategy 'mixes_batch' at tap 'quantized' mixes the batch"),
        (BatchNormed, "strategy 'batch_normed' at tap 'quantized' mixes the batch"),
        (NaNAfterPerturbation, "strategy 'nan_after_perturbation' at tap 'quantized' gives NaN or infinity"),
        (TouchesBase, "touches_base touches the base: 1 tensors of the codec changed"),
        (OwnsBase, "strategy 'owns_base' touches the base: it holds 'owns_base.captured"),
        (WritesIntoInput, "strategy 'writes_into_input' at tap 'quantized' writes into its input"),
        (OnlyALoss, "only_a_loss edits nothing, .*add an adapter"),
    ],
)
def test_an_arm_that_cannot_learn_is_refused_by_name(strategy: type[Strategy], words: str) -> None:
    model, fixtures = arm(strategy)
    base = BaseSnapshot(model.codec)
    with pytest.raises(UserError, match=words) as caught:
        check(model, fixtures)
    assert "\n" not in str(caught.value)
    assert not base.changed()


def test_each_placement_of_an_arm_is_judged_by_itself() -> None:
    model, fixtures = arm(Sound, NoGradient)
    with pytest.raises(UserError, match="strategy 'no_gradient' gets no gradient"):
        check(model, fixtures)
    model, fixtures = arm(Sound, IgnoresEmbedding)
    with pytest.raises(UserError, match="strategy 'ignores_embedding' ignores"):
        check(model, fixtures)


def test_a_loss_through_integer_codes_gives_no_gradient_to_an_edit_before_vq() -> None:
    model = ConditionedCodec(small_codec(), ["phase6_encoder_adapter"], speaker_dim=SPEAKER_DIM)
    fixtures = Fixtures(model.codec, SPEAKER_DIM)

    def loss(model: ConditionedCodec) -> Tensor:
        codes = model.encode(fixtures.audio, fixtures.conditioning(3))
        return (model.decode(codes, length=fixtures.audio.shape[-1]) - fixtures.audio).abs().mean()

    with pytest.raises(UserError, match=r"'phase6_encoder_adapter' gets no gradient .*integer codes"):
        check(model, fixtures, loss)


def test_a_single_item_is_enough_to_see_the_batch_mixed() -> None:
    model, fixtures = arm(MixesBatch)
    with pytest.raises(UserError, match="mixes the batch"):
        preflight(model, likeness(fixtures), fixtures.audio[:1], fixtures.conditioning(1), seed=0)


def test_an_arm_without_strategies_is_refused() -> None:
    model, fixtures = arm()
    with pytest.raises(UserError, match="an arm without strategies edits nothing"):
        check(model, fixtures)


def test_an_error_of_the_loss_itself_comes_through() -> None:
    model, fixtures = arm(Sound)

    def loss(model: ConditionedCodec) -> Tensor:
        raise UserError("no term 'likness'; did you mean 'likeness'?")

    with pytest.raises(UserError, match="no term 'likness'"):
        check(model, fixtures, loss)
