"""Every hook a plugin may implement, on one screen.

A plugin *module* implements the register hooks; a *strategy* (and so its instances) implements the others. Mark each
implementation with `hookimpl`. An implementation may take fewer arguments than its specification.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from torch import Tensor

    from snac_core.conditioning import Conditioning
    from snac_core.step import Step, TrainingContext  # the only import against the direction: the type of an argument
    from snac_core.taps import Tap

API_VERSION = 2
PROJECT = "snac_core"
ENTRY_POINT_GROUP = "snac_core.plugins"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class ModuleHooks:
    """What a plugin module may offer. All implementations are called, once, at discovery."""

    @hookspec
    def register_strategies(self, register: Callable[[type], None]) -> None:
        """Call `register(StrategyClass)` for every strategy of this plugin."""

    @hookspec
    def register_speaker_encoders(self, register: Callable[[type], None]) -> None:
        """Call `register(SpeakerEncoderClass)` for every speaker encoder of this plugin."""

    @hookspec
    def register_metrics(self, register: Callable[[type], None]) -> None:
        """Call `register(MetricClass)` for every metric of this plugin."""


class StrategyHooks:
    """What a strategy may do, in listed order. An edit that takes `scale`, the model's `edit_scale`, scales itself."""

    @hookspec
    def before_vq(self, x: Tensor, cond: Conditioning, tap: Tap, scale: float) -> Tensor:  # type: ignore[empty-body]
        """Edit `x` (B, C, F) at an encoder tap or `latent`; `cond.speaker` is (B, S). Return (B, C, F)."""

    @hookspec
    def after_vq(self, x: Tensor, cond: Conditioning, tap: Tap, scale: float) -> Tensor:  # type: ignore[empty-body]
        """Edit `x` (B, C, F) at `quantized` or a decoder tap; `cond.speaker` is (B, S). Return (B, C, F)."""

    @hookspec
    def code_logits(self, x: Tensor, cond: Conditioning, codes: Sequence[Tensor]) -> list[Tensor] | None:
        """Logits (B, N, F / stride) of each level's code for the bare latent `x`, given coarser `codes`; or None."""

    @hookspec
    def loss(self, step: Step) -> dict[str, Tensor]:  # type: ignore[empty-body]
        """Return unweighted scalar terms (shape ()) by name. They are logged, and weighted, as `<strategy>/<term>`."""

    @hookspec
    def discriminator_loss(self, step: Step) -> dict[str, Tensor]:  # type: ignore[empty-body]
        """Return scalar terms (shape ()) by name, on detached outputs; they train `self.discriminator` alone."""

    @hookspec
    def training_start(self, context: TrainingContext) -> None:
        """Set up what needs the training speakers. Called once, before step 1."""
