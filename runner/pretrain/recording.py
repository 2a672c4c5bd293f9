"""A step's work on an accelerator, recorded once and replayed: thousands of kernels from one call.

The processor needs longer to start the small kernels of a codec and its critics than the accelerator to run them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
_SET_UP = 5  # calls before the first that is recorded


class Given(NamedTuple):
    """What a step is given; all else that changes with the steps is state.

    Attributes:
        audio: (B, 1, T).
        levels: (B,) how many levels of codes an item keeps; None: all.
        scale: weight of the critics' terms, 0 to 1, a scalar; None before critics train.
        start: where in the audio the critics begin to listen, a whole number; None: they hear all of it.
    """

    audio: Tensor
    levels: Tensor | None = None
    scale: Tensor | None = None
    start: Tensor | None = None


class Replay(Generic[T]):
    """`work` from a CUDA graph of it.

    The first calls with inputs of one kind are not recorded, so that what is made on first use is there. Recording runs
    nothing; what is drawn at random follows the generator's state at each call.

    Args:
        work: what is recorded; it must not look at values of tensors, and finds its state where it was.
    """

    def __init__(self, work: Callable[[Given], T]) -> None:
        self.work = work
        self.kind: tuple[bool, ...] = ()  # which inputs there are
        self.seen = 0  # calls with them
        self.recorded: tuple[torch.cuda.CUDAGraph, Given, T] | None = None  # where inputs go and results come

    def __call__(self, given: Given) -> T:
        """What `work` gives for these inputs; once recorded, in the same tensors each time."""
        kind = tuple(value is not None for value in given)
        if kind != self.kind:
            self.forget()
            self.kind = kind
        self.seen += 1
        if self.seen <= _SET_UP:
            return self.work(given)
        if self.recorded is None:
            self.recorded = self._record(given)
        graph, inputs, result = self.recorded
        for mine, value in zip(inputs, given, strict=True):
            if mine is not None and value is not None:
                mine.copy_(value)
        graph.replay()
        return result

    def forget(self) -> None:
        """Begin anew, because the state lies elsewhere now; the memory of what was recorded is free again."""
        self.kind, self.seen, self.recorded = (), 0, None

    def _record(self, given: Given) -> tuple[torch.cuda.CUDAGraph, Given, T]:
        audio, *small = given
        inputs = Given(audio.clone(), *(None if value is None else value.clone() for value in small))
        graph = torch.cuda.CUDAGraph()
        # thread_local: others, which prepare batches, may ask the driver for memory meanwhile
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = self.work(inputs)
        return graph, inputs, result
