"""`self.config` has the type of the nested Config, for type checkers too."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from small_codec import small

from snac_core import Strategy, Taps

PLUGIN = """
from typing import assert_type

from pydantic import Field
from torch import Tensor

from snac_core import Step, Strategy, Taps, hookimpl


class Gate(Strategy):
    name = "gate"

    class Config(Strategy.Config):
        width: int = Field(3, description="Width.")

    def __init__(self, config: Config, taps: Taps) -> None:
        super().__init__(config, taps)
        assert_type(self.config, Gate.Config)

    @hookimpl
    def loss(self, step: Step) -> dict[str, Tensor]:
        assert_type(self.config.width, int)
        return {"size": step.audio.abs().mean() * self.config.WIDTH}


class Plain(Strategy):
    name = "plain"

    def settings(self) -> Strategy.Config:
        return assert_type(self.config, Strategy.Config)
"""


@pytest.mark.slow
def test_mypy_knows_the_settings_of_a_plugin_and_finds_a_misspelt_one(tmp_path: Path) -> None:
    (tmp_path / "width.py").write_text(PLUGIN.replace("WIDTH", "width"))
    (tmp_path / "widht.py").write_text(PLUGIN.replace("WIDTH", "widht"))
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache")]
    done = subprocess.run([*command, "width.py", "widht.py"], cwd=tmp_path, capture_output=True, text=True)
    errors = [line for line in done.stdout.splitlines() if ": error: " in line]
    assert [line.split(":")[0] for line in errors] == ["widht.py"], done.stdout
    assert '"Config" has no attribute "widht"; maybe "width"?' in errors[0]


def test_the_settings_are_the_instance_that_was_given_and_cannot_be_replaced() -> None:
    class Gate(Strategy):
        name = "gate"

        class Config(Strategy.Config):
            width: int = 3

    config = Gate.Config(width=5)
    gate = Gate(config, Taps(2, small().taps))
    assert gate.config is config
    with pytest.raises(AttributeError):
        gate.config = Gate.Config()  # type: ignore[misc]
