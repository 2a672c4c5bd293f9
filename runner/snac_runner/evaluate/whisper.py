"""Whisper (Radford et al. 2022, arXiv 2212.04356), the recogniser of words, through faster-whisper (CTranslate2).

Whisper only judges: it never trains anything. It runs in float16 on a GPU and in float32 on the CPU, because what it
reads in int8 depends on the CPU (docs/experiments/does-int8-change-what-whisper-reads.md). An encoder window of 30 s
costs the same for a clip of 3 s, so the window follows the clip, and clips of one window are read in batches.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import warnings
import zlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import file_digest
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from snac_core.errors import UserError, nearest

PACKAGES = ("faster_whisper", "jiwer", "whisper_normalizer")
"""What word errors need: the extra [judges]."""
SAMPLE_RATE = 16000  # Hz
LONGEST = 30.0  # s, of the window that Whisper was trained on
SHORTEST = 10.0  # s: shorter windows add loops (docs/experiments/which-recogniser-judges-content.md)
MARGIN, STEP = 1.0, 2.0  # s: a window is at least this much longer than its clip, and a multiple of the step
BATCH = 8  # clips
TOKENS_PER_SECOND = 10  # at most; fast English speech has about 6
COMPRESSION = 2.4  # a transcript that compresses better is a loop (openai/whisper, transcribe.py)
NO_SPEECH, LOG_PROBABILITY = 0.6, -1.0  # thresholds of silence (likewise)
LETTERS = ("zh", "ja", "th", "lo", "my", "yue")  # languages without spaces: every character is a word (likewise)
_SEARCHED = 5.0  # s before the end of a window, in which longer audio is cut at its quietest moment

FORMAT = (
    "expected a Whisper in CTranslate2's format, as "
    "`ct2-transformers-converter --model openai/whisper-base --copy_files tokenizer.json` writes it"
)


def default_whisper(language: str) -> str:
    """The name of the Whisper that is used if none is asked for."""
    return "base.en" if language == "en" else "base"


def not_found(language: str) -> str:
    """That there is no Whisper for a language, and how to get one."""
    name = default_whisper(language)
    return (
        f"no Whisper on this computer: with the extra [judges], SNAC_WHISPER={name} (or --whisper {name}) downloads it "
        "once (145 MB); offline, set SNAC_WHISPER to a folder with a Whisper for faster-whisper"
    )


class Reading(NamedTuple):
    """What Whisper recognises in a clip.

    Attributes:
        text: the transcript.
        no_speech: probability that there is no speech.
        log_probability: mean of the tokens of the transcript.
    """

    text: str
    no_speech: float
    log_probability: float

    @property
    def is_silence(self) -> bool:
        """Whether the transcript is a hallucination on audio without speech."""
        return self.no_speech > NO_SPEECH and self.log_probability < LOG_PROBABILITY

    @property
    def is_loop(self) -> bool:
        """Whether the transcript repeats itself, as Whisper does on audio that it cannot follow."""
        raw = self.text.encode()
        return len(raw) > COMPRESSION * len(zlib.compress(raw))


class Whisper:
    """Transcribes speech. The result does not depend on what was transcribed before, or in the same batch.

    Args:
        source: a folder with a model for faster-whisper, or the name of one in the hub's cache.
        language: code of the language of the speech, e.g. "en".
        device: where it runs; the CPU if CTranslate2 has no CUDA device.
        workers: batches to read at the same time on the CPU, one thread each.
        download: whether to download a name that is not in the hub's cache.

    Attributes:
        version: changes whenever a transcript may change.

    Raises:
        UserError: if there is no such model, it is damaged, or it cannot read the language.
    """

    def __init__(
        self,
        source: str | Path,
        *,
        language: str = "en",
        device: torch.device = torch.device("cpu"),  # noqa: B008
        workers: int = 1,
        download: bool = False,
    ) -> None:
        from ctranslate2 import get_cuda_device_count
        from faster_whisper import WhisperModel
        from faster_whisper.tokenizer import Tokenizer

        folder = _folder(str(source), download=download)
        on_gpu = device.type == "cuda" and get_cuda_device_count() > 0
        kind = {"device": "cuda", "device_index": device.index or 0} if on_gpu else {"device": "cpu"}
        precision = "float16" if on_gpu else "float32"
        threads = torch.get_num_threads()
        try:
            self._model: Any = WhisperModel(
                str(folder), compute_type=precision, cpu_threads=1, num_workers=workers, **kind
            )
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{folder} does not load as a Whisper ({_first_sentence(error)}); {FORMAT}") from error
        finally:
            torch.set_num_threads(threads)  # cpu_threads limits OpenMP in this thread, and with it torch
        known = self._model.supported_languages
        if language not in known:
            english = "; it reads English only, and the multilingual models, such as base, read others"
            raise UserError(
                f"Whisper {source} cannot read language = {language!r}"
                f"{nearest(language, known) if len(known) > 1 else english}"
            )
        self.language = language
        self._tokenizer: Any = Tokenizer(
            self._model.hf_tokenizer, self._model.model.is_multilingual, task="transcribe", language=language
        )
        self._pool = ThreadPoolExecutor(workers)
        with (folder / "model.bin").open("rb") as file:
            digest = file_digest(file, "sha256").hexdigest()
        self.version = (
            f"whisper {digest[:16]} {precision} {language}, ctranslate2 {version('ctranslate2')}, "
            f"faster-whisper {version('faster-whisper')}, windows {SHORTEST:g} {MARGIN:g} {STEP:g}"
        )
        self.normalize = _normalizer(language)

    def words(self, text: str) -> list[str]:
        """Words of a text as Whisper's authors compare them: "twenty" is "20", "colour" is "color"."""
        return self.normalize(text).split()

    def read(self, waves: Sequence[Tensor]) -> list[str]:
        """Greedy transcripts of waves (T,) at 16 kHz, of any length; longer than 30 s in consecutive windows.

        A loop in a short window is read again in 30 s. A loop there, and a hallucination on silence, count as nothing
        recognised: their text is "".
        """
        pieces = [(number, piece) for number, wave in enumerate(waves) for piece in split(wave)]
        readings = self.readings([piece for _, piece in pieces])
        loops = [index for index, reading in enumerate(readings) if reading.is_loop]
        again = self.readings([pieces[index][1] for index in loops], least=LONGEST)
        for index, reading in zip(loops, again, strict=True):
            readings[index] = reading
        texts: list[list[str]] = [[] for _ in waves]
        for (number, _), reading in zip(pieces, readings, strict=True):
            if not (reading.is_silence or reading.is_loop):
                texts[number].append(reading.text)
        return [" ".join(parts) for parts in texts]

    def readings(self, waves: Sequence[Tensor], *, least: float = SHORTEST) -> list[Reading]:
        """What is recognised in waves (T,) at 16 kHz of at most 30 s each, in windows of at least `least` s."""
        by_window: defaultdict[float, list[int]] = defaultdict(list)
        for number, wave in enumerate(waves):
            by_window[max(least, window(len(wave) / SAMPLE_RATE))].append(number)
        batches = [
            (seconds, numbers[start : start + BATCH])
            for seconds, numbers in sorted(by_window.items())
            for start in range(0, len(numbers), BATCH)
        ]
        found: dict[int, Reading] = {}
        read = self._pool.map(lambda batch: self._batch([waves[i] for i in batch[1]], batch[0]), batches)
        for (_, numbers), batch in zip(batches, read, strict=True):
            found.update(zip(numbers, batch, strict=True))
        return [found[number] for number in range(len(waves))]

    def _batch(self, waves: Sequence[Tensor], seconds: float) -> list[Reading]:
        from ctranslate2 import StorageView

        prompt = [*self._tokenizer.sot_sequence, self._tokenizer.no_timestamps]
        results = self._model.model.generate(
            StorageView.from_array(self._features(waves, seconds)), [prompt] * len(waves), beam_size=1,
            max_length=min(448, len(prompt) + round(TOKENS_PER_SECOND * seconds)),
            return_scores=True, return_no_speech_prob=True,
        )  # fmt: skip
        readings = []
        for result in results:
            tokens = result.sequences_ids[0]
            # the score is the mean over the tokens; the end of the text counts as one, as in faster-whisper
            mean = result.scores[0] * len(tokens) / (len(tokens) + 1)
            readings.append(Reading(self._tokenizer.decode(tokens).strip(), result.no_speech_prob, mean))
        return readings

    def languages(self, waves: Sequence[Tensor]) -> dict[str, float]:
        """Mean probability of each language in waves (T,) at 16 kHz; only the given one if the model has one."""
        from ctranslate2 import StorageView

        if not self._model.model.is_multilingual or not waves:
            return {self.language: 1.0}
        longest = min(LONGEST, max(window(len(wave) / SAMPLE_RATE) for wave in waves))
        found = self._model.model.detect_language(StorageView.from_array(self._features(waves, longest)))
        mean: defaultdict[str, float] = defaultdict(float)
        for probabilities in found:
            for token, probability in probabilities:
                mean[token.strip("<|>")] += probability / len(waves)
        return dict(mean)

    def _features(self, waves: Sequence[Tensor], seconds: float) -> np.ndarray:
        """Log-mel features (B, bands, 100 per s) of waves (T,), followed by silence up to `seconds`."""
        samples = round(seconds * SAMPLE_RATE)
        padded = (torch.nn.functional.pad(wave[:samples], (0, max(0, samples - len(wave)))) for wave in waves)
        extract = self._model.feature_extractor
        return np.stack([extract(wave.float().numpy(), padding=0) for wave in padded]).astype(np.float32)


