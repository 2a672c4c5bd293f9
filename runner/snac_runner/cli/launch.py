"""Options that place a command's work: `--devices N` starts it in N processes, `--cluster` hands it to Ray."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Annotated

import typer

from snac_core.errors import UserError

Devices = Annotated[
    int | None,
    typer.Option(
        min=1, help="Train on this many GPUs of this machine; with --device cpu, in so many processes.",
        show_default=False,
    ),
]  # fmt: skip
ClusterAddress = Annotated[
    str | None,
    typer.Option(
        "--cluster", help="Work on a Ray cluster: auto (that of this machine), local (started here), ray://HOST:PORT.",
        show_default=False,
    ),
]  # fmt: skip
GpusPerRun = Annotated[
    float | None,
    typer.Option(
        "--gpus-per-run", min=0, show_default=False,
        help="With --cluster: GPUs of each run, also a part such as 0.5. Default: 1 where there are GPUs.",
    ),
]  # fmt: skip
CpusPerRun = Annotated[
    int | None,
    typer.Option(
        "--cpus-per-run", min=1, show_default=False,
        help="With --cluster: CPU cores and threads of each run. Default: 1; with GPUs, all that belong to them.",
    ),
]  # fmt: skip
_OF_CLUSTER = ("--cluster", "--gpus-per-run", "--cpus-per-run")
_STOPPING = 90  # s that processes have to end their step and save it, after Ctrl-C or the end of another


class Launch(Exception):
    """Several processes are to be started: `devices` of them."""

    def __init__(self, devices: int) -> None:
        super().__init__(devices)
        self.devices = devices


def check_devices(devices: int | None, device: str) -> None:
    """Raise `Launch` if processes are to be started for `devices` devices.

    Args:
        devices: how many; None: not asked for.
        device: of the study.

    Raises:
        UserError: if this machine has fewer.
    """
    from snac_runner.devices import device_named
    from snac_runner.distributed import launched

    if devices is None or devices == 1 or launched():
        return
    import torch

    chosen = device_named(device)
    if chosen.type == "cuda" and devices > torch.cuda.device_count():
        here = torch.cuda.device_count()
        raise UserError(f"--devices {devices}: this machine has {here} CUDA device(s); expected at most {here}")
    if chosen.type != "cuda" and device != "cpu":
        raise UserError(
            f"--devices {devices}: this machine has no CUDA device; --device cpu trains in {devices} processes on the "
            "CPU"
        )
    raise Launch(devices)


def check_cluster(device: str, devices: int | None, gpus: float | None) -> None:
    """Raise UserError for options that contradict --cluster.

    Args:
        device: of the study.
        devices: of --devices.
        gpus: of --gpus-per-run.
    """
    from snac_runner.distributed import launched

    if devices is not None or launched():
        raise UserError(
            "--cluster with --devices or under torchrun: on a cluster, each run has one device; leave one out"
        )
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--cluster with device {device!r}: Ray assigns the devices; expected auto, cpu or cuda")
    if (device == "cpu" and gpus) or (device == "cuda" and gpus == 0):
        raise UserError(f"--gpus-per-run {gpus:g} with device {device!r}; leave one of them out")


def launch(devices: int, arguments: Sequence[str]) -> int:
    """Run `runner` with these arguments, without --devices, in `devices` processes; returns the exit code.

    The first process prints. If another one ends first, its last line is printed.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in list(logging.root.manager.loggerDict):  # each has a level of its own
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // devices)))
    with tempfile.TemporaryDirectory() as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=devices,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            shutdown_timeout=_STOPPING,
            logs_specs=DefaultLogsSpecs(folder, redirects=dict.fromkeys(range(1, devices), Std.ALL)),
        )
        try:
            elastic_launch(config, sys.executable)("-m", "snac_runner", *without(arguments, ["--devices"]))
        except SignalException:
            return 130
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            if failure.exitcode < 0:
                name = signal.Signals(-failure.exitcode).name
                print(f"error: process {rank} of {devices} was ended by {name}", file=sys.stderr)
                return 1
            if rank and (last := _last_line(Path(folder), rank)):
                print(last, file=sys.stderr)
            return failure.exitcode
    return 0


def without(arguments: Sequence[str], options: Collection[str] = _OF_CLUSTER) -> list[str]:
    """Arguments of the command line without some options, which take a value each."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if skip or argument.partition("=")[0] in options:
            skip = not skip and "=" not in argument
        else:
            kept.append(argument)
    return kept


def _last_line(folder: Path, rank: int) -> str:
    """The last line that a process wrote to stderr."""
    lines = [line for path in folder.rglob(f"{rank}/stderr.log") for line in path.read_text().splitlines() if line]
    return lines[-1] if lines else ""
