"""Every block of docs/speakers.md does what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from snac_runner.cli import main

PAGE = (Path(__file__).parent.parent / "docs" / "speakers.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, flags=re.DOTALL)


def test_the_python_blocks_run_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "page"}
    for language, text in BLOCKS:
        if language == "python":
            exec(compile(text, "docs/speakers.md", "exec"), names)
    assert "torch.Size([3, 10])" in capsys.readouterr().out


@pytest.mark.parametrize(
    "command",
    [line.split() for language, text in BLOCKS if language == "bash" for line in text.splitlines()],
    ids=" ".join,
)
def test_the_options_of_every_command_exist(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    names = [word for word in command[1:3] if not word.startswith("-")]
    with pytest.raises(SystemExit):
        main([*names, "--help"])
    text = capsys.readouterr().out
    assert all(option in text for option in command if option.startswith("--"))
