"""Metrics of a study as arrays over seeds and conversions.

Which measure of content a study may be judged by: the one whose controls lie far enough apart.

From results per utterance to estimates: arms, controls, and the differences between arms."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from snac_runner.evaluate.statistics import Array, Estimate, Labels, equal_error_rate, estimates, labels
from snac_runner.evaluate.verdict import MIN_RANGE, ArmScores, Comparison, compare, is_dead
from snac_runner.report.format import present
from snac_runner.report.listening import preferences
from snac_runner.report.results import Result, Study, finite

DERIVED = {
    "specificity": ("secs", "secs_other"),
    "gap": ("spk_vc", "spk_id"),
    "overrating": ("speaker_encoder_secs", "secs"),
    "fragility": ("secs", "secs_degraded"),
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


ENDS = ("floor", "ceiling", "mismatched")  # the controls that the scales are made of


@dataclass(frozen=True)
class Numbers:
    """Every estimate of a study; keys of `arms` and `controls` are (name, metric)."""

    arms: dict[tuple[str, str], Estimate]
    controls: dict[tuple[str, str], Estimate]
    ok: dict[tuple[str, str], tuple[int, int]]
    by_sex: dict[tuple[str, bool], Estimate]
    comparisons: tuple[Comparison, ...]
    dead: tuple[str, ...]
    obstacles: tuple[str, ...]  # why no verdict is possible at all
    ranked: tuple[str, ...]  # finished arms, best first, by normalised SECS (SECS where there are no controls)
    targets: int
    sources: int
    pairs: int
    content: Content | None = None  # the primary measure of content
    content_judges: tuple[Content, ...] = ()  # all that were tried, the widest range first
    noise: float = math.nan  # standard deviation of SECS over decodes with other noise, the largest of the arms

    @property
    def score(self) -> str:
        """The metric that ranks: normalised SECS where floor and ceiling allow it."""
        return "normalised" if any(m == "normalised" for _, m in self.arms) else "secs"


def compute(study: Study) -> Numbers:
    """Estimates for every metric that some result has, and all comparisons of a study."""
    cells = Cells(study)
    arms = study.finished()
    keys: list[tuple[str, str]] = []
    arrays: list[Array] = []
    over: list[Array | None] = []
    names = [metric.name for metric in present(study.results())]
    wanted = [n for n in dict.fromkeys([*names, *DERIVED, *COUNTED]) if n != "normalised"]
    for arm in arms:
        for name in wanted:
            values = cells.arm(arm, name)
            if np.isfinite(values).any():
                keys.append((arm, name))
                arrays.append(values)
                over.append(None)
    floor, ceiling = cells.control("floor", "secs"), cells.control("ceiling", "secs")
    judges = content_judges(study, cells)
    content = primary_content(judges)
    scales = _scales(cells, content)
    span = next((scale.unit for scale in scales if scale.name == "normalised"), None)
    for scale in scales:
        for who, values in [
            *((arm, cells.arm(arm, scale.of)) for arm in arms),
            *((c, cells.control(c, scale.of)) for c in study.controls if c not in ENDS),
        ]:
            above = values - scale.zero
            both = np.isfinite(above) & np.isfinite(scale.unit)
            if both.any():
                keys.append((who, scale.name))
                arrays.append(np.where(both, above, np.nan))
                over.append(np.where(both, scale.unit, np.nan))
    found = dict(zip(keys, estimates(arrays, cells.target, cells.source, over=over), strict=True))
    arm_estimates = {key: e for key, e in found.items() if key[0] in arms}
    masks = {same: np.array([s is same for s in cells.same_sex], dtype=bool) for same in (True, False)}
    halves = {
        (a, same): np.where(m, cells.arm(a, "secs"), np.nan) for same, m in masks.items() if m.any() for a in arms
    }
    by_sex = dict(zip(halves, estimates(list(halves.values()), cells.target, cells.source), strict=True))
    arm_estimates |= _pooled_only(study, arms, wanted, arm_estimates)
    control_estimates = _controls(study, cells, wanted) | {k: e for k, e in found.items() if k[0] not in arms}
    arm_estimates |= _eer(cells, {arm: cells.arm(arm, "secs") for arm in arms})
    control_estimates |= _eer(cells, {c: cells.control(c, "secs") for c in study.controls if c not in ENDS})
    preferred = preferences(study)
    arm_estimates |= {(name, "preferred"): e for name, e in preferred.items() if name in arms}
    control_estimates |= {(name, "preferred"): e for name, e in preferred.items() if name not in arms}
    ok = _counts(study, cells, arms, [*wanted])
    obstacles = _obstacles(study, span is not None, floor, ceiling, content)
    comparisons = _compare(cells, arms, span, content, ok, obstacles)
    noise = {a: _noise_floor(study, a) for a in arms}
    dead = tuple(arm for arm in arms if is_dead(change=_moved(cells, arm, floor), noise_floor=noise[arm]))
    score = "secs" if span is None else "normalised"
    ranked = sorted(arms, key=lambda a: -e.mean if (e := arm_estimates.get((a, score))) else math.inf)
    return Numbers(
        arm_estimates, control_estimates, ok, by_sex, comparisons, dead, obstacles, tuple(ranked),
        cells.targets, int(cells.source.max()) + 1 if cells.pairs else 0, len(cells.pairs), content, tuple(judges),
        max((n for n in noise.values() if math.isfinite(n)), default=math.nan),
    )  # fmt: skip


@dataclass(frozen=True)
class _Scale:
    """A metric `name`: that much of `of` above `zero`, in units of `unit`."""

    name: str
    of: str
    zero: Array
    unit: Array


def _scales(cells: Cells, content: Content | None) -> list[_Scale]:
    """The scales whose ends lie apart: similarity by the judge and by the conditioning encoder, and content."""
    found = []
    for name, of in (("normalised", "secs"), ("speaker_encoder_normalised", "speaker_encoder_secs")):
        floor = cells.control("floor", of)
        span = cells.control("ceiling", of) - floor
        if bool(np.isfinite(span).any()) and float(np.nanmean(span)) > 0:
            found.append(_Scale(name, of, floor, span))
    if content is not None:
        found.append(_Scale("normalised_content", content.name, content.bare, content.span))
    return found


def _moved(cells: Cells, arm: str, floor: Array) -> float:
    """How far the embedding moves an arm's SECS, on average over conversions and seeds; NaN where nothing is known."""
    for values in (cells.arm(arm, "specificity"), cells.arm(arm, "secs") - floor):
        if np.isfinite(values).any():
            return float(np.nanmean(np.abs(values)))
    return math.nan


