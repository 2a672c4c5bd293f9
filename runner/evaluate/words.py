"""Errors of an offline word recogniser: whether what was said is still said."""

from __future__ import annotations

from functools import cache

from torch import Tensor

from runner.error_rate import plain_words
from runner.evaluate.readings import errors, remembered
from runner.pretrain.words import Recogniser
from snac_core.metric import Conversion, Metric


class WER(Metric):
    """Word error rate of the converted output, capped at 1, by pocketsphinx.

    Against the text where there is one, else against the same recogniser's reading of the source.
    """

    name, unit, direction, worst, requires = "wer", "share", "down", 1.0, ("pocketsphinx",)
    outputs = ("converted",)
    role, margin = "content", 0.05

    @property
    def version(self) -> str:
        return Recogniser.version()

    def __call__(self, conversion: Conversion) -> float | None:
        return errors(conversion, plain_words, lambda audio, rate: plain_words(read_words(audio, rate)))


class CER(Metric):
    """Character error rate of the converted output, capped at 1, by pocketsphinx; see WER."""

    name, unit, direction, worst, requires = "cer", "share", "down", 1.0, ("pocketsphinx",)
    outputs = ("converted",)
    role, margin = "content", 0.05

    @property
    def version(self) -> str:
        return Recogniser.version()

    def __call__(self, conversion: Conversion) -> float | None:
        return errors(conversion, _characters, lambda audio, rate: _characters(read_words(audio, rate)))


def _characters(text: str) -> list[str]:
    return list(" ".join(plain_words(text)))


def read_words(audio: Tensor, sample_rate: int) -> str:
    """What the recogniser hears in `audio` (T,)."""
    return remembered(Recogniser.version(), audio, sample_rate, lambda: _recogniser()(audio.unsqueeze(0), sample_rate))


@cache
def _recogniser() -> Recogniser:
    return Recogniser()
