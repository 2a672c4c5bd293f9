"""Phase 4: FiLM at the stages of the decoder, after VQ; the codes do not depend on the target speaker."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pydantic import Field
from torch import Tensor, nn

from snac_core import Conditioning, Strategy, Tap, Taps, hookimpl
from snac_core.film import FiLM
from snac_core.legacy import LegacyKeys


class Phase4DecoderFiLM(Strategy):
    """One FiLM per decoder tap, conditioned on the speaker embedding."""

    name = "phase4_decoder_film"
    after_taps: Sequence[str] = ("decoder_*",)

    legacy_keys = LegacyKeys(known_by=())

    class Config(Strategy.Config):
        taps: tuple[str, ...] = Field(("decoder_*",), description="Patterns of the taps to edit, after VQ.")
        hidden_dims: tuple[int, ...] = Field(
            (), description="Widths of the ReLU layers between the embedding and the scale and shift."
        )

    def __init__(self, config: Config, taps: Taps) -> None:
        super().__init__(config, taps)
        self.after_taps = config.taps
        self.films = nn.ModuleDict(
            {tap.name: FiLM(taps.speaker_dim, tap.channels, config.hidden_dims) for tap in taps.match(config.taps)}
        )

    @hookimpl
    def after_vq(self, x: Tensor, cond: Conditioning, tap: Tap) -> Tensor:
        """(B, C, F) to (B, C, F)."""
        edited: Tensor = self.films[tap.name](x, cond.speaker)
        return edited

    def receptive_field(self, tap: Tap) -> float:
        """0: FiLM is constant over time."""
        return 0


@hookimpl
def register_strategies(register: Callable[[type], None]) -> None:
    """Offer the strategy."""
    register(Phase4DecoderFiLM)
