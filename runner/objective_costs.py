"""What each objective costs a training step: passes through codec and teacher, and seconds against the default one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from runner.arm import Arm
from runner.bench import USUAL, alternating, passes
from runner.config import ArmSettings, StudySettings
from runner.materials import Materials
from snac_core.bare import BarePass
from snac_core.errors import UserError
from snac_core.plugins import Catalogue


def objectives(catalogue: Catalogue) -> dict[str, dict[str, Any]]:
    """Every strategy that has a loss and can do without an edit: its name to the settings under which it does."""
    found: dict[str, dict[str, Any]] = {}
    for name in catalogue.strategies:
        strategy = catalogue.strategies[name]
        if not hasattr(strategy, "loss"):
            continue
        if not _edits(strategy):
            found[name] = {}
        elif "path" in strategy.Config.model_fields:
            found[name] = {"path": False}
    return found


def objective_costs(study: StudySettings, catalogue: Catalogue, rounds: int) -> list[str]:
    """A step of each objective alone, with the first placement before the quantiser and the first after it."""
    names = [name for name in catalogue.strategies if _edits(catalogue.strategies[name])]
    before = next((name for name in names if hasattr(catalogue.strategies[name], "before_vq")), None)
    after = next((n for n in names if "path" not in catalogue.strategies[n].Config.model_fields and n != before), None)
    materials = Materials(study, catalogue)
    lines = [f"a training step of each objective alone, batch {study.batch_size} x {study.crop_seconds} s:"]
    for placement in (before, after):
        if placement is not None:
            lines += _with(placement, materials, rounds)
    return lines


def _with(placement: str, materials: Materials, rounds: int) -> list[str]:
    default = ArmSettings().objectives[0]
    lines, works, counted = [], dict[str, Callable[[], object]](), dict[str, str]()
    with TemporaryDirectory() as folder:
        for name, settings in objectives(materials.catalogue).items():
            settled = ArmSettings(strategies=(placement,), objectives=(name,), settings={name: settings})
            try:
                arm = Arm.new(settled, 0, Path(folder) / name, materials)
            except UserError as refusal:
                lines.append(f"  {placement}, {name}: {refusal}")
                continue
            counted[name] = passes(arm, materials)
            works[name] = _step(arm, materials)
        taken = alternating(works, rounds)
    first = taken.get(default)
    for name, seconds in taken.items():
        ratio = f" ({seconds / first:.2f} x {default})" if first and name != default else ""
        lines.append(f"  {placement}, {name}: {seconds:.3f} s{ratio}; {counted[name]}")
    return lines


def _step(arm: Arm, materials: Materials) -> Callable[[], object]:
    bare, speakers, targets = materials.drawn(USUAL, materials.batches(0), arm.sampler)
    return lambda: arm.step(USUAL, BarePass(materials.codec, bare.audio), speakers, targets)


def _edits(strategy: Any) -> bool:
    return any(hasattr(strategy, hook) for hook in ("before_vq", "after_vq"))