def _eer(cells: Cells, scores: dict[str, Array]) -> dict[tuple[str, str], Estimate]:
    """Equal error rate of the judge between real utterances of the target (the ceiling) and each of these outputs."""
    nan, genuine = math.nan, cells.control("ceiling", "secs")
    found = {}
    for name, values in scores.items():
        real, made = genuine[np.isfinite(genuine)], values[np.isfinite(values)]
        if real.size and made.size:
            rate, _ = equal_error_rate(real, made)
            found[name, "eer"] = Estimate(rate, nan, nan, nan, nan, "none", len(values), cells.targets, 0, made.size)
    return found


def _pooled_only(
    study: Study, arms: list[str], wanted: list[str], have: dict[tuple[str, str], Estimate]
) -> dict[tuple[str, str], Estimate]:
    """Metrics that results give only pooled: their mean over seeds, without an interval."""
    nan = math.nan
    found = {}
    for arm in arms:
        results = [r.result for r in study.arms[arm] if r.ok and r.result is not None]
        for name in wanted:
            if (arm, name) in have:
                continue
            means = [v for r in results if name in r.metrics and (v := finite(r.metrics[name].mean)) is not None]
            if means:
                found[arm, name] = Estimate(sum(means) / len(means), nan, nan, nan, nan, "none", len(means), 0, 0, 0)
    return found


