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
    labels,
    level_means,
    linearised,
    seed_variance,
    shaffer,
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


def test_two_crossed_factors_give_the_mean_squares_of_the_balanced_analysis_of_variance() -> None:
    rng = np.random.default_rng(1)
    s, t = 6, 7
    values = rng.normal(0, 1, (s, t)) + rng.normal(0, 2, (s, 1)) + rng.normal(0, 2, (1, t))
    rows, columns, grand = values.mean(1), values.mean(0), values.mean()
    ms_rows = t * ((rows - grand) ** 2).sum() / (s - 1)
    ms_columns = s * ((columns - grand) ** 2).sum() / (t - 1)
    spread = spread_of_mean(values, np.arange(t), np.zeros(t, dtype=np.int64))
    assert spread is not None
    assert np.array(spread.parts) == pytest.approx(
        np.array([(ms_rows / (s * t), s - 1), (ms_columns / (s * t), t - 1)])
    )


def test_targets_and_sources_are_clustered_in_two_ways_as_in_the_matrix_form() -> None:
    rng = np.random.default_rng(12)
    values, target, source = simulated(rng, seeds=1, targets=30, sd_seed=0.0, sources=30)
    source = source[rng.permutation(len(source))]
    spread = spread_of_mean(values, target, source)
    assert spread is not None
    residual = values[0] - values.mean()

    def meat(same: Array, levels: int) -> float:
        return float(levels / (levels - 1) * residual @ same @ residual / len(residual) ** 2)

    by_target, by_source = np.equal.outer(target, target), np.equal.outer(source, source)
    both = by_target & by_source
    joint = len({*zip(target.tolist(), source.tolist(), strict=True)})
    wanted = meat(1.0 * by_target, 30) + meat(1.0 * by_source, 30) - meat(1.0 * both, joint)
    assert spread.variance == pytest.approx(max(wanted, meat(1.0 * by_target, 30), meat(1.0 * by_source, 30)))
    assert spread.parts[0][1] == 29


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


def test_shaffers_multipliers_are_those_of_the_papers_tables() -> None:
    p = np.linspace(0.001, 0.006, 6)[:, None]  # four arms: 6, 3, 3, 3, 2, 1
    assert shaffer(p, 4)[:, 0] == pytest.approx([0.006, 0.006, 0.009, 0.012, 0.012, 0.012])
    three = shaffer(np.array([[0.01], [0.04], [0.03]]), 3)[:, 0]
    assert three == pytest.approx([0.03, 0.04, 0.03])  # 3, 1, 1
    two_measures = shaffer(np.array([[0.01, 0.5], [0.5, 0.5], [0.02, 0.5]]), 3)
    assert two_measures[0, 0] == pytest.approx(0.06)  # all six can be equal
    assert two_measures[2, 0] == pytest.approx(0.08)  # one pair differs in one measure: 1 + 3 are left


@given(st.lists(st.floats(0, 1), min_size=6, max_size=6), st.sampled_from([(4, 1), (3, 2)]))
def test_shaffer_never_lowers_a_p_value_keeps_their_order_and_never_exceeds_holm(
    p: list[float], layout: tuple[int, int]
) -> None:
    arms, measures = layout
    raw = np.array(p)
    adjusted = shaffer(raw.reshape(-1, measures), arms).ravel()
    order = np.argsort(raw, kind="stable")
    holm = np.minimum(1, np.maximum.accumulate(raw[order] * np.arange(6, 0, -1)))
    assert (adjusted >= raw - 1e-15).all()
    assert (np.diff(adjusted[order]) >= 0).all()
    assert (adjusted[order] <= holm + 1e-15).all()


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
        effect = Spread(((1 / n, n - 1.0),)).detectable()
        found = stats.ttest_1samp(rng.normal(effect, 1, (4000, n)), 0, axis=1).pvalue < 0.05
        assert found.mean() == pytest.approx(0.8, abs=0.03)


def test_with_one_factor_the_p_value_is_that_of_the_t_test() -> None:
    sample = np.random.default_rng(11).normal(0.3, 1, 9)
    spread = Spread(((float(sample.var(ddof=1) / 9), 8.0),))
    assert spread.p_value(float(sample.mean())) == pytest.approx(stats.ttest_1samp(sample, 0).pvalue)


@given(st.floats(0.01, 10), st.floats(0.01, 10), st.integers(1, 40), st.integers(1, 40), st.floats(0.01, 0.5))
def test_an_interval_is_wider_than_each_part_alone_would_make_it(
    v: float, w: float, df: int, other: int, alpha: float
) -> None:
    together = Spread(((v, float(df)), (w, float(other)))).half_width(alpha)
    assert together >= stats.t.ppf(1 - alpha / 2, df) * np.sqrt(v) - 1e-9
    assert together >= stats.t.ppf(1 - alpha / 2, other) * np.sqrt(w) - 1e-9
    assert Spread(((v, float(df)), (w, float(other)))).p_value(together) == pytest.approx(alpha, rel=1e-3)


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


@pytest.mark.parametrize(
    ("v", "df", "w", "other"), [(1.0, 1, 2.0, 39), (0.01, 2, 1.0, 19), (1.0, 4, 1e-4, 9), (1.0, 5, 1.0, 5)]
)
def test_two_parts_have_the_distribution_of_the_sum_of_two_t_variables(v: float, df: int, w: float, other: int) -> None:
    spread = Spread(((v, float(df)), (w, float(other))))
    rng = np.random.default_rng(13)
    drawn = np.sqrt(v) * rng.standard_t(df, 400_000) + np.sqrt(w) * rng.standard_t(other, 400_000)
    for probability in (0.5, 0.8, 0.975, 0.9958):
        assert 1 - spread.exceeds(float(np.quantile(drawn, probability))) == pytest.approx(probability, abs=0.003)
    assert spread.exceeds(spread.half_width(0.01)) == pytest.approx(0.005)


def test_the_interval_reaches_the_published_point_of_the_behrens_fisher_distribution() -> None:
    # Fisher & Yates, Statistical Tables, VI: two-sided 5 % point of d for 12 and 6 degrees of freedom at 45 degrees
    assert Spread(((0.5, 12.0), (0.5, 6.0))).half_width() == pytest.approx(2.301, abs=0.01)


def test_the_variance_between_seeds_is_bounded_from_all_arms() -> None:
    rng = np.random.default_rng(14)
    arms = rng.normal(0, 1, (3, 4, 1)) + np.arange(6)  # without noise of single cells
    differences = [arms[a] - arms[b] for a, b in ((0, 1), (0, 2), (1, 2))]
    found = seed_variance(differences, 3)
    assert found is not None
    variance, df = found
    assert df == 6
    means = arms.mean(2)
    residual = means - means.mean(0) - means.mean(1, keepdims=True) + means.mean()
    own = [(means[a] - means[b]).var(ddof=1) for a, b in ((0, 1), (0, 2), (1, 2))]
    assert np.mean(own) == pytest.approx(2 * (residual**2).sum() / 6)  # what is pooled is the mean of the pairs
    assert variance == pytest.approx(max(own))
    assert seed_variance([d[:1] for d in differences], 3) is None
