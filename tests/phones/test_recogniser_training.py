"""The recipe of the phone recogniser: sentences, clips, batches, and a training that can be resumed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import phone_recogniser
from phone_data import (
    UNKNOWN,
    Clip,
    ClipSampler,
    Word,
    coded_clips,
    cut_transcript,
    load_clips,
    make_clip,
    save_clips,
    synthesize_clips,
)
from snac_core import SNAC
from snac_core.errors import UserError
from snac_runner.data.synth import HELD_OUT, SENTENCES
from snac_runner.evaluate.phone_recogniser import FRAME, PHONES, SAMPLE_RATE, PhoneRecogniser, phones_of

SHORT: dict[str, Any] = {"steps": 12, "batch_seconds": 8.0, "warmup_steps": 2, "clean_steps": 4, "log_every": 4}


@pytest.fixture(scope="module")
def spoken() -> list[Clip]:
    return synthesize_clips(SENTENCES[:6], ["m1", "f1"])


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_written_sentences_are_different_repeatable_and_none_of_the_built_in_ones() -> None:
    pytest.importorskip("pocketsphinx")
    from phone_data import SentenceGenerator

    generator = SentenceGenerator()
    texts = generator.sentences(200, seed=3)
    assert len(set(texts)) == 200
    assert texts == SentenceGenerator().sentences(200, seed=3)
    assert texts != generator.sentences(200, seed=4)
    assert not {text.lower().rstrip(".?!") for text in SENTENCES} & set(texts)
    assert {phone for text in texts for phone in phones_of(text)} == set(PHONES)


def test_spoken_clips_know_their_phones_and_when_each_is_said(spoken: list[Clip]) -> None:
    assert len(spoken) == 6
    for p in spoken:
        assert len(p.frames) == -(-len(p.wave) // FRAME)
        timed = [int(c) for c in torch.unique_consecutive(p.frames) if c]
        said = p.phones.tolist()
        # a phone shorter than a frame of 30 ms may fall between two
        assert len(said) - 4 <= len(timed) <= len(said)
        assert SAMPLE_RATE * 1.5 < len(p.wave) < SAMPLE_RATE * 6


def test_what_is_loud_is_timed_as_speech(spoken: list[Clip]) -> None:
    for p in spoken:
        level = p.wave[: len(p.wave) // FRAME * FRAME].float().view(-1, FRAME).square().mean(1)
        loud = level > level.median()
        assert (p.frames[: len(loud)][loud] > 0).float().mean() > 0.95


def test_clips_come_back_from_disk_as_they_were(spoken: list[Clip], tmp_path: Path) -> None:
    untimed = make_clip(torch.zeros(5000), ["AA", "B"])
    save_clips(tmp_path / "clips.safetensors", [*spoken, untimed])
    for before, after in zip([*spoken, untimed], load_clips(tmp_path / "clips.safetensors"), strict=True):
        assert all(torch.equal(getattr(before, name), getattr(after, name)) for name in ("wave", "phones", "frames"))


def test_a_batch_is_a_function_of_seed_and_step_and_holds_whole_clips(spoken: list[Clip]) -> None:
    untimed = [replace(p, frames=torch.zeros(0, dtype=torch.uint8)) for p in spoken[:2]]
    sampler = ClipSampler([(0.5, spoken), (0.5, untimed)])
    batch, again, next_one = sampler.batch(20.0, 0, 7), sampler.batch(20.0, 0, 7), sampler.batch(20.0, 0, 8)
    assert all(torch.equal(a, b) for a, b in zip(batch, again, strict=True))
    assert not torch.equal(batch.audio[:2, :8000], next_one.audio[:2, :8000])
    assert int(batch.counts.sum()) == len(batch.phones)
    assert batch.frames.shape == (len(batch.audio), batch.audio.shape[1] // FRAME + 1)
    for row, classes, phones in zip(batch.audio, batch.frames, batch.phones.split(batch.counts.tolist()), strict=True):
        matching = [p for p in spoken if torch.equal(p.phones.long(), phones)]
        assert any(torch.equal(row[row != 0].mul(32768).short(), p.wave[p.wave != 0]) for p in matching)
        known = classes != UNKNOWN
        assert known.all() or not known.any()


def test_transcripts_are_cut_between_words_and_lose_none() -> None:
    import numpy as np

    words = [Word("" if i % 5 == 4 else f"w{i}", 0.4 * i, 0.4 * (i + 1)) for i in range(30)]
    parts = list(cut_transcript(words, np.random.default_rng(0)))
    assert " ".join(text for _, _, text in parts) == " ".join(w.text for w in words if w.text)
    assert all(before[1] == after[0] for before, after in pairwise(parts))
    assert all(2 <= end - start <= 6.5 for start, end, _ in parts[:-1])


def test_the_codec_keeps_length_and_phones(spoken: list[Clip]) -> None:
    coded = coded_clips(SNAC.from_pretrained("tiny").freeze(), spoken[:2], 1.0)
    assert [p.phones.tolist() for p in coded] == [p.phones.tolist() for p in spoken[:2]]
    assert [len(p.wave) for p in coded] == [len(p.wave) for p in spoken[:2]]
    assert not torch.equal(coded[0].wave, spoken[0].wave)


def test_warping_moves_a_peak_along_the_bands_and_by_nothing_when_asked_for_nothing() -> None:
    features = torch.zeros(64, 80, 3)
    features[:, 40] = 1.0
    draw = torch.Generator().manual_seed(0)
    assert torch.equal(phone_recogniser.warp_bands(features, 0.0, draw), features)
    peaks = phone_recogniser.warp_bands(features, 0.12, draw).argmax(1)[:, 0]
    assert 35 <= int(peaks.min()) < 40 < int(peaks.max()) <= 46


@pytest.fixture
def prepared(spoken: list[Clip], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the synthetic clips of a training."""
    monkeypatch.setitem(phone_recogniser.CODED, "synthetic", 1.0)
    save_clips(tmp_path / "prepared" / "material" / "synthetic.safetensors", spoken)
    return tmp_path / "prepared"


