"""Phase 6: an adapter on the encoder latent, before VQ; the codes contain the target speaker."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from snac_core import Conditioning, Step, Strategy, Tap, Taps, hookimpl
from snac_core.film import FiLM
from snac_core.legacy import LegacyKeys
from snac_core.losses import commitment

_KERNEL, _LAYERS, _DILATIONS = 5, 2, (1, 3, 9)  # the defaults; kernel and dilations in frames
_LEAST = 1e-3  # lower limit of a channel's standard deviation, for silence


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
        self.output = nn.Conv1d(hidden, channels, 1)
        for parameter in self.output.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, speaker: Tensor) -> Tensor:
        """x (B, C, F) and speaker (B, S) to (B, C, F); equal to x at initialization."""
        hidden = x
        for convolution, film in zip(self.convolutions, self.films, strict=True):
            hidden = nn.functional.gelu(film(convolution(hidden), speaker))
        edit: Tensor = self.output(hidden)
        if self.bound is not None:
            largest = self.bound * x.detach().std(dim=-1, keepdim=True).clamp(min=_LEAST)
            edit = largest * torch.tanh(edit / largest)
        return x + edit


class DilatedAdapter(nn.Module):
    """A residual branch of blocks with dilated convolutions; its edit depends on half a second around the frame.

    A block is h + conv(GELU(FiLM(norm(h)))), where norm is over the channels of a frame. With a kernel of 5 frames and
    dilations 1, 3 and 9, a frame sees 26 frames on either side.

    Args:
        channels: C of the latent.
        speaker_dim: S.
        hidden: width of the residual path.
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
        self.output = nn.Conv1d(hidden, channels, 1)
        for parameter in self.output.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, speaker: Tensor) -> Tensor:
        """x (B, C, F) and speaker (B, S) to (B, C, F); equal to x at initialization."""
        hidden = self.input(x)
        for norm, film, convolution in zip(self.norms, self.films, self.convolutions, strict=True):
            normed = norm(hidden.transpose(1, 2)).transpose(1, 2)
            hidden = hidden + convolution(nn.functional.gelu(film(normed, speaker)))
        edit: Tensor = self.output(nn.functional.gelu(hidden))
        return x + edit


def _act_from_the_first_step(film: FiLM) -> None:
    """Random heads, so that the speaker has an effect inside an adapter of which only the output starts at zero."""
    nn.init.normal_(film.scale.weight)  # unit vectors give scales and shifts of unit variance
    nn.init.normal_(film.shift.weight)


def _from_original(values: Mapping[str, Any], is_adapter: bool) -> dict[str, Any]:
    """Layers without the two heads that an original file counts too; its training had no commitment term."""
    layers = values["adapter_num_layers"]
    if isinstance(layers, int):
        if layers < 2:
            raise ValueError(f"adapter_num_layers = {layers}; it counts the heads too, so at least 2")
        layers = layers - 1
    return {"num_layers": layers, "weights.commitment": 0.0}


class Phase6EncoderAdapter(Strategy):
    """A residual adapter at encoder taps, conditioned on the speaker embedding."""

    name = "phase6_encoder_adapter"
    default_weights = {"commitment": 1.0}  # noqa: RUF012  (a constant of the class, as in its base)

    legacy_keys = LegacyKeys(
        places={"adapter_type": "adapter_type", "adapter_hidden_dim": "hidden_dim"},
        known_by=(
            "adapter_type", "adapter_hidden_dim", "adapter_num_layers", "lambda_speaker_identity", "lambda_speaker_vc",
        ),
        defaults={"adapter_type": "film", "adapter_hidden_dim": 512, "adapter_num_layers": 2},
        computed_from=("adapter_num_layers",),
        compute=_from_original,
    )  # fmt: skip

    class Config(Strategy.Config):
        adapter_type: Literal["conv", "dilated", "film"] = Field(
            "conv",
            description="Convolutions over time with FiLM, residual blocks of dilated convolutions with FiLM, or one "
            "affine map for all frames.",
        )
        hidden_dim: int = Field(256, ge=1, description="Width inside the adapter.")
        num_layers: int = Field(_LAYERS, ge=1, description="Layers of the conv and film types.")
        kernel: int = Field(_KERNEL, ge=1, description="Kernel size of the conv and dilated types, in frames; odd.")
        dilations: tuple[Annotated[int, Field(ge=1)], ...] = Field(
            _DILATIONS, min_length=1, description="Dilations of the dilated type, in frames, one per block."
        )
        bound: float | None = Field(
            None,
            gt=0,
            description="Largest edit of the conv type, in standard deviations of a channel; None: no limit.",
        )
        taps: tuple[str, ...] = Field(("latent",), description="Patterns of the taps to edit, before VQ.")

        @model_validator(mode="after")
        def _fits_together(self) -> Self:
            if self.kernel % 2 == 0:
                raise ValueError(f"kernel = {self.kernel}; expected an odd number")
            if self.adapter_type == "film" and self.kernel != _KERNEL:
                raise ValueError("kernel belongs to adapter_type = 'conv' or 'dilated'; 'film' has none")
            if self.adapter_type != "conv" and self.bound is not None:
                raise ValueError(f"bound belongs to adapter_type = 'conv'; {self.adapter_type!r} has none")
            if self.adapter_type != "dilated" and self.dilations != _DILATIONS:
                raise ValueError(f"dilations belong to adapter_type = 'dilated'; {self.adapter_type!r} has none")
            if self.adapter_type == "dilated" and self.num_layers != _LAYERS:
                raise ValueError(
                    "num_layers belongs to adapter_type = 'conv' or 'film'; 'dilated' has one per dilation"
                )
            return self

    def __init__(self, config: Config, taps: Taps) -> None:
        super().__init__(config, taps)
        self.before_taps = config.taps
        self.adapters = nn.ModuleDict()
        for tap in taps.match(config.taps):
            if config.adapter_type == "film":
                hidden = (config.hidden_dim,) * config.num_layers
                self.adapters[tap.name] = FiLM(taps.speaker_dim, tap.channels, hidden)
            elif config.adapter_type == "dilated":
                self.adapters[tap.name] = DilatedAdapter(
                    tap.channels, taps.speaker_dim, config.hidden_dim, config.kernel, config.dilations
                )
            else:
                self.adapters[tap.name] = ConvAdapter(
                    tap.channels, taps.speaker_dim, config.hidden_dim, config.num_layers, config.kernel, config.bound
                )

    @hookimpl
    def before_vq(self, x: Tensor, cond: Conditioning, tap: Tap) -> Tensor:
        """(B, C, F) to (B, C, F)."""
        edited: Tensor = self.adapters[tap.name](x, cond.speaker)
        return edited

    def receptive_field(self, tap: Tap) -> float:
        """Of the convolutions; all frames where `bound` measures a channel over the item."""
        config = self.config
        if config.adapter_type == "film":
            return 0
        if config.adapter_type == "dilated":
            return sum(config.dilations) * (config.kernel // 2)
        return math.inf if config.bound is not None else config.num_layers * (config.kernel // 2)

    @hookimpl
    def loss(self, step: Step) -> dict[str, Tensor]:
        """`commitment`: the quantization error of edited latents, a scalar; see `snac_core.losses.commitment`."""
        own, converted = step.identity_latents, step.converted_latents
        codes = [torch.cat(level) for level in zip(own.codes, converted.codes, strict=True)]
        return {"commitment": commitment(step.model.codec.quantizer, torch.cat([own.z, converted.z]), codes)}


@hookimpl
def register_strategies(register: Callable[[type], None]) -> None:
    """Offer the strategy."""
    register(Phase6EncoderAdapter)
