"""How the command line is started, and what the user's own folder may contain."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from small_study import PHASES, runner

from snac_core.plugins import discover
from snac_runner.data.synth import HELD_OUT
from snac_runner.resources import StudyResources

SCRIPT = """
from snac_core import discover
import plugins, runner  # the user's own

assert plugins.MINE and runner.MINE
print(",".join(discover().strategies))
"""


def run(*arguments: str, cwd: Path) -> str:
    """What a Python process prints."""
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_package_runs_as_a_module(tmp_path: Path) -> None:
    assert run("-m", "snac_runner", "--version", cwd=tmp_path).startswith("snac-conditioning 0.")
    assert "runner quickstart" in run("-m", "snac_runner", "--help", cwd=tmp_path)


def test_the_quickstart_draws_everything_from_its_seed_and_tests_on_every_voice_that_is_held_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[tuple[Any, StudyResources]] = []

    def record(folder: Path, arms: Any, rates: Any, resources: StudyResources, text: str) -> list[Path]:
        started.append((arms, resources))
        return []

    monkeypatch.setattr("snac_runner.study.run_study", record)
    monkeypatch.setattr("snac_runner.cli.train.print_report", lambda *_: None)
    assert runner("quickstart", "--out", tmp_path / "a", "--seed", 5) == 0
    ((arms, resources),) = started
    study, pairs = resources.study, resources.test_pairs
    assert [arm.strategies for arm in arms] == [(name,) for name in PHASES]
    assert (study.seeds, study.pair_seed) == ((5, 6, 7), 5)
    assert study.adapters == ("phase4+6_tiny", "phase6_codes_tiny", "phase6_tiny")
    assert {pair.target for pair in pairs.pairs} == {pair.source_speaker for pair in pairs.pairs} == set(HELD_OUT)
    assert len(resources.corpus.speakers("train")) >= 20  # some of 24 become dev speakers
    assert runner("quickstart", "--out", tmp_path / "a", "--seed", 6) == 2, "another corpus is not overwritten"


def test_folders_called_plugins_and_runner_beside_a_script_hide_no_strategy(tmp_path: Path) -> None:
    for name in ("plugins", "runner"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("MINE = True\n")
    (tmp_path / "script.py").write_text(SCRIPT)
    found = run("script.py", cwd=tmp_path).strip().split(",")
    assert found == list(discover().strategies)
    assert set(PHASES) <= set(found)
