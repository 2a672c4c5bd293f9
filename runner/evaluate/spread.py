"""How far a pooled mean of crossed data may be off: its variance, and intervals that few levels cannot fool.

The mean of a study is the truth plus an effect of its seeds, of its target speakers and of its source utterances, each
estimated from as many values as the factor has levels. With three seeds the largest part of the variance may rest on
two degrees of freedom. Satterthwaite's degrees of freedom (1946) then come out too large exactly when the seeds happen
to agree, and an interval made with them is too short (docs/log.md). Here each part keeps the quantile of its own
degrees of freedom:

    half width^2 = sum_f t_f^2 V_f - 0.8 z^2 (sum_f V_f - V)

The first sum is Banerjee's interval for a linear function of means (1960, Sankhya 22, 357-358), which covers at least
as often as it says for independent parts. V_f counts the noise of single cells once for every factor; what is
counted twice rests on many cells, and is taken off at the normal quantile z; four fifths of it, because it is an
estimate too (all of it leaves 5.6 % false differences between equal arms where seeds do not differ, this 4.8 %).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special, stats

TAKEN_OFF = 0.8  # of the variance that is counted twice

Array = NDArray[np.float64]
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Spread:
    """Sampling variance of a mean, and the parts that it is made of.

    Attributes:
        variance: of the mean.
        parts: for each crossed factor, the variance of the mean as clustered by it, and levels - 1.
    """

    variance: float
    parts: tuple[tuple[float, float], ...]

    @property
    def se(self) -> float:
        """Standard error of the mean."""
        return float(np.sqrt(self.variance))

    def half_width(self, alpha: float = 0.05) -> float:
        """Half of the two-sided interval that misses the truth with at most probability `alpha`."""
        wide = [float(special.stdtrit(df, 1 - alpha / 2)) ** 2 * v for v, df in self.parts]
        twice = sum(v for v, _ in self.parts) - self.variance
        off = TAKEN_OFF * float(special.ndtri(1 - alpha / 2)) ** 2 * twice
        return float(np.sqrt(max(sum(wide) - off, *wide, 0.0)))

    @property
    def df(self) -> float:
        """Degrees of freedom of the t interval that is as wide as the one of 95 %."""
        if self.variance == 0:
            return min(df for _, df in self.parts)
        quantile = self.half_width() / self.se
        if quantile <= stats.t.ppf(0.975, 1e6):
            return 1e6
        return float(optimize.brentq(lambda df: float(special.stdtrit(df, 0.975)) - quantile, 0.2, 1e6))

    def p_value(self, mean: float) -> float:
        """The alpha whose interval around `mean` just reaches zero."""
        if self.variance == 0:
            return float(mean == 0)
        tiny = 1e-12
        if self.half_width(tiny) < abs(mean):
            return tiny
        if self.half_width(1 - tiny) >= abs(mean):
            return 1.0
        return float(optimize.brentq(lambda alpha: self.half_width(alpha) - abs(mean), tiny, 1 - tiny))

    def detectable(self, *, alpha: float = 0.05, power: float = 0.8) -> float:
        """The true mean whose interval of 1 - alpha clears zero with probability `power` (noncentral t)."""
        if self.variance == 0:
            return 0.0
        quantile, df = self.half_width(alpha) / self.se, self.df
        shift = optimize.brentq(lambda nc: float(stats.nct.sf(quantile, df, nc)) - power, 0.0, 10 * quantile + 10)
        return float(shift) * self.se


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


def spread_of_mean(values: Array, target: Labels, source: Labels) -> Spread | None:
    """Variance of the mean of `values` (S, P), NaN where nothing was measured, under crossed random effects.

    Multi-way clustering by inclusion and exclusion (Cameron, Gelbach & Miller 2011, J. Bus. Econ. Stat. 29, eq. 2.13):
    V = V_seed + V_target + V_source - V_seed,target - V_seed,source - V_target,source + V_all, where
    V_c = G / (G - 1) * sum_g (sum of residuals in cluster g)^2 / N^2. For balanced data V_c is MS_c / N, and this is
    the analysis-of-variance estimate. It can come out too small by chance, and is never taken below the largest single
    factor's.

    A factor with one level contributes nothing, nor does one nested in another. None when no factor has two levels.
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
