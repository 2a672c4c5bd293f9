"""What holds for every speaker encoder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import torch
from torch import Tensor, nn

from snac_core.errors import UserError
from snac_core.seeding import generator
from snac_core.speakers import ecapa
from snac_core.speakers.encoder import SpeakerEncoder, load_speaker_encoder

SAY = """
import sys, torch, warnings
warnings.simplefilter("ignore")
from snac_core.speakers import load_speaker_encoder
encoder = load_speaker_encoder(sys.argv[1])
audio = torch.sin(torch.arange(24000) * 0.05).view(1, 1, -1) * 0.1
print(encoder.digest, *[f"{x:.6f}" for x in encoder(audio, 16000)[0].tolist()])
"""


def sound(items: int, seconds: float, *parts: object, sample_rate: int = 16000) -> Tensor:
    """Buzzes of different pitch in noise, (items, 1, T)."""
    time = torch.arange(int(seconds * sample_rate)) / sample_rate
    pitch = torch.linspace(90, 260, items)[:, None]
    buzz = (1.2 * torch.sin(2 * torch.pi * pitch * time)).exp() - 1.3
    noise = torch.randn(items, len(time), generator=generator("sound", items, *parts))
    return (0.04 * buzz + 0.01 * noise).unsqueeze(1)


@pytest.mark.parametrize("seconds", [0.1, 0.5, 1.0, 2.7])
def test_an_embedding_is_a_finite_unit_vector_at_any_length(encoder: SpeakerEncoder, seconds: float) -> None:
    embedding = encoder(sound(3, seconds), 16000)
    assert embedding.shape == (3, encoder.dim)
    assert embedding.isfinite().all()
    assert torch.allclose(embedding.norm(dim=-1), torch.ones(3), atol=1e-5)


def test_silence_has_a_finite_embedding_and_gradient(encoder: SpeakerEncoder) -> None:
    audio = torch.zeros(2, 1, 16000, requires_grad=True)
    embedding = encoder(audio, 16000)
    embedding.sum().backward()
    assert embedding.isfinite().all()
    assert audio.grad is not None
    assert audio.grad.isfinite().all()


def test_an_item_does_not_depend_on_its_batch(encoder: SpeakerEncoder) -> None:
    audio = sound(5, 1.3)
    together = encoder(audio, 16000)
    alone = torch.cat([encoder(item[None], 16000) for item in audio])
    assert torch.allclose(together, alone, atol=2e-6)
    turned = encoder(audio.flip(0), 16000).flip(0)
    assert torch.allclose(together, turned, atol=2e-6)


def test_another_process_computes_the_same_embedding_and_digest(encoder: SpeakerEncoder) -> None:
    command = [sys.executable, "-c", SAY, encoder.name]
    said = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    digest, *numbers = said.stdout.split()
    audio = torch.sin(torch.arange(24000) * 0.05).view(1, 1, -1) * 0.1
    here = encoder(audio, 16000)[0]
    assert digest == encoder.digest
    assert torch.allclose(here, torch.tensor([float(n) for n in numbers]), atol=3e-6)


def test_training_a_model_around_it_changes_nothing(fresh_encoder: SpeakerEncoder) -> None:
    audio = sound(4, 1.0)
    before = {key: value.clone() for key, value in fresh_encoder.state_dict().items()}
    expected = fresh_encoder(audio, 16000)
    around = nn.ModuleList([fresh_encoder, nn.Linear(2, 2)]).train()
    fresh_encoder(audio, 16000)
    assert around.training
    assert not any(module.training for module in fresh_encoder.modules())
    assert not any(parameter.requires_grad for parameter in fresh_encoder.parameters())
    assert all(torch.equal(value, before[key]) for key, value in fresh_encoder.state_dict().items())
    assert torch.equal(fresh_encoder(audio, 16000), expected)


def test_the_gradient_with_respect_to_the_waveform_agrees_with_finite_differences(
    fresh_encoder: SpeakerEncoder,
) -> None:
    encoder = fresh_encoder.double()
    audio = sound(1, 0.4, sample_rate=24000).double().requires_grad_()
    goal = encoder(sound(1, 0.5, "goal").double(), 16000)

    def similarity(wave: Tensor) -> Tensor:
        return (encoder(wave, 24000) * goal).sum()

    similarity(audio).backward()
    gradient = audio.grad
    assert gradient is not None
    assert gradient.isfinite().all()
    assert gradient.norm() > 0
    step = 1e-8  # small, or the ReLUs switch
    for trial in range(4):
        direction = torch.randn(audio.shape, generator=generator("direction", trial), dtype=torch.float64)
        with torch.no_grad():
            ahead, behind = similarity(audio + step * direction), similarity(audio - step * direction)
        assert ((ahead - behind) / (2 * step)).item() == pytest.approx((gradient * direction).sum().item(), rel=1e-4)


def test_other_sample_rates_are_resampled(encoder: SpeakerEncoder) -> None:
    # Harmonics up to 3.9 kHz exist at every one of these rates.
    def vowel(rate: int) -> Tensor:
        time = torch.arange(int(1.5 * rate)) / rate
        return sum((torch.sin(2 * torch.pi * 130 * n * time) / n for n in range(1, 31)), torch.zeros(1, 1, 1)) * 0.05

    native = encoder(vowel(16000), 16000)
    for rate in (24000, 32000, 44100):
        assert (encoder(vowel(rate), rate) * native).sum() > 0.98


def test_two_instances_have_one_digest_and_other_weights_have_another(
    encoder: SpeakerEncoder, fresh_encoder: SpeakerEncoder
) -> None:
    assert fresh_encoder.digest == encoder.digest
    assert len(encoder.digest) == 64
    with torch.no_grad():
        next(fresh_encoder.parameters()).mul_(1.001)
    assert fresh_encoder.freeze().digest != encoder.digest


@pytest.mark.parametrize(
    ("audio", "rate", "said"),
    [
        (torch.zeros(16000), 16000, r"mono audio \(B, 1, T\), got \(16000,\)"),
        (torch.zeros(2, 2, 16000), 16000, r"mono audio \(B, 1, T\), got \(2, 2, 16000\)"),
        (torch.zeros(1, 1, 16000, dtype=torch.int16), 16000, r"float audio of full scale 1, got torch.int16"),
        (torch.zeros(1, 1, 800), 16000, r"at least 0.1 s of audio, got 0.050 s"),
        (torch.zeros(1, 1, 16000), 16000.0, r"whole number of Hz, got 16000.0"),
        (torch.zeros(1, 1, 16000), 0, r"whole number of Hz, got 0"),
    ],
)
def test_audio_that_cannot_be_embedded_is_the_users_error(
    encoder: SpeakerEncoder, audio: Tensor, rate: int, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        encoder(audio, rate)


def test_gradients_pass_under_autocast_and_the_embedding_stays_the_same(encoder: SpeakerEncoder) -> None:
    audio = sound(2, 1.0).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        embedding = encoder(audio, 16000)
    assert torch.equal(embedding, encoder(audio, 16000))
    embedding[:, 0].sum().backward()
    assert audio.grad is not None
    assert audio.grad.isfinite().all()


@pytest.mark.parametrize(("name", "apart", "found"), [("ge2e", 0.25, 1.0), ("ecapa_tiny", 0.25, 0.85)])
def test_real_speakers_are_closer_to_themselves_than_to_others(
    librispeech_mini: Path, name: str, apart: float, found: float
) -> None:
    encoder = load_speaker_encoder(name)
    embeddings = []
    for folder in sorted((librispeech_mini / "dev").iterdir()):
        for file in sorted(folder.glob("*.flac"))[:4]:
            samples, rate = soundfile.read(file, dtype="float32", frames=48000)
            embeddings.append(encoder(torch.from_numpy(samples).view(1, 1, -1), rate))
    cosine = torch.cat(embeddings) @ torch.cat(embeddings).T
    label = torch.arange(len(cosine)) // 4
    same = label[:, None] == label
    assert cosine[same].mean() - cosine[~same].mean() > apart
    assert (cosine.fill_diagonal_(-1).argmax(1) // 4 == label).float().mean() >= found


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match="unknown speaker encoder 'ecapa_tni'; did you mean 'ecapa_tiny'"):
        load_speaker_encoder("ecapa_tni")


@pytest.mark.parametrize("name", ["ecapa_tiny", "ge2e", "simple"])
def test_weights_that_are_missing_or_of_something_else_are_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"no file .*nowhere\.pt"):
        load_speaker_encoder(name, weights=tmp_path / "nowhere.pt")
    torch.save({"model_state": {"x": torch.zeros(3)}}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=rf"other\.pt does not fit speaker encoder '{name}'"):
        load_speaker_encoder(name, weights=tmp_path / "other.pt")
    (tmp_path / "broken.pt").write_bytes(b"no weights")
    with pytest.raises(UserError, match=rf"broken\.pt does not load as weights of speaker encoder '{name}'"):
        load_speaker_encoder(name, weights=tmp_path / "broken.pt")


def test_the_untrained_encoder_says_so_loudly() -> None:
    with pytest.warns(UserWarning, match="'simple' is UNTRAINED"):
        load_speaker_encoder("simple")


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, snac_core.speakers; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_bundled_weights_are_under_8_megabytes_with_a_model_card() -> None:
    assert ecapa.ASSET.stat().st_size < 8e6
    assert "Not good for" in (ecapa.ASSET.parent / "README.md").read_text()


def test_without_the_bundled_weights_the_error_says_how_to_get_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(ecapa, "ASSET", tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"no weights of speaker encoder 'ecapa_tiny' at .*without them, use 'ge2e'"):
        load_speaker_encoder("ecapa_tiny")
