"""The resources of a study in the processes of a Ray cluster, and work that needs nothing else."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from snac_core.errors import UserError
from snac_core.plugins import discover
from snac_runner.cluster import Cluster, WorkerConsole
from snac_runner.config import StudySettings
from snac_runner.devices import device_named
from snac_runner.distributed import DistributedContext
from snac_runner.resources import StudyResources

Done = TypeVar("Done")


@dataclass(frozen=True)
class Setup:
    """How a process of a cluster loads the resources of a study.

    Attributes:
        study: the settings.
        disable: installed plugins that are not loaded.
        folder: the working folder of the command.
        command: its arguments, for the results.
        device, threads: of the process.
    """

    study: StudySettings
    disable: tuple[str, ...]
    folder: Path
    command: tuple[str, ...]
    device: str
    threads: int

    @classmethod
    def of(cls, study: StudySettings, disable: Sequence[str], cluster: Cluster, command: Sequence[str]) -> Setup:
        """The setup of the processes of a cluster.

        Raises:
            UserError: if the study asks for a GPU and the cluster has none.
        """
        device = study.device if cluster.share.gpus else "cpu"
        if device != study.device == "cuda":
            raise UserError("device 'cuda' asked for, but no machine of the cluster has a GPU; use auto or cpu")
        return cls(study, tuple(disable), Path.cwd(), tuple(command), device, cluster.share.cpus)

    def load(self, console: WorkerConsole) -> StudyResources:
        """The resources in this process, which later calls share."""
        torch.set_num_threads(self.threads)
        sys.argv = ["runner", *self.command]
        if self.folder.is_dir():  # relative paths of settings
            os.chdir(self.folder)
        resources = _resources(self.study, self.disable, self.device)
        resources.console = console
        return resources


@lru_cache(maxsize=1)
def _resources(study: StudySettings, disable: tuple[str, ...], device: str) -> StudyResources:
    catalogue = discover(study.plugins, disable=disable)
    return StudyResources(study, catalogue, context=DistributedContext(device_named(device)))


class _Part(NamedTuple):
    """A part of some work."""

    name: str
    content: Any

    def __str__(self) -> str:
        return self.name


def spread(
    work: Callable[[StudyResources, Any], Done],
    parts: dict[str, Any],
    *,
    cluster: Cluster,
    setup: Setup,
) -> Iterator[Done]:
    """Do parts of some work on a cluster.

    Args:
        work: called with the resources of its process and a part.
        parts: name to part.
        cluster: the machines.
        setup: of their processes.

    Returns:
        what `work` returns, in the order in which the parts are done.
    """
    jobs = [_Part(name, content) for name, content in parts.items()]
    for _, done in cluster.run(partial(_perform, setup, work), jobs, pack=lambda part: part.content):
        yield done


def _perform(setup: Setup, work: Callable[[StudyResources, Any], Done], part: Any, console: WorkerConsole) -> Done:
    return work(setup.load(console), part)
