"""Layers of the codec: noise, Snake, weight-normed convolutions, local attention, and encoder and decoder blocks."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from snac_core.codec import kernels
from snac_core.codec.checks import HEAD
from snac_core.errors import UserError
from snac_core.seeding import generator

_CACHED = 16  # segments kept while a seed is fixed; a decoder has four or so at a time
_ALIGNED = 16  # torch draws normal numbers in blocks of 16; whole blocks are a prefix of any longer draw
_SEGMENT = 2**16  # positions that share a generator: noise far into an item is drawn without the noise before it


class NoiseSource:
    """The random numbers of the noise blocks of one codec. A copy is not inside any `fixed` block."""

    def __init__(self) -> None:
        self._fixed: list[tuple[int, int]] = []  # seed and first frame of the `fixed` blocks, innermost last
        self._lock = Lock()
        self._given: Sequence[Tensor] | None = None
        self._drawn: dict[tuple[int, int, int, torch.device, torch.dtype], Tensor] = {}

    def __reduce__(self) -> tuple[type[NoiseSource], tuple[()]]:
        return NoiseSource, ()  # a copy made inside `fixed` would stay fixed forever

    @property
    def seed(self) -> int | None:
        """The seed of the innermost `fixed` block; None outside."""
        return self._fixed[-1][0] if self._fixed else None

    @contextmanager
    def fixed(self, seed: int, first_frame: int = 0) -> Iterator[None]:
        """Inside the block, noise depends only on (seed, noise block, position in the item).

        Threads that decode at the same time must fix the same seed and frame.

        Args:
            seed: a whole number.
            first_frame: position in the item, in latent frames, of the first frame that is decoded.
        """
        try:
            seed, first_frame = operator.index(seed), operator.index(first_frame)
        except TypeError:
            raise UserError(f"a noise seed is a whole number; got {seed!r}") from None
        block = (seed, first_frame)
        self._fixed.append(block)
        try:
            yield
        finally:
            with self._lock:  # the last equal one: another thread may have entered an equal block since
                del self._fixed[len(self._fixed) - 1 - self._fixed[::-1].index(block)]

    @contextmanager
    def given(self, noise: Sequence[Tensor]) -> Iterator[None]:
        """Inside the block, noise block i adds noise[i] (B, 1, T), or (1, 1, T) for all items."""
        before, self._given = self._given, noise
        try:
            yield
        finally:
            self._given = before

    def draw(self, x: Tensor, block: int, samples_per_frame: int = 1) -> Tensor:
        """Standard normal noise for activations x (B, C, T): (B, 1, T), or (1, 1, T) for all items when fixed.

        Fixed noise comes from the CPU's generator on every device, and each position of an item has its own number:
        neither padding nor decoding in chunks changes it.

        Args:
            x: what noise is added to.
            block: number of the noise block.
            samples_per_frame: positions of x per latent frame.
        """
        if self._given is not None:
            return self._given[block]
        if not self._fixed:
            return torch.randn((x.shape[0], 1, x.shape[-1]), device=x.device, dtype=x.dtype)
        noise: Tensor = self._drawn_from_seed(x, block, samples_per_frame)
        return noise

    # A graph that reads the seed would be compiled again for each step.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _drawn_from_seed(self, x: Tensor, block: int, samples_per_frame: int) -> Tensor:
        seed, first_frame = self._fixed[-1]
        first = first_frame * samples_per_frame
        last = first + x.shape[-1]
        parts = []
        for number in range(first // _SEGMENT, -(-last // _SEGMENT)):
            start = number * _SEGMENT
            parts.append(
                self._segment((seed, block, number), min(last - start, _SEGMENT), x)[..., max(0, first - start) :]
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def _segment(self, which: tuple[int, int, int], length: int, like: Tensor) -> Tensor:
        """The first `length` numbers (1, 1, length) of one segment: `which` is (seed, noise block, segment)."""
        seed, block, number = which
        key = (*which, like.device, like.dtype)
        noise = self._drawn.get(key)
        if noise is None or noise.shape[-1] < length:
            if len(self._drawn) >= _CACHED:
                self._drawn.clear()
            purpose = ("decoder noise", block, number) if number else ("decoder noise", block)
            with torch.inference_mode(False):  # cached noise may be used in training later
                drawn = torch.randn(
                    (1, 1, length + -length % _ALIGNED), generator=generator(seed, *purpose), dtype=torch.float32
                )
                noise = self._drawn[key] = drawn.to(device=like.device, dtype=like.dtype)
        return noise[..., :length]


class _Snake(torch.autograd.Function):
    """y = x + sin(a x)^2 / (a + e), with one sine forward and one backward.

    The derivatives need no second sine:
        dy/dx = 1 + sin(2 a x) a / (a + e)
        dy/da = x sin(2 a x) / (a + e) - sin(a x)^2 / (a + e)^2 = (x sin(2 a x) - (y - x)) / (a + e)
    Only x is saved, and y if alpha is trained; the next convolution saves y in any case.
    """

    @staticmethod
    def forward(x: Tensor, alpha: Tensor) -> Tensor:
        # upstream's order of operations: equal values, bit for bit
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

    compiled = False

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T) to (B, C, T)."""
        if self.compiled and kernels.usable(x):
            return kernels.snake(x, self.alpha, 0, kernels.compute_dtype(x))
        activated: Tensor = _Snake.apply(x, self.alpha)
        return activated


