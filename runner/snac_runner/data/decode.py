"""Decode files that libsndfile cannot seek in, or not decode at all: once, into a cache on disk."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import soundfile
from numpy.typing import NDArray

from snac_core.errors import UserError
from snac_core.files import writing
from snac_runner.data.cache import cache_folder

SEEKABLE = (".wav", ".flac")
"""Files of which a stretch can be read without decoding what comes before it."""

AUDIO_SUFFIXES = (*SEEKABLE, ".ogg", ".mp3", ".opus")
"""Files that libsndfile decodes."""

MEDIA_SUFFIXES = (
    ".m4a", ".aac", ".wma", ".aif", ".aiff", ".caf", ".amr", ".ape", ".wv", ".tta", ".ac3", ".mka", ".mp2", ".oga",
    ".au", ".spx", ".webm", ".mp4", ".m4v", ".mkv", ".mov", ".avi", ".3gp", ".flv", ".wmv", ".mpg", ".mpeg",
)  # fmt: skip
"""Other files with audio, which PyAV or ffmpeg decodes."""

HEADERLESS = (".raw", ".pcm")
"""Samples without a header: neither their rate nor their format is known."""

DECODER_NEEDED = "PyAV or ffmpeg; expected pip install 'snac-conditioning[media]', or wav, flac, ogg, mp3, opus"


class NotWritten(UserError):
    """What is decoded cannot be written, e.g. because the disk is full. It says nothing of the file that is read."""


def has_decoder() -> bool:
    """Whether PyAV or ffmpeg is installed."""
    return find_spec("av") is not None or shutil.which("ffmpeg") is not None


def decode(path: Path, out: Path, subtype: str = "FLOAT") -> None:
    """Write the first audio stream of a file as wav or flac, with its channels and sample rate.

    Args:
        path: any file with audio.
        out: the file to write; its suffix is the format.
        subtype: libsndfile's name of the sample format: "FLOAT", or "PCM_16", which clips what is beyond full scale.

    Raises:
        NotWritten: if `out` cannot be written.
        UserError: if the file needs PyAV or ffmpeg and neither is installed, or it has no audio.
    """
    if path.suffix.lower() in AUDIO_SUFFIXES:
        _copy(path, out, subtype)
        return
    if not has_decoder():
        raise UserError(f"{path} needs {DECODER_NEEDED}")
    if find_spec("av") is None:
        codec = {"FLOAT": "pcm_f32le", "PCM_16": "flac" if out.suffix == ".flac" else "pcm_s16le"}[subtype]
        sixteen = ["-sample_fmt", "s16"] if subtype == "PCM_16" else []
        done = subprocess.run(
            ["ffmpeg", "-v", "error", "-i", str(path.absolute()), "-vn", "-c:a", codec, *sixteen, "-y", str(out)],
            stdin=subprocess.DEVNULL, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            message = " ".join(done.stderr.split())[-200:]
            if os.strerror(errno.ENOSPC) in message:
                raise NotWritten(f"cannot write what is decoded of {path}: {message}")
            raise UserError(f"cannot decode {path}: {message}")
        return
    import av

    try:
        with av.open(str(path)) as container:
            if not container.streams.audio:
                raise UserError(f"{path} has no audio stream")
            stream = container.streams.audio[0]
            to_float = av.AudioResampler(format="flt", layout=stream.layout, rate=stream.rate)
            with soundfile.SoundFile(str(out), "w", stream.rate, stream.channels, subtype) as file:
                for frame in chain(container.decode(stream), [None]):  # None: what the resampler still holds
                    for part in to_float.resample(frame):
                        _write(file, part.to_ndarray().reshape(-1, stream.channels), path)
    except av.FFmpegError as error:
        raise UserError(f"cannot decode {path}: {error.strerror}") from error


def _copy(path: Path, out: Path, subtype: str) -> None:
    try:
        with (
            soundfile.SoundFile(str(path)) as source,
            soundfile.SoundFile(str(out), "w", source.samplerate, source.channels, subtype) as file,
        ):
            while len(samples := source.read(1 << 20, dtype="float32", always_2d=True)):
                _write(file, samples, path)
    except soundfile.LibsndfileError as error:
        raise UserError(f"cannot decode {path}: {error.error_string}") from error


def _write(file: soundfile.SoundFile, samples: NDArray[Any], path: Path) -> None:
    """Write samples (T, channels) that were decoded from `path`."""
    try:
        file.write(samples)
    except soundfile.LibsndfileError as error:  # "System error": it does not name it
        free = shutil.disk_usage(Path(file.name).parent).free
        raise NotWritten(
            f"cannot write what is decoded of {path} to {Path(file.name).parent} ({free / 1e6:.0f} MB free)"
        ) from error


def seekable(path: Path, digest: str) -> Path:
    """A file with the audio of `path` that can be read from any position: itself, or a decoded copy in the cache.

    The copy is made once, as flac of 16 bits; several processes may ask for it at the same time.

    Args:
        path: an audio or video file.
        digest: sha256 of its bytes, which names the copy.

    Raises:
        NotWritten: if the cache cannot be written.
        UserError: see `decode`.
    """
    if path.suffix.lower() in SEEKABLE:
        return path
    copy = cache_folder() / "decoded" / digest[:2] / f"{digest}.flac"
    if not copy.is_file():
        try:
            copy.parent.mkdir(parents=True, exist_ok=True)
            with writing(copy) as temporary:
                decode(path, temporary, "PCM_16")
        except OSError as error:
            raise NotWritten(f"cannot write the decoded copy of {path}: {error.strerror or error}") from error
    return copy