def window(seconds: float) -> float:
    """Length of the encoder's window for a clip, both in s."""
    return min(LONGEST, max(SHORTEST, STEP * math.ceil((seconds + MARGIN) / STEP)))


def split(wave: Tensor) -> list[Tensor]:
    """A wave (T,) at 16 kHz in pieces of at most 30 s, cut at the quietest 0.1 s near the end of each window."""
    pieces, most, frame = [], round(LONGEST * SAMPLE_RATE), SAMPLE_RATE // 10
    while len(wave) > most:
        searched = wave[most - round(_SEARCHED * SAMPLE_RATE) : most]
        quietest = int(searched.unfold(0, frame, frame).square().mean(1).argmin())
        cut = most - len(searched) + quietest * frame + frame // 2
        pieces.append(wave[:cut])
        wave = wave[cut:]
    return [*pieces, wave]


def find_whisper(wanted: str, language: str, device: torch.device, *, workers: int = 1) -> Whisper | None:
    """The Whisper that a study asks for, else one that is at hand.

    Args:
        wanted: folder or name, downloaded if it is not in the hub's cache. Empty: the environment variable
            SNAC_WHISPER, else base.en (or base, for other languages) if it was downloaded before.
        language: code of the language of the speech.
        device: where it runs.
        workers: see `Whisper`.

    Returns:
        None if `wanted` is empty, and there is none.

    Raises:
        UserError: if the one that is asked for cannot be used.
    """
    wanted = wanted or os.environ.get("SNAC_WHISPER", "")
    missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
    if wanted:
        if missing:
            raise UserError(
                f"whisper = {wanted!r} needs {', '.join(missing)}: install the extra, "
                "`pip install 'snac-conditioning[judges]'`"
            )
        return Whisper(wanted, language=language, device=device, workers=workers, download=True)
    if missing:
        return None
    try:
        folder = _folder(default_whisper(language), download=False)
    except UserError:
        return None
    return Whisper(folder, language=language, device=device, workers=workers)


