"""The base class of speaker encoders: frozen weights, speech to a unit vector, differentiable in the audio."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import Any, ClassVar, NoReturn, Self

import torch
import torchaudio
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from snac_core.errors import UserError
from snac_core.files import tensor_digest
from snac_core.plugin_guard import guarded
from snac_core.plugins import Catalogue, discover


class SpeakerEncoder(nn.Module):
    """Speech to the embedding of its speaker.

    A subclass sets the class attributes, builds its network in `__init__(self, weights=None)`, ends it with
    `self.freeze()`, and implements `embed`. This class checks the input, resamples it, and normalizes the output.
    The weights are never trained and stay in eval mode; gradients pass through them to the audio.

    Attributes:
        name: argument of `load_speaker_encoder`.
        family: architecture and objective; a judge must be of another family than every conditioning encoder.
        training_data: short tag of the corpora it was trained on.
        dim: S, size of the embedding.
        sample_rate: of the input of `embed`, in Hz; audio of other rates is resampled.
        min_seconds: shortest audio, in seconds, that `embed` accepts.
        revision: increment it when the computation changes with equal weights. It is part of the digest, so stored
            embeddings of the older computation are not used.
    """

    name: ClassVar[str]
    family: ClassVar[str]
    training_data: ClassVar[str]
    min_seconds: ClassVar[float] = 0.1
    revision: ClassVar[int] = 1
    dim: int
    sample_rate: int

    _digest: str | None = None

    def embed(self, audio: Tensor) -> Tensor:
        """The embedding before normalization; an item must not depend on the other items of the batch.

        Args:
            audio: (B, T) at `sample_rate`.

        Returns:
            (B, S), of any norm.
        """
        raise NotImplementedError(f"{type(self).__name__} must define embed(audio)")

    def forward(self, audio: Tensor, sample_rate: int) -> Tensor:
        """Embed a batch of speech.

        Args:
            audio: (B, 1, T) waveform, full scale 1.
            sample_rate: of `audio`, in Hz.

        Returns:
            (B, S) of unit norm, differentiable in `audio`.

        Raises:
            UserError: for another shape, an integer waveform, or less audio than `min_seconds`.
        """
        self._check(audio, sample_rate)
        wave = audio.squeeze(1).to(self._dtype())
        with torch.autocast(wave.device.type, enabled=False):  # equal audio gives equal embeddings, in autocast too
            if sample_rate != self.sample_rate:
                wave = torchaudio.functional.resample(wave, sample_rate, self.sample_rate)
            return nn.functional.normalize(self.embed(wave), dim=-1)

    def freeze(self) -> Self:
        """Freeze the weights permanently: eval mode, no gradients; compute the digest."""
        super().train(False)
        self.requires_grad_(False)
        self._digest = self._compute_digest()
        return self

    def train(self, mode: bool = True) -> Self:
        """Do nothing: the encoder stays in eval mode, so that statistics of batch norms do not change."""
        return self

    @property
    def digest(self) -> str:
        """sha256 (hex) over name, revision and state dict, computed when the weights were frozen."""
        if self._digest is None:
            raise AssertionError(f"{type(self).__name__}.__init__ must end with self.freeze()")
        return self._digest

    @property
    def device(self) -> torch.device:
        """Device of the weights; the CPU for an encoder without weights."""
        return next((t.device for t in self.state_dict().values()), torch.device("cpu"))

    def extra_repr(self) -> str:
        return f"{self.name}: {self.dim}-d, {self.sample_rate} Hz, family {self.family}"

    def _dtype(self) -> torch.dtype:
        return next((p.dtype for p in self.parameters()), torch.float32)

    def _check(self, audio: Tensor, sample_rate: int) -> None:
        if audio.ndim != 3 or audio.shape[1] != 1:
            raise UserError(f"speaker encoder {self.name!r} expects mono audio (B, 1, T), got {tuple(audio.shape)}")
        if not audio.is_floating_point():
            raise UserError(f"speaker encoder {self.name!r} expects float audio of full scale 1, got {audio.dtype}")
        if isinstance(sample_rate, bool) or not isinstance(sample_rate, int) or sample_rate <= 0:
            raise UserError(f"sample_rate must be a positive whole number of Hz, got {sample_rate!r}")
        if audio.shape[-1] < self.min_seconds * sample_rate:
            raise UserError(
                f"speaker encoder {self.name!r} needs at least {self.min_seconds} s of audio, "
                f"got {audio.shape[-1] / sample_rate:.3f} s ({audio.shape[-1]} samples at {sample_rate} Hz)"
            )

    def _compute_digest(self) -> str:
        return tensor_digest(self.state_dict().items(), f"{self.name} {self.revision}")


def missing_weights(encoder: str, where: str | Path, remedy: str, instead: str) -> NoReturn:
    """Raise UserError: what is missing, where it is expected, how to get it, and which encoder works without it."""
    raise UserError(f"no weights of speaker encoder {encoder!r} at {where}: {remedy}; without them, use {instead}")


def load_checkpoint(path: str | Path, encoder: str) -> dict[str, Any]:
    """Read a file of weights, torch or safetensors; no pickle is executed.

    Raises:
        UserError: if the file is damaged or has other content.
    """
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, UnpicklingError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} does not load as weights of speaker encoder {encoder!r}: {reason}") from error
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}; expected the weights of speaker encoder {encoder!r}")
    return state


def load_strictly(module: nn.Module, state: dict[str, Any], path: str | Path, encoder: str) -> None:
    """Load every tensor of `state` into `module`; raise UserError for a missing or unknown one, or another shape."""
    try:
        module.load_state_dict(state, strict=True)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{path} does not fit speaker encoder {encoder!r}: {reason}") from error


def load_speaker_encoder(
    name: str, *, weights: str | Path | None = None, plugins: Catalogue | None = None
) -> SpeakerEncoder:
    """Build a registered speaker encoder, frozen and in eval mode.

    Args:
        name: e.g. "ge2e"; `runner plugins` lists all.
        weights: file to load instead of the default weights.
        plugins: the catalogue to look the name up in; defaults to the installed plugins.

    Returns:
        an encoder: `encoder(audio, sample_rate)` maps (B, 1, T) to (B, S), of unit norm.

    Raises:
        UserError: for an unknown name, or weights that are missing or do not fit.
    """
    plugins = plugins or discover()
    kind = plugins.speaker_encoders[name]
    if not (isinstance(kind, type) and issubclass(kind, SpeakerEncoder)):
        raise UserError(f"speaker encoder {name!r} is {kind!r}; expected a subclass of SpeakerEncoder")
    if weights is not None and not Path(weights).is_file():
        raise UserError(f"no file {weights} to load the weights of speaker encoder {name!r} from")
    with guarded(f"speaker encoder {name!r} of {plugins.speaker_encoders.origins[name]}"):
        return kind(weights)
