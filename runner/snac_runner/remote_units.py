"""The units of a study on a Ray cluster, in the study folder if it is shared, else in copies that are brought back."""

from __future__ import annotations

import socket
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from snac_core.files import write_bytes, write_text
from snac_core.speakers.sampling import SpeakerTable
from snac_runner.cluster import Cluster, Files, WorkerConsole
from snac_runner.controls import CONTROLS, run_controls
from snac_runner.distributed import check_machine
from snac_runner.remote_resources import Setup
from snac_runner.resources import StudyResources
from snac_runner.run_folder import result_status
from snac_runner.run_result import compared_values
from snac_runner.unit import Unit, run_unit, train_unit

SEND_EVERY = 10.0
"""s between two sendings of changed files, by a machine that does not share the study folder."""
_NOT_SHARED = "not shared"


@dataclass(frozen=True)
class Order:
    """What a machine needs to run units of a study.

    Attributes:
        setup: how it loads the resources.
        root: the study folder.
        token: name of a file in it: where it is found, the folder is shared.
        send_every: see `SEND_EVERY`.
    """

    setup: Setup
    root: Path
    token: str
    send_every: float = SEND_EVERY


@dataclass(frozen=True)
class Task:
    """Something to do for a unit: `act` is one of the functions below."""

    label: str
    act: Callable[[Unit, StudyResources], Any]
    unit: Unit

    def __str__(self) -> str:
        return self.label


Packed = tuple[Task, dict[str, str], Files | None]
"""A task, what must be equal on the machine (see `compared_values`), and files if the folder is not shared."""


def _embed(_unit: Unit, resources: StudyResources) -> SpeakerTable:
    return resources.table


def _evaluate_controls(unit: Unit, resources: StudyResources) -> None:
    assert unit.controls is not None
    run_controls(unit.controls, resources)


def _train(unit: Unit, resources: StudyResources) -> None:
    train_unit(unit, resources)


