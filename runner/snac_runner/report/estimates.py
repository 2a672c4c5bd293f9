"""From the result files of a study to estimates: means and intervals of arms and controls, and comparisons of arms."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from scipy.stats import kendalltau, spearmanr

from snac_runner.evaluate.statistics import Array, Estimate, Labels, equal_error_rate, estimates, labels
from snac_runner.evaluate.verdict import ALPHA, MIN_RANGE, ArmScores, Comparison, compare, is_dead, needed_sizes
from snac_runner.report.format import further_judges, listed, measured_metrics
from snac_runner.report.listening import preferences
from snac_runner.report.results import Result, Study, finite

DERIVED = {  # metric to the two metrics of which it is the difference
    "specificity": ("secs", "secs_other"),
    "gap": ("spk_vc", "spk_id"),
    "overrating": ("speaker_encoder_secs", "secs"),
    "fragility": ("secs", "secs_degraded"),
}
COUNTED: dict[str, tuple[str, Callable[[Array, Any], Any]]] = {
    "lost": ("wer", lambda value, _: value > 0.5),
    "accepted": ("secs", lambda value, at: value >= at),
}
"""A share to the metric that it counts, and the condition; `at` is the judge's calibrated threshold."""


class MetricArrays:
    """Metrics as arrays over seeds and pairs, with one order of the pairs for all arms and controls.

    Attributes:
        pairs: ids.
        target, source: labels (P,) of target speaker and source utterance.
        targets: number of target speakers.
        same_sex: whether source and target are of the same sex (P,); None: unknown.
        judges: "" for the first judge of the speaker, and what begins the names of each further judge's metrics.
    """

    def __init__(self, study: Study) -> None:
        self.study = study
        self.judges = ["", *(f"{name}_" for name in further_judges(study.results()))]
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
        """A metric of one result (P,). A derived metric that the result does not have is computed from its parts."""
        row = np.full(len(self.pairs), np.nan)
        for item in result.utterances:
            row[self.index[item.pair]] = value if (value := finite(item.metrics.get(name))) is not None else np.nan
        place, judge = next(((n, j) for n, j in enumerate(self.judges) if j and name.startswith(j)), (0, ""))
        base = name.removeprefix(judge)
        if base in COUNTED and not np.isfinite(row).any():
            of, counts = COUNTED[base]
            values = self.row(result, judge + of)
            at = finite(result.judges[place].calibration.threshold) if place < len(result.judges) else None
            if base == "accepted" and at is None:
                return row
            return np.where(np.isfinite(values), counts(values, at), np.nan)
        if name in DERIVED and not np.isfinite(row).any():
            left, right = DERIVED[name]
            return self.row(result, left) - self.row(result, right)
        return row

    def arm(self, arm: str, name: str) -> Array:
        """A metric of an arm over its successful seeds (S, P)."""
        rows = [self.row(r.result, name) for r in self.study.arms[arm] if r.ok and r.result is not None]
        return np.stack(rows) if rows else np.full((0, len(self.pairs)), np.nan)

    def control(self, control: str, name: str) -> Array:
        """A metric of a control (1, P); NaN if the control is missing."""
        run = self.study.controls.get(control)
        if run is None or not run.ok or run.result is None:
            return np.full((1, len(self.pairs)), np.nan)
        return self.row(run.result, name)[None]

    def seeds(self, arm: str) -> list[int | None]:
        """The successful seeds of an arm."""
        return [r.seed for r in self.study.arms[arm] if r.ok]


@dataclass(frozen=True)
class ContentJudge:
    """A content error rate with its values on the controls.

    Attributes:
        name: of the metric.
        margin: largest loss that counts as not inferior, in its unit.
        bare, mismatched: error rates of the bare codec, and of the bare codec of another utterance (1, P).
    """

    name: str
    margin: float
    bare: Array
    mismatched: Array

    @property
    def span(self) -> Array:
        """mismatched - bare (1, P)."""
        return self.mismatched - self.bare

    @property
    def measured(self) -> bool:
        """Whether it was measured on both controls."""
        return bool(np.isfinite(self.span).any())

    @property
    def range(self) -> float:
        """The mean of the span; 0 if a control is missing."""
        return float(np.nanmean(self.span)) if self.measured else 0.0


