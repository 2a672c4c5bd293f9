"""Inference for crossed data: means, intervals and tests over seeds, target speakers and source utterances.

A *cell* is one measured conversion. `values` is (S, P): S seeds by P pairs, NaN where nothing was measured; values
without a seed (of a control) are (1, P). `target` and `source` are (P,) integer labels: target speaker and source
utterance of each pair. Seeds, targets and sources are crossed factors: another study would draw all three again, so an
interval that resamples single cells, or one factor only, is too short.

The mean of a study is the truth plus an effect of its seeds, of its targets and of its sources, each estimated from as
many values as the factor has levels. With three seeds the largest part of the variance may have two degrees of freedom.
Satterthwaite's degrees of freedom (1946) are then too large whenever the seeds agree by chance, and the interval is too
short (docs/experiments). Here each part keeps the quantile of its own degrees of freedom:

    half width^2 = sum_f t_f^2 V_f - 0.8 z^2 (sum_f V_f - V)

The first sum is Banerjee's interval for a linear function of means (1960, Sankhya 22, 357-358): for independent parts,
its coverage is at least the nominal one. V_f counts the noise of single cells once for every factor. What is counted
twice is estimated from many cells, so it is subtracted at the normal quantile z. Only four fifths of it are, because it
is an estimate, too: subtracting all of it gives 5.6 % false differences between equal arms if seeds do not differ, four
fifths give 4.8 %.

All functions are pure; random draws have a fixed seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special, stats

SUBTRACTED = 0.8  # of the variance that is counted twice

Array = NDArray[np.float64]
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Spread:
    """Sampling variance of a mean, and its parts.

    Attributes:
        variance: of the mean.
        parts: per crossed factor, the variance of the mean clustered by it, and its degrees of freedom (levels - 1).
    """

    variance: float
    parts: tuple[tuple[float, float], ...]

    @property
    def se(self) -> float:
        """Standard error of the mean."""
        return float(np.sqrt(self.variance))

    def half_width(self, alpha: float = 0.05) -> float:
        """Half width of the two-sided confidence interval of level 1 - `alpha`."""
        wide = [float(special.stdtrit(df, 1 - alpha / 2)) ** 2 * v for v, df in self.parts]
        twice = sum(v for v, _ in self.parts) - self.variance
        off = SUBTRACTED * float(special.ndtri(1 - alpha / 2)) ** 2 * twice
        return float(np.sqrt(max(sum(wide) - off, *wide, 0.0)))

    @property
    def df(self) -> float:
        """Degrees of freedom of the 95 % t interval with the same width."""
        if self.variance == 0:
            return min(df for _, df in self.parts)
        quantile = self.half_width() / self.se
        if quantile <= stats.t.ppf(0.975, 1e6):
            return 1e6
        return float(optimize.brentq(lambda df: float(special.stdtrit(df, 0.975)) - quantile, 0.2, 1e6))

    def p_value(self, mean: float) -> float:
        """Two-sided p-value of a mean: the smallest alpha for which its interval excludes zero."""
        if self.variance == 0:
            return float(mean == 0)
        tiny = 1e-12
        if self.half_width(tiny) < abs(mean):
            return tiny
        if self.half_width(1 - tiny) >= abs(mean):
            return 1.0
        return float(optimize.brentq(lambda alpha: self.half_width(alpha) - abs(mean), tiny, 1 - tiny))

    def detectable(self, *, alpha: float = 0.05, power: float = 0.8) -> float:
        """Minimum detectable effect: the true mean at which the interval excludes zero with probability `power`.

        It is computed from the noncentral t distribution.
        """
        if self.variance == 0:
            return 0.0
        quantile, df = self.half_width(alpha) / self.se, self.df
        shift = optimize.brentq(lambda nc: float(stats.nct.sf(quantile, df, nc)) - power, 0.0, 10 * quantile + 10)
        return float(shift) * self.se


def crossed(factors: Sequence[Labels]) -> list[bool]:
    """Which factors count: those with more than one level that are not nested in another factor.

    A source utterance that is converted to one target only varies with that target; resampling both would count it
    twice. Of two factors with the same groups, the first counts.
    """
    codes = [np.unique(f, return_inverse=True)[1] for f in factors]
    levels = [int(c.max()) + 1 if c.size else 0 for c in codes]

    def nested(i: int, j: int) -> bool:
        joint = len(np.unique(codes[i] * levels[j] + codes[j]))
        return joint == levels[i] and (levels[j] < levels[i] or j < i)

    def covered(i: int) -> bool:
        return any(levels[j] > 1 and nested(i, j) for j in range(len(factors)) if j != i)

    return [n > 1 and not covered(i) for i, n in enumerate(levels)]


def spread_of_mean(values: Array, target: Labels, source: Labels) -> Spread | None:
    """Variance of the mean of `values` (S, P), NaN where nothing was measured, under crossed random effects.

    Multi-way clustering by inclusion and exclusion (Cameron, Gelbach & Miller 2011, J. Bus. Econ. Stat. 29, eq. 2.13):
    V = V_seed + V_target + V_source - V_seed,target - V_seed,source - V_target,source + V_all, where
    V_c = G / (G - 1) * sum_g (sum of residuals in cluster g)^2 / N^2. For balanced data V_c is MS_c / N, and this is
    the analysis-of-variance estimate. It can be too small by chance, so the largest variance of a single factor is the
    lower bound.

    Factors with one level, and factors nested in another, are left out. None if no factor has two levels.
    """
    seed_of, pair_of = np.nonzero(np.isfinite(values))
    y = values[seed_of, pair_of]
    factors = [np.unique(f, return_inverse=True)[1] for f in (seed_of, target[pair_of], source[pair_of])]
    factors = [f for f, counts in zip(factors, crossed(factors), strict=True) if counts]
    if not factors:
        return None
    residual = y - y.mean()

    def variance(which: Sequence[np.ndarray]) -> tuple[float, int]:
        combined = which[0]
        for other in which[1:]:
            combined = np.unique(combined * (other.max() + 1) + other, return_inverse=True)[1]
        sums = np.bincount(combined, weights=residual)
        return float(len(sums) / (len(sums) - 1) * np.sum(sums**2) / y.size**2), len(sums)

    single = [variance([f]) for f in factors]
    total = sum(v for v, _ in single)
    for size in range(2, len(factors) + 1):
        total += (-1) ** (size + 1) * sum(variance(c)[0] for c in combinations(factors, size))
    return Spread(max(total, *(v for v, _ in single)), tuple((v, float(levels - 1)) for v, levels in single))


DRAWS = 10_000
MIN_LEVELS = 10  # with fewer levels of a factor, percentile intervals are too short, and t intervals are used
EXACT_FLIPS = 16  # speakers up to which all 2**16 sign patterns are enumerated
CHUNK = 1_000  # bootstrap draws held in memory at a time


@dataclass(frozen=True)
class Estimate:
    """A pooled mean, or ratio of pooled means, with its 95 % interval.

    Attributes:
        mean, low, high: the estimate and its interval; NaN if the data do not allow an interval.
        se, df: standard error, and degrees of freedom of a t interval.
        method: of the interval: "t", "bootstrap", "Wilson" or "none".
        seeds, targets, sources, cells: numbers of levels and of cells.
        spread: sampling variance.
    """

    mean: float
    low: float
    high: float
    se: float
    df: float
    method: str
    seeds: int
    targets: int
    sources: int
    cells: int
    spread: Spread | None = None

    @property
    def p(self) -> float:
        """Two-sided p-value of a mean of zero; NaN if there is no interval."""
        return self.spread.p_value(self.mean) if self.spread else float("nan")

    def detectable(self, comparisons: int = 1) -> float:
        """Minimum detectable effect with a power of 80 %. `comparisons` divides alpha, as in Holm's first step."""
        return self.spread.detectable(alpha=0.05 / comparisons) if self.spread else float("nan")

    def clears(self, bound: float) -> bool:
        """Whether the whole interval is above `bound`; False if there is no interval."""
        return bool(np.isfinite(self.low) and self.low > bound)


