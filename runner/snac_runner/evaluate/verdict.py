"""Verdicts on pairs of arms, by rules that are fixed before any number is known.

Every pair of arms is compared in two primary measures, speaker similarity and content. A verdict is one of `Word`:

- "better", "worse": superior in one measure, not inferior in the other by more than its margin.
- "higher", "lower": superior in speaker similarity, where content has no primary measure.
- "mixed": a difference is shown, and neither arm is better: each is superior in one measure, or one arm is superior in
  one measure and not shown to be not inferior in the other. Needs three seeds.
- "inconclusive": the study has enough data for a verdict, and no difference is shown.
- "no verdict": the data cannot carry a verdict, e.g. fewer than 8 target speakers, or one seed.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import combinations, product
from typing import Any, Literal

import numpy as np
from scipy import stats

from snac_runner.evaluate.statistics import (
    Array,
    Estimate,
    Labels,
    Part,
    Spread,
    estimates,
    level_means,
    linearised,
    seed_variance,
    shaffer,
    sign_flip,
)

MIN_TARGETS = 8  # five target speakers cannot reach p < 0.05 in a sign-flip test (2 / 2**5 = 0.0625)
MIN_SEEDS = 2
MIXED_SEEDS = 3  # with two, one measure alone calls 9 % of equal arms different (docs/experiments)
MIN_OK = 0.95  # share of the conversions that must have been measured
SPEAKER_MARGIN = 0.05  # largest loss of normalised SECS that counts as not worse
MIN_RANGE = 0.30  # of a content judge: its error rate on other words (mismatched) minus that on the bare codec
ALPHA = 0.05
MAX_SEEDS, MAX_TARGETS = 20, 1000  # that a reader is told to use
PLANNED_POWER = 0.84  # of the interval; the sign-flip test, which must agree, lowers it by up to three points

Word = Literal["better", "worse", "higher", "lower", "mixed", "inconclusive", "no verdict"]


@dataclass(frozen=True)
class Decision:
    """A verdict on arm A against arm B. For "no verdict", `missing` says what the data lack."""

    word: Word
    missing: tuple[str, ...] = ()


def shortfalls(
    *, targets: int, seeds: int, ok: float, comparisons: int = 1, short_of_seeds: str = ""
) -> tuple[str, ...]:
    """What the data lack for a verdict, as phrases "needs ..., here ..."; empty if nothing is missing.

    Args:
        targets, seeds: number of target speakers and of seeds.
        ok: share of the conversions that were measured.
        comparisons: number of comparisons that the correction covers.
        short_of_seeds: names of the arms that have fewer seeds than the rest of the study.
    """
    missing = []
    if targets < MIN_TARGETS:
        missing.append(f"needs ≥ {MIN_TARGETS} target speakers, here {targets}")
    elif 2 / 2**targets * comparisons >= ALPHA:
        needed = math.ceil(math.log2(2 * comparisons / ALPHA) + 1e-9)
        missing.append(f"needs ≥ {needed} target speakers for {comparisons} comparisons, here {targets}")
    if seeds < MIN_SEEDS:
        missing.append(f"needs ≥ {MIN_SEEDS} seeds{f' of {short_of_seeds}' if short_of_seeds else ''}, here {seeds}")
    if ok < MIN_OK:
        missing.append(f"needs ≥ {MIN_OK:.0%} of the conversions measured, here {ok:.0%}")
    return tuple(missing)


def decide(
    speaker: Estimate,
    speaker_p: float,
    *,
    content: Estimate | None = None,
    content_p: float = math.nan,
    content_margin: float = math.nan,
    missing: Sequence[str] = (),
    judges_agree: bool = True,
) -> Decision:
    """The verdict on A minus B.

    "better": one measure is superior (its interval excludes zero, and p < 0.05), the other is not inferior (its
    interval is above minus its margin). "worse" is the same from B's side. If both hold, because each arm is ahead in
    one measure by less than the margin, or neither holds although an arm is superior in a measure, the verdict is
    "mixed", from `MIXED_SEEDS` seeds on. Without a content measure the verdict can be "higher" or "lower", but not
    "better" or "worse".

    Args:
        speaker: difference in normalised SECS.
        speaker_p: adjusted (Shaffer).
        content: difference in content error with its sign changed, so that up is better; None: no primary measure.
        content_p: adjusted (Shaffer).
        content_margin: largest loss that counts as not inferior.
        missing: what the data lack; if anything, the verdict is "no verdict".
        judges_agree: whether all judges of the speaker give the difference the same sign; if not, neither arm is
            superior in speaker similarity.
    """
    if missing:
        return Decision("no verdict", tuple(missing))

    def superior(e: Estimate, p: float, sign: int) -> bool:
        return p < ALPHA and (e.low > 0 if sign > 0 else e.high < 0)

    def not_inferior(e: Estimate, margin: float, sign: int) -> bool:
        return e.low > -margin if sign > 0 else e.high < margin

    def by_speaker(sign: int) -> bool:
        return judges_agree and superior(speaker, speaker_p, sign)

    if content is None:
        return Decision("higher" if by_speaker(1) else "lower" if by_speaker(-1) else "inconclusive")

    def better(sign: int) -> bool:
        return (by_speaker(sign) and not_inferior(content, content_margin, sign)) or (
            superior(content, content_p, sign) and not_inferior(speaker, SPEAKER_MARGIN, sign)
        )

    ahead, behind = better(1), better(-1)
    if ahead != behind:
        return Decision("better" if ahead else "worse")
    shown = any(by_speaker(sign) or superior(content, content_p, sign) for sign in (1, -1))
    return Decision("mixed" if shown and speaker.seeds >= MIXED_SEEDS else "inconclusive")


@dataclass(frozen=True)
class ArmScores:
    """The scores of one arm in the primary measures.

    Attributes:
        seeds: of the rows.
        speaker: SECS (S, P), NaN where nothing was measured.
        content: an error rate (S, P), lower is better; None where content has no primary measure.
        ok: share of the conversions on which both were measured.
        further: the speaker by further judges (S, P), by their metric's name.
    """

    seeds: Sequence[int | None]
    speaker: Array
    content: Array | None = None
    ok: float = 1.0
    further: Mapping[str, Array] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """Arm A minus arm B, on the seeds and conversions that both have.

    Attributes:
        difference: in normalised SECS (in SECS if there is no span); up is better.
        content: in the error rate; down is better. None if content has no primary measure.
        p, content_p: of the null hypothesis of no difference: the larger of the sign-flip test's and the interval's.
        p_adjusted, content_p_adjusted: corrected over all pairs of arms and measures.
        detectable, content_detectable: minimum detectable effect with 80 % power.
        further: the difference by further judges of the speaker, in their own units.
        above: probability that A is above B in speaker similarity.
        needed: sizes (seeds, target speakers) with which a true speaker difference as large as the measured one is
            found with a power of 80 %. Only the report fills them in, with `needed_sizes`.
    """

    a: str
    b: str
    difference: Estimate
    p: float
    p_adjusted: float
    detectable: float
    decision: Decision
    content: Estimate | None = None
    content_p: float = math.nan
    content_p_adjusted: float = math.nan
    content_detectable: float = math.nan
    further: Mapping[str, float] = field(default_factory=dict)
    above: float = math.nan
    needed: tuple[tuple[int, int], ...] = ()

    @property
    def judges_agree(self) -> bool:
        """Whether all judges of the speaker give the difference the same sign."""
        return all(value * self.difference.mean > 0 for value in self.further.values())

    @property
    def more_similar(self) -> str | None:
        """The arm with significantly higher speaker similarity; None if no difference is shown."""
        shown = self.judges_agree and self.p_adjusted < ALPHA
        return _ahead(self.difference, self.a, self.b) if shown else None

    @property
    def fewer_errors(self) -> str | None:
        """The arm with significantly fewer content errors; None if no difference is shown."""
        shown = self.content is not None and self.content_p_adjusted < ALPHA
        return _ahead(self.content, self.b, self.a) if self.content is not None and shown else None


def _ahead(e: Estimate, a: str, b: str) -> str | None:
    """`a` if the interval is above zero, `b` if it is below, None if it contains zero."""
    return a if e.low > 0 else b if e.high < 0 else None


def compare(
    arms: Mapping[str, ArmScores],
    target: Labels,
    source: Labels,
    *,
    span: Array | None = None,
    content_margin: float = math.nan,
    obstacles: Sequence[str] = (),
) -> tuple[Comparison, ...]:
    """Compare every pair of arms.

    Two tests must both show a difference: the sign-flip test over target speakers, which ignores seeds, and the
    interval over seeds, target speakers and source utterances. So p is the larger of the two (an intersection-union
    test: Berger 1982, Technometrics 24, 295-300). Shaffer's correction covers all pairs and both measures, because
    either measure can lead to "better". The variance between seeds is estimated from all arms (`seed_variance`). If
    there are further judges of the speaker, a verdict on the speaker needs the same sign from all of them.

    Args:
        arms: name to scores.
        target, source: labels (P,) of each pair's target speaker and source utterance.
        span: ceiling minus floor in SECS (1, P); None: differences are in SECS.
        content_margin: largest loss of content that counts as not inferior.
        obstacles: what prevents every verdict of the study.
    """
    pairs = list(combinations(arms, 2))
    if not pairs:
        return ()
    with_content = all(arm.content is not None for arm in arms.values())
    measures = ["speaker", "content"] if with_content else ["speaker"]
    values: list[Array] = []
    over: list[Array | None] = []
    for a, b in pairs:
        for measure in measures:
            difference = _difference(arms[a], arms[b], measure)
            divisor = np.broadcast_to(span, difference.shape) if span is not None and measure == "speaker" else None
            if divisor is not None:
                both = np.isfinite(difference) & np.isfinite(divisor)
                difference, divisor = np.where(both, difference, np.nan), np.where(both, divisor, np.nan)
            values.append(difference)
            over.append(divisor)
    known = _seed_variances(arms, pairs, measures, span)
    found = estimates(values, target, source, over=over, seeds=known)
    p = np.array([max(sign_flip(level_means(v, target)), e.p) for v, e in zip(values, found, strict=True)])
    corrected = shaffer(p.reshape(len(pairs), len(measures)), len(arms)).ravel()
    comparisons = []
    for number, (a, b) in enumerate(pairs):
        at = number * len(measures)
        speaker, content = found[at], found[at + 1] if with_content else None
        sizes = [e for e in (speaker, content) if e is not None]
        lacking = shortfalls(
            targets=min(e.targets for e in sizes), seeds=min(e.seeds for e in sizes),
            ok=min(arms[a].ok, arms[b].ok), comparisons=len(values), short_of_seeds=_short_of_seeds(arms, a, b),
        )  # fmt: skip
        if not _shared(arms[a], arms[b]):
            lacking = ("needs a seed that both arms have",)
        further = {
            name: float(np.nanmean(by_other))
            for name in arms[a].further
            if name in arms[b].further and np.isfinite(by_other := _difference(arms[a], arms[b], name)).any()
        }
        decision = decide(
            speaker, float(corrected[at]), missing=[*lacking, *obstacles],
            content=_negated(content) if content else None,
            content_p=float(corrected[at + 1]) if with_content else math.nan, content_margin=content_margin,
            judges_agree=all(value * speaker.mean > 0 for value in further.values()),
        )  # fmt: skip
        more: dict[str, Any] = {"further": further, "above": speaker.above_zero}
        if content:
            more |= {"content": content, "content_p": float(p[at + 1]), "content_p_adjusted": float(corrected[at + 1])}
            more["content_detectable"] = content.detectable(len(values))
        effect = speaker.detectable(len(values))
        comparisons.append(Comparison(a, b, speaker, float(p[at]), float(corrected[at]), effect, decision, **more))
    return tuple(comparisons)


def _difference(a: ArmScores, b: ArmScores, measure: str) -> Array:
    """A minus B (S, P) in "speaker", "content" or the name of a further judge, on the seeds that both have."""
    shared = _shared(a, b)
    return _scores(a, measure, shared) - _scores(b, measure, shared)


def _scores(arm: ArmScores, measure: str, seeds: Sequence[int | None]) -> Array:
    values = arm.further.get(measure, arm.content if measure == "content" else arm.speaker)
    assert values is not None
    rows: Array = values[[list(arm.seeds).index(seed) for seed in seeds]]
    return rows


def _seed_variances(
    arms: Mapping[str, ArmScores], pairs: Sequence[tuple[str, str]], measures: Sequence[str], span: Array | None
) -> list[Part | None]:
    """For every pair and measure the variance between the pair's seeds, from all arms that have these seeds."""
    found: dict[tuple[tuple[int | None, ...], str], Part | None] = {}
    result = []
    for (a, b), measure in product(pairs, measures):
        seeds = tuple(_shared(arms[a], arms[b]))
        if (seeds, measure) not in found:
            rows = [_scores(arm, measure, seeds) for arm in arms.values() if set(seeds) <= set(arm.seeds)]
            differences = [x - y for x, y in combinations(rows, 2)]
            if span is not None and measure == "speaker":
                differences = [linearised(d, np.broadcast_to(span, d.shape)) for d in differences]
            found[seeds, measure] = seed_variance(differences, len(rows))
        result.append(found[seeds, measure])
    return result


