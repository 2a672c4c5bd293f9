"""Mistakes on the command line: one line that says what was got and what was expected, exit code 2, nothing lost."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from small_study import PHASES, Bench, contents, plugin, runner

Refusal = Callable[..., str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refusal:
    """Run a command that must be refused; its one line."""

    def run(*arguments: object) -> str:
        capsys.readouterr()
        assert runner(*arguments) == 2
        lines = [line for line in capsys.readouterr().err.strip().splitlines() if not line.startswith("warning: ")]
        assert "Traceback" not in "\n".join(lines)
        told = [line for line in lines if line.startswith("error: ")]
        assert len(told) == 1
        assert lines[-1] == told[0]
        return told[0].removeprefix("error: ")

    return run


def test_no_command_is_named_after_the_help(refused: Refusal) -> None:
    assert refused() == "no command; give one of those above"
    assert refused("data") == "no command; give one of those above"


NAMES = [
    (["--strategies", "phase6"], "unknown strategy 'phase6'; did you mean 'phase6_encoder_adapter'?"),
    (["--strategies", f"{PHASES[0]},{PHASES[0]}"], "two arms are called 'phase3_contrastive'"),
    (["--set", "stpes=3"], "unknown key 'stpes'; did you mean 'steps'?"),
    (
        ["--set", f"{PHASES[2]}.kernal=3"],
        "'phase6_encoder_adapter'; did you mean 'kernel'?",
    ),
    (
        ["--set", f"{PHASES[1]}.hidden_dims=[8]"],
        f"settings for '{PHASES[1]}', which no arm uses; did you mean '{PHASES[2]}'",
    ),
    (["--set", f"{PHASES[2]}.kernel=0"], "'phase6_encoder_adapter': kernel = 0:"),
    (
        ["--set", f"{PHASES[2]}.taps=['latnt']"],
        "matches no tap of this codec; did you mean 'latent'?",
    ),
    (["--set", f"{PHASES[2]}.taps=['decoder_1']"], "names 'decoder_1', which is not before VQ"),
    (["--set", "objectives=['voice_conversation']"], "unknown strategy 'voice_conversation'; did you mean"),
    (["--set", "steps"], "expected key=value"),
    (["--set", "steps=0"], "steps = 0"),
    (["--steps", "0"], "got '0'"),
    (["--speaker-encoder", "simpel"], "unknown speaker encoder 'simpel'; did you mean 'simple'?"),
    (["--judge", "simple"], "possible judges: "),
    (["--device", "gpu"], "unknown device 'gpu'; expected auto, cpu, cuda, cuda:N or mps"),
    (["--device", "meta"], "unknown device 'meta'; expected auto, cpu, cuda, cuda:N or mps"),
    (["--base", "no/such/folder"], "no/such/folder"),
    (["--plugin", "no_such_file.py"], "no plugin file"),
    (["--disable-plugin", "phase33"], "no plugin 'phase33' to disable"),
    (["--sets", "x=1"], "--sets"),
    (["--teacher", "ge2e"], "--teacher is now --speaker-encoder"),
    (["--set", "teacher=ge2e"], "'teacher' is now 'speaker_encoder'"),
    (["--set", "exclude_metrics=['secs_roughened']"], "'secs_roughened' is now 'secs_degraded'"),
    (["--seeds", "many"], "got 'many'"),
]


@pytest.mark.parametrize(("options", "message"), NAMES)
def test_what_is_not_known_is_named_with_the_nearest_that_is(
    bench: Bench, tmp_path: Path, refused: Refusal, options: list[str], message: str
) -> None:
    given = [] if "--strategies" in options else ["--strategies", PHASES[2]]
    assert message in refused("ablate", *given, "--out", tmp_path / "out", *bench.options(), *options)
    assert not list(tmp_path.glob("out/*/seed0"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["abalte"], "abalte"),
        (["ablate"], "give a study file, or --strategies"),
        (["ablate", "no.toml"], "no file no.toml"),
        (["train"], "no strategy; give --strategy NAME, one of: phase3_contrastive"),
        (["train", "--resume", "nowhere"], "no run at nowhere"),
        (["report", "nowhere"], "no folder nowhere"),
        (["plugins", "show", "phase4"], "no plugin registers 'phase4'; did you mean 'phase4_decoder_film'"),
        (["plugins", "show"], "Missing"),
        (["check", "gone.py"], "no plugin file"),
        (
            ["convert", "--run", "nowhere", "--source", __file__, "--target", "b.wav", "--out", "c.wav"],
            "no folder nowhere",
        ),
        (["data", "synth", "x", "--speakers", "3"], "got '3'"),
        (["data", "scan", "nowhere"], "no folder nowhere"),
    ],
)
def test_a_mistyped_command_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refusal, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refused(*arguments)
    assert not list(tmp_path.iterdir())


def speech(folder: Path, speakers: int, *, bad: bool = False) -> Path:
    """A folder of speakers with two recordings each, of noise or of nothing."""
    draw = np.random.default_rng(0)
    for speaker in range(speakers):
        (folder / f"s{speaker}").mkdir(parents=True)
        for number in range(2):
            wave = np.zeros(16000) if bad else 0.1 * draw.standard_normal(16000)
            soundfile.write(folder / f"s{speaker}" / f"{number}.wav", wave, 16000)
    return folder


def test_data_that_cannot_be_used_is_named(bench: Bench, tmp_path: Path, refused: Refusal) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("no folder")
    cases = {
        tmp_path / "missing": "no folder",
        tmp_path / "file.txt": "is a file, not a folder",
        tmp_path / "empty": str(tmp_path / "empty"),
        speech(tmp_path / "lonely", 1): "holds one speaker, 's0'; conversion needs at least two",
        speech(tmp_path / "silent", 3, bad=True): "none of 6 audio files is usable",
    }
    for folder, message in cases.items():
        command = ["ablate", "--strategies", PHASES[2], "--out", tmp_path / "out"]
        assert message in refused(*command, *bench.options(), "--data", folder)
    assert not (tmp_path / "out").exists()


def test_study_files_with_wrong_brackets_are_explained(bench: Bench, tmp_path: Path, refused: Refusal) -> None:
    cases = {
        '[study]\n[arm]\nstrategies = ["a"]': "expected [[arm]], with two brackets",
        'study = 3\n[[arm]]\nstrategies = ["a"]': "expected a table, [study]",
        'steps = 3\n[[arm]]\nstrategies = ["a"]': "unknown key 'steps' outside of its tables",
        "[study]\nsteps = 3": "has no [[arm]]",
        '[study]\nplugins = "mine.py"\n[[arm]]\nstrategies = ["a"]': "expected a list of files",
    }
    for text, message in cases.items():
        (tmp_path / "study.toml").write_text(text)
        assert message in refused("ablate", tmp_path / "study.toml", "--out", tmp_path / "out", *bench.options())


def test_folders_of_others_are_left_as_they_are(bench: Bench, tmp_path: Path, finished: Path, refused: Refusal) -> None:
    holiday = tmp_path / "holiday"
    holiday.mkdir()
    (holiday / "photo.jpg").write_bytes(b"jpg")
    for command in (["ablate", "--strategies"], ["train", "--strategy"]):
        message = refused(*command, PHASES[2], "--out", holiday, *bench.options())
        assert str(holiday) in message
        assert "give a new folder with --out" in message
    assert [path.name for path in holiday.iterdir()] == ["photo.jpg"]

    copy = tmp_path / "study"
    shutil.copytree(finished, copy)
    before = contents(copy)
    again = ["ablate", "--strategies", PHASES[2], "--out", copy]
    assert "study.steps: 2 there, 3 asked for" in refused(*again, *bench.options(steps=3))
    assert "arm.lr" in refused(*again, *bench.options(steps=2), "--set", "lr=0.5")
    assert "study of other conversions" in refused(*again, *bench.options(steps=2, test_pairs=3))
    other = ["ablate", "--strategies", f"{PHASES[1]}+{PHASES[2]}", "--out", copy]  # a new arm, on another base
    assert "another base" in refused(*other, *bench.options(steps=2), "--base", "tiny")
    assert contents(copy) == before


def test_resume_takes_no_other_settings(finished: Path, refused: Refusal) -> None:
    run = finished / PHASES[2] / "seed0"
    assert "--resume continues the run as it was" in refused("train", "--resume", run, "--seed", "9")


def test_an_unknown_setting_of_a_run_is_named(refused: Refusal) -> None:
    train = ["train", "--strategy", PHASES[1], "--set"]
    assert refused(*train, "stpes=3") == "train: unknown key 'stpes'; did you mean 'steps'?"
    told = refused(*train, f"{PHASES[2]}.kernel=5")
    assert told.startswith(f"train: unknown key '{PHASES[2]}', which is no strategy of this arm; ")


def test_a_number_of_steps_that_does_not_fit_the_other_settings_is_refused(
    finished: Path, tmp_path: Path, refused: Refusal
) -> None:
    config = json.loads((finished / PHASES[2] / "seed0" / "config.json").read_text())
    config["study"] |= {"select": "best", "eval_every": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    told = refused("train", "--resume", tmp_path, "--steps", "1")
    assert "--steps: patience and select = 'best' need evaluations during training" in told


def test_a_damaged_run_configuration_is_named(tmp_path: Path, refused: Refusal) -> None:
    for text in ("{", "[]", "{}", '{"study": {"stpes": 3}, "arm": {}, "seed": 0}'):
        (tmp_path / "config.json").write_text(text)
        assert "is not the configuration of a run" in refused("train", "--resume", tmp_path)


def test_a_plugin_file_that_fails_is_an_error(bench: Bench, tmp_path: Path, refused: Refusal) -> None:
    cases = {
        "imports_nothing.py": ("import no_such_module", "does not import: ModuleNotFoundError"),
        "no_syntax.py": ("def", "does not import: SyntaxError"),
        "empty.py": ("x = 1", "registers nothing"),
        "misspelt.py": (
            "from snac_core import hookimpl\n@hookimpl\ndef register_strategeis(register): pass",
            "register_strategeis",
        ),
    }
    for name, (text, message) in cases.items():
        (tmp_path / name).write_text(text)
        for command in (["plugins"], ["ablate", "--strategies", PHASES[2], *bench.options()]):
            assert message in refused(*command, "--plugin", tmp_path / name)
    mine = plugin(tmp_path, PHASES[2])
    assert "offered twice" in refused("plugins", "--plugin", mine)


def test_an_installed_plugin_that_fails_is_named_and_the_rest_works(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load() -> None:
        raise ImportError("no such library")

    broken = SimpleNamespace(name="broken", load=load, dist=SimpleNamespace(name="elsewhere", version="1.0"))
    found = importlib.metadata.entry_points

    def entry_points(**which: str) -> list[object]:
        return [*found(**which), broken] if which.get("group") == "snac_core.plugins" else list(found(**which))

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    assert runner("plugins") == 0
    told = capsys.readouterr()
    assert "plugin 'broken' of elsewhere 1.0 does not load and is left out: ImportError: no such library" in told.err
    assert PHASES[2] in told.out
    assert runner("train", "--resume", finished / PHASES[2] / "seed0") in (0, 2)
    assert "'broken' of elsewhere 1.0 does not load and is left out" in capsys.readouterr().err


def test_debug_shows_the_traceback(bench: Bench) -> None:
    from snac_runner.cli import main

    with pytest.raises(ValueError, match="unknown strategy"):
        main(["ablate", "--strategies", "nothing", *bench.options(), "--debug"])


def test_a_result_cannot_hold_a_number_that_is_none(finished: Path) -> None:
    for path in finished.rglob("*.json"):
        json.loads(path.read_text(), parse_constant=pytest.fail)
