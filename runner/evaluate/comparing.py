"""All pairs of arms on the two declared primaries: differences, corrected p-values, and what they allow to be said."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from runner.evaluate.spread import Array, Labels
from runner.evaluate.statistics import Estimate, estimates, holm, level_means, sign_flip
from runner.evaluate.verdict import MIN_SEEDS, Decision, decide, shortfalls


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
