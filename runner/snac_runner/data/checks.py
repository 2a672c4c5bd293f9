"""Check once which audio files are usable, how long they are, and where long recordings can be cut."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile

from snac_core.errors import UserError
from snac_core.files import name_problem
from snac_runner.data.cache import cache_folder
from snac_runner.data.decode import AUDIO_SUFFIXES, NotWritten, has_decoder, seekable

MIN_SECONDS = 0.5  # minimum usable length of an utterance, in s
SILENCE_DB = -60.0  # dB re full scale: an utterance is silent if its loudest 0.1 s is below
LONG_SECONDS = 60.0
"""A longer file is cut at pauses into pieces."""
PIECE_SECONDS = (8.0, 24.0)
"""Shortest and longest piece of a long file, in s; the last one can be shorter."""
_CANCELLED_DB = -20.0  # dB: level of the average relative to the loudest channel, of channels with opposite signs
_VERSION = 3  # of the checks below; results of other versions are ignored
_FILES_AT_ONCE = 512  # whose results are stored together

FileSegment = tuple[str, float, float | None]  # file, start in s, length in s (None: to the end)


class Piece(NamedTuple):
    """A piece of a long file: its start and length in s, and its RMS level re full scale."""

    start: float
    seconds: float
    level: float


@dataclass(frozen=True, slots=True)
class AudioCheck:
    """The result of checking a segment of a file.

    Attributes:
        seconds: length of the segment, in s.
        sample_rate: of the file, in Hz.
        digest: sha256 of the file's bytes.
        problem: why the segment is unusable, as a predicate ("is silent: ..."); "" if it is usable.
        channels: their number.
        mixing_db: level of the average of the channels relative to the loudest channel, in dB; 0 for equal channels.
        level: RMS of the average of the channels, re full scale.
        pieces: where a file of more than `LONG_SECONDS` is cut; empty for other files. Silent pieces are left out.
    """

    seconds: float
    sample_rate: int
    digest: str
    problem: str = ""
    channels: int = 1
    mixing_db: float = 0.0
    level: float = 0.0
    pieces: tuple[Piece, ...] = ()


def check_audio(
    path: Path, start: float = 0.0, seconds: float | None = None, *, min_seconds: float = MIN_SECONDS
) -> AudioCheck:
    """Decode a file, or `seconds` of it from `start` (in s), and check it, in constant memory.

    Never raises for the content of a file. A segment shorter than `min_seconds` is a problem. A file that PyAV or
    ffmpeg decodes is decoded into the cache.

    Raises:
        NotWritten: if the cache cannot be written.
    """
    if problem := name_problem(path):
        return AudioCheck(0.0, 0, "", problem)
    try:
        with path.open("rb") as data:
            digest = hashlib.file_digest(data, "sha256").hexdigest()
            empty = not data.tell()
    except OSError as error:
        return AudioCheck(0.0, 0, "", f"cannot be read: {error.strerror}")
    if empty:
        return AudioCheck(0.0, 0, digest, "is empty (0 bytes)")
    try:
        readable = path if path.suffix.lower() in AUDIO_SUFFIXES else seekable(path, digest)
        with soundfile.SoundFile(str(readable)) as file:
            rate, total, container = file.samplerate, file.frames, file.format
            file.seek(min(round(start * rate), total))
            signal = _Signal(rate, file.channels)
            signal.read(file, -1 if seconds is None else round(seconds * rate))
    except soundfile.LibsndfileError as error:
        message = str(error.error_string).removeprefix("Error : ").rstrip(".")
        return AudioCheck(0.0, 0, digest, f"cannot be decoded: {message}")
    except NotWritten:
        raise
    except UserError as error:
        return AudioCheck(0.0, 0, digest, f"cannot be decoded: {str(error).removeprefix(f'cannot decode {path}: ')}")
    if seconds is None:
        problem = _truncation(readable, container)
        if not problem and start == 0.0 and 0 < signal.length < total:
            problem = f"is cut off: {signal.length} of {total} samples can be decoded"
    elif signal.length < round(seconds * rate) - 1:
        problem = f"ends at {total / rate:.2f} s, before the stretch from {start:.2f} to {start + seconds:.2f} s"
    else:
        problem = ""
    problem = problem or signal.problem(min_seconds)
    length = signal.length / rate
    is_long = seconds is None and not problem and length > LONG_SECONDS
    pieces = tuple(signal.pieces() if is_long else ())
    return AudioCheck(length, rate, digest, problem, file.channels, signal.mixing_db(), signal.level(), pieces)


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
_BLOCK_SECONDS = 0.1  # of the blocks that silence and pauses are looked for in
_BLOCKS_AT_ONCE = 100  # blocks that are decoded at once
_PAUSE_BLOCKS = 3  # length of a pause


class _Signal:
    """What a check measures of samples (T, channels), block by block.

    Args:
        rate: in Hz.
        channels: their number.
    """

    def __init__(self, rate: int, channels: int) -> None:
        self.rate = rate
        self.block = max(1, round(rate * _BLOCK_SECONDS))
        self.length = 0  # in samples
        self.not_finite = 0
        self.power = np.zeros(channels)
        self.mixed_power = 0.0
        self.blocks: list[np.ndarray] = []  # mean square and variance of whole blocks: an offset is not sound

    def read(self, file: soundfile.SoundFile, count: int) -> None:
        """Read `count` samples, or all that follow if it is negative."""
        while count:
            at_once = self.block * _BLOCKS_AT_ONCE
            samples = file.read(at_once if count < 0 else min(count, at_once), dtype="float32", always_2d=True)
            if not len(samples):
                return
            count -= len(samples) if count > 0 else 0
            self.length += len(samples)
            if not np.isfinite(samples).all():
                self.not_finite += int((~np.isfinite(samples)).sum())
                continue
            mono = samples.mean(axis=1, dtype=np.float64)
            self.power += np.square(samples, dtype=np.float64).sum(axis=0)
            self.mixed_power += float(np.square(mono).sum())
            whole = mono[: len(mono) // self.block * self.block].reshape(-1, self.block)
            self.blocks.append(np.stack([np.square(whole).mean(axis=1), whole.var(axis=1)]))

    def problem(self, min_seconds: float) -> str:
        """Why the samples are not a usable utterance; "" if they are."""
        if self.length < min_seconds * self.rate:
            seconds = self.length / self.rate
            return f"is too short: {self.length} samples, {seconds:.3f} s; at least {min_seconds} s are needed"
        if self.not_finite:
            return f"holds {self.not_finite} samples that are NaN or infinite"
        if _is_silent(np.concatenate(self.blocks, axis=1)):
            if self.mixing_db() < _CANCELLED_DB:
                return f"is silent after its {len(self.power)} channels are averaged: they cancel each other"
            return f"is silent: its loudest 0.1 s is below {SILENCE_DB:.0f} dB"
        return ""

    def level(self) -> float:
        """See `AudioCheck`."""
        return float(np.sqrt(self.mixed_power / self.length)) if self.length else 0.0

    def mixing_db(self) -> float:
        """See `AudioCheck`; 0 where there is no sound."""
        if self.power.max() == 0:
            return 0.0
        return round(float(10 * np.log10(max(self.mixed_power, 1e-30) / self.power.max())), 2)

    def pieces(self) -> Iterator[Piece]:
        """Cut at pauses: each cut is in the quietest 0.3 s that leave a piece of a length in `PIECE_SECONDS`."""
        blocks = np.concatenate(self.blocks, axis=1)
        pauses = np.convolve(blocks[0], np.full(_PAUSE_BLOCKS, 1 / _PAUSE_BLOCKS), "same")
        shortest, longest = (round(seconds / _BLOCK_SECONDS) for seconds in PIECE_SECONDS)
        first, last = 0, blocks.shape[1]
        while first < last:
            end = last
            if last - first > longest:
                latest = min(first + longest, last - shortest)  # what remains is not too short either
                end = first + shortest + int(pauses[first + shortest : latest + 1].argmin())
            if not _is_silent(blocks[:, first:end]):
                samples = (self.length if end == last else end * self.block) - first * self.block
                level = float(np.sqrt(blocks[0, first:end].mean()))
                yield Piece(first * self.block / self.rate, samples / self.rate, level)
            first = end


def _is_silent(blocks: np.ndarray) -> bool:
    """Whether the loudest of blocks (2, N) is below `SILENCE_DB`."""
    return bool(np.sqrt(blocks[1].max(initial=0.0)) < 10 ** (SILENCE_DB / 20))


def check_audio_files(
    segments: Sequence[FileSegment], root: Path, progress: Callable[[int, int], None] | None = None
) -> Iterator[AudioCheck]:
    """Check many segments in threads. Results are cached on disk; unchanged files (by size and time) are not read.

    The cache is written while files are checked: after an interruption, what was checked is not checked again.

    Args:
        segments: what to check.
        root: the corpus that the files belong to; it determines the cache file.
        progress: called with (done, total) while files are decoded.

    Yields:
        The checks, in order.

    Raises:
        NotWritten: see `check_audio`.
    """
    name = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:16]
    decoder = has_decoder()
    # threads suffice: libsndfile, hashing and reading release the interpreter's lock
    with (
        closing(_Cache(cache_folder() / f"scan-{name}.sqlite")) as cache,
        ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool,
    ):
        for first in range(0, len(segments), _FILES_AT_ONCE):
            part = segments[first : first + _FILES_AT_ONCE]
            keys = [_cache_key(segment, decoder) for segment in part]
            checks = cache.read(keys)
            todo = [(key, segment) for key, segment in zip(keys, part, strict=True) if key not in checks]
            found = pool.map(lambda segment: check_audio(Path(segment[0]), *segment[1:]), [of for _, of in todo])
            for done, ((key, _), check) in enumerate(zip(todo, found, strict=True), 1):
                checks[key] = check
                if progress:
                    progress(first + done if len(todo) == len(part) else first + len(part), len(segments))
            cache.write({key: checks[key] for key, _ in todo})
            yield from (checks[key] for key in keys)


def _cache_key(segment: FileSegment, decoder: bool) -> bytes:
    """Identifies a segment of a file in its present state; (16,). `decoder`: see `has_decoder`."""
    path, start, seconds = segment
    try:
        state = os.stat(path)
        text = f"{os.path.abspath(path)}|{state.st_size}|{state.st_mtime_ns}|{start}|{seconds}"
        if not path.lower().endswith(AUDIO_SUFFIXES):
            text += f"|{decoder}"
    except OSError:
        text = f"{os.path.abspath(path)}|missing"
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=16).digest()


class _Cache:
    """Checks by key, in an SQLite file. A cache that cannot be used is empty and ignores what is written.

    Args:
        path: of the file; made if missing, replaced if it is damaged or of another version.
    """

    def __init__(self, path: Path) -> None:
        self._open: sqlite3.Connection | None = None
        for _ in range(2):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._open = self._connected(path)
                return
            except sqlite3.DatabaseError:
                with suppress(OSError):
                    path.unlink(missing_ok=True)
            except OSError:
                return

    @staticmethod
    def _connected(path: Path) -> sqlite3.Connection:
        connection = sqlite3.connect(path, timeout=60)
        try:
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version not in (0, _VERSION):
                connection.execute("DROP TABLE IF EXISTS checks")
            connection.execute("CREATE TABLE IF NOT EXISTS checks (key BLOB PRIMARY KEY, found TEXT) WITHOUT ROWID")
            connection.execute(f"PRAGMA user_version = {_VERSION}")
            connection.commit()
        except sqlite3.Error:
            connection.close()
            raise
        return connection

    def read(self, keys: Sequence[bytes]) -> dict[bytes, AudioCheck]:
        """The stored checks among these."""
        if self._open is None:
            return {}
        marks = ", ".join("?" * len(keys))
        try:
            rows = self._open.execute(f"SELECT key, found FROM checks WHERE key IN ({marks})", keys).fetchall()
            return {key: _check_of(found) for key, found in rows}
        except (sqlite3.Error, ValueError, TypeError):
            return {}

    def write(self, checks: dict[bytes, AudioCheck]) -> None:
        """Store checks, without files that could not be read."""
        if self._open is None or not checks:
            return
        rows = [(key, json.dumps(_values(check))) for key, check in checks.items() if check.digest]
        with suppress(sqlite3.Error):
            self._open.executemany("INSERT OR REPLACE INTO checks VALUES (?, ?)", rows)
            self._open.commit()

    def close(self) -> None:
        """Close the file."""
        if self._open is not None:
            self._open.close()


def _values(check: AudioCheck) -> list[object]:
    return [getattr(check, name) for name in AudioCheck.__slots__]


def _check_of(found: str) -> AudioCheck:
    values: dict[str, Any] = dict(zip(AudioCheck.__slots__, json.loads(found), strict=True))
    return AudioCheck(**{**values, "pieces": tuple(Piece(*piece) for piece in values["pieces"])})
