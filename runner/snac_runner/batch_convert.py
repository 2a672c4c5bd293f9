"""Conversion of folders and lists: which files, where to, and what is done already.

A conversion has a line in `conversions.jsonl` in the output folder, with a digest of its inputs. It is finished if its
file exists, which is written at once; the same command skips it and so continues after a stop. An output file with
other inputs is never overwritten.
"""

from __future__ import annotations

import csv
import glob
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import groupby, islice, takewhile
from pathlib import Path

import soundfile

from snac_core.codec.streaming import chunk_seconds
from snac_core.conditioning import Conditioning
from snac_core.errors import UserError
from snac_core.files import check_names, parse_json
from snac_runner.convert import EMBEDDING_SUFFIXES, Converter
from snac_runner.data.corpus import digest_of
from snac_runner.data.decode import AUDIO_SUFFIXES
from snac_runner.data.media import AudioFormat, media_suffixes

JOURNAL = "conversions.jsonl"
ROWS = 32  # short files that are converted together on a GPU
_COLUMNS = ("source", "target", "out")


@dataclass(frozen=True)
class Job:
    """One conversion: a source, the files of its target, and the file to write."""

    source: Path
    targets: tuple[Path, ...]
    out: Path


@dataclass
class Outcome:
    """What a batch did: numbers of files converted now, finished before, and failed."""

    converted: int = 0
    finished_before: int = 0
    failed: int = 0


def is_many(sources: Sequence[str]) -> bool:
    """Whether sources are more than one file: several, a folder, a pattern, or a .txt list."""
    path = Path(sources[0])
    pattern = not path.exists() and glob.has_magic(sources[0])
    return len(sources) > 1 or path.is_dir() or pattern or path.suffix.lower() == ".txt"


def files_of(name: str, suffixes: Sequence[str], what: str) -> list[tuple[Path, Path]]:
    """The files that a name stands for, sorted, each with the folder that its place in an output folder is relative to.

    Args:
        name: a file, a folder (everything below it), a pattern such as `dir/*.flac`, or a .txt list of files.
        suffixes: files that a folder or a pattern gives.
        what: "source" or "target", for messages.

    Raises:
        UserError: if a folder, pattern or list has no such file, or a name is not UTF-8.
    """
    path = Path(name)
    if path.is_dir():
        root, found = path, list(path.rglob("*"))
    elif not path.exists() and glob.has_magic(name):
        root = Path(*takewhile(lambda part: not glob.has_magic(part), path.parts))
        found = [Path(file) for file in glob.glob(name, recursive=True)]
    elif path.suffix.lower() == ".txt" and path.is_file():
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        listed = [path.parent / line for line in lines if line and not line.startswith("#")]
        if not listed:
            raise UserError(f"{what} list {name} is empty; expected the path of a file on every line")
        return [(file, file.parent) for file in listed]
    else:
        return [(path, path.parent)]
    visible = sorted(p for p in found if p.is_file() and not any(q.startswith(".") for q in p.relative_to(root).parts))
    usable = [file for file in visible if file.suffix.lower() in suffixes]
    if not usable:
        held = f"has no audio among its {len(visible)} files" if visible else "has no files"
        raise UserError(f"{what} {name} {held}; expected {', '.join(suffixes)}")
    check_names(usable, what)
    return [(file, root) for file in usable]


def target_files(names: Sequence[str]) -> tuple[Path, ...]:
    """The files of a target: speech, folders, patterns, lists, or embeddings."""
    suffixes = (*media_suffixes(), *EMBEDDING_SUFFIXES)
    return tuple(file for name in names for file, _ in files_of(name, suffixes, "target"))