def _controls(study: Study, cells: Cells, wanted: list[str]) -> dict[tuple[str, str], Estimate]:
    nan = math.nan
    found: dict[tuple[str, str], Estimate] = {}
    rows = {(control, name): cells.control(control, name) for control in study.controls for name in wanted}
    rows = {key: values for key, values in rows.items() if np.isfinite(values).any()}
    for control, run in study.controls.items():
        for name in wanted:
            pooled = run.result.metrics.get(name) if run.ok and run.result is not None else None
            if pooled is not None and (mean := finite(pooled.mean)) is not None:
                found[control, name] = Estimate(mean, nan, nan, nan, nan, "none", 1, 0, 0, 0)
    return found | dict(zip(rows, estimates(list(rows.values()), cells.target, cells.source), strict=True))


def _counts(study: Study, cells: Cells, arms: list[str], names: list[str]) -> dict[tuple[str, str], tuple[int, int]]:
    """(n_ok, n) summed over an arm's successful seeds, as its results state, else as their utterances show."""
    counts = {}
    for arm in arms:
        results = [r.result for r in study.arms[arm] if r.ok and r.result is not None]
        for name in names:
            n_ok = n = 0
            for result in results:
                stated = result.metrics.get(name)
                if stated is None and (name in result.missing or (result.metrics and name not in {*DERIVED, *COUNTED})):
                    continue  # the arm was not asked for it
                if stated is not None and stated.n_ok is not None and stated.n:
                    n_ok, n = n_ok + stated.n_ok, n + stated.n
                else:
                    n_ok += int(np.isfinite(cells.row(result, name)).sum())
                    n += len(result.utterances)
            if n:
                counts[arm, name] = (n_ok, n)
    return counts


def _noise_floor(study: Study, arm: str) -> float:
    values = [
        v for r in study.arms[arm] if r.ok and r.result and (v := finite(r.result.noise_floor.get("secs"))) is not None
    ]
    return sum(values) / len(values) if values else math.nan


def _obstacles(study: Study, usable: bool, floor: Array, ceiling: Array, content: Content | None) -> tuple[str, ...]:
    """What forbids every verdict of this study, whatever its size."""
    found = []
    for name, values in (("floor", floor), ("ceiling", ceiling)):
        if not np.isfinite(values).any():
            found.append(f"needs the {name} control's SECS")
    if not found and not usable:
        found.append("the judge scores the ceiling no higher than the floor, so it cannot tell these speakers apart")
    good = [r.result for runs in study.arms.values() for r in runs if r.ok and r.result is not None]
    if len({r.pairs.digest for r in good if r.pairs.digest}) > 1:
        found.append("needs one pair list; the arms were judged on different ones")
    if content is not None:
        judged = [r.metrics[content.name] for r in study.results() if content.name in r.metrics]
        versions = sorted({measured.version or "one that is not named" for measured in judged if measured.n})
        if len(versions) > 1:
            found.append(f"needs {content.name} by one version of its recogniser, here {' and '.join(versions)}")
    teachers = {(t.family or t.name) for r in good if (t := r.speaker_encoder) is not None}
    judges = {(j.family or j.name) for r in good for j in r.judges[:1]}
    if good and not judges:
        found.append("needs a judge's name in the results")
    shared = sorted((teachers & judges) - {""})
    return (
        *found,
        *(f"needs a judge of another family than the conditioning encoder's, here both are {name}" for name in shared),
    )


def _compare(
    cells: Cells,
    arms: list[str],
    span: Array | None,
    content: Content | None,
    ok: dict[tuple[str, str], tuple[int, int]],
    obstacles: tuple[str, ...],
) -> tuple[Comparison, ...]:
    primaries = ["secs", *([content.name] if content else [])]

    def judged(arm: str) -> ArmScores:
        # of all conversions: one of whose source a recogniser read nothing has not been measured
        of = sum(len(run.result.utterances) for run in cells.study.arms[arm] if run.ok and run.result is not None)
        shares = [ok.get((arm, name), (0, 0))[0] / of if of else 0.0 for name in primaries]
        errors = cells.arm(arm, content.name) if content else None
        return ArmScores(cells.seeds(arm), cells.arm(arm, "secs"), errors, min(shares))

    return compare(
        {arm: judged(arm) for arm in arms}, cells.target, cells.source, span=span,
        content_margin=content.margin if content else math.nan, obstacles=obstacles,
    )  # fmt: skip
