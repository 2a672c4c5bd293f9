"""Discriminators of waveforms: multi-period and multi-resolution STFT, with their hinge and feature losses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from snac_core.codec.layers import WeightNorm, WNConv1d
from snac_core.spectral import stft

_SLOPE = 0.1  # of the leaky ReLU
_WIDEST = 32  # times the width of a period discriminator's first layer
Features = list[Tensor]
"""What one discriminator makes of a batch, layer by layer; the last is its score."""


class WNConv2d(nn.Module):
    """A convolution over (frames, bins) with weight norm, zero padding and a stride along the bins.

    Args:
        channels_in: C of the input.
        channels_out: C of the output.
        kernel: frames and bins, odd.
        stride: in bins.
        dilation: in frames.
    """

    def __init__(
        self, channels_in: int, channels_out: int, kernel: tuple[int, int], stride: int = 1, dilation: int = 1
    ) -> None:
        super().__init__()
        conv = nn.Conv2d(channels_in, channels_out, kernel)
        self.weight = WeightNorm(conv.weight.detach())
        self.bias = conv.bias
        self.stride, self.dilation = (1, stride), (dilation, 1)
        self.padding = (dilation * (kernel[0] // 2), kernel[1] // 2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, frames, bins) to (B, C_out, frames, bins / stride)."""
        return F.conv2d(x, self.weight(), self.bias, self.stride, self.padding, self.dilation)


