"""`runner export`, and the example that runs its files."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from small_study import runner

from snac_core import ConditionedCodec, Conditioning

PROJECT = Path(__file__).parents[2]
onnxruntime = pytest.importorskip("onnxruntime", reason="the extra [export] is not installed")


def test_the_example_says_what_it_lacks(tmp_path: Path) -> None:
    example = PROJECT / "examples" / "onnx_convert.py"
    parts = {"encoder": {"inputs": {"audio": {}, "speaker": {}}}}
    for failed, words in (({}, "give runner export the speech of a target"), ({"decoder": "x"}, "lacks decoder")):
        (tmp_path / "export.json").write_text(json.dumps({"parts": parts, "failed": failed}))
        done = subprocess.run([sys.executable, example, tmp_path, "a.wav", "b.wav"], capture_output=True, text=True)
        assert done.returncode == 1
        assert words in done.stderr


def test_the_example_converts_with_onnxruntime_and_numpy_alone(tmp_path: Path, refusal: Callable[..., str]) -> None:
    speech, exported = tmp_path / "a.wav", tmp_path / "exported"
    seconds = np.arange(24000) / 16000
    voice = sum(np.sin(2 * np.pi * 120 * k * seconds) / k for k in range(1, 20)) * (1 + np.sin(20 * seconds))
    soundfile.write(speech, 0.1 * voice, 16000)
    assert runner("export", "--run", "phase4+6_tiny", "--target", speech, "--out", exported) == 0
    alone = (
        "import runpy, sys; sys.modules.update(torch=None, snac_core=None, snac_runner=None);"
        "import numpy; numpy.random.seed(0);"
        "runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    )
    example = PROJECT / "examples" / "onnx_convert.py"
    command = [sys.executable, "-c", alone, example, exported, speech, tmp_path / "c.wav"]
    subprocess.run([str(word) for word in command], check=True, capture_output=True)
    converted, source = soundfile.read(tmp_path / "c.wav")[0], soundfile.read(speech)[0]
    model = ConditionedCodec.from_pretrained("phase4+6_tiny").eval()
    audio = torch.from_numpy(source).float()[None, None]
    speaker, reference = (torch.from_numpy(np.load(exported / f"{name}.npy")) for name in ("speaker", "reference"))
    assert torch.equal(reference, model.target(speaker, audio).extras["reference"])
    units = -(-audio.shape[-1] // model.codec.padding_multiple)
    parts = json.loads((exported / "export.json").read_text())["parts"]
    about = parts["decoder"]["inputs"]
    np.random.seed(0)
    noise = [np.random.randn(1, 1, units * about[f"noise_{block}"]["per_unit"]) for block in range(4)]
    with torch.no_grad(), model.codec.noise.given([torch.from_numpy(values).float() for values in noise]):
        expected = model.reconstruct(audio, model.target(speaker, audio)).audio[0, 0]
    np.testing.assert_allclose(converted, expected.clamp(-1, 1), atol=2 / 32768)
    assert "not an empty folder" in refusal("export", "--out", exported)

    # speech of the target may have any length, whatever that of the source
    assert parts["encoder"]["inputs"]["reference"]["shape"] == [1, model.codec.latent_dim, None]
    assert "reference" not in about, "phase 4 attends to nothing"
    encoder = onnxruntime.InferenceSession(exported / "encoder.onnx")
    padded = torch.nn.functional.pad(audio, (0, units * model.codec.padding_multiple - audio.shape[-1]))
    for frames in (3, 40):
        other = reference[..., :frames]
        given = {"audio": padded, "speaker": speaker, "reference": other}
        (z,) = encoder.run(None, {name: tensor.numpy() for name, tensor in given.items()})
        with torch.no_grad():
            found = model.codec.quantizer(torch.from_numpy(z))[1]
            wanted = model.latents(padded, Conditioning(speaker, {"reference": other})).codes
        assert all(map(torch.equal, found, wanted))
