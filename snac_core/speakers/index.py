"""FAISS indexes of banks, and choices among the utterances of a bank: random ones, and near ones by index search."""

from __future__ import annotations

import hashlib
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter
from torch import Tensor

from snac_core.errors import UserError
from snac_core.files import parse_json, write_json, writing
from snac_core.seeding import derive
from snac_core.speakers.bank import Bank
from snac_core.speakers.sampling import Candidates, SpeakerTable

HEADER = "index.json"
FORMAT = 1
FLAT_UP_TO = 15_000
"""Largest number of embeddings for exact search, where a draw for a batch of 64 takes at most 20 ms; above, IVF-PQ with
4-bit codes."""
PROBED = 16  # cells searched per query
PART = 2  # dimensions per code
TRAINED_ON = 64  # embeddings per cell
QUERIES = 128  # to measure recall
_SLAB = 131_072  # rows per read
TRAIN = "train"


@dataclass(frozen=True)
class IndexHeader:
    """Content of an index.

    Attributes:
        kind: FAISS factory string: "Flat", or e.g. "IVF2048,PQ96x4fs".
        embeddings: sha256 of the embeddings of its bank.
        rows: number of embeddings.
        probed: cells searched per query; 0 for exact search.
        trained_on: number of embeddings that cells and codes are trained on; 0 for exact search.
        recall: recall of the 100 nearest rows (or all, if fewer) among the first 100 results.
        file, sha256, bytes: name, digest and size of the index file.
    """

    kind: str
    embeddings: str
    rows: int
    probed: int
    trained_on: int
    recall: float
    file: str
    sha256: str
    bytes: int


