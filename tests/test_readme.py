"""Every block of the README does what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from snac_runner.cli import main

REPOSITORY = Path(__file__).parent.parent
README = (REPOSITORY / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)


def blocks(language: str) -> list[str]:
    return [text for found, text in BLOCKS if found == language]


def test_the_python_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks("python")[0], "README.md", "exec"), {"__name__": "readme"})


def test_the_strategy_block_passes_the_conformance_kit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code = blocks("python")[1]
    assert len([line for line in code.splitlines() if line.strip()]) < 30
    Path("speaker_gate.py").write_text(code)
    with pytest.raises(SystemExit) as end:
        main(["check", "speaker_gate.py", "--no-compile"])
    assert end.value.code == 0, capsys.readouterr()


def test_the_readme_is_short_and_its_pictures_exist() -> None:
    assert len(README.splitlines()) < 150
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", README)
    assert pictures
    for picture in pictures:
        path = REPOSITORY / picture
        assert 0 < path.stat().st_size < 200_000, "a picture is part of every checkout"


def commands() -> list[list[str]]:
    lines = [line.partition("#")[0].split() for text in blocks("bash") for line in text.splitlines()]
    return [line for line in lines if line and line[0] == "runner"]


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_the_options_of_every_command_exist(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    words = [word for word in command[1:] if not word.startswith("-")]
    names = words[:2] if words[0] in ("data", "index") else words[:1]
    with pytest.raises(SystemExit):
        main([*names, "--help"])
    text = capsys.readouterr().out
    for option in (word for word in command if word.startswith("--")):
        assert option in text
