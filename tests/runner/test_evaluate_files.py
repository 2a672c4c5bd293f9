"""`runner evaluate --source --converted --target`: scores of files that belong to no study."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from small_study import runner


def scores(text: str) -> dict[str, float]:
    """Label to mean, from what the command prints."""
    lines = [line for line in text.splitlines() if line.startswith("  ")]
    return {line[2:44].strip(): float(line[44:].split()[0]) for line in lines}


@pytest.fixture
def speakers(bench: object, voices: list[Path], tmp_path: Path) -> tuple[Path, list[Path]]:
    """A recording of one speaker, and two of another."""
    return voices[0], sorted(voices[1].parent.glob("*.flac"))[:2]


def test_the_target_itself_scores_higher_than_the_source(
    speakers: tuple[Path, list[Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    source, (one, two) = speakers
    command = ["evaluate", "--source", source, "--target", one, "--converted"]
    found = []
    for converted in (source, two):
        assert runner(*command, converted) == 0
        found.append(scores(capsys.readouterr().out))
    unchanged, perfect = found
    assert unchanged["SECS"] == pytest.approx(unchanged["similarity of the source to the target"], abs=2e-3)
    assert perfect["SECS"] > unchanged["SECS"] + 0.1
    assert unchanged["Source similarity"] == pytest.approx(1, abs=2e-3)
    assert unchanged["Phone error rate"] == pytest.approx(0, abs=1e-6)  # the words are those of the source
    assert perfect["Phone error rate"] > 0.3  # another sentence


def test_folders_are_matched_by_name(
    tmp_path: Path, speakers: tuple[Path, list[Path]], capsys: pytest.CaptureFixture[str], refusal: Callable[..., str]
) -> None:
    source, targets = speakers
    for number, target in enumerate(targets):
        for folder, path in (("s", source), ("c", target), ("t", target)):
            (tmp_path / folder).mkdir(exist_ok=True)
            shutil.copy(path, tmp_path / folder / f"{number}.flac")
    command = ["evaluate", "--source", tmp_path / "s", "--converted", tmp_path / "c", "--target"]
    assert runner(*command, tmp_path / "t") == 0
    shown = capsys.readouterr().out
    assert "2 conversion(s)" in shown
    assert scores(shown)["SECS"] == pytest.approx(1, abs=2e-3)  # each against its own target file
    assert runner(*command, tmp_path / "t" / "0.flac") == 0
    assert scores(capsys.readouterr().out)["SECS"] < 0.999
    shutil.copy(source, tmp_path / "c" / "other.flac")
    assert "other.flac has no source of the same name" in refusal(*command, tmp_path / "t")
    soundfile.write(tmp_path / "silent.wav", np.zeros(16000), 16000)
    assert "silent.wav is silent" in refusal(
        "evaluate", "--source", source, "--converted", tmp_path / "silent.wav", "--target", targets[0]
    )
    assert "--converted needs --source" in refusal("evaluate", "--converted", source)
    assert "gone.wav does not exist" in refusal(
        "evaluate", "--source", source, "--converted", source, "--target", tmp_path / "gone.wav"
    )
