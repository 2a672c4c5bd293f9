"""The statistics against independent implementations, hand examples, and simulated studies with a known truth."""

from __future__ import annotations

from time import perf_counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from snac_runner.evaluate.statistics import (
    Array,
    Labels,
    Spread,
    bootstrap_means,
    crossed,
    estimates,
    holm,
    labels,
    level_means,
    linearised,
    sign_flip,
    spread_of_mean,
)


def simulated(
    rng: np.random.Generator, *, seeds: int, targets: int, sd_seed: float, truth: float = 0.0, sources: int = 20
) -> tuple[Array, Labels, Labels]:
    """Differences (S, P) with crossed random effects of seeds, targets and sources, four pairs a target."""
    pairs = 4 * targets
    target = np.repeat(np.arange(targets), 4)
    source = (np.arange(pairs) % sources).astype(np.int64)
    values = truth + sd_seed * rng.standard_normal((seeds, 1)) + 0.1 * rng.standard_normal((seeds, pairs))
    values = values + (0.05 * rng.standard_normal(targets))[target] + (0.03 * rng.standard_normal(sources))[source]
    return values + 0.03 * rng.standard_normal((seeds, targets))[:, target], target, source


def test_one_factor_of_clusters_gives_the_textbook_t_interval_of_cluster_means() -> None:
    rng = np.random.default_rng(0)
    target = np.repeat(np.arange(9), 4)
    values = rng.normal(0.2, 1, 9)[target][None]
    (found,) = estimates([values], target, target)
    expected = stats.t.interval(0.95, 8, loc=values.mean(), scale=stats.sem(values[0, ::4]))
    assert found.method == "t"
    assert found.df == pytest.approx(8)
    assert (found.low, found.high) == pytest.approx(expected)


def test_two_crossed_factors_give_the_balanced_analysis_of_variance_estimate() -> None:
    rng = np.random.default_rng(1)
    s, t = 6, 7
    values = rng.normal(0, 1, (s, t)) + rng.normal(0, 2, (s, 1)) + rng.normal(0, 2, (1, t))
    rows, columns, grand = values.mean(1), values.mean(0), values.mean()
    ms_rows = t * ((rows - grand) ** 2).sum() / (s - 1)
    ms_columns = s * ((columns - grand) ** 2).sum() / (t - 1)
    rest = values - rows[:, None] - columns[None] + grand
    total = ((values - grand) ** 2).sum() / (s * t - 1)  # of single cells, as the formula has it
    spread = spread_of_mean(values, np.arange(t), np.zeros(t, dtype=np.int64))
    assert spread is not None
    assert spread.variance == pytest.approx((ms_rows + ms_columns - total) / (s * t))
    assert rest.sum() == pytest.approx(0)


def test_a_factor_nested_in_another_counts_once() -> None:
    target = np.repeat(np.arange(8), 4)
    crossing = np.arange(32) % 4
    assert crossed([target, np.arange(32)]) == [True, False]
    assert crossed([target, target]) == [True, False]
    assert crossed([target, crossing]) == [True, True]
    assert crossed([np.zeros(32, dtype=np.int64), crossing]) == [False, True]


def test_bootstrap_of_one_factor_has_the_spread_of_the_mean() -> None:
    rng = np.random.default_rng(2)
    values = rng.normal(0, 1, (1, 1, 60))
    means = bootstrap_means(values, np.arange(60), np.zeros(60, dtype=np.int64))
    assert means.shape == (10_000, 1)
    assert means.std() == pytest.approx(values.std() / np.sqrt(60), rel=0.03)


def test_bootstrap_is_used_from_ten_levels_on_and_agrees_with_the_t_interval_there() -> None:
    rng = np.random.default_rng(3)
    target = np.repeat(np.arange(40), 3)
    values = rng.normal(0, 0.1, 40)[target] + rng.normal(0, 0.1, (1, 120))
    (found,) = estimates([values], target, np.arange(120))
    assert found.method == "bootstrap"
    assert found.low == pytest.approx(found.mean - 1.96 * found.se, abs=0.01)
    assert found.high == pytest.approx(found.mean + 1.96 * found.se, abs=0.01)


def test_a_ratio_is_the_ratio_of_pooled_means_and_not_the_mean_of_ratios() -> None:
    top, bottom = np.array([[1.0, 2.0, 9.0]]), np.array([[2.0, 2.0, 4.0]])
    assert linearised(top, bottom).mean() == pytest.approx(12 / 8)
    (found,) = estimates([top], np.arange(3), np.arange(3), over=[bottom])
    assert found.mean == pytest.approx(1.5)


def test_bootstrapped_ratio_agrees_with_its_linearised_interval() -> None:
    rng = np.random.default_rng(4)
    bottom = rng.normal(0.5, 0.05, (1, 200))
    top = 0.4 * bottom + rng.normal(0, 0.05, (1, 200))
    (found,) = estimates([top], np.arange(200), np.arange(200), over=[bottom])
    assert found.method == "bootstrap"
    assert found.high - found.low == pytest.approx(2 * 1.96 * found.se, rel=0.1)


