"""The recipe that trains the base and adapters on it in parts."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import base_and_adapters
import pytest
import typer
from base_and_adapters import LEAST_SECONDS, Step, run, steps

from snac_core import SNAC
from snac_runner.data.synth import synthesize


class Command:
    """A command that stops, and writes a checkpoint, at the first signal to stop; the second ends it at once."""

    def __init__(self, first: BaseException, signals: int) -> None:
        self.first, self.signals, self.waited = first, signals, 0

    def wait(self, seconds: float | None = None) -> None:
        self.waited += 1
        if self.waited == 1:
            raise self.first

    def send_signal(self, number: int) -> None:
        assert number == signal.SIGINT
        self.signals += 1

    @property
    def returncode(self) -> int:
        return 130


@pytest.mark.parametrize(
    "command",
    [
        Command(KeyboardInterrupt(), signals=1),  # that of the terminal
        Command(subprocess.TimeoutExpired("runner", 1.0), signals=0),
    ],
    ids=["Ctrl-C", "time is over"],
)
def test_a_step_is_told_to_stop_once(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_and_adapters.subprocess, "Popen", lambda _: command)
    assert not run(Step(tmp_path, ["train"], ["train", "--resume"]), 1.0)
    assert command.signals == 1
    assert command.waited == 2, "it waits until the checkpoint is written"


def test_its_first_step_makes_the_base_of_all_others_and_a_mistake_ends_it(tmp_path: Path) -> None:
    data, out = tmp_path / "speech", tmp_path / "runs"
    synthesize(data, speakers=8, sentences=2, seed=0)
    first, *others = steps(str(data), out, "", "", True)
    assert not first.is_finished
    assert run(first, 100 * LEAST_SECONDS)
    assert first.is_finished
    assert SNAC.from_pretrained(out / "base" / "model").digest != SNAC.from_pretrained("tiny").digest
    assert len(others) == 6
    assert all(str(out / "base" / "model") in step.command for step in others)
    nowhere, *_ = steps(str(tmp_path / "nowhere"), tmp_path / "other", "", "", True)
    with pytest.raises(typer.Exit) as ended:
        run(nowhere, 100 * LEAST_SECONDS)
    assert ended.value.exit_code == 2
