"""Commands in processes of their own, which can be killed before a file operation."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snac_runner.cli import main as command_line

WRITES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "shutil.copyfile"}  # audit events, and "open"
LONGEST = 1800  # s until a process counts as hanging


@dataclass(frozen=True)
class Work:
    """A command that is disturbed.

    Attributes:
        name: what the table calls it.
        share: of the kills.
        command: the folder that it writes, to its arguments.
        begin: a folder that is copied to that folder at first.
        fresh: whether it needs a process of its own, as it starts others.
        several: whether a single one of its processes can be killed.
    """

    name: str
    share: float
    command: Callable[[Path], list[str]]
    begin: Path | None = None
    fresh: bool = False
    several: bool = False


@dataclass
class Process:
    """A command in a process, with a log of its output."""

    pid: int
    log: Path
    of: subprocess.Popen[bytes] | None = None

    def ended(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        if self.of is not None:
            return self.of.poll()
        done, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if done else None

    def wait(self) -> int:
        """Wait for the end. Raises TimeoutError after `LONGEST`, and kills the process."""
        until = time.monotonic() + LONGEST
        while (code := self.ended()) is None:
            if time.monotonic() > until:
                kill(tree(self.pid))
                self.wait()
                raise TimeoutError(f"still running after {LONGEST} s")
            time.sleep(0.02)
        return code

    def said(self) -> str:
        """Its output so far."""
        return self.log.read_text(errors="replace")


def start(work: Work, out: Path, hook: Callable[[], None] | None = None) -> Process:
    """Start a command; `hook` is called before it, if it runs in a forked process."""
    log = out.with_suffix(".log")
    if work.fresh:
        with log.open("wb") as file:
            command = [sys.executable, "-W", "ignore", "-m", "snac_runner", *work.command(out)]
            process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
        return Process(process.pid, log, process)
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return Process(pid, log)
    code = 1
    try:
        os.setsid()
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stderr = sys.stdout = io.TextIOWrapper(os.fdopen(2, "wb", 0), write_through=True)
        if hook:
            hook()
        command_line(work.command(out))
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    os._exit(code)


def tree(pid: int) -> list[int]:
    """A process and all its descendants."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


def cpu_seconds(pids: Sequence[int]) -> float:
    """CPU time of processes so far."""
    ticks = 0
    for pid in pids:
        with suppress(OSError):
            ticks += sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))
    return ticks / os.sysconf("SC_CLK_TCK")


def kill(pids: Sequence[int]) -> None:
    """`kill -9`."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def at_operation(number: int, act: Callable[[str], None], kinds: set[str] | None = None) -> Callable[[], None]:
    """A hook that calls `act` before the file operation with this number, from 1; the operations of Python are counted.

    Args:
        number: of the operation.
        act: called with the operation.
        kinds: audit events to count; None: all that change a file.
    """

    def install() -> None:
        done = 0

        def audit(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal done
            if not (changes_a_file(event, arguments) if kinds is None else event in kinds):
                return
            done += 1
            if done == number:
                act(event)

        sys.addaudithook(audit)

    return install


def changes_a_file(event: str, arguments: tuple[Any, ...]) -> bool:
    """Whether an audit event is an operation that writes, moves or removes a file or folder."""
    writes = event in WRITES
    if event == "open":
        writes = isinstance(arguments[2], int) and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
    return writes and "/dev/" not in str(arguments[0])
