"""A run that was stopped goes on to the bit, whatever stopped it; a finished one stays as it is."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from small_study import PHASES, Bench, arm, contents, full_disk, plugin, records, result, runner, steps, weights

from snac_core import files
from snac_core.errors import UserError
from snac_runner.arm import Arm
from snac_runner.distributed import ALONE, ProcessLost
from snac_runner.study import check_study, write_study
from snac_runner.train import Interrupted, evaluate_on_dev
from snac_runner.train_step import train_step

ARMS = [arm(PHASES[2]), arm(PHASES[0])]


@pytest.fixture(scope="module")
def whole(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two arms that were never stopped: 5 steps, judged on dev at 4 and 5."""
    return bench.train(ARMS, tmp_path_factory.mktemp("whole"), steps=5, eval_every=4)


def assert_as_if_never_stopped(folder: Path, whole: Path) -> None:
    """Equal weights and scores; steps without gap or duplicate; finished."""
    assert steps(folder) == steps(whole)
    assert all(torch.equal(value, weights(whole)[key]) for key, value in weights(folder).items())
    timeless = [[{k: v for k, v in r.items() if k != "seconds"} for r in records(f)] for f in (folder, whole)]
    assert timeless[0] == timeless[1]
    assert result(folder)["status"] == "success"
    assert result(folder)["metrics"] == result(whole)["metrics"]
    assert result(folder)["cost"]["steps"] == 5


def test_ctrl_c_leaves_cancelled_runs_that_go_on_to_equal_results(
    bench: Bench, tmp_path: Path, whole: dict[str, Path]
) -> None:
    def press(_title: str, done: int, *_: Any) -> None:
        if done == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="step 4 of 5"):  # the key is pressed while step 4 is under way
        bench.train(ARMS, tmp_path, steps=5, eval_every=4, save_every=100, step=lambda t, d, *_: press(t, d))
    for title in whole:
        stopped = tmp_path / title / "seed0"
        assert result(stopped)["status"] == "cancelled"
        assert "step 4 of 5" in result(stopped)["error"]
        assert steps(stopped) == [1, 2, 3, 4]
        assert not (stopped / "model").exists()
    for title, folder in bench.train(ARMS, tmp_path, steps=5, eval_every=4).items():
        assert_as_if_never_stopped(folder, whole[title])


