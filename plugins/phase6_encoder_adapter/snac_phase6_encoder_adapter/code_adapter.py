"""Codes predicted level by level, and written into the latent."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from snac_core.codec.vq import CodeWriter, ResidualVectorQuantize, VectorQuantize
from snac_phase6_encoder_adapter.adapters import DilatedBlocks, output_of_zeros
from snac_phase6_encoder_adapter.speech_attention import SpeechAttention


class CodeAdapter(DilatedBlocks):
    """A classifier of each level's code, coarse first; the latent is moved to where the quantizer chooses these codes.

    The logits of a level are those of the bare codec's choice, the cosines to the entries times a learned factor, plus
    an output of the network that is zero at initialization. A level sees the entries chosen by the coarser ones.
    Blocks of frames of which no code changes keep their latent.

    Args:
        quantizer: of the frozen codec.
        speaker_dim: S.
        hidden: width H.
        kernel, dilations: as for `DilatedBlocks`.
        source_bias: added to the factor of the cosines when codes are chosen, not in `code_logits`: where the network
            is not certain, the bare codec's choice is kept, and with it the words.
        heads: of the attention to speech of the target, see `SpeechAttention`; 0: none.
    """

    def __init__(
        self,
        quantizer: ResidualVectorQuantize,
        speaker_dim: int,
        hidden: int,
        kernel: int,
        dilations: Sequence[int],
        source_bias: float,
        heads: int = 0,
    ) -> None:
        channels = quantizer.input_dim
        super().__init__(channels, speaker_dim, hidden, kernel, dilations)
        self.source_bias = source_bias
        self.writer = CodeWriter(quantizer)
        levels = list(self._levels())
        self.coarser = nn.ModuleList(nn.Conv1d(channels, hidden, 1) for _ in levels[1:])
        self.mixers = nn.ModuleList(nn.Conv1d(hidden, hidden, 3, padding=1) for _ in levels)
        self.heads = nn.ModuleList(output_of_zeros(hidden, len(level.codebook.weight)) for level in levels)
        self.log_scales = nn.Parameter(torch.full((len(levels),), math.log(10.0)))
        self.attention = SpeechAttention(channels, speaker_dim, hidden, kernel, dilations, heads) if heads else None

    def _levels(self) -> Iterator[VectorQuantize]:
        for level in self.writer.quantizer.quantizers:
            assert isinstance(level, VectorQuantize)
            yield level

    def forward(self, x: Tensor, speaker: Tensor, speech: Tensor | None = None, scale: float = 1.0) -> Tensor:
        """x (B, C, F), speaker (B, S) and latent of speech (B, C, R) to (B, C, F); equal to x at initialization.

        `scale` multiplies what the network adds to the logits: at 0, the codes are those of the bare codec. The
        gradient of an entry is that of the expected entry (straight-through).
        """
        hidden, residual = self._attending(x, speaker, speech), x
        stride = self.writer.quantizer.vq_strides[0]
        changed = x.new_zeros(len(x), x.shape[-1] // stride, dtype=torch.bool)
        entries = []
        for number, level in enumerate(self._levels()):
            logits = self._logits(number, level, hidden, x, residual, self.source_bias, scale)
            chosen, expected = logits.argmax(1), level.expected(logits)
            entry = level.codebook(chosen).to(expected).transpose(1, 2)
            entries.append(entry + expected - expected.detach())
            differs = chosen != level.nearest(level.project(residual))
            changed = changed | differs.view(len(x), -1, stride // level.stride).any(-1)
            residual = residual - level.expand(entry)
        edited = self.writer(x, entries)
        kept = x + (edited - edited.detach())  # the same gradient
        return torch.where(changed.repeat_interleave(stride, 1).unsqueeze(1), edited, kept).to(x.dtype)

    def code_logits(
        self, x: Tensor, speaker: Tensor, codes: Sequence[Tensor], speech: Tensor | None = None
    ) -> list[Tensor]:
        """The logits (B, N, F / stride) of every level, given the codes of the coarser levels (teacher forcing)."""
        hidden, residual, logits = self._attending(x, speaker, speech), x, []
        for number, (level, given) in enumerate(zip(self._levels(), codes, strict=True)):
            logits.append(self._logits(number, level, hidden, x, residual))
            residual = residual - level.expand(level.codebook(given).transpose(1, 2))
        return logits

    def _attending(self, x: Tensor, speaker: Tensor, speech: Tensor | None) -> Tensor:
        """The features (B, H, F)."""
        if self.attention is None:
            return self.features(x, speaker)
        assert speech is not None
        encoded = self.attention.encode(speech, speaker)
        return self.features(x, speaker, partial(self.attention, encoded=encoded))

    def receptive_field(self, blocks: int) -> int:
        """Frames on each side that the codes of a block depend on, where `blocks` is that of the features.

        A level's convolution sees the codes next to a code, which see those of the coarser level next to them; all
        frames of a block depend on all codes of the block.
        """
        strides = self.writer.quantizer.vq_strides
        return blocks + sum(2 * stride - 1 for stride in strides) + strides[0] - 1

    def _logits(
        self,
        number: int,
        level: VectorQuantize,
        hidden: Tensor,
        x: Tensor,
        residual: Tensor,
        bias: float = 0.0,
        scale: float = 1.0,
    ) -> Tensor:
        if number:
            chosen = (x - residual).to(hidden.dtype)  # the part of the coarser levels
            hidden = hidden + self.coarser[number - 1](chosen)
        pooled = F.avg_pool1d(hidden, level.stride, level.stride)
        pooled = pooled + self.mixers[number](F.gelu(pooled))
        cosines = level.cosines(level.project(residual))
        found: Tensor = self.heads[number](F.gelu(pooled))
        if scale != 1:
            found = scale * found
        return found + (self.log_scales[number].exp() + bias) * cosines
