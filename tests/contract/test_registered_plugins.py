"""The conformance kit on everything that is registered: a new plugin is tested by adding its name to nothing."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch

from snac_core import ConditionedCodec, Conditioning, discover
from snac_core.codec.streaming import measured_receptive_field
from snac_core.errors import UserError
from snac_core.testing import RuleResult, check_metric, check_speaker_encoder, check_strategy
from snac_core.testing.probes import perturbed

CATALOGUE = discover()


def assert_conforms(results: list[RuleResult]) -> None:
    failed = [str(result) for result in results if not result.passed]
    assert not failed, "\n".join(failed)
    assert all(result.measured and not result.advice for result in results)


def test_every_plugin_of_this_installation_loads() -> None:
    assert not CATALOGUE.failures


@pytest.mark.parametrize("name", CATALOGUE.strategies)
def test_a_registered_strategy_holds_to_every_rule(name: str) -> None:
    assert_conforms(check_strategy(CATALOGUE.strategies[name], catalogue=CATALOGUE))


@pytest.mark.filterwarnings("ignore:speaker encoder 'simple' is UNTRAINED")
@pytest.mark.parametrize("name", CATALOGUE.speaker_encoders)
def test_a_registered_speaker_encoder_holds_to_every_rule(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    encoder = CATALOGUE.speaker_encoders[name]
    try:
        encoder()
    except UserError as error:  # weights that have to be fetched by hand, or a package that is not installed
        pytest.skip(str(error))
    assert_conforms(check_speaker_encoder(encoder))


@pytest.mark.parametrize("name", CATALOGUE.metrics)
def test_a_registered_metric_holds_to_every_rule(name: str) -> None:
    metric = CATALOGUE.metrics[name]
    missing = [package for package in metric.requires if importlib.util.find_spec(package) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    assert_conforms(check_metric(metric))


@pytest.mark.parametrize("name", CATALOGUE.strategies)
def test_a_declared_receptive_field_covers_the_measured_one(name: str) -> None:
    model = perturbed(ConditionedCodec("tiny", [name], speaker_dim=16, plugins=CATALOGUE), seed=0).eval()
    cond, like = Conditioning(torch.nn.functional.normalize(torch.randn(1, 16), dim=1)), next(model.parameters())
    for edit in (edit for edits in model.edits.values() for edit in edits):
        period = round(640 * edit.tap.frame_rate / model.codec.sampling_rate)  # of a coarse code: 640 samples
        measured = measured_receptive_field(edit, cond, period, like)
        declared = model.attached[name].receptive_field(edit.tap)
        assert math.isfinite(measured), "the built-in edits do not depend on all frames by default"
        assert declared is None or declared >= measured