def jobs_of_sources(sources: Sequence[str], targets: Sequence[str], out: Path, suffix: str) -> list[Job]:
    """Every source file to the same target, in the place below `out` that it has below its folder.

    Raises:
        UserError: if `out` is a file, is a source folder, or lies inside one.
    """
    _check_folder(out)
    for name in sources:
        folder = Path(name)
        if folder.is_dir() and out.resolve().is_relative_to(folder.resolve()):
            where = "is also --source" if out.resolve() == folder.resolve() else f"lies inside --source {name}"
            raise UserError(f"--out {out} {where}; expected a folder outside of it")
    aims = target_files(targets)
    found = [place for name in sources for place in files_of(name, media_suffixes(), "source")]
    return [Job(file, aims, out / file.relative_to(root).with_suffix(suffix)) for file, root in found]


def jobs_of_list(path: Path, out: Path, suffix: str) -> list[Job]:
    """The conversions of a list: a CSV file with the columns source, target and optionally out.

    Paths are relative to the list; several targets are separated by ";". `out` is relative to the output folder and is
    by default <source>_to_<target>.

    Raises:
        UserError: naming the line that is invalid, or if `out` is a file.
    """
    _check_folder(out)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            header = [str(name).strip() for name in rows.fieldnames or ()]
            if not {"source", "target"} <= set(header) or set(header) - set(_COLUMNS):
                raise UserError(f"{path} has columns {', '.join(header) or 'none'}; expected source,target[,out]")
            rows.fieldnames = header
            lines = [(rows.line_num, row) for row in rows]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not a CSV file with the columns source,target: {error}") from error
    if not lines:
        raise UserError(f"{path} has no conversions; expected a line for each below the columns")
    return [_job_of_row(row, f"{path}, line {number}", path.parent, out, suffix) for number, row in lines]


def _job_of_row(row: dict[str, str], where: str, root: Path, out: Path, suffix: str) -> Job:
    cells = {key: (row.get(key) or "").strip() for key in _COLUMNS}
    if not cells["source"] or not cells["target"]:
        raise UserError(f"{where}: source is {cells['source']!r} and target {cells['target']!r}; expected both")
    source = root / cells["source"]
    targets = tuple(str(root / name.strip()) for name in cells["target"].split(";") if name.strip())
    name = cells["out"] or f"{source.stem}_to_{Path(targets[0]).stem}{suffix}"
    if not (out / name).resolve().is_relative_to(out.resolve()):
        raise UserError(f"{where}: out {name!r} lies outside of the output folder {out}")
    return Job(source, target_files(targets), (out / name).with_suffix(suffix))


def convert_all(
    jobs: Sequence[Job], converter: Converter, out: Path, audio_format: AudioFormat, rows: int | None = None
) -> Outcome:
    """Convert files; one that cannot be converted is named, and the others continue.

    Args:
        jobs: what to convert.
        converter: the trained run; its console displays progress and failures.
        out: the output folder, which also holds the journal.
        audio_format: of the files.
        rows: short files of the same target that are converted together, in order of their length; None: `ROWS` on a
            GPU, and 1 on a CPU, where it is not faster.
    """
    batch, progress = _Batch(converter, out, audio_format), converter.console.progress("converting")
    done, rows = 0, rows or (1 if converter.device.type == "cpu" else ROWS)
    for group in _groups(jobs, rows, chunk_seconds(converter.model.codec)):
        if pending := [job for job in group if batch.is_pending(job)]:
            batch.convert(pending)
        done += len(group)
        progress(done, len(jobs), group[-1].source.name)
    return batch.outcome


def _groups(jobs: Sequence[Job], rows: int, longest: float) -> Iterator[Sequence[Job]]:
    """Up to `rows` jobs with the same target and sources of like length; one job if it is longer than `longest` s."""
    if rows == 1:
        yield from ([job] for job in jobs)
        return
    seconds = {job: _seconds(job.source) for job in jobs}
    yield from ([job] for job in jobs if seconds[job] > longest)
    short = sorted((job for job in jobs if seconds[job] <= longest), key=lambda job: (job.targets, seconds[job]))
    for _, same in groupby(short, key=lambda job: job.targets):
        while group := list(islice(same, rows)):
            yield group


