"""`--cluster`: independent jobs on the machines of a Ray cluster. Ray is imported only when one is asked for.

Jobs report to the command that started them: lines of text, progress, and files. A job of a process that dies is
started again.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeVar

from snac_core.errors import UserError, system_error
from snac_runner.console import Console
from snac_runner.distributed import ProcessLost

Job = TypeVar("Job")
Files = Mapping[str, bytes | None]
"""Path, relative to a folder, to the content of the file; None: the file is deleted."""

ADDRESSES = "auto (the Ray cluster that this machine belongs to), local (started here) or ray://HOST:PORT"
RESTARTS = 3
"""How often a job is started again after its process has died."""
_ANSWER = 10  # s that an address may take to accept a connection
_STOPPING = 90  # s that jobs have to end their step and save it, after Ctrl-C
_POLL = 0.2  # s between two looks at the messages of the jobs
_SILENCE = 90  # s without an answer of any job, after which a hint is displayed
_ASK, _UNANSWERED = 2, 5  # s between two questions to the head of the cluster, and how many may stay unanswered
_LOST = "the Ray cluster cannot be reached any more"
_AHEAD = 100  # jobs that are handed to Ray at once


@dataclass(frozen=True)
class Share:
    """What each job has of its machine: GPUs, also in fractions, and CPU cores, which is also its number of threads."""

    gpus: float
    cpus: int

    @classmethod
    def of(cls, nodes: list[dict[str, float]], gpus: float | None, cpus: int | None) -> Share:
        """The share that is asked for. By default: one GPU where there are GPUs, and this part of its machine's cores.

        Args:
            nodes: the resources of each machine, as Ray names them.
            gpus, cpus: what is asked for; None: the default.

        Raises:
            UserError: if no machine has so much.
        """
        if gpus is None:
            gpus = 1.0 if any(node.get("GPU") for node in nodes) else 0.0
        if cpus is None:
            of_gpus = [node.get("CPU", 0.0) / node["GPU"] for node in nodes if node.get("GPU")]
            cpus = max(1, int(min(of_gpus) * gpus)) if gpus and of_gpus else 1
        share = cls(gpus, cpus)
        if not share.slots(nodes):
            most = "; ".join(f"{node.get('CPU', 0):g} CPUs, {node.get('GPU', 0):g} GPUs" for node in nodes)
            raise UserError(
                f"no machine of the cluster has {cpus} CPUs and {gpus:g} GPUs for a run; the machines have: {most}; "
                "lower --gpus-per-run or --cpus-per-run"
            )
        return share

    def slots(self, nodes: list[dict[str, float]]) -> int:
        """How many jobs run at once."""
        return sum(
            min(
                int(node.get("CPU", 0) / self.cpus + 1e-9),
                int(node.get("GPU", 0) / self.gpus + 1e-9) if self.gpus else sys.maxsize,
            )
            for node in nodes
        )


class WorkerConsole(Console):
    """In the process of a job: sends everything to the command that started it.

    Attributes:
        host: name of this machine.
        after_progress: called after each report of progress.
    """

    def __init__(self, mailbox: Any) -> None:
        self.host = socket.gethostname()
        self.after_progress: Callable[[], None] = lambda: None
        self._mailbox = mailbox
        self._last: Any = None

    def line(self, text: str) -> None:
        self._send(("line", text))

    def show_progress(self, title: str, done: int, total: int, note: str = "") -> None:
        self._send(("progress", title, done, total, f"{note} ({self.host})".strip()))
        self.after_progress()

    def files(self, files: Files) -> None:
        """Send files, which appear together."""
        self._send(("files", files))

    def flush(self) -> None:
        """Wait until everything has arrived."""
        if self._last is not None:
            _ray().get(self._last)

    def _send(self, message: tuple[Any, ...]) -> None:
        self._last = self._mailbox.put.remote(message)


class _Mailbox:
    """An actor of Ray, in which messages wait until the command takes them."""

    def __init__(self) -> None:
        self.messages: list[tuple[Any, ...]] = []

    def put(self, message: tuple[Any, ...]) -> None:
        self.messages.append(message)

    def take(self) -> list[tuple[Any, ...]]:
        taken, self.messages = self.messages, []
        return taken


def _perform(work: Callable[[Any, WorkerConsole], Any], job: Any, mailbox: Any) -> tuple[str, Any]:
    """Do a job in a process of the cluster; "done" and what it returns, or "error" or "died" and a sentence."""
    console = WorkerConsole(mailbox)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_args, **_kw: console.warning(str(message))
            outcome = "done", work(job, console)
    except KeyboardInterrupt as stop:  # by `Cluster.run`, or by a machine that shuts down
        outcome = "died", str(stop)
    except UserError as error:
        outcome = "error", str(error)
    except OSError as error:
        outcome = "error", f"{system_error(error)} (on {console.host})"
    console.flush()
    return outcome


class _Head:
    """Whether the head of the cluster answers, asked in a thread; if it does not, the main thread gets SIGTERM.

    Ray itself notices after a minute, and ends this process with a message of its own.

    Args:
        address: HOST:PORT; "": the connection is watched by Ray's client, which raises ConnectionError.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self.is_lost = False
        self._left = threading.Event()

    def __enter__(self) -> _Head:
        if self.address and threading.current_thread() is threading.main_thread():
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()

    def _watch(self) -> None:
        host, _, port = self.address.rpartition(":")
        unanswered = 0
        while not self._left.wait(_ASK):
            try:
                socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER).close()
                unanswered = 0
            except OSError:
                unanswered += 1
            if unanswered == _UNANSWERED:
                self.is_lost = True
                os.kill(os.getpid(), signal.SIGTERM)
                return


