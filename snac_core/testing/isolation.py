"""Rules about what a strategy leaves alone: other instances, and the global state of Python and torch."""

from __future__ import annotations

import random

import numpy as np
import torch

from snac_core.containment import SettingChanged, put_back, switches
from snac_core.testing.behaviour import equal
from snac_core.testing.probes import perturbed
from snac_core.testing.results import Broken, Rule
from snac_core.testing.surroundings import ROWS
from snac_core.testing.trial import StrategyTrial


def _global_state(trial: StrategyTrial) -> str:
    cond = trial.surroundings.conditioning(ROWS)
    first = perturbed(trial.model(), seed=0)
    before = trial.reconstruct(first, cond)
    second = trial.model()
    with torch.no_grad():
        for parameter in second.strategies.parameters():
            parameter.add_(1.0)
    trial.reconstruct(second, cond)
    if not equal(trial.reconstruct(first, cond), before):
        raise Broken(
            "two instances meet: running one changes what the other gives, or one alone does not repeat itself"
        )
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        trial.cls(trial.cls.Config(), trial.taps)
        trial.reconstruct(first.train(), cond)
        model = trial.training_model()
        trial.total(model, trial.surroundings.step(model))
        states.append((float(torch.rand(())), random.random(), float(np.random.rand())))
    for library, one, other in zip(("torch", "random", "numpy"), *states, strict=True):
        if one == other:
            raise Broken(
                f"it reseeds the global random numbers of {library}",
                "draw from snac_core.seeding.generator(...) instead",
            )
    return "two instances do not meet; global random numbers stay"


def _settings(trial: StrategyTrial) -> str:
    """Builds and runs every hook once; errors other than a changed setting are for the rules after this one."""
    before = switches()
    try:
        trial.cls(trial.cls.Config(), trial.taps)
        model = trial.training_model()
        step = trial.surroundings.step(model)
        for hook in ("loss", "critic_loss"):
            trial.terms(model, step, hook)
        trial.total(model, step)
    except SettingChanged as error:
        raise Broken(str(error)) from error
    except Exception:  # whatever else is wrong has a rule of its own
        return "left alone, as far as it ran"
    if changed := put_back(before):
        raise Broken(f"it changes torch's {changed[0]}")
    return "left alone by __init__ and every hook"


SETTINGS: Rule[StrategyTrial] = Rule(
    "global settings",
    _settings,
    "leave torch's settings alone, everything else shares them: for random numbers, draw from "
    "snac_core.seeding.generator(...); for types, say dtype=...; for no gradient, `with torch.no_grad():`",
    gate=True,
)
ISOLATION: list[Rule[StrategyTrial]] = [
    Rule("no global state", _global_state, "keep state on the instance, not on the class, the module or torch"),
]
