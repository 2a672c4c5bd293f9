"""Which speaker encoder a model is conditioned with, and the refusal of any other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from snac_core.conditioning import Conditioning
from snac_core.errors import UserError
from snac_core.speakers.encoder import SpeakerEncoder


@dataclass(frozen=True)
class EncoderIdentity:
    """A speaker encoder's name, dimension S, and digest of its weights (None: embeddings from elsewhere)."""

    name: str
    dim: int
    digest: str | None

    @classmethod
    def of(cls, encoder: SpeakerEncoder | str | None, dim: int | None, *, needed: bool) -> Self | None:
        """From an encoder, its name, or the dimension alone; None where neither is given nor `needed`."""
        if isinstance(encoder, str):
            from snac_core.speakers import load_speaker_encoder

            encoder = load_speaker_encoder(encoder)
        if encoder is not None:
            if dim is not None and dim != encoder.dim:
                raise UserError(f"speaker_dim {dim} beside {encoder.name!r}, which has {encoder.dim}; give one of them")
            return cls(encoder.name, encoder.dim, encoder.digest)
        if dim is not None:
            return cls("custom", dim, None)
        if needed:
            raise UserError("strategies need speaker_encoder='ge2e' (or another), or speaker_dim=S of your embeddings")
        return None

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