def run_on_cluster(
    units: Sequence[Unit],
    resources: StudyResources,
    *,
    cluster: Cluster,
    root: Path,
    disable: Sequence[str],
    command: Sequence[str],
) -> None:
    """Run units on a cluster: train groups of arms beside the evaluation of the controls, then evaluate each arm.

    Args:
        units: of the study.
        resources: of the study, in this process.
        cluster: the machines.
        root: the study folder.
        disable: installed plugins that are not loaded.
        command: the arguments of the command, for the results.

    Raises:
        UserError: if an arm cannot learn, or a machine has other data, versions or settings.
        KeyboardInterrupt: on Ctrl-C; what was done so far is kept and can be resumed.
    """
    root = root.resolve()
    units = [_moved(unit, root, root) for unit in units]
    order = Order(Setup.of(resources.study, disable, cluster, command), root, f".cluster-{uuid.uuid4().hex}")
    write_text(root / order.token, socket.gethostname())
    try:
        with resources.console.side_by_side():
            machines = _Machines(cluster, order, resources)
            (table,) = machines.run([Task("speakers", _embed, units[0])], None)
            parts = [part for unit in units for part in divided(unit, cluster.slots // len(units))]
            if units[0].test:
                tasks = [Task(_label(part), _train, part) for part in parts]
                if units[0].controls is not None:
                    tasks.insert(0, Task("controls", _evaluate_controls, units[0]))
                machines.run(tasks, table)
                parts = [
                    part
                    for unit in units
                    for part in divided(unit, len(unit.arms))
                    if result_status(part.folders[part.arms[0].title]) != "failed"
                ]
            machines.run([Task(_label(part), run_unit, part) for part in parts], table)
    finally:
        (root / order.token).unlink(missing_ok=True)


def divided(unit: Unit, groups: int) -> list[Unit]:
    """A unit in groups of arms, of which there are at least one and at most one for each arm."""
    count = max(1, min(groups, len(unit.arms)))
    bounds = [len(unit.arms) * group // count for group in range(count + 1)]
    return [
        replace(unit, arms=arms, folders={arm.title: unit.folders[arm.title] for arm in arms})
        for arms in (unit.arms[first:last] for first, last in pairwise(bounds))
    ]


def _label(unit: Unit) -> str:
    more = f" and {len(unit.arms) - 1} more" if len(unit.arms) > 1 else ""
    return f"seed {unit.seed}, {unit.arms[0].title}{more}"


def _moved(unit: Unit, root: Path, to: Path) -> Unit:
    """A unit of the study folder `root` in another folder."""
    folders = {title: to / folder.resolve().relative_to(root) for title, folder in unit.folders.items()}
    return replace(unit, folders=folders, controls=unit.controls and to)


class _Machines:
    """Runs tasks on a cluster, with the files that they need and make."""

    def __init__(self, cluster: Cluster, order: Order, resources: StudyResources) -> None:
        self.cluster, self.order, self.resources = cluster, order, resources
        self.shared = True  # until a machine says otherwise; from then on, files are sent with each task

    def run(self, tasks: list[Task], table: SpeakerTable | None) -> list[Any]:
        """Do tasks; what they return, in the order in which they are done."""
        returned = []
        for task, (state, value) in self.cluster.run(
            partial(_perform, self.order, table), tasks, pack=self._packed, receive=self._receive
        ):
            if state != _NOT_SHARED:
                returned.append(value)
                continue
            self.shared = False
            self.resources.console.line(
                f"{self.order.root} is not shared with {value}: its files are brought back over Ray"
            )
            tasks.append(task)
        return returned

    def _packed(self, task: Task) -> Packed:
        files = None if self.shared else self._files(task.unit)
        return task, compared_values(task.unit.arms, self.resources), files

    def _files(self, unit: Unit) -> Files:
        """What a machine needs to continue a unit."""
        root = self.order.root
        paths = [path for folder in unit.folders.values() for path in folder.rglob("*")]
        if unit.controls is not None:
            paths += [path for name in CONTROLS for path in (root / "controls" / name).rglob("*.json*")]
        return {str(path.relative_to(root)): path.read_bytes() for path in paths if path.is_file()}

    def _receive(self, files: Files) -> None:
        for name, content in files.items():
            if content is None:
                (self.order.root / name).unlink(missing_ok=True)
            else:
                write_bytes(self.order.root / name, content)


# ------------------------------------------------------------------------------------------- on a machine


def _perform(order: Order, table: SpeakerTable | None, packed: Packed, console: WorkerConsole) -> tuple[str, Any]:
    """Do a task; "done" and what it returns, or `_NOT_SHARED` and the name of this machine if it needs the files."""
    task, values, files = packed
    with _study_folder(order, files, console) as folder:
        if folder is None:
            return _NOT_SHARED, console.host
        resources = order.setup.load(console)
        if table is not None:
            resources.table = table
        check_machine(compared_values(task.unit.arms, resources), values)
        return "done", task.act(_moved(task.unit, order.root, folder), resources)


@contextmanager
def _study_folder(order: Order, files: Files | None, console: WorkerConsole) -> Iterator[Path | None]:
    """The study folder if this machine shares it; else a folder with `files`, of which changes are sent; else None."""
    if (order.root / order.token).is_file():
        yield order.root
    elif files is None:
        yield None
    else:
        with TemporaryDirectory(prefix="snac-") as place:
            outbox = _Outbox(Path(place).resolve(), files, console, order.send_every)
            console.after_progress = outbox.send_if_due
            try:
                yield outbox.folder
            finally:
                console.after_progress = lambda: None
                outbox.send()


class _Outbox:
    """Sends the files of a folder that have changed."""

    def __init__(self, folder: Path, files: Files, console: WorkerConsole, every: float) -> None:
        self.folder, self.console, self.every = folder, console, every
        for name, content in files.items():
            if content is not None:
                write_bytes(folder / name, content)
        self.sent = self._states()
        self.time = time.monotonic()

    def _states(self) -> dict[str, tuple[int, int]]:
        """Name of each file to what changes with its content."""
        found = {}
        for path in self.folder.rglob("*"):
            if path.is_file():
                state = path.stat()
                found[str(path.relative_to(self.folder))] = state.st_mtime_ns, state.st_size
        return found

    def send(self) -> None:
        """Send what has changed since the last time; the files of a checkpoint and its log appear together."""
        states = self._states()
        changed: dict[str, bytes | None] = {
            name: (self.folder / name).read_bytes() for name, state in states.items() if self.sent.get(name) != state
        }
        changed |= dict.fromkeys(self.sent.keys() - states.keys())
        if changed:
            self.console.files(changed)
        self.sent, self.time = states, time.monotonic()

    def send_if_due(self) -> None:
        """The same, if the last time is long ago."""
        if time.monotonic() - self.time >= self.every:
            self.send()