def test_a_killed_process_goes_on_to_what_an_unkilled_one_makes(
    bench: Bench, tmp_path: Path, whole: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    command = ["train", "--strategy", PHASES[2], "--out", str(out), *bench.options(steps=5, eval_every=4)]
    driver = [sys.executable, str(Path(__file__).with_name("driver.py")), "3", *command]
    killed = subprocess.run(driver, capture_output=True, timeout=120, check=False, cwd=Path(__file__).parents[2])
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert not (out / "result.json").exists()
    assert (out / "metrics.jsonl").read_text().endswith('"epo')
    half_written = out / "checkpoint" / ".state.unfinished-abcdefgh.pt"  # as if it had been killed there, too
    half_written.parent.mkdir(exist_ok=True)
    half_written.write_bytes(b"half")
    assert runner("train", "--resume", out) == 0
    assert "run:" in capsys.readouterr().out
    assert not half_written.exists()
    assert steps(out) == [1, 2, 3, 4, 5]
    assert all(torch.equal(value, weights(whole[PHASES[2]])[key]) for key, value in weights(out).items())
    left_out = result(out)["missing"]  # the command leaves out judges that cannot hear on this base
    scored = result(whole[PHASES[2]])["metrics"]
    assert result(out)["metrics"] == {name: value for name, value in scored.items() if name not in left_out}
    lines = (out / "training.log").read_text().splitlines()
    assert sum(" dev step=" in line for line in lines) == 2
    before = contents(out)
    assert runner("train", "--resume", out) == 0
    assert {n: b for n, (b, _) in contents(out).items()} == {n: b for n, (b, _) in before.items()}
    kept = ("model/model.safetensors", "checkpoint/state.pt", "metrics.jsonl", "config.json", "result.json")
    assert all(contents(out)[name] == before[name] for name in kept)  # not even written again


def test_the_preflight_checks_run_with_the_first_seed_only(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[int] = []
    monkeypatch.setattr("snac_runner.unit.preflight", lambda arm: checked.append(arm.seed))
    bench.train([arm(PHASES[1])], tmp_path / "study", seeds=(3, 4), steps=1, test_pairs=0, dev_pairs=0)
    assert checked == [3]


def test_ctrl_c_ends_every_command_in_one_line_that_says_how_to_go_on(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def pressed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    command = ["train", "--strategy", PHASES[2], "--out", tmp_path / "run", *bench.options(steps=1)]
    with monkeypatch.context() as patch:
        patch.setattr("snac_runner.unit.preflight", pressed)
        assert runner(*command) == 130
    assert capsys.readouterr().err.strip().splitlines()[-1] == "error: stopped; nothing was trained yet"
    with monkeypatch.context() as patch:
        patch.setattr("snac_runner.train.train_step", pressed)
        assert runner(*command) == 130
    resume = f"error: stopped; continue with: runner train --resume {tmp_path / 'run'}"
    assert capsys.readouterr().err.strip().splitlines()[-1] == resume
    assert result(tmp_path / "run")["status"] == "cancelled"
    study = ["ablate", "--strategies", PHASES[2], "--out", tmp_path / "study", *bench.options(steps=1)]
    with monkeypatch.context() as patch:
        patch.setattr("snac_runner.controls.score", pressed)
        assert runner(*study) == 130
    again = f"error: stopped; give the same command again to continue in {tmp_path / 'study'}"
    assert capsys.readouterr().err.strip().splitlines()[-1] == again
    with monkeypatch.context() as patch:
        patch.setattr("snac_core.plugins.discover", pressed)
        assert runner("plugins") == 130
    assert capsys.readouterr().err.strip().splitlines()[-1] == "error: interrupted"


@pytest.mark.parametrize("written", [1, 2, 3])
def test_a_study_that_was_killed_while_its_files_were_written_continues(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    resources, replaced, replace = bench.resources(bench.study()), [], Path.replace

    def killed(path: Path, to: Path) -> Path:
        if len(replaced) == written:
            raise KeyboardInterrupt
        replaced.append(to)
        return replace(path, to)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with suppress(KeyboardInterrupt):
            write_study(tmp_path, ARMS, resources, "")
    assert len(list(tmp_path.iterdir())) == written
    check_study(tmp_path, ARMS, [], resources)
    write_study(tmp_path, ARMS, resources, "")
    assert {path.name for path in tmp_path.iterdir()} == {"study.json", "study.toml", "pairs.json"}


def test_a_disk_that_is_full_while_a_checkpoint_is_written_costs_no_checkpoint(
    bench: Bench, tmp_path: Path, whole: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    written, write = [], files.write_bytes

    def filling(path: str | Path, data: bytes) -> None:
        if Path(path).name == "state.pt":
            written.append(path)
            if len(written) == 3:  # both arms have saved once, at step 2
                with full_disk(len(data) // 2):
                    write(path, data)
                return
        write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr("snac_runner.arm.write_bytes", filling)
        with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
            bench.train(ARMS, tmp_path, steps=5, eval_every=4, save_every=2)
    for title in whole:
        folder = tmp_path / title / "seed0"
        assert not (folder / "result.json").exists()  # no failure of the arm
        assert sorted(path.name for path in (folder / "checkpoint").iterdir()) == ["state.pt"]
        assert torch.load(folder / "checkpoint" / "state.pt", weights_only=True)["progress"]["step"] == 2
    for title, folder in bench.train(ARMS, tmp_path, steps=5, eval_every=4, save_every=2).items():
        assert_as_if_never_stopped(folder, whole[title])


def full(*_: Any) -> None:
    """What writing to a full disk does."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "writes", ["snac_runner.arm.Arm.save", "tensorboard.summary.writer.record_writer.RecordWriter.write"]
)
def test_a_full_disk_ends_the_command_in_one_line(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], writes: str
) -> None:
    monkeypatch.setattr(writes, full)
    assert runner("train", "--strategy", PHASES[2], "--out", tmp_path / "run", *bench.options(steps=3)) == 2
    said = capsys.readouterr().err
    assert said.strip().splitlines()[-1] == "error: No space left on device"
    assert "Traceback" not in said


def test_a_log_that_cannot_be_written_is_no_failure_of_the_arm(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("snac_runner.logs.RunLog.write", full)
    with pytest.raises(OSError, match="No space left"):
        bench.train(ARMS[:1], tmp_path, steps=2)
    assert not list(tmp_path.rglob("result.json"))


@pytest.mark.parametrize("lost_at", [(1,), (4,), (2, 4)])
def test_an_evaluation_during_which_a_process_was_lost_is_made_up_for(
    bench: Bench, whole: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost_at: tuple[int, ...]
) -> None:
    evaluations = []

    def evaluate(arm: Arm) -> dict[str, float] | None:
        evaluations.append(arm)
        if len(evaluations) in lost_at:
            raise ProcessLost("another process does not answer")
        return evaluate_on_dev(arm)

    monkeypatch.setattr("snac_runner.train.evaluate_on_dev", evaluate)
    for _ in lost_at:
        with pytest.raises(Interrupted, match="does not answer; stopped after step"):
            bench.train(ARMS, tmp_path, steps=5, eval_every=4)
    for title, folder in bench.train(ARMS, tmp_path, steps=5, eval_every=4).items():
        assert_as_if_never_stopped(folder, whole[title])


def test_the_learning_rate_is_a_function_of_the_step_alone(
    bench: Bench, tmp_path: Path, whole: dict[str, Path]
) -> None:
    resources = bench.resources(bench.study(steps=5))
    fresh = Arm.new(arm(PHASES[2]), 0, tmp_path, resources)
    rates = [record["lr"] for record in records(whole[PHASES[2]]) if "dev" not in record]
    assert rates == [fresh.learning_rate(1e-3, index) for index in range(1, 6)]
    settings = arm(PHASES[2], warmup_steps=2, lr_min_ratio=0.1)
    curve = [Arm.new(settings, 0, tmp_path, resources).learning_rate(1.0, index) for index in range(1, 6)]
    assert curve[:2] == [0.5, 1.0]
    assert curve == sorted(curve[:2]) + sorted(curve[2:], reverse=True)
    assert curve[-1] == pytest.approx(0.1)


DISCRIMINATOR = """
    @hookimpl
    def training_start(self, context):
        self.discriminator = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))

    @hookimpl
    def loss(self, step):
        return {"fool": self.discriminator(step.converted.audio.unflatten(-1, (4, -1)).mean(-1).squeeze(1)).mean()}

    @hookimpl
    def discriminator_loss(self, step):
        judged = self.discriminator(step.converted.audio.detach().unflatten(-1, (4, -1)).mean(-1).squeeze(1))
        return {"tell": judged.square().mean()}
"""


def test_a_discriminator_with_running_statistics_resumes_exactly(bench: Bench, tmp_path: Path) -> None:
    file = plugin(tmp_path, "with_discriminator", DISCRIMINATOR)
    study = bench.study(steps=4)
    resources = bench.resources(study, [file])
    settings = arm("with_discriminator")

    def advanced(one: Arm, until: int) -> Arm:
        for index in range(one.progress.step + 1, until + 1):
            train_step([one], [resources.draw(index, resources.batches(0), one.sampler)], ALONE).checked()
        return one

    straight = advanced(Arm.new(settings, 0, tmp_path / "a", resources), 4)
    stopped = advanced(Arm.new(settings, 0, tmp_path / "b", resources), 2)
    stopped.save()
    resumed = Arm.new(settings, 0, tmp_path / "b", resources)
    assert resumed.load()
    advanced(resumed, 4)
    ours, theirs = resumed.model.state_dict(), straight.model.state_dict()
    assert any(".discriminator." in key and "running_mean" in key for key in ours)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_truncated_checkpoint_is_named(bench: Bench, tmp_path: Path) -> None:
    resources = bench.resources(bench.study())
    one = Arm.new(ARMS[0], 0, tmp_path, resources)
    one.save()
    data = one.checkpoint.read_bytes()
    one.checkpoint.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"not a complete checkpoint.*delete"):
        one.load()


def test_a_checkpoint_of_another_base_is_refused(bench: Bench, tmp_path: Path) -> None:
    resources = bench.resources(bench.study())
    one = Arm.new(ARMS[0], 0, tmp_path, resources)
    one.save()
    state = torch.load(one.checkpoint, weights_only=True)
    torch.save({**state, "base": "0" * 64}, one.checkpoint)
    with pytest.raises(UserError, match="trained on a base with digest 000000000000"):
        one.load()


def test_a_checkpoint_executes_no_code(bench: Bench, tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {tmp_path / 'executed'}",)

    one = Arm.new(ARMS[0], 0, tmp_path, bench.resources(bench.study()))
    one.checkpoint.parent.mkdir()
    torch.save({"base": Attack()}, one.checkpoint)
    with pytest.raises(UserError, match="not a complete checkpoint"):
        one.load()
    assert not (tmp_path / "executed").exists()


def test_a_run_goes_on_from_another_folder_and_with_a_plugin_file_that_has_moved(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: Callable[..., str]
) -> None:
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    file, out = plugin(tmp_path, "gate").name, tmp_path / "run"
    command = ["train", "--strategy", "gate", "--plugin", file, "--no-evaluation", "--out", out]
    options = bench.options(steps=2)
    assert "--no-evaluation is dev_pairs = 0 and test_pairs = 0" in refusal(*command, *options)
    for number in reversed([number for number, option in enumerate(options) if "_pairs=" in option]):
        del options[number - 1 : number + 1]
    assert runner(*command, *options) == 0
    (out / "result.json").unlink()
    monkeypatch.chdir(tmp_path / "other")
    assert runner("train", "--resume", out) == 0
    moved = Path(file).name
    (tmp_path / file).rename(moved)
    (out / "result.json").unlink()
    assert "no plugin file" in refusal("train", "--resume", out)
    assert runner("train", "--resume", out, "--plugin", moved) == 0


def test_plugin_files_of_a_settings_file_and_of_the_command_are_all_loaded(bench: Bench, tmp_path: Path) -> None:
    first, second = plugin(tmp_path, "first_gate"), plugin(tmp_path, "second_gate")
    config = tmp_path / "run.toml"
    config.write_text(f'plugins = ["{first.name}"]\nstrategies = ["first_gate", "second_gate"]\n')
    command = ["train", "--config", config, "--plugin", second, "--out", tmp_path / "run"]
    assert runner(*command, *bench.options(steps=1)) == 0


def test_seeds_of_an_arm_start_from_the_same_weights(bench: Bench, tmp_path: Path) -> None:
    first = bench.train([arm(PHASES[2])], tmp_path / "first")[PHASES[2]]
    on, out = arm(PHASES[2], name="on", start=str(first)), tmp_path / "on"
    bench.train([on], out)
    other = bench.train([arm(PHASES[2], lr=0.05)], tmp_path / "other")[PHASES[2]]
    kept = tmp_path / "kept"
    first.rename(kept)
    bench.train([on], out)  # is trained already
    shutil.copytree(other, first)
    for seeds in ((0,), (0, 1)):
        with pytest.raises(UserError, match=f"seed0 has started from other weights of {first}"):
            bench.train([on], out, seeds=seeds)
    shutil.rmtree(first)
    kept.rename(first)
    assert result(bench.train([on], out, seeds=(0, 1))["on"].with_name("seed1"))["status"] == "success"


def test_a_run_folder_of_another_configuration_is_refused_and_left_alone(
    bench: Bench, tmp_path: Path, whole: dict[str, Path]
) -> None:
    there = tmp_path / PHASES[2] / "seed0"
    shutil.copytree(whole[PHASES[2]], there)
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"another configuration \(arm\.lr: 0\.001 there, 0\.01 asked for\)"):
        bench.train([arm(PHASES[2], lr=0.01)], tmp_path, steps=5, eval_every=4)
    assert contents(tmp_path) == before