class SpeakerIndex:
    """An open index.

    Attributes:
        folder: of its files.
        header: its content.
        search_kind: how it searches: `IndexHeader.kind`, or on which GPU.
    """

    def __init__(self, folder: Path, header: IndexHeader, searched: Any, search_kind: str = "") -> None:
        self.folder = folder
        self.header = header
        self.search_kind = search_kind or header.kind
        self._index = searched

    def check(self, bank: Bank) -> None:
        """Raise UserError if the index belongs to another bank."""
        if self.header.embeddings != bank.header.files["embeddings"][1]:
            raise UserError(
                f"{self.folder / HEADER} is of other embeddings than the bank {bank.folder} "
                f"({self.header.rows} and {len(bank)} rows); rebuild it with `runner index build`"
            )

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The `k` nearest rows to each query (M, S): cosines (M, k), approximate for large indexes, and rows (M, k).

        The nearest comes first; rows are -1 if there are fewer than k.
        """
        cosines, rows = self._index.search(np.ascontiguousarray(queries.numpy(), dtype=np.float32), k)
        return torch.from_numpy(cosines), torch.from_numpy(rows)


def build_index(bank: Bank) -> tuple[SpeakerIndex, float]:
    """Build the index of all utterances of a bank in its folder; returns it and the build time in seconds."""
    import faiss

    begun = time.perf_counter()
    rows, dim = bank.embeddings.shape
    digest = bank.header.files["embeddings"][1]
    trained_on = 0
    if rows <= FLAT_UP_TO:
        kind = "Flat"
    else:
        cells = 2 ** round(math.log2(2 * math.sqrt(rows)))
        parts = next(p for p in range(max(1, dim // PART), 0, -1) if dim % p == 0)
        kind = f"IVF{cells},PQ{parts}x4fs"
        trained_on = min(rows, TRAINED_ON * cells)
    index: Any = faiss.index_factory(dim, kind, faiss.METRIC_INNER_PRODUCT)
    if trained_on:
        index.train(_sample(bank.embeddings, trained_on, derive(digest, "index")))
        index.nprobe = PROBED
    for first in range(0, rows, _SLAB):
        index.add(np.ascontiguousarray(bank.embeddings[first : first + _SLAB]))
    seconds = time.perf_counter() - begun
    bank.folder.mkdir(parents=True, exist_ok=True)
    whole = bank.folder / "index.faiss"
    with writing(whole) as temporary:
        faiss.write_index(index, str(temporary))
    with whole.open("rb") as stored:
        sha256 = hashlib.file_digest(stored, "sha256").hexdigest()
    file = f"index-{sha256[:16]}.faiss"
    whole.replace(bank.folder / file)
    header = IndexHeader(
        kind=kind,
        embeddings=digest,
        rows=rows,
        probed=PROBED if trained_on else 0,
        trained_on=trained_on,
        recall=_recall(index, bank.embeddings, derive(digest, "recall")),
        file=file,
        sha256=sha256,
        bytes=(bank.folder / file).stat().st_size,
    )
    write_json(bank.folder / HEADER, {"format": FORMAT, **vars(header)})
    for old in (*bank.folder.glob("index-*.faiss"), *bank.folder.glob(".index.*")):
        if old.name != file:
            old.unlink(missing_ok=True)
    return SpeakerIndex(bank.folder, header, index), seconds


def open_index(bank: Bank, *, gpu: int | None = None) -> SpeakerIndex:
    """Open the index in the folder of a bank, memory-mapped.

    Args:
        bank: its embeddings.
        gpu: number of a CUDA device; with faiss-gpu, exact search on this device, of all embeddings in float16, is
            used instead of the index. It has not been tried on a GPU.

    Raises:
        UserError: if there is no index, it is damaged, or it belongs to another bank.
    """
    import faiss

    path = bank.folder / HEADER
    try:
        stored = parse_json(path.read_text())
        if stored.pop("format") != FORMAT:
            raise KeyError("format")
        header = TypeAdapter(IndexHeader).validate_python(stored)
    except FileNotFoundError:
        raise UserError(
            f"no index in the folder of the bank {bank.folder}; build it with `runner index build`"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a header of an index; rebuild it with `runner index build`") from error
    index = SpeakerIndex(bank.folder, header, None)
    index.check(bank)
    file = bank.folder / header.file
    there = file.stat().st_size if file.is_file() else None
    if there != header.bytes:
        got = "is missing" if there is None else f"is truncated: {there} of {header.bytes} bytes"
        raise UserError(f"{file} {got}; rebuild it with `runner index build`")
    try:
        if gpu is not None and getattr(faiss, "get_num_gpus", int)() > gpu:
            return SpeakerIndex(bank.folder, header, _on_gpu(bank.embeddings, gpu), f"exact, on GPU {gpu}")
        return SpeakerIndex(bank.folder, header, faiss.read_index(str(file), faiss.IO_FLAG_MMAP_IFC))
    except RuntimeError as error:
        raise UserError(f"{file} is damaged: {' '.join(str(error).split())[:200]}") from error


def _on_gpu(embeddings: NDArray[np.float32], gpu: int) -> Any:
    """An exact index of embeddings (N, S), in float16, on a CUDA device."""
    import faiss

    options = faiss.GpuIndexFlatConfig()
    options.device, options.useFloat16 = gpu, True
    index: Any = faiss.GpuIndexFlatIP(faiss.StandardGpuResources(), embeddings.shape[1], options)
    for first in range(0, len(embeddings), _SLAB):
        index.add(np.ascontiguousarray(embeddings[first : first + _SLAB]))
    return index


def _sample(embeddings: NDArray[np.float32], count: int, seed: int) -> NDArray[np.float32]:
    """`count` distinct random rows, in order."""
    rows = np.random.default_rng(seed).choice(len(embeddings), count, replace=False)
    return np.ascontiguousarray(embeddings[np.sort(rows)])


def _recall(index: Any, embeddings: NDArray[np.float32], seed: int) -> float:
    """Recall of the 100 nearest rows, for queries from the bank itself."""
    nearest = min(100, len(embeddings))
    queries = _sample(embeddings, min(QUERIES, len(embeddings)), seed)
    found = index.search(queries, nearest)[1]
    best = np.full((len(queries), 0), -1.0, dtype=np.float32)
    rows = np.full((len(queries), 0), -1)
    for first in range(0, len(embeddings), _SLAB):
        slab = np.asarray(embeddings[first : first + _SLAB])
        best = np.hstack([best, queries @ slab.T])
        rows = np.hstack([rows, np.broadcast_to(np.arange(first, first + len(slab)), (len(queries), len(slab)))])
        kept = np.argpartition(-best, nearest - 1, axis=1)[:, :nearest]
        best, rows = np.take_along_axis(best, kept, 1), np.take_along_axis(rows, kept, 1)
    return float(np.mean([len(set(a) & set(b)) / nearest for a, b in zip(found.tolist(), rows.tolist(), strict=True)]))


TABLE_UP_TO = 4096
"""Largest number of training utterances that are too few for an index: choices draw from the table of speakers."""
RANDOM = 1024
"""Random rows per batch; what 1 % of the rows have occurs about ten times."""
NEAREST = 32
"""Nearest rows of other speakers per query, as candidates for hard ones."""
_MAX_RESULTS = 1024  # of the index per query


class BankPool:
    """The training utterances of a bank, for `SpeakerSampler`; rows are counted from the first one.

    Candidates are random rows, which are uniform, so that speakers occur in proportion to their utterances, and the
    nearest rows of other speakers. The search for these requests as many extra rows as the largest speaker has, up to
    1024 in all.

    Args:
        bank: the embeddings.
        index: of the same bank.
        table: the training speakers, with embeddings by the same encoder.

    Raises:
        UserError: if the three do not belong together.
    """

    def __init__(self, bank: Bank, index: SpeakerIndex, table: SpeakerTable) -> None:
        self.first, end = bank.header.splits.get(TRAIN, (0, 0))
        first_speaker, end_speaker = bank.header.speaker_splits.get(TRAIN, (0, 0))
        if bank.header.encoder_digest != table.encoder:
            raise UserError(
                f"{bank.folder} is a bank of speaker encoder {bank.header.encoder!r}; the training speakers have "
                "embeddings of another encoder"
            )
        if tuple(bank.names[first_speaker:end_speaker]) != table.names:
            raise UserError(
                f"{bank.folder} has {end_speaker - first_speaker} training speakers, and the data has others "
                f"({len(table)}); bring the bank up to date with `runner index build`"
            )
        index.check(bank)
        self.bank, self.index, self.reference = bank, index, table.reference
        self.size = end - self.first
        self.embeddings: NDArray[np.float32] = bank.embeddings[self.first : end]
        self._speakers = torch.from_numpy(np.array(bank.labels[self.first : end])).long() - first_speaker
        self.nearest = min(NEAREST + int(torch.bincount(self._speakers).max()), _MAX_RESULTS, len(bank))

    def __len__(self) -> int:
        return self.size

    def vectors(self, rows: Tensor) -> Tensor:
        """(..., S) of rows, read from the disk or its cache."""
        return torch.from_numpy(np.asarray(self.embeddings[rows.numpy()]))

    def speakers_of(self, rows: Tensor) -> Tensor:
        """Rows of the table of speakers, of the same shape."""
        return self._speakers[rows]

    def candidates(self, queries: list[Tensor], avoid: Tensor, draw: torch.Generator) -> Candidates:
        """Random rows, and the nearest to the first queries; see `snac_core.speakers.sampling.EmbeddingPool`."""
        far = torch.unique(torch.randint(self.size, (RANDOM,), generator=draw))
        far_vectors, far_speakers = self.vectors(far), self.reference[self._speakers[far]]
        near = self._nearest_others(queries[0], avoid)
        near = torch.where(torch.isin(near, far), -1, near)  # no row is a candidate twice
        found, place = torch.unique(near.clamp(min=0), return_inverse=True)  # queries share rows: each is read once
        near_vectors, near_speakers = self.vectors(found)[place], self.reference[self._speakers[found]][place]
        both = torch.stack(queries, dim=1)  # (M, Q, S)

        def cosines(far: Tensor, near: Tensor) -> list[Tensor]:
            of_near = torch.bmm(near, both.mT).unbind(2)
            return [torch.cat([of @ far.T, close], dim=1) for of, close in zip(queries, of_near, strict=True)]

        rows = torch.cat([far.expand(len(near), -1), near], dim=1)
        return Candidates(rows, cosines(far_vectors, near_vectors), cosines(far_speakers, near_speakers))

    def _nearest_others(self, queries: Tensor, avoid: Tensor) -> Tensor:
        """(M, K) rows near to each query (M, S) of speakers that are not among `avoid` (M, A); -1: no more."""
        found = self.index.search(queries, self.nearest)[1] - self.first
        here = (found >= 0) & (found < self.size)
        speakers = self._speakers[found.clamp(0, self.size - 1)]
        here &= (speakers.unsqueeze(2) != avoid.unsqueeze(1)).all(dim=2)
        order = torch.where(here, 0, found.shape[1]) + torch.arange(found.shape[1])
        kept = order.topk(min(NEAREST, found.shape[1]), largest=False).indices
        return torch.where(here, found, -1).gather(1, kept)