class WeightNorm(nn.Module):
    """Weight norm: length g (`original0`) and direction v (`original1`) of a weight, w = g v / |v|.

    Salimans and Kingma 2016, eq. 2, with the norm over all but the first dimension. torch's parametrization creates one
    class per module object, which deep copies share; this class has no such state.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.original0 = nn.Parameter(torch.norm_except_dim(weight, 2, 0))
        self.original1 = nn.Parameter(weight)

    def forward(self) -> Tensor:
        """The weight, of the shape of `original1`."""
        return torch._weight_norm(self.original1, self.original0, 0)


class WeightNormed:
    """Mixin for convolutions with weight norm: `weight` is computed from `parametrizations.weight`, or cached.

    Call `norm_weight()` at the end of the constructor. `fold()` caches the weight in a buffer outside the state dict.
    The cache is updated when parameters are loaded or moved to a device or dtype, and not used while they are trained.
    """

    parametrizations: nn.ModuleDict
    _folded: Tensor | None

    def norm_weight(self) -> None:
        """Replace the parameter `weight` by its length and direction."""
        weight = self._parameters.pop("weight").detach()  # type: ignore[attr-defined]
        self.parametrizations = nn.ModuleDict({"weight": WeightNorm(weight)})
        self.register_buffer("_folded", None, persistent=False)  # type: ignore[attr-defined]
        self.register_load_state_dict_post_hook(_refold)  # type: ignore[attr-defined]

    @property
    def weight(self) -> Tensor:
        """The effective weight."""
        normed = self.parametrizations["weight"]  # missing while the constructor of the convolution sets `weight`
        if self._folded is not None and not (normed.original0.requires_grad or normed.original1.requires_grad):
            return self._folded
        weight: Tensor = normed()
        return weight

    def fold(self) -> None:
        """Cache the current weight; parameters and state dict do not change."""
        with torch.inference_mode(False), torch.no_grad():  # an inference tensor cannot be used in training later
            self._folded = self.parametrizations["weight"]()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[misc]
        _refold(
            self
        )  # from the moved parameters, so that cached and computed weights are equal on every device and dtype
        return self


def _refold(layer: Any, _incompatible: Any = None) -> None:
    if layer._folded is not None:
        layer.fold()


class WNConv1d(WeightNormed, nn.Conv1d):  # type: ignore[override]
    """`nn.Conv1d` with weight norm; arguments of `nn.Conv1d`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.norm_weight()