def content_judges(study: Study, arrays: MetricArrays) -> list[ContentJudge]:
    """Every content judge of the results, the best first. The order does not depend on the arms.

    A judge with a range below `MIN_RANGE` comes last. Of the others, the most accurate is the best, which has the
    smallest margin; of equal margins, the one with the widest range.
    """
    margins = {
        name: measured.margin
        for result in study.results()
        for name, measured in result.metrics.items()
        if measured.role == "content" and measured.margin
    }
    found = [
        ContentJudge(name, margin, arrays.control("floor", name), arrays.control("mismatched", name))
        for name, margin in sorted(margins.items())
    ]
    return sorted(found, key=lambda c: (c.range < MIN_RANGE, c.margin, -c.range))


def further_similarities(study: Study) -> list[str]:
    """Metrics of further judges of the speaker: those that the results state with the role "speaker"."""
    return sorted({n for r in study.results() for n, m in r.metrics.items() if m.role == "speaker" and n != "secs"})


@dataclass(frozen=True)
class Agreement:
    """How far a further judge of the speaker ranks as the first judge does.

    Attributes:
        conversions: Spearman's rank correlation of SECS, over the conversions of all arms.
        arms: Kendall's rank correlation (tau-b) of the arms' mean SECS; NaN for one arm.
    """

    conversions: float
    arms: float


def _agreement(study: Study, arrays: MetricArrays, arms: Sequence[str]) -> dict[str, Agreement]:
    """Further judge to its agreement with the first."""
    found = {}
    for name in further_similarities(study):
        rows = [[arrays.arm(arm, n).ravel() for arm in arms] for n in ("secs", name)]
        one, other = (np.concatenate(of) for of in rows)
        both = np.isfinite(one) & np.isfinite(other)
        if both.sum() < 3:
            continue
        means = [[float(np.nanmean(row)) for row in of if np.isfinite(row).any()] for of in rows]
        tau = kendalltau(*means).statistic if len(means[0]) == len(means[1]) > 1 else math.nan
        judge = name.removesuffix("_secs") if f"{name.removesuffix('_secs')}_" in arrays.judges else name
        found[judge] = Agreement(float(spearmanr(one[both], other[both]).statistic), float(tau))
    return found


def primary_content(judges: list[ContentJudge]) -> ContentJudge | None:
    """The content judge of the verdicts: the best; None if no range is wide enough."""
    return next((c for c in judges if c.range >= MIN_RANGE), None)


ENDS = ("floor", "ceiling", "mismatched")  # the controls that define the scales


@dataclass(frozen=True)
class StudyEstimates:
    """Every estimate of a study.

    Attributes:
        arms, controls: (name, metric) to estimate.
        ok: (arm, metric) to the number of measured conversions, and of all conversions.
        by_sex: (arm, whether source and target are of the same sex) to SECS.
        comparisons: of every pair of arms.
        dead: arms of which the embedding has no effect; see `is_dead`.
        obstacles: what prevents every verdict of the study.
        ranked: finished arms, best first, by normalised SECS (by SECS if there are no controls).
        targets, sources, pairs: numbers of target speakers, source utterances and pairs.
        content: the content judge of the verdicts.
        content_judges: all that were tried, the best first.
        agreement: further judge of the speaker to its agreement with the first.
        noise: decoding noise: standard deviation of SECS over decodes with different noise, the largest of the arms.
    """

    arms: dict[tuple[str, str], Estimate]
    controls: dict[tuple[str, str], Estimate]
    ok: dict[tuple[str, str], tuple[int, int]]
    by_sex: dict[tuple[str, bool], Estimate]
    comparisons: tuple[Comparison, ...]
    dead: tuple[str, ...]
    obstacles: tuple[str, ...]
    ranked: tuple[str, ...]
    targets: int
    sources: int
    pairs: int
    content: ContentJudge | None = None
    content_judges: tuple[ContentJudge, ...] = ()
    noise: float = math.nan
    agreement: dict[str, Agreement] = field(default_factory=dict)

    @property
    def score(self) -> str:
        """The metric that ranks the arms: normalised SECS if there are floor and ceiling, else SECS."""
        return "normalised" if any(m == "normalised" for _, m in self.arms) else "secs"


