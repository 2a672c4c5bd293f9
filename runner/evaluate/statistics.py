"""Inference for crossed data: every number was measured for a seed, a target speaker and a source utterance.

A *cell* is one measured conversion. `values` is (S, P): S seeds by P pairs, NaN where nothing was measured; what has no
seed (a control) is (1, P). `target` and `source` are (P,) integer labels of each pair's target speaker and source
utterance. Seeds, targets and sources are crossed factors: another study would draw all three anew, so an interval that
resamples cells, or one factor only, is too short. All functions are pure; random draws come from a fixed seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[np.float64]
Labels = NDArray[np.int64]

DRAWS = 10_000
MIN_LEVELS = 10  # with fewer levels of a factor percentile intervals are too short, and t intervals are used
EXACT_FLIPS = 16  # up to 2**16 sign patterns are enumerated
CHUNK = 1_000  # bootstrap draws held in memory at a time


@dataclass(frozen=True)
class Estimate:
    """A pooled mean (or ratio of pooled means) with its interval; NaN where the data cannot carry one."""

    mean: float
    low: float
    high: float
    se: float
    df: float
    method: str  # "t", "bootstrap" or "none"
    seeds: int
    targets: int
    sources: int
    cells: int

    def clears(self, bound: float) -> bool:
        """True where the whole interval lies above `bound`; False where there is no interval."""
        return bool(np.isfinite(self.low) and self.low > bound)


def labels(names: Sequence[str]) -> Labels:
    """Names (P,) as integers 0..L-1, in sorted order of the names."""
    return np.unique(np.asarray(names, dtype=str), return_inverse=True)[1].astype(np.int64)


def crossed(factors: Sequence[Labels]) -> list[bool]:
    """Which factors count: those with more than one level that are not nested in another one.

    A source utterance that is only ever converted to one target varies with that target; resampling both would count it
    twice. Of two factors with the same groups the first counts.
    """
    codes = [np.unique(f, return_inverse=True)[1] for f in factors]
    levels = [int(c.max()) + 1 if c.size else 0 for c in codes]

    def nested(i: int, j: int) -> bool:
        joint = len(np.unique(codes[i] * levels[j] + codes[j]))
        return joint == levels[i] and (levels[j] < levels[i] or j < i)

    def covered(i: int) -> bool:
        return any(levels[j] > 1 and nested(i, j) for j in range(len(factors)) if j != i)

    return [n > 1 and not covered(i) for i, n in enumerate(levels)]


def clustered_variance(values: Array, target: Labels, source: Labels) -> tuple[float, float]:
    """Variance of the mean of `values` (S, P) under crossed random effects, and its degrees of freedom.

    Multi-way clustering by inclusion and exclusion (Cameron, Gelbach & Miller 2011, J. Bus. Econ. Stat. 29, eq. 2.13):
    V = V_seed + V_target + V_source - V_seed,target - V_seed,source - V_target,source + V_all, where
    V_c = G / (G - 1) * sum_g (sum of residuals in cluster g)^2 / N^2. For balanced data V_c is MS_c / N, and this is
    the analysis-of-variance estimate. It can come out too small by chance, and is never taken below the largest single
    factor's. Degrees of freedom: Satterthwaite (1946, Biometrics 2, 110-114), V^2 / sum_f V_f^2 / (L_f - 1).

    A factor with one level contributes nothing, nor does one nested in another. Returns (nan, nan) when no factor has
    two levels.
    """
    seed_of, pair_of = np.nonzero(np.isfinite(values))
    y = values[seed_of, pair_of]
    factors = [np.unique(f, return_inverse=True)[1] for f in (seed_of, target[pair_of], source[pair_of])]
    factors = [f for f, counts in zip(factors, crossed(factors), strict=True) if counts]
    if not factors:
        return float("nan"), float("nan")
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
    total = max(total, *(v for v, _ in single))
    if total == 0:
        return 0.0, float(min(groups for _, groups in single) - 1)
    return total, max(1.0, total**2 / sum(v**2 / (groups - 1) for v, groups in single))


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
    """Values (S, P) whose mean is the ratio of pooled means R and whose spread is R's, to first order.

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

    A percentile interval of the crossed bootstrap where every varied factor has at least ten levels, else a t interval
    with Satterthwaite degrees of freedom. Seeds that were not varied (S = 1) are not in the interval.
    """
    nan, divisors = float("nan"), list(over) if over is not None else [None] * len(values)
    spread = [
        v if d is None else linearised(v, np.broadcast_to(d, v.shape)) for v, d in zip(values, divisors, strict=True)
    ]
    result: list[Estimate] = []
    resampled: dict[tuple[tuple[int, ...], bool, bool], list[int]] = {}
    for index, v in enumerate(spread):
        seed_of, pair_of = np.nonzero(np.isfinite(v))
        levels = [len(np.unique(f)) for f in (seed_of, target[pair_of], source[pair_of])]
        sizes = {"seeds": levels[0], "targets": levels[1], "sources": levels[2], "cells": int(pair_of.size)}
        mean = float(v[seed_of, pair_of].mean()) if pair_of.size else nan
        variance, df = clustered_variance(v, target, source) if pair_of.size else (nan, nan)
        if not np.isfinite(variance):
            result.append(Estimate(mean, nan, nan, nan, nan, "none", **sizes))
            continue
        se = float(np.sqrt(variance))
        half = float(stats.t.ppf((1 + level) / 2, df)) * se
        result.append(Estimate(mean, mean - half, mean + half, se, df, "t", **sizes))
        counted = crossed([seed_of, target[pair_of], source[pair_of]])
        if min(n for n, counts in zip(levels, counted, strict=True) if counts) >= MIN_LEVELS:
            resampled.setdefault((v.shape, counted[1], counted[2]), []).append(index)
    for (shape, by_target, by_source), group in resampled.items():
        bottoms = [np.ones(shape) if (d := divisors[i]) is None else np.broadcast_to(d, shape) for i in group]
        masked = [np.where(np.isfinite(spread[i]), b, np.nan) for i, b in zip(group, bottoms, strict=True)]
        tops = [np.where(np.isfinite(spread[i]), values[i], np.nan) for i in group]
        drawn = target if by_target else np.zeros_like(target), source if by_source else np.zeros_like(source)
        means = bootstrap_means(np.stack(tops + masked), *drawn, draws=draws)
        quotients = means[:, : len(group)] / means[:, len(group) :]
        lows, highs = np.nanquantile(quotients, [(1 - level) / 2, (1 + level) / 2], axis=0)
        for i, low, high in zip(group, lows, highs, strict=True):
            result[i] = replace(result[i], low=float(low), high=float(high), method="bootstrap")
    return result


def level_means(values: Array, factor: Labels) -> Array:
    """Mean of `values` (S, P) for each level of a pair factor (P,): (L,), levels without a cell left out."""
    _, pair_of = np.nonzero(np.isfinite(values))
    sums = np.bincount(factor[pair_of], weights=values[np.isfinite(values)])
    counts = np.bincount(factor[pair_of])
    means: Array = sums[counts > 0] / counts[counts > 0]
    return means


def sign_flip(means: Array, *, flips: int = 10_000, seed: int = 0) -> float:
    """Two-sided p of "symmetric about zero" for one mean difference per target speaker (T,).

    Fisher's randomisation test (1935, The Design of Experiments, section 21): the share of sign patterns whose absolute
    mean is at least the observed one. Exact up to 16 speakers; beyond, (hits + 1) / (flips + 1) over random patterns
    (Phipson & Smyth 2010). The smallest p that T speakers can reach is 2 / 2**T.
    """
    t = len(means)
    if t == 0:
        return float("nan")
    observed = abs(means.sum()) * (1 - 1e-12)
    if t <= EXACT_FLIPS:
        signs = 1.0 - 2.0 * ((np.arange(2**t)[:, None] >> np.arange(t)) & 1)
        return float(np.mean(np.abs(signs @ means) >= observed))
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(flips, t))
    return float((np.sum(np.abs(signs @ means) >= observed) + 1) / (flips + 1))


def holm(p: Array) -> Array:
    """Holm's step-down adjustment (1979, Scand. J. Stat. 6, 65-70) of p-values (M,); NaN stays and is not counted."""
    adjusted = np.full(len(p), np.nan)
    order = [i for i in np.argsort(p, kind="stable") if np.isfinite(p[i])]
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, float(p[i]) * (len(order) - rank)))
        adjusted[i] = largest
    return adjusted


def minimum_detectable_effect(
    se: float, df: float, *, alpha: float = 0.05, power: float = 0.8, comparisons: int = 1
) -> float:
    """Smallest true difference found with that power: (t(1 - alpha/2m) + t(power)) * se (Bloom 1995, Eval. Rev. 19).

    `comparisons` m divides alpha, as Holm's first step does.
    """
    if not (np.isfinite(se) and np.isfinite(df)):
        return float("nan")
    return float((stats.t.ppf(1 - alpha / (2 * comparisons), df) + stats.t.ppf(power, df)) * se)