def _folder(source: str, *, download: bool) -> Path:
    """The folder of a model.

    Raises:
        UserError: if the folder lacks a file, the name is unknown, or the model cannot be downloaded.
    """
    from faster_whisper import available_models, download_model
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    folder = Path(source).expanduser()
    if folder.is_dir():
        lacking = [name for name in ("model.bin", "config.json", "tokenizer.json") if not (folder / name).is_file()]
        if lacking:
            raise UserError(f"{folder} lacks {', '.join(lacking)}; {FORMAT}")
        return folder
    known = available_models()
    if source not in known and not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise UserError(
            f"whisper = {source!r}: no such folder; expected a folder, a hub id, or a name that faster-whisper knows"
            f"{nearest(source, known)}"
        )
    try:
        return Path(download_model(source, local_files_only=not download))
    except (OSError, ValueError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise UserError(
            f"Whisper {source} is not in the hub's cache and cannot be downloaded ({_first_sentence(error)}); "
            "give a folder: whisper = 'FOLDER', or set SNAC_WHISPER to it"
        ) from error


def _first_sentence(error: Exception) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0].partition(". ")[0]


def _normalizer(language: str) -> Callable[[str], str]:
    """Whisper's normaliser of texts: of English, or of any other language."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an invalid escape sequence in the package
        from whisper_normalizer.basic import BasicTextNormalizer
        from whisper_normalizer.english import EnglishTextNormalizer

    normalizer: Any = (
        EnglishTextNormalizer()
        if language == "en"
        else BasicTextNormalizer(split_letters=language in LETTERS, preserve_marks=True)
    )

    def normalize(text: str) -> str:
        # the normaliser leaves a lone "." of an ellipsis, which is not a word
        return " ".join(word for word in str(normalizer(text)).split() if any(map(str.isalnum, word)))

    return normalize
