"""Faults in speaker encoders and metrics, each caught by the rule about it, with advice that names what to change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from snac_core import Metric, SpeakerEncoder
from snac_core.testing import RuleResult, check_metric, check_speaker_encoder


class SoundEncoder(SpeakerEncoder):
    """A filterbank with seeded weights, energies over time, a linear layer."""

    name = "sound_encoder"
    family = "test"
    training_data = "none"

    def __init__(self, weights: Any = None) -> None:
        super().__init__()
        self.dim, self.sample_rate = 8, 16000
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.build()
        self.freeze()

    def build(self) -> None:
        self.filters = nn.Conv1d(1, 16, 400, stride=160)
        self.norm = nn.BatchNorm1d(16)
        self.out = nn.Linear(16, self.dim)

    def embed(self, audio):
        energies = self.filters(audio.unsqueeze(1)).square().mean(-1)
        return self.out(self.norm((energies + 1e-4).log()))


class NoFamily(SoundEncoder):
    name = "no_family"
    family = ""


class ForgetsToFreeze(SoundEncoder):
    name = "forgets_to_freeze"

    def freeze(self):
        self._digest = "0"
        return self


class TrainsWithTheRest(SoundEncoder):
    name = "trains_with_the_rest"

    def train(self, mode=True):
        return nn.Module.train(self, mode)


class CutsTheGradient(SoundEncoder):
    name = "cuts_the_gradient"

    @torch.no_grad()
    def embed(self, audio):
        return super().embed(audio)


class AnotherWidth(SoundEncoder):
    name = "another_width"

    def embed(self, audio):
        return super().embed(audio)[:, :4]


class MixesTheBatch(SoundEncoder):
    name = "mixes_the_batch"

    def embed(self, audio):
        return super().embed(audio - audio.mean(dim=0, keepdim=True))


class Unseeded(SoundEncoder):
    name = "unseeded"

    def __init__(self, weights=None):
        super().__init__(weights)
        self.out = nn.Linear(16, self.dim)
        self.freeze()


class SilenceIsNaN(SoundEncoder):
    name = "silence_is_nan"

    def embed(self, audio):
        return super().embed(audio / audio.abs().amax(dim=1, keepdim=True))


class TakesAnything(SoundEncoder):
    name = "takes_anything"

    def forward(self, audio, sample_rate):
        return nn.functional.normalize(self.embed(audio.float().mean(1) if audio.dim() == 3 else audio), dim=-1)


class SoundMetric(Metric):
    """Difference in level."""

    name = "level"
    unit = "dB"
    direction = "down"

    def __call__(self, conversion):
        return 20 * float((conversion.converted.std() / conversion.source.std()).log10().abs())


class Sideways(SoundMetric):
    direction = "sideways"  # type: ignore[assignment]


class UnknownOutput(SoundMetric):
    outputs = ("convertd",)


class NeedsEveryOutput(SoundMetric):
    def __call__(self, conversion):
        return float(conversion.synthetic.std())


class OneNeed(SoundMetric):
    requires = "numpy"  # type: ignore[assignment]


class NeedsATool(SoundMetric):
    requires = ("no_such_tool_anywhere",)


class ReturnsATensor(SoundMetric):
    def __call__(self, conversion):
        return conversion.converted.std()


class ReturnsNaN(SoundMetric):
    def __call__(self, conversion):
        return float("nan")


class Rolls(SoundMetric):
    def __call__(self, conversion):
        return float(torch.rand(()))


class Normalises(SoundMetric):
    def __call__(self, conversion):
        return float(conversion.converted.div_(2.0).std())


class NeedsIdentity(SoundMetric):
    def __call__(self, conversion):
        return float(conversion.identity.std())


def first_failure(results: list[RuleResult]) -> RuleResult:
    return next(result for result in results if not result.passed)


def test_an_encoder_and_a_metric_without_fault_hold_to_every_rule() -> None:
    assert all(result.passed for result in check_speaker_encoder(SoundEncoder))
    assert all(result.passed for result in check_metric(SoundMetric))


@pytest.mark.parametrize(
    ("encoder", "rule", "measured", "advice"),
    [
        (NoFamily, "declaration", "family = ''", "set family"),
        (ForgetsToFreeze, "frozen", "ask for gradients", "self.freeze()"),
        (TrainsWithTheRest, "frozen", "train() puts it in train mode", "base class"),
        (CutsTheGradient, "gradient", "no gradient reaches the audio", "no_grad"),
        (AnotherWidth, "output", "became (3, 4); expected (3, 8)", "(B, dim)"),
        (MixesTheBatch, "batch independence", "an item alone differs", "from itself alone"),
        (Unseeded, "repeatable", "two instances disagree", "fork_rng"),
        (SilenceIsNaN, "output", "silence", "by a floor"),
        (TakesAnything, "bad input", "it accepts", "leave forward to the base class"),
    ],
)
def test_a_fault_of_an_encoder_is_caught(encoder: type[SpeakerEncoder], rule: str, measured: str, advice: str) -> None:
    first = first_failure(check_speaker_encoder(encoder))
    assert first.rule == rule, first
    assert measured in first.measured
    assert advice in first.advice


@pytest.mark.parametrize(
    ("metric", "rule", "measured", "advice"),
    [
        (Sideways, "declaration", "direction = 'sideways'", "'up' or 'down'"),
        (UnknownOutput, "declaration", "outputs = ('convertd',)", "converted, identity, other"),
        (NeedsEveryOutput, "partial conversions", "NoneType", "return None where"),
        (OneNeed, "declaration", "requires = 'numpy'", "('package',)"),
        (NeedsATool, "requires", "needs no_such_tool_anywhere", "install no_such_tool_anywhere"),
        (ReturnsATensor, "value", "returned Tensor", "return a float"),
        (ReturnsNaN, "value", "returned nan", "raise where the tool fails"),
        (Rolls, "repeatable", "two calls gave", "seeding"),
        (Normalises, "input untouched", "writes into the conversion", "work on a copy"),
        (NeedsIdentity, "partial conversions", "AttributeError", "return None"),
    ],
)
def test_a_fault_of_a_metric_is_caught(metric: type[Metric], rule: str, measured: str, advice: str) -> None:
    first = first_failure(check_metric(metric))
    assert first.rule == rule, first
    assert measured in first.measured
    assert advice in first.advice


def test_what_is_no_class_of_the_kind_is_told_what_to_derive_from() -> None:
    assert "snac_core.SpeakerEncoder" in check_speaker_encoder(nn.Linear)[0].advice  # type: ignore[arg-type]
    assert "snac_core.Metric" in check_metric(dict)[0].advice  # type: ignore[arg-type]
