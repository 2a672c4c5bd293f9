"""A small corpus, a small base, and one finished study, made once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from small_study import BASE, PHASES, Bench, arm, runner

from snac_core.codec import SNAC
from snac_runner.arm import Arm
from snac_runner.data.synth import synthesize
from snac_runner.evaluate.metrics import PESQ, STOI
from snac_runner.evaluate.naturalness import DistillMOS


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
        for metric in (STOI, PESQ, DistillMOS):
            patch.setattr(metric, "requires", ("left_out_in_these_tests",))
        patch.setattr("snac_runner.resources.find_whisper", lambda *_, **__: None)
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


@pytest.fixture(scope="session")
def runs(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models of which every parameter was moved, so that an embedding has an effect; by phase."""
    root, resources = tmp_path_factory.mktemp("runs"), bench.resources(bench.study())
    for name in PHASES:
        one = Arm.new(arm(name), 0, root / name, resources)
        with torch.no_grad():
            for _, parameter in one.model.trained_parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        one.model.save_pretrained(root / name / "model")
        (root / name / "config.json").write_text(json.dumps({"study": {"base": str(bench.base)}}))
    return {name: root / name for name in PHASES}


@pytest.fixture(scope="session")
def voices(bench: Bench) -> list[Path]:
    """A recording of each of several speakers."""
    return [sorted(folder.glob("*.flac"))[0] for folder in sorted((bench.speech / "train").iterdir())]


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must be refused; its line."""

    def run(*arguments: object) -> str:
        capsys.readouterr()
        assert runner(*arguments) == 2
        message = capsys.readouterr().err.strip().splitlines()
        assert message[-1].startswith("error: ")
        return message[-1]

    return run
