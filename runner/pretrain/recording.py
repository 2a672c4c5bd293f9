"""A step's work on an accelerator, recorded once and replayed: thousands of kernels from one call.

The processor needs longer to start the small kernels of a codec and its critics than the accelerator to run them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


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


class Recording(Generic[T]):
    """A CUDA graph of `work`, which must not look at values of tensors, with inputs that can be exchanged.

    Recording runs nothing. What is drawn at random follows the generator's state at each replay.

    Args:
        work: what is recorded. It has been run before, so that what is made on first use is there.
        given: inputs of the shapes that all later ones have.
    """

    def __init__(self, work: Callable[[Given], T], given: Given) -> None:
        audio, *small = given
        self.given = Given(audio.clone(), *(None if value is None else value.clone() for value in small))
        self.graph = torch.cuda.CUDAGraph()
        # thread_local: others, which prepare batches, may ask the driver for memory meanwhile
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.result = work(self.given)

    def replay(self, given: Given) -> T:
        """What `work` gives for these inputs, in the same tensors each time."""
        for mine, value in zip(self.given, given, strict=True):
            if mine is not None and value is not None:
                mine.copy_(value)
        self.graph.replay()
        return self.result
