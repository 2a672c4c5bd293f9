"""Which measure of content a study may be judged by: the one whose controls lie far enough apart."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from runner.evaluate.spread import Array
from runner.evaluate.verdict import MIN_RANGE
from runner.report.cells import Cells
from runner.report.results import Study


@dataclass(frozen=True)
class Content:
    """An error rate of what is said.

    Attributes:
        name: of the metric.
        margin: the largest loss that counts as not worse, in its unit.
        bare, mismatched: of the bare codec, and of the bare codec of another utterance (1, P).
    """

    name: str
    margin: float
    bare: Array
    mismatched: Array

    @property
    def span(self) -> Array:
        """mismatched - bare (1, P): what the judge could tell apart."""
        return self.mismatched - self.bare

    @property
    def measured(self) -> bool:
        """Whether both controls were."""
        return bool(np.isfinite(self.span).any())

    @property
    def range(self) -> float:
        """The mean of the span; 0 where a control is missing."""
        return float(np.nanmean(self.span)) if self.measured else 0.0


def content_judges(study: Study, cells: Cells) -> list[Content]:
    """Every measure of content that the results hold, the widest range first; no arm has a say in the order."""
    margins = {
        name: measured.margin
        for result in study.results()
        for name, measured in result.metrics.items()
        if measured.role == "content" and measured.margin
    }
    found = [
        Content(name, margin, cells.control("floor", name), cells.control("mismatched", name))
        for name, margin in sorted(margins.items())
    ]
    return sorted(found, key=lambda c: -c.range)


def primary_content(judges: list[Content]) -> Content | None:
    """The content judge that verdicts rest on; None where none can tell right words from wrong ones."""
    return next((c for c in judges if c.range >= MIN_RANGE), None)
