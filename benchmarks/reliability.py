"""Reliability campaign: commands that are killed, or meet a full disk or a failing file system, and are run again.

After each disturbance, what was finished must be there unchanged, and after the same command has run again, the folder
must equal that of an undisturbed run bit for bit, times aside. The campaign also runs commands with bad input, and
reads generated and damaged files.

Example: python benchmarks/reliability.py --kills 100
"""

from __future__ import annotations

import errno
import importlib.util
import inspect
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch; a process with one thread can be forked

import torch
import typer
from bad_inputs import refused
from fuzzing import CHECKS, fuzzed
from processes import LONGEST, Process, Work, at_operation, changes_a_file, cpu_seconds, kill, start, tree
from run_contents import complaint, contents, differences, digest, finished

import snac_runner.bank_build
import snac_runner.report.page
import snac_runner.study  # noqa: F401  what commands import, once for all forked processes
from snac_core.codec import SNAC
from snac_core.plugins import discover
from snac_runner.cli.train import ablate, adapters
from snac_runner.data.synth import synthesize

TINY: dict[str, Any] = {
    "sampling_rate": 16000, "encoder_dim": 4, "encoder_rates": [4, 4, 4], "decoder_dim": 32, "decoder_rates": [4, 4, 4],
    "attn_window_size": None, "codebook_size": 64, "codebook_dim": 4, "vq_strides": [2, 1],
}  # fmt: skip
SETTINGS: dict[str, Any] = {
    "batch_size": 2, "crop_seconds": 0.4, "dev_pairs": 2, "test_pairs": 2, "pair_seconds": 1.0, "samples": 1,
    "eval_every": 2, "lr": 0.01, "shuffled_control": False, "exclude_metrics": [
        "dnsmos", "dnsmos_identity", "distillmos", "distillmos_identity", "pesq", "per", "per_above_half",
        "f0_correlation", "f0_error", "f0_rmse", "voicing_error",
    ],
}  # fmt: skip
AGAIN = 0.3  # probability that the second run is killed, too


@dataclass
class Reference:
    """An undisturbed run: what it writes, its CPU time in s, and its number of file operations."""

    contents: dict[str, str]
    seconds: float
    operations: int


@dataclass
class Row:
    """One line of the table."""

    what: str
    cases: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        found = ", ".join(f"{count} {outcome}" for outcome, count in self.outcomes.most_common())
        return f"| {self.what} | {self.cases} | {found} | {len(self.faults)} |"


