"""Files are whole or not there."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from snac_core import files


def test_writing_makes_the_folder_and_leaves_one_file_with_ordinary_rights(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "note.txt"
    files.write_text(path, "grüße\n")
    assert path.read_bytes() == "grüße\n".encode()
    assert list(path.parent.iterdir()) == [path]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_what_stood_there_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "bytes"
    files.write_bytes(path, b"one")
    files.write_bytes(path, b"two")
    assert path.read_bytes() == b"two"


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), ValueError()])
def test_whatever_interrupts_the_writing_what_stood_there_survives_alone(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "model.safetensors"
    files.write_bytes(path, b"whole")

    def write() -> None:
        with files.writing(path) as temporary:
            temporary.write_bytes(b"half")
            assert temporary.parent == path.parent, "a rename across file systems would not be atomic"
            assert temporary.suffix == path.suffix
            raise error

    with pytest.raises(type(error)):
        write()
    assert path.read_bytes() == b"whole"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("call", ["os.fsync", "pathlib.Path.replace"])
def test_a_disk_that_fails_at_the_last_moment_leaves_what_stood_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "result.json"
    files.write_json(path, {"status": "success"})

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(call, full)
    with pytest.raises(OSError, match="No space left"):
        files.write_json(path, {"status": "failed"})
    monkeypatch.undo()
    assert json.loads(path.read_text()) == {"status": "success"}
    assert list(tmp_path.iterdir()) == [path]


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    program = """
import os, sys
from snac_core.files import writing
with writing(sys.argv[1]) as temporary:
    temporary.write_bytes(b"half")
    os.kill(os.getpid(), 9)
"""
    kept = [tmp_path / "model" / "model.safetensors", tmp_path / ".lock", tmp_path / "model" / ".hidden.json"]
    for path in kept:
        files.write_bytes(path, b"whole")
    killed = subprocess.run([sys.executable, "-c", program, kept[0]], check=False, capture_output=True)
    assert killed.returncode == -9, killed.stderr
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 4
    files.remove_unfinished(tmp_path)
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(kept)
    assert all(path.read_bytes() == b"whole" for path in kept)


def test_nan_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(tmp_path / "result.json", {"secs": float("nan")})
    assert not list(tmp_path.iterdir())
