"""Other systems are evaluated on a study's conversions, and trained runs on other speech."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import soundfile
from safetensors.torch import load_file, save_file
from small_study import PHASES, Bench, RecordedConsole, contents, result, runner

from snac_runner.data.open_corpus import open_corpus
from snac_runner.data.synth import synthesize
from snac_runner.external import study_of_other_speech


@pytest.fixture(scope="module")
def study(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the finished study that may be added to."""
    return shutil.copytree(finished, tmp_path_factory.mktemp("joined") / "study")


@pytest.fixture(scope="module")
def exported(study: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What another system needs."""
    out = tmp_path_factory.mktemp("exported") / "audio"
    assert runner("evaluate", "--pairs", study / "pairs.json", "--export", out) == 0
    return out


def test_a_study_exports_what_another_system_needs(study: Path, exported: Path) -> None:
    pairs = json.loads((study / "pairs.json").read_text())["pairs"]
    listed = list(csv.DictReader((exported / "pairs.csv").read_text().splitlines()))
    assert [(row["pair"], row["target"]) for row in listed] == [(pair["id"], pair["target"]) for pair in pairs]
    for pair in pairs:
        samples, rate = soundfile.read(exported / "source" / f"{pair['id']}.wav")
        assert len(samples) / rate == pytest.approx(pair["source"][2], abs=0.01)
        assert soundfile.info(exported / "reference" / f"{pair['target']}.wav").duration > 0.5
    assert "runner evaluate --audio" in (exported / "README.txt").read_text()


def test_a_returned_system_joins_as_a_column_and_changes_nothing_else(study: Path, exported: Path) -> None:
    arms = {name: contents(study / name) for name in PHASES}
    before = json.loads((study / "report.json").read_text())
    options = ("evaluate", "--audio", exported / "source", "--pairs", study / "pairs.json", "--name", "copy machine")
    assert runner(*options) == 0
    found = result(study / "systems" / "copy machine")
    source = result(study / "controls" / "source")
    assert found["kind"] == "system"
    for row, wanted in zip(found["utterances"], source["utterances"], strict=True):
        assert row["pair"] == wanted["pair"]
        assert row["metrics"]["secs"] == pytest.approx(wanted["metrics"]["secs"], abs=2e-3)  # 16-bit rounding
    after = json.loads((study / "report.json").read_text())
    assert after["controls"]["copy machine"]["secs"]["mean"] == pytest.approx(
        after["controls"]["source"]["secs"]["mean"], abs=2e-3
    )
    assert after["ranking"] == before["ranking"]
    page = (study / "report.html").read_text()
    ranked = page[page.index('id="ranking"') : page.index("</section>", page.index('id="ranking"'))]
    assert "copy machine" in ranked  # beside the arms, which alone are ranked
    assert {name: contents(study / name) for name in PHASES} == arms
    assert runner(*options) == 2  # the name is taken


def test_missing_files_of_a_system_are_named(
    study: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = shutil.copytree(exported / "source", tmp_path / "few")
    next(iter(sorted(few.iterdir()))).unlink()
    assert runner("evaluate", "--audio", few, "--pairs", study / "pairs.json", "--name", "lazy") == 2
    assert "lacks 1 of 2 conversions" in capsys.readouterr().err
    assert not (study / "systems" / "lazy").exists()


def test_a_system_that_returned_nothing_or_a_click_scores_worst_and_is_not_missing(
    study: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    returned = shutil.copytree(exported / "source", tmp_path / "returned")
    nothing, click, *others = sorted(returned.iterdir())
    soundfile.write(nothing, [], 16000)
    for path in others:
        path.write_bytes(b"")
    soundfile.write(click, [0.5] * 160, 16000)
    assert runner("evaluate", "--audio", returned, "--pairs", study / "pairs.json", "--name", "mute") == 0
    found = result(study / "systems" / "mute")
    scores = {row["pair"]: row["metrics"]["secs"] for row in found["utterances"]}
    assert set(scores.values()) == {-1}
    assert found["metrics"]["secs"]["n_ok"] == found["metrics"]["secs"]["n"] == len(scores)
    assert "mute" in (study / "report.html").read_text()
    nothing.write_bytes(b"no audio")
    assert runner("evaluate", "--audio", returned, "--pairs", study / "pairs.json", "--name", "broken") == 2
    assert f"{nothing} cannot be read as audio" in capsys.readouterr().err
    assert not (study / "systems" / "broken").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--pairs", "pairs.json"), "--pairs needs one of"),
        (("--pairs", "nowhere.json", "--audio", "x"), "no list of pairs"),
        (("somewhere",), "no data"),
        (("somewhere", "--data", "nowhere"), "no run at somewhere"),
        (("--pairs", "pairs.json", "--audio", "x", "--edit-scale", "2"), "--edit-scale is for the edits of a run"),
    ],
)
def test_an_incomplete_command_is_refused_in_one_line(
    options: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert runner("evaluate", *options) == 2
    assert said in capsys.readouterr().err


def test_a_trained_adapter_is_evaluated_beside_the_arms(
    bench: Bench, finished: Path, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    adapter, out = finished / PHASES[2] / "seed0", tmp_path / "study"
    command = ["ablate", "--strategies", PHASES[1], "--out", out]
    options = bench.options(steps=2, adapters=[str(adapter)])
    assert runner(*command, *options) == 0
    place = out / "systems" / f"{PHASES[2]} seed0"
    same = [result(folder)["metrics"]["secs"] for folder in (place, adapter)]  # equal weights on equal conversions
    assert same[0]["mean"] == pytest.approx(same[1]["mean"], abs=1e-6)
    assert f"{PHASES[2]} seed0 was not trained in this study" in (out / "report.md").read_text()
    before = contents(out / "systems")
    assert runner(*command, *options) == 0
    assert contents(out / "systems") == before

    other = tmp_path / "other" / PHASES[2] / "seed0"
    shutil.copytree(finished / PHASES[0] / "seed0", other)
    said = refusal(*command, *bench.options(steps=2, adapters=[str(other)]))
    assert "holds the result of other weights" in said
    again = ["ablate", "--strategies", PHASES[1], "--out", tmp_path / "new"]
    assert "is the name of an arm, a control or another adapter" in refusal(
        *again, *bench.options(steps=2, adapters=[str(adapter), str(other)])
    )
    assert "belongs to base 'tiny'" in refusal(*again, *bench.options(steps=2, adapters=["phase6_tiny"]))
    assert not (tmp_path / "new" / PHASES[1]).exists(), "nothing is trained"


@pytest.mark.parametrize("asked", [0, 2, 500])
def test_other_speech_may_have_fewer_conversions_than_the_study_and_a_run_may_have_had_none(
    bench: Bench, asked: int
) -> None:
    study, lines = bench.study(test_pairs=asked, dev_pairs=0, pair_seconds=30.0), []
    console = RecordedConsole(lines)
    found = study_of_other_speech(study, open_corpus(bench.speech), console)
    resources = bench.resources(found)
    assert resources.evaluates
    assert len(resources.test_pairs) == found.test_pairs
    assert found.test_pairs == 2 if asked == 2 else 2 < found.test_pairs < 500
    assert any("of 500 conversions are possible" in line for line in lines) == (asked == 500)


def test_a_trained_run_is_evaluated_on_other_speech(bench: Bench, study: Path, tmp_path: Path) -> None:
    other = synthesize(tmp_path / "speech", 9, 4)
    run = study / PHASES[1] / "seed0"
    before = contents(run)
    out = tmp_path / "elsewhere"
    assert runner("evaluate", run, "--data", other, "--out", out) == 0
    found = result(out)
    assert found["status"] == "success"
    assert found["digests"]["data"] != result(run)["digests"]["data"]
    assert found["digests"]["base"] == result(run)["digests"]["base"]
    assert found["metrics"]["secs"]["n_ok"] == found["pairs"]["n"]
    assert (out / "report.html").is_file()
    assert (out / "controls" / "floor" / "result.json").is_file()
    assert contents(run) == before
    assert runner("evaluate", run, "--data", other, "--out", out) == 0  # judged already: left as it is
    assert result(out) == found
    # nor is a result that of other weights at the same place
    changed = shutil.copytree(run, tmp_path / "run" / "seed0")
    tensors = {name: 2 * tensor for name, tensor in load_file(changed / "model" / "model.safetensors").items()}
    save_file(tensors, changed / "model" / "model.safetensors")
    assert runner("evaluate", changed, "--data", other, "--out", out) == 2
    # without edits the run is the bare codec; another scale is not the result that is there
    assert runner("evaluate", run, "--data", other, "--edit-scale", 0, "--out", out) == 2
    assert runner("evaluate", run, "--data", other, "--edit-scale", 0, "--out", tmp_path / "bare") == 0
    secs, floor = (result(tmp_path / "bare" / place)["metrics"]["secs"]["mean"] for place in ("", "controls/floor"))
    assert secs == pytest.approx(floor, abs=1e-6)
    assert result(tmp_path / "bare")["arm"] == f"{PHASES[1]}, edit scale 0"
