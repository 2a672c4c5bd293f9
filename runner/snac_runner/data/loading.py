"""Batches of the next steps, prepared in other processes while the device computes."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_all_start_methods, get_context, parent_process
from multiprocessing.reduction import ForkingPickler
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from snac_core.errors import UserError

T = TypeVar("T", covariant=True)
_AHEAD = 4  # batches that each process prepares
_PRELOADED = ("snac_runner.data.loading", "snac_runner.data.crops")

_log = logging.getLogger(__name__)


class Batches(Protocol[T]):
    """Batches by step, such as `snac_runner.data.crops.CropLoader`: equal steps give equal batches in every process."""

    @property
    def steps_per_epoch(self) -> int:
        """How many steps an epoch has."""

    @property
    def at(self) -> Callable[..., T]:
        """The batch of a step, the first argument; or the rows of it that the second one, a slice, selects."""


class PrefetchingLoader(Generic[T]):
    """Prepares the batches of the next steps in other processes. The batches equal those of `batches`.

    Steps are best asked for in order: those after the latest one are being prepared. If a process is killed, all are
    started again, once.

    Args:
        batches: source of the batches; it is pickled for the processes.
        last: this step and later ones are not prefetched.
        workers: largest number of processes; 0: batches are prepared when they are asked for.
        parts: the rows of each batch that are asked for one after the other; none: whole batches.
    """

    def __init__(self, batches: Batches[T], last: int, workers: int, parts: Sequence[slice] = ()) -> None:
        self.batches: Any = batches
        self.last = last
        self.workers = min(workers, cores())
        self.steps_per_epoch = batches.steps_per_epoch
        self._parts: list[tuple[slice, ...]] = [(rows,) for rows in parts] or [()]
        self._pool: ProcessPoolExecutor | None = None
        self._running: dict[int, Future[T]] = {}  # by step * number of parts + part
        self._retried_up_to = -1  # what was being prepared when a process was killed

    def at(self, step: int, *rows: slice) -> T:
        """The batch of a step, or rows of it; prefetching of the next ones continues or starts.

        Raises:
            UserError: as `batches` does; also if a process is killed again after all were started again.
        """
        if not self.workers or not 0 <= step < self.last or rows not in self._parts:
            batch: T = self.batches.at(step, *rows)
            return batch
        key = step * len(self._parts) + self._parts.index(rows)
        while True:
            try:
                return self._submitted(key).result()
            except BrokenProcessPool as error:
                died = error
            self.close()
            if key <= self._retried_up_to:
                raise UserError(
                    f"a process that reads audio was killed, and again after a new start, before step {step} was read; "
                    "run the same command again to continue, with more memory or workers = 0"
                ) from died
            self._retried_up_to = key + self._ahead
            _log.warning("a process that reads audio was killed; it is started again")

    def close(self) -> None:
        """Stop the processes, after the batches that they are reading."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
        self._pool = None
        self._running.clear()

    @property
    def _ahead(self) -> int:
        return self.workers * _AHEAD

    def _submitted(self, key: int) -> Future[T]:
        """The batch with this key; the next ones are handed to the processes too."""
        if self._pool is None:
            self._pool = self._started()
        wanted = range(key, min(key + self._ahead, self.last * len(self._parts)))
        for other in [other for other in self._running if other not in wanted]:
            self._running.pop(other).cancel()
        for one in wanted:
            if one not in self._running:
                step, part = divmod(one, len(self._parts))
                self._running[one] = self._pool.submit(_batch, step, *self._parts[part])
        return self._running.pop(key)

    def _started(self) -> ProcessPoolExecutor:
        """The processes: forked, where that is possible, from a server that has imported torch and nothing else."""
        server = "forkserver" in get_all_start_methods()
        context = get_context("forkserver" if server else "spawn")
        if server:
            context.set_forkserver_preload([*_PRELOADED])
        arguments = (bytes(ForkingPickler.dumps(self.batches)), {**os.environ})
        return ProcessPoolExecutor(self.workers, context, initializer=_start_worker, initargs=arguments)


def cores() -> int:
    """Number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_PICKLED = [b""]  # of a worker process: the source of the batches
_SOURCE: list[Batches[Any]] = []  # of a worker process: the same, once it is needed


def _start_worker(batches: bytes, environment: dict[str, str]) -> None:
    """Set up a worker process: one thread, no reaction to Ctrl-C, and an exit with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=exit_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    os.environ.update(environment)  # the server was started with an earlier one
    ForkingPickler.register(Tensor, _by_value)
    _PICKLED[:] = [batches]


def exit_with_parent() -> None:
    """End this process when the one that has started it ends, even by a signal."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _by_value(tensor: Tensor) -> tuple[Any, ...]:
    """A tensor as bytes: torch's own way, a shared file, is lost with a process that is killed."""
    return torch.from_numpy, (tensor.numpy(),)


def _batch(step: int, *rows: slice) -> Any:
    if not _SOURCE:
        _SOURCE.append(ForkingPickler.loads(_PICKLED[0]))  # of the process that has started this one, as all arguments
    return _SOURCE[0].at(step, *rows)


if any("multiprocessing.forkserver" in argument for argument in sys.orig_argv):
    os.setpgrp()  # Ctrl-C reaches a process group: this process stops its workers after its last checkpoint
