"""Plots as inline SVG: ranking, trade-offs and training curves.

Colours come from the page's stylesheet (classes s0 to s7 for arms), so that one drawing fits light and dark themes, and
shapes distinguish arms as well. Coordinates are in units of the viewBox. Text is escaped here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from snac_core.files import parse_json
from snac_runner.report.results import Run, Study, finite

COLOURS = 8
MAX_NAMED = 6  # arms that a scatter plot has room to name


@dataclass(frozen=True)
class Point:
    """A point of a scatter plot, with interval bounds. `mark` is the number of the arm, None for a control."""

    label: str
    mark: int | None
    x: float
    y: float
    x_low: float | None = None
    x_high: float | None = None
    y_low: float | None = None
    y_high: float | None = None


@dataclass(frozen=True)
class Line:
    """A training curve. `seed_index` is 0 for the arm's first seed, which is solid; others are dashed."""

    label: str
    mark: int
    seed_index: int
    points: Sequence[tuple[float, float]]


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers covering [low, high], about `wanted` of them."""
    span = high - low
    step = 10 ** math.floor(math.log10(span / wanted))
    step *= min((1, 2, 2.5, 5, 10), key=lambda m: abs(span / (m * step) - wanted))
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def padded(values: Sequence[float], share: float = 0.08) -> tuple[float, float]:
    """Bounds of an axis: the range of the values and a margin."""
    low, high = min(values), max(values)
    margin = (high - low) * share or max(abs(high) * 0.1, 0.1)
    return low - margin, high + margin


def tick_text(value: float) -> str:
    """The label of a tick."""
    if value and (abs(value) >= 10_000 or abs(value) < 0.0001):
        return f"{value:.0e}".replace("-", "−")
    return f"{value:.6g}".replace("-", "−")


def marker(mark: int | None, x: str | float, y: str | float, size: float = 5.5) -> str:
    """The marker of an arm, or × for a control. Positions may be percentages, which need a nested svg."""
    shape = {
        0: f'<circle r="{size}"/>',
        1: f'<rect x="{-size * 0.9:.1f}" y="{-size * 0.9:.1f}" width="{size * 1.8:.1f}" height="{size * 1.8:.1f}"/>',
        2: f'<path d="M0 {-size * 1.2:.1f}L{size * 1.1:.1f} {size * 0.8:.1f}H{-size * 1.1:.1f}Z"/>',
        3: f'<path d="M0 {-size * 1.25:.1f}L{size * 1.25:.1f} 0L0 {size * 1.25:.1f}L{-size * 1.25:.1f} 0Z"/>',
        4: f'<path d="M0 {size * 1.2:.1f}L{size * 1.1:.1f} {-size * 0.8:.1f}H{-size * 1.1:.1f}Z"/>',
    }
    if mark is None:
        body, name = f'<path d="M{-size} {-size}L{size} {size}M{-size} {size}L{size} {-size}"/>', "control"
    else:
        body, name = shape[(mark + mark // COLOURS) % len(shape)], f"s{mark % COLOURS}"
    return f'<svg x="{x}" y="{y}" overflow="visible" class="mark {name}">{body}</svg>'


def key_mark(mark: int | None) -> Markup:
    """A marker for legends and table rows."""
    return Markup(f'<svg class="key" width="14" height="14" aria-hidden="true">{marker(mark, 7, 7, 4.6)}</svg>')


class _Axes:
    """Axes with ticks; `x` and `y` map data to the viewBox."""

    def __init__(
        self, xs: Sequence[float], ys: Sequence[float], width: int, height: int, x_label: str, y_label: str
    ) -> None:
        self.width, self.height = width, height
        self.left, self.right, self.top, self.bottom = 56, 12, 12, 40 if x_label else 26
        self.x0, self.x1 = padded(xs, 0.06)
        self.y0, self.y1 = padded(ys)
        self.parts: list[str] = []
        for value in ticks(self.x0, self.x1, 5):
            x = self.x(value)
            self.parts.append(
                f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{self.top}" y2="{height - self.bottom}"/>'
            )
            self.text(x, height - self.bottom + 16, tick_text(value), "tick middle")
        for value in ticks(self.y0, self.y1, 4):
            y = self.y(value)
            self.parts.append(
                f'<line class="grid" x1="{self.left}" x2="{width - self.right}" y1="{y:.1f}" y2="{y:.1f}"/>'
            )
            self.text(self.left - 7, y + 4, tick_text(value), "tick end")
        if x_label:
            self.text((self.left + width - self.right) / 2, height - 6, x_label, "axis middle")
        if y_label:
            middle = (self.top + height - self.bottom) / 2
            self.parts.append(
                f'<text class="axis middle" transform="translate(12 {middle:.1f}) rotate(-90)">{escape(y_label)}</text>'
            )

    def x(self, value: float) -> float:
        return self.left + (value - self.x0) / (self.x1 - self.x0) * (self.width - self.left - self.right)

    def y(self, value: float) -> float:
        return (
            self.height - self.bottom - (value - self.y0) / (self.y1 - self.y0) * (self.height - self.top - self.bottom)
        )

    def text(self, x: float, y: float, text: str, kind: str) -> None:
        self.parts.append(f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>')

    def svg(self, label: str) -> Markup:
        opening = f'<svg class="plot" viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{escape(label)}">'
        return Markup(opening + "".join(self.parts) + "</svg>")


Box = tuple[float, float, float, float]  # left, top, right, bottom


def _label_position(axes: _Axes, p: Point, taken: Sequence[Box]) -> tuple[Box, bool]:
    """The position of a point's name that overlaps least, and whether the name ends at the point."""
    x, y, wide = axes.x(p.x), axes.y(p.y), 6.8 * len(p.label)
    choices: list[tuple[float, Box, bool]] = []
    for rise in (-8, 20, -22, 34):
        for end in (False, True):
            left = x - 9 - wide if end else x + 9
            box = (left, y + rise - 11, left + wide, y + rise + 3)
            clash = sum(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken)
            outside = box[0] < axes.left or box[2] > axes.width or box[1] < 0
            choices.append((clash + 2 * outside, box, end))
    _, box, end = min(choices, key=lambda c: c[0])
    return box, end


