"""Export of encoder, quantizer and decoder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from small_codec import small
from torch import Tensor
from toy_strategies import SPEAKER_DIM, Gain, Shift, learned, speakers

from snac_core import ConditionedCodec, Conditioning, Strategy, Tap, UserError, hookimpl
from snac_core.codec.export import export

onnxruntime = pytest.importorskip("onnxruntime", reason="the extra [export] is not installed")


def run(folder: Path, part: str, **inputs: np.ndarray) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(folder / f"{part}.onnx")
    outputs: list[np.ndarray] = session.run(None, inputs)
    return outputs


@torch.no_grad()
def test_onnx_files_give_codes_and_audio_of_the_model_for_other_lengths(tmp_path: Path) -> None:
    model = learned(Shift, Gain, codec=small(attentive=True)).eval()
    done = export(model, tmp_path / "onnx")
    assert not done.failed
    about = json.loads((tmp_path / "onnx" / "export.json").read_text())
    unit, speaker = about["samples_per_unit"], speakers(1)
    for units in (1, 7):
        audio = 0.3 * torch.randn(1, 1, units * unit)
        (z,) = run(tmp_path / "onnx", "encoder", audio=audio.numpy(), speaker=speaker.numpy())
        codes = run(tmp_path / "onnx", "quantizer", z=z)
        expected = model.encode(audio, speaker)
        assert all(np.array_equal(a, b.numpy()) for a, b in zip(codes, expected, strict=True))
        lengths = {
            name: units * tensor["per_unit"]
            for name, tensor in about["parts"]["decoder"]["inputs"].items()
            if name.startswith("noise")
        }
        noise = {name: torch.randn(1, 1, length) for name, length in lengths.items()}
        with model.codec.noise.given(list(noise.values())):
            audio_hat = model.decode(expected, speaker)
        named = {f"codes_{level}": indices for level, indices in enumerate(codes)}
        given = {**named, **{name: tensor.numpy() for name, tensor in noise.items()}, "speaker": speaker.numpy()}
        np.testing.assert_allclose(run(tmp_path / "onnx", "decoder", **given)[0], audio_hat.numpy(), atol=1e-4)


@torch.no_grad()
def test_a_part_has_a_speaker_only_where_a_strategy_acts_and_archives_of_torch_run(tmp_path: Path) -> None:
    model = learned(Shift).eval()
    assert not export(model, tmp_path, "torch").failed
    parts = json.loads((tmp_path / "export.json").read_text())["parts"]
    assert "speaker" in parts["encoder"]["inputs"]
    assert "speaker" not in parts["decoder"]["inputs"]
    encoder = torch.export.load(tmp_path / "encoder.pt2").module()
    audio, speaker = torch.randn(1, 1, 480), speakers(1)
    torch.testing.assert_close(encoder(audio, speaker), model.latents(audio, Conditioning(speaker)).z)


class Branching(Strategy):
    """Looks at the values of its input, which no trace can follow."""

    name = "branching"

    @hookimpl
    def before_vq(self, x: Tensor, cond: Conditioning, tap: Tap) -> Tensor:
        return x + cond.speaker.mean() if float(x.mean()) > 0 else x - 1


class Drawing(Strategy):
    """Draws random numbers, so that no two results agree."""

    name = "drawing"

    @hookimpl
    def after_vq(self, x: Tensor, cond: Conditioning, tap: Tap) -> Tensor:
        return x + torch.rand_like(x)


def test_parts_that_cannot_be_traced_or_differ_are_named_and_the_others_written(tmp_path: Path) -> None:
    model = ConditionedCodec(small(), [Branching, Drawing], speaker_dim=SPEAKER_DIM).eval()
    done = export(model, tmp_path, "torch")
    assert set(done.failed) == {"encoder", "decoder"}
    assert "data-dependent" in done.failed["encoder"]
    assert "samples differ from the model's by" in done.failed["decoder"]
    assert {path.name for path in tmp_path.iterdir()} == {"quantizer.pt2", "export.json"}
    assert json.loads((tmp_path / "export.json").read_text())["failed"] == done.failed


def test_bad_requests_are_refused(tmp_path: Path) -> None:
    model = learned(Shift).eval()
    (tmp_path / "file").write_text("kept")
    with pytest.raises(UserError, match="not an empty folder"):
        export(model, tmp_path)
    with pytest.raises(UserError, match="did you mean 'onnx'"):
        export(model, tmp_path / "new", "onx")
    with pytest.raises(UserError, match="float32 on the CPU"):
        export(model.half(), tmp_path / "new")
    assert not (tmp_path / "new").exists()
