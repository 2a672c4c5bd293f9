"""Content metrics: which share of the words, characters or phones of a conversion is wrong.

Two recognisers transcribe the output: Whisper (words), where its weights are at hand, and the bundled phone recogniser.
The reference is the text if it is known, otherwise the same recogniser's transcript of the source. Transcripts are
cached, so that none is computed twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import ClassVar, Literal

from torch import Tensor
from torchaudio.functional import edit_distance

from snac_core.files import write_text
from snac_core.metric import Conversion, Metric
from snac_runner.data.audio import resample
from snac_runner.data.cache import cache_folder
from snac_runner.evaluate import whisper
from snac_runner.evaluate.phone_recogniser import bundled, phones_of
from snac_runner.evaluate.whisper import Whisper


def error_rate(reference: Sequence[str], hypothesis: Sequence[str]) -> float:
    """Insertions, deletions and substitutions per unit of the reference, at most 1, which an empty hypothesis gets.

    Raises:
        ValueError: if the reference is empty.
    """
    if not reference:
        raise ValueError("an error rate needs a reference of at least one unit")
    edits: int = edit_distance(reference, hypothesis)
    return min(1.0, edits / len(reference))


def cached_transcripts(
    recogniser: str,
    audio: Sequence[Tensor],
    sample_rate: int,
    transcribe: Callable[[Sequence[Tensor]], Sequence[str]],
) -> list[str]:
    """Transcripts of `audio`, (T,) each, from the cache folder if they were computed before.

    Args:
        recogniser: its name and version, or digest: changes whenever its transcripts may change.
        audio: what is transcribed.
        sample_rate: of `audio`, in Hz.
        transcribe: computes transcripts, of those that are not in the cache.
    """
    folder = cache_folder() / "readings" / hashlib.sha256(recogniser.encode()).hexdigest()[:16]
    digests = [
        hashlib.sha256(wave.contiguous().numpy().tobytes() + str(sample_rate).encode()).hexdigest() for wave in audio
    ]
    known = {digest: text for digest in digests if (text := _stored(folder / f"{digest}.txt")) is not None}
    new = {digest: wave for digest, wave in zip(digests, audio, strict=True) if digest not in known}
    if new:
        for digest, text in zip(new, transcribe(list(new.values())), strict=True):
            known[digest] = text
            with suppress(OSError):  # a cache that cannot be written only costs time
                write_text(folder / f"{digest}.txt", text)
    return [known[digest] for digest in digests]


def _stored(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None  # not computed yet, or damaged


# ------------------------------------------------------------------ words, by Whisper


class WordErrors(Metric):
    """Base of WER, CER and the kinds of word errors.

    Attributes:
        recogniser: transcribes source and output; without one the metric does not apply.
    """

    unit, direction, worst, requires = "share", "down", 1.0, whisper.PACKAGES
    outputs = ("converted",)
    role: ClassVar[Literal["", "content"]] = "content"
    margin = 0.01
    recogniser: Whisper | None = None

    @property
    def version(self) -> str:
        return self.recogniser.version if self.recogniser else ""

    def prefetch(self, conversions: Sequence[Conversion]) -> None:
        """Transcribe outputs, and the sources without a text, in batches."""
        judged = [conversion for conversion in conversions if conversion.same_words]
        if self.recogniser and judged:
            waves = [c.converted for c in judged] + [c.source for c in judged if not self._text(c)]
            transcripts(self.recogniser, waves, judged[0].sample_rate)

    def __call__(self, conversion: Conversion) -> float | None:
        compared = self._compared(conversion)
        return min(1.0, self.rate(*compared)) if compared else None

    def _compared(self, conversion: Conversion) -> tuple[str, str] | None:
        """Reference and transcript of the output; None without a reference."""
        if self.recogniser is None or not conversion.same_words:
            return None
        recogniser, rate = self.recogniser, conversion.sample_rate

        def said(wave: Tensor) -> str:
            return recogniser.normalize(transcripts(recogniser, [wave], rate)[0])

        reference = self._text(conversion) or said(conversion.source)
        return (reference, said(conversion.converted)) if reference else None

    def _text(self, conversion: Conversion) -> str:
        return self.recogniser.normalize(conversion.text) if self.recogniser and conversion.text else ""

    @classmethod
    def rate(cls, reference: str, hypothesis: str) -> float:
        """Errors per unit of the reference, which is not empty."""
        raise NotImplementedError


class WER(WordErrors):
    """Word error rate of the converted output, at most 1, by Whisper, after Whisper's text normaliser.

    The reference is the text if it is known, otherwise Whisper's transcript of the source. Output in which nothing is
    recognised, a loop, and a hallucination on silence have an error rate of 1.
    """

    name = "wer"

    @classmethod
    def rate(cls, reference: str, hypothesis: str) -> float:
        import jiwer

        return float(jiwer.wer(reference, hypothesis))


class CER(WordErrors):
    """Character error rate of the converted output, at most 1, by Whisper; see WER."""

    name = "cer"

    @classmethod
    def rate(cls, reference: str, hypothesis: str) -> float:
        import jiwer

        return float(jiwer.cer(reference, hypothesis))


class WordEdits(WordErrors):
    """Base of the three kinds of word errors, which add up to WER where WER is below 1. None decides a verdict."""

    role, margin, worst = "", 0.0, 0.0
    kind: ClassVar[str]

    def __call__(self, conversion: Conversion) -> float | None:
        compared = self._compared(conversion)
        return self.rate(*compared) if compared else None

    @classmethod
    def rate(cls, reference: str, hypothesis: str) -> float:
        import jiwer

        counted = jiwer.process_words(reference, hypothesis)
        return float(getattr(counted, cls.kind) / len(reference.split()))


class Insertions(WordEdits):
    """Words that were added, per word of the reference; see WER. It exceeds 1 for more added words than words."""

    name = kind = "insertions"


class Deletions(WordEdits):
    """Words that are missing, per word of the reference; see WER."""

    name, kind, worst = "deletions", "deletions", 1.0


class Substitutions(WordEdits):
    """Words that were replaced, per word of the reference; see WER."""

    name = kind = "substitutions"


def transcripts(recogniser: Whisper, audio: Sequence[Tensor], sample_rate: int) -> list[str]:
    """The cached transcripts of `audio`, (T,) each, by Whisper; `sample_rate` is in Hz."""

    def read(waves: Sequence[Tensor]) -> list[str]:
        return recogniser.read([resample(wave, sample_rate, whisper.SAMPLE_RATE) for wave in waves])

    return cached_transcripts(recogniser.version, audio, sample_rate, read)


WRONG_TEXT, SAME_TEXT = (
    0.8,
    0.4,
)  # error rates from which on, and up to which, a text is that of other or the same words
READS_WELL = 0.1  # median error rate of a recogniser that can be trusted about a single text


def wrong_texts(
    texts: Mapping[str, str],
    readings: Mapping[str, str],
    others: Collection[tuple[str, str]],
    words: Callable[[str], list[str]],
) -> dict[str, str]:
    """Utterances with a text that differs from what is said.

    Args:
        texts: utterance to its text.
        readings: utterance to its transcript by a recogniser.
        others: (utterance, text) of the whole corpus.
        words: from a text to words.

    Returns:
        utterance to the other utterance that has the text of what is said; to "" if there is none.
    """
    errors = {
        name: error_rate(reference, words(readings[name]))
        for name, text in texts.items()
        if (reference := words(text)) and words(readings[name])
    }
    found = {}
    for name, error in errors.items():
        if error < WRONG_TEXT:
            continue
        said = words(readings[name])
        folder = name.rpartition("/")[0]  # of the speaker: of equal texts, the same speaker's is named
        distances = (
            (error_rate(said, words(text)), other.rpartition("/")[0] != folder, other)
            for other, text in others
            if other != name
        )
        nearest, _, other = min(distances, default=(1.0, False, ""))
        if nearest <= SAME_TEXT:
            found[name] = other
        elif median(errors.values()) < READS_WELL:
            found[name] = ""
    return found


# ------------------------------------------------------------------ phones, by the bundled recogniser


class PER(Metric):
    """Phone error rate of the converted output, at most 1, by the bundled phone recogniser.

    The reference is the phones of the text if it is known, otherwise those recognised in the source.
    """

    name, unit, direction, worst = "per", "share", "down", 1.0
    outputs = ("converted",)
    role, margin, languages = "content", 0.05, ("en",)

    @property
    def version(self) -> str:
        return _phones_version()

    def __call__(self, conversion: Conversion) -> float | None:
        return _phone_errors(conversion)


class PERAboveHalf(Metric):
    """Whether more than half of the phones are wrong (1 or 0): the mean is the share of such utterances."""

    name, unit, direction, worst = "per_above_half", "share", "down", 1.0
    outputs, languages = ("converted",), ("en",)

    @property
    def version(self) -> str:
        return _phones_version()

    def __call__(self, conversion: Conversion) -> float | None:
        rate = _phone_errors(conversion)
        return None if rate is None else float(rate > 0.5)


def _phone_errors(conversion: Conversion) -> float | None:
    """None if the output should not say what the source says, or nothing is recognised in the source."""
    if not conversion.same_words:
        return None
    rate = conversion.sample_rate
    text = conversion.text or ""
    reference = phones_of(text) if any(map(str.isalnum, text)) else _read_phones(conversion.source, rate)
    return error_rate(reference, _read_phones(conversion.converted, rate)) if reference else None


def _read_phones(audio: Tensor, rate: int) -> tuple[str, ...]:
    def read(waves: Sequence[Tensor]) -> list[str]:
        return [" ".join(bundled()(wave, rate)) for wave in waves]

    return tuple(cached_transcripts(_phones_version(), [audio], rate, read)[0].split())


def _phones_version() -> str:
    return f"phones {bundled().digest}"
