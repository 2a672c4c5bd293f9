"""Audio files to tensors: decoded, mixed to mono, resampled."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import soundfile
import torch
from torch import Tensor
from torchaudio.transforms import Resample

from runner.data.corpus import Utterance
from snac_core.errors import UserError


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
