"""Residual vector quantization at several time resolutions, with factorized, L2-normalized codebooks (ViT-VQGAN)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from snac_core.codec.layers import WNConv1d
from snac_core.errors import UserError


def _in_float32(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A method that gets its first tensor in float32 or wider and computes without autocast."""

    @wraps(method)
    def computed(self: Any, x: Tensor, *others: Any) -> Tensor:
        x = _widened(x)
        if not torch.is_autocast_enabled(x.device.type):
            return method(self, x, *others)
        with torch.autocast(x.device.type, enabled=False):
            return method(self, x, *others)

    return computed


def _widened(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _conv1x1(layer: WNConv1d, x: Tensor) -> Tensor:
    """`layer(x)`, with the layer's weight computed in the dtype of x."""
    if layer.bias is None or layer.bias.dtype == x.dtype:
        return F.conv1d(x, layer.weight, layer.bias)
    length, direction = (layer.get_parameter(f"parametrizations.weight.original{i}").to(x.dtype) for i in (0, 1))
    weight = torch._weight_norm(direction, length, 0)
    return F.conv1d(x, weight, layer.bias.to(x.dtype))


class VectorQuantize(nn.Module):
    """One level: average-pool by `stride`, project to `codebook_dim`, nearest entry, project back, repeat frames.

    It computes in float32 also with weights of half precision and under autocast: entries are so close to each other
    that rounding a latent to half precision changes many codes.

    Args:
        input_dim: C of the latent.
        codebook_size: number of entries N.
        codebook_dim: channels D of an entry.
        stride: latent frames per code.
    """

    def __init__(self, input_dim: int, codebook_size: int, codebook_dim: int, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride
        self.in_proj = WNConv1d(input_dim, codebook_dim, kernel_size=1)
        self.out_proj = WNConv1d(codebook_dim, input_dim, kernel_size=1)
        self.codebook = nn.Embedding(codebook_size, codebook_dim)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, F) to the quantized (B, C, F) and codes (B, F / stride); straight-through gradient."""
        z_e = self.project(z)
        indices = self.nearest(z_e)
        z_q = _widened(self.codebook(indices)).transpose(1, 2)
        return self.expand(z_e + (z_q - z_e).detach()), indices

    @_in_float32
    def project(self, z: Tensor) -> Tensor:
        """(B, C, F) to the encodings (B, D, F / stride) that are compared with the codebook."""
        if self.stride > 1:
            z = F.avg_pool1d(z, self.stride, self.stride)
        return _conv1x1(self.in_proj, z)

    @_in_float32
    def nearest(self, z_e: Tensor) -> Tensor:
        """Codes (B, F') of the nearest entries by squared distance of unit vectors, for z_e (B, D, F')."""
        encodings = F.normalize(rearrange(z_e, "b d t -> (b t) d"))
        codebook = F.normalize(_widened(self.codebook.weight))
        # |e|^2 and |c|^2 are 1 up to rounding; they are kept so that ties have the same result as in upstream
        distance = (
            encodings.pow(2).sum(1, keepdim=True)
            - 2 * encodings @ codebook.t()
            + codebook.pow(2).sum(1, keepdim=True).t()
        )
        return rearrange((-distance).max(1)[1], "(b t) -> b t", b=z_e.shape[0])

    @_in_float32
    def cosines(self, z_e: Tensor) -> Tensor:
        """Encodings (B, D, F') to their cosines (B, N, F') to all entries, which get no gradient."""
        codebook = F.normalize(_widened(self.codebook.weight.detach()))
        return torch.einsum("bdf,nd->bnf", F.normalize(z_e, dim=1), codebook)

    @_in_float32
    def expected(self, logits: Tensor) -> Tensor:
        """The mean entry (B, D, F') under the softmax of logits (B, N, F'); entries get no gradient."""
        return torch.einsum("bnf,nd->bdf", logits.softmax(1), _widened(self.codebook.weight.detach()))

    @_in_float32
    def expand(self, z_q: Tensor) -> Tensor:
        """Code vectors (B, D, F / stride) to this level's part of the latent (B, C, F)."""
        out = _conv1x1(self.out_proj, z_q)
        return out.repeat_interleave(self.stride, dim=-1) if self.stride > 1 else out


class ResidualVectorQuantize(nn.Module):
    """Residual quantization: each level quantizes the residual of the levels before it; coarse first.

    Args:
        input_dim: C of the latent.
        codebook_size, codebook_dim: of every level.
        vq_strides: one per level.
    """

    def __init__(self, input_dim: int, codebook_size: int, codebook_dim: int, vq_strides: Sequence[int]) -> None:
        super().__init__()
        self.input_dim, self.vq_strides = input_dim, tuple(vq_strides)
        self.quantizers = nn.ModuleList(
            VectorQuantize(input_dim, codebook_size, codebook_dim, stride) for stride in vq_strides
        )

    def forward(self, z: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(B, C, F) to z_q (B, C, F) and one (B, F / stride) per level; F is a multiple of the first stride.

        The gradient of z_q is passed to z unchanged (straight-through).

        Raises:
            UserError: for a latent of another shape.
        """
        if z.dim() != 3 or z.shape[1] != self.input_dim or z.shape[-1] % self.vq_strides[0]:
            raise UserError(
                f"a latent of shape {tuple(z.shape)}; expected (B, {self.input_dim}, F), F a multiple of "
                f"{self.vq_strides[0]}"
            )
        residual = _widened(z)
        z_q, codes = torch.zeros_like(residual), []
        for level in self.quantizers:
            part, indices = level(residual)
            z_q, residual = z_q + part, residual - part
            codes.append(indices)
        return z_q.to(z.dtype), codes

    def from_codes(self, codes: Sequence[Tensor]) -> Tensor:
        """Codes, (B, F / stride) per level, to z_q (B, C, F), in the dtype of the codebooks; without gradient."""
        z_q: Tensor | None = None
        for level, indices in zip(self.quantizers, codes, strict=True):
            assert isinstance(level, VectorQuantize)
            part = level.expand(level.codebook(indices.long()).transpose(1, 2))
            z_q = part if z_q is None else z_q + part
        assert z_q is not None
        assert isinstance(level, VectorQuantize)
        return z_q.to(level.codebook.weight.dtype)


class CodeWriter(nn.Module):
    """Moves a latent, as little as possible, to where the quantizer gives wanted encodings, such as codebook entries.

    The quantized latent of some codes is no such place: quantized again, nearly all of its codes are others. But the
    encodings of a block of `vq_strides[0]` frames are linear in its latent, in more dimensions than there are
    encodings: the least correction is that of the pseudo-inverse.

    Args:
        quantizer: frozen. It is not a submodule: its weights belong to the codec.
    """

    inverse: Tensor

    def __init__(self, quantizer: ResidualVectorQuantize) -> None:
        super().__init__()
        self._quantizer = [quantizer]
        frames, rows = quantizer.vq_strides[0], []
        for level in quantizer.quantizers:
            assert isinstance(level, VectorQuantize)
            pooling = torch.eye(frames // level.stride).repeat_interleave(level.stride, 1) / level.stride
            rows.append(torch.kron(pooling, level.in_proj.weight.detach().float().cpu().squeeze(-1)))
        inverse = torch.linalg.pinv(torch.cat(rows).double()).float()  # (frames * C, encodings of a block)
        self.register_buffer("inverse", inverse, persistent=False)

    @property
    def quantizer(self) -> ResidualVectorQuantize:
        """The quantizer."""
        return self._quantizer[0]

    @_in_float32
    def forward(self, z: Tensor, encodings: Sequence[Tensor]) -> Tensor:
        """z (B, C, F) and wanted encodings, (B, D, F / stride) per level, to (B, C, F).

        Each level encodes the residual after the encodings of the levels before it.
        """
        residual, missing = z, []
        for level, wanted in zip(self.quantizer.quantizers, encodings, strict=True):
            assert isinstance(level, VectorQuantize)
            gap = wanted - level.project(residual)
            missing.append(rearrange(gap, "b d (k n) -> b k (n d)", n=self.quantizer.vq_strides[0] // level.stride))
            residual = residual - level.expand(wanted)
        edit = torch.cat(missing, dim=-1) @ self.inverse.T.to(residual.dtype)
        return z + rearrange(edit, "b k (f c) -> b c (k f)", f=self.quantizer.vq_strides[0])
