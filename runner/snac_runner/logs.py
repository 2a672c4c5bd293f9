"""Logs of a training: metrics.jsonl, training.log and TensorBoard events, with the same content."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

from snac_core.files import parse_json, write_text

_REMARK = "# "  # start of a line of training.log that is not a record


class RunLog:
    """The logs of one run folder.

    Args:
        folder: of the run.
        steps_per_epoch: batches that are enough to use every training utterance once.
        resumed_at: the step of the checkpoint that the run resumes from; records of later steps are removed.
    """

    def __init__(self, folder: Path, steps_per_epoch: int, resumed_at: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.steps_per_epoch = steps_per_epoch
        folder.mkdir(parents=True, exist_ok=True)
        self._events = SummaryWriter(str(folder), purge_step=resumed_at + 1)
        metrics, text = folder / "metrics.jsonl", folder / "training.log"
        said = text.read_text(errors="replace").splitlines(keepends=True) if text.is_file() else []
        self._remarks = [line for line in said if line.startswith(_REMARK) and line.endswith("\n")]
        kept = [record for record in read_metrics(metrics) if record["step"] <= resumed_at]
        write_text(metrics, "".join(json.dumps(record) + "\n" for record in kept))
        write_text(text, "".join([*self._remarks, *(self._line(record) + "\n" for record in kept)]))
        self._metrics: TextIO = metrics.open("a", buffering=1)
        self._text: TextIO = text.open("a", buffering=1)

    def write(self, record: dict[str, Any]) -> None:
        """Write one record: of a training step, or with the key "dev", of an evaluation on dev speakers."""
        record = {"step": record["step"], "epoch": self._epoch(record["step"]), **record}
        self._metrics.write(json.dumps(record) + "\n")
        self._text.write(self._line(record) + "\n")
        scalars = record.get("dev", record)
        prefix = "dev/" if "dev" in record else ""
        for name, value in scalars.items():
            if name not in ("step", "epoch") and isinstance(value, float):
                self._events.add_scalar(prefix + name, value, record["step"])

    def remark(self, text: str) -> None:
        """Write a line of text to training.log, once."""
        line = f"{_REMARK}{text}\n"
        if line not in self._remarks:
            self._remarks.append(line)
            self._text.write(line)

    def flush(self) -> None:
        """Write buffered events to disk; the other two files are line-buffered."""
        for file in (self._metrics, self._text):
            file.flush()
        self._events.flush()

    def close(self) -> None:
        """Close the files, also where one of them cannot be written."""
        with ExitStack() as closing:
            for file in (self._metrics, self._text, self._events):
                closing.callback(file.close)
            self.flush()

    def _epoch(self, step: int) -> int:
        return 1 + (step - 1) // self.steps_per_epoch

    def _line(self, record: dict[str, Any]) -> str:
        step = record["step"]
        place = f"Epoch {self._epoch(step)}, Batch {1 + (step - 1) % self.steps_per_epoch}/{self.steps_per_epoch}:"
        values = record.get("dev", record)
        shown = " ".join(
            f"{name}={value:.4g}"
            for name, value in values.items()
            if name not in ("step", "epoch") and isinstance(value, float)
        )
        return f"{place} {'dev ' if 'dev' in record else ''}step={step} {shown}"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The complete records of a metrics.jsonl; a line that a crash cut off is skipped."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(parse_json(line))
        except ValueError:
            continue
    return records
