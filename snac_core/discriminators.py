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
"""Outputs of the layers of one discriminator for a batch; the last one is its score."""


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
    """A convolution of (B, 1, T) as a matrix product: cuDNN computes the gradient of such a weight slowly."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1, T) to (B, C, T / stride)."""
        (kernel,), (stride,) = self.kernel_size, self.stride
        windows = F.pad(x.squeeze(1), (kernel // 2, kernel // 2)).unfold(-1, kernel, stride)
        return F.linear(windows, self.weight.squeeze(1), self.bias).transpose(1, 2)


class PeriodDiscriminator(nn.Module):
    """Multi-period discriminator of one period (HiFi-GAN, Kong et al. 2020, section 2.3).

    The kernels of HiFi-GAN do not span several rows of the folded signal, so the rows are items of a batch here, and
    the convolutions have one dimension.

    Args:
        period: number of rows of the folded signal, in samples.
        channels: of the first layer.
        growth: factor of the channels from one layer to the next, three times; at most 32 times the first layer's.
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
        """(B, 1, T) to features (B * period, channels, frames)."""
        audio = F.pad(audio, (0, -audio.shape[-1] % self.period), mode="reflect")
        x = audio.view(len(audio), -1, self.period).transpose(1, 2).reshape(len(audio) * self.period, 1, -1)
        return _features(self.layers, self.score, x)


class SpectrogramDiscriminator(nn.Module):
    """Discriminator of complex spectrograms of one window length (EnCodec, Defossez et al. 2022, section 3.4).

    Args:
        n_fft: length of the Hann window in samples; the hop is a quarter of it.
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
        """(B, 1, T) to features (B, channels, frames, bins), and the score (B, 1, frames, bins)."""
        audio = F.pad(audio, (0, max(0, self.n_fft // 2 + 1 - audio.shape[-1])))  # the reflection needs so many samples
        with torch.autocast(audio.device.type, enabled=False):
            wave = audio.squeeze(1).to(self.window.dtype)
            spectrum = stft(wave, self.window, self.n_fft // 4, padding="reflect", normalized=True)
            x = torch.view_as_real(spectrum).permute(0, 3, 2, 1)  # (B, 2, frames, bins)
        return _features(self.layers, self.score, x)


class Discriminators(nn.Module):
    """Multi-period and multi-resolution STFT discriminators.

    Args:
        periods: of the period discriminators, in samples; prime numbers have the least overlap.
        n_ffts: windows of the spectrogram discriminators, in samples.
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
                _init_he(norm)

    def forward(self, audio: Tensor) -> list[Features]:
        """(B, 1, T) to the features of every discriminator; each item is scaled to unit RMS first."""
        level = audio.square().mean(-1, keepdim=True).clamp(min=1e-8).sqrt()
        return [discriminator(audio / level) for discriminator in self.discriminators]


@contextmanager
def without_parameter_gradients(discriminator: nn.Module) -> Iterator[nn.Module]:
    """Inside the block, gradients pass through the discriminator to its input, and not to its parameters."""
    for parameter in discriminator.parameters():
        parameter.requires_grad_(False)
    try:
        yield discriminator
    finally:
        for parameter in discriminator.parameters():
            parameter.requires_grad_(True)


def discriminator_loss(real: Sequence[Features], fake: Sequence[Features]) -> Tensor:
    """Hinge loss (Lim and Ye 2017), real speech above 1, generated below -1: a scalar, the mean over discriminators."""
    terms = [F.relu(1 - r[-1]).mean() + F.relu(1 + f[-1]).mean() for r, f in zip(real, fake, strict=True)]
    return _at_least_float32(torch.stack(terms)).mean()


def adversarial_loss(fake: Sequence[Features]) -> Tensor:
    """Hinge loss of the generator: minus the score of its output; a scalar, the mean over discriminators."""
    return -_at_least_float32(torch.stack([f[-1].mean() for f in fake])).mean()


def feature_loss(real: Sequence[Features], fake: Sequence[Features], *, items: int = 1) -> Tensor:
    """Feature matching: L1 between hidden features of generated and real speech, relative to the mean of the real ones.

    Relative as in EnCodec, eq. 2, so that all layers have equal weight.

    Args:
        real: features of the recordings.
        fake: features of the generated speech, of as many rows.
        items: the rows are divided into so many items, and each is relative to its own mean; 1: all rows together.

    Returns:
        a scalar, the mean over items and layers.
    """
    terms = []
    for r, f in zip(real, fake, strict=True):
        for a, b in zip(r[:-1], f[:-1], strict=True):
            wanted, got = (x.reshape(items, -1) for x in (a.detach(), b))
            terms.append(((wanted - got).abs().mean(1) / wanted.abs().mean(1).clamp(min=1e-5)).mean())
    return _at_least_float32(torch.stack(terms)).mean()


def _at_least_float32(x: Tensor) -> Tensor:
    """At least float32: bfloat16 is too coarse for a mean."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _features(layers: nn.ModuleList, score: nn.Module, x: Tensor) -> Features:
    features: Features = []
    for layer in layers:
        x = F.leaky_relu(layer(x), _SLOPE)
        features.append(x)
    return [*features, score(x)]


@torch.no_grad()
def _init_he(norm: WeightNorm) -> None:
    """Initial weights that keep the scale of activations (He et al. 2015); torch's defaults reduce it in each layer."""
    nn.init.kaiming_normal_(norm.original1, a=_SLOPE)
    norm.original0.copy_(torch.norm_except_dim(norm.original1, 2, 0))
