"""Edits of a latent: residual branches of convolutions over time, with FiLM."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from snac_core.film import FiLM

LEAST = 1e-3  # lower limit of a channel's standard deviation, for silence


class ConvAdapter(nn.Module):
    """A residual branch of convolutions over time with FiLM; its edit depends on the frame.

    Args:
        channels: C of the latent.
        speaker_dim: S.
        hidden: width of the residual path.
        layers: blocks of FiLM(convolution over `kernel` frames) with a GELU.
        kernel: frames, odd.
        bound: largest edit of a channel, in standard deviations of that channel over the item; None: any size.
    """

    def __init__(
        self, channels: int, speaker_dim: int, hidden: int, layers: int, kernel: int, bound: float | None
    ) -> None:
        super().__init__()
        self.bound = bound
        widths = [channels] + [hidden] * layers
        films = [FiLM(speaker_dim, hidden) for _ in range(layers)]
        for film in films:
            _act_from_the_first_step(film)
        self.convolutions = nn.ModuleList(
            nn.Conv1d(width, hidden, kernel, padding=kernel // 2) for width in widths[:-1]
        )
        self.films = nn.ModuleList(films)
        self.output = output_of_zeros(hidden, channels)

    def forward(self, x: Tensor, speaker: Tensor) -> Tensor:
        """x (B, C, F) and speaker (B, S) to (B, C, F); equal to x at initialization."""
        hidden = x
        for convolution, film in zip(self.convolutions, self.films, strict=True):
            hidden = nn.functional.gelu(film(convolution(hidden), speaker))
        edit: Tensor = self.output(hidden)
        if self.bound is not None:
            largest = self.bound * x.detach().std(dim=-1, keepdim=True).clamp(min=LEAST)
            edit = largest * torch.tanh(edit / largest)
        return x + edit


class DilatedBlocks(nn.Module):
    """Features of a latent and a speaker, from half a second around the frame.

    A block is h + conv(GELU(FiLM(norm(h)))), where norm is over the channels of a frame. With a kernel of 5 frames and
    dilations 1, 3 and 9, a frame sees 26 frames on either side.

    Args:
        channels: C of the latent.
        speaker_dim: S.
        hidden: width H.
        kernel: frames, odd.
        dilations: one block each.
    """

    def __init__(self, channels: int, speaker_dim: int, hidden: int, kernel: int, dilations: Sequence[int]) -> None:
        super().__init__()
        self.input = nn.Conv1d(channels, hidden, 1)
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in dilations)
        films = [FiLM(speaker_dim, hidden) for _ in dilations]
        for film in films:
            _act_from_the_first_step(film)
        self.films = nn.ModuleList(films)
        self.convolutions = nn.ModuleList(
            nn.Conv1d(hidden, hidden, kernel, dilation=dilation, padding=dilation * (kernel // 2))
            for dilation in dilations
        )

    def features(
        self, x: Tensor, speaker: Tensor, after: Callable[[int, Tensor], Tensor] = lambda _, hidden: hidden
    ) -> Tensor:
        """x (B, C, F) and speaker (B, S) to (B, H, F).

        Args:
            x: latent.
            speaker: embeddings.
            after: of the number of a block and its output (B, H, F), the input of the next one.
        """
        hidden: Tensor = self.input(x)
        for number, (norm, film, convolution) in enumerate(zip(self.norms, self.films, self.convolutions, strict=True)):
            normed = norm(hidden.transpose(1, 2)).transpose(1, 2)
            hidden = after(number, hidden + convolution(nn.functional.gelu(film(normed, speaker))))
        return hidden


class DilatedAdapter(DilatedBlocks):
    """A residual branch of `DilatedBlocks`."""

    def __init__(self, channels: int, speaker_dim: int, hidden: int, kernel: int, dilations: Sequence[int]) -> None:
        super().__init__(channels, speaker_dim, hidden, kernel, dilations)
        self.output = output_of_zeros(hidden, channels)

    def forward(self, x: Tensor, speaker: Tensor) -> Tensor:
        """x (B, C, F) and speaker (B, S) to (B, C, F); equal to x at initialization."""
        edit: Tensor = self.output(nn.functional.gelu(self.features(x, speaker)))
        return x + edit


def output_of_zeros(hidden: int, channels: int) -> nn.Conv1d:
    """The last layer of an adapter, (B, hidden, F) to (B, channels, F): zero until it is trained."""
    layer = nn.Conv1d(hidden, channels, 1)
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def _act_from_the_first_step(film: FiLM) -> None:
    """Random heads, so that the speaker has an effect inside an adapter of which only the output starts at zero."""
    nn.init.normal_(film.scale.weight)  # unit vectors give scales and shifts of unit variance
    nn.init.normal_(film.shift.weight)