def test_a_missing_cell_is_left_out_of_the_mean_and_counted_out() -> None:
    values = np.array([[1.0, np.nan, 3.0], [1.0, 5.0, 3.0]])
    (found,) = estimates([values], np.arange(3), np.arange(3))
    assert found.mean == pytest.approx(13 / 5)
    assert found.cells == 5


def test_nothing_measured_or_a_single_level_gives_no_interval() -> None:
    nothing, alone = estimates([np.full((1, 3), np.nan), np.array([[1.0, np.nan, np.nan]])], np.arange(3), np.arange(3))
    assert np.isnan(nothing.mean)
    assert alone.mean == 1.0
    assert np.isnan(alone.low)


def test_sign_flip_equals_scipys_exact_permutation_test() -> None:
    means = np.random.default_rng(5).normal(0.3, 0.5, 11)
    exact = stats.permutation_test(
        (means,), np.mean, permutation_type="samples", n_resamples=np.inf, alternative="two-sided"
    )
    assert sign_flip(means) == pytest.approx(exact.pvalue)


def test_five_speakers_cannot_reach_five_percent_in_a_sign_flip_test() -> None:
    assert sign_flip(np.full(5, 1.0)) == pytest.approx(2 / 2**5)
    assert sign_flip(np.full(8, 1.0)) == pytest.approx(2 / 2**8)


def test_random_sign_flips_agree_with_the_t_test_on_many_speakers() -> None:
    means = np.random.default_rng(6).normal(0.15, 0.5, 40)
    assert sign_flip(means) == pytest.approx(stats.ttest_1samp(means, 0).pvalue, abs=0.015)
    assert sign_flip(means) == sign_flip(means)


def test_holm_follows_the_hand_example() -> None:
    adjusted = holm(np.array([0.01, 0.04, 0.03, 0.005]))
    assert adjusted == pytest.approx([0.03, 0.06, 0.06, 0.02])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_never_lowers_a_p_value_and_keeps_their_order(p: list[float]) -> None:
    raw = np.array(p)
    adjusted = holm(raw)
    assert (adjusted >= raw - 1e-15).all()
    assert (adjusted <= 1).all()
    assert (np.diff(adjusted[np.argsort(raw, kind="stable")]) >= 0).all()


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.floats(-3, 3), st.floats(0.1, 10))
def test_shifting_and_scaling_the_data_shifts_and_scales_the_interval(seed: int, shift: float, scale: float) -> None:
    values, target, source = simulated(np.random.default_rng(seed), seeds=3, targets=8, sd_seed=0.05)
    plain, moved = estimates([values, shift + scale * values], target, source)
    assert moved.low == pytest.approx(shift + scale * plain.low)
    assert moved.df == pytest.approx(plain.df)


def test_detectable_effect_is_found_with_about_the_power_it_promises() -> None:
    rng = np.random.default_rng(7)
    for n in (3, 12):
        effect = Spread(1 / n, ((1 / n, n - 1.0),)).detectable()
        found = stats.ttest_1samp(rng.normal(effect, 1, (4000, n)), 0, axis=1).pvalue < 0.05
        assert found.mean() == pytest.approx(0.8, abs=0.03)


def test_with_one_factor_the_p_value_is_that_of_the_t_test() -> None:
    sample = np.random.default_rng(11).normal(0.3, 1, 9)
    spread = Spread(float(sample.var(ddof=1) / 9), ((float(sample.var(ddof=1) / 9), 8.0),))
    assert spread.p_value(float(sample.mean())) == pytest.approx(stats.ttest_1samp(sample, 0).pvalue)


@given(st.floats(0.01, 10), st.floats(0.01, 10), st.integers(1, 40), st.integers(1, 40), st.floats(0.01, 0.5))
def test_an_interval_is_wider_than_each_part_alone_would_make_it(
    v: float, w: float, df: int, other: int, alpha: float
) -> None:
    together = Spread(v + w, ((v, float(df)), (w, float(other)))).half_width(alpha)
    assert together >= stats.t.ppf(1 - alpha / 2, df) * np.sqrt(v) - 1e-9
    assert together >= stats.t.ppf(1 - alpha / 2, other) * np.sqrt(w) - 1e-9
    assert Spread(v + w, ((v, float(df)), (w, float(other)))).p_value(together) == pytest.approx(alpha, rel=1e-3)


def test_level_means_are_taken_over_seeds_and_pairs() -> None:
    values = np.array([[1.0, 2.0, 10.0], [3.0, np.nan, 20.0]])
    assert level_means(values, labels(["a", "a", "b"])) == pytest.approx([2.0, 15.0])


def test_ten_thousand_draws_over_a_large_study_take_seconds() -> None:
    rng = np.random.default_rng(9)
    arms = rng.normal(0, 1, (8, 12, 600))  # twelve seeds, so that every factor is bootstrapped
    start = perf_counter()
    means = bootstrap_means(arms[:, :3], np.arange(600) % 20, np.arange(600) % 60)
    assert means.shape == (10_000, 8)
    assert perf_counter() - start < 10
