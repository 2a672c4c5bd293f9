"""Judged conversions as they come, one line each, so that judging goes on where it was stopped or killed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from snac_core import atomic


class Journal:
    """A file of rows that belongs to one system, list of conversions and set of metrics; any other file is begun anew.

    A line that was half written when the process died is dropped, and its conversion judged again.

    Args:
        path: of the file.
        key: all that the rows depend on.
    """

    def __init__(self, path: Path, key: Mapping[str, Any]) -> None:
        self.path = path
        self.rows: dict[str, dict[str, Any]] = {}
        header = json.dumps({"key": dict(key)}, sort_keys=True)
        lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
        if lines and lines[0] == header:
            for line in lines[1:-1]:  # what follows the last newline was cut off
                row = json.loads(line)
                self.rows[row["pair"]] = row
        atomic.write_text(path, "".join(f"{line}\n" for line in [header, *map(json.dumps, self.rows.values())]))

    def add(self, row: dict[str, Any]) -> None:
        """Append a row, on the disk before this returns."""
        self.rows[row["pair"]] = row
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
