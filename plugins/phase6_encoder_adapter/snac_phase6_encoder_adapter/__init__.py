"""Phase 6: an adapter on the encoder latent, before VQ; the codes contain the target speaker."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from snac_core import Conditioning, Step, Strategy, Tap, Taps, hookimpl
from snac_core.conditioning import REFERENCE
from snac_core.film import FiLM
from snac_core.legacy import LegacyKeys
from snac_core.losses import commitment
from snac_phase6_encoder_adapter.adapters import ConvAdapter, DilatedAdapter
from snac_phase6_encoder_adapter.code_adapter import CodeAdapter

_KERNEL, _LAYERS, _DILATIONS = 5, 2, (1, 3, 9)  # the defaults; kernel and dilations in frames
_SOURCE_BIAS = 5.0


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
        adapter_type: Literal["codes", "conv", "dilated", "film"] = Field(
            "conv",
            description="Convolutions over time with FiLM, residual blocks of dilated convolutions with FiLM, such "
            "blocks that predict codes level by level, or one affine map for all frames.",
        )
        hidden_dim: int = Field(256, ge=1, description="Width inside the adapter.")
        num_layers: int = Field(_LAYERS, ge=1, description="Layers of the conv and film types.")
        kernel: int = Field(_KERNEL, ge=1, description="Kernel size in frames, odd; not of the film type.")
        dilations: tuple[Annotated[int, Field(ge=1)], ...] = Field(
            _DILATIONS, min_length=1, description="Dilations of the dilated and codes types, in frames, one per block."
        )
        bound: float | None = Field(
            None,
            gt=0,
            description="Largest edit of the conv type, in standard deviations of a channel; None: no limit.",
        )
        source_bias: float = Field(
            _SOURCE_BIAS,
            ge=0,
            description="Of the codes type: how much the code of the source is preferred when codes are chosen, not "
            "when they are learned. A higher value keeps more of the words and less of the target's voice.",
        )
        attention_heads: int = Field(
            0,
            ge=0,
            description="Of the codes type: heads of attention to speech of the target, after each block; 0: the "
            "speaker embedding alone says what to convert to. Needs latent_cache = true.",
        )
        taps: tuple[str, ...] = Field(("latent",), description="Patterns of the taps to edit, before VQ.")

        @model_validator(mode="after")
        def _fits_together(self) -> Self:
            if self.kernel % 2 == 0:
                raise ValueError(f"kernel = {self.kernel}; expected an odd number")
            if self.adapter_type == "film" and self.kernel != _KERNEL:
                raise ValueError("kernel belongs to adapter_type = 'conv', 'dilated' or 'codes'; 'film' has none")
            if self.adapter_type != "conv" and self.bound is not None:
                raise ValueError(f"bound belongs to adapter_type = 'conv'; {self.adapter_type!r} has none")
            blocks = self.adapter_type in ("codes", "dilated")
            if not blocks and self.dilations != _DILATIONS:
                raise ValueError(
                    f"dilations belong to adapter_type = 'dilated' or 'codes'; {self.adapter_type!r} has none"
                )
            if blocks and self.num_layers != _LAYERS:
                raise ValueError(
                    f"num_layers belongs to adapter_type = 'conv' or 'film'; {self.adapter_type!r} has one per dilation"
                )
            if self.adapter_type != "codes" and self.source_bias != _SOURCE_BIAS:
                raise ValueError(f"source_bias belongs to adapter_type = 'codes'; {self.adapter_type!r} has none")
            if self.attention_heads and self.adapter_type != "codes":
                raise ValueError(f"attention_heads belongs to adapter_type = 'codes'; {self.adapter_type!r} has none")
            if self.attention_heads and self.hidden_dim % self.attention_heads:
                raise ValueError(
                    f"hidden_dim = {self.hidden_dim}; expected a multiple of attention_heads = {self.attention_heads}"
                )
            if self.adapter_type == "codes" and self.taps != ("latent",):
                raise ValueError(f"adapter_type = 'codes' acts at the tap 'latent' only; got taps {self.taps}")
            return self

    def __init__(self, config: Config, taps: Taps) -> None:
        super().__init__(config, taps)
        self.before_taps = config.taps
        self.extras = (REFERENCE,) if config.attention_heads else ()
        self.adapters = nn.ModuleDict()
        for tap in taps.match(config.taps):
            if config.adapter_type == "film":
                hidden = (config.hidden_dim,) * config.num_layers
                self.adapters[tap.name] = FiLM(taps.speaker_dim, tap.channels, hidden)
            elif config.adapter_type == "codes":
                assert taps.quantizer is not None
                self.adapters[tap.name] = CodeAdapter(
                    taps.quantizer, taps.speaker_dim, config.hidden_dim, config.kernel, config.dilations,
                    config.source_bias, config.attention_heads,
                )  # fmt: skip
            elif config.adapter_type == "dilated":
                self.adapters[tap.name] = DilatedAdapter(
                    tap.channels, taps.speaker_dim, config.hidden_dim, config.kernel, config.dilations
                )
            else:
                self.adapters[tap.name] = ConvAdapter(
                    tap.channels, taps.speaker_dim, config.hidden_dim, config.num_layers, config.kernel, config.bound
                )

    @hookimpl
    def before_vq(self, x: Tensor, cond: Conditioning, tap: Tap, scale: float) -> Tensor:
        """(B, C, F) to (B, C, F). The codes type scales its logits, the others the change of the latent."""
        edited: Tensor
        if self.config.adapter_type == "codes":
            edited = self._predictor(x, cond.speaker, cond.extras.get(REFERENCE), scale)
            return edited
        edited = self.adapters[tap.name](x, cond.speaker)
        return edited if scale == 1 else x.lerp(edited, scale)

    def receptive_field(self, tap: Tap) -> float:
        """Of the convolutions; all frames where `bound` measures a channel over the item."""
        config = self.config
        if config.adapter_type == "film":
            return 0
        blocks = sum(config.dilations) * (config.kernel // 2)
        if config.adapter_type == "dilated":
            return blocks
        if config.adapter_type == "codes":
            return self._predictor.receptive_field(blocks)
        return math.inf if config.bound is not None else config.num_layers * (config.kernel // 2)

    @hookimpl
    def code_logits(self, x: Tensor, cond: Conditioning, codes: Sequence[Tensor]) -> list[Tensor] | None:
        """Of the codes type."""
        if self.config.adapter_type != "codes":
            return None
        return self._predictor.code_logits(x, cond.speaker, codes, cond.extras.get(REFERENCE))

    @property
    def _predictor(self) -> CodeAdapter:
        adapter = self.adapters["latent"]
        assert isinstance(adapter, CodeAdapter)
        return adapter

    @hookimpl
    def loss(self, step: Step) -> dict[str, Tensor]:
        """`commitment`: the quantization error of edited latents, a scalar; see `snac_core.losses.commitment`.

        The codes type has no such term: its latents are at the codebook entries.
        """
        if self.config.adapter_type == "codes":
            return {}
        own, converted = step.identity_latents, step.converted_latents
        codes = [torch.cat(level) for level in zip(own.codes, converted.codes, strict=True)]
        return {"commitment": commitment(step.model.codec.quantizer, torch.cat([own.z, converted.z]), codes)}


@hookimpl
def register_strategies(register: Callable[[type], None]) -> None:
    """Offer the strategy."""
    register(Phase6EncoderAdapter)
