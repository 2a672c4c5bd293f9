"""Folders that an earlier version has written: models open, runs and studies are refused in one sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from small_study import PHASES, Bench, contents, runner

from snac_core.conditioned import ConditionedCodec


def rewrite(path: Path, change: Any) -> None:
    """Change a JSON file."""
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def as_schema_1(study: Path) -> None:
    """Turn a finished study into the format of schema 1, with its names."""

    def config(values: dict[str, Any]) -> None:
        values.pop("schema", None)
        settings = values["study"]
        for new, old in (("extra_metrics", "also"), ("exclude_metrics", "without"), ("targets_per_item", "targets"),
                         ("shuffled_control", "shuffled"), ("speaker_encoder", "teacher")):  # fmt: skip
            settings[old] = settings.pop(new)
        arm = values["arm"]
        for new, old in (("discriminator_lr", "critic_lr"), ("discriminator_grad_clip", "critic_grad_clip"),
                         ("shuffled_speakers", "shuffled")):  # fmt: skip
            arm[old] = arm.pop(new)

    def result(values: dict[str, Any]) -> None:
        values["schema"] = 1
        values["teacher"] = values.pop("speaker_encoder")
        if values["config"]:
            config(values["config"])

    def model(values: dict[str, Any]) -> None:
        for strategy in values["strategies"]:
            strategy["module"] = f"plugins.{strategy['name']}"  # the modules of schema 1

    rewrite(study / "study.json", lambda values: values.pop("schema"))
    for path in study.rglob("result.json"):
        rewrite(path, result)
    for path in study.glob("*/seed*/config.json"):
        rewrite(path, config)
    for path in study.rglob("model/config.json"):
        rewrite(path, model)


@pytest.fixture(scope="module")
def earlier(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of an earlier version."""
    study = shutil.copytree(finished, tmp_path_factory.mktemp("earlier") / "study")
    as_schema_1(study)
    return study


def test_an_earlier_study_is_refused_in_one_sentence_and_left_alone(
    bench: Bench, earlier: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(earlier)
    run = earlier / PHASES[2] / "seed0"
    options = bench.options(steps=2)
    commands: list[tuple[object, ...]] = [
        ("train", "--resume", run),
        ("train", "--strategy", PHASES[2], "--out", run, *options),
        ("ablate", "--strategies", ",".join(PHASES), "--out", earlier, *options),
        ("report", earlier),
        ("report", run),
        ("evaluate", run, "--data", bench.speech),
        ("evaluate", "--pairs", earlier / "pairs.json", "--audio", earlier),
    ]
    for command in commands:
        capsys.readouterr()
        assert runner(*command) == 2, command
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert "written by an earlier version of snac-conditioning (schema 1; this version reads schema 2)" in line
    assert contents(earlier) == before


def test_a_model_of_an_earlier_version_still_converts(
    bench: Bench, earlier: Path, finished: Path, tmp_path: Path
) -> None:
    name = Path(PHASES[2]) / "seed0"
    loaded = ConditionedCodec.from_pretrained(earlier / name / "model", codec=bench.base)
    assert list(loaded.attached) == [PHASES[2], "voice_conversion"]
    voices = [path for path in sorted(bench.speech.rglob("*")) if path.suffix in (".wav", ".flac")][:2]
    for study, out in ((earlier, tmp_path / "earlier.wav"), (finished, tmp_path / "now.wav")):
        given = ("--source", voices[0], "--target", voices[1], "--base", bench.base, "--out", out)
        assert runner("convert", "--run", study / name, *given) == 0
    assert (tmp_path / "earlier.wav").read_bytes() == (tmp_path / "now.wav").read_bytes()
