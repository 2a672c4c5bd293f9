"""One process per device if torchrun has started them, else a single process."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from snac_runner.devices import device_named


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
        dist.all_reduce(flat)
        flat /= self.world
        start = 0
        for tensor in tensors:
            tensor.copy_(flat[start : start + tensor.numel()].view_as(tensor))
            start += tensor.numel()

    def total(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""
        if self.world == 1:
            return tensor
        moved = tensor.to(self.device)
        dist.all_reduce(moved)
        return moved.to(tensor.device)

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Copy the tensors of rank 0 to all processes, in place."""
        if self.world > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), 0)

    def wait(self) -> None:
        """Wait until all processes have called this."""
        if self.world > 1:
            dist.barrier()


@contextmanager
def distributed_context(device: str) -> Iterator[DistributedContext]:
    """The context of this process, from the environment variables that torchrun sets.

    Args:
        device: auto, cpu, cuda, cuda:N or mps.

    Raises:
        UserError: for a device that is not available.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    chosen = device_named(device)
    if chosen.type == "cuda" and world > 1:
        chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(chosen)
    if world == 1:
        if chosen.index is not None and chosen.type == "cuda":
            torch.cuda.set_device(chosen)  # CUDA graphs are captured on the current device
        yield DistributedContext(chosen)
        return
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield DistributedContext(chosen, rank, world)
    finally:
        dist.destroy_process_group()
