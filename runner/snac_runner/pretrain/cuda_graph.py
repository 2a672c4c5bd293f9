"""Run a training step as a CUDA graph.

The kernels of a codec and its discriminators are so small that the CPU needs longer to launch them than the GPU to run
them. A CUDA graph launches all kernels of a step with one call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
_EAGER_CALLS = 5  # before the capture: they allocate what is allocated on first use, e.g. the optimizer's state


class StepInputs(NamedTuple):
    """Inputs of a step. Everything else that changes from step to step is state of the training.

    Attributes:
        audio: (B, 1, T).
        levels: (B,) number of quantizer levels that each item uses; None: all.
        adversary_weight: scalar, 0 to 1, for the loss terms of the discriminators; None before they train.
        segment_start: scalar, first sample of the segment that the discriminators get; None: the whole crop.
    """

    audio: Tensor
    levels: Tensor | None = None
    adversary_weight: Tensor | None = None
    segment_start: Tensor | None = None


class CudaGraphStep(Generic[T]):
    """A function of StepInputs, captured as a CUDA graph and replayed.

    The first calls run `function` itself. The next call captures it, and from then on inputs are copied to the captured
    tensors and the graph is replayed. If another set of inputs is None, the capture is repeated. Random numbers follow
    the state of the generator at each call.

    Args:
        function: must not read values of tensors, and must find its state at the same memory addresses in each call.
    """

    def __init__(self, function: Callable[[StepInputs], T]) -> None:
        self.function = function
        self.present: tuple[bool, ...] = ()  # which inputs are not None
        self.calls = 0  # with these inputs
        self.captured: tuple[torch.cuda.CUDAGraph, StepInputs, T] | None = None  # with the tensors it reads and writes

    def __call__(self, inputs: StepInputs) -> T:
        """The result of `function`; after the capture each call writes it to the same tensors."""
        present = tuple(value is not None for value in inputs)
        if present != self.present:
            self.reset()
            self.present = present
        self.calls += 1
        if self.calls <= _EAGER_CALLS:
            return self.function(inputs)
        if self.captured is None:
            self.captured = self._capture(inputs)
        graph, static_inputs, result = self.captured
        for static, value in zip(static_inputs, inputs, strict=True):
            if static is not None and value is not None:
                static.copy_(value)
        graph.replay()
        return result

    def reset(self) -> None:
        """Discard the graph and free its memory, e.g. because the state of `function` has moved in memory."""
        self.present, self.calls, self.captured = (), 0, None

    def _capture(self, inputs: StepInputs) -> tuple[torch.cuda.CUDAGraph, StepInputs, T]:
        audio, *scalars = inputs
        static_inputs = StepInputs(audio.clone(), *(None if value is None else value.clone() for value in scalars))
        graph = torch.cuda.CUDAGraph()
        # thread_local: the thread that pins the memory of prefetched batches may call the CUDA driver meanwhile
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = self.function(static_inputs)
        return graph, static_inputs, result
