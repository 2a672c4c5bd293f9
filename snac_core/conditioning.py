"""What to convert to: a speaker embedding, and whatever else a strategy may want."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from snac_core.errors import UserError


@dataclass(frozen=True)
class Conditioning:
    """A batch of targets.

    Attributes:
        speaker: speaker embeddings (B, S), unit norm; (S,) is taken as one row.
        extras: further tensors (B, ...) by name, for strategies that ask for them.
        encoder: digest of the speaker encoder that made `speaker`, where known; a model refuses another encoder's.
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

    def expand(self, rows: int) -> Conditioning:
        """One row for each of `rows` items; a single row serves them all."""
        if len(self) == rows:
            return self
        if len(self) != 1:
            raise UserError(f"{len(self)} speaker embeddings for a batch of {rows}; expected {rows}, or one for all")
        extras = {name: value.expand(rows, *value.shape[1:]) for name, value in self.extras.items()}
        return Conditioning(self.speaker.expand(rows, -1), extras, self.encoder)

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """The rows of all parts, in order; every part has the same extras, and embeddings of one encoder."""
        if len({part.encoder for part in parts if part.encoder}) > 1:
            raise UserError("embeddings of two speaker encoders (their digests differ) cannot condition one batch")
        extras = {name: torch.cat([part.extras[name] for part in parts]) for name in parts[0].extras}
        return Conditioning(torch.cat([part.speaker for part in parts]), extras, parts[0].encoder)
