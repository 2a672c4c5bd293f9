"""The utterances of a split, stored by column: compact in memory, and memory-mapped when they are read from a file."""

from __future__ import annotations

import json
from abc import abstractmethod
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, overload

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from snac_core.errors import UserError
from snac_core.files import writing

Columns = Mapping[str, NDArray[Any]]
T = TypeVar("T")


@dataclass(frozen=True)
class Utterance:
    """One utterance: a file, or a segment of a file, with speech of one speaker.

    Attributes:
        id: unique within the corpus: the path below the root without suffix, e.g. "dev/367/367-130732-0002".
        path: the audio file.
        speaker: the speaker's name.
        seconds: length, in s.
        sample_rate: of the file, in Hz.
        start: where the utterance begins in the file, in s.
        text: the transcript, if known.
        sex: "F" or "M", if known.
        digest: sha256 of the bytes of the file.
        level: RMS re full scale, of the average of the channels; 0 if it is not known.
    """

    id: str
    path: Path
    speaker: str
    seconds: float
    sample_rate: int
    start: float = 0.0
    text: str | None = None
    sex: str | None = None
    digest: str = ""
    level: float = 0.0


class Segment(NamedTuple):
    """A segment of an utterance: the utterance's id, the start (in s from the utterance's start), the length in s."""

    utterance: str
    start: float
    seconds: float

    def overlaps(self, other: Segment) -> bool:
        """Whether both segments contain a common part of the same utterance."""
        return (
            self.utterance == other.utterance
            and self.start < other.start + other.seconds
            and other.start < self.start + self.seconds
        )


class Rows(Sequence[T]):
    """A sequence of which each item is made when it is asked for; a slice is a list. Subclasses define `at`."""

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: int | slice) -> T | Sequence[T]:
        if isinstance(index, slice):
            return [self.at(row) for row in range(*index.indices(len(self)))]
        row = index + len(self) if index < 0 else index
        if not 0 <= row < len(self):
            raise IndexError(index)
        return self.at(row)

    @abstractmethod
    def at(self, row: int) -> T:
        """The item of a row, from 0 to below the length."""


class Packed(Rows[T]):
    """A list that stores each item as text: a fraction of the memory of small objects, for millions of them.

    Args:
        of: a dataclass with fields of text, numbers and None.
    """

    def __init__(self, of: Callable[..., T]) -> None:
        self._of = of
        self._ends, self._data = array("q"), bytearray()

    def __len__(self) -> int:
        return len(self._ends)

    def append(self, item: T) -> None:
        """Add an item."""
        values = [getattr(item, field.name) for field in fields(item)]  # type: ignore[arg-type]  # a dataclass
        self._data += json.dumps(values, separators=(",", ":")).encode()
        self._ends.append(len(self._data))

    def extend(self, items: Iterable[T]) -> None:
        """Add items."""
        for item in items:
            self.append(item)

    def at(self, row: int) -> T:
        return self._of(*json.loads(self._data[self._ends[row - 1] if row else 0 : self._ends[row]]))


class _Texts(Rows[str]):
    """Texts in one array of bytes: text i is `data[ends[i - 1] : ends[i]]`, in UTF-8."""

    def __init__(self, ends: NDArray[np.int64], data: NDArray[np.uint8]) -> None:
        self.ends, self.data = ends, data

    def __len__(self) -> int:
        return len(self.ends)

    def at(self, row: int) -> str:
        first = int(self.ends[row - 1]) if row else 0
        return self.data[first : int(self.ends[row])].tobytes().decode("utf-8", "surrogateescape")


class _TextWriter:
    """Collects texts for `_Texts`."""

    def __init__(self) -> None:
        self.ends, self.data = array("q"), bytearray()

    def add(self, text: str) -> None:
        self.data += text.encode("utf-8", "surrogateescape")  # names of files need not be UTF-8
        self.ends.append(len(self.data))


_TEXTS = ("id", "path", "text", "digest")
_NUMBERS = {"speaker": "i", "seconds": "d", "start": "d", "sample_rate": "i", "level": "f", "sex": "b"}
_SEXES = (None, "F", "M")


class StoredColumns(NamedTuple):
    """Where columns are stored: the file, the split in it, and the digest of its corpus."""

    path: Path
    split: str
    digest: str


