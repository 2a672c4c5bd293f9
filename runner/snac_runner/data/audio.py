"""Audio files: read them as mono tensors at any sample rate, and check once which of them are usable."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import soundfile
import torch
from platformdirs import user_cache_dir
from torch import Tensor
from torchaudio.transforms import Resample

from snac_core.codec.streaming import CHUNK_SECONDS, Context, Windows
from snac_core.errors import UserError
from snac_core.files import write_text
from snac_runner.data.corpus import Utterance

_LOWPASS_WIDTH, _ROLLOFF = 64, 0.9475937167399596  # zero crossings of the kernel on each side; cutoff / Nyquist


@lru_cache(maxsize=16)
def _resampler(source: int, target: int) -> Resample:
    """A windowed-sinc resampler with the parameters that torchaudio's documentation calls kaiser_best.

    Images and aliases are attenuated by more than 100 dB; the passband ends at 0.948 of the lower Nyquist frequency.
    """
    return Resample(
        source,
        target,
        resampling_method="sinc_interp_kaiser",
        lowpass_filter_width=_LOWPASS_WIDTH,
        rolloff=_ROLLOFF,
        beta=14.769656459379492,
    )


def resample(audio: Tensor, source: int, target: int) -> Tensor:
    """Resample audio (..., T) from `source` Hz to (..., round(T * target / source)) at `target` Hz.

    Runs on one thread, so that the samples do not depend on the number of threads; an utterance is too short for more.
    """
    if source == target:
        return audio
    with one_thread(), torch.no_grad():
        resampled: Tensor = _resampler(source, target)(audio)
    return resampled[..., : round(audio.shape[-1] * target / source)].contiguous()


@contextmanager
def one_thread() -> Iterator[int]:
    """Inside the block torch computes on one thread, in threads that start there too; yields the number before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def load_audio(
    source: Utterance | str | Path, sample_rate: int, *, start: float = 0.0, seconds: float | None = None
) -> Tensor:
    """Read an utterance, or any audio file, as mono at `sample_rate`.

    Args:
        source: an utterance, or the path of a wav, flac, ogg, mp3 or opus file.
        sample_rate: sample rate of the result, in Hz.
        start: where to begin, in s from the start of the utterance (or the file).
        seconds: how much to read, in s; None: to the end. The result is shorter if the audio ends earlier.

    Returns:
        Tensor (1, T), float32; channels are averaged, the gain is not changed.

    Raises:
        UserError: if the file is missing, cannot be decoded, or has no audio at that position.
    """
    if isinstance(source, Utterance):
        remaining = source.seconds - start
        path, seconds = source.path, remaining if seconds is None else min(seconds, remaining)
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


def audio_pieces(path: Path, sample_rate: int, *, seconds: float = CHUNK_SECONDS) -> Iterator[Tensor]:
    """Read an audio file of any length in pieces: the samples of `load_audio`, in memory that does not grow with it.

    Args:
        path: a wav, flac, ogg, mp3 or opus file.
        sample_rate: sample rate of the result, in Hz.
        seconds: length of what is read at once.

    Returns:
        Tensors (1, n), float32; n can be 0.

    Raises:
        UserError: if the file is missing, cannot be decoded, has no audio, or holds NaN or infinity.
    """
    if not path.is_file():
        raise UserError(f"no audio file {path}")
    try:
        with soundfile.SoundFile(str(path)) as file:
            if not file.frames:
                raise UserError(f"{path} is 0.00 s long; nothing to read")
            yield from resampled(_blocks(file, path, round(seconds * file.samplerate)), file.samplerate, sample_rate)
    except soundfile.LibsndfileError as error:
        raise UserError(f"cannot decode {path}: {error.error_string}") from None


def _blocks(file: soundfile.SoundFile, path: Path, size: int) -> Iterator[Tensor]:
    """All samples of a file, channels averaged, as tensors (1, `size`), the last one shorter."""
    while len(samples := file.read(size, dtype="float32", always_2d=True)):
        if not np.isfinite(samples).all():
            raise UserError(f"{path} holds samples that are NaN or infinite; expected speech")
        yield torch.from_numpy(samples.mean(axis=1)).unsqueeze(0)


