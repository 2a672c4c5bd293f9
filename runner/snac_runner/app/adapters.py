"""Which adapters and reports a page offers: bundled adapters, and what `--run` names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from snac_core.checkpoint import bundled_adapters
from snac_core.errors import UserError, nearest
from snac_core.hub import is_hub_id
from snac_runner.convert import model_folder

REPORT = "report.html"
REPORT_PAGES = (REPORT, "abx.html")
"""Files of a study's report; pages link to each other."""

T = TypeVar("T")


@dataclass
class Offer:
    """What a page offers.

    Attributes:
        adapters: displayed name to what `snac_runner.convert.Converter` takes: a folder, a bundled name or a hub id.
        studies: displayed name to the folder with the report.
        typed: whether a hub id that is not among the adapters may be given in the page.
    """

    adapters: dict[str, str] = field(default_factory=dict)
    studies: dict[str, Path] = field(default_factory=dict)
    typed: bool = False

    def run_of(self, name: str) -> str:
        """The run of a displayed name, or the hub id itself where one may be typed.

        Raises:
            UserError: for any other name; a folder cannot be named by a visitor of the page.
        """
        if name in self.adapters:
            return self.adapters[name]
        if self.typed and is_hub_id(name) and not Path(name).exists():
            return name
        expected = "an adapter of the list or a hub id (owner/name)" if self.typed else "an adapter of the list"
        raise UserError(f"no adapter {name!r}; expected {expected}{nearest(name, self.adapters)}")


def offer(runs: Sequence[str], *, typed: bool) -> Offer:
    """The bundled adapters, and those of runs, studies and hub ids.

    Args:
        runs: folders of runs, models or studies; names of bundled adapters; or hub ids. A study gives all its runs
            that have a model, and its report. A run in a study gives the study's report too.
        typed: see `Offer`.

    Raises:
        UserError: if there is no model in a folder, or a name is not known.
    """
    found = Offer(typed=typed)
    for run in runs:
        if Path(run).is_dir():
            _add_folder(found, Path(run).resolve())
        elif run in bundled_adapters() or is_hub_id(run):
            found.adapters[run] = run
        else:
            raise UserError(
                f"--run {run}: no folder and no bundled adapter of this name; expected the folder of a run or of a "
                f"study, {', '.join(bundled_adapters())}, or a hub id (owner/name){nearest(run, bundled_adapters())}"
            )
    for name in bundled_adapters():
        found.adapters.setdefault(name, name)
    return found


def _add_folder(found: Offer, folder: Path) -> None:
    """Add the adapters and the report of the folder of a study, a run or a model."""
    runs = sorted(path.parent for path in folder.glob("*/seed*/model"))
    if not runs and not (folder / REPORT).is_file():
        model_folder(folder)  # refuses a folder without a model
    if not runs and (folder / "config.json").is_file():
        runs = [folder]
    for run in runs:
        _add(found.adapters, _name(run), str(run))
    for study in (folder, folder.parent.parent):
        if (study / "study.json").is_file() and (study / REPORT).is_file():
            _add(found.studies, study.name, study)
    if not found.studies and (folder / REPORT).is_file():  # the report of a run of its own
        _add(found.studies, folder.name, folder)


def _add(table: dict[str, T], name: str, value: T) -> None:
    """Add under `name`, with a number where another value has that name."""
    number = 1
    while table.setdefault(name if number == 1 else f"{name} ({number})", value) != value:
        number += 1


def _name(run: Path) -> str:
    """study/arm/seed for a run in a study, else the folder's name."""
    if run.name.startswith("seed") and (run.parent.parent / "study.json").is_file():
        return "/".join(run.parts[-3:])
    return run.name
