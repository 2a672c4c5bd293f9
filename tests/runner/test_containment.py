"""A hook that raises or changes torch for everyone: named with its strategy, explained, and kept from the others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_study import PHASES, Bench, arm, plugin, result, runner, weights

from snac_core.errors import UserError
from snac_core.plugin_guard import torch_settings

HOOKS = {
    "__init__": "def __init__(self, config, taps):\n        super().__init__(config, taps)\n        {}",
    "training_start": "@hookimpl\n    def training_start(self, context):\n        {}",
    "before_vq": "@hookimpl\n    def before_vq(self, x, cond, tap):\n        {}\n        return x",
    "after_vq": "@hookimpl\n    def after_vq(self, x, cond, tap):\n        {}\n        return x",
    "loss": "@hookimpl\n    def loss(self, step):\n        {}\n        return dict()",
    "discriminator_loss": "@hookimpl\n    def discriminator_loss(self, step):\n        {}\n        return dict()",
}


def faulty(folder: Path, hook: str, statement: str) -> Path:
    """A sound strategy called "faulty", but for one statement in one hook."""
    source = plugin(folder, "faulty")
    method = HOOKS[hook].format(statement)
    faulty = f'class Faulty(Gate):\n    """Sound, but for {hook}."""\n\n    {method}\n\n\n'
    text = source.read_text().replace("@hookimpl\ndef register", f"{faulty}@hookimpl\ndef register")
    source.write_text(text.replace("register(Gate)", "register(Faulty)"))
    return source


@pytest.mark.parametrize("hook", HOOKS)
def test_an_arm_whose_hook_raises_is_refused_by_hook_and_strategy(bench: Bench, tmp_path: Path, hook: str) -> None:
    file = faulty(tmp_path, hook, "raise LookupError('no such\\n voice')")
    with pytest.raises(UserError, match=f"^{hook} of strategy 'faulty'.* raises LookupError: no such voice$"):
        bench.train([arm(PHASES[1]), arm("faulty")], tmp_path / "out", files=[file])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("hook", HOOKS)
def test_an_arm_whose_hook_changes_torchs_settings_is_refused_and_they_are_put_back(
    bench: Bench, tmp_path: Path, hook: str
) -> None:
    before = torch_settings()
    file = faulty(tmp_path, hook, "torch.set_default_dtype(torch.float64); torch.use_deterministic_algorithms(True)")
    words = f"^{hook} of strategy 'faulty'.* changes torch's default dtype from torch.float32 to torch.float64"
    with pytest.raises(UserError, match=words):
        bench.train([arm("faulty")], tmp_path / "out", files=[file])
    now = torch_settings()
    assert {k: v for k, v in now.items() if k != "random seed"} == {
        k: v for k, v in before.items() if k != "random seed"
    }


@pytest.fixture(scope="module")
def alone(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights of a sound arm that was trained alone."""
    return weights(bench.train([arm(PHASES[2])], tmp_path_factory.mktemp("alone"), steps=3)[PHASES[2]])


LATE = """
    @hookimpl
    def loss(self, step):
        if step.index == 2:
            {}
        return {{"likeness": step.identity.audio.square().mean()}}
"""


@pytest.mark.parametrize(
    ("statement", "setting"),
    [
        ("torch.set_num_threads(2)", "number of threads from 1 to 2"),
        ("torch.set_grad_enabled(False)", "gradient mode from True to False"),
        ("torch.manual_seed(0)", "random seed from"),
        ("torch.set_default_dtype(torch.float64); raise OSError('gone')", "raises OSError: gone"),
    ],
)
def test_a_change_in_the_middle_of_training_fails_its_arm_and_leaves_no_trace_in_the_others(
    bench: Bench, alone: dict[str, torch.Tensor], tmp_path: Path, statement: str, setting: str
) -> None:
    file = plugin(tmp_path, "late", LATE.format(statement))
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    folders = bench.train([arm("late"), arm(PHASES[2])], tmp_path / "both", files=[file], steps=3)
    assert (torch.get_num_threads(), torch.get_default_dtype()) == (threads, dtype)
    assert result(folders["late"])["status"] == "failed"
    assert result(folders["late"])["error"].startswith("loss of strategy 'late' ")
    assert setting in result(folders["late"])["error"]
    beside = weights(folders[PHASES[2]])
    assert all(torch.equal(beside[key], alone[key]) for key in alone)


def test_a_plugin_file_that_has_changed_since_the_training_is_named(
    bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, run = plugin(tmp_path, "mine"), tmp_path / "run"
    train = ["train", "--strategy", "mine", "--plugin", file, "--out", run]
    assert runner(*train, *bench.options(steps=1, dev_pairs=0, test_pairs=0)) == 0
    assert f"runner convert --run {run} --plugin {file} --source a.wav" in capsys.readouterr().out
    file.write_text(file.read_text() + "\n# another version\n")
    assert runner("train", "--resume", run, "--steps", 2) == 2
    assert "the plugin file of mine has changed since" in capsys.readouterr().err
    assert runner("train", "--resume", run) == 2
    speech = next(bench.speech.rglob("*.flac"))
    convert = ["convert", "--run", run, "--plugin", file, "--source", speech, "--target", speech]
    assert runner(*convert, "--base", bench.base, "--out", tmp_path / "c.wav") == 0
    assert "warning: the plugin file of mine has changed since" in capsys.readouterr().err


def test_a_plugin_can_be_left_out_of_every_command_that_loads_plugins(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (
        ["quickstart"], ["train"], ["ablate"], ["convert"], ["encode"], ["decode"], ["bench"], ["check"], ["plugins"],
        ["plugins", "show"], ["evaluate"], ["index", "build"], ["index", "show"],
    ):  # fmt: skip
        assert runner(*command, "--help") == 0
        told = capsys.readouterr().out
        assert "--disable-plugin" in told, command
        assert "--plugin" in told, command


def test_what_is_disabled_is_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    assert runner("plugins", "--disable-plugin", PHASES[0]) == 0
    assert PHASES[0] not in capsys.readouterr().out
    for command in (["plugins", "show"], ["check"]):
        assert runner(*command, PHASES[0], "--disable-plugin", PHASES[0]) == 2
        assert f"no plugin registers '{PHASES[0]}'" in capsys.readouterr().err


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert runner("--version") == 0
    assert capsys.readouterr().out.startswith("snac-conditioning 0.")
