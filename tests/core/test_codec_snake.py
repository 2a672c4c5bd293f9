"""Snake as one autograd function: the formula, its derivatives, and the machinery that must see through it."""

from __future__ import annotations

import pytest
import torch
from small_codec import small
from torch import Tensor

from snac_core.codec.layers import Snake1d, _Snake


def formula(x: Tensor, alpha: Tensor) -> Tensor:
    return x + (alpha + 1e-9).reciprocal() * torch.sin(alpha * x).pow(2)


def point(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    x = torch.randn(2, 3, 7, dtype=dtype) * 2
    alpha = torch.rand(1, 3, 1, dtype=dtype) + 0.3
    return x.requires_grad_(), alpha.requires_grad_()


def test_values_are_the_formulas_bit_for_bit() -> None:
    x, alpha = point(torch.float32)
    assert torch.equal(_Snake.apply(x, alpha), formula(x, alpha))


@pytest.mark.parametrize("trained", [(True, True), (True, False), (False, True)])
def test_first_and_second_derivatives_are_right(trained: tuple[bool, bool]) -> None:
    x, alpha = (value.detach().requires_grad_(on) for value, on in zip(point(), trained, strict=True))
    assert torch.autograd.gradcheck(_Snake.apply, (x, alpha))
    assert torch.autograd.gradgradcheck(_Snake.apply, (x, alpha))


def test_float32_gradients_agree_with_autograd_of_the_formula() -> None:
    x, alpha = point(torch.float32)
    got = torch.autograd.grad(_Snake.apply(x, alpha).square().sum(), (x, alpha))
    expected = torch.autograd.grad(formula(x, alpha).square().sum(), (x, alpha))
    torch.testing.assert_close(got, expected)


def test_frozen_frequencies_save_the_input_alone() -> None:
    x, alpha = point()
    saved: list[int] = []

    def count(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        _Snake.apply(x, alpha.detach())
    assert sum(size == x.numel() for size in saved) == 1


def test_gradients_through_torch_func_agree() -> None:
    x, alpha = point()
    expected = torch.autograd.grad(_Snake.apply(x, alpha).square().sum(), (x, alpha))
    got = torch.func.grad(lambda a, b: _Snake.apply(a, b).square().sum(), argnums=(0, 1))(x.detach(), alpha.detach())
    torch.testing.assert_close(got, expected)


def test_gradients_have_the_dtype_of_what_they_belong_to() -> None:
    x = torch.randn(1, 3, 5, dtype=torch.bfloat16, requires_grad=True)
    layer = Snake1d(3)
    layer(x).sum().backward()
    assert x.grad is not None
    assert (x.grad.dtype, layer.alpha.grad.dtype) == (torch.bfloat16, torch.float32)  # type: ignore[union-attr]


def test_the_codec_compiles_without_graph_breaks_and_keeps_its_gradients() -> None:
    codec = small(noise=False, encoder_rates=[2], decoder_rates=[2])
    z_q = torch.randn(1, codec.latent_dim, 8)
    expected = torch.autograd.grad(codec.decoder(z_q).square().sum(), list(codec.decoder.parameters()))
    compiled = torch.compile(codec.decoder, backend="aot_eager", fullgraph=True)
    got = torch.autograd.grad(compiled(z_q).square().sum(), list(codec.decoder.parameters()))
    torch.testing.assert_close(got, expected)
