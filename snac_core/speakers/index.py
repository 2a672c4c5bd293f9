"""The nearest of a million embeddings: a FAISS index beside a bank, refused beside any other."""

from __future__ import annotations

import hashlib
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from snac_core import atomic
from snac_core.errors import UserError
from snac_core.seeding import derive
from snac_core.speakers.bank import Bank

HEADER = "index.json"
FORMAT = 1
FLAT_UP_TO = 200_000
"""Embeddings up to which all are compared; above, IVF-PQ: cells of a coarse quantiser, and codes of 4 bits a part."""
PROBED = 16  # cells searched for a query
PART = 2  # dimensions that share a code
TRAINED_ON = 64  # embeddings for each cell
QUERIES = 128  # that recall is measured with
_SLAB = 131_072  # rows read at once


@dataclass(frozen=True)
class IndexHeader:
    """What an index is of.

    Attributes:
        kind: what FAISS calls it: "Flat", or "IVF2048,PQ96x4fs".
        embeddings: sha256 of the bank's embeddings that are in it.
        rows: how many.
        probed: cells searched for a query; 0 where there are no cells.
        trained_on: embeddings that the cells and codes were made from; 0 where there are none.
        recall: share of the 100 nearest (fewer, where there are fewer rows) that are among the first 100 found.
        file, sha256, bytes: the index itself.
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
    """An open index."""

    def __init__(self, folder: Path, header: IndexHeader, searched: Any) -> None:
        self.folder = folder
        self.header = header
        self._index = searched

    def check(self, bank: Bank) -> None:
        """Raise UserError if this is the index of another bank."""
        if self.header.embeddings != bank.header.files["embeddings"][1]:
            raise UserError(
                f"{self.folder / HEADER} is of other embeddings than the bank {bank.folder} "
                f"({self.header.rows} and {len(bank)} rows); build it anew with `runner index build`"
            )

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The `k` nearest to each query (M, S): cosines (M, k), approximate above the flat size, and rows (M, k).

        Nearest first; rows are -1 where there are fewer than k.
        """
        cosines, rows = self._index.search(np.ascontiguousarray(queries.numpy(), dtype=np.float32), k)
        return torch.from_numpy(cosines), torch.from_numpy(rows)


def build_index(bank: Bank) -> tuple[SpeakerIndex, float]:
    """Build and write the index of all utterances of a bank into its folder; the index, and seconds of building."""
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
    with atomic.writing(whole) as temporary:
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
    atomic.write_json(bank.folder / HEADER, {"format": FORMAT, **vars(header)})
    for old in (*bank.folder.glob("index-*.faiss"), *bank.folder.glob(".index.*")):
        if old.name != file:
            old.unlink(missing_ok=True)
    return SpeakerIndex(bank.folder, header, index), seconds


def open_index(bank: Bank) -> SpeakerIndex:
    """The index beside a bank.

    Raises:
        UserError: if there is none, it is damaged, or it is of another bank.
    """
    import faiss

    path = bank.folder / HEADER
    try:
        stored = json.loads(path.read_text())
        if stored.pop("format") != FORMAT:
            raise KeyError("format")
        header = IndexHeader(**stored)
    except FileNotFoundError:
        raise UserError(f"no index beside the bank {bank.folder}; build it with `runner index build`") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no header of an index; build it anew with `runner index build`") from error
    index = SpeakerIndex(bank.folder, header, None)
    index.check(bank)
    file = bank.folder / header.file
    there = file.stat().st_size if file.is_file() else None
    if there != header.bytes:
        got = "is missing" if there is None else f"is truncated: {there} of {header.bytes} bytes"
        raise UserError(f"{file} {got}; build it anew with `runner index build`")
    try:
        return SpeakerIndex(bank.folder, header, faiss.read_index(str(file)))
    except RuntimeError as error:
        raise UserError(f"{file} is damaged: {' '.join(str(error).split())[:200]}") from error


def _sample(embeddings: NDArray[np.float32], count: int, seed: int) -> NDArray[np.float32]:
    """`count` different rows at random, in their order."""
    rows = np.random.default_rng(seed).choice(len(embeddings), count, replace=False)
    return np.ascontiguousarray(embeddings[np.sort(rows)])


def _recall(index: Any, embeddings: NDArray[np.float32], seed: int) -> float:
    """The share of the true 100 nearest that are found, over queries out of the bank itself."""
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