def compute(study: Study) -> StudyEstimates:
    """Estimate every metric that a result has, and compare all pairs of arms."""
    arrays = MetricArrays(study)
    arms = study.finished()
    names = [metric.name for metric in measured_metrics(study.results())]
    accepted = [f"{judge}accepted" for judge in arrays.judges[1:]]
    wanted = [n for n in dict.fromkeys([*names, *DERIVED, *COUNTED, *accepted]) if n != "normalised"]
    floor, ceiling = arrays.control("floor", "secs"), arrays.control("ceiling", "secs")
    judges = content_judges(study, arrays)
    content = primary_content(judges)
    scales = _scales(arrays, content)
    span = next((scale.unit for scale in scales if scale.name == "normalised"), None)
    found = _estimates(study, arrays, wanted, scales)
    arm_estimates = {key: e for key, e in found.items() if key[0] in arms}
    arm_estimates |= _pooled_only(study, arms, wanted, arm_estimates)
    control_estimates = _controls(study, arrays, wanted) | {k: e for k, e in found.items() if k[0] not in arms}
    for judge in arrays.judges:
        others = {c: arrays.control(c, f"{judge}secs") for c in study.controls if c not in ENDS}
        arm_estimates |= _eer(arrays, {arm: arrays.arm(arm, f"{judge}secs") for arm in arms}, judge)
        control_estimates |= _eer(arrays, others, judge)
    preferred = preferences(study)
    arm_estimates |= {(name, "preferred"): e for name, e in preferred.items() if name in arms}
    control_estimates |= {(name, "preferred"): e for name, e in preferred.items() if name not in arms}
    ok = _counts(study, arrays, arms, wanted)
    obstacles = _obstacles(study, span is not None, floor, ceiling, content)
    noise = {arm: _noise_floor(study, arm) for arm in arms}
    dead = [a for a in arms if is_dead(change=_effect_of_embedding(arrays, a, floor), noise_floor=noise[a])]
    score = "secs" if span is None else "normalised"
    return StudyEstimates(
        arms=arm_estimates,
        controls=control_estimates,
        ok=ok,
        by_sex=_by_sex(arrays, arms),
        comparisons=_compare(arrays, arms, span, content, ok, obstacles),
        dead=tuple(dead),
        agreement=_agreement(study, arrays, arms),
        obstacles=obstacles,
        ranked=tuple(sorted(arms, key=lambda a: -e.mean if (e := arm_estimates.get((a, score))) else math.inf)),
        targets=arrays.targets,
        sources=int(arrays.source.max()) + 1 if arrays.pairs else 0,
        pairs=len(arrays.pairs),
        content=content,
        content_judges=tuple(judges),
        noise=max((n for n in noise.values() if math.isfinite(n)), default=math.nan),
    )


def _estimates(
    study: Study, arrays: MetricArrays, wanted: list[str], scales: list[_Scale]
) -> dict[tuple[str, str], Estimate]:
    """All metrics of arms, and the normalised metrics of arms, controls and other systems."""
    keys: list[tuple[str, str]] = []
    values: list[Array] = []
    over: list[Array | None] = []
    arms = study.finished()
    for arm in arms:
        for name in wanted:
            array = arrays.arm(arm, name)
            if np.isfinite(array).any():
                keys.append((arm, name))
                values.append(array)
                over.append(None)
    for scale in scales:
        measured = {arm: arrays.arm(arm, scale.of) for arm in arms}
        measured |= {c: arrays.control(c, scale.of) for c in study.controls if c not in ENDS}
        for name, array in measured.items():
            above = array - scale.zero
            both = np.isfinite(above) & np.isfinite(scale.unit)
            if both.any():
                keys.append((name, scale.name))
                values.append(np.where(both, above, np.nan))
                over.append(np.where(both, scale.unit, np.nan))
    return dict(zip(keys, estimates(values, arrays.target, arrays.source, over=over), strict=True))