class Campaign:
    """Disturbs commands on a small study in `folder`.

    Args:
        folder: for all files.
        seed: of all random choices.
        echo: prints what happens.
    """

    def __init__(self, folder: Path, seed: int, echo: Callable[[str], None]) -> None:
        self.folder, self.seed, self.echo = folder, seed, echo
        os.environ["SNAC_CACHE"] = str(folder / "cache")
        torch.manual_seed(0)
        SNAC(**TINY).save_pretrained(folder / "base")
        self.speech = synthesize(folder / "speech", 8, 4)
        self.references: dict[str, Reference] = {}
        names = adapters(discover())
        options = ["--data", str(self.speech), "--base", str(folder / "base"), "--judge", "ge2e"]
        options += ["--speaker-encoder", "simple", "--device", "cpu", "--steps", "5", "--save-every", "2"]
        self.options = [
            *options,
            *(part for key, v in SETTINGS.items() for part in ("--set", f"{key}={json.dumps(v)}")),
        ]
        study = ["ablate", "--strategies", f"{names[0]},{names[-1]}"]
        self.train = Work("train", 0.2, lambda out: self._train(names[-1], out))
        self.ablate = Work("ablate", 0.24, lambda out: [*study, *self.options, "--out", str(out)])
        self.study = folder / "reference" / "ablate"
        index = ["index", "build", "--data", str(self.speech), "--encoder", "simple"]
        self.index = Work("index build", 0.12, lambda out: [*index, "--workers", "1", "--out", str(out)])
        self.report = Work("report", 0.1, lambda out: ["report", str(out)], begin=self.study)
        self.convert = Work("convert, a folder", 0.14, lambda out: self._convert(out))
        more = (
            Work("ablate --devices 2", 0.08, lambda out: [*self.ablate.command(out), "--devices", "2"],
                 fresh=True, several=True),
            Work("index build, 2 processes", 0.04, lambda out: [*index, "--workers", "2", "--out", str(out)],
                 fresh=True, several=True),
        )  # fmt: skip
        self.alone = (self.index, self.report, self.convert, self.train, self.ablate)
        self.works = [*self.alone, *more]
        if "cluster" in inspect.signature(ablate).parameters and importlib.util.find_spec("ray"):
            os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")  # else Ray ends processes on a full machine
            cluster = ["--cluster", "local"]
            self.works.append(
                Work("ablate on Ray", 0.08, lambda out: [*self.ablate.command(out), *cluster], fresh=True, several=True)
            )

    def _train(self, name: str, out: Path) -> list[str]:
        if (out / "config.json").is_file():
            return ["train", "--resume", str(out)]
        return ["train", "--strategy", name, *self.options, "--out", str(out)]

    def _convert(self, out: Path) -> list[str]:
        run = next(path.parent for path in sorted(self.study.rglob("checkpoint")))
        target = sorted((self.speech / "train").rglob("*.flac"))[0]
        given = ["--run", str(run), "--source", str(self.speech / "test"), "--target", str(target)]
        return ["convert", *given, "--device", "cpu", "--out", str(out)]

    def reference(self, work: Work) -> Reference:
        """The undisturbed run of a command."""
        if work.name not in self.references:
            if work in (self.report, self.convert):
                self.reference(self.ablate)
            out = self.folder / "reference" / work.name
            out.parent.mkdir(exist_ok=True)
            if work.begin:
                shutil.copytree(work.begin, out)
            counted = out.with_suffix(".count")
            process = start(work, out, lambda: _count_operations(counted))
            until, seconds = time.monotonic() + LONGEST, 0.0
            while (code := process.ended()) is None and time.monotonic() < until:
                seconds = max(seconds, cpu_seconds(self._processes(work, process)))
                time.sleep(0.02)
            assert code == 0, f"{work.name} without disturbance ends with {code}: {process.said()}"
            operations = counted.stat().st_size if counted.is_file() else 0
            self.references[work.name] = Reference(contents(out), seconds, operations)
            self.echo(f"{work.name}: {seconds:.1f} CPU s, {operations} file operations, {len(contents(out))} files")
        return self.references[work.name]

    @staticmethod
    def _processes(work: Work, process: Process) -> list[int]:
        """The processes of a command, without looking for others where there is one only."""
        return tree(process.pid) if work.several else [process.pid]

    def kills(self, count: int, only: Sequence[str] = ()) -> Iterator[Row]:
        """Kill each command, or those of these names, at random moments of CPU time, and at random file operations."""
        works = [work for work in self.works if not only or work.name in only]
        total = sum(work.share for work in works)
        shares = [count * work.share / total for work in works]
        numbers = [round(sum(shares[: i + 1])) - round(sum(shares[:i])) for i in range(len(shares))]
        for work, number in zip(works, numbers, strict=True):
            row = Row(f"kill -9 of {work.name}")
            for case in range(number):
                self._disturbed(row, work, case, self._killed)
            yield row

    def _disturbed(self, row: Row, work: Work, case: int, disturb: Callable[..., str | None]) -> None:
        """One case: disturb a command, check what is finished, run it again, and compare with the undisturbed run."""
        reference, draw = self.reference(work), random.Random(f"{self.seed} {row.what} {case}")
        out = self.folder / "case" / re.sub(r"\W+", "_", f"{row.what}_{case}")
        out.parent.mkdir(exist_ok=True)
        if work.begin:
            shutil.copytree(work.begin, out)
        faults, before = [], finished(out)
        try:
            while True:
                outcome = disturb(work, reference, out, draw)
                row.cases += 1
                row.outcomes[outcome or "ended before"] += 1
                after = finished(out)
                faults += [f"{name} was lost or changed" for name, state in before.items() if after.get(name) != state]
                before = after
                if work.begin is None and "result.json" not in (set(before)):
                    faults += [f"{name} is not whole" for name in _unlike(out, reference, before)]
                if draw.random() >= AGAIN:
                    break
            process = start(work, out)
            if (code := process.wait()) != 0:
                faults.append(f"run again, it ends with {code}: {' '.join(process.said().split())[-300:]}")
            after = finished(out)
            faults += [f"{name} was lost or changed" for name, state in before.items() if after.get(name) != state]
            faults += differences(contents(out), reference.contents)
        except (RuntimeError, OSError, ValueError) as error:
            faults.append(f"{type(error).__name__}: {error}")
        if faults:
            row.faults.append(f"{row.what}, case {case}: {'; '.join(faults[:4])}")
            self.echo(row.faults[-1])
        else:
            shutil.rmtree(out, ignore_errors=True)

    def _killed(self, work: Work, reference: Reference, out: Path, draw: random.Random) -> str | None:
        """Start a command and kill it; how it was killed, or None if it ended before."""
        if not work.fresh and draw.random() < 0.5:
            number = draw.randint(1, reference.operations)
            process = start(work, out, at_operation(number, lambda _: os.kill(os.getpid(), signal.SIGKILL)))
            return "at a file operation" if process.wait() == -signal.SIGKILL else None
        process, moment = start(work, out), draw.random() * reference.seconds
        one = draw.choice(["all", "the first", "another"]) if work.several else "all"
        while process.ended() is None:
            pids = self._processes(work, process)
            if cpu_seconds(pids) >= moment and (one != "another" or len(pids) > 1):
                kill({"all": pids, "the first": pids[:1], "another": [draw.choice(pids[1:] or pids)]}[one])
                break
            time.sleep(0.02)
        else:
            return None
        code = process.wait()
        for pid in pids:  # what was not killed ends by itself
            until = time.monotonic() + LONGEST
            while Path(f"/proc/{pid}").exists() and pid in tree(1) and time.monotonic() < until:
                time.sleep(0.05)
        if one == "another" and "Traceback" in process.said():
            raise RuntimeError(f"a killed process gives a traceback, exit code {code}: {process.said()[-300:]}")
        return f"{one} of its processes" if work.several else "at a moment"

    # ---------------------------------------------------------------------------- full disks, failing file systems

    def disk(self, count: int) -> Iterator[Row]:
        """Each command meets a full disk, and a rename or a new file that fails, `count` times each."""
        errors = {
            "a disk that is full at a new file": (errno.ENOSPC, None),
            "a rename that fails (network file system)": (errno.ESTALE, {"os.rename"}),
            "a rename that is refused (network file system)": (errno.EBUSY, {"os.rename"}),
        }
        for what, (number, kinds) in errors.items():
            row = Row(what)
            for work in self.alone:
                for case in range(count):
                    row.what = f"{what}: {work.name}"  # the name of the case
                    self._disturbed(row, work, case, self._failing(number, kinds))
            row.what = what
            yield row
        row = Row("a file that cannot grow (limit on the size of files)")
        for work in self.alone:
            for case in range(count):
                row.what = f"a file that cannot grow: {work.name}"
                self._disturbed(row, work, case, self._limited)
        row.what = "a file that cannot grow (limit on the size of files)"
        yield row
        if (full := self._full_file_system(count)) is not None:
            yield full

    def _failing(self, number: int, kinds: set[str] | None) -> Callable[..., str | None]:
        """A disturbance: one of the file operations of these kinds fails with the error of this number."""

        def fail(_: str) -> None:
            raise OSError(number, os.strerror(number))

        def disturb(work: Work, reference: Reference, out: Path, draw: random.Random) -> str | None:
            operations = reference.operations // (4 if kinds else 1)
            return self._sentence(start(work, out, at_operation(draw.randint(1, operations), fail, kinds)))

        return disturb

    def _limited(self, work: Work, _: Reference, out: Path, draw: random.Random) -> str | None:
        size = round(2 ** draw.uniform(4, 21))

        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

        log = start(work, out, limit)  # its log is limited, too
        code = log.wait()
        return self._sentence(log, code, cut=size < 4096)

    @staticmethod
    def _sentence(process: Process, code: int | None = None, *, cut: bool = False) -> str | None:
        """How a command ended that met an error of the system: with success, or a sentence."""
        code = process.wait() if code is None else code
        if code == 0:
            return "without effect"
        wrong = complaint(code, process.said())
        if wrong and not (cut and code == 2 and "Traceback" not in process.said()):
            raise RuntimeError(wrong)
        return "ended in a sentence"

    def _full_file_system(self, count: int) -> Row | None:
        """Commands on a file system in memory that becomes full; None where none can be mounted."""
        place = self.folder / "small"
        place.mkdir()
        row = Row("a full file system (tmpfs)")
        for work in self.alone:
            size = sum(path.stat().st_size for path in (self.folder / "reference" / work.name).rglob("*"))
            for case in range(count):
                draw = random.Random(f"{self.seed} tmpfs {work.name} {case}")
                small = size if work.begin else 0
                option = f"size={small + round(draw.uniform(0.05, 0.95) * size)}"
                if subprocess.run(
                    ["mount", "-t", "tmpfs", "-o", option, "tmpfs", place], capture_output=True
                ).returncode:
                    return None
                try:
                    self._grown(row, work, place)
                except (RuntimeError, OSError, ValueError) as error:
                    row.faults.append(f"tmpfs, {option}, {work.name}, case {case}: {error}")
                    self.echo(row.faults[-1])
                finally:
                    subprocess.run(["umount", place], check=True)
        return row

    def _grown(self, row: Row, work: Work, place: Path) -> None:
        """Run a command on a small file system, enlarge it, and run the command again."""
        reference, out = self.reference(work), place / "out"
        log = self.folder / "case" / f"tmpfs_{row.cases}"
        log.parent.mkdir(exist_ok=True)
        if work.begin:
            shutil.copytree(work.begin, out)
        moved = Work(work.name, 0, lambda _: work.command(out))
        row.cases += 1
        row.outcomes[self._sentence(start(moved, log)) or ""] += 1
        subprocess.run(["mount", "-o", "remount,size=64m", place], check=True)
        process = start(moved, log)
        if (code := process.wait()) != 0:
            raise RuntimeError(f"run again, it ends with {code}: {process.said()[-300:]}")
        if wrong := differences(contents(out), reference.contents):
            raise RuntimeError("; ".join(wrong[:4]))

    def at_once(self, count: int) -> Row:
        """Two `ablate` commands on one study folder: one runs, the other ends in a sentence."""
        row, reference = Row("two ablate commands on one folder at once"), self.reference(self.ablate)
        for case in range(count):
            out = self.folder / "case" / f"at_once_{case}"
            out.parent.mkdir(exist_ok=True)
            draw = random.Random(f"{self.seed} at once {case}")
            first = start(self.ablate, out)
            time.sleep(draw.random() * 2)
            second = start(Work("", 0, _fixed(self.ablate.command(out))), out.with_name(f"second_{case}"))
            ends = [(process.wait(), process.said()) for process in (first, second)]
            row.cases += 1
            wrong = [found for code, said in ends if code and (found := complaint(code, said))]
            refusals = sum(code == 2 for code, _ in ends)
            row.outcomes["one runs, one is refused" if refusals == 1 else f"{refusals} refused"] += 1
            wrong += [] if refusals < 2 else ["both were refused"]
            wrong += differences(contents(out), reference.contents)
            if wrong:
                row.faults.append(f"at once, case {case}: {'; '.join(wrong[:4])}")
                self.echo(row.faults[-1])
        return row

    def bad_inputs(self, processes: int) -> Row:
        """Commands with bad input; the first `processes` of them also as real processes."""
        self.reference(self.ablate)
        cases = refused(self.folder, self.study, self.speech, self.options, adapters(discover()))
        row = Row(f"bad inputs, of {len({arguments[0] for _, arguments in cases})} commands")
        for number, (name, arguments) in enumerate(cases):
            for fresh in (False, True)[: 2 if number < processes else 1]:
                work = Work(name, 0, _fixed(arguments), fresh=fresh)
                out = self.folder / "bad" / f"{number}"
                out.parent.mkdir(exist_ok=True)
                process = start(work, out)
                row.cases += 1
                if wrong := complaint(process.wait(), process.said()):
                    row.faults.append(f"{name}: {wrong}")
                    self.echo(row.faults[-1])
                else:
                    row.outcomes["in a process of its own" if fresh else "a sentence, exit code 2"] += 1
        return row

    def fuzz(self, examples: int) -> Iterator[Row]:
        """Generated and damaged files of every kind, read as commands read them."""
        self.reference(self.ablate)
        self.reference(self.index)
        for name in CHECKS:
            row = Row(f"generated: {name}")
            row.cases, row.outcomes, row.faults = fuzzed(
                name, self.folder, examples, self.seed, study=self.study, bank=self.study.with_name("index build")
            )
            for fault in row.faults:
                self.echo(fault)
            yield row