def labels(names: Sequence[str]) -> Labels:
    """Names (P,) as integers 0 to L - 1, in the order of the sorted names."""
    return np.unique(np.asarray(names, dtype=str), return_inverse=True)[1].astype(np.int64)


def bootstrap_means(values: Array, target: Labels, source: Labels, *, draws: int = DRAWS, seed: int = 0) -> Array:
    """Crossed bootstrap of pooled means: `values` (K, S, P) -> (draws, K).

    Each draw resamples the levels of every factor once, with replacement; a cell's weight is the product of how often
    its seed, its target and its source were drawn (the pigeonhole bootstrap, Owen 2007, Ann. Appl. Stat. 1, 386-411).
    All K quantities share the weights, so their differences and ratios may be taken draw by draw.
    """
    k, seeds, pairs = values.shape
    rng = np.random.default_rng(seed)
    present = np.isfinite(values)
    filled, shown = (x.reshape(k * seeds, pairs).T.copy() for x in (np.where(present, values, 0.0), 1.0 * present))

    def drawn(levels: int, n: int) -> Array:
        counts: Array = rng.multinomial(levels, np.full(levels, 1 / levels), size=n).astype(np.float64)
        return counts

    means: Array = np.empty((draws, k))
    for start in range(0, draws, CHUNK):
        n = min(CHUNK, draws - start)
        by_seed = drawn(seeds, n)
        by_pair = drawn(int(target.max()) + 1, n)[:, target] * drawn(int(source.max()) + 1, n)[:, source]
        top = np.einsum("nks,ns->nk", (by_pair @ filled).reshape(n, k, seeds), by_seed)
        if present.all():
            bottom = np.repeat((by_pair.sum(1) * by_seed.sum(1))[:, None], k, axis=1)
        else:
            bottom = np.einsum("nks,ns->nk", (by_pair @ shown).reshape(n, k, seeds), by_seed)
        with np.errstate(invalid="ignore", divide="ignore"):
            means[start : start + n] = top / bottom
    return means