def _by_sex(arrays: MetricArrays, arms: list[str]) -> dict[tuple[str, bool], Estimate]:
    """SECS over the pairs of the same sex (True), and over those of different sex (False)."""
    masks = {same: np.array([s is same for s in arrays.same_sex], dtype=bool) for same in (True, False)}
    halves = {
        (a, same): np.where(m, arrays.arm(a, "secs"), np.nan) for same, m in masks.items() if m.any() for a in arms
    }
    return dict(zip(halves, estimates(list(halves.values()), arrays.target, arrays.source), strict=True))


@dataclass(frozen=True)
class _Scale:
    """A normalised metric: name = (of - zero) / unit."""

    name: str
    of: str
    zero: Array
    unit: Array


def _scales(arrays: MetricArrays, content: ContentJudge | None) -> list[_Scale]:
    """The normalised metrics that the controls allow: SECS by judges and conditioning encoder, and content."""
    found = []
    for who in (*arrays.judges, "speaker_encoder_"):
        name, of = f"{who}normalised", f"{who}secs"
        floor = arrays.control("floor", of)
        span = arrays.control("ceiling", of) - floor
        if bool(np.isfinite(span).any()) and float(np.nanmean(span)) > 0:
            found.append(_Scale(name, of, floor, span))
    if content is not None:
        found.append(_Scale("normalised_content", content.name, content.bare, content.span))
    return found


def _effect_of_embedding(arrays: MetricArrays, arm: str, floor: Array) -> float:
    """Mean absolute effect of the embedding on an arm's SECS; NaN if unknown."""
    for values in (arrays.arm(arm, "specificity"), arrays.arm(arm, "secs") - floor):
        if np.isfinite(values).any():
            return float(np.nanmean(np.abs(values)))
    return math.nan


def _eer(arrays: MetricArrays, scores: dict[str, Array], judge: str) -> dict[tuple[str, str], Estimate]:
    """Equal error rate of a judge between real utterances of the target (the ceiling) and these outputs."""
    nan, genuine = math.nan, arrays.control("ceiling", f"{judge}secs")
    found = {}
    for name, values in scores.items():
        real, converted = genuine[np.isfinite(genuine)], values[np.isfinite(values)]
        if real.size and converted.size:
            rate, _ = equal_error_rate(real, converted)
            found[name, f"{judge}eer"] = Estimate(
                rate, nan, nan, nan, nan, "none", len(values), arrays.targets, 0, converted.size
            )
    return found


def _pooled_only(
    study: Study, arms: list[str], wanted: list[str], have: dict[tuple[str, str], Estimate]
) -> dict[tuple[str, str], Estimate]:
    """Metrics of which results have only pooled values: their means over seeds, without intervals."""
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


def _controls(study: Study, arrays: MetricArrays, wanted: list[str]) -> dict[tuple[str, str], Estimate]:
    nan = math.nan
    found: dict[tuple[str, str], Estimate] = {}
    rows = {(control, name): arrays.control(control, name) for control in study.controls for name in wanted}
    rows = {key: values for key, values in rows.items() if np.isfinite(values).any()}
    for control, run in study.controls.items():
        for name in wanted:
            pooled = run.result.metrics.get(name) if run.ok and run.result is not None else None
            if pooled is not None and (mean := finite(pooled.mean)) is not None:
                found[control, name] = Estimate(mean, nan, nan, nan, nan, "none", 1, 0, 0, 0)
    return found | dict(zip(rows, estimates(list(rows.values()), arrays.target, arrays.source), strict=True))


