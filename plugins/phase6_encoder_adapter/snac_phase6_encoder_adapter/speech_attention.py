"""Attention of an adapter's features to speech of the target."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from snac_phase6_encoder_adapter.adapters import DilatedBlocks


class SpeechAttention(nn.Module):
    """Cross-attention from the frames that are converted to frames of the target, once after each block.

    An embedding says how a voice sounds in general; frames of it say how it pronounces a sound. Frames have no
    positions: the order of the target's speech does not matter, apart from half a second around each frame.

    Args:
        channels: C of the latent.
        speaker_dim: S.
        hidden: width H, a multiple of `heads`.
        kernel, dilations: as for `DilatedBlocks`, which the frames of the target pass first.
        heads: of each attention.
    """

    def __init__(
        self, channels: int, speaker_dim: int, hidden: int, kernel: int, dilations: Sequence[int], heads: int
    ) -> None:
        super().__init__()
        self.encoder = DilatedBlocks(channels, speaker_dim, hidden, kernel, dilations)
        self.speech_norm = nn.LayerNorm(hidden)
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in dilations)
        self.attentions = nn.ModuleList(nn.MultiheadAttention(hidden, heads, batch_first=True) for _ in dilations)

    def encode(self, speech: Tensor, speaker: Tensor) -> Tensor:
        """Latent (B, C, R) of speech and embeddings (B, S) of its speakers to what is attended to (B, R, H)."""
        encoded: Tensor = self.speech_norm(self.encoder.features(speech, speaker).transpose(1, 2))
        return encoded

    def forward(self, block: int, hidden: Tensor, *, encoded: Tensor) -> Tensor:
        """Features (B, H, F) after block number `block` to the same, with what they attend to in (B, R, H)."""
        queries = self.norms[block](hidden.transpose(1, 2))
        found, _ = self.attentions[block](queries, encoded, encoded, need_weights=False)
        return torch.add(hidden, found.transpose(1, 2))
