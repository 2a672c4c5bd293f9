"""The adapters that are part of the package, and conversion with nothing trained."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_study import PHASES, Bench, runner

from snac_core import checkpoint
from snac_core.checkpoint import bundled_adapters, digest_of
from snac_core.codec import SNAC
from snac_core.codec.pretrained import ASSETS, bundled
from snac_core.conditioned import ConditionedCodec
from snac_core.errors import UserError
from snac_runner.convert import best_adapter


@pytest.mark.parametrize("name", bundled_adapters())
def test_a_bundled_adapter_is_evaluated_changes_the_voice_and_has_a_card(name: str) -> None:
    model = ConditionedCodec.from_pretrained(name)
    assert model.evaluation is not None
    assert model.evaluation["metrics"]["secs"]["mean"] > 0
    assert model.codec.name in bundled()
    audio = 0.1 * torch.randn(1, 1, 8000, generator=torch.Generator().manual_seed(0))
    target = torch.nn.functional.normalize(torch.randn(1, model.encoder.dim), dim=1)  # type: ignore[union-attr]
    with torch.no_grad(), model.codec.fixed_noise(0):
        changed = model.reconstruct(audio, model.target(target, audio.flip(-1))).audio
        assert not torch.equal(changed, model.codec(audio)[0])
    card = (ASSETS / name / "README.md").read_text()
    for words in ("## Training", "## Evaluation", "## Limits", "agreement"):
        assert words in card


@pytest.fixture
def assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two adapters of the bundled base in place of those of the package; the second has the higher similarity."""
    folder = tmp_path / "assets"
    codec = SNAC.from_pretrained("tiny")
    for number, secs in enumerate((0.5, 0.6)):
        model = ConditionedCodec(codec, [PHASES[number + 1]], speaker_encoder="simple")
        figure = {"mean": secs, "n_ok": 2, "n": 2, "unit": "", "direction": "up"}
        model.evaluation = {"weights": digest_of(model.attached), "metrics": {"secs": figure}, "about": {}}
        model.save_pretrained(folder / f"adapter_{number}")
    monkeypatch.setattr(checkpoint, "ASSETS", folder)
    return folder


def test_the_best_adapter_is_used_and_named(
    assets: Path, tmp_path: Path, voices: list[Path], capsys: pytest.CaptureFixture[str], refusal: Callable[..., str]
) -> None:
    assert bundled_adapters() == ["adapter_0", "adapter_1"]
    assert best_adapter(None) == best_adapter("tiny") == "adapter_1"
    out = tmp_path / "c.wav"
    assert runner("convert", "--source", voices[0], "--target", voices[1], "--out", out) == 0
    assert "using the bundled adapter adapter_1" in capsys.readouterr().err
    named = tmp_path / "d.wav"
    command = ["convert", "--source", voices[0], "--target", voices[1], "--out", named, "--run"]
    assert runner(*command, "adapter_1") == 0
    assert named.read_bytes() == out.read_bytes()
    assert "did you mean 'adapter_1'?" in refusal(*command, "adaptor_1")
    assert "bundled: adapter_0 (for tiny), adapter_1 (for tiny)" in refusal(*command[:-1], "--base", "other")


def test_the_best_adapter_for_a_stored_embedding_needs_no_speech(assets: Path) -> None:
    codec = SNAC.from_pretrained("tiny")
    settings = {PHASES[2]: {"adapter_type": "codes", "hidden_dim": 8, "attention_heads": 2}}
    model = ConditionedCodec(codec, [PHASES[2]], speaker_encoder="simple", config=settings)
    figure = {"mean": 1.0, "n_ok": 2, "n": 2, "unit": "", "direction": "up"}
    model.evaluation = {"weights": digest_of(model.attached), "metrics": {"secs": figure}, "about": {}}
    model.save_pretrained(assets / "adapter_2")
    assert best_adapter("tiny") == "adapter_2"
    assert best_adapter("tiny", ["a.wav", "b.NPY"]) == "adapter_1"


def test_an_adapter_on_another_base_is_refused(assets: Path, bench: Bench) -> None:
    with pytest.raises(UserError, match="belongs to base 'tiny'"):
        ConditionedCodec.from_pretrained("adapter_0", codec=bench.base)


def test_a_folder_of_the_name_is_given_by_its_path(assets: Path, tmp_path: Path) -> None:
    shutil.copytree(assets / "adapter_0", tmp_path / "adapter_1")
    strategies = ConditionedCodec.from_pretrained(tmp_path / "adapter_1").strategies
    assert list(strategies) == [PHASES[1]]
