"""Tables, written as CSV, LaTeX, Markdown and plain text. The templates write them as HTML.

pandas writes none of these with intervals in small print, units under the headings and rules between kinds of rows.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Cell:
    """A cell: `text` is displayed, `value` is for sorting and CSV, `detail` is an interval as text, `low` to `high`."""

    text: str
    value: float | str | None = None
    detail: str = ""
    low: float | None = None
    high: float | None = None

    @property
    def key(self) -> str:
        """The value to sort by; empty if there is none, which always comes last."""
        if self.value is None or (isinstance(self.value, float) and not math.isfinite(self.value)):
            return ""
        return f"{self.value:.9g}" if isinstance(self.value, int | float) else self.value


EMPTY = Cell("—")
BLANK = Cell("")
"""A cell that does not apply, e.g. to a control."""


@dataclass(frozen=True)
class Column:
    """A column: `arrow` is the direction that is better, `meaning` one line for the reader."""

    label: str
    unit: str = ""
    arrow: str = ""
    meaning: str = ""
    numeric: bool = True

    @property
    def heading(self) -> str:
        """Label and arrow."""
        return " ".join(part for part in (self.label, self.arrow) if part)


@dataclass(frozen=True)
class Row:
    """A row: `kind` is "arm", "control" or "failed", `mark` the number of the arm in plots."""

    cells: Sequence[Cell]
    kind: str = "arm"
    mark: int | None = None


@dataclass(frozen=True)
class Table:
    """A table; `name` is that of its files."""

    name: str
    title: str
    columns: Sequence[Column]
    rows: Sequence[Row]
    note: str = ""

    @property
    def bodies(self) -> list[tuple[str, list[Row]]]:
        """Rows by kind: arms, failed arms, controls. Each kind is sorted by itself."""
        kinds = [k for k in ("arm", "failed", "control") if any(r.kind == k for r in self.rows)]
        return [(k, [r for r in self.rows if r.kind == k]) for k in kinds]


def text_cell(text: str) -> Cell:
    """A cell that is sorted by its text."""
    return Cell(text, text)


def as_csv(table: Table) -> str:
    """CSV with values at full precision; a column with intervals is followed by its bounds."""
    bounded = [any(row.cells[i].low is not None for row in table.rows) for i in range(len(table.columns))]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    header: list[str] = []
    for column, has_bounds in zip(table.columns, bounded, strict=True):
        name = f"{column.label} ({column.unit})" if column.unit else column.label
        header += [name, f"{name} low", f"{name} high"] if has_bounds else [name]
    writer.writerow(header)
    for row in table.rows:
        line: list[str] = []
        for cell, has_bounds in zip(row.cells, bounded, strict=True):
            line.append(cell.key)
            if has_bounds:
                line += [f"{x:.9g}" if x is not None and math.isfinite(x) else "" for x in (cell.low, cell.high)]
        writer.writerow(line)
    return out.getvalue()


_TEX = {c: "\\" + c for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "↑": r"$\uparrow$",
    "↓": r"$\downarrow$", "−": "$-$", "—": "---", "×": r"$\times$", "≥": r"$\ge$", "Δ": r"$\Delta$", "·": r"$\cdot$",
}  # fmt: skip


def tex(text: str) -> str:
    """Text with the special characters of LaTeX escaped."""
    return "".join(_TEX.get(c, c) for c in text)


def as_tex(table: Table) -> str:
    """A LaTeX tabular with booktabs; its title is a comment, so that it fits into any float."""
    spec = "".join("r" if c.numeric else "l" for c in table.columns)
    lines = [f"% {table.title}", rf"\begin{{tabular}}{{{spec}}}", r"\toprule"]
    lines.append(" & ".join(tex(c.heading) for c in table.columns) + r" \\")
    if any(c.unit for c in table.columns):
        lines.append(" & ".join(tex(f"({c.unit})" if c.unit else "") for c in table.columns) + r" \\")
    lines.append(r"\midrule")
    previous = table.rows[0].kind if table.rows else ""
    for row in table.rows:
        if row.kind != previous:
            lines.append(r"\midrule")
        previous = row.kind
        cells = [tex(c.text) + (rf" {{\scriptsize {tex(c.detail)}}}" if c.detail else "") for c in row.cells]
        lines.append(" & ".join(cells) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def as_markdown(table: Table) -> str:
    """A Markdown table."""

    def clean(text: str) -> str:
        return text.replace("|", "\\|").replace("\n", " ")

    heads = [clean(c.heading + (f" ({c.unit})" if c.unit else "")) for c in table.columns]
    lines = ["| " + " | ".join(heads) + " |"]
    lines.append("|" + "|".join("---:" if c.numeric else "---" for c in table.columns) + "|")
    for row in table.rows:
        cells = [clean(f"{c.text} {c.detail}".strip()) for c in row.cells]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def as_text(table: Table) -> str:
    """Plain text with aligned columns, for a terminal."""
    grid = [[c.heading for c in table.columns]]
    grid += [[f"{c.text} {c.detail}".strip() for c in row.cells] for row in table.rows]
    widths = [max(len(line[i]) for line in grid) for i in range(len(table.columns))]
    lines = []
    for line in grid:
        padded = [
            cell.rjust(width) if column.numeric else cell.ljust(width)
            for cell, width, column in zip(line, widths, table.columns, strict=True)
        ]
        lines.append("  ".join(padded).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines) + "\n"