def _counts(
    study: Study, arrays: MetricArrays, arms: list[str], names: list[str]
) -> dict[tuple[str, str], tuple[int, int]]:
    """(n_ok, n) summed over an arm's successful seeds, as the results state, else counted from their conversions."""
    counts = {}
    for arm in arms:
        results = [r.result for r in study.arms[arm] if r.ok and r.result is not None]
        for name in names:
            n_ok = n = 0
            for result in results:
                stated = result.metrics.get(name)
                if stated is None and (name in result.missing or (result.metrics and name not in {*DERIVED, *COUNTED})):
                    continue  # it was not measured for this arm
                if stated is not None and stated.n_ok is not None and stated.n:
                    n_ok, n = n_ok + stated.n_ok, n + stated.n
                else:
                    n_ok += int(np.isfinite(arrays.row(result, name)).sum())
                    n += len(result.utterances)
            if n:
                counts[arm, name] = (n_ok, n)
    return counts


def _noise_floor(study: Study, arm: str) -> float:
    values = [
        v for r in study.arms[arm] if r.ok and r.result and (v := finite(r.result.noise_floor.get("secs"))) is not None
    ]
    return sum(values) / len(values) if values else math.nan


def _obstacles(
    study: Study, usable: bool, floor: Array, ceiling: Array, content: ContentJudge | None
) -> tuple[str, ...]:
    """What prevents every verdict of this study, whatever its size."""
    found = []
    for name, values in (("floor", floor), ("ceiling", ceiling)):
        if not np.isfinite(values).any():
            found.append(f"needs the {name} control's SECS")
    if not found and not usable:
        found.append(
            "the judge does not score the ceiling higher than the floor, so it cannot distinguish these speakers"
        )
    good = [r.result for runs in study.arms.values() for r in runs if r.ok and r.result is not None]
    if len({r.pairs.digest for r in good if r.pairs.digest}) > 1:
        found.append("needs one pair list, here arms have different ones")
    if content is not None:
        measured = [r.metrics[content.name] for r in study.results() if content.name in r.metrics]
        versions = sorted({m.version or "an unnamed one" for m in measured if m.n})
        if len(versions) > 1:
            found.append(f"needs {content.name} by one version of its recogniser, here {' and '.join(versions)}")
    judged = [r for r in study.results() if r.status == "success" and r.judges]
    by_judges = {tuple(j.digest for j in r.judges): listed([j.name for j in r.judges]) for r in judged}
    if len(by_judges) > 1:
        several = " and by ".join(
            f"{names} ({'+'.join(d[:8] for d in digests)})" for digests, names in by_judges.items()
        )
        found.append(f"needs all runs and controls to be judged by the same judges, here by {several}")
    conditioning = {(t.family or t.name) for r in good if (t := r.speaker_encoder) is not None}
    judges = {(j.family or j.name) for r in good for j in r.judges}
    if good and not judges:
        found.append("needs a judge: its name is not in the results")
    shared = sorted((conditioning & judges) - {""})
    return (
        *found,
        *(f"needs a judge of another family than the conditioning encoder, here both are {name}" for name in shared),
    )


def _compare(
    arrays: MetricArrays,
    arms: list[str],
    span: Array | None,
    content: ContentJudge | None,
    ok: dict[tuple[str, str], tuple[int, int]],
    obstacles: tuple[str, ...],
) -> tuple[Comparison, ...]:
    primaries = ["secs", *([content.name] if content else [])]

    def scores_of(arm: str) -> ArmScores:
        # of all conversions: a conversion without a transcript of its source is not measured
        of = sum(len(run.result.utterances) for run in arrays.study.arms[arm] if run.ok and run.result is not None)
        shares = [ok.get((arm, name), (0, 0))[0] / of if of else 0.0 for name in primaries]
        errors = arrays.arm(arm, content.name) if content else None
        further = {name: arrays.arm(arm, name) for name in further_similarities(arrays.study)}
        return ArmScores(arrays.seeds(arm), arrays.arm(arm, "secs"), errors, min(shares), further)

    found = compare(
        {arm: scores_of(arm) for arm in arms}, arrays.target, arrays.source, span=span,
        content_margin=content.margin if content else math.nan, obstacles=obstacles,
    )  # fmt: skip
    comparisons = len(found) * len(primaries)
    return tuple(
        replace(c, needed=needed_sizes(c.difference, comparisons=comparisons))
        if c.decision.word in ("inconclusive", "mixed") and c.p_adjusted >= ALPHA
        else c
        for c in found
    )