def linearised(numerator: Array, denominator: Array) -> Array:
    """Values (S, P) with the ratio R of pooled means as mean, and the sampling variance of R to first order.

    R + (n - R d) / mean(d): the delta method's influence values (Cochran 1977, Sampling Techniques, section 6.4).
    """
    both = np.isfinite(numerator) & np.isfinite(denominator)
    n, d = np.where(both, numerator, np.nan), np.where(both, denominator, np.nan)
    if not both.any():
        return n
    ratio = np.nanmean(n) / np.nanmean(d)
    influence: Array = ratio + (n - ratio * d) / np.nanmean(d)
    return influence


def estimates(
    values: Sequence[Array],
    target: Labels,
    source: Labels,
    *,
    over: Sequence[Array | None] | None = None,
    level: float = 0.95,
    draws: int = DRAWS,
) -> list[Estimate]:
    """Mean and two-sided interval of each of `values` (each (S, P)), or of its ratio to the same item of `over`.

    If every varied factor has at least ten levels, it is a percentile interval of the crossed bootstrap, else a t
    interval in which every factor has its own degrees of freedom (`Spread`). With one seed (S = 1), the interval does
    not cover seeds.

    Args:
        values: K arrays (S, P).
        target, source: labels (P,).
        over: K divisors (S, P) or (1, P), or None for a plain mean.
        level: of the interval.
        draws: of the bootstrap.
    """
    nan, divisors = float("nan"), list(over) if over is not None else [None] * len(values)
    flat = [
        v if d is None else linearised(v, np.broadcast_to(d, v.shape)) for v, d in zip(values, divisors, strict=True)
    ]
    result: list[Estimate] = []
    resampled: dict[tuple[tuple[int, ...], bool, bool], list[int]] = {}
    for index, v in enumerate(flat):
        seed_of, pair_of = np.nonzero(np.isfinite(v))
        levels = [len(np.unique(f)) for f in (seed_of, target[pair_of], source[pair_of])]
        sizes: dict[str, Any] = {
            "seeds": levels[0],
            "targets": levels[1],
            "sources": levels[2],
            "cells": int(pair_of.size),
        }
        mean = float(v[seed_of, pair_of].mean()) if pair_of.size else nan
        spread = spread_of_mean(v, target, source) if pair_of.size else None
        if spread is None:
            result.append(Estimate(mean, nan, nan, nan, nan, "none", **sizes))
            continue
        half = spread.half_width(1 - level)
        measured = (mean, mean - half, mean + half, spread.se, spread.df)
        result.append(Estimate(*measured, "t", **sizes, spread=spread))
        counted = crossed([seed_of, target[pair_of], source[pair_of]])
        if min(n for n, counts in zip(levels, counted, strict=True) if counts) >= MIN_LEVELS:
            resampled.setdefault((v.shape, counted[1], counted[2]), []).append(index)
    for (shape, by_target, by_source), group in resampled.items():
        bottoms = [np.ones(shape) if (d := divisors[i]) is None else np.broadcast_to(d, shape) for i in group]
        masked = [np.where(np.isfinite(flat[i]), b, np.nan) for i, b in zip(group, bottoms, strict=True)]
        tops = [np.where(np.isfinite(flat[i]), values[i], np.nan) for i in group]
        drawn = target if by_target else np.zeros_like(target), source if by_source else np.zeros_like(source)
        means = bootstrap_means(np.stack(tops + masked), *drawn, draws=draws)
        quotients = means[:, : len(group)] / means[:, len(group) :]
        lows, highs = np.nanquantile(quotients, [(1 - level) / 2, (1 + level) / 2], axis=0)
        for i, low, high in zip(group, lows, highs, strict=True):
            result[i] = replace(result[i], low=float(low), high=float(high), method="bootstrap")
    return result