def _seconds(path: Path) -> float:
    """Length of a file that libsndfile decodes; else infinite."""
    try:
        return float(soundfile.info(str(path)).duration) if path.suffix.lower() in AUDIO_SUFFIXES else math.inf
    except (OSError, soundfile.SoundFileError):
        return math.inf


class _Batch:
    """The state of `convert_all`; see there for the arguments."""

    def __init__(self, converter: Converter, out: Path, audio_format: AudioFormat) -> None:
        self.converter, self.out, self.audio_format = converter, out, audio_format
        self.outcome = Outcome()
        self._journal, self._writers = _read_journal(out / JOURNAL), dict[Path, Job]()
        self._target: tuple[tuple[Path, ...], Conditioning] | None = None

    def is_pending(self, job: Job) -> bool:
        """Whether a job is to be converted: it is not finished, and its output is no other file."""
        try:
            if (first := self._writers.setdefault(job.out, job)) is not job:
                raise UserError(f"{job.source} would be written to {job.out}, as {first.source} is; rename one of them")
            if job.out.exists() and self._journal.get(self._name(job)) != self._inputs(job):
                raise UserError(
                    f"{job.out} exists and is not the conversion of {job.source} with this target, run and format; "
                    "remove it, or give another --out"
                )
        except UserError as error:
            self._failed(error)
            return False
        self.outcome.finished_before += job.out.exists()
        return not job.out.exists()

    def convert(self, jobs: Sequence[Job]) -> None:
        """Convert jobs with the same target together; one after the other if that is not possible."""
        self.out.mkdir(parents=True, exist_ok=True)
        with (self.out / JOURNAL).open("a", encoding="utf-8") as lines:  # before the files: a stop comes at any time
            for job in jobs:
                record = json.dumps({"out": self._name(job), "inputs": self._inputs(job)})
                lines.write(f"\n{record}")  # a line that a full disk has cut stays apart from the next one
        try:
            target = self._target_of(jobs[0].targets)
            if len(jobs) > 1:
                sources, outs = [job.source for job in jobs], [job.out for job in jobs]
                self.converter.convert_together(sources, target, outs, self.audio_format)
            else:
                self.converter.convert(jobs[0].source, target, jobs[0].out, audio_format=self.audio_format)
        except (UserError, RuntimeError) as error:  # RuntimeError: e.g. not enough memory for a long file
            if len(jobs) == 1:
                self._failed(error)
                return
        else:
            self.outcome.converted += len(jobs)
            return
        for job in jobs:  # after the block: the error holds the memory of the batch
            self.convert([job])

    def _target_of(self, files: tuple[Path, ...]) -> Conditioning:
        if self._target is None or self._target[0] != files:
            self._target = files, self.converter.target(files)
        return self._target[1]

    def _failed(self, error: Exception) -> None:
        self.converter.console.warning(f"not converted: {' '.join(str(error).split())[:300]}")
        self.outcome.failed += 1

    def _name(self, job: Job) -> str:
        return job.out.relative_to(self.out).as_posix()

    def _inputs(self, job: Job) -> str:
        """Digest of all that the conversion depends on."""
        states = [_state(job.source), [_state(file) for file in job.targets]]
        return digest_of([self.converter.digest, *states, asdict(self.audio_format)])


def _read_journal(path: Path) -> dict[str, str]:
    """Output file to the digest of its inputs; a line that a stop has cut is ignored."""
    found: dict[str, str] = {}
    with suppress(OSError):
        for line in path.read_text(encoding="utf-8").splitlines():
            with suppress(ValueError, KeyError, TypeError):
                entry = parse_json(line)
                found[str(entry["out"])] = str(entry["inputs"])
    return found


def _state(path: Path) -> list[str | int]:
    """Identifies the content of a file without reading it: name, size in bytes and time of its last change."""
    try:
        state = path.stat()
    except OSError:
        return [str(path.absolute())]
    return [str(path.absolute()), state.st_size, state.st_mtime_ns]


def _check_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; expected a folder for the conversions of several files")
