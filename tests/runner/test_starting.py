"""How the command line is started, and what the user's own folder may contain."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from small_study import PHASES

from snac_core.plugins import discover

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


def test_folders_called_plugins_and_runner_beside_a_script_hide_no_strategy(tmp_path: Path) -> None:
    for name in ("plugins", "runner"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("MINE = True\n")
    (tmp_path / "script.py").write_text(SCRIPT)
    found = run("script.py", cwd=tmp_path).strip().split(",")
    assert found == list(discover().strategies)
    assert set(PHASES) <= set(found)
