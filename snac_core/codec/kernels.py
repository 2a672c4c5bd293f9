"""Kernels for inference: Snake, and depthwise convolution with the Snake after it.

torch makes five passes over memory for a Snake, and its depthwise convolutions reach a twentieth of a processor's
speed: together they take more than half of the time of a codec. `torch.compile` makes one vectorized pass of each.
Lengths, channels and dilations are arguments, so that three compiled kernels serve every layer, length and codec. Dense
convolutions stay those of torch, which are matrix products at full speed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


def snake(x: Tensor, alpha: Tensor, padding: int, dtype: torch.dtype) -> Tensor:
    """x + sin(alpha x)^2 / alpha, padded with zeros: (B, C, T) to (B, C, T + 2 * padding) of `dtype`."""
    batch, channels, length = x.shape
    with torch.no_grad():
        out = x.new_empty((batch * channels, length + 2 * padding), dtype=dtype)
        if padding:  # a kernel that pads is not vectorized
            out[:, :padding], out[:, -padding:] = 0, 0
        rows = x.reshape(batch * channels, length)
        _compiled(_snake_into)(out[:, padding : padding + length], rows, _repeated(alpha.flatten(), batch))
        return out.view(batch, channels, -1)


def depthwise_snake(x: Tensor, layer: tuple[Tensor, Tensor, int], alpha: Tensor, dtype: torch.dtype) -> Tensor:
    """A depthwise convolution of what is padded already, then Snake: padded (B, C, T) to (B, C, T) of `dtype`.

    Args:
        x: the padded input.
        layer: weight (C, 1, K), bias (C,) and dilation.
        alpha: (1, C, 1).
        dtype: of the result.
    """
    weight, bias, dilation = layer
    batch, channels, length = x.shape
    with torch.no_grad():
        of_rows = [_repeated(each, batch) for each in (weight[:, 0], bias, alpha.flatten())]
        out: Tensor = _compiled(_depthwise_rows)(x.reshape(batch * channels, length), *of_rows, dilation, dtype)
        return out.view(batch, channels, -1)


def usable(x: Tensor) -> bool:
    """Whether a pass over x needs no gradient and is not traced: kernels have no gradient and are graphs themselves."""
    return not (torch.is_grad_enabled() and x.requires_grad) and not torch.compiler.is_compiling()


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which convolutions of x compute: that of autocast, where it is enabled."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _repeated(parameter: Tensor, batch: int) -> Tensor:
    """A parameter (C, ...) for the rows (batch * C, ...) of a batch: a kernel of rows serves every batch size."""
    parameter = parameter.detach()
    return parameter if batch == 1 else parameter.repeat(batch, *[1] * (parameter.dim() - 1))


def _snake_into(out: Tensor, x: Tensor, alpha: Tensor) -> None:
    """(N, T) to (N, T)."""
    out.copy_(_snake(x, alpha))


def _depthwise_rows(
    x: Tensor, weight: Tensor, bias: Tensor, alpha: Tensor, dilation: int, dtype: torch.dtype
) -> Tensor:
    """(N, T') to (N, T), with weight (N, K), bias (N,) and alpha (N,)."""
    length = x.shape[-1] - (weight.shape[-1] - 1) * dilation
    y = bias[:, None]
    for tap in range(weight.shape[-1]):
        y = y + x[:, tap * dilation : tap * dilation + length] * weight[:, tap, None]
    return _snake(y, alpha).to(dtype)


def _snake(x: Tensor, alpha: Tensor) -> Tensor:
    alpha = alpha[:, None]
    return x + (alpha * x).sin().square() * (alpha + 1e-9).reciprocal()


@lru_cache
def _compiled(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel, compiled at its first call for all shapes."""
    return torch.compile(kernel, dynamic=True)