class Cluster:
    """The machines that a command is connected to; see `connected`.

    Attributes:
        share: what each job has of its machine.
        slots: how many jobs run at once.
    """

    def __init__(self, ray: ModuleType, share: Share, slots: int, head: _Head, console: Console) -> None:
        self.share, self.slots, self.console = share, slots, console
        self._head = head
        self._ray = ray
        self._mailbox = ray.remote(_Mailbox).options(num_cpus=0).remote()
        self._task = ray.remote(_perform).options(
            num_cpus=share.cpus, num_gpus=share.gpus, max_retries=0, scheduling_strategy="SPREAD"
        )
        self._said: set[str] = set()
        self._wait_until: float | None = time.monotonic() + _SILENCE  # None: a process has answered

    def run(
        self,
        work: Callable[[Any, WorkerConsole], Any],
        jobs: list[Job],
        *,
        pack: Callable[[Job], Any],
        receive: Callable[[Files], None] = lambda _: None,
    ) -> Iterator[tuple[Job, Any]]:
        """Do jobs on the cluster; each with what it returns, in the order in which they are done.

        Args:
            work: called on the cluster, with what `pack` gives for a job.
            jobs: what to do; it is emptied, and jobs may be added to it meanwhile. `str` of a job is its name.
            pack: a job to what is sent for it; called for each start of the job.
            receive: called with files that a job sends.

        Raises:
            UserError: of a job, or if the process of a job dies again and again. The other jobs are stopped.
            ProcessLost: if the cluster cannot be reached any more.
            KeyboardInterrupt: on Ctrl-C or SIGTERM, after all jobs have stopped.
        """
        ray = self._ray
        started: dict[Any, tuple[Job, int]] = {}
        packed_work = ray.put(work)

        def start(job: Job, deaths: int = 0) -> None:
            started[self._task.remote(packed_work, pack(job), self._mailbox)] = job, deaths

        try:
            with _interrupted_by_sigterm():
                while jobs or started:
                    while jobs and len(started) < _AHEAD:
                        start(jobs.pop(0))
                    ended, _ = ray.wait(list(started), timeout=_POLL)
                    outcomes = [(ref, self._outcome(ref)) for ref in ended]
                    self._take(receive)
                    for ref, (state, value) in outcomes:
                        job, deaths = started.pop(ref)
                        if state == "done":
                            yield job, value
                        elif state == "error":
                            raise UserError(value)
                        elif deaths < RESTARTS:
                            self.console.line(f"{job}: its process has died ({value}); it is started again")
                            start(job, deaths + 1)
                        else:
                            raise UserError(f"{job}: its process has died {deaths + 1} times ({value})")
        except ray.exceptions.RayTaskError:  # of the work; it may be a RaySystemError too
            raise
        except (ray.exceptions.RayActorError, ray.exceptions.RaySystemError, ConnectionError) as error:
            started.clear()
            raise ProcessLost(f"{_LOST} ({type(error).__name__})") from error
        except KeyboardInterrupt:
            if self._head.is_lost:
                started.clear()
                raise ProcessLost(f"{_LOST} (its head at {self._head.address} does not answer)") from None
            raise
        finally:
            if started:
                self._stop(started, receive)

    def _outcome(self, ref: Any) -> tuple[str, Any]:
        """What `_perform` returns; else "died" and the reason."""
        exceptions = self._ray.exceptions
        try:
            outcome: tuple[str, Any] = self._ray.get(ref)
        except exceptions.RayTaskError:  # an exception of the work, with its traceback
            raise
        except exceptions.RayError as error:
            return "died", type(error).__name__
        return outcome

    def _take(self, receive: Callable[[Files], None]) -> None:
        """Show and store what jobs have sent; say once if no job answers."""
        messages = self._ray.get(self._mailbox.take.remote())
        if messages:
            self._wait_until = None
        elif self._wait_until and time.monotonic() > self._wait_until:
            self._wait_until = None
            self.console.line(
                f"no process of the cluster has answered for {_SILENCE} s: its cores may be in use by other commands, "
                "or it cannot start this version of snac-conditioning; Ctrl-C stops"
            )
        for kind, *content in messages:
            if kind == "files":
                receive(*content)
            elif kind == "progress":
                self.console.show_progress(*content)
            elif content[0] not in self._said:  # the warnings of all jobs are alike
                self._said.add(content[0])
                self.console.line(content[0])

    def _stop(self, started: Iterable[Any], receive: Callable[[Files], None]) -> None:
        """Stop jobs, and wait until they have saved their state."""
        running = list(started)
        self.console.line(f"stopping {len(running)} job(s) of the cluster")
        for ref in running:
            self._ray.cancel(ref)
        end = time.monotonic() + _STOPPING
        while running and time.monotonic() < end:
            _, running = self._ray.wait(running, num_returns=len(running), timeout=_POLL)
            self._take(receive)


