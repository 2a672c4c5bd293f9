"""Training curves of a study, read from each run's metrics.jsonl."""

from __future__ import annotations

import json
from dataclasses import dataclass

from markupsafe import Markup

from runner.report.plots import Line, curves
from runner.report.results import Run, Study, finite

FIRST = ("loss", "spk_id", "spk_vc", "spk_synth", "gap")


@dataclass(frozen=True)
class Panel:
    """One quantity over training, all arms and seeds."""

    name: str
    title: str
    svg: Markup


def read_curves(run: Run) -> dict[str, list[tuple[float, float]]]:
    """Quantity -> (step, value), from metrics.jsonl; dev evaluations are named "dev ...", broken lines left out."""
    path = run.folder / "metrics.jsonl"
    found: dict[str, list[tuple[float, float]]] = {}
    if not path.is_file():
        return found
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:  # the last line of a killed run may be half written
            continue
        if not isinstance(line, dict) or (step := finite(line.get("step"))) is None:
            continue
        dev = line.get("dev")
        entries = [(name, line.get(name)) for name in FIRST]
        entries += [(f"dev {name}", value) for name, value in dev.items()] if isinstance(dev, dict) else []
        for name, value in entries:
            if (number := finite(value)) is not None:
                found.setdefault(name, []).append((step, number))
    return found


def panels(study: Study) -> list[Panel]:
    """Every quantity that some run logged: the loss and the teacher's distances, then what the judge said on dev."""
    lines: dict[str, list[Line]] = {}
    for mark, (arm, runs) in enumerate(study.arms.items()):
        for place, run in enumerate(runs):
            label = arm if run.seed is None else f"{arm}, seed {run.seed}"
            for name, points in read_curves(run).items():
                lines.setdefault(name, []).append(Line(label, mark, place, sorted(points)))
    order = [n for n in FIRST if n in lines] + sorted(n for n in lines if n.startswith("dev "))
    return [
        Panel(n, _title(n), curves(lines[n], f"{_title(n)} over training steps, every arm and seed")) for n in order
    ]


def _title(name: str) -> str:
    if name.startswith("dev "):
        return f"dev · {name.removeprefix('dev ')}"
    return name if name == "loss" else f"{name} (teacher)"
