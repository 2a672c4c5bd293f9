"""The base class of every conditioning strategy and objective."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from snac_core.hookspecs import API_VERSION
from snac_core.taps import Taps

if TYPE_CHECKING:
    from snac_core.conditioned import ConditionedCodec
    from snac_core.speakers.sampling import SpeakerSampler


DISCRIMINATOR = "discriminator"


class Strategy(nn.Module):
    """An `nn.Module` with a name, settings, and any of the hooks of `snac_core.hookspecs.StrategyHooks`.

    A strategy that edits the signal (`before_vq`, `after_vq`) must be exactly the identity when new. One that only has
    `loss` is an objective. Parameters under `self.discriminator` are trained on `discriminator_loss` alone and never saved with the
    model.

    Attributes:
        name: the one name of the strategy, everywhere: a Python identifier.
        before_taps, after_taps: patterns of the taps to edit, used only if the hook exists.
        default_weights: weight of each loss term where the study states none; 1 where this is silent.
        api: version of the hook interface that the strategy was written for.
        config: the settings, an instance of the nested `Config` (a subclass nests its own, derived from this one).
    """

    name: ClassVar[str] = ""
    before_taps: Sequence[str] = ("latent",)
    after_taps: Sequence[str] = ("quantized",)
    default_weights: ClassVar[Mapping[str, float]] = {}
    api: ClassVar[int] = API_VERSION

    class Config(BaseModel):
        """Settings: unknown keys are errors, every field has a default and a description."""

        model_config = ConfigDict(extra="forbid", frozen=True)

    def __init__(self, config: Config, taps: Taps) -> None:
        super().__init__()
        self.config: Any = config  # of the nested Config of the subclass

    def adapted_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Named parameters that belong to the model: all but those of the discriminator."""
        return ((n, p) for n, p in self.named_parameters() if n.split(".")[0] != DISCRIMINATOR)

    def discriminator_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Named parameters under `self.discriminator`."""
        return ((n, p) for n, p in self.named_parameters() if n.split(".")[0] == DISCRIMINATOR)


@dataclass(frozen=True)
class TrainingContext:
    """What `training_start` sees, once, before step 1.

    Attributes:
        model: the conditioned codec about to be trained.
        sampler: targets and negatives of the study.
        speakers: names of the training speakers.
        generator: random numbers for whatever the strategy sets up, from (seed, strategy name).
    """

    model: ConditionedCodec
    sampler: SpeakerSampler
    speakers: tuple[str, ...]
    generator: torch.Generator
