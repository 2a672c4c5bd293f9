"""Every hook a plugin may implement, on one screen.

A plugin *module* implements the register hooks; a *strategy* (and so its instances) implements the others. Mark each
implementation with `hookimpl`. An implementation may take fewer arguments than its specification.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from torch import Tensor

    from snac_core.conditioning import Conditioning
    from snac_core.step import Step
    from snac_core.strategy import TrainingContext
    from snac_core.taps import Tap


API_VERSION = 1
PROJECT = "snac_core"
ENTRY_POINT_GROUP = "snac_core.plugins"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class ModuleHooks:
    """What a plugin module may offer: called once at discovery, all of them."""

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
    """What a strategy may do."""

    @hookspec
    def before_vq(self, x: Tensor, cond: Conditioning, tap: Tap) -> Tensor:  # type: ignore[empty-body]
        """Edit `x` (B, C, F) at an encoder tap or at `latent`; same shape back. Folded in listed order."""

    @hookspec
    def after_vq(self, x: Tensor, cond: Conditioning, tap: Tap) -> Tensor:  # type: ignore[empty-body]
        """Edit `x` (B, C, F) at `quantized` or a decoder tap; same shape back. Folded in listed order."""

    @hookspec
    def loss(self, step: Step) -> dict[str, Tensor]:  # type: ignore[empty-body]
        """Raw scalar terms of this training step; `<strategy>/<term>` is what is logged, and weighted once."""

    @hookspec
    def discriminator_loss(self, step: Step) -> dict[str, Any]:  # type: ignore[empty-body]
        """Raw scalar terms for the parameters under `self.discriminator`, on detached outputs."""

    @hookspec
    def training_start(self, context: TrainingContext) -> None:
        """Called once, before step 1."""
