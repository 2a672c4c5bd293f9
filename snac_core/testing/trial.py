"""One strategy under test, with its models, steps and losses."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from snac_core.codec import SNAC
from snac_core.conditioned import ConditionedCodec, Reconstruction
from snac_core.conditioning import Conditioning
from snac_core.film import FiLM
from snac_core.frozen import FrozenActivations
from snac_core.hooks import HOOKS
from snac_core.hookspecs import PROJECT, hookimpl
from snac_core.losses import cosine_distance
from snac_core.plugins import Catalogue, Origin
from snac_core.seeding import derive
from snac_core.step import Step
from snac_core.strategy import Strategy
from snac_core.taps import Tap, Taps
from snac_core.testing.fixtures import ROWS, Fixtures
from snac_core.testing.probes import BaseSnapshot, EditProbe, edits_of
from snac_core.testing.results import RuleViolation

NOISE = 7


class Companion(Strategy):
    """A simple adapter for tests of objectives: FiLM on both sides of the quantizer."""

    name = "conformance_companion"

    def __init__(self, config: Strategy.Config, taps: Taps) -> None:
        super().__init__(config, taps)
        width = taps.match(("latent",))[0].channels
        self.before, self.after = FiLM(taps.speaker_dim, width), FiLM(taps.speaker_dim, width)

    @hookimpl
    def before_vq(self, x: Tensor, cond: Conditioning, tap: Tap) -> Tensor:
        """(B, C, F) to (B, C, F)."""
        edited: Tensor = self.before(x, cond.speaker)
        return edited

    @hookimpl
    def after_vq(self, x: Tensor, cond: Conditioning, tap: Tap) -> Tensor:
        """(B, C, F) to (B, C, F)."""
        edited: Tensor = self.after(x, cond.speaker)
        return edited


class StrategyTrial:
    """A strategy class under test.

    Args:
        cls: the class under test.
        codec: the base; frozen in place.
        speaker_dim: S.
        catalogue: other strategies, for tests of combinations.
    """

    def __init__(self, cls: type[Strategy], codec: SNAC, speaker_dim: int, catalogue: Catalogue) -> None:
        self.cls = cls
        self.codec = codec.freeze()
        self.base = BaseSnapshot(codec)
        self.catalogue = catalogue
        self.fixtures = Fixtures(codec, speaker_dim)
        self.taps = Taps(speaker_dim, codec.taps, codec.quantizer)
        self.speaker_dim = speaker_dim

    @property
    def hooks(self) -> list[str]:
        """Names of the hooks that the class implements."""
        return hooks_of(self.cls)

    @cached_property
    def edited_taps(self) -> list[str]:
        """The taps that the strategy edits with its default settings."""
        return [edit.tap.name for edit in edits_of(self.model(), self.cls.name)]

    def model(self, others: Sequence[type[Strategy]] = (), *, first: bool = True) -> ConditionedCodec:
        """A new model of the strategy and `others`, in eval mode, with the same initial parameters each time."""
        strategies = [self.cls, *others] if first else [*others, self.cls]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive("conformance", self.cls.name))
            return ConditionedCodec(self.codec, strategies, speaker_dim=self.speaker_dim).eval()

    def training_model(self) -> ConditionedCodec:
        """A new model in train mode after `training_start`; an objective gets an adapter."""
        model = self.model(() if self.edited_taps else (Companion,))
        context = self.fixtures.context(model)
        for _, training_start in self.calls(model, "training_start"):
            training_start(context=context)
        return model.train()

    def calls(self, model: ConditionedCodec, hook: str) -> list[tuple[str, Any]]:
        """The implementations of `hook` in `model`, by strategy name."""
        return model.callers(hook)

    def reconstruct(self, model: ConditionedCodec, cond: Conditioning | None) -> Reconstruction:
        """Reconstruct the batch, with the same noise each time."""
        with self.codec.fixed_noise(NOISE), torch.no_grad():
            return model.reconstruct(self.fixtures.audio, cond)

    def terms(self, model: ConditionedCodec, step: Step, hook: str = "loss") -> dict[str, Tensor]:
        """The strategy's own terms, validated."""
        for name, implementation in self.calls(model, hook):
            if name == self.cls.name:
                return checked_terms(implementation(step=step), hook)
        return {}

    def total(self, model: ConditionedCodec, step: Step) -> Tensor:
        """A training loss: the strategy's own terms, and distances to the source and to the target speaker."""
        distance = (step.identity.audio - step.audio).abs().mean()
        distance = distance + cosine_distance(step.converted_embedding, step.target_reference).mean()
        return distance + sum(self.terms(model, step).values())

    def probes(self, model: ConditionedCodec) -> list[EditProbe]:
        """One probe for each of the strategy's edits in `model`."""
        bare = FrozenActivations(self.codec, self.fixtures.audio)
        cond = self.fixtures.conditioning(ROWS)
        return [EditProbe(edit, bare, cond, seed=0) for edit in edits_of(model, self.cls.name)]

    def offering(self) -> Catalogue:
        """A catalogue with this strategy only."""
        catalogue = Catalogue()
        catalogue.strategies.add(self.cls, Origin("conformance"))
        return catalogue


def hooks_of(cls: type[Strategy]) -> list[str]:
    """The hooks that a strategy class implements, marked with `hookimpl`."""
    return [hook for hook in HOOKS if hasattr(getattr(cls, hook, None), f"{PROJECT}_impl")]


def checked_terms(terms: Any, hook: str) -> dict[str, Tensor]:
    """Return `terms` if they are a valid result of `loss` or `discriminator_loss`; else raise RuleViolation."""
    if not isinstance(terms, dict):
        raise RuleViolation(
            f"{hook} returned {type(terms).__name__}", f"return a dict of term name to scalar tensor in {hook}"
        )
    for term, value in terms.items():
        if not isinstance(term, str) or not term or "/" in term:
            raise RuleViolation(
                f"{hook} returned a term named {term!r}",
                "name terms with a plain string without '/'; the strategy's name is put before it",
            )
        if not isinstance(value, Tensor):
            raise RuleViolation(
                f"term {term!r} of {hook} is a {type(value).__name__}",
                f"return {term!r} as a tensor: a number (.item(), float()) carries no gradient",
            )
        if value.dim() != 0:
            raise RuleViolation(
                f"term {term!r} of {hook} has shape {tuple(value.shape)}",
                f"reduce {term!r} to a scalar, e.g. with .mean()",
            )
    return terms
