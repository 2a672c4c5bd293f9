"""Each fault that an author can make is caught by the rule about it, with advice that names what to change."""

from __future__ import annotations

import pytest
import torch
from broken_strategies import (
    BatchNormed,
    ChangesShape,
    ChangesSwitches,
    Counts,
    DiscriminatorMovesModel,
    Double,
    ForgetsState,
    IgnoresEmbedding,
    LossOfCodes,
    Meets,
    MisspeltHook,
    MixesBatch,
    NaNAfterPerturbation,
    NoDefault,
    NoDescription,
    NoGradient,
    NoSuchTap,
    NotTheIdentity,
    NumberInLoss,
    OwnsBase,
    RandomIdentity,
    Reseeds,
    ReseedsPython,
    ReturnsNothing,
    SecondLayerUnused,
    Sound,
    SwitchesInEdit,
    TakesAnyKey,
    TensorForLoss,
    TouchesBase,
    UnknownArgument,
    UnmarkedHook,
    VectorLoss,
    Wasserstein,
    WeightWithoutTerm,
    WritesIntoInput,
    WrongSide,
    one_stage,
)

from snac_core import Strategy
from snac_core.plugins import Catalogue
from snac_core.testing import check_strategy, strategy_results
from snac_core.testing.probes import BaseSnapshot

FAULTS: list[tuple[type[Strategy], str, list[str], list[str]]] = [
    # strategy, rule, words of what was measured, words of the advice
    (ChangesShape, "shapes", ["'changes_shape'", "'quantized'", "expected a tensor"], ["input's shape"]),
    (ReturnsNothing, "shapes", ["returned None at tap 'quantized'"], ["return a tensor"]),
    (NoGradient, "gradient at initialisation", ["none of its 2 parameters"], [".detach()", "no_grad"]),
    (SecondLayerUnused, "gradient of every parameter", ["'unused.weight' gets no gradient"], ["remove it"]),
    (IgnoresEmbedding, "embedding has an effect", ["same output"], ["cond.speaker"]),
    (MixesBatch, "batch independence", ["'quantized'", "when the other items change"], ["each item from itself"]),
    (Counts, "batch independence", ["'quantized'", "equal input", "in train mode"], ["not on counters"]),
    (BatchNormed, "batch independence", ["in train mode"], ["batch norm"]),
    (TouchesBase, "base untouched", ["1 tensors of the base changed", "encoder.block.0"], ["never write to the codec"]),
    (OwnsBase, "base untouched", ["owns_base.captured"], ["no reference to the codec"]),
    (NotTheIdentity, "identity at initialisation", ["tap 'quantized'"], ["zero the last layer"]),
    (RandomIdentity, "identity at initialisation", ["train mode"], ["exactly nothing"]),
    (MisspeltHook, "hooks", ["'after_qv'; did you mean 'after_vq'?"], ["spell it"]),
    (UnmarkedHook, "hooks", ["before_vq lacks the @hookimpl mark"], ["@hookimpl"]),
    (UnknownArgument, "hooks", ["'speaker'", "after_vq"], ["StrategyHooks"]),
    (NoSuchTap, "taps", ["'decodr_*' matches no tap", "did you mean"], ["decoder_*"]),
    (WrongSide, "taps", ["'latent'", "is not after VQ"], ["latent before VQ"]),
    (TakesAnyKey, "config", ["keys that it does not know"], ["extra='forbid'"]),
    (NoDescription, "config", ["'depth' has no description"], ["description='...'"]),
    (NoDefault, "config", ["'depth' has no default"], ["Field(<default>"]),
    (NaNAfterPerturbation, "finite", ["perturbed strategy makes NaN"], ["logarithms"]),
    (VectorLoss, "loss terms", ["'each_item' of loss has shape (3,)"], [".mean()"]),
    (NumberInLoss, "loss terms", ["'likeness' of loss is a float"], [".item()"]),
    (TensorForLoss, "loss terms", ["loss returned Tensor"], ["return a dict"]),
    (LossOfCodes, "loss terms", ["no gradient of term 'content'"], ["integer codes"]),
    (WeightWithoutTerm, "loss terms", ["'likness'", "did you mean 'likeness'?"], ["default_weights"]),
    (WritesIntoInput, "input untouched", ["'quantized' writes into its input"], ["out of place"]),
    (Meets, "no global state", ["two instances share state"], ["on the instance"]),
    (Reseeds, "global settings", ["__init__ of strategy 'reseeds'", "random seed from"], ["snac_core.seeding"]),
    (ReseedsPython, "no global state", ["random numbers of numpy"], ["snac_core.seeding"]),
    (ChangesSwitches, "global settings", ["matmul precision from highest to high"], ["leave torch's settings alone"]),
    (SwitchesInEdit, "global settings", ["after_vq of strategy", "default dtype"], ["say dtype=..."]),
    (ForgetsState, "save and load", ["gives other output"], ["buffers"]),
    (DiscriminatorMovesModel, "discriminator", ["discriminator_loss moves discriminator_moves_model.gate"], ["detach"]),
]


@pytest.mark.parametrize("strategy", [Sound, Wasserstein, Double])
def test_a_strategy_without_fault_holds_to_every_rule(strategy: type[Strategy]) -> None:
    failed = [str(result) for result in check_strategy(strategy, catalogue=Catalogue()) if not result.passed]
    assert not failed


@pytest.mark.parametrize(("strategy", "rule", "measured", "advice"), FAULTS, ids=[cls.name for cls, *_ in FAULTS])
def test_a_fault_is_caught_by_the_rule_about_it_with_advice(
    strategy: type[Strategy], rule: str, measured: list[str], advice: list[str]
) -> None:
    results = strategy_results(strategy, codec=one_stage(), catalogue=Catalogue())
    first = next(result for result in results if not result.passed)
    results.close()
    assert first.rule == rule, first
    assert all(words in first.measured for words in measured), first
    assert all(words in first.advice for words in advice), first
    assert "\n" not in str(first)


def test_a_codec_given_for_a_check_comes_back_as_it_was() -> None:
    codec = one_stage().freeze()
    before = BaseSnapshot(codec)
    random_state, threads = torch.get_rng_state(), torch.get_num_threads()
    for strategy in (TouchesBase, ChangesSwitches):
        assert not all(result.passed for result in check_strategy(strategy, codec=codec, catalogue=Catalogue()))
    assert not before.changed()
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.get_num_threads() == threads
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.slow  # the first compilation of a process takes some ten seconds
def test_edits_compile() -> None:
    results = check_strategy(Sound, catalogue=Catalogue(), compiled=True)
    assert results[-1].rule == "torch.compile"
    assert results[-1].passed, results[-1]
