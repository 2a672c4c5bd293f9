"""Folders of runs: what they hold, times aside, and what of it is finished."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch

from snac_runner.batch_convert import JOURNAL

TIMES = {
    "seconds", "seconds_alone", "seconds_own", "seconds_shared", "times_real_time", "peak_memory", "peak_memory_bytes",
    "started", "ended", "command", "hardware", "git",
}  # fmt: skip
NOT_COMPARED = re.compile(
    r"(^|/)(events\.|\.|report\.(html|md)|tables/(cost|provenance)|.*\.lock$|partial-)"  # times, hosts, temporary files
)


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder that is compared, to a digest of what it says, times aside."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not NOT_COMPARED.search(name):
            found[name] = digest(path)
    return found


def digest(path: Path) -> str:
    """Digest (hex) of what a file says, times aside."""
    return hashlib.sha256(_timeless(path)).hexdigest()


def _timeless(path: Path) -> bytes:
    if path.suffix == ".pt":
        return repr(_without_times(torch.load(path, weights_only=True))).encode()
    if path.suffix in (".json", ".jsonl"):
        lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        if path.name == JOURNAL:  # has a line more for a conversion that was begun twice
            lines = sorted({line for line in lines if line})
        return json.dumps([_without_times(json.loads(line)) for line in lines]).encode()
    if path.suffix == ".log":
        return re.sub(rb" seconds=\S+", b"", path.read_bytes())
    return path.read_bytes()


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_times(item) for key, item in value.items() if key not in TIMES}
    if isinstance(value, list | tuple):
        return [_without_times(item) for item in value]
    return value.numpy().tobytes() if isinstance(value, torch.Tensor) else value


def differences(found: dict[str, str], expected: dict[str, str]) -> list[str]:
    """Files that are missing, differ or are too many."""
    return [
        f"{name} {'is missing' if name not in found else 'is left over' if name not in expected else 'differs'}"
        for name in sorted(found.keys() | expected.keys())
        if found.get(name) != expected.get(name)
    ]


def finished(folder: Path) -> dict[str, tuple[bytes, int]]:
    """What is finished in a folder, with bytes and time of change: runs with models, controls, conversions."""
    runs = [path.parent for path in folder.rglob("result.json") if json.loads(path.read_text())["status"] == "success"]
    files = [path for run in runs for path in (run / "result.json", *(run / "model").glob("[!.]*"))]
    if not runs:
        files = [
            path for path in folder.rglob("*.wav") if not path.name.startswith(".") and "samples" not in path.parts
        ]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def complaint(code: int, said: str) -> str | None:
    """What is wrong with the end of a command that could not do its work: expected is exit code 2 and a sentence."""
    if "Traceback" in said:
        return "a traceback: " + said.strip().splitlines()[-1]
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    if code != 2:
        return f"exit code {code}, {' '.join(said.split())[-200:]!r}"
    return None if len(lines) == 1 and len(lines[0].split()) > 3 else f"no single sentence, but {lines}"
