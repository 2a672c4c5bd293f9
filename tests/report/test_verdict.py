"""Verdicts on made-up estimates and on simulated study folders."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulated_study import write_study

from snac_runner.evaluate.statistics import Estimate, Spread
from snac_runner.evaluate.verdict import (
    ArmScores,
    Decision,
    StandardDeviations,
    StudySize,
    Word,
    compare,
    decide,
    is_dead,
    largest_variance,
    needed_sizes,
    planned_detectable_effect,
    shortfalls,
)
from snac_runner.report.estimates import Agreement, StudyEstimates, compute
from snac_runner.report.format import number
from snac_runner.report.page import build, summary
from snac_runner.report.results import Study, read
from snac_runner.report.study_tables import all_tables
from snac_runner.report.text import Verdict, _headline, verdict


def made_up(low: float, high: float) -> Estimate:
    return Estimate((low + high) / 2, low, high, 0.01, 5.0, "t", 3, 10, 20, 120)


def reported(folder: Path) -> tuple[Study, StudyEstimates, Verdict]:
    study = read(folder)
    numbers = compute(study)
    return study, numbers, verdict(study, numbers)


def test_without_a_content_measure_nothing_is_called_better() -> None:
    assert decide(made_up(0.1, 0.2), 0.01).word == "higher"
    assert decide(made_up(-0.2, -0.1), 0.01).word == "lower"


@pytest.mark.parametrize(
    ("speaker", "content", "word"),
    [
        ((0.1, 0.2), (-0.005, 0.01), "better"),  # superior on one, not inferior on the other
        ((0.1, 0.2), (-0.05, 0.01), "mixed"),  # words may have been lost
        ((-0.04, 0.01), (0.02, 0.03), "better"),
        ((-0.06, 0.01), (0.02, 0.03), "mixed"),
        ((0.1, 0.2), (-0.2, -0.1), "mixed"),  # a trade
        ((-0.2, -0.1), (-0.01, 0.005), "worse"),
        ((-0.01, 0.01), (-0.005, 0.005), "inconclusive"),
    ],
)
def test_better_needs_one_primary_superior_and_the_other_not_inferior(
    speaker: tuple[float, float], content: tuple[float, float], word: str
) -> None:
    found = decide(made_up(*speaker), 0.01, content=made_up(*content), content_p=0.01, content_margin=0.01)
    assert found.word == word


def test_a_difference_that_is_not_significant_after_correction_is_inconclusive() -> None:
    assert decide(made_up(0.1, 0.2), 0.06).word == "inconclusive"


def test_too_few_speakers_or_seeds_prevent_a_verdict_and_are_named() -> None:
    missing = shortfalls(targets=5, seeds=1, ok=0.9)
    assert missing == (
        "needs ≥ 8 target speakers, here 5",
        "needs ≥ 2 seeds, here 1",
        "needs ≥ 95% of the conversions measured, here 90%",
    )
    assert decide(made_up(0.1, 0.2), 0.001, missing=missing).word == "no verdict"


def test_eight_speakers_are_too_few_for_twenty_eight_comparisons() -> None:
    assert shortfalls(targets=8, seeds=1, ok=1, short_of_seeds="alpha and beta") == (
        "needs ≥ 2 seeds of alpha and beta, here 1",
    )
    assert shortfalls(targets=8, seeds=3, ok=1, comparisons=6) == ()
    (text,) = shortfalls(targets=8, seeds=3, ok=1, comparisons=28)
    assert text == "needs ≥ 11 target speakers for 28 comparisons, here 8"
    assert shortfalls(targets=11, seeds=3, ok=1, comparisons=28) == ()


def test_an_arm_within_decoding_noise_is_dead_and_an_unmeasured_one_is_not() -> None:
    assert is_dead(change=0.002, noise_floor=0.01)
    assert not is_dead(change=0.05, noise_floor=0.01)
    assert not is_dead(change=math.nan, noise_floor=0.01)
    assert not is_dead(change=0.0, noise_floor=math.nan)


@given(
    st.tuples(*[st.floats(-0.2, 0.2)] * 4),
    st.sampled_from([0.01, 0.2]),
    st.sampled_from([0.01, 0.2]),
    st.sampled_from([0.01, 0.05]),
    st.booleans(),
)
def test_exchanging_the_arms_reverses_the_verdict(
    ends: tuple[float, float, float, float], p: float, content_p: float, margin: float, judged: bool
) -> None:
    speaker, content = made_up(*sorted(ends[:2])), made_up(*sorted(ends[2:]))
    turned = made_up(-speaker.high, -speaker.low), made_up(-content.high, -content.low)
    opposite = {"better": "worse", "worse": "better", "higher": "lower", "lower": "higher"}
    found, other = (
        decide(s, p, content=c if judged else None, content_p=content_p, content_margin=margin).word
        for s, c in ((speaker, content), turned)
    )
    assert other == opposite.get(found, found)


def test_two_seeds_are_too_few_to_show_a_difference_in_one_measure_alone() -> None:
    two = replace(made_up(0.1, 0.2), seeds=2)
    found = decide(two, 0.001, content=made_up(-0.05, 0.01), content_p=0.001, content_margin=0.01)
    assert found.word == "inconclusive"


def test_two_arms_that_are_each_slightly_ahead_in_one_measure_are_mixed() -> None:
    found = decide(made_up(0.01, 0.045), 0.001, content=made_up(-0.045, -0.01), content_p=0.001, content_margin=0.05)
    assert found.word == "mixed"


def test_more_of_everything_makes_a_smaller_effect_detectable() -> None:
    def effect(seeds: int, targets: int, sources: int, pairs: int) -> float:
        return planned_detectable_effect(
            StudySize(seeds, targets, sources, pairs), StandardDeviations(0.02, 0.05, 0.03, 0.1)
        )

    small, large = effect(2, 8, 16, 32), effect(5, 20, 40, 80)
    assert 0 < large < small


def test_known_gains_come_out_in_order_with_the_close_pair_inconclusive(simulated: Path) -> None:
    _, numbers, text = reported(simulated)
    words = {(c.a, c.b): c.decision.word for c in numbers.comparisons}
    assert words == {
        ("made_up_a", "made_up_b"): "lower",
        ("made_up_a", "made_up_c"): "lower",
        ("made_up_b", "made_up_c"): "inconclusive",
    }
    assert text.headline == (
        "made_up_b and made_up_c have higher speaker similarity than made_up_a. Between these two: inconclusive."
    )
    assert any("Content has not been judged" in line for line in text.cautions)
    assert "better" not in text.headline + " ".join(text.findings)


def test_equal_arms_are_inconclusive(tmp_path: Path) -> None:
    *_, text = reported(write_study(tmp_path / "s", gains={"x": 0.2, "y": 0.2}, samples=0))
    assert text.kind == "inconclusive"
    assert text.headline.startswith("Inconclusive")


def test_a_study_that_is_too_small_for_any_difference_is_called_too_small(tmp_path: Path) -> None:
    _, numbers, text = reported(write_study(tmp_path / "s", gains={"x": 0.2, "y": 0.2}, seed_spread=0.3, samples=0))
    assert numbers.comparisons[0].detectable > 1
    assert "This study is too small: its minimum detectable effect exceeds the full range." in text.next_step


def test_five_speakers_and_one_seed_give_no_verdict_and_the_reasons(tmp_path: Path) -> None:
    *_, text = reported(write_study(tmp_path / "s", seeds=1, targets=5, samples=0))
    assert text.headline == "No verdict: needs ≥ 8 target speakers, here 5; needs ≥ 2 seeds, here 1."


@pytest.mark.parametrize("lost", ["floor", "ceiling"])
def test_without_floor_or_ceiling_there_is_no_verdict(tmp_path: Path, lost: str) -> None:
    kept = tuple(c for c in ("source", "floor", "ceiling") if c != lost)
    _, numbers, text = reported(write_study(tmp_path / "s", controls=kept, samples=0))
    assert text.headline == f"No verdict: needs the {lost} control's SECS."
    assert numbers.score == "secs"


def test_a_judge_of_the_conditioning_encoders_family_is_refused(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s", samples=0)
    for path in folder.glob("*/*/result.json"):
        result = json.loads(path.read_text())
        result["judges"][0]["family"] = "pretend_lstm"
        path.write_text(json.dumps(result))
    assert "judge of another family" in reported(folder)[2].headline


def test_an_arm_that_has_learned_nothing_is_called_dead(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s", gains={"asleep": 0.0, "awake": 0.3}, samples=0, noise_floor=0.04)
    _, numbers, text = reported(folder)
    assert numbers.dead == ("asleep",)
    assert any(line.startswith("asleep is dead") for line in text.cautions)


def test_of_arms_that_do_not_convert_none_is_kept(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s", gains={"x": 0.0, "y": 0.0}, samples=0)
    assert reported(folder)[2].next_step.startswith("No arm is shown to convert to the target more than to another")


def test_a_single_arm_has_a_position_but_no_comparison(tmp_path: Path) -> None:
    *_, text = reported(write_study(tmp_path / "none", gains={"only": 0.0}, samples=0))
    assert text.next_step.startswith("It is not shown to convert to the target more than to another speaker")
    *_, text = reported(write_study(tmp_path / "s", gains={"only": 0.2}, samples=0))
    assert text.kind == "single"
    assert "only closes" in text.size


def test_numbers_are_written_with_a_true_minus_sign_and_without_a_signed_zero() -> None:
    assert number(-0.256) == "−0.26"
    assert number(-0.001) == "0.00"
    assert number(math.nan) == "—"
    assert number(None) == "—"


def test_the_terminal_summary_is_short_plain_text(simulated: Path) -> None:
    text = summary(simulated)
    compared, result, step = text.splitlines()[:3]
    assert compared == (
        "3 arms with 2 seeds were compared in speaker similarity (judge: pretend_judge) on 40 conversions to 10 target "
        "speakers."
    )
    assert result.startswith("made_up_b and made_up_c have higher")
    assert "made_up_b is ahead of made_up_a by +0." in result
    assert step.startswith("Next: Drop made_up_a. ")
    assert "made_up_a  0.09" in text
    assert "(ceiling)" in text
    assert max(map(len, text.split("\n- ")[0].splitlines()[3:])) < 120


def test_a_system_that_changes_the_audio_and_ignores_its_embedding_is_dead(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s", gains={"average": 0.2, "awake": 0.3}, samples=0)
    for path in folder.glob("average/*/result.json"):
        result = json.loads(path.read_text())
        for item in result["utterances"]:
            item["metrics"] |= {"secs_other": item["metrics"]["secs"], "specificity": 0.0}
        path.write_text(json.dumps(result))
    assert reported(folder)[1].dead == ("average",)


def test_cyclic_verdicts_get_a_headline(tmp_path: Path) -> None:
    _, numbers, _ = reported(write_study(tmp_path / "s", gains={"a": 0.1, "b": 0.3, "c": 0.5}, samples=0))
    words: dict[tuple[str, str], Word] = {("a", "b"): "higher", ("a", "c"): "lower", ("b", "c"): "higher"}
    turned = [replace(c, decision=Decision(words[c.a, c.b])) for c in numbers.comparisons]
    headline = _headline(replace(numbers, comparisons=tuple(turned)))
    assert headline.startswith("Speaker similarity: ")
    assert all(f"{x} is higher than {y}" in headline for x, y in ("ab", "bc", "ca"))


def test_arms_without_a_common_seed_get_no_verdict(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s", gains={"a": 0.1, "b": 0.3}, samples=0)
    for path in folder.glob("b/*/result.json"):
        result = json.loads(path.read_text())
        path.write_text(json.dumps(result | {"seed": result["seed"] + 5}))
    assert reported(folder)[2].headline == "No verdict: needs a seed that both arms have."


def _changed(folder: Path, pattern: str, change: Callable[[dict[str, Any]], None]) -> None:
    for path in sorted(folder.glob(pattern)):
        result = json.loads(path.read_text())
        change(result)
        path.write_text(json.dumps(result))


def test_a_metric_that_some_runs_lack_is_counted_only_where_it_was_measured(tmp_path: Path) -> None:
    write_study(tmp_path, gains={"a": 0.1, "b": 0.2}, samples=0)

    def older(result: dict[str, Any]) -> None:
        del result["metrics"]["stoi"]
        for row in result["utterances"]:
            del row["metrics"]["stoi"]

    _changed(tmp_path, "a/seed0/result.json", older)
    _changed(tmp_path, "b/seed*/result.json", older)
    _, numbers, _ = reported(tmp_path)
    n_ok, n = numbers.ok["a", "stoi"]
    assert n_ok == n == numbers.pairs
    assert ("b", "stoi") not in numbers.ok


def _read_by(version: str, rates: dict[str, float]) -> Callable[[dict[str, Any]], None]:
    """Adds word errors to a result, as of a recogniser: the arm's rate, and a little noise."""

    def add(result: dict[str, Any]) -> None:
        rate, rng = rates.get(result["arm"], 0.3), np.random.default_rng(result["seed"])
        for row in result["utterances"]:
            row["metrics"]["wer"] = rate + float(rng.normal(0, 0.03))
        n = len(result["utterances"])
        result["metrics"]["wer"] = {"mean": rate, "n_ok": n, "n": n, "unit": "share", "direction": "down",
                                    "role": "content", "margin": 0.05, "version": version}  # fmt: skip

    return add


