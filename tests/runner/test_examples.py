"""The example plugins: installed, checked, trained, compared, and named in every result."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from small_study import PHASES, Bench, result, runner

from snac_core import ConditionedCodec, Conditioning, UserError, discover
from snac_core.codec.export import export
from snac_core.testing import check_strategy, small_codec

EXAMPLES = Path(__file__).parents[2] / "examples"
PACKAGE, FILE = EXAMPLES / "snac_speaker_gate", EXAMPLES / "cross_attention.py"


def install(package: Path, target: Path) -> None:
    """Install a distribution into a folder: with uv, without a network; else by writing what an installer writes."""
    command = ["uv", "pip", "install", "--quiet", "--offline", "--no-deps", "--target", str(target), str(package)]
    if shutil.which("uv") and subprocess.run(command, capture_output=True, timeout=60).returncode == 0:
        return
    project = tomllib.loads((package / "pyproject.toml").read_text())["project"]
    module = project["name"].replace("-", "_")
    info = target / f"{module}-{project['version']}.dist-info"
    info.mkdir(parents=True)
    shutil.copy(package / f"{module}.py", target)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    groups = project["entry-points"].items()
    lines = [line for group, names in groups for line in (f"[{group}]", *(f"{k} = {v}" for k, v in names.items()))]
    (info / "entry_points.txt").write_text("\n".join(lines))


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The example package, installed for one test."""
    install(PACKAGE, tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "site")
    importlib.invalidate_caches()
    yield
    sys.modules.pop("snac_speaker_gate", None)


@pytest.mark.parametrize("path", [FILE, PACKAGE / "snac_speaker_gate.py"], ids=lambda path: path.stem)
def test_an_author_writes_fewer_than_45_lines(path: Path) -> None:
    assert len([line for line in path.read_text().splitlines() if line.strip()]) < 45


def test_the_installed_package_appears_in_plugins_train_ablate_report_and_result(
    installed: None, bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert runner("plugins") == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("speaker_gate "))
    assert "adapter" in line
    assert "plugin 'speaker_gate' of snac-speaker-gate 0.1.0" in line

    assert runner("train", "--strategy", "speaker_gate", "--out", tmp_path / "run", *bench.options(steps=2)) == 0
    study = ["ablate", "--strategies", f"speaker_gate,{PHASES[1]}", "--out", tmp_path / "study"]
    assert runner(*study, *bench.options(steps=2)) == 0
    stated = {"distribution": "snac-speaker-gate", "version": "0.1.0"}
    for folder in (tmp_path / "run", tmp_path / "study" / "speaker_gate" / "seed0"):
        assert result(folder)["status"] == "success"
        assert result(folder)["versions"]["plugins"]["speaker_gate"] == stated
    report = json.loads((tmp_path / "study" / "report.json").read_text())
    assert set(report["arms"]) == {"speaker_gate", PHASES[1]}
    page = (tmp_path / "study" / "report.html").read_text()
    assert "snac-speaker-gate 0.1.0" in page

    capsys.readouterr()
    assert runner("plugins", "--disable-plugin", "speaker_gate") == 0
    assert "speaker_gate" not in capsys.readouterr().out


def test_without_the_package_its_runs_say_what_is_missing(installed: None, bench: Bench, tmp_path: Path) -> None:
    model = ConditionedCodec(small_codec(), ["speaker_gate"], speaker_dim=4, plugins=discover())
    model.save_pretrained(tmp_path / "model")
    words = r"needs strategy 'speaker_gate' from module 'snac_speaker_gate', which no plugin here offers; install"
    with pytest.raises(UserError, match=words):
        ConditionedCodec.from_pretrained(
            tmp_path / "model", codec=model.codec, plugins=discover(disable=["speaker_gate"])
        )


@pytest.mark.parametrize("path", [FILE, PACKAGE / "snac_speaker_gate.py"], ids=lambda path: path.stem)
def test_an_example_holds_to_every_rule(path: Path) -> None:
    catalogue = discover([path])
    (cls,) = (s for n, s in catalogue.strategies.classes.items() if catalogue.strategies.origins[n].file)
    failed = [str(result) for result in check_strategy(cls, catalogue=catalogue) if not result.passed]
    assert not failed


def test_frames_attend_to_different_tokens_of_the_speaker() -> None:
    catalogue = discover([FILE])
    model = ConditionedCodec(small_codec(), ["cross_attention"], speaker_dim=8, plugins=catalogue)
    tap = next(tap for tap in model.codec.taps if tap.name == "decoder_1")
    strategy = model.attached["cross_attention"]
    out = strategy.parts["decoder_1"]["out"]
    with torch.no_grad():
        out.weight.normal_()
    x = torch.randn(1, tap.channels, 50)
    edit = next(iter(model.edits["decoder_1"]))
    added = edit(x, Conditioning(torch.nn.functional.normalize(torch.randn(1, 8), dim=1))) - x
    assert added.std(dim=-1).mean() > 0.1 * added.abs().mean(), "the edit differs between frames"
    alone = {"cross_attention": {"tokens": 1}}
    with pytest.raises(UserError, match="tokens = 1"):  # attention over one token is constant
        ConditionedCodec(small_codec(), ["cross_attention"], speaker_dim=8, plugins=catalogue, config=alone)


def test_an_example_with_attention_can_be_exported(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="the extra [export] is not installed")
    codec = small_codec(encoder_rates=[2], decoder_rates=[2], decoder_dim=16, vq_strides=[1])  # one stage is faster
    model = ConditionedCodec(codec, ["cross_attention"], speaker_dim=8, plugins=discover([FILE])).eval()
    assert not export(model, tmp_path / "onnx").failed


@pytest.mark.slow  # installs the project with all its libraries
def test_in_a_fresh_environment_from_installation_to_a_comparative_report(tmp_path: Path) -> None:
    if not shutil.which("uv"):
        pytest.skip("needs uv")
    started = time.monotonic()
    project, venv, bin_ = EXAMPLES.parent, tmp_path / "venv", tmp_path / "venv" / "bin"

    def run(*command: object) -> str:
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    run("uv", "venv", venv, "--python", sys.executable)
    run("uv", "pip", "install", "--python", bin_ / "python", project, PACKAGE)
    assert "snac-speaker-gate 0.1.0" in run(bin_ / "runner", "plugins")
    run(bin_ / "runner", "data", "synth", "speech", "--speakers", 24, "--sentences", 6)
    study = ("--data", "speech", "--steps", 20, "--seeds", 2, "--set", "test_pairs=16", "--out", "study")
    run(bin_ / "runner", "ablate", "--strategies", "speaker_gate,phase4_decoder_film", *study)
    assert "speaker_gate" in (tmp_path / "study" / "report.md").read_text()
    assert time.monotonic() - started < 600, "under ten minutes"
