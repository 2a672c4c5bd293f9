"""Metrics of a study as arrays over seeds and conversions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from runner.evaluate.spread import Array, Labels
from runner.evaluate.statistics import labels
from runner.report.results import Study, finite
from runner.report.schema import Result

DERIVED = {
    "specificity": ("secs", "secs_other"),
    "gap": ("spk_vc", "spk_id"),
    "overrating": ("teacher_secs", "secs"),
    "fragility": ("secs", "secs_roughened"),
}
COUNTED: dict[str, tuple[str, Callable[[Array, Any], Any]]] = {
    "lost": ("wer", lambda value, _: value > 0.5),
    "accepted": ("secs", lambda value, at: value >= at),
}
"""Metric to the one whose values it counts, and which of them; `at` is the judge's calibrated threshold."""


class Cells:
    """Metrics as arrays over seeds and pairs: the study's conversions, in one order for all arms and controls."""

    def __init__(self, study: Study) -> None:
        self.study = study
        seen: dict[str, str] = {}
        sources = dict(study.sources)
        for result in study.results():
            for item in result.utterances:
                seen.setdefault(item.pair, item.target_speaker)
                sources.setdefault(item.pair, item.source or item.pair)
        self.pairs = sorted(seen)
        self.index = {pair: i for i, pair in enumerate(self.pairs)}
        self.target: Labels = labels([seen[p] for p in self.pairs])
        self.source: Labels = labels([sources[p] for p in self.pairs])
        self.targets = len(set(seen.values()))
        sexes = {i.pair: i.same_sex for r in study.results() for i in r.utterances if i.same_sex is not None}
        self.same_sex = [sexes.get(p) for p in self.pairs]

    def row(self, result: Result, name: str) -> Array:
        """One result's (P,); a derived metric that it does not state is taken from its parts."""
        row = np.full(len(self.pairs), np.nan)
        for item in result.utterances:
            row[self.index[item.pair]] = value if (value := finite(item.metrics.get(name))) is not None else np.nan
        if name in COUNTED and not np.isfinite(row).any():
            of, counts = COUNTED[name]
            values = self.row(result, of)
            at = finite(result.calibration.get("threshold"))
            if name == "accepted" and at is None:
                return row
            return np.where(np.isfinite(values), counts(values, at), np.nan)
        if name in DERIVED and not np.isfinite(row).any():
            left, right = DERIVED[name]
            return self.row(result, left) - self.row(result, right)
        return row

    def arm(self, arm: str, name: str) -> Array:
        """(S, P) over the arm's successful seeds."""
        rows = [self.row(r.result, name) for r in self.study.arms[arm] if r.ok and r.result is not None]
        return np.stack(rows) if rows else np.full((0, len(self.pairs)), np.nan)

    def control(self, control: str, name: str) -> Array:
        """(1, P); NaN where the control is missing."""
        run = self.study.controls.get(control)
        if run is None or not run.ok or run.result is None:
            return np.full((1, len(self.pairs)), np.nan)
        return self.row(run.result, name)[None]

    def seeds(self, arm: str) -> list[int | None]:
        return [r.seed for r in self.study.arms[arm] if r.ok]