def _add_content(folder: Path, rates: dict[str, float]) -> None:
    other = folder / "controls" / "mismatched"
    shutil.copytree(folder / "controls" / "floor", other)
    _changed(other, "result.json", lambda result: result.update(arm="mismatched"))
    for pattern in ("*/seed*/result.json", "controls/*/result.json"):
        _changed(folder, pattern, _read_by("reader 1", {"floor": 0.2, "mismatched": 0.9, **rates}))


def test_arms_that_are_each_ahead_in_one_measure_are_mixed_and_the_reader_chooses(tmp_path: Path) -> None:
    write_study(tmp_path, gains={"a": 0.05, "b": 0.3}, seeds=3, samples=0)
    _add_content(tmp_path, {"a": 0.21, "b": 0.40})
    _, numbers, text = reported(tmp_path)
    (pair,) = numbers.comparisons
    assert (pair.decision.word, pair.more_similar, pair.fewer_errors) == ("mixed", "b", "a")
    assert text.kind == "difference"
    assert text.headline == "a has fewer content errors than b; b has higher speaker similarity than a."
    assert text.size.startswith("a against b: −19")
    assert text.next_step == "b has higher speaker similarity and more content errors: choose by what you need."


def test_of_many_mixed_pairs_the_leaders_in_each_measure_are_named(tmp_path: Path) -> None:
    write_study(tmp_path, gains={"a": 0.05, "b": 0.05, "c": 0.3, "d": 0.3}, seeds=3, samples=0)
    _add_content(tmp_path, {"a": 0.21, "b": 0.21, "c": 0.40, "d": 0.40})
    _, numbers, text = reported(tmp_path)
    assert sum(c.decision.word == "mixed" for c in numbers.comparisons) == 4
    kept, similar = (next(arm for arm in numbers.ranked if arm in pair) for pair in ("ab", "cd"))
    assert text.headline == (
        f"{kept} has fewer content errors than 2 other arms; {similar} has higher speaker similarity than 2 other arms."
    )
    assert text.size.startswith(f"{kept} against {similar}: −19")
    assert text.size.count("points of content error") == 1


