"""Errors of an offline word recogniser: whether what was said is still said."""

from __future__ import annotations

import importlib.metadata
import re
from functools import lru_cache

from torch import Tensor

from runner.evaluate.readings import remembered
from snac_core.metric import Conversion, Metric


class WER(Metric):
    """Word error rate of the converted output, capped at 1, by pocketsphinx.

    Against the text where there is one, else against the same recogniser's reading of the source.
    """

    name, unit, direction, worst, requires = "wer", "share", "down", 1.0, ("pocketsphinx",)
    role, margin = "content", 0.05

    def __call__(self, conversion: Conversion) -> float | None:
        return _error_rate(conversion, str.split)


class CER(Metric):
    """Character error rate of the converted output, capped at 1, by pocketsphinx; see WER."""

    name, unit, direction, worst, requires = "cer", "share", "down", 1.0, ("pocketsphinx",)
    role, margin = "content", 0.05

    def __call__(self, conversion: Conversion) -> float | None:
        return _error_rate(conversion, list)


def _error_rate(conversion: Conversion, units: type[list[str]] | object) -> float | None:
    if not conversion.same_words:
        return None
    truth = plain_words(conversion.text if conversion.text else read_words(conversion.source, conversion.sample_rate))
    if not truth:
        return None  # nothing is read in the source
    return error_rate(units(truth), units(plain_words(read_words(conversion.converted, conversion.sample_rate))))  # type: ignore[operator]


def error_rate(wanted: list[str], got: list[str]) -> float:
    """Fewest insertions, deletions and substitutions that make `got` of `wanted`, per wanted unit; at most 1."""
    from runner.pretrain.words import distance

    return min(1.0, distance(wanted, got) / len(wanted))


def plain_words(text: str) -> str:
    """Lower-case words with single spaces."""
    return " ".join(re.findall(r"[a-z']+", text.lower()))


def read_words(audio: Tensor, sample_rate: int) -> str:
    """What the recogniser hears in `audio` (T,)."""
    version = importlib.metadata.version("pocketsphinx")
    return remembered(
        f"pocketsphinx {version}", audio, sample_rate, lambda: _recogniser()(audio.unsqueeze(0), sample_rate)
    )


@lru_cache(maxsize=1)
def _recogniser():  # type: ignore[no-untyped-def]
    from runner.pretrain.words import Recogniser

    return Recogniser()