def _shared(a: ArmScores, b: ArmScores) -> list[int | None]:
    return [seed for seed in a.seeds if seed in b.seeds]


def _negated(e: Estimate) -> Estimate:
    return Estimate(-e.mean, -e.high, -e.low, e.se, e.df, e.method, e.seeds, e.targets, e.sources, e.cells, e.spread)


def _short_of_seeds(arms: Mapping[str, ArmScores], a: str, b: str) -> str:
    """Which of two arms have fewer seeds than other arms; empty if all arms have too few."""
    short = [arm for arm in arms if len(arms[arm].seeds) < MIN_SEEDS]
    if len(short) == len(arms):
        return ""
    return " and ".join(arm for arm in (a, b) if arm in short) or f"both {a} and {b}"


def needed_sizes(e: Estimate, *, comparisons: int = 1) -> tuple[tuple[int, int], ...]:
    """Numbers (seeds, target speakers) with which a true mean of `e.mean` is found with a power of 80 %.

    First with more seeds only, and with more target speakers only. If neither is enough, with both: as few more seeds
    as possible. Source utterances and conversions grow with the target speakers. Empty if `MAX_SEEDS` and
    `MAX_TARGETS` are not enough.
    """
    if e.spread is None or e.mean == 0 or e.seeds < 2:
        return ()
    (seed, seed_df), *rest = e.spread.parts

    def found(seeds: int, targets: int) -> bool:
        more, larger = seeds / e.seeds, targets / e.targets
        parts = [(seed / more, seed_df * (seeds - 1) / (e.seeds - 1))]
        parts += [(v / larger, (df + 1) * larger - 1) for v, df in rest]
        return Spread(tuple(parts)).power(e.mean, alpha=ALPHA / comparisons) >= 0.8

    def targets_for(seeds: int, fewest: int) -> list[tuple[int, int]]:
        counts = range(fewest, MAX_TARGETS + 1)
        at = bisect_left(counts, True, key=lambda n: found(seeds, n))
        return [(seeds, counts[at])] if at < len(counts) else []

    counts = range(e.seeds + 1, MAX_SEEDS + 1)
    at = bisect_left(counts, True, key=lambda n: found(n, e.targets))
    one = [(counts[at], e.targets)] if at < len(counts) else []
    one += targets_for(e.seeds, e.targets + 1)
    if one:
        return tuple(one)
    enough = next((seeds for seeds in counts if found(seeds, MAX_TARGETS)), None)
    return tuple(targets_for(enough, e.targets + 1)) if enough else ()