def _fixed(arguments: Sequence[str]) -> Callable[[Path], list[str]]:
    """A command that writes into its own folder."""
    return lambda _: list(arguments)


def _count_operations(counted: Path) -> None:
    """A hook that writes a byte for each file operation."""
    handle = os.open(counted, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    sys.addaudithook(lambda *event: os.write(handle, b".") and None if changes_a_file(*event) else None)


def _unlike(out: Path, reference: Reference, names: Sequence[str] | dict[str, Any]) -> list[str]:
    """Those of some files in `out` that differ from the undisturbed run."""
    return [name for name in names if (out / name).is_file() and digest(out / name) != reference.contents.get(name, "")]


SECTIONS = ("kills", "bad", "fuzz", "disk")


def main(
    section: Annotated[
        list[str] | None, typer.Argument(help=f"Parts to run: {', '.join(SECTIONS)}; default: all.")
    ] = None,
    kills: Annotated[int, typer.Option(min=1, help="Number of kills.")] = 100,
    only: Annotated[list[str] | None, typer.Option(help="Kill only this command, such as train; repeatable.")] = None,
    examples: Annotated[int, typer.Option(min=1, help="Generated files of each kind.")] = 300,
    failures: Annotated[int, typer.Option(min=1, help="Failures of the disk of each kind, for each command.")] = 4,
    processes: Annotated[int, typer.Option(min=0, help="Bad inputs that are also tried in own processes.")] = 4,
    seed: Annotated[int, typer.Option(help="Of all random choices.")] = 0,
    folder: Annotated[
        Path | None, typer.Option(help="New folder for all files, which is kept; default: a temporary one.")
    ] = None,
) -> None:
    """Print the table, and every fault; ends with exit code 1 if there is one."""
    if unknown := set(section or ()) - set(SECTIONS):
        raise typer.BadParameter(f"unknown part {unknown.pop()!r}; expected {', '.join(SECTIONS)}")
    parts, rows = section or SECTIONS, []
    with TemporaryDirectory() if folder is None else nullcontext(folder) as place:
        campaign = Campaign(Path(place), seed, lambda text: print(text, file=sys.stderr, flush=True))
        if "kills" in parts:
            rows += list(campaign.kills(kills, only or ()))
        if "bad" in parts:
            rows.append(campaign.bad_inputs(processes))
        if "fuzz" in parts:
            rows += list(campaign.fuzz(examples))
        if "disk" in parts:
            rows += [*campaign.disk(failures), campaign.at_once(failures)]
    print("| disturbance | cases | outcomes | faults |\n|---|---|---|---|")
    for row in rows:
        print(row)
    if faults := [fault for row in rows for fault in row.faults]:
        print("", *faults, sep="\n")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