class WNConvTranspose1d(WeightNormed, nn.ConvTranspose1d):  # type: ignore[override]
    """Transposed convolution of 2 * stride taps with weight norm: (B, C, T) to (B, D, T * stride).

    Compiled, it is computed as a convolution of two taps, one output channel per phase, because each output depends on
    two inputs; the phases are then interleaved. torch computes this in 0.7 to 0.9 of the time.
    """

    compiled = False

    def __init__(self, input_dim: int, output_dim: int, stride: int) -> None:
        super().__init__(
            input_dim,
            output_dim,
            kernel_size=2 * stride,
            stride=stride,
            padding=math.ceil(stride / 2),
            output_padding=stride % 2,
        )
        self.norm_weight()
        self.register_buffer("_phases", None, persistent=False)

    def fold(self) -> None:
        """As in `WeightNormed`; compiled, the weight of the phases (stride * D, C, 2) is cached too."""
        super().fold()
        if self.compiled:
            with torch.inference_mode(False), torch.no_grad():
                weight, stride = self.weight, self.stride[0]  # taps on input t, then on input t - 1
                self._phases = (
                    torch.stack([weight[..., stride:], weight[..., :stride]], -1)
                    .permute(1, 2, 0, 3)
                    .flatten(0, 1)
                    .contiguous()
                )

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """(B, C, T) to (B, D, T * stride)."""
        if self._phases is None or not kernels.usable(x):
            return super().forward(x, output_size)
        assert self.bias is not None
        stride, skipped = self.stride[0], int(self.padding[0])
        phases = nn.functional.conv1d(x, self._phases, self.bias.repeat_interleave(stride), padding=1)
        audio = phases.view(len(x), -1, stride, phases.shape[-1]).transpose(2, 3).flatten(2)
        upsampled: Tensor = audio[..., skipped : skipped + x.shape[-1] * stride]
        return upsampled


class LocalMHA(nn.Module):
    """Multi-head attention in non-overlapping windows, added to the input.

    Args:
        dim: C.
        window_size: frames of a window; F must be a multiple of it.
        dim_head: channels per head.
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
        """(B, C, F) to (B, C, F); UserError if F is not a multiple of `window_size`."""
        if x.shape[-1] % self.window_size:
            raise UserError(f"attention over {x.shape[-1]} frames; expected a multiple of {self.window_size}")
        windows = x.shape[-1] // self.window_size
        qkv = self.to_qkv(self.norm(x.transpose(1, 2))).chunk(3, dim=-1)
        q, k, v = (rearrange(t, "b (w n) (h d) -> (b w) h n d", w=windows, h=self.heads) for t in qkv)
        out = nn.functional.scaled_dot_product_attention(self.rel_pos(q), self.rel_pos(k), v)
        attended: Tensor = self.to_out(rearrange(out, "(b w) h n d -> b (w n) (h d)", w=windows))
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


class ResidualUnit(nn.Module):
    """Snake, dilated convolution, Snake, 1x1 convolution, added to the input; (B, C, T) to (B, C, T)."""

    compiled = False

    def __init__(self, dim: int, dilation: int = 1, kernel: int = 7, groups: int = 1) -> None:
        super().__init__()
        padding = ((kernel - 1) * dilation) // 2
        self.block = nn.Sequential(
            Snake1d(dim),
            WNConv1d(dim, dim, kernel_size=kernel, dilation=dilation, padding=padding, groups=groups),
            Snake1d(dim),
            WNConv1d(dim, dim, kernel_size=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T) to (B, C, T)."""
        out: Tensor = x + (self._fused(x) if self.compiled and kernels.usable(x) else self.block(x))
        return out

    def _fused(self, x: Tensor) -> Tensor:
        """`block(x)`, with its first three layers in two kernels."""
        first, convolution, second, pointwise = self.block
        assert isinstance(first, Snake1d)
        assert isinstance(convolution, WNConv1d)
        assert isinstance(second, Snake1d)
        padded = kernels.snake(x, first.alpha, int(convolution.padding[0]), x.dtype)
        assert convolution.bias is not None
        layer = convolution.weight, convolution.bias, convolution.dilation[0]
        out: Tensor = pointwise(kernels.depthwise_snake(padded, layer, second.alpha, kernels.compute_dtype(x)))
        return out


