"""One process per device if torchrun has started them, else a single process.

Every process computes the same batch, targets and decisions; each trains on its own rows of a batch. Only sums of
gradients and of logged values are exchanged in a step. The first process writes all files.
"""

from __future__ import annotations

import datetime
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from snac_core.errors import UserError
from snac_core.plugin_guard import describe_error
from snac_runner.devices import device_named

T = TypeVar("T")
_LONGEST_WAIT = datetime.timedelta(days=1)  # of one process for another, e.g. while the first one computes embeddings


class ProcessLost(RuntimeError):
    """Another process has ended, or cannot be reached, so that this one cannot continue."""


@dataclass(frozen=True)
class DistributedContext:
    """The device of this process and its place among all processes.

    Attributes:
        device: of this process.
        rank: number of this process, from 0.
        world: number of processes.
    """

    device: torch.device
    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def describe(self) -> str:
        """The devices in words."""
        if self.device.type == "cuda":
            return f"{self.world} x {torch.cuda.get_device_name(self.device)}"
        return f"{self.world} process(es) of {torch.get_num_threads()} CPU thread(s)"

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their means over all processes, in place, with one all-reduce."""
        if self.world == 1 or not tensors:
            return
        flat = torch.cat([t.flatten() for t in tensors])
        self.add_up(flat)
        flat /= self.world
        start = 0
        for tensor in tensors:
            tensor.copy_(flat[start : start + tensor.numel()].view_as(tensor))
            start += tensor.numel()

    def add_up(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over all processes, in place.

        Raises:
            ProcessLost: if another process has ended.
        """
        if self.world > 1:
            with _reaching_others():
                dist.all_reduce(tensor)

    def total(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""
        if self.world == 1:
            return tensor
        moved = tensor.to(self.device)
        self.add_up(moved)
        return moved.to(tensor.device)

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Copy the tensors of rank 0 to all processes, in place."""
        if self.world > 1:
            with _reaching_others():
                for tensor in tensors:
                    dist.broadcast(tensor.detach(), 0)

    def wait(self) -> None:
        """Wait until all processes have called this."""
        self.gather(None)

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank, in all processes."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        with _reaching_others():
            dist.all_gather_object(values, value)
        return values

    def agree(self, value: T) -> T:
        """The value of the first process, in all processes: for what depends on files, which only that one writes."""
        if self.world == 1:
            return value
        values: list[Any] = [value]
        with _reaching_others():
            dist.broadcast_object_list(values, 0)
        found: T = values[0]
        return found

    def first_decides(self, decide: Callable[[], T]) -> T:
        """What `decide` returns in the first process, which alone calls it: for decisions that read or write files.

        Raises:
            UserError: in all processes, if `decide` raises it.
        """
        outcome: tuple[T | None, str | None] | None = None
        if self.first:
            try:
                outcome = decide(), None
            except UserError as error:
                if self.world == 1:
                    raise
                outcome = None, str(error)
        agreed = self.agree(outcome)
        assert agreed is not None
        value, error_message = agreed
        if error_message is not None:
            raise UserError(error_message)
        return value  # type: ignore[return-value]

    def share(self, part: Callable[[], list[T]]) -> list[T]:
        """The results of all processes, each of which calls `part` for its share of some work, in the order of ranks.

        Raises:
            RuntimeError: in all processes, if `part` raises an exception in one of them.
        """
        if self.world == 1:
            return part()
        found: list[T] = []
        error: str | None = None
        try:
            found = part()
        except OSError:
            raise
        except Exception as raised:
            error = describe_error(raised)
        together = self.gather((found, error))
        for rank, (_, message) in enumerate(together):
            if message is not None:
                raise RuntimeError(f"{message}, on process {rank} of {self.world}")
        return [one for part_of_one, _ in together for one in part_of_one]

    def check_equal(self, values: Mapping[str, str]) -> None:
        """Check that all processes have the same data, versions and settings.

        Args:
            values: what to compare, in words, to its value or digest.

        Raises:
            UserError: in every process, naming the first process that differs, and in what.
        """
        mine = {**values, "host": socket.gethostname()}
        table = self.gather(mine)
        for rank, other in enumerate(table):
            if found := difference(other, table[0]):
                raise UserError(
                    f"process {rank} (on {other['host']}) has {found[0]}, the first process (rank 0) {found[1]}; all "
                    "processes need the same data, versions and settings"
                )


ALONE = DistributedContext(torch.device("cpu"))
"""The context of work that is not shared among processes."""


def check_machine(values: Mapping[str, str], of_command: Mapping[str, str]) -> None:
    """Check on a machine of a cluster that it has the same data, versions and settings as the command.

    Args:
        values: of this machine, in words, to a value or digest.
        of_command: the same of the command.

    Raises:
        UserError: naming this machine, and in what it differs.
    """
    if found := difference(values, of_command):
        raise UserError(
            f"{socket.gethostname()} has {found[0]}, the command {found[1]}; all machines need the same data, versions "
            "and settings"
        )


def difference(other: Mapping[str, str], first: Mapping[str, str]) -> tuple[str, str] | None:
    """The first value in which two processes differ, in words: of the other one, with its name, and of the first.

    Both are cut to the place where they differ. The name of the host may differ.
    """
    for name, value in first.items():
        there = other.get(name) or "none"
        if name != "host" and there != value:
            start = next((i for i, (a, b) in enumerate(zip(there, value, strict=False)) if a != b), 0)
            start = max(0, start - 20) if len(value) > 60 else 0
            return f"{name} {there[start : start + 60]!r}", repr(value[start : start + 60])
    return None


@contextmanager
def _reaching_others() -> Iterator[None]:
    try:
        yield
    except (torch.OutOfMemoryError, torch.AcceleratorError):  # of this process
        raise
    except RuntimeError as error:  # torch's DistBackendError is one
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it, and what is done has to be saved first
        raise ProcessLost("another process has ended or cannot be reached") from error


def launched() -> bool:
    """Whether torchrun has started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def distributed_context(device: str) -> Iterator[DistributedContext]:
    """The context of this process, from the environment variables that torchrun sets.

    Args:
        device: auto, cpu, cuda, cuda:N or mps.

    Raises:
        UserError: for a device that is not available, or more processes than CUDA devices on this machine.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    chosen = device_named(device)
    if world == 1:
        if chosen.index is not None and chosen.type == "cuda":
            torch.cuda.set_device(chosen)  # CUDA graphs are captured on the current device
        yield DistributedContext(chosen)
        return
    if chosen.type == "cuda":
        here, local = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", "0"))
        if local >= here:
            raise UserError(f"process {local} of this machine has no CUDA device: there are {here}; start {here}")
        chosen = torch.device("cuda", local)
        torch.cuda.set_device(chosen)
    elif chosen.type != "cpu":
        raise UserError(f"several processes on {chosen.type} are not supported; expected cuda or cpu")
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"  # gloo also carries objects
    dist.init_process_group(backend, timeout=_LONGEST_WAIT)
    yield DistributedContext(chosen, rank, world)
    dist.destroy_process_group()  # after an error, it could wait for other processes