def pareto(points: Sequence[Point], x_label: str, y_label: str, label: str) -> Markup:
    """A scatter plot of two metrics with intervals. Points are named; if there are many arms, only the others are."""
    many = sum(p.mark is not None for p in points) > MAX_NAMED
    xs = [v for p in points for v in (p.x, p.x_low, p.x_high) if v is not None]
    ys = [v for p in points for v in (p.y, p.y_low, p.y_high) if v is not None]
    axes = _Axes(xs, ys, 400, 300, x_label, y_label)
    for p in points:
        name = "control" if p.mark is None else f"s{p.mark % COLOURS}"
        x, y = axes.x(p.x), axes.y(p.y)
        if p.x_low is not None and p.x_high is not None:
            ends = f'x1="{axes.x(p.x_low):.1f}" x2="{axes.x(p.x_high):.1f}" y1="{y:.1f}" y2="{y:.1f}"'
            axes.parts.append(f'<line class="whisker {name}" {ends}/>')
        if p.y_low is not None and p.y_high is not None:
            ends = f'x1="{x:.1f}" x2="{x:.1f}" y1="{axes.y(p.y_low):.1f}" y2="{axes.y(p.y_high):.1f}"'
            axes.parts.append(f'<line class="whisker {name}" {ends}/>')
        axes.parts.append(marker(p.mark, f"{x:.1f}", f"{y:.1f}"))
    taken = [(axes.x(p.x) - 8, axes.y(p.y) - 8, axes.x(p.x) + 8, axes.y(p.y) + 8) for p in points]
    for p in sorted((p for p in points if p.mark is None or not many), key=lambda q: -q.y):
        box, end = _label_position(axes, p, taken)
        taken.append(box)
        axes.text(box[2] if end else box[0], box[3] - 3, p.label, "name end" if end else "name")
    return axes.svg(label)


def thinned(points: Sequence[tuple[float, float]], most: int = 160) -> list[tuple[float, float]]:
    """At most `most` points: means of consecutive points."""
    if len(points) <= most:
        return list(points)
    found = []
    for i in range(most):
        part = points[i * len(points) // most : (i + 1) * len(points) // most]
        found.append((sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)))
    return found


