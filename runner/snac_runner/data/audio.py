"""Audio files to tensors: decoded, mixed to mono, resampled.

What is in an audio file: how much usable speech, or why none. Decoded once; the answer is remembered on disk."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import Tensor
from torchaudio.transforms import Resample

from snac_core.errors import UserError
from snac_core.files import write_text
from snac_runner.data.corpus import Utterance


@lru_cache(maxsize=16)
def _resampler(source: int, target: int) -> Resample:
    """A windowed-sinc resampler with the parameters that torchaudio's documentation calls kaiser_best.

    Images and aliases are more than 100 dB down; the passband ends at 0.948 of the lower Nyquist frequency.
    """
    return Resample(
        source,
        target,
        resampling_method="sinc_interp_kaiser",
        lowpass_filter_width=64,
        rolloff=0.9475937167399596,
        beta=14.769656459379492,
    )


def resample(audio: Tensor, source: int, target: int) -> Tensor:
    """Audio (..., T) at `source` Hz to (..., round(T * target / source)) at `target` Hz.

    Runs on one thread: an utterance is too short to be worth sharing out, and so the samples do not depend on how many
    threads there are.
    """
    if source == target:
        return audio
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            resampled: Tensor = _resampler(source, target)(audio)
    finally:
        torch.set_num_threads(threads)
    return resampled[..., : round(audio.shape[-1] * target / source)].contiguous()


def load_audio(
    source: Utterance | str | Path, sample_rate: int, *, start: float = 0.0, seconds: float | None = None
) -> Tensor:
    """Read an utterance, or any audio file, as mono at `sample_rate`.

    Args:
        source: an utterance, or the path of a wav, flac, ogg, mp3 or opus file.
        sample_rate: wanted, in Hz.
        start: where to begin, in s from the utterance's (or the file's) beginning.
        seconds: how much to read, in s; None: to the end. What lies past the end is not there: the result is shorter.

    Returns:
        Tensor (1, T), float32; channels are averaged, the gain is untouched.

    Raises:
        UserError: if the file is missing, cannot be decoded, or has nothing at that place.
    """
    if isinstance(source, Utterance):
        path, left = source.path, source.seconds - start
        seconds = left if seconds is None else min(seconds, left)
        start = source.start + start
    else:
        path = Path(source)
    if not path.is_file():
        raise UserError(f"no audio file {path}")
    try:
        with soundfile.SoundFile(str(path)) as file:
            rate = file.samplerate
            first = max(0, round(start * rate))
            count = -1 if seconds is None else max(0, round((start + seconds) * rate) - first)
            if first >= file.frames or count == 0:
                raise UserError(f"{path} is {file.frames / rate:.2f} s long; nothing to read at {start:.2f} s")
            file.seek(first)
            samples = file.read(count, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise UserError(f"cannot decode {path}: {error.error_string}") from None
    return resample(torch.from_numpy(samples.mean(axis=1)).unsqueeze(0), rate, sample_rate)


MIN_SECONDS = 0.5  # the least usable length of an utterance, in s
SILENCE_DB = -60.0  # dB re full scale: an utterance whose loudest 0.1 s is below has no speech in it
_VERSION = 1  # of the rules below: a cache made by other rules is not read


@dataclass(frozen=True)
class Content:
    """What was heard in a stretch of a file.

    Attributes:
        seconds: length of the stretch, in s.
        sample_rate: of the file, in Hz.
        digest: sha256 of the file's bytes.
        problem: why it cannot be used; "" if it can.
    """

    seconds: float
    sample_rate: int
    digest: str
    problem: str = ""


def examine(path: Path, start: float = 0.0, seconds: float | None = None) -> Content:
    """Decode a file, or a stretch of it, and say what is there. Never raises for what a file holds."""
    try:
        data = path.read_bytes()
    except OSError as error:
        return Content(0.0, 0, "", f"cannot be read: {error.strerror}")
    digest = hashlib.sha256(data).hexdigest()
    if not data:
        return Content(0.0, 0, digest, "is empty (0 bytes)")
    try:
        with soundfile.SoundFile(str(path)) as file:
            rate, promised, kind = file.samplerate, file.frames, file.format
            file.seek(min(round(start * rate), promised))
            samples = file.read(-1 if seconds is None else round(seconds * rate), dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        return Content(0.0, 0, digest, f"cannot be decoded: {_said(error)}")
    if seconds is None:
        problem = _cut_off(data, kind)
        if not problem and start == 0.0 and 0 < len(samples) < promised:
            problem = f"is cut off: {len(samples)} of {promised} samples can be decoded"
    elif len(samples) < round(seconds * rate) - 1:
        problem = f"ends at {promised / rate:.2f} s, before the stretch from {start:.2f} to {start + seconds:.2f} s"
    else:
        problem = ""
    problem = problem or _unusable(samples, rate)
    return Content(len(samples) / rate, rate, digest, problem)


def _said(error: soundfile.LibsndfileError) -> str:
    """libsndfile's words, without its preface and full stop."""
    return str(error.error_string).removeprefix("Error : ").rstrip(".")