def resampled(pieces: Iterable[Tensor], source: int, target: int) -> Iterator[Tensor]:
    """Resample audio that arrives in pieces (..., n): in all, what `resample` gives on the whole."""
    if source == target:
        yield from pieces
        return
    divisor = math.gcd(source, target)
    unit, each = source // divisor, target // divisor  # samples before and after, at which positions coincide
    reach = math.ceil(_LOWPASS_WIDTH * unit / (min(unit, each) * _ROLLOFF))  # of the kernel, in samples before
    context = Context(unit, *[-(-reach // unit) + 1] * 2)
    windows = Windows(lambda window, _first: [resample(window, source, target)], context, max(1, source // unit))
    arrived = returned = 0
    piece = torch.zeros(1, 0)
    for piece in pieces:
        arrived += piece.shape[-1]
        for (part,) in windows.push(piece):
            returned += part.shape[-1]
            yield part
    windows.push(piece.new_zeros((*piece.shape[:-1], -arrived % unit)))
    rest = [part for (part,) in windows.flush()]
    if rest:
        yield torch.cat(rest, dim=-1)[..., : round(arrived * target / source) - returned]


MIN_SECONDS = 0.5  # minimum usable length of an utterance, in s
SILENCE_DB = -60.0  # dB re full scale: an utterance is silent if its loudest 0.1 s is below
_CANCELLED_DB = -20.0  # dB: level of the average relative to the loudest channel, of channels with opposite signs
_CACHE_VERSION = 2  # of the checks below; results of other versions are ignored

FileSegment = tuple[Path, float, float | None]  # file, start in s, length in s (None: to the end)


@dataclass(frozen=True)
class AudioCheck:
    """The result of checking a segment of a file.

    Attributes:
        seconds: length of the segment, in s.
        sample_rate: of the file, in Hz.
        digest: sha256 of the file's bytes.
        problem: why the segment is unusable, as a predicate ("is silent: ..."); "" if it is usable.
        channels: their number.
        mixing_db: level of the average of the channels relative to the loudest channel, in dB; 0 for equal channels.
    """

    seconds: float
    sample_rate: int
    digest: str
    problem: str = ""
    channels: int = 1
    mixing_db: float = 0.0


def check_audio(
    path: Path, start: float = 0.0, seconds: float | None = None, *, min_seconds: float = MIN_SECONDS
) -> AudioCheck:
    """Decode a file, or `seconds` of it from `start` (in s), and check it, in constant memory.

    Never raises for the content of a file. A segment shorter than `min_seconds` is a problem.
    """
    try:
        with path.open("rb") as data:
            digest = hashlib.file_digest(data, "sha256").hexdigest()
            empty = not data.tell()
    except OSError as error:
        return AudioCheck(0.0, 0, "", f"cannot be read: {error.strerror}")
    if empty:
        return AudioCheck(0.0, 0, digest, "is empty (0 bytes)")
    try:
        with soundfile.SoundFile(str(path)) as file:
            rate, total, container = file.samplerate, file.frames, file.format
            file.seek(min(round(start * rate), total))
            signal = _Signal(rate, file.channels)
            signal.read(file, -1 if seconds is None else round(seconds * rate))
    except soundfile.LibsndfileError as error:
        message = str(error.error_string).removeprefix("Error : ").rstrip(".")
        return AudioCheck(0.0, 0, digest, f"cannot be decoded: {message}")
    if seconds is None:
        problem = _truncation(path, container)
        if not problem and start == 0.0 and 0 < signal.length < total:
            problem = f"is cut off: {signal.length} of {total} samples can be decoded"
    elif signal.length < round(seconds * rate) - 1:
        problem = f"ends at {total / rate:.2f} s, before the stretch from {start:.2f} to {start + seconds:.2f} s"
    else:
        problem = ""
    problem = problem or signal.problem(min_seconds)
    return AudioCheck(signal.length / rate, rate, digest, problem, file.channels, signal.mixing_db())


def _truncation(path: Path, container: str) -> str:
    """Whether a file is shorter than its container says, which libsndfile does not report for wav and ogg.

    wav: the size of the data chunk against the bytes that follow. ogg (vorbis, opus): the last page must have the
    end-of-stream flag (RFC 3533, section 6).
    """
    size_of_file = path.stat().st_size
    with path.open("rb") as data:
        if container in ("WAV", "WAVEX") and data.read(4) == b"RIFF":
            position = 12
            while position + 8 <= size_of_file:
                data.seek(position)
                name, size = data.read(4), int.from_bytes(data.read(4), "little")
                if name == b"data":
                    present = size_of_file - position - 8
                    streamed = size in (0, 0x7FFFFFFF, 0xFFFFFFFF)  # written to a pipe: the length was not known
                    return (
                        f"is cut off: {present} of {size} bytes of audio are there"
                        if present < size and not streamed
                        else ""
                    )
                position += 8 + size + size % 2
        if container == "OGG":
            data.seek(max(0, size_of_file - 2 * _OGG_PAGE))
            end = data.read()
            last = end.rfind(b"OggS")
            if last < 0 or last + 5 >= len(end) or not end[last + 5] & 4:
                return "is cut off: its last page does not end the stream"
    return ""


_OGG_PAGE = 65_307  # largest page, in bytes; RFC 3533, section 6
_BLOCKS_AT_ONCE = 100  # blocks of 0.1 s that are decoded at once


class _Signal:
    """What a check measures of samples (T, channels), block by block.

    Args:
        rate: in Hz.
        channels: their number.
    """

    def __init__(self, rate: int, channels: int) -> None:
        self.rate = rate
        self.length = 0  # in samples
        self.not_finite = 0
        self.loudest = 0.0  # largest standard deviation of a block of 0.1 s: a constant offset is not sound
        self.power = np.zeros(channels)
        self.mixed_power = 0.0

    def read(self, file: soundfile.SoundFile, count: int) -> None:
        """Read `count` samples, or all that follow if it is negative."""
        block = max(1, self.rate // 10)
        while count:
            size = block * _BLOCKS_AT_ONCE if count < 0 else min(count, block * _BLOCKS_AT_ONCE)
            samples = file.read(size, dtype="float32", always_2d=True)
            if not len(samples):
                return
            count -= len(samples) if count > 0 else 0
            self.length += len(samples)
            finite = np.isfinite(samples)
            if not finite.all():
                self.not_finite += int((~finite).sum())
                continue
            mono = samples.mean(axis=1, dtype=np.float64)
            self.power += np.square(samples, dtype=np.float64).sum(axis=0)
            self.mixed_power += float(np.square(mono).sum())
            whole = mono[: len(mono) // block * block].reshape(-1, block)
            self.loudest = max(self.loudest, float(whole.std(axis=1).max(initial=0.0)))

    def problem(self, min_seconds: float) -> str:
        """Why the samples are not a usable utterance; "" if they are."""
        if self.length < min_seconds * self.rate:
            seconds = self.length / self.rate
            return f"is too short: {self.length} samples, {seconds:.3f} s; at least {min_seconds} s are needed"
        if self.not_finite:
            return f"holds {self.not_finite} samples that are NaN or infinite"
        if self.loudest < 10 ** (SILENCE_DB / 20):
            if self.mixing_db() < _CANCELLED_DB:
                return f"is silent after its {len(self.power)} channels are averaged: they cancel each other"
            return f"is silent: its loudest 0.1 s is below {SILENCE_DB:.0f} dB"
        return ""

    def mixing_db(self) -> float:
        """See `AudioCheck`; 0 where there is no sound."""
        if self.power.max() == 0:
            return 0.0
        return round(float(10 * np.log10(max(self.mixed_power, 1e-30) / self.power.max())), 2)


def check_audio_files(
    segments: Iterable[FileSegment], root: Path, progress: Callable[[int, int], None] | None = None
) -> dict[FileSegment, AudioCheck]:
    """Check many segments. Results are cached on disk; unchanged files (by size and time) are not decoded again.

    Args:
        segments: what to check.
        root: the corpus that the files belong to; it determines the cache file.
        progress: called with (done, total) after each file that is decoded.
    """
    name = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:16]
    cache_file = cache_folder() / f"scan-{name}.json"
    cached = _read_cache(cache_file)
    keys = {segment: _cache_key(segment) for segment in segments}
    checks = {segment: cached[key] for segment, key in keys.items() if key in cached}
    todo = [segment for segment in keys if segment not in checks]
    # threads suffice: libsndfile, hashing and reading release the interpreter's lock
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        results = pool.map(lambda segment: check_audio(*segment), todo)
        for done, (segment, check) in enumerate(zip(todo, results, strict=True), 1):
            checks[segment] = check
            if progress:
                progress(done, len(todo))
    if todo:
        _write_cache(cache_file, {keys[segment]: checks[segment] for segment in keys})
    return {segment: checks[segment] for segment in keys}


def cache_folder() -> Path:
    """The folder for cached results: the environment variable SNAC_CACHE, else snac-conditioning in the user's cache.

    The user's cache is $XDG_CACHE_HOME, else ~/.cache (Linux), ~/Library/Caches (macOS), or %LOCALAPPDATA% (Windows).
    """
    return Path(os.environ.get("SNAC_CACHE") or user_cache_dir("snac-conditioning", appauthor=False, opinion=False))


def _cache_key(segment: FileSegment) -> str:
    """Identifies a segment of a file in its present state."""
    path, start, seconds = segment
    try:
        state = path.stat()
    except OSError:
        return f"{path.absolute()}|missing"
    return f"{path.absolute()}|{state.st_size}|{state.st_mtime_ns}|{start}|{seconds}"


def _read_cache(path: Path) -> dict[str, AudioCheck]:
    """The cached results; empty if there are none, or if the file is damaged."""
    try:
        stored = json.loads(path.read_text())
        if stored["version"] != _CACHE_VERSION:
            return {}
        return {key: AudioCheck(**value) for key, value in stored["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _write_cache(path: Path, checks: dict[str, AudioCheck]) -> None:
    """Store results, without files that could not be read. A cache that cannot be written is ignored."""
    files = {key: asdict(check) for key, check in checks.items() if check.digest}
    with suppress(OSError):
        write_text(path, json.dumps({"version": _CACHE_VERSION, "files": files}, separators=(",", ":")))
