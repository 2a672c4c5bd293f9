"""`check_strategy`: all rules for one strategy, and the rules about its declaration."""

from __future__ import annotations

import json
from collections.abc import Iterator

from pydantic import BaseModel
from torch import nn

from snac_core.codec import SNAC
from snac_core.hooks import hook_manager, hook_tables
from snac_core.hookspecs import API_VERSION
from snac_core.plugins import Catalogue, discover
from snac_core.strategy import Strategy
from snac_core.testing.fixtures import small_codec
from snac_core.testing.results import Rule, RuleResult, RuleViolation, isolated_random_state, run_rules
from snac_core.testing.rules import BEHAVIOUR, COMPILING, ISOLATION, SETTINGS, TRAINING
from snac_core.testing.trial import StrategyTrial


def check_strategy(
    cls: type[Strategy],
    *,
    codec: SNAC | None = None,
    speaker_dim: int = 16,
    catalogue: Catalogue | None = None,
    compiled: bool = False,
) -> list[RuleResult]:
    """Run the conformance rules on a strategy class with its default settings.

    Args:
        cls: the class.
        codec: the base, frozen in place; defaults to a small one with random weights.
        speaker_dim: S of the embeddings.
        catalogue: strategies to combine it with; defaults to the installed ones.
        compiled: also run its edits under `torch.compile(backend="aot_eager")`, which takes about ten seconds.

    Returns:
        one result per rule, in order; they end after a failed rule that later rules depend on.
    """
    results = strategy_results(cls, codec=codec, speaker_dim=speaker_dim, catalogue=catalogue, compiled=compiled)
    return list(results)


def strategy_results(
    cls: type[Strategy],
    *,
    codec: SNAC | None = None,
    speaker_dim: int = 16,
    catalogue: Catalogue | None = None,
    compiled: bool = False,
) -> Iterator[RuleResult]:
    """The results of `check_strategy`, one by one."""
    with isolated_random_state(seed=0):
        trial = StrategyTrial(cls, codec or small_codec(), speaker_dim, discover() if catalogue is None else catalogue)
    try:
        yield from run_rules(
            trial, [*DECLARATION, SETTINGS, *BEHAVIOUR, *TRAINING, *ISOLATION, *(COMPILING if compiled else ())]
        )
    finally:
        trial.base.restore()


def _name(trial: StrategyTrial) -> str:
    cls = trial.cls
    if not (isinstance(cls, type) and issubclass(cls, Strategy)):
        raise RuleViolation(f"{cls!r} is not a subclass of Strategy", "derive the class from snac_core.Strategy")
    if not (isinstance(cls.name, str) and cls.name.isidentifier()):
        raise RuleViolation(
            f"name = {cls.name!r}", "set name = 'my_strategy' in the class: letters, digits and underscores"
        )
    if hasattr(nn.ModuleDict, cls.name):
        raise RuleViolation(f"name = {cls.name!r}, which torch's ModuleDict needs for itself", "choose another name")
    registered = trial.catalogue.strategies.classes.get(cls.name, cls)
    if registered is not cls and registered.__qualname__ != cls.__qualname__:
        raise RuleViolation(
            f"name = {cls.name!r} belongs to {trial.catalogue.strategies.origins[cls.name]}", "choose another"
        )
    if cls.api != API_VERSION:
        raise RuleViolation(f"api = {cls.api!r}", f"write it for hook API {API_VERSION}, or leave api out")
    return cls.name


def _config(trial: StrategyTrial) -> str:
    config_class = trial.cls.Config
    if not (isinstance(config_class, type) and issubclass(config_class, Strategy.Config)):
        raise RuleViolation(f"Config is {config_class!r}", "nest `class Config(Strategy.Config):` in the strategy")
    if config_class.model_config.get("extra") != "forbid":
        raise RuleViolation(
            "Config takes keys that it does not know: a misspelt setting would pass unseen",
            "leave model_config alone, or keep extra='forbid' in it",
        )
    for name, field in config_class.model_fields.items():
        if field.is_required():
            raise RuleViolation(f"setting {name!r} has no default", f"give {name!r} a default: Field(<default>, ...)")
        if not (field.description or "").strip():
            raise RuleViolation(
                f"setting {name!r} has no description", f"say what {name!r} means: Field(..., description='...')"
            )
    config = config_class()
    restored = config_class.model_validate(json.loads(config.model_dump_json()))
    if restored != config:
        raise RuleViolation(
            f"{config!r} comes back from JSON as {restored!r}",
            "use field types that pydantic writes to and reads from JSON",
        )
    return _fields(config_class)


def _fields(config_class: type[BaseModel]) -> str:
    names = list(config_class.model_fields)
    return f"{len(names)} settings, described, restored from JSON" if names else "no settings"


def _builds(trial: StrategyTrial) -> str:
    strategy = trial.cls(trial.cls.Config(), trial.taps)
    if not isinstance(getattr(strategy, "config", None), Strategy.Config):
        raise RuleViolation("self.config is not set", "begin __init__ with super().__init__(config, taps)")
    return f"{sum(p.numel() for _, p in strategy.adapted_parameters()):,} parameters"


def _hooks(trial: StrategyTrial) -> str:
    hook_manager([trial.cls(trial.cls.Config(), trial.taps)])
    return ", ".join(trial.hooks)


def _taps(trial: StrategyTrial) -> str:
    edits = hook_tables([trial.cls(trial.cls.Config(), trial.taps)], trial.taps).edits
    editing = [hook for hook in trial.hooks if hook in ("before_vq", "after_vq")]
    return f"edits {', '.join(edits)}" if edits else f"edits nothing{' by default' if editing else ': an objective'}"


DECLARATION: list[Rule[StrategyTrial]] = [
    Rule("name", _name, "give the class a name of its own", gate=True),
    Rule("config", _config, "mend the nested Config", gate=True),
    Rule(
        "builds",
        _builds,
        "make __init__(self, config, taps) work with default settings on any codec: take widths from taps.match()",
        gate=True,
    ),
    Rule(
        "hooks", _hooks, "mark each hook with @hookimpl and spell it as in snac_core.hookspecs.StrategyHooks", gate=True
    ),
    Rule("taps", _taps, "name taps of the codec: encoder_*, latent before VQ; quantized, decoder_* after", gate=True),
]
