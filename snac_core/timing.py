"""Time of work on a device, measured without waiting for it."""

from __future__ import annotations

import time
from types import TracebackType

import torch


class Stopwatch:
    """Sums the time of the blocks `with stopwatch:`. A block inside another one counts for its own stopwatch only.

    On CUDA, where the CPU runs ahead of the device, events mark the ends of each block in the device's queue.

    Args:
        device: that does the work.
    """

    _running: list[Stopwatch] = []  # noqa: RUF012  (of all stopwatches: the blocks that are open, the innermost last)

    def __init__(self, device: torch.device) -> None:
        self.on_cuda = device.type == "cuda"
        self._sum = 0.0
        self._start: float | torch.cuda.Event = 0.0
        self._pending: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __enter__(self) -> Stopwatch:
        if self._running:
            self._running[-1]._pause()
        self._running.append(self)
        self._resume()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._pause()
        self._running.pop()
        if self._running:
            self._running[-1]._resume()

    def lap(self) -> float:
        """The sum since the last call, in s; on CUDA, waits until the device has done this work."""
        for start, end in self._pending:
            end.synchronize()
            self._sum += start.elapsed_time(end) / 1000
        self._pending.clear()
        found, self._sum = self._sum, 0.0
        return found

    def _resume(self) -> None:
        self._start = self._mark()

    def _pause(self) -> None:
        now, start = self._mark(), self._start
        if isinstance(now, float):
            assert isinstance(start, float)
            self._sum += now - start
        else:
            assert not isinstance(start, float)
            self._pending.append((start, now))

    def _mark(self) -> float | torch.cuda.Event:
        if not self.on_cuda:
            return time.perf_counter()
        event: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event
