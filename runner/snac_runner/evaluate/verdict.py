"""All pairs of arms on the two declared primaries: differences, corrected p-values, and what they allow to be said.

What a comparison of two arms may say: rules that are fixed before any number is seen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
from scipy import stats

from snac_runner.evaluate.statistics import Array, Estimate, Labels, Spread, estimates, holm, level_means, sign_flip


@dataclass(frozen=True)
class Judged:
    """What one arm scored.

    Attributes:
        seeds: of the rows.
        speaker: SECS (S, P), NaN where nothing was measured.
        content: an error rate (S, P), lower is better; None where content has no primary measure.
        ok: share of the conversions that both were measured on.
    """

    seeds: Sequence[int | None]
    speaker: Array
    content: Array | None = None
    ok: float = 1.0


@dataclass(frozen=True)
class Comparison:
    """Arm A minus arm B on the seeds and conversions that both have.

    Attributes:
        difference: in normalised SECS (SECS where there is no span), up is better.
        content: in the error rate, down is better; None where content has no primary measure.
        p, content_p: of no difference; the larger of the sign-flip test's and the interval's.
        p_holm, content_p_holm: corrected over all pairs of arms and primaries.
        detectable, content_detectable: true difference that this study would find with 80 % power.
    """

    a: str
    b: str
    difference: Estimate
    p: float
    p_holm: float
    detectable: float
    decision: Decision
    content: Estimate | None = None
    content_p: float = math.nan
    content_p_holm: float = math.nan
    content_detectable: float = math.nan


def compare(
    arms: Mapping[str, Judged],
    target: Labels,
    source: Labels,
    *,
    span: Array | None = None,
    content_margin: float = math.nan,
    obstacles: Sequence[str] = (),
) -> tuple[Comparison, ...]:
    """Every pair of arms.

    A difference counts where both tests find it: the sign-flip test, which asks whether target speakers agree and knows
    nothing of seeds, and the interval over seeds, target speakers and source utterances. So a pair's p is the larger of
    the two (an intersection-union test: Berger 1982, Technometrics 24, 295-300), and that is what Holm corrects, over
    pairs and over both primaries: "better" may come from either.

    Args:
        arms: name to scores.
        target, source: labels (P,) of each pair's target speaker and source utterance.
        span: ceiling minus floor in SECS (1, P); None: differences stay in SECS.
        content_margin: the largest loss of content that counts as not worse.
        obstacles: what forbids every verdict.
    """
    pairs = list(combinations(arms, 2))
    if not pairs:
        return ()
    judged = all(arm.content is not None for arm in arms.values())
    measures = ["speaker", "content"] if judged else ["speaker"]
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
    found = estimates(values, target, source, over=over)
    p = np.array([max(sign_flip(level_means(v, target)), e.p) for v, e in zip(values, found, strict=True)])
    corrected = holm(p)
    comparisons = []
    for number, (a, b) in enumerate(pairs):
        at = number * len(measures)
        speaker, content = found[at], found[at + 1] if judged else None
        sizes = [e for e in (speaker, content) if e is not None]
        lacking = shortfalls(
            targets=min(e.targets for e in sizes), seeds=min(e.seeds for e in sizes),
            ok=min(arms[a].ok, arms[b].ok), comparisons=len(values), whose=_short_of_seeds(arms, a, b),
        )  # fmt: skip
        if not _shared(arms[a], arms[b]):
            lacking = ("needs a seed that both arms have",)
        decision = decide(
            speaker, float(corrected[at]), missing=[*lacking, *obstacles],
            content=_turned(content) if content else None,
            content_p=float(corrected[at + 1]) if judged else math.nan, content_margin=content_margin,
        )  # fmt: skip
        more = (content, float(p[at + 1]), float(corrected[at + 1]), content.detectable(len(values))) if content else ()
        effect = speaker.detectable(len(values))
        comparisons.append(Comparison(a, b, speaker, float(p[at]), float(corrected[at]), effect, decision, *more))
    return tuple(comparisons)


def _difference(a: Judged, b: Judged, measure: str) -> Array:
    """A minus B (S, P) on the seeds that both have."""
    shared = _shared(a, b)
    rows_a, rows_b = (getattr(arm, measure)[[list(arm.seeds).index(seed) for seed in shared]] for arm in (a, b))
    difference: Array = rows_a - rows_b
    return difference


def _shared(a: Judged, b: Judged) -> list[int | None]:
    return [seed for seed in a.seeds if seed in b.seeds]


def _turned(e: Estimate) -> Estimate:
    """The same difference with *up* as good."""
    return Estimate(-e.mean, -e.high, -e.low, e.se, e.df, e.method, e.seeds, e.targets, e.sources, e.cells, e.spread)


def _short_of_seeds(arms: Mapping[str, Judged], a: str, b: str) -> str:
    """Which of two arms lack the seeds that other arms have; nothing where all are alike."""
    short = [arm for arm in arms if len(arms[arm].seeds) < MIN_SEEDS]
    if len(short) == len(arms):
        return ""
    return " and ".join(arm for arm in (a, b) if arm in short) or f"both {a} and {b}"


MIN_TARGETS = 8  # five target speakers cannot reach p < 0.05 in a sign-flip test (2 / 2**5 = 0.0625)
MIN_SEEDS = 2
MIN_OK = 0.95  # share of the items that must have been measured
SPEAKER_MARGIN = 0.05  # normalised SECS that may be lost and still count as not worse
MIN_RANGE = 0.30  # of a content judge: mismatched minus bare; with less it hardly tells right words from wrong ones
ALPHA = 0.05
PLANNED_POWER = 0.84  # of the interval; that the sign-flip test must agree takes up to three points of it

Word = Literal["better", "worse", "higher", "lower", "inconclusive", "no verdict"]


@dataclass(frozen=True)
class Decision:
    """A verdict on arm A against arm B, and for "no verdict" what is missing."""

    word: Word
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class Size:
    """How much a study judges."""

    seeds: int
    targets: int
    sources: int
    pairs: int


@dataclass(frozen=True)
class Sds:
    """Standard deviations of a difference between two arms, per factor, and of what is left between single cells."""

    seed: float
    target: float
    source: float
    rest: float


def shortfalls(*, targets: int, seeds: int, ok: float, comparisons: int = 1, whose: str = "") -> tuple[str, ...]:
    """What the data lack for a verdict, as "needs ...; here ..." phrases; empty when nothing is missing.

    `whose` names the arms that have fewer seeds than the rest of the study.
    """
    missing = []
    if targets < MIN_TARGETS:
        missing.append(f"needs ≥ {MIN_TARGETS} target speakers, here {targets}")
    elif 2 / 2**targets * comparisons >= ALPHA:
        needed = math.ceil(math.log2(2 * comparisons / ALPHA) + 1e-9)
        missing.append(f"needs ≥ {needed} target speakers for {comparisons} comparisons at once, here {targets}")
    if seeds < MIN_SEEDS:
        missing.append(f"needs ≥ {MIN_SEEDS} seeds{f' of {whose}' if whose else ''}, here {seeds}")
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
) -> Decision:
    """The verdict on A minus B.

    `speaker` is the difference in normalised SECS, `content` the difference in normalised content with *up* as good,
    and the p-values are Holm-adjusted. "better": one primary is superior (its interval clears zero and p < 0.05) and
    the other is not inferior (its interval clears minus its margin); "worse" is the same seen from B. Where both hold,
    each arm being ahead in one primary by less than the margin, nothing is said. Without a content measure only
    "higher" or "lower" speaker similarity can be said, never better or worse.
    """
    if missing:
        return Decision("no verdict", tuple(missing))

    def superior(e: Estimate, p: float, sign: int) -> bool:
        return p < ALPHA and (e.low > 0 if sign > 0 else e.high < 0)

    def holds(e: Estimate, margin: float, sign: int) -> bool:
        return e.low > -margin if sign > 0 else e.high < margin

    def better(sign: int) -> bool:
        if content is None:
            return superior(speaker, speaker_p, sign)
        return (superior(speaker, speaker_p, sign) and holds(content, content_margin, sign)) or (
            superior(content, content_p, sign) and holds(speaker, SPEAKER_MARGIN, sign)
        )

    words: tuple[Word, Word] = ("higher", "lower") if content is None else ("better", "worse")
    ahead, behind = better(1), better(-1)
    if ahead == behind:  # neither, or each ahead in one primary by less than what may be lost in it
        return Decision("inconclusive")
    return Decision(words[0] if ahead else words[1])


def is_dead(*, moved: float, noise_floor: float) -> bool:
    """True when the embedding moves the judge's score by less than repeated decodes with other noise do.

    Args:
        moved: mean over conversions of the absolute difference in SECS between the right embedding and another
            speaker's; where that was not measured, of the difference to the bare codec. NaN: nothing is known.
        noise_floor: standard deviation of SECS over decodes with other noise; NaN: nothing is known.
    """
    return math.isfinite(moved) and math.isfinite(noise_floor) and moved <= noise_floor


def planned_effect(size: Size, sds: Sds, *, comparisons: int = 1, power: float = PLANNED_POWER) -> float:
    """Minimum detectable difference of a study that has not run, from the standard deviations of a difference.

    `power` is the interval's; the verdict, which asks the sign-flip test too, finds that effect in at least 80 % of
    studies. NaN where no factor has two levels.
    """
    spread = _planned_spread(size, sds)
    return math.nan if spread is None else spread.detectable(alpha=ALPHA / comparisons, power=power)


def share_kept(size: Size, sds: Sds, margin: float) -> float:
    """Of studies of two arms that are equal in a measure, the share whose interval stays within `margin` of zero.

    That is what "better" asks of content beside a difference in speaker similarity. NaN where no factor has two levels.
    """
    spread = _planned_spread(size, sds)
    if spread is None:
        return math.nan
    return float(stats.nct.sf(spread.half_width(ALPHA) / spread.se, spread.df, margin / spread.se))


def _planned_spread(size: Size, sds: Sds) -> Spread | None:
    """The sampling variances that such a study is expected to show; they go through the verdict's own intervals."""
    rest = sds.rest**2 / (size.seeds * size.pairs)
    own = [(sds.seed, size.seeds), (sds.target, size.targets), (sds.source, size.sources)]
    varied = [(sd**2 / levels, levels) for sd, levels in own if levels > 1]
    if not varied:
        return None
    # clustered by a factor, a mean varies with the factor's own effect and with the noise of single cells
    parts = tuple((v + rest, levels - 1.0) for v, levels in varied)
    return Spread(sum(v for v, _ in varied) + rest, parts)
