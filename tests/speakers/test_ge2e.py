"""`ge2e` computes what the package its weights come from computes."""

from __future__ import annotations

import sys
import time
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from snac_core.errors import UserError
from snac_core.speakers import ge2e
from snac_core.speakers.encoder import load_speaker_encoder
from snac_core.speakers.ge2e import GE2E


@given(st.integers(min_value=1, max_value=400_000))
def test_windows_cover_the_audio_as_the_rule_says(samples: int) -> None:
    starts = ge2e.partial_starts(samples)
    covered = (starts[-1] + ge2e.PARTIAL) * ge2e.HOP
    assert starts[0] == 0
    assert set(np.diff(starts)) <= {77}  # 1.3 windows a second, in frames of 10 ms
    assert samples - covered < 0.75 * ge2e.PARTIAL * ge2e.HOP  # what is left out is a rest too short to be a window


def test_without_its_weights_the_error_says_what_to_do_and_what_to_use(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(ge2e, "ASSET", tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors: reinstall this package.*use 'ecapa_tiny'"):
        load_speaker_encoder("ge2e")


def test_weights_cut_short_are_refused(tmp_path: Path) -> None:
    cut = tmp_path / "model.safetensors"
    cut.write_bytes(ge2e.ASSET.read_bytes()[:100_000])
    with pytest.raises(UserError, match=r"does not load as weights of speaker encoder 'ge2e'"):
        GE2E(cut)


def test_weights_of_something_else_are_refused(tmp_path: Path) -> None:
    save_file({"foreign": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"does not fit speaker encoder 'ge2e'"):
        GE2E(tmp_path / "model.safetensors")


def test_the_precision_of_the_gpu_stays_as_it_was_set(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, seen = load_speaker_encoder("ge2e"), []
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    next(encoder.modules()).lstm.register_forward_pre_hook(  # type: ignore[union-attr, operator]
        lambda *_: seen.append(torch.backends.cudnn.allow_tf32)
    )
    encoder(torch.randn(1, 1, 16000), 16000)
    assert seen == [False]


def test_embedding_banks_of_before_still_fit() -> None:
    digest = (
        "13f6e39ffa8ce781e6562da7201eb88ba698c74166a48a09687569725c2f27d5"  # with the weights out of resemblyzer 0.1.4
    )
    assert load_speaker_encoder("ge2e").digest == digest


def test_a_checkpoint_as_resemblyzer_keeps_it_loads_too(tmp_path: Path) -> None:
    bundled = GE2E()
    training_only = {"similarity_weight": torch.ones(1), "similarity_bias": torch.zeros(1)}
    torch.save({"step": 1, "model_state": training_only | bundled.state_dict()}, tmp_path / "pretrained.pt")
    assert GE2E(tmp_path / "pretrained.pt").digest == bundled.digest


def test_the_package_itself_is_never_imported() -> None:
    load_speaker_encoder("ge2e")
    assert "resemblyzer" not in sys.modules


@pytest.mark.slow
def test_the_weights_are_those_of_the_package() -> None:
    file = _package().locate_file("resemblyzer/pretrained.pt")
    theirs = torch.load(str(file), map_location="cpu", weights_only=True)["model_state"]
    ours = load_file(ge2e.ASSET)
    assert set(theirs) - set(ours) == {"similarity_weight", "similarity_bias"}  # of the training loss
    for key, tensor in ours.items():
        assert tensor.dtype == theirs[key].dtype
        assert torch.equal(tensor, theirs[key])


@pytest.mark.slow
def test_every_dev_utterance_has_the_embedding_that_embed_utterance_gives(
    librispeech_mini: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    oracle = _oracle(monkeypatch)
    encoder = load_speaker_encoder("ge2e")
    files = sorted((librispeech_mini / "dev").rglob("*.flac"))
    for file in files:
        samples, rate = soundfile.read(file, dtype="float32")
        for part in (samples, samples[5000:13000]):
            ours = encoder(torch.from_numpy(part).view(1, 1, -1), rate)[0].numpy()
            assert ours @ oracle.embed_utterance(part) > 0.9999
    assert files


@pytest.mark.slow
def test_embedding_is_at_least_as_fast_as_the_package(librispeech_mini: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if find_spec("librosa") is None:
        pytest.skip("needs librosa, which the package computes its mel bands with")
    oracle, encoder = _oracle(monkeypatch), load_speaker_encoder("ge2e")
    files = sorted((librispeech_mini / "dev").rglob("*.flac"))
    waves = [soundfile.read(file, dtype="float32")[0] for file in files]
    works = {
        "ours": lambda wave: encoder(torch.from_numpy(wave).view(1, 1, -1), 16000),
        "package": oracle.embed_utterance,
    }
    taken: dict[str, list[float]] = {"ours": [], "package": []}
    for _ in range(4):
        for name, work in works.items():
            begun = time.process_time()
            with torch.no_grad():
                for wave in waves:
                    work(wave)
            taken[name].append(time.process_time() - begun)
    print(taken)
    assert min(taken["ours"]) < 1.05 * min(taken["package"])  # both are the same LSTM; 5 % is what a busy machine adds


def _package() -> metadata.Distribution:
    """resemblyzer, which is no dependency: it wants packages that nothing here needs."""
    try:
        return metadata.distribution("resemblyzer")
    except metadata.PackageNotFoundError:
        pytest.skip("needs the oracle: uv pip install --no-deps resemblyzer==0.1.4")


def _oracle(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """resemblyzer's VoiceEncoder; what only its preprocessing imports is replaced by empty modules.

    Its mel bands come from librosa where that is installed, else from `_mel_spectrogram`.
    """
    _package()
    for name in ("webrtcvad", "scipy.ndimage.morphology"):
        empty = ModuleType(name)
        empty.binary_dilation = None  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, empty)
    if find_spec("librosa") is None:
        librosa = ModuleType("librosa")
        librosa.feature = SimpleNamespace(melspectrogram=_mel_spectrogram)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "librosa", librosa)
    from resemblyzer.voice_encoder import VoiceEncoder

    for name in [n for n in sys.modules if n.split(".")[0] == "resemblyzer"]:
        monkeypatch.delitem(sys.modules, name)
    return VoiceEncoder("cpu", verbose=False)


def _mel_spectrogram(*, y: np.ndarray, sr: int, n_fft: int, hop_length: int, n_mels: int) -> np.ndarray:
    """What `librosa.feature.melspectrogram` gives by default, in numpy and float64: (n_mels, frames)."""

    def hertz(mel: np.ndarray) -> np.ndarray:  # Slaney's scale: 15 to 1 kHz straight, 27 to a factor 6.4 above
        return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp(np.log(6.4) / 27 * (mel - 15)))

    top = 15 + 27 * np.log(sr / 2000) / np.log(6.4)
    left, centre, right = np.lib.stride_tricks.sliding_window_view(hertz(np.linspace(0, top, n_mels + 2)), n_mels)
    bins = np.fft.rfftfreq(n_fft, 1 / sr)
    rise = (bins - left[:, None]) / (centre - left)[:, None]
    fall = (right[:, None] - bins) / (right - centre)[:, None]
    filters = np.clip(np.minimum(rise, fall), 0, None) * (2 / (right - left))[:, None]
    frames = np.lib.stride_tricks.sliding_window_view(np.pad(y.astype(float), n_fft // 2), n_fft)[::hop_length]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)
    return filters @ (np.abs(np.fft.rfft(frames * hann)) ** 2).T