@dataclass(frozen=True)
class StudySize:
    """Numbers of seeds, target speakers, source utterances, pairs and arms."""

    seeds: int
    targets: int
    sources: int
    pairs: int
    arms: int = 2


@dataclass(frozen=True)
class StandardDeviations:
    """Of a difference between two arms: per factor, and of the residual between single cells."""

    seed: float
    target: float
    source: float
    residual: float


def is_dead(*, change: float, noise_floor: float) -> bool:
    """Whether the embedding changes the judge's score by less than decoding noise does.

    Args:
        change: mean absolute difference in SECS between the right embedding and another speaker's; if that was not
            measured, to the bare codec. NaN: unknown.
        noise_floor: standard deviation of SECS over decodes with different noise; NaN: unknown.
    """
    return math.isfinite(change) and math.isfinite(noise_floor) and change <= noise_floor


def planned_detectable_effect(
    size: StudySize, sds: StandardDeviations, *, comparisons: int = 1, power: float = PLANNED_POWER
) -> float:
    """Minimum detectable effect of a study that has not run, from assumed standard deviations of a difference.

    `power` is that of the interval. The verdict also needs the sign-flip test, and finds this effect in at least 80 %
    of studies. NaN if no factor has two levels.
    """
    spread = _planned_spread(size, sds)
    return math.nan if spread is None else spread.detectable(alpha=ALPHA / comparisons, power=power)