def test_a_short_training_lowers_the_loss_and_a_stopped_one_resumes_exactly(prepared: Path, tmp_path: Path) -> None:
    shutil.copytree(prepared, tmp_path / "whole")
    phone_recogniser.train(tmp_path / "whole", **SHORT)
    records = [json.loads(line) for line in (tmp_path / "whole" / "training.jsonl").read_text().splitlines()]
    assert records[-1]["loss"] < 0.8 * records[0]["loss"]

    phone_recogniser.train(prepared, **SHORT, stop_at=8)
    assert not (prepared / "model.safetensors").exists()
    with pytest.raises(UserError, match="give a new folder"):
        phone_recogniser.train(prepared, **{**SHORT, "batch_seconds": 4.0})
    with pytest.raises(UserError, match="are of other seed; expected the same, or a new folder"):
        phone_recogniser.train(prepared, **{**SHORT, "seed": 7})
    phone_recogniser.train(prepared, **SHORT)
    whole, resumed = (load_file(folder / "model.safetensors") for folder in (tmp_path / "whole", prepared))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    again = [json.loads(line) for line in (prepared / "training.jsonl").read_text().splitlines()]
    assert [r | {"seconds": 0} for r in again] == [r | {"seconds": 0} for r in records]
    assert PhoneRecogniser(prepared / "model.safetensors")(torch.zeros(1, 16000), 16000) is not None
    with pytest.raises(UserError, match="holds a trained recogniser"):
        phone_recogniser.train(prepared, **SHORT)


def test_the_voices_that_studies_test_on_are_not_trained_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("pocketsphinx")
    used: list[str] = []

    def synthesize(texts: list[str], voices: tuple[str, ...], seed: int) -> list[Clip]:
        used.extend(voices)
        return synthesize_clips(texts, voices[:2], seed)

    monkeypatch.setattr(phone_recogniser, "synthesize_clips", synthesize)
    monkeypatch.setitem(phone_recogniser.CODED, "synthetic", 1.0)
    clean, everything = phone_recogniser.prepare_clips(tmp_path, [], "tiny", sentences=4)
    assert used
    assert not set(used) & set(HELD_OUT)
    assert len(everything.clips) == 2 * len(clean.clips)


@pytest.mark.parametrize("recipe", ["phone_recogniser", "speaker_encoder"])
@pytest.mark.parametrize("command", ["train", "compare"])
def test_the_recipes_run_as_commands(recipe: str, command: str) -> None:
    path = Path(phone_recogniser.__file__).with_name(f"{recipe}.py")
    done = subprocess.run([sys.executable, str(path), command, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--data" in done.stdout
