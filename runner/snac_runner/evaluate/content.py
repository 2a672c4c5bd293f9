"""How much of what was said is heard otherwise: by words, characters or phones.

What a recogniser reads in audio, remembered (no control's reading is made twice), and how much of it is wrong.

Errors of an offline word recogniser: whether what was said is still said.

Content by phones: how many of those that were to be said the recogniser of this project hears otherwise.

Errors of Whisper, a large word recogniser from the hub, through transformers: asked for by name, `also`."""

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

from snac_core.errors import UserError
from snac_core.files import tensor_digest, write_text
from snac_core.metric import Conversion, Metric
from snac_runner.data.audio import cache_folder, resample
from snac_runner.evaluate.phone_recogniser import bundled, phones_of


def error_rate(said: Sequence[str], heard: Sequence[str]) -> float:
    """Insertions, deletions and substitutions per unit said; 1 at most, which is what silence gets.

    Raises:
        ValueError: if nothing was said.
    """
    if not said:
        raise ValueError("an error rate needs at least one unit to be said")
    return min(1.0, distance(said, heard) / len(said))


def distance(said: Sequence[str], heard: Sequence[str]) -> int:
    """Fewest insertions, deletions and substitutions that make `heard` of `said` (Levenshtein)."""
    before = list(range(len(heard) + 1))
    for number, unit in enumerate(said, 1):
        now = [number]
        for place, other in enumerate(heard, 1):
            now.append(min(before[place] + 1, now[-1] + 1, before[place - 1] + (unit != other)))
        before = now
    return before[-1]


def plain_words(text: str) -> list[str]:
    """Words in lower case, without punctuation and digits."""
    return re.findall(r"[a-z']+", text.lower())


def errors(
    conversion: Conversion, units: Callable[[str], Sequence[str]], hear: Callable[[Tensor, int], Sequence[str]]
) -> float | None:
    """Error rate of the converted output, at most 1: against the text where it is known, else as the source is heard.

    Args:
        conversion: to be judged.
        units: of a text, what is counted: words, characters, phones.
        hear: a recogniser, from audio (T,) and its rate to such units.

    Returns:
        None where the output says something else, or nothing is heard in the source.
    """
    if not conversion.same_words:
        return None
    rate = conversion.sample_rate
    said = units(conversion.text) if conversion.text else hear(conversion.source, rate)
    return error_rate(said, hear(conversion.converted, rate)) if said else None


def remembered(recogniser: str, audio: Tensor, sample_rate: int, read: Callable[[], str]) -> str:
    """The reading of `audio` (T,), from the cache folder where it was made before.

    Args:
        recogniser: name and version, or digest: whatever changes when its readings may.
        audio: what is read.
        sample_rate: of `audio`, in Hz.
        read: makes the reading.
    """
    heard = hashlib.sha256(audio.contiguous().numpy().tobytes() + str(sample_rate).encode()).hexdigest()
    place = cache_folder() / "readings" / hashlib.sha256(recogniser.encode()).hexdigest()[:16] / f"{heard}.txt"
    try:
        return place.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        pass  # not made yet, or damaged
    text = read()
    with suppress(OSError):  # it only saves time
        write_text(place, text)
    return text


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
        # clear speech is read as with the default of 30,000 (docs/experiments/README.md); garbled speech in half the time
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


class PER(Metric):
    """Phone error rate of the converted output: against the text where it is known, else as the source is read."""

    name, unit, direction, worst = "per", "share", "down", 1.0
    outputs = ("converted",)
    role, margin = "content", 0.05

    @property
    def version(self) -> str:
        return _version()

    def __call__(self, conversion: Conversion) -> float | None:
        return _errors(conversion)


class PERAboveHalf(Metric):
    """Whether more than half of the phones are wrong; the mean is the share of such utterances."""

    name, unit, direction, worst = "per_above_half", "share", "down", 1.0
    outputs = ("converted",)

    @property
    def version(self) -> str:
        return _version()

    def __call__(self, conversion: Conversion) -> float | None:
        rate = _errors(conversion)
        return None if rate is None else float(rate > 0.5)


def _errors(conversion: Conversion) -> float | None:
    return errors(conversion, phones_of, _read)


def _read(audio: Tensor, rate: int) -> tuple[str, ...]:
    reading = remembered(_version(), audio, rate, lambda: " ".join(bundled()(audio, rate)))
    return tuple(reading.split())


def _version() -> str:
    return f"phones {bundled().digest}"


class WhisperWER(Metric):
    """Word error rate of the converted output, capped at 1, by Whisper (Radford et al. 2022, arXiv 2212.04356).

    Against the text where there is one, else against the same recogniser's reading of the source. A subclass with
    another `name` and `model` is a metric of its own.

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
        """Load the model, fetching it where it is not there yet.

        Raises:
            UserError: if it is not there and cannot be fetched.
        """
        _whisper_recogniser(self.model)

    def __call__(self, conversion: Conversion) -> float | None:
        words = _whisper_recogniser(self.model).words
        return errors(conversion, words, lambda audio, rate: words(self.read(audio, rate)))

    def read(self, audio: Tensor, sample_rate: int) -> str:
        """What Whisper hears in `audio` (T,)."""
        recognise = _whisper_recogniser(self.model)
        return remembered(recognise.version, audio, sample_rate, lambda: recognise(audio, sample_rate))


class _Whisper:
    """The model and what prepares audio for it.

    Attributes:
        version: changes whenever a reading may.
    """

    rate = 16000  # Hz
    longest = 30.0  # s that the model hears at once

    def __init__(self, source: str) -> None:
        transformers = import_module("transformers")
        try:
            self.processor: Any = transformers.WhisperProcessor.from_pretrained(source)
            self.model: Any = transformers.WhisperForConditionalGeneration.from_pretrained(source).eval()
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"{source} is not there and could not be fetched ({reason}); download it from huggingface.co into the "
                "hub's cache, or set HF_HUB_OFFLINE=0 where there is a network"
            ) from error
        self.version = f"whisper {tensor_digest(self.model.state_dict().items())} {transformers.__version__}"

    @torch.inference_mode()
    def __call__(self, audio: Tensor, sample_rate: int) -> str:
        """Greedy reading of `audio` (T,), piece by piece where it is longer than the model hears at once."""
        from snac_runner.data.audio import resample

        heard = resample(audio, sample_rate, self.rate)
        texts = []
        for piece in torch.split(heard, round(self.longest * self.rate)):
            features = self.processor(piece.numpy(), sampling_rate=self.rate, return_tensors="pt").input_features
            chosen = self.model.generate(features.to(self.model.dtype), do_sample=False, num_beams=1)
            texts.append(self.processor.batch_decode(chosen, skip_special_tokens=True)[0])
        return " ".join(texts)

    def words(self, text: str) -> list[str]:
        """Words as Whisper's authors compare them: "twenty" and "20", "colour" and "color" are one."""
        tokenizer = self.processor.tokenizer
        english: bool = bool(tokenizer.english_spelling_normalizer)  # a model of other languages comes without
        plain: str = tokenizer.normalize(text) if english else tokenizer.basic_normalize(text)
        return plain.split()


@cache
def _whisper_recogniser(source: str) -> _Whisper:
    return _Whisper(source)
