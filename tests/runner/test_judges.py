"""Several judges of the speaker in one study, recognisers of different versions, and speech of unusual length."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import save_file
from small_study import PHASES, SMALL, Bench, RecordedConsole, arm, result, runner

from snac_core import UserError, discover
from snac_core.speakers.simple import Simple
from snac_runner.config import StudySettings, compose
from snac_runner.controls import check_versions, run_controls, wanted_metrics
from snac_runner.evaluate import systems
from snac_runner.evaluate.conversions import Conversions, Item
from snac_runner.evaluate.judges import load_judges
from snac_runner.evaluate.metrics import BY_EVERY_JUDGE
from snac_runner.evaluate.scoring import score
from snac_runner.resources import StudyResources
from snac_runner.run_folder import stored_run
from snac_runner.study import check_study

TWIN = """
from snac_core import hookimpl
from snac_core.speakers.ge2e import GE2E


class Twin(GE2E):
    name, family = "twin", "another"


@hookimpl
def register_speaker_encoders(register):
    register(Twin)
"""


@pytest.fixture(scope="module")
def two(bench: Bench) -> StudyResources:
    """The small study by two judges."""
    resources = bench.resources(bench.study(judges=("ge2e", "ecapa_tiny")))
    for part in ("judges", "dev", "test"):
        vars(resources).pop(part, None)
    return resources


def test_each_judge_measures_what_it_would_measure_alone(bench: Bench, two: StudyResources) -> None:
    metrics, _ = wanted_metrics(two)
    of_second = {name for name in metrics if name.startswith("ecapa_tiny_")}
    assert of_second == {f"ecapa_tiny_{metric.name}" for metric in BY_EVERY_JUDGE}
    assert [name for name, metric in metrics.items() if metric.role == "speaker"] == ["ecapa_tiny_secs"]
    floor = systems.floor(two.codec)
    both = score(floor, two.test, {n: m for n, m in metrics.items() if n in of_second | {"secs", "top1"}})
    for place, prefix in enumerate(("", "ecapa_tiny_")):
        alone = bench.resources(bench.study())
        vars(alone)["judges"] = (two.judges[place],)
        vars(alone).pop("test", None)
        single = wanted_metrics(alone).metrics
        rows = score(floor, alone.test, {name: single[name] for name in ("secs", "top1")}).utterances
        for one, row in zip(both.utterances, rows, strict=True):
            for name in ("secs", "top1"):
                assert one["metrics"][prefix + name] == row["metrics"][name]
    item = two.test.items[0]
    with torch.no_grad():
        output = two.judges[1](floor(two.test, item).converted[None, None], two.test.sample_rate)[0]
    wanted = float(output @ two.test.references["ecapa_tiny"][item.pair.target])
    assert both.utterances[0]["metrics"]["ecapa_tiny_secs"] == pytest.approx(wanted, abs=1e-5)
    assert both.pooled["ecapa_tiny_secs"]["version"].startswith("ecapa_tiny ")


def test_each_judge_is_calibrated_on_the_dev_speakers_and_its_figures_are_in_the_results(
    two: StudyResources, tmp_path: Path
) -> None:
    run_controls(tmp_path, two)
    judges = result(tmp_path / "controls" / "floor")["judges"]
    assert [judge["name"] for judge in judges] == ["ge2e", "ecapa_tiny"]
    for judge in judges:
        assert 0 <= judge["calibration"]["eer"] <= 1
        assert judge["calibration"]["splits"] == ["dev"]
        assert judge["calibration"]["threshold"] == two.calibrations[judge["name"]].threshold
    assert judges[0]["calibration"]["threshold"] != judges[1]["calibration"]["threshold"]
    (tmp_path / "study.json").write_text('{"schema": 2}')
    vars(two)["judges"] = two.judges[:1]
    with pytest.raises(UserError, match="study judged by ge2e, ecapa_tiny, and this one is judged by ge2e; give a new"):
        check_study(tmp_path, [arm(PHASES[1])], [], two)


def test_the_command_line_takes_several_judges_and_the_report_shows_their_agreement(
    bench: Bench, tmp_path: Path
) -> None:
    out = tmp_path / "study"
    options = bench.options(steps=1, judges=("ge2e", "ecapa_tiny"))
    assert runner("ablate", "--strategies", ",".join(PHASES[1:]), "--out", out, *options) == 0
    assert [judge["name"] for judge in result(out / PHASES[1] / "seed0")["judges"]] == ["ge2e", "ecapa_tiny"]
    page = (out / "report.html").read_text()
    assert "Judges of the speaker" in page
    assert "Speaker similarity (further judge ecapa_tiny)" in page
    numbers = json.loads((out / "report.json").read_text())["arms"][PHASES[1]]["metrics"]
    assert {"secs", "eer", "ecapa_tiny_secs", "ecapa_tiny_gap", "ecapa_tiny_eer"} <= numbers.keys()


def test_a_judge_can_be_a_file_of_weights(tmp_path: Path) -> None:
    other = Simple()
    with torch.no_grad():
        for tensor in other.state_dict().values():
            if tensor.is_floating_point():
                tensor.mul_(1.1)
    save_file(other.state_dict(), tmp_path / "trained.safetensors")
    (judge,) = load_judges([f"simple: {tmp_path / 'trained.safetensors'}"], discover())
    assert torch.equal(judge.state_dict()["out.weight"], other.state_dict()["out.weight"])
    assert judge.digest != Simple().digest


@pytest.mark.parametrize(
    ("judges", "said"),
    [
        (("ge2e", "simple"), r"judge 'simple' \(family simple_cnn\) is of the same family as the conditioning encoder"),
        (("ge2e", "ecapa_tin"), "unknown speaker encoder 'ecapa_tin'; did you mean 'ecapa_tiny'"),
        (("ge2e:/none.safetensors",), "no file /none.safetensors to load the weights of speaker encoder 'ge2e' from"),
        (("ge2e", "eres2netv2"), "no weights of speaker encoder 'eres2netv2'"),
        (("ge2e", "twin"), r"judges 'ge2e' and 'twin' score real trials of speech alike \(correlation 1.0000"),
    ],
)
def test_judges_that_show_nothing_are_refused(bench: Bench, tmp_path: Path, judges: tuple[str, ...], said: str) -> None:
    (tmp_path / "twin.py").write_text(TWIN)
    resources = bench.resources(bench.study(judges=judges), [tmp_path / "twin.py"])
    vars(resources).pop("judges")
    with pytest.raises(UserError, match=said):
        _ = resources.judges


def test_the_same_judge_twice_and_the_old_setting_are_refused() -> None:
    arms = [{"strategies": ["a"]}]
    with pytest.raises(UserError, match="judge 'ge2e' is listed twice; every further judge is another encoder"):
        compose({"judges": ["ge2e", "ge2e:other.safetensors"]}, arms, "study.toml")
    with pytest.raises(UserError, match="'judge' is now 'judges'"):
        compose({"judge": "ge2e"}, arms, "study.toml")


def test_a_run_of_before_there_were_several_judges_is_still_read(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / PHASES[1] / "seed0", tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    (config["study"]["judge"],) = config["study"].pop("judges")
    config["study"]["judge"] = "ecapa_tiny"
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    assert stored_run(tmp_path / "run")[0].judges == ("ecapa_tiny",)


def test_files_are_scored_by_each_judge(voices: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    files = ("--source", voices[0], "--converted", voices[1], "--target", voices[1])
    assert runner("evaluate", *files, "--judge", "ge2e,ecapa_tiny") == 0
    shown = capsys.readouterr().out
    assert "judged by ge2e, ecapa_tiny" in shown
    for judge in ("ge2e", "ecapa_tiny"):
        assert f"SECS ({judge})" in shown
    assert "Phone error rate (" not in shown


# ------------------------------------------------------------------ recognisers and speech


def test_a_study_whose_controls_another_recogniser_judged_is_refused(bench: Bench, tmp_path: Path) -> None:
    resources = bench.resources(bench.study())
    metrics, _ = wanted_metrics(resources)
    place = tmp_path / "controls" / "floor"
    place.mkdir(parents=True)
    judged: dict[str, Any] = {"per": {"role": "content", "version": metrics["per"].version}}

    def check(**changes: Any) -> None:
        (place / "result.json").write_text(json.dumps({"metrics": judged}))
        check_versions(tmp_path, metrics, bench.resources(bench.study(**changes)))

    check()
    judged["wer"] = {"role": "content", "version": "whisper 1"}
    with pytest.raises(UserError, match="wer by 'whisper 1', and here it is not measured; use the same recogniser"):
        check()
    check(exclude_metrics=("wer",))
    del judged["wer"]
    judged["per"]["version"] = "phones 0"
    with pytest.raises(UserError, match=r"per by 'phones 0', and here it is by 'phones [0-9a-f]+'"):
        check()


def test_speech_of_a_fifth_of_a_second_and_of_two_minutes_and_an_empty_text(bench: Bench, tmp_path: Path) -> None:
    speech = shutil.copytree(bench.speech, tmp_path / "speech")
    manifest = speech / "manifest.jsonl"
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    speaker = next(line["speaker"] for line in lines if line["split"] == "test")
    own = [line for line in lines if line["speaker"] == speaker]
    voice = soundfile.read(speech / own[0]["path"], dtype="float32")[0]
    soundfile.write(speech / own[0]["path"], voice[2000:5200], 16000)
    for line in own[1:]:  # whichever of them is a source
        once = soundfile.read(speech / line["path"], dtype="float32")[0]
        soundfile.write(speech / line["path"], np.tile(once, 120 * 16000 // len(once) + 1)[: 120 * 16000], 16000)
        line["text"] = ""
    for line in own:
        del line["seconds"], line["digest"]
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    said: list[str] = []
    settings = {**SMALL, "data": str(speech), "base": str(bench.base), "pair_seconds": 60}
    del settings["test_pairs"]  # as many as there are
    resources = StudyResources(StudySettings(**settings), discover(), console=RecordedConsole(said))
    pieces = [utterance.seconds for utterance in resources.corpus.of_speaker(speaker)]  # two minutes are cut at pauses
    assert sum(pieces) == pytest.approx(120 * len(own[1:]), abs=0.01)
    assert 8 <= min(pieces) <= max(pieces) <= 24
    assert any(
        f"{own[0]['path']}: is too short" in line and "0.200 s; at least 0.5 s are needed" in line for line in said
    )
    sources = [item for item in resources.test.items if item.pair.source_speaker == speaker]
    assert sources
    assert all(8 <= item.audio.shape[-1] / resources.test.sample_rate <= 24 for item in sources)
    assert all(item.pair.text is None for item in sources)
    metrics, _ = wanted_metrics(resources)
    resources.test.items = [sources[0], next(item for item in resources.test.items if item not in sources)]
    for system in (systems.floor(resources.codec), systems.source()):
        scores = score(system, resources.test, {name: metrics[name] for name in ("secs", "per", "gap")})
        assert all(scores.pooled[name]["n_ok"] == 2 for name in scores.pooled)
    assert scores.pooled["per"]["mean"] < 0.7
    assert (
        scores.utterances[0]["metrics"]["per"] == 0
    )  # without a text, the recogniser's own transcript is the reference


def test_an_output_of_a_fifth_of_a_second_is_judged(bench: Bench) -> None:
    resources = bench.resources(bench.study())
    metrics, _ = wanted_metrics(resources)

    def stump(conversions: Conversions, item: Item) -> systems.Rendering:
        return systems.Rendering(item.audio[0, : conversions.sample_rate // 5])

    scores = score(stump, resources.test, {name: metrics[name] for name in ("secs", "per", "top1")})
    assert scores.pooled["secs"]["n_ok"] == scores.pooled["per"]["n_ok"] == len(resources.test.items)
    assert -1 < scores.pooled["secs"]["mean"] < 1
    assert scores.pooled["per"]["mean"] > 0.5