def test_a_difference_in_content_alone_is_told_and_the_other_measure_is_called_open(tmp_path: Path) -> None:
    write_study(tmp_path, gains={"a": 0.1, "b": 0.1, "c": 0.12}, seeds=3, samples=0, seed_spread=0.06)
    _add_content(tmp_path, {"a": 0.21, "b": 0.21, "c": 0.40})
    _, numbers, text = reported(tmp_path)
    words = {(c.a, c.b): c.decision.word for c in numbers.comparisons}
    assert words == {("a", "b"): "inconclusive", ("a", "c"): "mixed", ("b", "c"): "mixed"}
    assert {c.more_similar for c in numbers.comparisons} == {None}
    first, second = (arm for arm in numbers.ranked if arm != "c")
    assert text.headline == (
        f"{first} and {second} have fewer content errors than c; no difference in speaker similarity is shown."
    )
    assert "[" in text.size
    assert "normalised SECS" in text.size
    if numbers.ranked[0] == "c":
        assert text.next_step.startswith(f"Keep {first} if content is more important to you. ")


def test_content_by_several_versions_of_a_recogniser_gets_no_verdict(tmp_path: Path) -> None:
    write_study(tmp_path, gains={"a": 0.1, "b": 0.2}, samples=0)
    _add_content(tmp_path, {})
    assert reported(tmp_path)[1].content is not None
    assert not reported(tmp_path)[1].obstacles
    _changed(tmp_path, "b/seed1/result.json", _read_by("reader 2", {}))
    _, _, verdict = reported(tmp_path)
    assert verdict.headline.startswith("No verdict")
    assert any("reader 1 and reader 2" in line for line in [verdict.headline, *verdict.missing])