def curves(lines: Sequence[Line], label: str) -> Markup:
    """Training curves over steps: a colour per arm, a dash pattern per seed."""
    kept = [(line, thinned(line.points)) for line in lines if line.points]
    axes = _Axes([x for _, p in kept for x, _ in p], [y for _, p in kept for _, y in p], 360, 210, "", "")
    for line, points in kept:
        coordinates = " ".join(f"{axes.x(x):.1f},{axes.y(y):.1f}" for x, y in points)
        title = f"<title>{escape(line.label)}</title>"
        style = f"line s{line.mark % COLOURS} seed{line.seed_index % 4}"
        if len(points) == 1:
            axes.parts.append(marker(line.mark, f"{axes.x(points[0][0]):.1f}", f"{axes.y(points[0][1]):.1f}", 4))
        else:
            axes.parts.append(f'<polyline class="{style}" points="{coordinates}">{title}</polyline>')
            if line.seed_index == 0:  # colours repeat after eight arms, so shapes distinguish arms
                x, y = points[-1]
                axes.parts.append(marker(line.mark, f"{axes.x(x):.1f}", f"{axes.y(y):.1f}", 3))
    return axes.svg(label)


@dataclass(frozen=True)
class Bar:
    """A row of the ranking: its plot, and the mean and interval as text."""

    label: str
    mark: int | None
    text: str
    detail: str
    svg: Markup


@dataclass(frozen=True)
class RankedMean:
    """A mean with its interval, as numbers and as text. `mark` is the number of the arm, None for a control."""

    label: str
    mark: int | None
    mean: float
    low: float | None
    high: float | None
    text: str
    detail: str


def ranking(rows: Sequence[RankedMean], references: Sequence[float]) -> tuple[list[Bar], list[tuple[float, str]]]:
    """Means on one axis, with reference lines.

    Positions are percentages, so that a page can stretch the plots to any width and texts keep their size.

    Returns:
        a bar per row, and the ticks as (position in percent, label).
    """
    values = [v for row in rows for v in (row.mean, row.low, row.high) if v is not None] + list(references)
    x0, x1 = padded(values, 0.05)

    def at(value: float) -> str:
        return f"{100 * (value - x0) / (x1 - x0):.2f}%"

    marks = ticks(x0, x1, 5)
    bars = []
    for row in rows:
        parts = [f'<line class="grid" x1="{at(v)}" x2="{at(v)}" y1="0" y2="100%"/>' for v in marks]
        parts += [f'<line class="reference" x1="{at(v)}" x2="{at(v)}" y1="0" y2="100%"/>' for v in references]
        if row.low is not None and row.high is not None:
            kind = "control" if row.mark is None else f"s{row.mark % COLOURS}"
            parts.append(f'<line class="interval {kind}" x1="{at(row.low)}" x2="{at(row.high)}" y1="50%" y2="50%"/>')
        parts.append(marker(row.mark, at(row.mean), "50%", 6))
        svg = Markup(f'<svg class="track" width="100%" height="34" aria-hidden="true">{"".join(parts)}</svg>')
        bars.append(Bar(row.label, row.mark, row.text, row.detail, svg))
    return bars, [(100 * (v - x0) / (x1 - x0), tick_text(v)) for v in marks]


FIRST = ("loss", "spk_id", "spk_vc", "spk_synth", "gap")


@dataclass(frozen=True)
class Panel:
    """The training curves of one quantity, of all arms and seeds."""

    name: str
    title: str
    svg: Markup


def read_curves(run: Run) -> dict[str, list[tuple[float, float]]]:
    """Quantity to (step, value), from metrics.jsonl. Evaluations on dev are named "dev ..."."""
    path = run.folder / "metrics.jsonl"
    found: dict[str, list[tuple[float, float]]] = {}
    if not path.is_file():
        return found
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = parse_json(text)
        except ValueError:  # the last line of a killed run may be incomplete
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
    """Every quantity that a run logged: loss, distances by the conditioning encoder, and evaluations on dev."""
    lines: dict[str, list[Line]] = {}
    for mark, (arm, runs) in enumerate(study.arms.items()):
        for seed_index, run in enumerate(runs):
            label = arm if run.seed is None else f"{arm}, seed {run.seed}"
            for name, points in read_curves(run).items():
                lines.setdefault(name, []).append(Line(label, mark, seed_index, sorted(points)))
    order = [n for n in FIRST if n in lines] + sorted(n for n in lines if n.startswith("dev "))
    return [
        Panel(n, _title(n), curves(lines[n], f"{_title(n)} over training steps, every arm and seed")) for n in order
    ]


def _title(name: str) -> str:
    if name.startswith("dev "):
        return f"dev · {name.removeprefix('dev ')}"
    return name if name == "loss" else f"{name} (conditioning encoder)"