class _OneChannelConv1d(WNConv1d):
    """A convolution of (B, 1, T) as a product of matrices: cuDNN is slow at the gradient of such a weight."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, T) to (B, C, T / stride)."""
        (kernel,), (stride,) = self.kernel_size, self.stride
        windows = F.pad(x.squeeze(1), (kernel // 2, kernel // 2)).unfold(-1, kernel, stride)
        return F.linear(windows, self.weight.squeeze(1), self.bias).transpose(1, 2)


class PeriodDiscriminator(nn.Module):
    """Looks at every `period`-th sample (HiFi-GAN, Kong et al. 2020, section 2.3): (B, 1, T) to features.

    The rows of the folded signal never meet, so they are items of a batch and the convolutions have one dimension.

    Args:
        period: samples between two that are looked at together.
        channels: of the first layer.
        growth: how many times as many each of the next three has as the one before; none has more than 32 times as
            many as the first.
    """

    def __init__(self, period: int, channels: int, growth: int) -> None:
        super().__init__()
        self.period = period
        widths = [1, channels, channels * growth, channels * growth**2, channels * min(growth**3, _WIDEST)]
        self.layers = nn.ModuleList(
            (WNConv1d if number else _OneChannelConv1d)(a, b, kernel_size=5, stride=3, padding=2)
            for number, (a, b) in enumerate(pairwise(widths))
        )
        self.layers.append(WNConv1d(widths[-1], widths[-1], kernel_size=5, padding=2))
        self.score = WNConv1d(widths[-1], 1, kernel_size=3, padding=1)

    def forward(self, audio: Tensor) -> Features:
        audio = F.pad(audio, (0, -audio.shape[-1] % self.period), mode="reflect")
        x = audio.view(len(audio), -1, self.period).transpose(1, 2).reshape(len(audio) * self.period, 1, -1)
        return _through(self.layers, self.score, x)


class SpectrogramDiscriminator(nn.Module):
    """Looks at the complex STFT of one window length (EnCodec, Defossez et al. 2022, section 3.4).

    Args:
        n_fft: window in samples; Hann, hop a quarter.
        channels: of every layer.
    """

    window: Tensor

    def __init__(self, n_fft: int, channels: int) -> None:
        super().__init__()
        self.n_fft = n_fft
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)
        self.layers = nn.ModuleList([WNConv2d(2, channels, (3, 9))])
        self.layers.extend(WNConv2d(channels, channels, (3, 9), stride=2, dilation=dilation) for dilation in (1, 2, 4))
        self.layers.append(WNConv2d(channels, channels, (3, 3)))
        self.score = WNConv2d(channels, 1, (3, 3))

    def forward(self, audio: Tensor) -> Features:
        """(B, 1, T) to features (B, channels, frames, bins)."""
        audio = F.pad(audio, (0, max(0, self.n_fft // 2 + 1 - audio.shape[-1])))  # what reflection needs
        with torch.autocast(audio.device.type, enabled=False):
            wave = audio.squeeze(1).to(self.window.dtype)
            spectrum = stft(wave, self.window, self.n_fft // 4, padding="reflect", normalized=True)
            x = torch.view_as_real(spectrum).permute(0, 3, 2, 1)  # (B, 2, frames, bins)
        return _through(self.layers, self.score, x)


class Discriminators(nn.Module):
    """Several discriminators of several kinds.

    Args:
        periods: of the period discriminators, in samples; primes, so that they overlap least.
        n_ffts: windows of the spectral discriminators, in samples.
        period_channels: width of the first layer of the period discriminators.
        spectral_channels: width of the first layer of the spectral discriminators.
        period_growth: see PeriodDiscriminator; 4, with 32 channels, gives the 41 M parameters of HiFi-GAN.
    """

    def __init__(
        self,
        periods: Sequence[int] = (2, 3, 5, 7, 11),
        n_ffts: Sequence[int] = (512, 1024, 2048),
        *,
        period_channels: int = 32,
        spectral_channels: int = 32,
        period_growth: int = 2,
    ) -> None:
        super().__init__()
        self.discriminators = nn.ModuleList(
            [PeriodDiscriminator(period, period_channels, period_growth) for period in periods]
        )
        self.discriminators.extend(SpectrogramDiscriminator(n_fft, spectral_channels) for n_fft in n_ffts)
        for norm in self.modules():
            if isinstance(norm, WeightNorm):
                _keep_scale(norm)

    def forward(self, audio: Tensor) -> list[Features]:
        """(B, 1, T) to the features of every discriminator, which hear all items at one level."""
        level = audio.square().mean(-1, keepdim=True).clamp(min=1e-8).sqrt()
        return [discriminator(audio / level) for discriminator in self.discriminators]


@contextmanager
def without_parameter_gradients(discriminator: nn.Module) -> Iterator[nn.Module]:
    """Inside, a forward pass of the discriminator asks for gradients of what it hears, and for none of its own parameters."""
    for parameter in discriminator.parameters():
        parameter.requires_grad_(False)
    try:
        yield discriminator
    finally:
        for parameter in discriminator.parameters():
            parameter.requires_grad_(True)


def discriminator_loss(real: Sequence[Features], fake: Sequence[Features]) -> Tensor:
    """Hinge: real speech above 1, made speech below -1 (Lim and Ye 2017); the mean over discriminators, a scalar."""
    terms = [F.relu(1 - r[-1]).mean() + F.relu(1 + f[-1]).mean() for r, f in zip(real, fake, strict=True)]
    return _wide(torch.stack(terms)).mean()


def adversarial_loss(fake: Sequence[Features]) -> Tensor:
    """What the generator makes small: minus the score of what it made; the mean over discriminators, a scalar."""
    return -_wide(torch.stack([f[-1].mean() for f in fake])).mean()


def feature_loss(real: Sequence[Features], fake: Sequence[Features]) -> Tensor:
    """L1 between the discriminators' hidden features of made and real speech, relative to the real ones' mean magnitude.

    Relative as in EnCodec, eq. 2, so that wide and narrow layers count alike; the mean over layers, a scalar.
    """
    terms = [
        (a.detach() - b).abs().mean() / a.detach().abs().mean().clamp(min=1e-5)
        for r, f in zip(real, fake, strict=True)
        for a, b in zip(r[:-1], f[:-1], strict=True)
    ]
    return _wide(torch.stack(terms)).mean()


def _wide(x: Tensor) -> Tensor:
    """Single precision at least: what comes out of mixed precision is too coarse for a mean."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _through(layers: nn.ModuleList, score: nn.Module, x: Tensor) -> Features:
    features: Features = []
    for layer in layers:
        x = F.leaky_relu(layer(x), _SLOPE)
        features.append(x)
    return [*features, score(x)]


@torch.no_grad()
def _keep_scale(norm: WeightNorm) -> None:
    """Initial weights that keep the scale of what passes (He et al. 2015); torch's own shrink it layer by layer."""
    nn.init.kaiming_normal_(norm.original1, a=_SLOPE)
    norm.original0.copy_(torch.norm_except_dim(norm.original1, 2, 0))
