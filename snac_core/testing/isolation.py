"""Rules about what a strategy leaves alone: other instances, and the global state of Python and torch."""

from __future__ import annotations

import random

import torch

from snac_core.testing.behaviour import equal
from snac_core.testing.probes import perturbed
from snac_core.testing.results import Broken, Rule
from snac_core.testing.surroundings import ROWS
from snac_core.testing.trial import StrategyTrial


def _global_state(trial: StrategyTrial) -> str:
    cond = trial.surroundings.conditioning(ROWS)
    switches = _switches()
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
        trial.cls(trial.cls.Config(), trial.taps)
        trial.reconstruct(first.train(), cond)
        model = trial.training_model()
        trial.total(model, trial.surroundings.step(model))
        states.append((torch.get_rng_state(), random.random()))
    if torch.equal(states[0][0], states[1][0]) or states[0][1] == states[1][1]:
        raise Broken("it reseeds the global random numbers", "draw from snac_core.seeding.generator(...) instead")
    for name, value in _switches().items():
        if value != switches[name]:
            raise Broken(f"it changes torch's {name} from {switches[name]} to {value}", f"leave torch's {name} alone")
    return "two instances do not meet; global random numbers and switches stay"


def _switches() -> dict[str, object]:
    return {
        "default dtype": torch.get_default_dtype(),
        "number of threads": torch.get_num_threads(),
        "gradient mode": torch.is_grad_enabled(),
        "deterministic mode": torch.are_deterministic_algorithms_enabled(),
        "matmul precision": torch.get_float32_matmul_precision(),
    }


ISOLATION: list[Rule[StrategyTrial]] = [
    Rule("no global state", _global_state, "keep state on the instance, not on the class, the module or torch"),
]