def test_what_would_decide_a_pair_is_found_in_four_of_five_studies_of_that_size() -> None:
    sds = StandardDeviations(0.01 / largest_variance(3, 3) ** 0.5, 0.1, 0.0, 0.0)  # the estimate is an upper bound
    parts = ((0.01**2 / 3, 4.0), (sds.target**2 / 12, 11.0))
    e = replace(made_up(-0.1, 0.3), mean=0.05, seeds=3, targets=12, spread=Spread(parts))
    ((seeds, targets),) = needed_sizes(e, comparisons=3)
    assert seeds == 3, "more seeds alone are not enough: the target speakers differ more"
    size = StudySize(3, targets, 1, targets, 3)
    assert planned_detectable_effect(size, sds, comparisons=3, power=0.8) <= 0.05
    assert planned_detectable_effect(replace(size, targets=targets - 2), sds, comparisons=3, power=0.8) > 0.05
    assert needed_sizes(replace(e, mean=0.0)) == ()
    wild = replace(e, spread=Spread(((0.03**2, 4.0), parts[1])))
    ((more, larger),) = needed_sizes(wild, comparisons=3)
    assert more > 3, "neither is enough alone"
    assert larger > 12


def scored(rng: np.random.Generator, gain: float, further: float) -> ArmScores:
    speaker, by_other = (g + rng.normal(0, 0.02, (3, 40)) for g in (gain, further))
    return ArmScores([0, 1, 2], speaker, further={"other_secs": by_other})


