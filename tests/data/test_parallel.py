"""Where a corpus has the same words from several speakers, a batch finds what its targets say with its words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from snac_runner.data.audio import load_audio
from snac_runner.data.crops import CropLoader, parallel_speech
from snac_runner.data.open_corpus import open_corpus
from snac_runner.data.synth import synthesize
from snac_runner.data.utterances import Utterances


def test_targets_say_what_the_sources_say_and_nothing_is_found_where_they_do_not(tmp_path: Path) -> None:
    corpus = open_corpus(synthesize(tmp_path / "voices", 8, 3))
    loader = CropLoader(corpus, "train", 16000, 0.4, 3, seed=0)
    batch = loader.at(5)
    others = [speaker for speaker in loader.speakers if speaker not in batch.speakers] * 3
    targets = [*batch.speakers[1:], batch.speakers[0], *others[:3]]
    found = parallel_speech(loader, 5, targets, slice(3))
    assert found is not None
    audio, lengths = found
    texts = [corpus.utterance(name).text for name in batch.utterances]
    for row, speaker in enumerate(targets):
        said = next(u for u in corpus.of_speaker(speaker) if u.text == texts[row % 3])
        wave = load_audio(said, 16000)[0]
        assert int(lengths[row]) == len(wave)
        assert torch.equal(audio[row, 0, : len(wave)], wave)
        assert not audio[row, 0, len(wave) :].any()
    own = [replace(u, text=f"{u.speaker} {u.text}") for u in loader.utterances]
    loader.utterances = Utterances.of(own, corpus.root)
    assert parallel_speech(loader, 5, targets, slice(3)) is None, "nobody says what another one says"
