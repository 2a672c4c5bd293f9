"""The convolutional parts of SNAC, with upstream's parameter names."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from snac_core.codec.attention import LocalMHA
from snac_core.codec.convolution import WNConv1d, WNConvTranspose1d
from snac_core.codec.noise import NoiseSource
from snac_core.codec.snake import Snake1d


class ResidualUnit(nn.Module):
    """Snake, dilated convolution, Snake, 1x1 convolution, added to the input; (B, C, T) to (B, C, T)."""

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
        out: Tensor = x + self.block(x)
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
        out: Tensor = self.block(x)
        return out


class NoiseBlock(nn.Module):
    """Adds noise scaled by a 1x1 convolution of the input, in eval mode too: (B, C, T) to (B, C, T).

    Args:
        dim: C.
        source: where the noise comes from, shared by the blocks of a decoder.
        number: this block's place among them.
    """

    def __init__(self, dim: int, source: NoiseSource, number: int) -> None:
        super().__init__()
        self.linear = WNConv1d(dim, dim, kernel_size=1, bias=False)
        self.source = source
        self.number = number

    def forward(self, x: Tensor) -> Tensor:
        noisy: Tensor = x + self.source.draw(x, self.number) * self.linear(x)
        return noisy


class DecoderBlock(nn.Module):
    """Upsampling by `stride`, noise, three residual units: (B, C_in, T) to (B, C_out, T * stride)."""

    def __init__(
        self, input_dim: int, output_dim: int, stride: int, noise: tuple[NoiseSource, int] | None, groups: int = 1
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            Snake1d(input_dim),
            WNConvTranspose1d(
                input_dim,
                output_dim,
                kernel_size=2 * stride,
                stride=stride,
                padding=math.ceil(stride / 2),
                output_padding=stride % 2,
            ),
        ]
        if noise is not None:
            layers.append(NoiseBlock(output_dim, *noise))
        layers += [ResidualUnit(output_dim, dilation=dilation, groups=groups) for dilation in (1, 3, 9)]
        self.block = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
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
            block_noise = None if noise is None else (noise, number)
            layers.append(DecoderBlock(dim // 2**number, narrow, rate, block_noise, groups=narrow if depthwise else 1))
        layers += [Snake1d(narrow), WNConv1d(narrow, 1, kernel_size=7, padding=3), nn.Tanh()]
        self.model = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, F) to (B, 1, T)."""
        out: Tensor = self.model(x)
        return out
