"""Codes as one sequence of tokens, for language models, in the layouts that models on SNAC use.

A frame is one code of the coarsest level with the codes of the other levels for the same time: 1 + 2 + 4 = 7 codes for
strides 4, 2, 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from einops import rearrange
from torch import Tensor

from snac_core.codec.checks import check_codes
from snac_core.errors import UserError, nearest

ORDERS = ("coarse_to_fine", "frame", "interleaved")
OFFSETS = ("none", "level", "position")


@dataclass(frozen=True)
class TokenLayout:
    """How the codes of all levels form one sequence. `flatten` and `unflatten` are inverse to each other.

    For codes a (stride 4), b (stride 2), c (stride 1), the orders are:

        coarse_to_fine  a0 a1 ...  b0 b1 b2 b3 ...  c0 c1 c2 c3 c4 c5 c6 c7 ...
        frame           a0 b0 b1 c0 c1 c2 c3  a1 b2 b3 c4 c5 c6 c7  ...
        interleaved     a0 b0 c0 c1 b1 c2 c3  a1 b2 c4 c5 b3 c6 c7  ...

    A frame of "interleaved" is sorted by the time at which codes start, coarse first. Orpheus uses it with
    offsets="position" and first_token=128266.

    Args:
        strides: latent frames per code of each level, coarse first; `SNAC.vq_strides`.
        codebook_size: entries of a codebook; `SNAC.codebook_size`.
        order: "coarse_to_fine", "frame" or "interleaved".
        offsets: what is added to a code, times `codebook_size`: "none": nothing; "level": the number of its level;
            "position": its position in the frame, so that each position has tokens of its own (not with the order
            "coarse_to_fine").
        first_token: added to every token.

    Raises:
        UserError: for an unknown order or offset, or a negative first token.
    """

    strides: Sequence[int]
    codebook_size: int
    order: str = "frame"
    offsets: str = "level"
    first_token: int = 0

    def __post_init__(self) -> None:
        for what, value, known in (("order", self.order, ORDERS), ("offsets", self.offsets, OFFSETS)):
            if value not in known:
                raise UserError(f"no token {what} {value!r}{nearest(str(value), known)}")
        if self.order == "coarse_to_fine" and self.offsets == "position":
            raise UserError("offsets 'position' need frames; use the order 'frame' or 'interleaved', or 'level'")
        if isinstance(self.first_token, bool) or not isinstance(self.first_token, int) or self.first_token < 0:
            raise UserError(f"first_token is a whole number of at least 0; got {self.first_token!r}")

    @property
    def tokens_per_frame(self) -> int:
        """Codes of all levels for one code of the coarsest."""
        return len(self._slots)

    @property
    def vocabulary(self) -> int:
        """Number of different tokens; they start at `first_token`."""
        return self.codebook_size * (max(self._offsets) // self.codebook_size + 1)

    @property
    def _slots(self) -> list[tuple[int, int]]:
        """(level, number in the frame) of each position of a frame."""
        slots = [(level, number) for level in range(len(self.strides)) for number in range(self._count(level))]
        if self.order == "interleaved":
            slots.sort(key=lambda slot: (slot[1] * self.strides[slot[0]], slot[0]))
        return slots

    @property
    def _offsets(self) -> list[int]:
        """What is added to the code at each position of a frame, without `first_token`."""
        factors = {
            "none": [0] * len(self._slots),
            "level": [level for level, _ in self._slots],
            "position": list(range(len(self._slots))),
        }[self.offsets]
        return [factor * self.codebook_size for factor in factors]

    def _count(self, level: int) -> int:
        return self.strides[0] // self.strides[level]

    def flatten(self, codes: Sequence[Tensor]) -> Tensor:
        """Codes, (B, F / stride) per level, to tokens (B, N) with N = `tokens_per_frame` * F / first stride.

        Raises:
            UserError: for codes of another number of levels, shape or range.
        """
        check_codes(codes, self.strides, self.codebook_size)
        parts = [rearrange(level, "b (f n) -> b f n", n=self._count(i)) for i, level in enumerate(codes)]
        frames = torch.cat(parts, dim=2)[:, :, self._from_levels].long()
        frames += torch.tensor(self._offsets, device=frames.device) + self.first_token
        return torch.cat(self._levels(frames), dim=1) if self.order == "coarse_to_fine" else frames.flatten(1)

    def unflatten(self, tokens: Tensor) -> list[Tensor]:
        """Tokens (B, N) or (N,) to codes, (B, F / stride) per level; for (N,), B is 1.

        Raises:
            UserError: for a part of a frame, and for a token that is not possible at its position.
        """
        if not isinstance(tokens, Tensor) or tokens.dim() not in (1, 2) or tokens.is_floating_point():
            got = f"{tokens.dtype} {tuple(tokens.shape)}" if isinstance(tokens, Tensor) else type(tokens).__name__
            raise UserError(f"tokens are an integer tensor (B, N) or (N,); got {got}")
        tokens, size = tokens.reshape(-1, tokens.shape[-1]).long(), self.tokens_per_frame
        total = tokens.shape[1]
        if total == 0 or total % size:
            whole = total // size * size
            advice = f"give the first {whole}, or all {whole + size}" if whole else f"expected at least {size}"
            raise UserError(
                f"{total} tokens are {total // size} frames of {size} and {total % size} tokens of another; {advice}"
            )
        if self.order == "coarse_to_fine":
            ends = [0, *accumulate(self._count(level) * total // size for level in range(len(self.strides)))]
            parts = [tokens[:, first:end] for first, end in pairwise(ends)]
            frames = torch.cat([rearrange(part, "b (f n) -> b f n", f=total // size) for part in parts], dim=2)
        else:
            frames = rearrange(tokens, "b (f n) -> b f n", n=size)
        codes = frames - frames.new_tensor(self._offsets) - self.first_token
        wrong = ((codes < 0) | (codes >= self.codebook_size)).nonzero()
        if len(wrong):
            item, frame, position = wrong[0].tolist()
            least = self.first_token + self._offsets[position]
            raise UserError(
                f"token {int(frames[item, frame, position])} at position {position} of frame {frame} of item {item}; "
                f"expected {least} to {least + self.codebook_size - 1} (order {self.order!r}, "
                f"offsets {self.offsets!r}, first_token {self.first_token})"
            )
        return self._levels(codes[:, :, torch.tensor(self._from_levels).argsort()])

    def _levels(self, frames: Tensor) -> list[Tensor]:
        """Frames (B, frames, tokens) in the order "frame", to one (B, N) per level."""
        ends = [0, *accumulate(self._count(level) for level in range(len(self.strides)))]
        return [frames[:, :, first:end].flatten(1) for first, end in pairwise(ends)]

    @property
    def _from_levels(self) -> list[int]:
        """For each position of a frame, the position of its code in a frame of the order "frame"."""
        first = [sum(self._count(lower) for lower in range(level)) for level in range(len(self.strides))]
        return [first[level] + number for level, number in self._slots]