def _unusable(samples: np.ndarray, rate: int) -> str:
    """Why samples (T, channels) at `rate` Hz are no utterance; "" if they are."""
    if len(samples) < MIN_SECONDS * rate:
        return f"is too short: {len(samples)} samples, {len(samples) / rate:.3f} s; at least {MIN_SECONDS} s are needed"
    if not np.isfinite(samples).all():
        return f"holds {int((~np.isfinite(samples)).sum())} samples that are NaN or infinite"
    mono = samples.mean(axis=1, dtype=np.float64)
    block = max(1, rate // 10)
    blocks = mono[: len(mono) // block * block].reshape(-1, block)
    loudest = float(blocks.std(axis=1).max())  # a constant offset is no sound
    if loudest < 10 ** (SILENCE_DB / 20):
        return f"is silent: its loudest 0.1 s is below {SILENCE_DB:.0f} dB"
    return ""


def _cut_off(data: bytes, kind: str) -> str:
    """Whether a file ends before its own container says so; libsndfile says nothing of it for wav and ogg.

    wav: the length of the data chunk against what follows it. ogg (vorbis, opus): the last page must carry the
    end-of-stream flag (RFC 3533, section 6).
    """
    if kind in ("WAV", "WAVEX") and data[:4] == b"RIFF":
        at = 12
        while at + 8 <= len(data):
            size = int.from_bytes(data[at + 4 : at + 8], "little")
            if data[at : at + 4] == b"data":
                there = len(data) - at - 8
                streamed = size in (0, 0x7FFFFFFF, 0xFFFFFFFF)  # written to a pipe: the length was not known
                if there < size and not streamed:
                    return f"is cut off: {there} of {size} bytes of audio are there"
                return ""
            at += 8 + size + size % 2
    if kind == "OGG":
        last = data.rfind(b"OggS")
        if last < 0 or last + 5 >= len(data) or not data[last + 5] & 4:
            return "is cut off: its last page does not end the stream"
    return ""


def cache_folder() -> Path:
    """Where answers are remembered: SNAC_CACHE, else snac-conditioning in the user's cache folder."""
    if os.environ.get("SNAC_CACHE"):
        return Path(os.environ["SNAC_CACHE"])
    if os.name == "nt":
        base = os.environ.get("LOCALAPPDATA") or str(Path.home() / "AppData" / "Local")
    else:
        base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "snac-conditioning"


Stretch = tuple[Path, float, float | None]  # file, start in s, length in s (None: to the end)


def examine_all(
    stretches: Iterable[Stretch], root: Path, progress: Callable[[int, int], None] | None = None
) -> dict[Stretch, Content]:
    """Examine many stretches; files whose size and time have not changed since the last call are not decoded again.

    Args:
        stretches: what to examine.
        root: the corpus they belong to; it names the cache file.
        progress: called with (done, of how many) after each file that had to be decoded.
    """
    name = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:16]
    place = cache_folder() / f"scan-{name}.json"
    known = _read_cache(place)
    answers: dict[Stretch, Content] = {}
    keys: dict[Stretch, str] = {}
    for stretch in stretches:
        keys[stretch] = _key(stretch)
        if keys[stretch] in known:
            answers[stretch] = known[keys[stretch]]
    fresh = [s for s in keys if s not in answers]
    # libsndfile, hashing and reading all release the interpreter's lock
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for done, (stretch, content) in enumerate(zip(fresh, pool.map(lambda s: examine(*s), fresh), strict=True), 1):
            answers[stretch] = content
            if progress:
                progress(done, len(fresh))
    if fresh:
        _write_cache(place, {keys[s]: answers[s] for s in keys})
    return {s: answers[s] for s in keys}


def _key(stretch: Stretch) -> str:
    """What an answer holds for: this file in this state, and this stretch of it."""
    path, start, seconds = stretch
    try:
        state = path.stat()
    except OSError:
        return f"{path.absolute()}|missing"
    return f"{path.absolute()}|{state.st_size}|{state.st_mtime_ns}|{start}|{seconds}"


def _read_cache(place: Path) -> dict[str, Content]:
    """The answers remembered at `place`; none if there are none to be had."""
    try:
        stored = json.loads(place.read_text())
        if stored["version"] != _VERSION:
            return {}
        return {key: Content(**value) for key, value in stored["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # a cache only saves time: a damaged one is rebuilt


def _write_cache(place: Path, answers: dict[str, Content]) -> None:
    """Remember answers; where that is not possible the next call decodes again. What could not be read is not kept."""
    keep = {key: asdict(content) for key, content in answers.items() if content.digest}
    try:
        write_text(place, json.dumps({"version": _VERSION, "files": keep}, separators=(",", ":")))
    except OSError:
        return
