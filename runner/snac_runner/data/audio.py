"""Audio files: read them, or stretches of them, as mono tensors at any sample rate."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import Tensor
from torchaudio.transforms import Resample

from snac_core.codec.streaming import CHUNK_SECONDS, Context, Windows
from snac_core.errors import UserError
from snac_runner.data.decode import seekable
from snac_runner.data.utterances import Utterance

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
    """Resample audio (..., T) from `source` Hz to (..., T * target / source) at `target` Hz; see `resampled_length`.

    Runs on one thread, so that the samples do not depend on the number of threads; an utterance is too short for more.
    """
    if source == target:
        return audio
    with one_thread(), torch.no_grad():
        resampled: Tensor = _resampler(source, target)(audio)
    return resampled[..., : resampled_length(audio.shape[-1], source, target)].contiguous()


def resampled_length(samples: int, source: int, target: int) -> int:
    """Samples at `target` Hz of as many at `source` Hz: rounded, a half up, as for a part that begins at any unit.

    Python's `round` of a half depends on whether the number before is even.
    """
    return (2 * samples * target + source) // (2 * source)


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
        path = seekable(source.path, source.digest) if source.path.is_file() else source.path
        seconds = remaining if seconds is None else min(seconds, remaining)
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


def load_stretch(utterance: Utterance, sample_rate: int, first: int, count: int) -> Tensor:
    """Samples `first` to `first + count` of `load_audio(utterance, sample_rate)`; only this stretch is decoded.

    Args:
        utterance: what to read.
        sample_rate: of the result, and of `first` and `count`, in Hz.
        first: position of the first sample.
        count: number of samples.

    Returns:
        Tensor (1, n), float32, with n at most `count`: less where the utterance ends earlier.

    Raises:
        UserError: as `load_audio` does; also if the file has become shorter.
    """
    path, rate = seekable(utterance.path, utterance.digest), utterance.sample_rate
    unit, each, reach = _units(rate, sample_rate)
    margin = 0 if rate == sample_rate else -(-reach // unit) + 1  # units that the kernel reaches over
    begin = max(0, first // each - margin) * unit
    offset = round(utterance.start * rate)
    length = round((utterance.start + utterance.seconds) * rate) - offset
    end = min(length, (-(-(first + count) // each) + margin) * unit)
    if end <= begin:
        return torch.zeros(1, 0)
    try:
        with soundfile.SoundFile(str(path)) as file:
            if file.samplerate != rate or file.frames < offset + length:
                raise UserError(f"{utterance.path} has changed since it was checked; open its folder again")
            file.seek(offset + begin)
            samples = file.read(end - begin, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise UserError(f"cannot decode {utterance.path}: {error.error_string}") from None
    audio = resample(torch.from_numpy(samples.mean(axis=1)).unsqueeze(0), rate, sample_rate)
    skipped = first - begin // unit * each
    return audio[:, skipped : skipped + count]


def _units(source: int, target: int) -> tuple[int, int, int]:
    """Samples before and after resampling, at which positions coincide; and the kernel's reach, in samples before."""
    divisor = math.gcd(source, target)
    unit, each = source // divisor, target // divisor
    return unit, each, math.ceil(_LOWPASS_WIDTH * unit / (min(unit, each) * _ROLLOFF))


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
    unit, _, reach = _units(source, target)
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
        yield torch.cat(rest, dim=-1)[..., : resampled_length(arrived, source, target) - returned]
