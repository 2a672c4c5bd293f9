"""What to convert to: a speaker embedding with optional extras, and the encoder that embeddings must come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from snac_core.errors import UserError

REFERENCE = "reference"
"""Name of the extra (B, C, R): the bare codec's latent of R frames of speech of the target, of any number R."""
REFERENCE_SECONDS = 10.0
"""Maximum length of the speech of which `ConditionedCodec.target` computes that latent, in s."""


@dataclass(frozen=True)
class Conditioning:
    """A batch of conversion targets.

    Attributes:
        speaker: speaker embeddings (B, S), of unit norm, floating point; (S,) becomes one row.
        extras: further tensors (B, ...) by name, for strategies that use them (`Strategy.extras`).
        encoder: digest of the speaker encoder that computed `speaker`, if known. A model that is conditioned with
            another encoder refuses it.

    Raises:
        UserError: for another shape or dtype, or an extra with another number of rows.
    """

    speaker: Tensor
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    encoder: str | None = None

    def __post_init__(self) -> None:
        if self.speaker.dim() == 1:
            object.__setattr__(self, "speaker", self.speaker.unsqueeze(0))
        if self.speaker.dim() != 2:
            raise UserError(f"a speaker embedding has shape (B, S) or (S,); got {tuple(self.speaker.shape)}")
        if not self.speaker.is_floating_point():
            raise UserError(f"a speaker embedding is floating point; got {self.speaker.dtype}")
        for name, value in self.extras.items():
            if value.shape[:1] != self.speaker.shape[:1]:
                raise UserError(f"extra {name!r} has {value.shape[0]} rows, the speaker embedding {len(self)}")

    def __len__(self) -> int:
        return self.speaker.shape[0]

    @classmethod
    def attending(cls, speaker: Tensor, reference: Tensor | None, encoder: str | None = None) -> Conditioning:
        """On embeddings (B, S), and the latent `REFERENCE` (B, C, R) if there is one."""
        return cls(speaker, {} if reference is None else {REFERENCE: reference}, encoder)

    def first(self, rows: int) -> Conditioning:
        """The first rows."""
        return self[torch.arange(rows, device=self.speaker.device)]

    def __getitem__(self, rows: Tensor) -> Conditioning:
        """These rows (b,)."""
        return Conditioning(self.speaker[rows], {name: x[rows] for name, x in self.extras.items()}, self.encoder)

    def to(self, like: Tensor) -> Conditioning:
        """On the device and, for floating point, in the dtype of `like`."""

        def moved(x: Tensor) -> Tensor:
            return x.to(like.device, like.dtype if x.is_floating_point() else x.dtype)

        extras = {name: moved(value) for name, value in self.extras.items()}
        return Conditioning(moved(self.speaker), extras, self.encoder)

    def expand(self, rows: int) -> Conditioning:
        """One row for each of `rows` items; a single row is repeated.

        Raises:
            UserError: if there are neither `rows` rows nor one.
        """
        if len(self) == rows:
            return self
        if len(self) != 1:
            raise UserError(f"{len(self)} speaker embeddings for a batch of {rows}; expected {rows}, or one for all")
        extras = {name: value.expand(rows, *value.shape[1:]) for name, value in self.extras.items()}
        return Conditioning(self.speaker.expand(rows, -1), extras, self.encoder)

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """The rows of all parts, in order; all parts must have the same extras.

        Raises:
            UserError: if the parts come from different speaker encoders.
        """
        if len({part.encoder for part in parts if part.encoder}) > 1:
            raise UserError("embeddings of two speaker encoders (their digests differ) cannot condition one batch")
        extras = {name: torch.cat([part.extras[name] for part in parts]) for name in parts[0].extras}
        return Conditioning(torch.cat([part.speaker for part in parts]), extras, parts[0].encoder)


@dataclass(frozen=True)
class EncoderIdentity:
    """The speaker encoder that a model is conditioned with.

    Attributes:
        name: of the encoder; "custom" for embeddings from another source.
        dim: S, size of its embeddings.
        digest: sha256 (hex) of its weights; None where it is not known.
    """

    name: str
    dim: int
    digest: str | None

    def check(self, cond: Conditioning) -> None:
        """Raise UserError for embeddings of another dimension, or known to come from another encoder."""
        if cond.speaker.shape[1] != self.dim:
            raise UserError(
                f"speaker embedding of {cond.speaker.shape[1]} dimensions; this model is conditioned with "
                f"{self.name!r}, which has {self.dim}"
            )
        if cond.encoder and self.digest and cond.encoder != self.digest:
            raise UserError(
                f"the embedding comes from another speaker encoder (digest {cond.encoder[:12]}); this model is "
                f"conditioned with {self.name!r} (digest {self.digest[:12]})"
            )
