"""The base class of every conditioning strategy and objective."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict
from torch import nn

from snac_core.hookspecs import API_VERSION
from snac_core.legacy import LegacyKeys
from snac_core.taps import Tap, Taps

DISCRIMINATOR = "discriminator"

C = TypeVar("C", bound=BaseModel)
C_co = TypeVar("C_co", bound=BaseModel, covariant=True)


class _HasConfig(Protocol[C_co]):
    """A class with a nested `Config`: what makes `Strategy.config` generic in it."""

    @property
    def Config(self) -> type[C_co]: ...


class Strategy(nn.Module):
    """An `nn.Module` with a name, settings, and any of the hooks of `snac_core.hookspecs.StrategyHooks`.

    A strategy that edits the signal (`before_vq`, `after_vq`) must be exactly the identity when new. One that only has
    `loss` is an objective. Parameters under `self.discriminator` are trained on `discriminator_loss` alone and are
    never saved with the model.

    A subclass with settings nests its own `class Config(Strategy.Config)`. `self.config` then has that type, for type
    checkers too: the property is generic in the nested class.

    Attributes:
        name: the one name of the strategy, everywhere: a Python identifier.
        before_taps, after_taps: patterns of the taps to edit, used only if the hook exists.
        extras: names of what the strategy needs of `Conditioning.extras`: () or ("reference",), the latent of speech of
            the target; see `snac_core.conditioning.REFERENCE`.
        default_weights: weight of each loss term, unless the study sets it; a term that is not listed has weight 1.
        api: version of the hook interface that the strategy was written for.
        legacy_keys: keys by which configuration files of another program set this strategy; see `snac_core.legacy`.

    Args:
        config: an instance of the nested `Config`.
        taps: the codec's taps and the speaker dimension.
    """

    name: ClassVar[str] = ""
    before_taps: Sequence[str] = ("latent",)
    after_taps: Sequence[str] = ("quantized",)
    extras: Sequence[str] = ()
    default_weights: ClassVar[Mapping[str, float]] = {}
    api: ClassVar[int] = API_VERSION
    legacy_keys: ClassVar[LegacyKeys | None] = None

    class Config(BaseModel):
        """Settings: unknown keys are errors, every field has a default and a description."""

        model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def __init__(self, config: Config, taps: Taps) -> None:
        super().__init__()
        self._config: BaseModel = config

    @property
    def config(self: _HasConfig[C]) -> C:
        """The settings: an instance of the nested `Config` of the subclass."""
        config: C = self._config  # type: ignore[attr-defined]
        return config

    def receptive_field(self, tap: Tap) -> float | None:
        """Frames on each side of a frame that its edit at `tap` depends on; `math.inf`: all frames of the item.

        Audio of any length is processed in chunks with this much context, or whole if the edit depends on all frames.
        None, the default: it is measured (see `snac_core.codec.streaming.measured_receptive_field`).
        """
        return None

    def adapted_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Named parameters that belong to the model: all but those of the discriminator."""
        return ((n, p) for n, p in self.named_parameters() if n.split(".")[0] != DISCRIMINATOR)

    def discriminator_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Named parameters under `self.discriminator`."""
        return ((n, p) for n, p in self.named_parameters() if n.split(".")[0] == DISCRIMINATOR)
