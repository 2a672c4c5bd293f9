"""Loading keeps the physics: pitch, level and length survive mixing and resampling."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tones import write_tone

from snac_core.errors import UserError
from snac_runner.data.audio import audio_pieces, load_audio, resample, resampled
from snac_runner.data.corpus import Utterance


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
@pytest.mark.parametrize("channels", [1, 2])
def test_a_tone_keeps_pitch_level_and_length_at_any_rate(tmp_path: Path, rate: int, channels: int) -> None:
    audio = load_audio(write_tone(tmp_path / "a.wav", 1.0, rate, hz=440.0, channels=channels), 24000)
    assert audio.shape == (1, 24000)
    assert audio.dtype == torch.float32
    wanted = 0.2 * np.sin(2 * np.pi * 440 * np.arange(24000) / 24000)
    assert np.abs(audio[0].numpy() - wanted)[1000:-1000].max() < 1e-3


def test_what_lies_above_the_new_nyquist_frequency_dies(tmp_path: Path) -> None:
    audio = load_audio(write_tone(tmp_path / "a.wav", 1.0, 48000, hz=9000.0), 16000)
    assert float(audio[0, 1000:-1000].abs().max()) < 1e-4


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3", "opus"])
def test_every_format_is_read(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    tone = 0.2 * np.sin(2 * np.pi * 440 * np.arange(48000) / 48000)
    if suffix == "opus":
        soundfile.write(path, tone, 48000, format="OGG", subtype="OPUS")
    else:
        soundfile.write(path, tone, 48000)
    audio = load_audio(path, 16000)
    assert audio.shape[-1] == pytest.approx(16000, abs=1600)
    assert float(audio.square().mean().sqrt()) == pytest.approx(0.2 / 2**0.5, rel=0.1)


def test_a_part_of_an_utterance_is_cut_where_asked(tmp_path: Path) -> None:
    path = tmp_path / "ramp.wav"
    soundfile.write(path, np.arange(16000) / 16000, 16000, subtype="FLOAT")
    stretch = Utterance("a", path, "ann", seconds=0.5, sample_rate=16000, start=0.25)
    assert load_audio(stretch, 16000)[0, [0, -1]].tolist() == pytest.approx([0.25, 0.75 - 1 / 16000])
    part = load_audio(stretch, 16000, start=0.1, seconds=0.2)
    assert part.shape == (1, 3200)
    assert float(part[0, 0]) == pytest.approx(0.35)
    assert load_audio(stretch, 16000, start=0.4, seconds=9).shape == (1, 1600)
    assert load_audio(path, 16000, start=0.9).shape == (1, 1600)


def test_what_cannot_be_loaded_is_an_error_of_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no audio file"):
        load_audio(tmp_path / "a.wav", 16000)
    (tmp_path / "b.wav").write_text("words")
    with pytest.raises(UserError, match=r"cannot decode .*b.wav"):
        load_audio(tmp_path / "b.wav", 16000)
    path = write_tone(tmp_path / "c.wav", 1.0)
    with pytest.raises(UserError, match=r"is 1.00 s long; nothing to read at 2.00 s"):
        load_audio(path, 16000, start=2.0)


def test_the_samples_do_not_depend_on_the_number_of_threads(tmp_path: Path) -> None:
    path = write_tone(tmp_path / "a.wav", 2.0, 22050)
    threads = torch.get_num_threads()
    audio = load_audio(path, 16000)
    assert torch.get_num_threads() == threads
    try:
        torch.set_num_threads(1)
        assert torch.equal(load_audio(path, 16000), audio)
    finally:
        torch.set_num_threads(threads)


@given(
    source=st.sampled_from([8000, 11025, 16000, 24000, 44100, 48000]),
    target=st.sampled_from([16000, 24000, 44100]),
    samples=st.integers(1, 60_000),
    piece=st.integers(500, 70_000),
)
@settings(deadline=None, max_examples=20)
def test_resampling_in_pieces_gives_the_whole(source: int, target: int, samples: int, piece: int) -> None:
    audio = torch.randn(1, samples, generator=torch.Generator().manual_seed(samples))
    whole = resample(audio, source, target)
    joined = torch.cat(list(resampled(audio.split(piece, dim=-1), source, target)), dim=-1)
    torch.testing.assert_close(joined, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_a_file_is_read_in_pieces(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, 0.1 * np.random.default_rng(0).standard_normal((70_000, 2)), 22050)
    pieces = list(audio_pieces(path, 16000, seconds=0.7))
    assert len(pieces) > 3
    torch.testing.assert_close(torch.cat(pieces, dim=-1), load_audio(path, 16000), rtol=0, atol=1e-5)


def test_pieces_of_what_is_no_speech_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no audio file"):
        list(audio_pieces(tmp_path / "none.wav", 16000))
    (tmp_path / "text.wav").write_text("text")
    with pytest.raises(UserError, match="cannot decode"):
        list(audio_pieces(tmp_path / "text.wav", 16000))
    soundfile.write(tmp_path / "nan.wav", np.full(30_000, np.nan), 16000, subtype="FLOAT")
    with pytest.raises(UserError, match="NaN or infinite"):
        list(audio_pieces(tmp_path / "nan.wav", 16000, seconds=1.0))
