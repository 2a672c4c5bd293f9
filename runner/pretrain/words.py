"""Word errors of an offline recogniser, for what a codec costs in intelligibility."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from runner.data.audio import resample
from runner.error_rate import distance, plain_words
from snac_core.errors import UserError

if TYPE_CHECKING:
    from runner.pretrain.figures import Item

RATE = 16000  # Hz
_BRANCHES = 3000  # of the search that may be open at once


class Recogniser:
    """pocketsphinx with the English model of its package.

    Raises:
        UserError: if the package is not installed.
    """

    def __init__(self) -> None:
        try:
            from pocketsphinx import Decoder
        except ImportError:
            raise UserError("word errors need the package pocketsphinx: install the extra [judges]") from None
        # clear speech is read as with the default of 30,000 (docs/log.md); garbled speech in half the time
        self._decoder: Any = Decoder(samprate=RATE, maxhmmpf=_BRANCHES, loglevel="FATAL")

    @staticmethod
    def version() -> str:
        """Changes whenever a reading may."""
        return f"pocketsphinx {importlib.metadata.version('pocketsphinx')}, {_BRANCHES} branches"

    def __call__(self, audio: Tensor, sample_rate: int) -> str:
        """Words in audio (1, T)."""
        self._listen(audio, sample_rate)
        best = self._decoder.hyp()
        return "" if best is None else str(best.hypstr)

    def timed(self, audio: Tensor, sample_rate: int) -> list[tuple[str, float, float]]:
        """(word, start, end) in s, for audio (1, T), one after another; what is not a word is ""."""
        self._listen(audio, sample_rate)
        return [
            # "<sil>", "[NOISE]" and "++BREATH++" are no words, "the(2)" is the second way to say one
            (
                "" if s.word[0] in "<[+" else re.sub(r"\(\d+\)$", "", s.word),
                s.start_frame / 100,
                (s.end_frame + 1) / 100,
            )
            for s in self._decoder.seg() or ()
        ]

    def _listen(self, audio: Tensor, sample_rate: int) -> None:
        wave = resample(audio, sample_rate, RATE)[0]
        # the decoder adapts to what it heard before; the same audio shall always give the same words
        self._decoder.reinit_feat()
        self._decoder.start_utt()
        self._decoder.process_raw((wave.clamp(-1, 1) * 32767).short().numpy().tobytes(), full_utt=True)
        self._decoder.end_utt()


def wer_cost(items: Sequence[Item], made: Sequence[Tensor], rate: int, read: Callable[[Tensor, int], str]) -> float:
    """Word errors in points that the codec adds.

    Where an item's text is known: WER of the codec's output minus WER of the original, both against the text. Where it
    is not: WER of the output against what the recogniser reads in the original, whose own cost is then 0.
    """
    errors = words = 0
    for item, audio in zip(items, made, strict=True):
        original, coded = read(item.audio, rate), read(audio, rate)
        truth = plain_words(original if item.text is None else item.text)
        errors += distance(truth, plain_words(coded)) - distance(truth, plain_words(original))
        words += len(truth)
    return 100 * errors / max(1, words)
