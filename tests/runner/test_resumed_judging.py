"""Evaluation resumes at the conversion where it stopped, and no audio is transcribed twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from small_study import Bench, result

from snac_core.metric import Conversion, Metric
from snac_runner.controls import run_controls
from snac_runner.evaluate import systems
from snac_runner.evaluate.content import cached_transcripts
from snac_runner.evaluate.scoring import Journal, available, journal_key, score
from snac_runner.resources import StudyResources

DRIVER = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from small_study import SMALL
from snac_runner.config import StudySettings
from snac_runner.evaluate import systems
from snac_runner.evaluate.scoring import Journal, journal_key, score
from snac_runner.resources import StudyResources
from snac_core.metric import Metric
from snac_core.plugins import discover

class Slow(Metric):
    name = "slow"
    def __call__(self, conversion):
        with open({called!r}, "a") as file:
            file.write(conversion.pair + "\\n")
        time.sleep({pause})
        return float(conversion.converted.double().square().sum())

study = StudySettings(**{{**SMALL, "data": {data!r}, "base": {base!r}, "test_pairs": 6, "pair_seconds": 0.7}})
resources = StudyResources(study, discover())
metrics = {{"slow": Slow()}}
key = journal_key({{"control": "floor"}}, resources.test, metrics)
score(systems.floor(resources.codec), resources.test, metrics, journal=Journal(Path({journal!r}), key))
"""


class Energy(Metric):
    """The metric of the killed process, without its delay."""

    name = "slow"
    calls: list[str] = []  # noqa: RUF012

    def __call__(self, conversion: Conversion) -> float | None:
        self.calls.append(conversion.pair)
        return float(conversion.converted.double().square().sum())


def rows(path: Path) -> list[str]:
    """The lines of a journal after its first."""
    return path.read_text().splitlines()[1:] if path.is_file() else []


def test_a_killed_evaluation_resumes_at_its_conversion(bench: Bench, tmp_path: Path) -> None:
    journal, called = tmp_path / "judged.jsonl", tmp_path / "called"
    script = DRIVER.format(
        tests=str(Path(__file__).parent), called=str(called), data=str(bench.speech), base=str(bench.base),
        journal=str(journal), pause=0.4,
    )  # fmt: skip
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", script], env=os.environ)
    deadline = time.monotonic() + 120
    while len(rows(journal)) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = len(rows(journal))
    assert 2 <= done < 6
    resources = bench.resources(bench.study(test_pairs=6, pair_seconds=0.7))
    floor, only = systems.floor(resources.codec), {"slow": Energy()}
    key = journal_key({"control": "floor"}, resources.test, only)
    resumed = score(floor, resources.test, only, journal=Journal(journal, key))
    assert len(Energy.calls) == 6 - done
    again = called.read_text().split() + Energy.calls
    assert len(set(again)) == 6
    assert len(again) <= 7  # only the conversion that the kill cut short is judged twice
    assert resumed.utterances == score(floor, resources.test, only).utterances


def test_rows_of_another_system_or_other_metrics_are_discarded(tmp_path: Path) -> None:
    path = tmp_path / "judged.jsonl"
    Journal(path, {"run": "a"}).add({"pair": "1", "metrics": {"x": 0.1}})
    assert list(Journal(path, {"run": "a"}).rows) == ["1"]
    assert Journal(path, {"run": "b"}).rows == {}


def test_an_incomplete_line_is_discarded(tmp_path: Path) -> None:
    path = tmp_path / "judged.jsonl"
    journal = Journal(path, {"run": "a"})
    journal.add({"pair": "1", "x": 1 / 3})
    with path.open("a") as file:
        file.write('{"pair": "2", "x"')
    again = Journal(path, {"run": "a"})
    assert again.rows == {"1": {"pair": "1", "x": 1 / 3}}
    again.add({"pair": "2", "x": 2.0})
    assert [json.loads(line)["pair"] for line in rows(path)] == ["1", "2"]


def test_a_damaged_line_is_scored_again_and_costs_no_other(tmp_path: Path) -> None:
    path = tmp_path / "judged.jsonl"
    journal = Journal(path, {"run": "a"})
    for pair in "1234":
        journal.add({"pair": pair})
    lines = path.read_bytes().split(b"\n")
    lines[2], lines[3] = bytes(len(lines[2])), b'["\xff"]'  # what a file system may leave after a power failure
    path.write_bytes(b"\n".join(lines))
    assert list(Journal(path, {"run": "a"}).rows) == ["1", "4"]
    assert [json.loads(line)["pair"] for line in rows(path)] == ["1", "4"]


def test_audio_is_transcribed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SNAC_CACHE", str(tmp_path))
    made: list[int] = []

    def transcribe(waves: Sequence[torch.Tensor]) -> list[str]:
        made.append(len(waves))
        return [f"{len(wave)} boats sank" for wave in waves]

    audio, longer = torch.linspace(-1, 1, 100), torch.linspace(-1, 1, 200)
    for _ in range(3):
        assert cached_transcripts("r 1", [audio], 16000, transcribe) == ["100 boats sank"]
    assert made == [1]
    expected = ["100 boats sank", "200 boats sank", "100 boats sank", "200 boats sank"]
    assert cached_transcripts("r 1", [audio, longer, audio, longer], 16000, transcribe) == expected
    assert made == [1, 1]
    for recogniser, wave, rate in (("r 2", audio, 16000), ("r 1", audio, 24000), ("r 1", audio + 1e-6, 16000)):
        cached_transcripts(recogniser, [wave], rate, transcribe)
    assert made == [1] * 5


class Counting(Metric):
    """Records the conversions that it is called with."""

    name = "counting"
    calls: list[str] = []  # noqa: RUF012

    def __call__(self, conversion: Conversion) -> float | None:
        self.calls.append(conversion.pair)
        return 0.5


def test_controls_are_judged_once_for_all_arms(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resources = StudyResources.__new__(StudyResources)
    vars(resources).update(vars(bench.resources(bench.study())))
    monkeypatch.setattr("snac_runner.controls.available", lambda *_, **__: ({"counting": Counting()}, {}))
    for _ in range(2):
        run_controls(tmp_path, resources)
    judged = len(list((tmp_path / "controls").iterdir()))
    assert judged >= 3
    assert len(Counting.calls) == judged * len(resources.test.items)
    assert result(tmp_path / "controls" / "floor")["metrics"]["counting"]["mean"] == 0.5


def test_a_resumed_score_equals_an_uninterrupted_one(bench: Bench, tmp_path: Path) -> None:
    resources = bench.resources(bench.study())
    metrics, _ = available(resources.catalogue)
    key = journal_key({}, resources.test, metrics)
    first, again, plain = (
        score(
            systems.floor(resources.codec), resources.test, metrics, keep=1,
            journal=Journal(tmp_path / "judged.jsonl", key) if kept else None,
        )
        for kept in (True, True, False)
    )  # fmt: skip
    assert first.utterances == again.utterances == plain.utterances
    assert first.pooled == again.pooled
    assert list(again.renderings) == list(first.renderings)