@contextmanager
def connected(
    address: str, console: Console, *, gpus: float | None = None, cpus: int | None = None
) -> Iterator[Cluster]:
    """Connect to a Ray cluster, or start one on this machine; it is left, or ends, with the block.

    Args:
        address: see `ADDRESSES`.
        console: where the jobs report.
        gpus, cpus: the share of each job; see `Share.of`.

    Raises:
        UserError: if Ray is not installed, the address does not answer, or no machine has the share.
    """
    host = re.fullmatch(r"ray://(.+):(\d{1,5})", address)
    if address not in ("auto", "local") and not host:
        raise UserError(f"--cluster {address!r}; expected {ADDRESSES}")
    ray = _ray()
    try:
        if host:
            socket.create_connection((host[1].strip("[]"), int(host[2])), timeout=_ANSWER).close()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # those of a connection that fails
            options = {} if address != "local" else {"include_dashboard": False}
            ray.init(address, logging_level=logging.ERROR, log_to_driver=False, **options)
    except Exception as error:  # Ray raises many kinds, also Exception itself
        reason = " ".join(str(error).split())[:300]
        what = "Ray does not start" if address == "local" else "no Ray cluster answers"
        if host and "timeout" in reason:  # the server does not say why it refuses
            reason += "; a cluster with token authentication needs RAY_AUTH_MODE=token and its token here"
        raise UserError(f"--cluster {address}: {what} ({reason}); expected {ADDRESSES}") from error
    try:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        share = Share.of(nodes, gpus, cpus)
        slots = share.slots(nodes)
        console.line(
            f"cluster: {len(nodes)} machine(s), {slots} run(s) at once, each with {share.cpus} CPU core(s)"
            f"{f' and {share.gpus:g} GPU(s)' if share.gpus else ''}"
        )
        with _Head("" if host else ray.get_runtime_context().gcs_address) as head:
            yield Cluster(ray, share, slots, head, console)
    finally:
        ray.shutdown()


def _ray() -> ModuleType:
    """The package `ray`, without its reports of usage and its own handling of `uv run`.

    Raises:
        UserError: if it is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    try:
        import ray
    except ImportError:
        raise UserError("--cluster needs Ray; install it with: pip install 'snac-conditioning[cluster]'") from None
    return ray


@contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """SIGTERM is like Ctrl-C."""

    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        with suppress(TypeError):  # a handler that Python has not installed
            signal.signal(signal.SIGTERM, before)
