"""Conversion of folders and lists: which files, where to, and what is done already.

A finished conversion has a line in `conversions.jsonl` in the output folder, with a digest of its inputs. The same
command skips it and so continues after a stop. An output file with other inputs is never overwritten.
"""

from __future__ import annotations

import csv
import glob
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path

from snac_core.conditioning import Conditioning
from snac_core.errors import UserError
from snac_runner.convert import EMBEDDING_SUFFIXES, Converter
from snac_runner.data.corpus import digest_of
from snac_runner.data.media import AudioFormat, media_suffixes

JOURNAL = "conversions.jsonl"
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
        UserError: if a folder, pattern or list has no such file.
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
        raise UserError(f"{what} {name} has no audio among its {len(visible)} files; expected {', '.join(suffixes)}")
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
            raise UserError(f"--out {out} lies inside --source {name}; expected a folder outside of it")
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


def convert_all(jobs: Sequence[Job], converter: Converter, out: Path, audio_format: AudioFormat) -> Outcome:
    """Convert files one after the other; one that cannot be converted is named, and the others continue.

    Args:
        jobs: what to convert.
        converter: the trained run; its console displays progress and failures.
        out: the output folder, which also holds the journal.
        audio_format: of the files.
    """
    outcome, progress = Outcome(), converter.console.progress("converting")
    journal, writers = _read_journal(out / JOURNAL), dict[Path, Job]()
    target: tuple[tuple[Path, ...], Conditioning] | None = None
    for number, job in enumerate(jobs, 1):
        inputs = digest_of(
            [converter.digest, _state(job.source), [_state(file) for file in job.targets], asdict(audio_format)]
        )
        try:
            if (first := writers.setdefault(job.out, job)) is not job:
                raise UserError(f"{job.source} would be written to {job.out}, as {first.source} is; rename one of them")
            if not job.out.exists():
                if target is None or target[0] != job.targets:
                    target = job.targets, converter.target(job.targets)
                converter.convert(job.source, target[1], job.out, audio_format=audio_format)
                with (out / JOURNAL).open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps({"out": job.out.relative_to(out).as_posix(), "inputs": inputs}) + "\n")
                outcome.converted += 1
            elif journal.get(job.out.relative_to(out).as_posix()) == inputs:
                outcome.finished_before += 1
            else:
                raise UserError(
                    f"{job.out} exists and is not the conversion of {job.source} with this target, run and format; "
                    "remove it, or give another --out"
                )
        except (UserError, RuntimeError) as error:  # RuntimeError: e.g. not enough memory for a long file
            converter.console.warning(f"not converted: {' '.join(str(error).split())[:300]}")
            outcome.failed += 1
        progress(number, len(jobs), job.source.name)
    return outcome


def _read_journal(path: Path) -> dict[str, str]:
    """Output file to the digest of its inputs; a line that a stop has cut is ignored."""
    found: dict[str, str] = {}
    with suppress(OSError):
        for line in path.read_text(encoding="utf-8").splitlines():
            with suppress(ValueError, KeyError, TypeError):
                entry = json.loads(line)
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
