"""The conformance kit on everything that is registered: a new plugin is tested by adding its name to nothing."""

from __future__ import annotations

import importlib.util

import pytest

from snac_core import discover
from snac_core.errors import UserError
from snac_core.testing import RuleResult, check_metric, check_speaker_encoder, check_strategy

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
