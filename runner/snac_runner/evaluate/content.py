"""Content metrics: which share of the words, characters or phones of a conversion is wrong.

Three recognisers transcribe the output: pocketsphinx (words, offline), the phone recogniser of this project, and
Whisper (words, from the hub, only on request). The reference is the text if it is known, otherwise the same
recogniser's transcript of the source. Transcripts are cached, so that none is computed twice.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchaudio.functional import edit_distance

from snac_core.errors import UserError
from snac_core.files import tensor_digest, write_text
from snac_core.metric import Conversion, Metric
from snac_runner.data.audio import cache_folder, resample
from snac_runner.evaluate.phone_recogniser import bundled, phones_of


def error_rate(reference: Sequence[str], hypothesis: Sequence[str]) -> float:
    """Insertions, deletions and substitutions per unit of the reference, at most 1, which an empty hypothesis gets.

    Raises:
        ValueError: if the reference is empty.
    """
    if not reference:
        raise ValueError("an error rate needs a reference of at least one unit")
    edits: int = edit_distance(reference, hypothesis)
    return min(1.0, edits / len(reference))


def plain_words(text: str) -> list[str]:
    """Words in lower case, without punctuation and digits."""
    return re.findall(r"[a-z']+", text.lower())


def conversion_error_rate(
    conversion: Conversion,
    split: Callable[[str], Sequence[str]],
    transcribe: Callable[[Tensor, int], Sequence[str]],
) -> float | None:
    """Error rate of the converted output, at most 1.

    Args:
        conversion: what to evaluate.
        split: from a text to the units that are counted: words, characters or phones.
        transcribe: a recogniser, from audio (T,) and its sample rate in Hz to such units.

    Returns:
        None if the output should not say what the source says, or nothing is recognised in the source.
    """
    if not conversion.same_words:
        return None
    rate = conversion.sample_rate
    reference = split(conversion.text) if conversion.text else transcribe(conversion.source, rate)
    return error_rate(reference, transcribe(conversion.converted, rate)) if reference else None


def cached_transcript(recogniser: str, audio: Tensor, sample_rate: int, transcribe: Callable[[], str]) -> str:
    """The transcript of `audio` (T,), from the cache folder if it was computed before.

    Args:
        recogniser: its name and version, or digest: changes whenever its transcripts may change.
        audio: what is transcribed.
        sample_rate: of `audio`, in Hz.
        transcribe: computes the transcript.
    """
    digest = hashlib.sha256(audio.contiguous().numpy().tobytes() + str(sample_rate).encode()).hexdigest()
    path = cache_folder() / "readings" / hashlib.sha256(recogniser.encode()).hexdigest()[:16] / f"{digest}.txt"
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        pass  # not computed yet, or damaged
    text = transcribe()
    with suppress(OSError):  # a cache that cannot be written only costs time
        write_text(path, text)
    return text


# ------------------------------------------------------------------ words, by pocketsphinx

RATE = 16000  # Hz
_BEAM = 3000  # HMMs that may be active in one frame


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
        # the transcripts of clear speech are those of the default, 30,000; garbled speech takes half the time
        # (docs/experiments/how-long-does-judging-take.md)
        self._decoder: Any = Decoder(samprate=RATE, maxhmmpf=_BEAM, loglevel="FATAL")

    @staticmethod
    def version() -> str:
        """Changes whenever a transcript may change."""
        return f"pocketsphinx {importlib.metadata.version('pocketsphinx')}, {_BEAM} branches"

    def __call__(self, audio: Tensor, sample_rate: int) -> str:
        """Words in audio (1, T)."""
        self._decode(audio, sample_rate)
        best = self._decoder.hyp()
        return "" if best is None else str(best.hypstr)

    def timed(self, audio: Tensor, sample_rate: int) -> list[tuple[str, float, float]]:
        """Words in audio (1, T) as (word, start in s, end in s), without gaps; silence and noise are ""."""
        self._decode(audio, sample_rate)
        return [
            # "<sil>", "[NOISE]" and "++BREATH++" are not words; "the(2)" is the second pronunciation of "the"
            (
                "" if s.word[0] in "<[+" else re.sub(r"\(\d+\)$", "", s.word),
                s.start_frame / 100,
                (s.end_frame + 1) / 100,
            )
            for s in self._decoder.seg() or ()
        ]

    def _decode(self, audio: Tensor, sample_rate: int) -> None:
        wave = resample(audio, sample_rate, RATE)[0]
        # the decoder adapts to earlier audio; equal audio must always give equal words
        self._decoder.reinit_feat()
        self._decoder.start_utt()
        self._decoder.process_raw((wave.clamp(-1, 1) * 32767).short().numpy().tobytes(), full_utt=True)
        self._decoder.end_utt()


class WER(Metric):
    """Word error rate of the converted output, at most 1, by pocketsphinx.

    The reference is the text if it is known, otherwise the recogniser's transcript of the source.
    """

    name, unit, direction, worst, requires = "wer", "share", "down", 1.0, ("pocketsphinx",)
    outputs = ("converted",)
    role, margin = "content", 0.05

    @property
    def version(self) -> str:
        return Recogniser.version()

    def __call__(self, conversion: Conversion) -> float | None:
        return conversion_error_rate(conversion, plain_words, lambda audio, rate: plain_words(read_words(audio, rate)))


class CER(Metric):
    """Character error rate of the converted output, at most 1, by pocketsphinx; see WER."""

    name, unit, direction, worst, requires = "cer", "share", "down", 1.0, ("pocketsphinx",)
    outputs = ("converted",)
    role, margin = "content", 0.05

    @property
    def version(self) -> str:
        return Recogniser.version()

    def __call__(self, conversion: Conversion) -> float | None:
        return conversion_error_rate(conversion, _characters, lambda audio, rate: _characters(read_words(audio, rate)))


def _characters(text: str) -> list[str]:
    return list(" ".join(plain_words(text)))


def read_words(audio: Tensor, sample_rate: int) -> str:
    """The cached transcript of `audio` (T,) by pocketsphinx."""
    return cached_transcript(
        Recogniser.version(), audio, sample_rate, lambda: _recogniser()(audio.unsqueeze(0), sample_rate)
    )


@cache
def _recogniser() -> Recogniser:
    return Recogniser()


# ------------------------------------------------------------------ phones, by the bundled recogniser


class PER(Metric):
    """Phone error rate of the converted output, at most 1, by the bundled phone recogniser.

    The reference is the phones of the text if it is known, otherwise those recognised in the source.
    """

    name, unit, direction, worst = "per", "share", "down", 1.0
    outputs = ("converted",)
    role, margin = "content", 0.05

    @property
    def version(self) -> str:
        return _phones_version()

    def __call__(self, conversion: Conversion) -> float | None:
        return conversion_error_rate(conversion, phones_of, _read_phones)


class PERAboveHalf(Metric):
    """Whether more than half of the phones are wrong (1 or 0): the mean is the share of such utterances."""

    name, unit, direction, worst = "per_above_half", "share", "down", 1.0
    outputs = ("converted",)

    @property
    def version(self) -> str:
        return _phones_version()

    def __call__(self, conversion: Conversion) -> float | None:
        rate = conversion_error_rate(conversion, phones_of, _read_phones)
        return None if rate is None else float(rate > 0.5)


def _read_phones(audio: Tensor, rate: int) -> tuple[str, ...]:
    phones = cached_transcript(_phones_version(), audio, rate, lambda: " ".join(bundled()(audio, rate)))
    return tuple(phones.split())


def _phones_version() -> str:
    return f"phones {bundled().digest}"


# ------------------------------------------------------------------ words, by Whisper


class WhisperWER(Metric):
    """Word error rate of the converted output, at most 1, by Whisper (Radford et al. 2022, arXiv 2212.04356).

    The reference is the text if it is known, otherwise Whisper's transcript of the source. A subclass with another
    `name` and `model` is another metric.

    Attributes:
        model: hub id, or a folder as transformers saves it.
    """

    name, unit, direction, worst, requires = "whisper_wer", "share", "down", 1.0, ("transformers",)
    outputs = ("converted",)
    role, margin, on_request = "content", 0.01, True
    model: ClassVar[str] = "openai/whisper-small.en"

    @property
    def version(self) -> str:
        return _whisper_recogniser(self.model).version

    def prepare(self) -> None:
        """Load the model, and download it first if it is not in the hub's cache.

        Raises:
            UserError: if it is not in the cache and cannot be downloaded.
        """
        _whisper_recogniser(self.model)

    def __call__(self, conversion: Conversion) -> float | None:
        words = _whisper_recogniser(self.model).words
        return conversion_error_rate(conversion, words, lambda audio, rate: words(self.read(audio, rate)))

    def read(self, audio: Tensor, sample_rate: int) -> str:
        """The cached transcript of `audio` (T,) by Whisper."""
        recognise = _whisper_recogniser(self.model)
        return cached_transcript(recognise.version, audio, sample_rate, lambda: recognise(audio, sample_rate))


class _Whisper:
    """Whisper with its processor.

    Attributes:
        version: changes whenever a transcript may change.
    """

    rate = 16000  # Hz
    window = 30.0  # s that the model takes at once

    def __init__(self, source: str) -> None:
        transformers = import_module("transformers")
        try:
            self.processor: Any = transformers.WhisperProcessor.from_pretrained(source)
            self.model: Any = transformers.WhisperForConditionalGeneration.from_pretrained(source).eval()
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"{source} is not in the hub's cache and could not be downloaded ({reason}); download it from "
                "huggingface.co into the cache, or set HF_HUB_OFFLINE=0 if there is a network"
            ) from error
        self.version = f"whisper {tensor_digest(self.model.state_dict().items())} {transformers.__version__}"

    @torch.inference_mode()
    def __call__(self, audio: Tensor, sample_rate: int) -> str:
        """Greedy transcript of `audio` (T,), in pieces of 30 s."""
        wave = resample(audio, sample_rate, self.rate)
        texts = []
        for piece in torch.split(wave, round(self.window * self.rate)):
            features = self.processor(piece.numpy(), sampling_rate=self.rate, return_tensors="pt").input_features
            tokens = self.model.generate(features.to(self.model.dtype), do_sample=False, num_beams=1)
            texts.append(self.processor.batch_decode(tokens, skip_special_tokens=True)[0])
        return " ".join(texts)

    def words(self, text: str) -> list[str]:
        """Words normalised as Whisper's authors do: "twenty" equals "20", "colour" equals "color"."""
        tokenizer = self.processor.tokenizer
        english: bool = bool(tokenizer.english_spelling_normalizer)  # absent from models of other languages
        plain: str = tokenizer.normalize(text) if english else tokenizer.basic_normalize(text)
        return plain.split()


@cache
def _whisper_recogniser(source: str) -> _Whisper:
    return _Whisper(source)
