"""What the training of the recogniser rests on: sentences, pieces, batches, and a loop that can be stopped."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from phone_data import UNKNOWN, Material, Piece, Word, _cut, piece, restore, say_all, store, through_codec
from phone_recogniser import Settings, train_phones, warp_bands
from snac_core import SNAC
from snac_core.errors import UserError
from snac_runner.data.synth import HELD_OUT, SENTENCES
from snac_runner.evaluate.phone_recogniser import FRAME, PHONES, SAMPLE_RATE, phones_of

SETTINGS = Settings(steps=12, seconds=8.0, warm=2, alone=4)


@pytest.fixture(scope="module")
def spoken() -> list[Piece]:
    return say_all(SENTENCES[:6], ["m1", "f1"])


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_written_sentences_are_different_repeatable_and_none_of_the_built_in_ones() -> None:
    pytest.importorskip("pocketsphinx")
    from phone_data import Writer

    writer = Writer()
    texts = writer.write(200, seed=3)
    assert len(set(texts)) == 200
    assert texts == Writer().write(200, seed=3)
    assert texts != writer.write(200, seed=4)
    assert not {text.lower().rstrip(".?!") for text in SENTENCES} & set(texts)
    assert {phone for text in texts for phone in phones_of(text)} == set(PHONES)


def test_spoken_pieces_know_their_phones_and_when_each_is_said(spoken: list[Piece]) -> None:
    assert len(spoken) == 6
    for p in spoken:
        assert len(p.frames) == -(-len(p.wave) // FRAME)
        timed = [int(c) for c in torch.unique_consecutive(p.frames) if c]
        said = p.phones.tolist()
        # a phone shorter than a frame of 30 ms may fall between two
        assert len(said) - 4 <= len(timed) <= len(said)
        assert SAMPLE_RATE * 1.5 < len(p.wave) < SAMPLE_RATE * 6


def test_what_is_loud_is_timed_as_speech(spoken: list[Piece]) -> None:
    for p in spoken:
        level = p.wave[: len(p.wave) // FRAME * FRAME].float().view(-1, FRAME).square().mean(1)
        loud = level > level.median()
        assert (p.frames[: len(loud)][loud] > 0).float().mean() > 0.95


def test_pieces_come_back_from_disk_as_they_were(spoken: list[Piece], tmp_path: Path) -> None:
    untimed = piece(torch.zeros(5000), ["AA", "B"])
    store(tmp_path / "pieces.safetensors", [*spoken, untimed])
    for before, after in zip([*spoken, untimed], restore(tmp_path / "pieces.safetensors"), strict=True):
        assert all(torch.equal(getattr(before, name), getattr(after, name)) for name in ("wave", "phones", "frames"))


def test_a_batch_is_a_function_of_seed_and_step_and_holds_whole_pieces(spoken: list[Piece]) -> None:
    untimed = [replace(p, frames=torch.zeros(0, dtype=torch.uint8)) for p in spoken[:2]]
    material = Material([(0.5, spoken), (0.5, untimed)])
    batch, again, next_one = material.batch(20.0, 0, 7), material.batch(20.0, 0, 7), material.batch(20.0, 0, 8)
    assert all(torch.equal(a, b) for a, b in zip(batch, again, strict=True))
    assert not torch.equal(batch.audio[:2, :8000], next_one.audio[:2, :8000])
    assert int(batch.counts.sum()) == len(batch.phones)
    assert batch.frames.shape == (len(batch.audio), batch.audio.shape[1] // FRAME + 1)
    for row, classes, phones in zip(batch.audio, batch.frames, batch.phones.split(batch.counts.tolist()), strict=True):
        matching = [p for p in spoken if torch.equal(p.phones.long(), phones)]
        assert any(torch.equal(row[row != 0].mul(32768).short(), p.wave[p.wave != 0]) for p in matching)
        known = classes != UNKNOWN
        assert known.all() or not known.any()


def test_readings_are_cut_between_words_and_lose_none() -> None:
    import numpy as np

    reading = [Word("" if i % 5 == 4 else f"w{i}", 0.4 * i, 0.4 * (i + 1)) for i in range(30)]
    parts = list(_cut(reading, np.random.default_rng(0)))
    assert " ".join(text for _, _, text in parts) == " ".join(w.text for w in reading if w.text)
    assert all(before[1] == after[0] for before, after in pairwise(parts))
    assert all(2 <= end - start <= 6.5 for start, end, _ in parts[:-1])


def test_the_codec_keeps_length_and_phones(spoken: list[Piece]) -> None:
    coded = through_codec(SNAC.from_pretrained("tiny").freeze(), spoken[:2], 1.0)
    assert [p.phones.tolist() for p in coded] == [p.phones.tolist() for p in spoken[:2]]
    assert [len(p.wave) for p in coded] == [len(p.wave) for p in spoken[:2]]
    assert not torch.equal(coded[0].wave, spoken[0].wave)


def test_warping_moves_a_peak_along_the_bands_and_by_nothing_when_asked_for_nothing() -> None:
    features = torch.zeros(64, 80, 3)
    features[:, 40] = 1.0
    draw = torch.Generator().manual_seed(0)
    assert torch.equal(warp_bands(features, 0.0, draw), features)
    peaks = warp_bands(features, 0.12, draw).argmax(1)[:, 0]
    assert 35 <= int(peaks.min()) < 40 < int(peaks.max()) <= 46


def test_a_short_training_lowers_the_loss_and_a_stopped_one_goes_on_exactly(
    spoken: list[Piece], tmp_path: Path
) -> None:
    material = Material([(1.0, spoken)])
    lines: list[dict[str, float]] = []
    whole = train_phones(material, material, SETTINGS, report=lines.append, every=4)
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]

    class Stop(Exception):
        pass

    def stop(line: dict[str, float]) -> None:
        if line["step"] == 8:
            raise Stop

    state = tmp_path / "state.pt"
    with pytest.raises(Stop):
        train_phones(material, material, SETTINGS, state=state, report=stop, every=4)
    resumed = train_phones(material, material, SETTINGS, state=state, every=4)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    with pytest.raises(UserError, match="give a new folder"):
        train_phones(material, material, replace(SETTINGS, lr=1e-4), state=state)


def test_the_voices_that_studies_test_on_are_not_trained_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("pocketsphinx")
    import phone_data
    import phone_recogniser

    used: list[str] = []

    def say(texts: list[str], voices: tuple[str, ...], seed: int) -> list[Piece]:
        used.extend(voices)
        return say_all(texts, voices[:2], seed)

    monkeypatch.setattr(phone_data, "say_all", say)
    monkeypatch.setitem(phone_recogniser.CODED, "synthetic", 1.0)
    first, everything = phone_recogniser.gather(tmp_path, [], "tiny", sentences=4, say=lambda line: None)
    assert used
    assert not set(used) & set(HELD_OUT)
    assert len(everything.pieces) == 2 * len(first.pieces)
