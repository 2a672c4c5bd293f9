"""Validation while a codec trains: the same utterances again and again, measured, and heard in TensorBoard."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from runner.data import Corpus, load_audio
from runner.pretrain.losses import SpectralDistance
from runner.pretrain.trainer import Trainer

SECONDS = 4.0  # of an utterance
_EACH = 2  # utterances of each corpus, of different speakers


class Listener:
    """What the averaged codec makes of fixed speech of speakers it is not trained on.

    Args:
        folder: for TensorBoard's events; they hold the audio.
        corpora: the first speakers of their dev splits are heard.
        trainer: decides the rate.
    """

    def __init__(self, folder: Path, corpora: list[tuple[Corpus, float]], trainer: Trainer) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.rate = trainer.codec.sampling_rate
        self.speech: dict[str, Tensor] = {}
        for corpus, _ in corpora:
            dev = corpus.splits.get("dev", ())
            firsts = {utterance.speaker: utterance for utterance in reversed(dev)}
            for speaker in sorted(firsts)[:_EACH]:
                self.speech[f"{corpus.name}/{speaker}"] = load_audio(firsts[speaker], self.rate, seconds=SECONDS)
        self.distance = SpectralDistance(self.rate)
        self.events = SummaryWriter(str(folder))
        if trainer.step == 0:
            for name, audio in self.speech.items():
                self.events.add_audio(f"{name}/original", audio[0], 0, self.rate)

    def hear(self, trainer: Trainer) -> dict[str, float]:
        """The distances, means over the utterances; the audio goes to TensorBoard."""
        codec = trainer.averaged().freeze()
        found: dict[str, float] = {}
        with torch.inference_mode(), codec.fixed_noise(0):
            for name, audio in self.speech.items():
                made = codec(audio.unsqueeze(0))[0]
                self.events.add_audio(f"{name}/codec", made[0, 0], trainer.step, self.rate)
                for term, value in self.distance(made, audio.unsqueeze(0)).items():
                    found[term] = found.get(term, 0.0) + float(value) / len(self.speech)
        self.events.flush()
        return found

    def close(self) -> None:
        """No more audio."""
        self.events.close()
