"""Several studies as one: only where they judged the same conversions by the same judge through the same base."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from runner.report.results import Study, read
from snac_core.errors import UserError


def merged(folders: Sequence[Path], out: Path) -> tuple[Study, list[str]]:
    """One study of all arms, named "<study>: <arm>", and a line for each study that does not fit the first one.

    Raises:
        UserError: if not even two studies fit together.
    """
    studies = [read(folder) for folder in folders]
    first, *others = studies
    refused = []
    fitting = [first]
    for study in others:
        reasons = differences(first, study)
        if reasons:
            refused.append(f"{study.folder} is left out: {'; '.join(reasons)}")
        else:
            fitting.append(study)
    if len(fitting) < 2:
        raise UserError(f"no study can be compared with {first.folder}: " + " | ".join(refused))
    names = [study.name if [s.name for s in fitting].count(study.name) == 1 else str(study.folder) for study in fitting]
    arms = {f"{n}: {arm}": runs for n, study in zip(names, fitting, strict=True) for arm, runs in study.arms.items()}
    controls = dict(first.controls)
    for name, study in zip(names, fitting, strict=True):
        controls |= {
            f"{name}: {control}": run
            for control, run in study.controls.items()
            if control not in first.controls or (run.result is not None and run.result.kind == "system")
        }
    notes = tuple(dict.fromkeys([*(note for study in fitting for note in study.notes), *(f"{r}." for r in refused)]))
    title = f"Leaderboard of {len(fitting)} studies"
    return Study(out, "leaderboard", title, arms, controls, first.sources, notes), refused


def differences(one: Study, other: Study) -> list[str]:
    """What forbids comparing two studies; empty where nothing does."""
    a, b = one.first(), other.first()
    facts = {
        "other conversions (digest of the pair list)": (a.pairs.digest, b.pairs.digest),
        "another judge": (_digests(a.judges), _digests(b.judges)),
        "another base": (a.digests.get("base"), b.digests.get("base")),
        "other speech": (a.digests.get("data"), b.digests.get("data")),
        "another split": (a.split, b.split),
    }
    return [f"{what}: {str(y)[:16]}, not {str(x)[:16]}" for what, (x, y) in facts.items() if x != y]


def _digests(judges: Sequence[object]) -> str:
    return ", ".join(str(getattr(judge, "digest", "")) for judge in judges)
