"""What a comparison of two arms may say: rules that are fixed before any number is seen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from scipy import stats

from runner.evaluate.spread import Spread
from runner.evaluate.statistics import Estimate

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