@pytest.mark.parametrize(("further", "word"), [(0.2, "lower"), (-0.2, "inconclusive")])
def test_a_verdict_needs_the_same_sign_from_every_judge_of_the_speaker(further: float, word: str) -> None:
    rng = np.random.default_rng(0)
    arms = {"a": scored(rng, 0.0, 0.0), "b": scored(rng, 0.3, further)}
    (found,) = compare(arms, np.arange(40) % 20, np.arange(40))
    assert found.p_adjusted < 0.05
    assert found.decision.word == word
    assert found.judges_agree == (word == "lower")
    assert found.above < 0.001, "the probability that a is above b"


OTHER = {"name": "other", "family": "pretend_cnn", "digest": "99" * 32,
         "calibration": {"threshold": 0.2, "eer": 0.25, "splits": ["dev"]}}  # fmt: skip


def judged_again(sign: float) -> Callable[[dict[str, Any]], None]:
    """Adds a further judge with the cubed score of the first, or its opposite."""

    def add(result: dict[str, Any]) -> None:
        for row in result["utterances"]:
            row["metrics"]["other_secs"] = sign * row["metrics"]["secs"] ** 3
        n = len(result["utterances"])
        result["metrics"]["other_secs"] = {"mean": 0.1, "n_ok": n, "n": n, "direction": "up", "role": "speaker"}
        result["judges"] = [result["judges"][0], OTHER]

    return add


