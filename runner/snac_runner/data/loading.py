"""Batches of the next steps, prepared in other processes while the device computes."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from snac_core.errors import UserError

T = TypeVar("T", covariant=True)
_DIED = (RuntimeError, ConnectionError, EOFError)  # what DataLoader raises for a process that is killed
_AHEAD = 4  # batches that each process prepares

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

    Steps are expected in order; any other step restarts the processes. A process that is killed is replaced, once: its
    batches are prepared again. On a machine with CUDA, batches arrive in page-locked memory.

    Args:
        batches: source of the batches.
        last: this step and later ones are not prefetched.
        workers: largest number of processes; 0: batches are prepared when they are asked for.
        parts: the rows of each batch that are asked for one after the other; none: whole batches.
    """

    def __init__(self, batches: Batches[T], last: int, workers: int, parts: Sequence[slice] = ()) -> None:
        self.batches: Any = batches
        self.last = last
        self.workers = min(workers, cores())
        self.steps_per_epoch = batches.steps_per_epoch
        self._data = _StepDataset(batches, [(rows,) for rows in parts] or [()])
        self._next = 0
        self._iterator: Iterator[T | UserError] | None = None

    def at(self, step: int, *rows: slice) -> T:
        """The batch of a step, or rows of it; prefetching of the next ones continues or starts.

        Raises:
            UserError: as `batches` does; also if the processes are killed again and again.
        """
        if not self.workers or not 0 <= step < self.last or rows not in self._data.parts:
            batch: T = self.batches.at(step, *rows)
            return batch
        key = step * len(self._data.parts) + self._data.parts.index(rows)
        for attempt in (1, 2):
            try:
                if self._iterator is None or key != self._next:
                    self._start(key)
                found = self._take()
                break
            except _DIED as error:
                died, cause = error, _cause(error)
            with suppress(*_DIED):  # torch's handler of SIGCHLD raises until the processes are forgotten
                self.close()
            if attempt == 2:
                raise UserError(
                    f"a process that reads audio died twice at step {step} ({cause}); run the same command again to "
                    "continue, with more memory or workers = 0"
                ) from died
            _log.warning("a process that reads audio died (%s); it is started again", cause)
        self._next = key + 1
        if isinstance(found, UserError):
            raise found
        return found

    def close(self) -> None:
        """Stop the processes."""
        self._iterator = None

    def _take(self) -> T | UserError:
        assert self._iterator is not None
        return next(self._iterator)

    def _start(self, key: int) -> None:
        self._iterator = None  # stops the processes of before
        self._iterator = iter(
            DataLoader(
                self._data,
                batch_size=None,
                sampler=range(key, self.last * len(self._data.parts)),
                num_workers=self.workers,
                prefetch_factor=_AHEAD,
                pin_memory=torch.cuda.is_available(),
                worker_init_fn=_ignore_group_signals,
                generator=torch.Generator(),  # else the loader draws from torch's global one
            )
        )


def cores() -> int:
    """Number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cause(error: BaseException) -> str:
    """What DataLoader says of a process that died, without its advice."""
    return str(error).split(". ")[0].split("\n")[0].rstrip(".")


def _ignore_group_signals(_worker: int) -> None:
    """Ctrl-C reaches a whole process group. Workers leave it: the training process stops them after its checkpoint."""
    os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class _StepDataset(Dataset["T | UserError"]):
    """Parts of batches, by step * number of parts + part. A UserError is returned: DataLoader gives raised ones a
    traceback."""

    def __init__(self, batches: Batches[T], parts: list[tuple[slice, ...]]) -> None:
        self.batches = batches
        self.parts = parts

    def __getitem__(self, key: int) -> T | UserError:
        step, part = divmod(key, len(self.parts))
        try:
            return self.batches.at(step, *self.parts[part])
        except UserError as error:
            return error
