"""Audio from and to places that `snac_runner.data.audio` does not know: video files, pipes, and other formats.

libsndfile decodes wav, flac, ogg, mp3 and opus. Other files (m4a, aac, video) are first decoded by PyAV or ffmpeg.
"""

from __future__ import annotations

import errno
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import soundfile
import torch
from torch import Tensor

from snac_core.errors import UserError, nearest
from snac_core.files import writing
from snac_runner.data.audio import resampled
from snac_runner.data.decode import AUDIO_SUFFIXES, MEDIA_SUFFIXES, decode

PIPE = "-"
"""Name of standard input and standard output."""

BITS = {".wav": (16, 24, 32), ".flac": (16, 24), ".opus": (16,)}
"""Formats that can be written, with their bits per sample; 32 is floating point. Opus is lossy."""

_OPUS_RATES = (8000, 12000, 16000, 24000, 48000)  # in Hz; RFC 6716, section 2
_BLOCK = 1 << 16  # samples written at once: libsndfile's Opus encoder overflows its stack on long arrays


@dataclass(frozen=True)
class AudioFormat:
    """How converted speech is written.

    Attributes:
        suffix: ".wav", ".flac" or ".opus".
        bits: per sample; 32 is floating point, which does not clip.
        keep_rate: whether to write at the source's sample rate instead of the codec's.
        keep_level: whether to scale to the source's RMS level, as far as no sample clips.

    Raises:
        UserError: for another format, or a number of bits that the format does not have.
    """

    suffix: str = ".wav"
    bits: int = 16
    keep_rate: bool = False
    keep_level: bool = False

    def __post_init__(self) -> None:
        if self.suffix not in BITS:
            raise UserError(f"cannot write {self.suffix or 'a file without a suffix'}{nearest(self.suffix, BITS)}")
        if self.bits not in BITS[self.suffix]:
            expected = " or ".join(map(str, BITS[self.suffix]))
            raise UserError(f"{self.bits} bits per sample in {self.suffix}; expected {expected}")

    def levelled(self, pieces: Iterable[Tensor], source: Level) -> Iterator[Tensor]:
        """Audio in pieces (n,), at the RMS level of `source` where the level is kept; the peak stays at 1 or below.

        `source` is read after the last piece has arrived: it may be measured while the pieces are converted.
        """
        if not self.keep_level:
            yield from pieces
            return
        level = Level()
        with tempfile.TemporaryFile() as stored:  # the gain depends on all of the audio
            for piece in level.measured(pieces):
                stored.write(piece.cpu().contiguous().numpy().tobytes())
            gain = min(source.rms / level.rms, 1 / level.peak) if level.peak else 1.0
            stored.seek(0)
            while data := stored.read(4 * _BLOCK):
                yield torch.frombuffer(bytearray(data), dtype=torch.float32) * gain

    def write(self, path: Path, pieces: Iterable[Tensor], sample_rate: int) -> None:
        """Write mono audio in pieces (n,), atomically, or to standard output if `path` is "-".

        Memory does not grow with the length. Samples beyond full scale are clipped unless they are 32-bit.

        Raises:
            UserError: if the file cannot be written.
            OSError: if the disk is full.
        """
        if self.suffix == ".opus" and sample_rate not in _OPUS_RATES:
            pieces, sample_rate = resampled(pieces, sample_rate, _OPUS_RATES[-1]), _OPUS_RATES[-1]
        if str(path) != PIPE:
            with writing(path) as temporary:
                self._encode(temporary, pieces, sample_rate, path)
            return
        with tempfile.TemporaryDirectory() as folder:  # a header states the length: it is written last
            file = Path(folder, f"audio{self.suffix}")
            self._encode(file, pieces, sample_rate, path)
            with file.open("rb") as data:
                shutil.copyfileobj(data, sys.stdout.buffer)
        sys.stdout.buffer.flush()

    def _encode(self, path: Path, pieces: Iterable[Tensor], sample_rate: int, name: Path) -> None:
        container, subtype = {".wav": ("WAV", ""), ".flac": ("FLAC", ""), ".opus": ("OGG", "OPUS")}[self.suffix]
        subtype = subtype or ("FLOAT" if self.bits == 32 else f"PCM_{self.bits}")
        try:
            with soundfile.SoundFile(str(path), "w", sample_rate, 1, subtype, format=container) as file:
                for piece in pieces:
                    samples = (piece if self.bits == 32 else piece.clamp(-1, 1)).cpu().numpy()
                    for first in range(0, len(samples), _BLOCK):
                        file.write(samples[first : first + _BLOCK])
        except soundfile.LibsndfileError as error:
            if shutil.disk_usage(path.parent).free < 4 * _BLOCK:  # libsndfile says only "System error"
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(name)) from error
            raise UserError(f"cannot write {name}: {error.error_string}") from error


class Level:
    """RMS level and peak of mono audio that passes in pieces."""

    def __init__(self) -> None:
        self.samples, self.power, self.peak = 0, 0.0, 0.0

    def measured(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        """The pieces, which are counted as they pass."""
        for piece in pieces:
            if piece.numel():
                self.samples += piece.numel()
                self.power += float(piece.double().square().sum())
                self.peak = max(self.peak, float(piece.abs().max()))
            yield piece

    @property
    def rms(self) -> float:
        """Root mean square of the samples so far."""
        return math.sqrt(self.power / max(1, self.samples))


@contextmanager
def decodable(path: Path) -> Iterator[Path]:
    """A file that libsndfile can decode, with the audio of `path`: itself, or a temporary wav file.

    Args:
        path: an audio or video file, or "-" for standard input.

    Raises:
        UserError: if the file needs PyAV or ffmpeg and neither is installed, or has no audio. Errors raised in the
            context name `path` instead of the temporary file.
    """
    if str(path) != PIPE and (path.suffix.lower() in AUDIO_SUFFIXES or not path.is_file()):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        temporary = Path(folder, "audio" if str(path) == PIPE else f"{path.stem}.wav")
        name = "standard input" if str(path) == PIPE else str(path)
        try:
            if str(path) == PIPE:
                temporary.write_bytes(sys.stdin.buffer.read())
                if not temporary.stat().st_size:
                    raise UserError("standard input is empty; expected audio")
                if not _has_libsndfile_format(temporary):
                    decode(temporary, temporary := temporary.with_suffix(".wav"))
            else:
                decode(path, temporary)
            yield temporary
        except UserError as error:
            raise UserError(str(error).replace(str(temporary), name).replace(folder + os.sep, "")) from error


def _has_libsndfile_format(path: Path) -> bool:
    try:
        soundfile.info(str(path))
    except soundfile.LibsndfileError:
        return False
    return True


def media_suffixes() -> tuple[str, ...]:
    """The suffixes of files that can be sources or targets."""
    return (*AUDIO_SUFFIXES, *MEDIA_SUFFIXES)