class EncoderBlock(nn.Module):
    """Three residual units, then downsampling by `stride`: (B, C / 2, T) to (B, C, T / stride)."""

    def __init__(self, output_dim: int, stride: int, groups: int = 1) -> None:
        super().__init__()
        input_dim = output_dim // 2
        self.block = nn.Sequential(
            *(ResidualUnit(input_dim, dilation=dilation, groups=groups) for dilation in (1, 3, 9)),
            Snake1d(input_dim),
            WNConv1d(input_dim, output_dim, kernel_size=2 * stride, stride=stride, padding=math.ceil(stride / 2)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C / 2, T) to (B, C, T / stride)."""
        out: Tensor = self.block(x)
        return out


class NoiseBlock(nn.Module):
    """Adds noise scaled by a 1x1 convolution of the input, in eval mode too: (B, C, T) to (B, C, T).

    Args:
        dim: C.
        source: of the noise, shared by the blocks of a decoder.
        number: index of this block.
        samples_per_frame: T of one latent frame.
    """

    def __init__(self, dim: int, source: NoiseSource, number: int, samples_per_frame: int) -> None:
        super().__init__()
        self.linear = WNConv1d(dim, dim, kernel_size=1, bias=False)
        self.source = source
        self.number = number
        self.samples_per_frame = samples_per_frame

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T) to (B, C, T)."""
        noisy: Tensor = x + self.source.draw(x, self.number, self.samples_per_frame) * self.linear(x)
        return noisy


class DecoderBlock(nn.Module):
    """Upsampling by `stride`, noise, three residual units: (B, C_in, T) to (B, C_out, T * stride)."""

    def __init__(
        self, input_dim: int, output_dim: int, stride: int, noise: tuple[NoiseSource, int, int] | None, groups: int = 1
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            Snake1d(input_dim),
            WNConvTranspose1d(input_dim, output_dim, stride),
        ]
        if noise is not None:
            layers.append(NoiseBlock(output_dim, *noise))
        layers += [ResidualUnit(output_dim, dilation=dilation, groups=groups) for dilation in (1, 3, 9)]
        self.block = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, T) to (B, C_out, T * stride)."""
        out: Tensor = self.block(x)
        return out


class Encoder(nn.Module):
    """Audio (B, 1, T) to the latent (B, C, F): convolution, downsampling blocks, attention, convolution."""

    def __init__(self, dim: int, rates: Sequence[int], depthwise: bool, attn_window_size: int | None) -> None:
        super().__init__()
        layers: list[nn.Module] = [WNConv1d(1, dim, kernel_size=7, padding=3)]
        for rate in rates:
            dim *= 2
            layers.append(EncoderBlock(dim, rate, groups=dim // 2 if depthwise else 1))
        if attn_window_size is not None:
            layers.append(LocalMHA(dim, attn_window_size))
        layers.append(WNConv1d(dim, dim, kernel_size=7, padding=3, groups=dim if depthwise else 1))
        self.block = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Padded audio (B, 1, T) to (B, C, F)."""
        out: Tensor = self.block(x)
        return out


class Decoder(nn.Module):
    """Quantised latent (B, C, F) to audio (B, 1, T): convolution, attention, upsampling blocks, convolution, tanh."""

    def __init__(
        self,
        input_dim: int,
        dim: int,
        rates: Sequence[int],
        noise: NoiseSource | None,
        depthwise: bool,
        attn_window_size: int | None,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        if depthwise:
            layers.append(WNConv1d(input_dim, input_dim, kernel_size=7, padding=3, groups=input_dim))
            layers.append(WNConv1d(input_dim, dim, kernel_size=1))
        else:
            layers.append(WNConv1d(input_dim, dim, kernel_size=7, padding=3))
        if attn_window_size is not None:
            layers.append(LocalMHA(dim, attn_window_size))
        for number, rate in enumerate(rates):
            narrow = dim // 2 ** (number + 1)
            block_noise = None if noise is None else (noise, number, math.prod(rates[: number + 1]))
            layers.append(DecoderBlock(dim // 2**number, narrow, rate, block_noise, groups=narrow if depthwise else 1))
        layers += [Snake1d(narrow), WNConv1d(narrow, 1, kernel_size=7, padding=3), nn.Tanh()]
        self.model = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, F) to (B, 1, T)."""
        out: Tensor = self.model(x)
        return out
