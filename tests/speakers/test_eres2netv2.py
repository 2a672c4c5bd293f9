"""`eres2netv2`: Kaldi's features, and the names and shapes of the released checkpoint."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path

import pytest
import torch
import torchaudio.compliance.kaldi as kaldi
from hypothesis import given, settings
from hypothesis import strategies as st

from snac_core.errors import UserError
from snac_core.seeding import generator
from snac_core.speakers import eres2netv2
from snac_core.speakers.encoder import load_speaker_encoder
from snac_core.speakers.eres2netv2 import ERes2NetV2Network
from snac_core.speakers.features import KaldiFbank


@settings(max_examples=20, deadline=None)
@given(samples=st.integers(400, 20000), level=st.floats(1e-3, 1.0), seed=st.integers(0, 99))
def test_the_features_are_those_of_kaldi(samples: int, level: float, seed: int) -> None:
    audio = level * torch.randn(2, samples, generator=generator("fbank", seed))
    expected = [kaldi.fbank(w[None], num_mel_bins=80, sample_frequency=16000, dither=0.0) for w in audio]
    assert torch.allclose(KaldiFbank()(audio), torch.stack(expected).transpose(1, 2), atol=2e-3)


def test_silence_has_kaldis_floor_and_no_gradient_that_is_not_finite() -> None:
    audio = torch.zeros(1, 1000, requires_grad=True)
    bands = KaldiFbank()(audio)
    expected = kaldi.fbank(torch.zeros(1, 1000), num_mel_bins=80, sample_frequency=16000, dither=0.0)
    assert torch.allclose(bands[0].T, expected)
    bands.sum().backward()
    assert audio.grad is not None
    assert audio.grad.isfinite().all()


def test_parameter_names_and_shapes_are_those_of_the_released_checkpoint() -> None:
    with torch.device("meta"):
        state = ERes2NetV2Network().state_dict()
    lines = "".join(f"{key}\t{','.join(map(str, value.shape)) or 'scalar'}\n" for key, value in state.items())
    assert len(state) == 1001
    # sha256 of "name<TAB>shape" lines of pretrained_eres2netv2w24s4ep4.ckpt, in its order
    assert (
        hashlib.sha256(lines.encode()).hexdigest() == "ef5fbafc9dfb1e9159c12a3d3ec6e248d190d0e9b6cd1e86705772e0eacb44c3"
    )


def test_it_loads_its_weights_and_is_differentiable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = partial(ERes2NetV2Network, width=8, blocks=(1, 1, 1, 1))
    monkeypatch.setattr(eres2netv2, "ERes2NetV2Network", narrow)
    torch.save(narrow().state_dict(), tmp_path / "weights.ckpt")
    for name in ("eres2netv2", "eres2netv2_map"):
        encoder = load_speaker_encoder(name, weights=tmp_path / "weights.ckpt").double()
        audio = (0.1 * torch.randn(2, 1, 4000, generator=generator(name), dtype=torch.float64)).requires_grad_()
        embedding = encoder(audio, 16000)
        assert torch.allclose(embedding.norm(dim=-1), torch.ones(2, dtype=torch.float64))
        assert torch.allclose(embedding[1:], encoder(audio[1:], 16000))
        goal = torch.randn(embedding.shape, generator=generator("goal"), dtype=torch.float64)
        gradient = torch.autograd.grad((embedding * goal).sum(), audio)[0]
        direction = torch.randn(audio.shape, generator=generator("direction"), dtype=torch.float64)
        with torch.no_grad():
            ahead, behind = (encoder(audio + step * direction, 16000) for step in (1e-9, -1e-9))
        slope = (((ahead - behind) * goal).sum() / 2e-9).item()
        assert slope == pytest.approx((gradient * direction).sum().item(), rel=1e-3)


def test_the_shortest_audio_it_takes_has_an_embedding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = partial(ERes2NetV2Network, width=8, blocks=(1, 1, 1, 1))
    monkeypatch.setattr(eres2netv2, "ERes2NetV2Network", narrow)
    torch.save(narrow().state_dict(), tmp_path / "weights.ckpt")
    monkeypatch.setenv("SNAC_ERES2NETV2", str(tmp_path / "weights.ckpt"))  # what commands, without a path, read
    encoder = load_speaker_encoder("eres2netv2")
    assert encoder(0.1 * torch.randn(1, 1, 3200), 16000).isfinite().all()
    with pytest.raises(UserError, match=r"at least 0\.2 s"):
        encoder(torch.zeros(1, 1, 3000), 16000)


@pytest.mark.parametrize("name", ["eres2netv2", "eres2netv2_map"])
def test_without_weights_one_line_says_what_to_download_and_what_to_use_instead(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SNAC_ERES2NETV2", raising=False)
    with pytest.raises(
        UserError, match=r"download pretrained_eres2netv2w24s4ep4\.ckpt .* use 'ecapa_tiny' or 'ge2e'"
    ) as e:
        load_speaker_encoder(name)
    assert "\n" not in str(e.value)
