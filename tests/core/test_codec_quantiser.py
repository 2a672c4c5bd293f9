"""The quantizer: what it rounds to, what its gradient passes, and what a code stands for."""

from __future__ import annotations

import pytest
import torch
from small_codec import small
from torch.nn import functional as F

from snac_core.codec import SNAC
from snac_core.errors import UserError


def latent(codec: SNAC, frames: int = 8) -> torch.Tensor:
    return torch.randn(2, codec.latent_dim, frames)


def test_the_gradient_reaches_the_latent_straight_through_the_quantizer() -> None:
    codec = small().freeze()
    z = latent(codec).requires_grad_()
    z_q, _ = codec.quantizer(z)
    z_q.square().sum().backward()
    assert z.grad is not None
    assert z.grad.abs().sum(dim=(1, 2)).min() > 0


def test_of_one_level_the_gradient_is_that_of_the_projections_alone() -> None:
    level = small().freeze().quantizer.quantizers[2]
    z = torch.randn(1, 16, 4, requires_grad=True)
    got = torch.autograd.grad(level(z)[0].sum(), z)[0]
    expected = torch.autograd.grad(level.out_proj(level.in_proj(z)).sum(), z)[0]  # type: ignore[operator]
    torch.testing.assert_close(got, expected)


def test_no_gradient_passes_the_codes() -> None:
    codec = small().freeze()
    z = latent(codec).requires_grad_()
    codes = codec.quantizer(z)[1]
    assert not any(level.is_floating_point() or level.requires_grad for level in codes)
    assert not codec.quantizer.from_codes(codes).requires_grad


@torch.no_grad()
def test_codes_stand_for_the_quantized_latent() -> None:
    codec = small()
    z_q, codes = codec.quantizer(latent(codec))
    torch.testing.assert_close(codec.quantizer.from_codes(codes), z_q, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_code_is_the_entry_with_the_largest_cosine() -> None:
    codec = small()
    z = latent(codec)
    for level in codec.quantizer.quantizers:
        encoding = level.project(z)  # type: ignore[operator]
        cosine = torch.einsum("bdt,nd->btn", F.normalize(encoding, dim=1), F.normalize(level.codebook.weight, dim=1))  # type: ignore[union-attr]
        chosen = cosine.gather(-1, level.nearest(encoding).unsqueeze(-1)).squeeze(-1)  # type: ignore[operator]
        torch.testing.assert_close(chosen, cosine.amax(-1))


@torch.no_grad()
def test_a_coarse_level_is_constant_over_its_stride_and_the_next_quantizes_what_is_left() -> None:
    codec = small()
    z = latent(codec)
    first, second, _ = codec.quantizer.quantizers
    part = first(z)[0]
    assert torch.equal(part, part[..., ::4].repeat_interleave(4, dim=-1))
    assert torch.equal(second(z - part)[1], codec.quantizer(z)[1][1])


@torch.no_grad()
def test_codes_of_any_integer_type_decode_alike() -> None:
    codec = small()
    codes = codec.quantizer(latent(codec))[1]
    with codec.fixed_noise(0):
        expected = codec.decode(codes)
        assert torch.equal(codec.decode([level.to(torch.int16) for level in codes]), expected)


@pytest.mark.parametrize("shape", [(2, 15, 8), (2, 16, 6), (16, 8)])
def test_a_latent_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"expected \(B, 16, F\), F a multiple of 4"):
        small().quantizer(torch.randn(shape))
