"""Verdicts on simulated studies: few false differences between equal arms, and the announced power."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from snac_runner.evaluate.verdict import (
    ArmScores,
    StandardDeviations,
    StudySize,
    compare,
    largest_variance,
    noninferiority_power,
    planned_detectable_effect,
)

SOURCES, PER_TARGET = 20, 4
SD_TARGET, SD_SOURCE, SD_REST = 0.15, 0.10, 0.20


def drawn_study(
    rng: np.random.Generator, *, seeds: int, targets: int, sd_seed: float, effect: float, content: bool
) -> tuple[dict[str, ArmScores], np.ndarray, np.ndarray]:
    """Two arms; the standard deviations are those of their difference, as `planned_detectable_effect` takes them."""
    pairs = PER_TARGET * targets
    target = np.repeat(np.arange(targets), PER_TARGET)
    source = (np.arange(pairs) % SOURCES).astype(np.int64)
    half = 2**-0.5
    common = rng.normal(0, 0.1, targets)[target]  # how easy a target is for both arms

    def scores(shift: float) -> np.ndarray:
        own = sd_seed * rng.standard_normal((seeds, 1)) + SD_REST * rng.standard_normal((seeds, pairs))
        own += (SD_TARGET * rng.standard_normal(targets))[target] + (SD_SOURCE * rng.standard_normal(SOURCES))[source]
        return shift + common + half * own

    arms = {
        name: ArmScores(list(range(seeds)), scores(shift), 0.3 * scores(0.0) if content else None)
        for name, shift in (("a", effect), ("b", 0.0))
    }
    return arms, target, source


@dataclass(frozen=True)
class Shares:
    """Of simulated studies: equal arms called different (by speaker alone, by both primaries), intervals that hold the
    truth, announced effects that are found; and the announced effect."""

    false: float
    false_with_content: float
    covered: float
    found: float
    announced: float


def shares(seeds: int, targets: int, sd_seed: float, studies: int) -> Shares:
    """Two equal arms, and two that differ by the announced effect, `studies` times each."""
    rng = np.random.default_rng([seeds, targets, round(100 * sd_seed)])
    sds = StandardDeviations(sd_seed, SD_TARGET, SD_SOURCE, SD_REST)
    announced = planned_detectable_effect(StudySize(seeds, targets, SOURCES, PER_TARGET * targets), sds)
    false = both = covered = found = 0
    for _ in range(studies):
        arms, *labels = drawn_study(rng, seeds=seeds, targets=targets, sd_seed=sd_seed, effect=0.0, content=True)
        (equal,) = compare(arms, *labels, content_margin=0.05)
        both += equal.decision.word in ("better", "worse", "mixed")
        alone = {name: ArmScores(arm.seeds, arm.speaker) for name, arm in arms.items()}
        false += compare(alone, *labels)[0].decision.word in ("higher", "lower")
        covered += equal.difference.low <= 0 <= equal.difference.high
        arms, *labels = drawn_study(rng, seeds=seeds, targets=targets, sd_seed=sd_seed, effect=announced, content=False)
        (different,) = compare(arms, *labels)
        found += different.decision.word == "higher"
    return Shares(false / studies, both / studies, covered / studies, found / studies, announced)


@pytest.mark.parametrize(("seeds", "sd_seed"), [(3, 0.05), (3, 0.3), (5, 0.05)])
def test_equal_arms_are_rarely_called_different(seeds: int, sd_seed: float) -> None:
    seen = shares(seeds, 10, sd_seed, studies=150)
    assert max(seen.false, seen.false_with_content) <= 0.065 + 2 * np.sqrt(0.065 * 0.935 / 150)
    assert seen.covered >= 0.91
    assert seen.found >= 0.8 - 2 * np.sqrt(0.8 * 0.2 / 150)


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("targets", [5, 8, 10, 20, 40])
@pytest.mark.parametrize("sd_seed", [0.0, 0.05, 0.1, 0.3])
def test_equal_arms_are_rarely_called_different_in_a_thousand_studies(seeds: int, targets: int, sd_seed: float) -> None:
    seen = shares(seeds, targets, sd_seed, studies=1000)
    print(
        f"\n{seeds} seeds, {targets:2d} targets, seed sd {sd_seed:.2f}: false {seen.false:5.1%}, with content "
        f"{seen.false_with_content:5.1%}, coverage {seen.covered:.1%}, announced {seen.announced:.2f} found in "
        f"{seen.found:.1%}"
    )
    assert max(seen.false, seen.false_with_content) <= 0.065
    assert seen.covered >= 0.925
    if targets >= 8:
        assert seen.found >= 0.8
    else:
        assert seen.false == seen.found == 0  # five speakers carry no verdict


def test_equal_arms_among_many_are_not_called_different_more_often() -> None:
    rng = np.random.default_rng(5)
    false = 0
    for _ in range(60):
        pairs = [drawn_study(rng, seeds=3, targets=12, sd_seed=0.2, effect=0.0, content=True) for _ in range(2)]
        arms = {f"{name}{i}": arm for i, (both, *_) in enumerate(pairs) for name, arm in both.items()}
        found = compare(arms, *pairs[0][1:], content_margin=0.05)
        assert len(found) == 6
        false += any(c.decision.word in ("better", "worse", "mixed") for c in found)
    assert false <= 8  # 5 % of 60 is 3; 9 or more has a probability of 0.2 %


def test_an_announced_effect_is_found_among_six_arms_of_which_the_verdict_takes_the_largest_variance() -> None:
    rng, arms, targets, studies = np.random.default_rng(7), 6, 20, 25
    sds = StandardDeviations(0.1, SD_TARGET, SD_SOURCE, SD_REST)
    size = StudySize(3, targets, SOURCES, PER_TARGET * targets, arms)
    announced = planned_detectable_effect(size, sds, comparisons=arms * (arms - 1) // 2)
    found = 0.0
    for _ in range(studies):
        drawn = [drawn_study(rng, seeds=3, targets=targets, sd_seed=0.1, effect=0.0, content=False) for _ in range(3)]
        study = {f"{name}{i}": arm for i, (both, *_) in enumerate(drawn) for name, arm in both.items()}
        ahead = ArmScores(study["a0"].seeds, study["a0"].speaker + announced)
        words = [c.decision.word for c in compare({**study, "a0": ahead}, *drawn[0][1:]) if c.a == "a0"]
        found += words.count("higher") / len(words)
    assert found / studies >= 0.8 - 2 * np.sqrt(0.8 * 0.2 / studies)


@given(st.integers(2, 8), st.integers(2, 8))
def test_the_largest_variance_of_more_pairs_is_larger_and_of_more_seeds_is_nearer_the_truth(
    arms: int, seeds: int
) -> None:
    here = largest_variance(arms, seeds)
    assert here == pytest.approx(1, abs=0.1) if arms == 2 else here > 1.1
    assert largest_variance(arms + 1, seeds) > here - 0.05
    assert largest_variance(arms, seeds + 2) < here + 0.05


def test_a_dry_run_announces_how_often_non_inferiority_of_content_is_shown() -> None:
    rng, margin = np.random.default_rng(6), 0.06
    size = StudySize(3, 20, SOURCES, PER_TARGET * 20)
    held = 0
    for _ in range(120):
        arms, *labels = drawn_study(rng, seeds=3, targets=20, sd_seed=0.05, effect=0.0, content=True)
        (equal,) = compare(arms, *labels, content_margin=margin)
        assert equal.content is not None
        held += equal.content.high < margin
    announced = noninferiority_power(
        size, StandardDeviations(*(0.3 * sd for sd in (0.05, SD_TARGET, SD_SOURCE, SD_REST))), margin
    )
    assert held / 120 == pytest.approx(announced, abs=0.13)  # three standard errors
    assert 0.2 < announced < 0.95, "or nothing would have been asked"