def level_means(values: Array, factor: Labels) -> Array:
    """Mean of `values` (S, P) per level of a factor of pairs (P,): (L,), without levels that have no cell."""
    _, pair_of = np.nonzero(np.isfinite(values))
    sums = np.bincount(factor[pair_of], weights=values[np.isfinite(values)])
    counts = np.bincount(factor[pair_of])
    means: Array = sums[counts > 0] / counts[counts > 0]
    return means


def equal_error_rate(genuine: NDArray[np.floating], impostor: NDArray[np.floating]) -> tuple[float, float]:
    """Equal error rate of two sets of scores, and its threshold.

    The threshold is the score at which the share of `genuine` (G,) below it (misses) and the share of `impostor` (I,)
    at or above it (false alarms) are closest. The rate is the mean of the two.
    """
    thresholds = np.unique(np.concatenate([genuine, impostor]))
    misses = np.searchsorted(np.sort(genuine), thresholds, side="left") / len(genuine)
    alarms = 1 - np.searchsorted(np.sort(impostor), thresholds, side="left") / len(impostor)
    best = int(np.argmin(np.abs(misses - alarms)))
    return float((misses[best] + alarms[best]) / 2), float(thresholds[best])


def sign_flip(means: Array, *, flips: int = 10_000, seed: int = 0) -> float:
    """Two-sided p-value of the sign-flip test: are the mean differences per target speaker (T,) symmetric about zero?

    Fisher's randomisation test (1935, The Design of Experiments, section 21): the share of sign patterns with an
    absolute mean of at least the observed one. It is exact up to 16 speakers; above, it is (hits + 1) / (flips + 1)
    over random patterns (Phipson & Smyth 2010). The smallest p of T speakers is 2 / 2**T.

    scipy.stats.permutation_test gives equal values up to 16 speakers, and takes a thousand times as long at 14.
    """
    t = len(means)
    if t == 0:
        return float("nan")
    reached = np.abs(_signs(t, flips, seed) @ means) >= abs(means.sum()) * (1 - 1e-12)
    return float(np.mean(reached)) if t <= EXACT_FLIPS else float((np.sum(reached) + 1) / (flips + 1))


@lru_cache(maxsize=8)
def _signs(t: int, flips: int, seed: int) -> Array:
    """All sign patterns of t means (N, t), or `flips` random ones above `EXACT_FLIPS` means."""
    patterns: Array
    if t <= EXACT_FLIPS:
        patterns = (1.0 - 2.0 * ((np.arange(2**t)[:, None] >> np.arange(t)) & 1)).astype(np.float64)
    else:
        patterns = np.random.default_rng(seed).choice([-1.0, 1.0], size=(flips, t))
    return patterns


def holm(p: Array) -> Array:
    """Holm's step-down correction (1979, Scand. J. Stat. 6, 65-70) of p-values (M,). NaN stays NaN and does not count.

    statsmodels gives equal values, but counts NaN as a comparison, and needs pandas.
    """
    adjusted = np.full(len(p), np.nan)
    order = [i for i in np.argsort(p, kind="stable") if np.isfinite(p[i])]
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, float(p[i]) * (len(order) - rank)))
        adjusted[i] = largest
    return adjusted
