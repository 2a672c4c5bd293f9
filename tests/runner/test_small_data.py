"""Few speakers, no data at all, data that has moved, and more training of a finished run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_study import PHASES, Bench, contents, result, runner, steps, weights

from snac_runner.cli import train
from snac_runner.run_folder import stored_run

SMALL = ("--steps", 2, "--set", "batch_size=2", "--set", "crop_seconds=0.4", "--speaker-encoder", "simple")
FAST = (*SMALL, "--set", "pair_seconds=1.0", "--set", "samples=0")


@pytest.fixture
def few(bench: Bench, tmp_path: Path) -> Callable[[int], Path]:
    """A folder with as many speakers as asked for, not split."""
    speakers = sorted(path for path in bench.speech.glob("*/*") if path.is_dir())

    def folder(number: int) -> Path:
        for speaker in speakers[:number]:
            shutil.copytree(speaker, tmp_path / "few" / speaker.name)
        return tmp_path / "few"

    return folder


@pytest.fixture(autouse=True)
def _no_noise_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("snac_runner.unit.noise_floor", lambda *_: 0.0)


def test_two_speakers_are_refused_before_the_first_step_and_train_without_evaluation(
    bench: Bench, tmp_path: Path, few: Callable[[int], Path], refusal: Callable[..., str]
) -> None:
    out = tmp_path / "run"
    command = ["train", "--strategy", PHASES[1], "--data", few(2), "--base", bench.base, "--out", out, *FAST]
    message = refusal(*command)
    assert "the test split" in message
    assert "is empty" in message
    assert "runner train --no-evaluation" in message
    assert not out.exists()
    study = ["ablate", "--strategies", PHASES[1], *command[3:], "--dry-run"]
    assert "is empty" in refusal(*study)
    assert runner(*command, "--no-evaluation") == 0
    assert result(out)["status"] == "success"
    assert result(out)["metrics"] == {}
    voice = next(path for path in (tmp_path / "few").rglob("*.flac"))
    convert = ["convert", "--run", out, "--base", bench.base, "--source", voice, "--target", voice]
    assert runner(*convert, "--out", tmp_path / "c.wav") == 0


def test_four_speakers_are_evaluated_on_the_conversions_that_there_are(
    bench: Bench, tmp_path: Path, few: Callable[[int], Path], refusal: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    data = few(4)
    for speaker in data.iterdir():  # two utterances each: one of them is a source
        for path in sorted(speaker.glob("*.flac"))[2:]:
            path.unlink()
    options = ["--strategy", PHASES[1], "--data", data, "--base", bench.base, *SMALL, "--set", "samples=0",
               "--set", "pair_seconds=8"]  # fmt: skip
    asked = refusal("train", *options, "--out", tmp_path / "asked", "--set", "test_pairs=40")
    assert "40 were asked for" in asked
    assert runner("train", *options, "--out", tmp_path / "run") == 0
    shown = capsys.readouterr()
    assert "only 2 different conversions of test speakers are possible (the default is 40)" in shown.err
    assert "no dev speakers" in shown.err
    assert result(tmp_path / "run")["pairs"]["n"] == 2
    assert not (tmp_path / "asked").exists()


def test_without_data_the_synthetic_corpus_is_used_and_named(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train, "SYNTHETIC_SPEAKERS", 8)
    monkeypatch.setattr(train, "SYNTHETIC_SENTENCES", 4)
    sizes = ["--set", "dev_pairs=2", "--set", "test_pairs=2", "--base", bench.base]
    assert runner("train", "--strategy", PHASES[1], "--out", tmp_path / "run", *FAST, *sizes) == 0
    assert "no --data: using 8 synthetic speakers in" in capsys.readouterr().err
    assert Path(stored_run(tmp_path / "run")[0].data).is_dir()
    capsys.readouterr()
    assert runner("ablate", "--strategies", PHASES[1], "--out", tmp_path / "s", *FAST, *sizes, "--dry-run") == 0
    shown = capsys.readouterr()
    assert "no --data: using 8 synthetic speakers in" in shown.err
    assert "test: 2 conversions" in shown.out


@pytest.fixture
def run(bench: Bench, tmp_path: Path, finished: Path) -> Path:
    return Path(shutil.copytree(finished / PHASES[2] / "seed0", tmp_path / "run"))


def test_a_run_resumes_with_data_and_base_that_have_moved(
    bench: Bench, tmp_path: Path, run: Path, refusal: Callable[..., str], few: Callable[[int], Path]
) -> None:
    shutil.copytree(bench.speech, tmp_path / "moved")
    shutil.copytree(bench.base, tmp_path / "base")
    for name in ("result.json", "model"):  # as if stopped before its end
        shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()
    stored = json.loads((run / "config.json").read_text())
    stored["study"] |= {"data": "/gone", "base": "/gone/base"}
    (run / "config.json").write_text(json.dumps(stored))
    moved = ["--data", tmp_path / "moved", "--base", tmp_path / "base", "--device", "cpu"]
    assert runner("train", "--resume", run, *moved) == 0
    assert result(run)["status"] == "success"
    other = refusal("train", "--resume", run, "--data", few(8), *moved[2:])
    assert "digests.data" in other
    assert "only --data, --base, --device" in refusal("train", "--resume", run, "--seed", 1)


def test_a_finished_run_continues_to_more_steps_in_a_new_folder(
    bench: Bench, tmp_path: Path, run: Path, refusal: Callable[..., str]
) -> None:
    before = contents(run)
    assert runner("train", "--resume", run, "--steps", 4) == 0
    longer = tmp_path / "run-4steps"
    assert steps(longer) == [1, 2, 3, 4]
    assert result(longer)["cost"]["steps"] == 4
    assert contents(run) == before
    assert runner("train", "--resume", run, "--steps", 4) == 0  # finished: nothing to do
    assert "--steps 1 is fewer" in refusal("train", "--resume", run, "--steps", 1)


def test_a_run_starts_from_the_strategies_of_another(
    bench: Bench, tmp_path: Path, run: Path, runs: dict[str, Path], refusal: Callable[..., str]
) -> None:
    trained = runs[PHASES[2]]
    options = ["--base", bench.base, "--data", bench.speech, *FAST, "--steps", 1, "--set", "lr=1e-12"]
    command = ["train", "--strategy", PHASES[2], *options, "--no-evaluation", "--start"]
    assert runner(*command, trained, "--out", tmp_path / "started") == 0
    before, after = weights(trained), weights(tmp_path / "started")
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)
    assert json.loads((tmp_path / "started" / "config.json").read_text())["arm"]["start"] == str(trained)
    message = refusal("train", "--strategy", PHASES[1], *command[3:], trained, "--set", "objectives=['synthetic_vc']")
    assert "expected one in common" in message
    other = refusal(*command, trained, "--set", f"{PHASES[2]}.hidden_dim=24", "--out", tmp_path / "x")
    assert f"so add --set '{PHASES[2]}.hidden_dim=" in other
    assert "no folder nowhere" in refusal(*command, "nowhere", "--out", tmp_path / "x")


def test_a_frozen_strategy_keeps_its_weights_bit_for_bit_and_the_others_train(
    bench: Bench, tmp_path: Path, runs: dict[str, Path], refusal: Callable[..., str]
) -> None:
    trained, (_, phase4, phase6) = runs[PHASES[2]], PHASES
    options = ["--base", bench.base, "--data", bench.speech, *FAST, "--no-evaluation"]
    command = ["train", "--strategy", phase6, "--strategy", phase4, *options, "--start", trained]
    frozen = ["--set", f"frozen=['{phase6}']"]
    out = tmp_path / "second"
    assert runner(*command, *frozen, "--steps", 3, "--out", out) == 0
    before, after = weights(trained), weights(out)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    moved = [value for name, value in after.items() if name.startswith(phase4)]
    assert moved
    assert any(value.count_nonzero() for value in moved), "zeros when new"
    assert runner("train", "--resume", out, "--steps", 4) == 0
    longer = weights(tmp_path / "second-4steps")
    assert all(torch.equal(value, longer[name]) for name, value in before.items())
    assert result(out)["cost"]["parameters"] == sum(map(torch.numel, moved))
    message = refusal(*command[:-2], *frozen, "--out", tmp_path / "x")
    assert "new weights would stay as they are" in message
    assert "expected start = RUN" in message
    message = refusal(*command, "--set", "frozen=['phase6_encoder_adaptor']", "--out", tmp_path / "x")
    assert "did you mean 'phase6_encoder_adapter'" in message
    message = refusal(*command, "--set", f"frozen=['{phase4}']", "--out", tmp_path / "x")
    assert f"voice_conversion; expected {phase4}, which is frozen" in message
    message = refusal(*command[:3], *options, "--start", trained, *frozen, "--out", tmp_path / "x")
    assert "has nothing to train" in message
