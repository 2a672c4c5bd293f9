"""Windowed self-attention with rotary positions, as in the 32 and 44 kHz models."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from snac_core.codec.checks import HEAD
from snac_core.errors import UserError


class LocalMHA(nn.Module):
    """Multi-head attention inside windows that do not overlap, added to the input.

    Args:
        dim: C.
        window_size: frames of a window; F must be a multiple of it.
        dim_head: channels of a head.
    """

    def __init__(self, dim: int, window_size: int = 32, dim_head: int = HEAD) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.heads = dim // dim_head
        self.window_size = window_size
        self.to_qkv = nn.Linear(dim, dim * 3, bias=False)
        self.rel_pos = RotaryPositions(dim_head)
        self.to_out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, F) to (B, C, F); raises UserError where F is not a whole number of windows."""
        if x.shape[-1] % self.window_size:
            raise UserError(f"attention over {x.shape[-1]} frames; expected a multiple of {self.window_size}")
        windows = x.shape[-1] // self.window_size
        qkv = self.to_qkv(self.norm(x.transpose(1, 2))).chunk(3, dim=-1)
        q, k, v = (rearrange(t, "b (w n) (h d) -> b h w n d", w=windows, h=self.heads) for t in qkv)
        out = nn.functional.scaled_dot_product_attention(self.rel_pos(q), self.rel_pos(k), v)
        attended: Tensor = self.to_out(rearrange(out, "b h w n d -> b (w n) (h d)"))
        return attended.transpose(1, 2) + x


class RotaryPositions(nn.Module):
    """Rotates pairs of channels by an angle that grows with the position (Su et al. 2021, eq. 34).

    Args:
        dim: channels of a head.
    """

    inv_freq: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 1.0 / (10000 ** (torch.arange(0, dim, 2).float() / dim)))

    def forward(self, x: Tensor) -> Tensor:
        """(..., n, d) to (..., n, d)."""
        positions = torch.arange(x.shape[-2], device=x.device, dtype=self.inv_freq.dtype)
        angles = torch.outer(positions, self.inv_freq).repeat(1, 2)
        first, second = x.chunk(2, dim=-1)
        return x * angles.cos() + torch.cat((-second, first), dim=-1) * angles.sin()
