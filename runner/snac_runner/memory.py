"""Largest memory of a piece of work, and errors of a device whose memory is not enough."""

from __future__ import annotations

import resource
import sys
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Largest memory inside the block `with memory:`, in bytes, as `peak`; 0 before its end.

    On CUDA, of the tensors of this process. Else, of this process as a whole: on Linux inside the block, on other
    systems since it started.

    Args:
        device: that does the work.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.peak = 0

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with suppress(OSError):
                _RESET.write_text("5")  # sets the peak of the resident memory to its present value (proc(5))
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self.device)
        else:
            self.peak = _resident_peak()


def _resident_peak() -> int:
    with suppress(OSError, StopIteration):
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    kilo = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilo


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is that of a device without enough memory."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
            return True
        error = error.__cause__
    return False


def gibibytes(count: int) -> str:
    """A number of bytes in words."""
    return f"{count / 2**30:.2f} GiB"
