"""The periodic activation of the codec, as one fused autograd function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _Snake(torch.autograd.Function):
    """y = x + sin(a x)^2 / (a + e), with one sine forward and one backward.

    The derivatives need no second sine:
        dy/dx = 1 + sin(2 a x) a / (a + e)
        dy/da = x sin(2 a x) / (a + e) - sin(a x)^2 / (a + e)^2 = (x sin(2 a x) - (y - x)) / (a + e)
    x is what is saved; y, which the next convolution keeps in any case, only where alpha is trained.
    """

    @staticmethod
    def forward(x: Tensor, alpha: Tensor) -> Tensor:
        # in upstream's order of operations, which makes the values equal bit for bit
        return (alpha * x).sin_().square_().mul_(_inverse(alpha)).add_(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        x, alpha = inputs
        ctx.save_for_backward(x, alpha, output if alpha.requires_grad else None)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, alpha, y = ctx.saved_tensors
        inverse = _inverse(alpha)
        doubled = ((2 * alpha) * x).sin_()
        grad_x = grad_alpha = None
        if ctx.needs_input_grad[1]:
            y = _Snake.apply(x, alpha) if y is None else y
            grad_alpha = (grad * (x * doubled - (y - x))).sum(dim=(0, 2), keepdim=True).mul(inverse).to(alpha.dtype)
        if ctx.needs_input_grad[0]:
            slope = doubled * (alpha * inverse) if ctx.needs_input_grad[1] else doubled.mul_(alpha * inverse)
            grad_x = torch.addcmul(grad, grad, slope).to(x.dtype)
        return grad_x, grad_alpha


def _inverse(alpha: Tensor) -> Tensor:
    return (alpha + 1e-9).reciprocal()


class Snake1d(nn.Module):
    """x + sin(alpha x)^2 / alpha, one alpha per channel (Ziyin et al. 2020, eq. 3): (B, C, T) to (B, C, T)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T) to (B, C, T)."""
        activated: Tensor = _Snake.apply(x, self.alpha)
        return activated