def noninferiority_power(size: StudySize, sds: StandardDeviations, margin: float) -> float:
    """The probability that a study of two arms with equal content shows non-inferiority within `margin`.

    "better" needs this beside a difference in speaker similarity. NaN if no factor has two levels.
    """
    spread = _planned_spread(size, sds)
    if spread is None:
        return math.nan
    return float(stats.nct.sf(spread.half_width(ALPHA) / spread.se, spread.df, margin / spread.se))


LARGEST_DRAWS = 4000  # studies that the expectation below is the mean of


@lru_cache(maxsize=64)
def largest_variance(arms: int, seeds: int) -> float:
    """Expected largest sample variance between seeds of the differences of `arms` equal arms, per true variance.

    `seed_variance` takes the largest of all pairs of arms; for two arms the ratio is 1.
    """
    drawn = np.random.default_rng(0).standard_normal((LARGEST_DRAWS, arms, seeds)) / math.sqrt(2)
    one, other = np.triu_indices(arms, 1)
    ratios = (drawn[:, one] - drawn[:, other]).var(axis=-1, ddof=1)
    return float(ratios.max(axis=1).mean())


def _planned_spread(size: StudySize, sds: StandardDeviations) -> Spread | None:
    """The expected sampling variances of such a study; None if no factor has two levels."""
    residual = sds.residual**2 / (size.seeds * size.pairs)
    parts: list[Part] = []
    if size.seeds > 1:
        largest = largest_variance(size.arms, size.seeds)
        by_seed = largest * (sds.seed**2 / size.seeds + residual) - residual  # without the noise of single cells
        parts.append((by_seed, (size.arms - 1.0) * (size.seeds - 1)))
    varied = [(sd**2 / n, n) for sd, n in ((sds.target, size.targets), (sds.source, size.sources)) if n > 1]
    if varied:
        parts.append((sum(v for v, _ in varied) + residual, min(n for _, n in varied) - 1.0))
    return Spread(tuple(parts)) if parts else None
