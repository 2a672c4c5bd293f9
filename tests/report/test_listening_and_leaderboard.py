"""Votes become a column, and only compatible studies are compared."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from simulated_study import write_study
from typer.testing import CliRunner

from snac_core.errors import UserError
from snac_runner.cli import app
from snac_runner.evaluate.statistics import equal_error_rate
from snac_runner.report.listening import contents, digest, trials
from snac_runner.report.page import add_votes, build, build_leaderboard
from snac_runner.report.results import read
from snac_runner.report.samples import worst


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change every result of a study."""
    for path in folder.glob("*/*/result.json"):
        found = json.loads(path.read_text())
        change(found)
        path.write_text(json.dumps(found))


def vote_file(folder: Path, favourite: str, path: Path) -> Path:
    """Votes for `favourite` in every question about it, "same" elsewhere."""
    study = read(folder)
    found = trials(study)
    choices = [
        {"trial": t.id, "choice": "a" if t.a == favourite else "b" if t.b == favourite else "same"} for t in found
    ]
    path.write_text(json.dumps({"study": digest(found), "listener": "l", "votes": choices}))
    return path


def test_the_listening_page_contains_no_names_and_every_pair(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s", samples=2, pairs=16)
    build(folder)
    html = (folder / "abx.html").read_text()
    assert "made_up" not in html.replace("Simulated study", "")
    asked = contents(trials(read(folder)))
    assert len(asked["trials"]) == 2 * 3  # two conversions, three pairs of arms
    assert "http://" not in html
    assert "https://" not in html


def test_which_arm_is_a_does_not_depend_on_the_order_of_the_arms(tmp_path: Path) -> None:
    found = trials(read(write_study(tmp_path / "s", samples=12, pairs=16)))
    first = [trial.a < trial.b for trial in found]
    assert 0.25 < sum(first) / len(first) < 0.75


def test_votes_become_a_column(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s", samples=3, pairs=16)
    file = vote_file(folder, "made_up_b", tmp_path / "votes.json")
    found = CliRunner().invoke(app, ["report", str(folder), "--votes", str(file)])
    assert found.exit_code == 0, found.output
    arms = json.loads((folder / "report.json").read_text())["arms"]
    assert arms["made_up_b"]["metrics"]["preferred"]["mean"] == 1.0
    assert arms["made_up_a"]["metrics"]["preferred"]["mean"] == 0.25  # lost half of its questions, "same" in the others
    low = arms["made_up_b"]["metrics"]["preferred"]["low"]
    assert low == pytest.approx(6 / (6 + 1.96**2), abs=1e-3)  # Wilson's lower end of 6 out of 6
    before = (folder / "report.html").read_bytes()
    add_votes(folder, file)  # the same votes again are the same file
    build(folder)
    assert (folder / "report.html").read_bytes() == before


def test_votes_on_other_questions_are_refused(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s", samples=1, pairs=16)
    other = write_study(tmp_path / "t", samples=2, pairs=16)
    with pytest.raises(UserError, match="another study's questions"):
        add_votes(folder, vote_file(other, "made_up_a", tmp_path / "votes.json"))
    (tmp_path / "bad.json").write_text("[1]")
    with pytest.raises(UserError, match="not a file of votes"):
        add_votes(folder, tmp_path / "bad.json")


def test_studies_of_the_same_conversions_become_one_table(tmp_path: Path) -> None:
    one = write_study(tmp_path / "one", gains={"x": 0.1, "y": 0.3}, samples=0)
    two = write_study(tmp_path / "two", gains={"x": 0.2}, samples=0)
    page, text, refused = build_leaderboard([one, two], tmp_path / "board")
    assert page == tmp_path / "board" / "report.html"
    assert refused == []
    board = json.loads((tmp_path / "board" / "report.json").read_text())
    alone = json.loads(build(one).with_suffix(".json").read_text())
    assert len(board["ranking"]) == 3
    assert board["ranking"][0].endswith(": y")
    mean = next(v for k, v in board["arms"].items() if k.endswith("one: y"))["metrics"]["secs"]["mean"]
    assert mean == pytest.approx(alone["arms"]["y"]["metrics"]["secs"]["mean"])
    assert "y" in text


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda r: r["pairs"].update(digest="99" * 32), "other conversions"),
        (lambda r: r["judges"][0].update(digest="99" * 32), "another judge"),
        (lambda r: r["digests"].update(base="99" * 32), "another base"),
    ],
)
def test_studies_that_cannot_be_compared_are_refused_with_the_reason(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], reason: str
) -> None:
    one = write_study(tmp_path / "one", samples=0)
    other = write_study(tmp_path / "other", samples=0)
    edit(other, change)
    with pytest.raises(UserError, match=reason):
        build_leaderboard([one, other], tmp_path / "board")
    third = shutil.copytree(one, tmp_path / "third")
    _, _, refused = build_leaderboard([one, other, third], tmp_path / "board")
    assert len(refused) == 1
    assert reason in refused[0]


def test_another_system_is_a_row_and_a_point_but_not_in_the_verdict(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s", samples=1, pairs=16)
    before = json.loads(build(folder).with_suffix(".json").read_text())
    shutil.copytree(folder / "made_up_c" / "seed0", folder / "systems" / "other_system")
    path = folder / "systems" / "other_system" / "result.json"
    found = json.loads(path.read_text())
    found.update(kind="system", arm="other_system", seed=None)
    path.write_text(json.dumps(found))
    html = build(folder).read_text()
    after = json.loads((folder / "report.json").read_text())
    assert after["ranking"] == before["ranking"]
    assert after["comparisons"] == before["comparisons"]
    assert math.isfinite(after["controls"]["other_system"]["normalised"]["mean"])
    assert html.count(">other_system<") >= 2  # a point in the plots, a row in the tables


def test_the_worst_conversions_are_shown_with_source_and_target(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s", samples=1, pairs=16)
    run = folder / "made_up_a" / "seed0"
    rows = json.loads((run / "result.json").read_text())["utterances"]
    low = sorted(rows, key=lambda row: row["metrics"]["secs"])[:2]
    for row in low:
        for part in ("converted", "source", "target"):
            place = run / "samples" / "worst" / f"{row['pair']}.{part}.wav"
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(run / "samples" / "p000.wav", place)
    found = worst(read(folder))
    assert [group.pair for group in found] == [f"{row['pair']} by made_up_a" for row in low]
    assert [clip.label for clip in found[0].clips] == ["source", "target", "made_up_a"]
    assert 'id="worst"' in build(folder).read_text()


def test_equal_error_rate_of_apart_same_and_swapped_scores() -> None:
    low, high = np.linspace(0, 0.4, 50), np.linspace(0.6, 1, 50)
    assert equal_error_rate(high, low)[0] == pytest.approx(0, abs=0.02)
    assert equal_error_rate(low, low)[0] == pytest.approx(0.5, abs=0.02)
    assert equal_error_rate(low, high)[0] == pytest.approx(1, abs=0.02)