def test_the_agreement_of_the_judges_is_reported(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s", gains={"a": 0.1, "b": 0.3}, samples=0)
    for pattern in ("*/seed*/result.json", "controls/*/result.json"):
        _changed(folder, pattern, judged_again(1.0))
    study, numbers, text = reported(folder)
    assert numbers.agreement == {"other": Agreement(pytest.approx(1.0), pytest.approx(1.0))}
    assert text.headline == "b has higher speaker similarity than a."
    assert text.next_step == "Keep b."
    assert "(judge: pretend_judge and other)" in text.compared
    assert any("other 1.00 over conversions (Spearman), 1.00 over arms (Kendall)" in line for line in text.cautions)
    assert any("equal error rate): other (25 %)" in line for line in text.cautions)
    tables = all_tables(study, numbers)
    assert [cell.text for cell in tables["judges"].rows[1].cells] == ["other", "25.0", "0.200", "1.00", "1.00"]
    floor, ceiling = (numbers.controls[end, "other_secs"].mean for end in ("floor", "ceiling"))
    for arm in ("a", "b"):
        expected = (numbers.arms[arm, "other_secs"].mean - floor) / (ceiling - floor)
        assert numbers.arms[arm, "other_normalised"].mean == pytest.approx(expected)
        assert 0 <= numbers.arms[arm, "other_accepted"].mean <= 1
    assert [c.label for c in tables["speaker_other"].columns[1:5]] == ["Normalised SECS", "SECS", "Accepted", "EER"]
    assert "Speaker similarity (further judge other)" in build(folder).read_text()
    _changed(folder, "*/seed*/result.json", judged_again(-1.0))
    _, numbers, text = reported(folder)
    assert numbers.agreement == {"other": Agreement(pytest.approx(-1.0), pytest.approx(-1.0))}
    assert text.headline.startswith("Inconclusive")
    assert "the judges of the speaker disagree" in text.next_step
    assert any("disagree on which arm is ahead for a and b" in line for line in text.cautions)


@pytest.mark.parametrize("pattern", ["b/seed1/result.json", "controls/floor/result.json"])
def test_a_study_judged_by_different_judges_gets_no_verdict(tmp_path: Path, pattern: str) -> None:
    folder = write_study(tmp_path / "s", gains={"a": 0.1, "b": 0.3}, samples=0)
    _changed(folder, pattern, lambda result: result.update(judges=[{**OTHER, "family": "pretend_tdnn"}]))
    verdict = reported(folder)[2]
    assert verdict.headline.startswith("No verdict")
    said = " ".join([verdict.headline, *verdict.missing])
    assert "judged by the same judges, here by pretend_judge (b2b2b2b2) and by other (99999999)" in said


def test_runs_of_different_versions_are_named_and_missing_metrics_are_grouped_by_reason(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s", gains={"a": 0.1, "b": 0.3}, samples=0)
    reasons = {"wer": "no Whisper", "cer": "no Whisper", "pesq": "needs pesq", "insertions": "no Whisper"}
    _changed(folder, "*/seed*/result.json", lambda result: result.update(missing=reasons))
    _changed(folder, "b/seed1/result.json", lambda result: result["versions"].update({"snac-conditioning": "0.1"}))
    cautions = reported(folder)[2].cautions
    assert "Not measured: cer, insertions and wer (no Whisper); pesq (needs pesq)." in cautions
    assert (
        "The results were evaluated by different versions of snac-conditioning. 0.1: b, seed 1; the others: 0.0.0."
    ) in cautions
