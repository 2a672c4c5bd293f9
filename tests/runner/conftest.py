"""A small corpus, a small base, and one finished study, made once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from small_study import BASE, PHASES, Bench, runner

from snac_core.codec import SNAC
from snac_runner.data.synth import synthesize
from snac_runner.evaluate.content import CER, WER
from snac_runner.evaluate.metrics import PESQ, STOI


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The untrained encoder is the fastest conditioning encoder; these tests need nothing that is learned from it."""
    untrained = pytest.mark.filterwarnings("ignore:speaker encoder 'simple' is UNTRAINED:UserWarning")
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(untrained)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """No test reads or writes the user's cache; the tests of the runner share one. Slow metrics count as missing."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SNAC_CACHE", str(folder))
        for metric in (STOI, PESQ, WER, CER):
            patch.setattr(metric, "requires", ("left_out_in_these_tests",))
        yield folder


@pytest.fixture(autouse=True)
def _own_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SNAC_CACHE", str(cache))


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Bench:
    """Eight synthetic speakers with four sentences, and a random base."""
    root = tmp_path_factory.mktemp("bench")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        SNAC(**BASE).save_pretrained(root / "base")
    return Bench(synthesize(root / "speech", 8, 4), root / "base")


@pytest.fixture(scope="session")
def finished(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study of phases 3, 4 and 6, two steps each; not to be written into."""
    out = tmp_path_factory.mktemp("finished") / "study"
    assert runner("ablate", "--strategies", ",".join(PHASES), "--out", out, *bench.options(steps=2)) == 0
    return out