class Utterances(Rows[Utterance]):
    """The utterances of a split, sorted by id. An `Utterance` is made when it is asked for.

    Pickled, they are the name of the file of the columns, where there is one: another process maps it too.

    Args:
        columns: as `columns_of` makes them.
        root: the folder that relative paths begin at.
        file: where the columns are memory-mapped from; None: they are in memory.
    """

    def __init__(self, columns: Columns, root: Path, file: StoredColumns | None = None) -> None:
        self.columns = columns
        self.root = root
        self.file = file
        self._ids, self._paths, self._texts, self._digests = (
            _Texts(columns[f"{name}.ends"], columns[f"{name}.data"]) for name in _TEXTS
        )
        names = _Texts(columns["speakers.ends"], columns["speakers.data"])
        self.speakers: list[str] = list(names)
        """Names, sorted."""
        self.seconds: NDArray[np.float64] = columns["seconds"]
        """Lengths (N,), in s."""

    @classmethod
    def of(cls, utterances: Iterable[Utterance], root: Path) -> Utterances:
        """The columns of these utterances, which are sorted by id."""
        return cls(columns_of(utterances, root), root)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_reopened, (self.file, self.root)) if self.file else (Utterances, (dict(self.columns), self.root))

    def __len__(self) -> int:
        return len(self.seconds)

    def at(self, row: int) -> Utterance:
        columns = self.columns
        return Utterance(
            id=self._ids[row],
            path=self.root / self._paths[row],
            speaker=self.speakers[columns["speaker"][row]],
            seconds=float(columns["seconds"][row]),
            sample_rate=int(columns["sample_rate"][row]),
            start=float(columns["start"][row]),
            text=self._texts[row] or None,
            sex=_SEXES[columns["sex"][row]],
            digest=self._digests[row],
            level=float(columns["level"][row]),
        )

    def find(self, id: str) -> Utterance | None:
        """The utterance with this id, or None."""
        row = bisect_left(self._ids, id)
        return self[row] if row < len(self) and self._ids[row] == id else None

    def ids(self) -> Iterator[str]:
        """The ids, in order."""
        return iter(self._ids)

    def digests(self) -> Iterator[str]:
        """The sha256 of their files, in order."""
        return iter(self._digests)

    def paths(self) -> Iterator[str]:
        """The paths, relative to the root where they are below it."""
        return iter(self._paths)

    def rows_of(self, speaker: str) -> NDArray[np.int64]:
        """Rows of a speaker's utterances, in order; empty for an unknown speaker."""
        code = bisect_left(self.speakers, speaker)
        if code == len(self.speakers) or self.speakers[code] != speaker:
            return np.empty(0, dtype=np.int64)
        return self._by_speaker[self._begins[code] : self._begins[code + 1]]

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        """Number of utterances of each speaker (P,)."""
        return np.diff(self._begins)

    @cached_property
    def is_parallel(self) -> bool:
        """Whether two speakers say the same text."""
        speaker_of: dict[str, int] = {}
        return any(
            text and speaker_of.setdefault(text, speaker) != speaker
            for text, speaker in zip(self._texts, self.columns["speaker"].tolist(), strict=True)
        )

    @cached_property
    def _by_speaker(self) -> NDArray[np.int64]:
        return np.argsort(self.columns["speaker"], kind="stable")

    @cached_property
    def _begins(self) -> NDArray[np.int64]:
        counts = np.bincount(self.columns["speaker"], minlength=len(self.speakers))
        return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def _reopened(file: StoredColumns, root: Path) -> Utterances:
    """The utterances that another process has stored.

    Raises:
        UserError: if their file was replaced since.
    """
    try:
        columns, about = stored(file.path)
        if about["digest"] == file.digest:
            return Utterances(columns[file.split], root, file)
    except (OSError, ValueError, KeyError):
        pass
    raise UserError(f"the speech in {root} was scanned again by another command; run the same command to continue")


def columns_of(utterances: Iterable[Utterance], root: Path) -> dict[str, NDArray[Any]]:
    """The columns of utterances that are sorted by id.

    Texts are `<name>.ends` (N,) int64 and `<name>.data` uint8; numbers are `<name>` (N,); `speakers` are the names,
    sorted, and `speaker` is an index into them. Paths below `root` are stored relative to it.
    """
    prefix = f"{root}/"
    texts = {name: _TextWriter() for name in _TEXTS}
    numbers = {name: array(kind) for name, kind in _NUMBERS.items()}
    codes: dict[str, int] = {}
    for u in utterances:
        texts["id"].add(u.id)
        texts["path"].add(u.path.as_posix().removeprefix(prefix))
        texts["text"].add(u.text or "")
        texts["digest"].add(u.digest)
        numbers["speaker"].append(codes.setdefault(u.speaker, len(codes)))
        numbers["sex"].append(_SEXES.index(u.sex))
        for name in ("seconds", "start", "sample_rate", "level"):
            numbers[name].append(getattr(u, name))
    speakers = sorted(codes)
    texts["speakers"] = _TextWriter()
    for name in speakers:
        texts["speakers"].add(name)
    columns: dict[str, NDArray[Any]] = {name: np.array(values) for name, values in numbers.items()}
    place = np.empty(len(speakers), dtype=np.int32)
    place[[codes[name] for name in speakers]] = np.arange(len(speakers), dtype=np.int32)
    columns["speaker"] = place[columns["speaker"].astype(np.int64)]
    for name, writer in texts.items():
        columns[f"{name}.ends"] = np.frombuffer(writer.ends, dtype=np.int64)
        columns[f"{name}.data"] = np.frombuffer(writer.data, dtype=np.uint8)
    return columns


def store(path: Path, splits: Mapping[str, Utterances], about: Mapping[str, Any]) -> None:
    """Write the utterances of each split, and JSON about them, as one safetensors file, atomically."""
    arrays = {f"{split}/{name}": values for split, part in splits.items() for name, values in part.columns.items()}
    with writing(path) as temporary:
        save_file(
            {name: np.ascontiguousarray(a) for name, a in arrays.items()}, temporary, {"about": json.dumps(about)}
        )


def stored(path: Path) -> tuple[dict[str, dict[str, NDArray[Any]]], dict[str, Any]]:
    """What `store` wrote: the columns of each split, memory-mapped, and what is about them.

    Raises:
        OSError, ValueError, KeyError: if there is no such file, or it is damaged.
    """
    data = np.memmap(path, dtype=np.uint8, mode="r")
    size = int.from_bytes(data[:8].tobytes(), "little")  # https://huggingface.co/docs/safetensors: length, JSON, data
    header = json.loads(data[8 : 8 + size].tobytes())
    about = json.loads(header.pop("__metadata__")["about"])
    splits: dict[str, dict[str, NDArray[Any]]] = {}
    for name, entry in header.items():
        split, _, column = name.partition("/")
        first, end = (8 + size + offset for offset in entry["data_offsets"])
        if end > len(data):
            raise ValueError(f"{path} is truncated")
        kind = {"U8": "u1", "I8": "i1", "I32": "<i4", "I64": "<i8", "F32": "<f4", "F64": "<f8"}[entry["dtype"]]
        splits.setdefault(split, {})[column] = data[first:end].view(kind)
    return splits, about
