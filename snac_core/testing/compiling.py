"""A strategy's edits under `torch.compile`."""

from __future__ import annotations

import torch
from torch import Tensor

from snac_core.conditioning import Conditioning
from snac_core.testing.probes import ROUNDING, distance, perturbed
from snac_core.testing.results import Broken, Rule
from snac_core.testing.trial import StrategyTrial


def _compiles(trial: StrategyTrial) -> str:
    probes = trial.probes(perturbed(trial.model(), seed=0))
    for probe in probes:

        def run(x: Tensor, speaker: Tensor, edit: object = probe.edit) -> Tensor:
            edited: Tensor = edit(x, Conditioning(speaker))  # type: ignore[operator]
            return edited

        torch._dynamo.reset()
        compiled = torch.compile(run, backend="aot_eager")(probe.x, probe.cond.speaker)
        if (apart := distance(compiled, run(probe.x, probe.cond.speaker))) > ROUNDING:
            raise Broken(f"compiled, the edit at {probe.edit.tap.name!r} differs by {apart:.2g} of its range")
    return f"{len(probes)} edits agree"


COMPILING: list[Rule[StrategyTrial]] = [
    Rule("torch.compile", _compiles, "keep Python side effects and data-dependent branches out of the edits"),
]
