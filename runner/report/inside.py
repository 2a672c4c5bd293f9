"""Tables of what no judge hears: the codes, the edits at the taps, and what an arm costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import compress

from runner.report.results import Run, Study, finite
from runner.report.tables import BLANK, EMPTY, Cell, Column, Row, Table, text_cell
from runner.report.wording import called, number


def codes_table(study: Study) -> Table | None:
    """Per codebook level, mean over seeds: codes changed by the conditioning, perplexity, and what a probe hears."""
    fields = (
        ("changed", "Changed", "%", 100.0, 1, "share of codes that the conditioning changes"),
        ("perplexity", "Perplexity", "", 1.0, 0, "of the converted output's codes"),
        ("used", "In use", "", 1.0, 0, "entries of the codebook that the conversions use"),
        ("probe_source", "Source heard", "%", 100.0, 0,
         "a linear probe, trained on real speech through the bare codec, hears the source speaker in the codes"),
        ("probe_target", "Target heard", "%", 100.0, 0, "the same probe hears the target"),
    )  # fmt: skip
    runs = {name: [r.result.codes for r in runs if r.ok and r.result is not None] for name, runs in _with_codes(study)}
    marks = list(study.arms)
    columns, grid = [Column("Arm", numeric=False)], {name: [text_cell(called(name))] for name in runs}
    for field, label, unit, scale, digits, meaning in fields:
        averages = {name: _levels([getattr(c, field) for c in codes]) for name, codes in runs.items()}
        depth = max((len(x) for x in averages.values()), default=0)
        columns += [Column(f"{label}, level {i + 1}", unit, "", meaning) for i in range(depth)]
        for name, levels in averages.items():
            grid[name] += [
                Cell(number(scale * v, digits), scale * v) if v is not None else EMPTY for v in _padded(levels, depth)
            ]
    rows = [
        Row(cells, "arm" if name in marks else "control", marks.index(name) if name in marks else None)
        for name, cells in grid.items()
        if any(cell.value is not None for cell in cells[1:])
    ]
    speakers = {c.probe_speakers for codes in runs.values() for c in codes if c.probe_speakers}
    note = f"By chance the probe would be right in {100 / min(speakers):.1f} %." if speakers else ""
    return Table("codes", "Codes, level 1 the coarsest", columns, rows, note) if rows else None


def taps_table(study: Study) -> Table | None:
    """Size of the edit at every tap, mean over seeds, relative to what is edited there."""
    edits = {
        name: [r.result.codes.edits for r in runs if r.ok and r.result is not None] for name, runs in _with_codes(study)
    }
    taps = sorted({tap for of in edits.values() for e in of for tap in e}, key=_place_of_tap)
    if not taps:
        return None
    marks, rows = list(study.arms), []
    for name, of in edits.items():
        means = [_mean([v for e in of if (v := finite(e.get(tap))) is not None]) for tap in taps]
        if any(m is not None for m in means):
            cells = [Cell(number(100 * m, 1), 100 * m) if m is not None else BLANK for m in means]
            mark = marks.index(name) if name in marks else None
            rows.append(Row([text_cell(called(name)), *cells], "control" if mark is None else "arm", mark))
    columns = [Column("Arm", numeric=False), *(Column(tap, "%") for tap in taps)]
    return Table("taps", "Size of the edit at every tap, of what is edited there", columns, rows)


def _with_codes(study: Study) -> list[tuple[str, tuple[Run, ...]]]:
    """The arms that finished, and the control that is trained like one."""
    beside = [
        (name, (run,)) for name, run in study.controls.items() if run.result is not None and run.result.codes.edits
    ]
    return [*((arm, study.arms[arm]) for arm in study.finished()), *beside]


def _place_of_tap(tap: str) -> tuple[int, str]:
    order = ("encoder", "latent", "quantized", "decoder")
    return next((i for i, start in enumerate(order) if tap.startswith(start)), len(order)), tap


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _padded(values: list[float | None], depth: int) -> list[float | None]:
    return values + [None] * (depth - len(values))


def _levels(runs: Sequence[Sequence[float | None]]) -> list[float | None]:
    depth = max((len(r) for r in runs), default=0)
    found: list[float | None] = []
    for i in range(depth):
        known = [v for r in runs if i < len(r) and (v := finite(r[i])) is not None]
        found.append(sum(known) / len(known) if known else None)
    return found


def cost_table(study: Study) -> Table | None:
    """Means over an arm's successful runs."""
    fields = (
        ("seconds_alone", Column("Alone", "s", "↓", "seconds as if trained alone: shared + own"), 1, 1.0),
        ("seconds_own", Column("Own", "s", "↓"), 1, 1.0),
        ("seconds_shared", Column("Shared", "s", "", "work done once for all arms of a seed"), 1, 1.0),
        ("steps", Column("Steps"), 0, 1.0),
        ("parameters", Column("Parameters", "thousand", "↓", "trainable"), 1, 1e-3),
        ("bytes", Column("Model", "MB", "↓", "size of the saved strategies"), 2, 1e-6),
        ("peak_memory_bytes", Column("Peak memory", "MB", "↓", "of the whole process"), 0, 1e-6),
        (
            "times_real_time",
            Column("Converts", "× real time", "↑", "one source at a time, on the machine that judged it"),
            1,
            1.0,
        ),
    )
    marks = list(study.arms)
    rows = []
    for arm in study.finished():
        costs = [r.result.cost for r in study.arms[arm] if r.ok and r.result is not None]
        cells: list[Cell] = []
        for name, _, digits, scale in fields:
            known = [v * scale for c in costs if (v := finite(getattr(c, name))) is not None]
            mean = sum(known) / len(known) if known else math.nan
            cells.append(Cell(number(mean, digits), mean) if known else EMPTY)
        rows.append(Row([text_cell(arm), *cells], "arm", marks.index(arm)))
    known_of = [any(row.cells[1 + place].value is not None for row in rows) for place in range(len(fields))]
    if not any(known_of):
        return None
    columns = [Column("Arm", numeric=False), *compress((field[1] for field in fields), known_of)]
    rows = [replace(row, cells=list(compress(row.cells, [True, *known_of]))) for row in rows]
    return Table("cost", "Cost of one run", columns, rows)
