"""FAISS indexes of banks, and sampling from the utterances of a bank: at random, and hard ones by index search."""

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

from snac_core.errors import UserError
from snac_core.files import write_json, writing
from snac_core.seeding import derive
from snac_core.speakers.bank import Bank

HEADER = "index.json"
FORMAT = 1
FLAT_UP_TO = 200_000
"""Largest number of embeddings for exact search; above, IVF-PQ with 4-bit codes."""
PROBED = 16  # cells searched per query
PART = 2  # dimensions per code
TRAINED_ON = 64  # embeddings per cell
QUERIES = 128  # to measure recall
_SLAB = 131_072  # rows per read


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
    """An open index."""

    def __init__(self, folder: Path, header: IndexHeader, searched: Any) -> None:
        self.folder = folder
        self.header = header
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


def open_index(bank: Bank) -> SpeakerIndex:
    """Open the index in the folder of a bank.

    Raises:
        UserError: if there is no index, it is damaged, or it belongs to another bank.
    """
    import faiss

    path = bank.folder / HEADER
    try:
        stored = json.loads(path.read_text())
        if stored.pop("format") != FORMAT:
            raise KeyError("format")
        header = IndexHeader(**stored)
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
        return SpeakerIndex(bank.folder, header, faiss.read_index(str(file)))
    except RuntimeError as error:
        raise UserError(f"{file} is damaged: {' '.join(str(error).split())[:200]}") from error


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


ALL_UP_TO = 4096
"""Largest number of rows of which all are candidates, without an index."""
RANDOM = 1024
"""Random rows per batch; what 1 % of the rows have occurs about ten times."""
NEAREST = 32
"""Nearest rows of other speakers per query, as candidates for hard ones."""
_MAX_RESULTS = 1024  # of the index per query


class BankPool:
    """A split of a bank, for `SpeakerSampler`; rows are utterances, counted from the first of the split.

    Random rows are uniform, so speakers are drawn in proportion to their utterances. A search for the nearest rows of
    other speakers requests as many extra rows as the largest speaker has, up to 1024 in all.

    Args:
        bank: the embeddings.
        index: of the same bank; not needed for a split of at most `ALL_UP_TO` utterances.
        split: "train", "dev" or "test".
    """

    def __init__(self, bank: Bank, index: SpeakerIndex | None = None, split: str = "train") -> None:
        self.first, end = bank.header.splits.get(split, (0, 0))
        self.size = end - self.first
        if not self.size:
            raise UserError(f"the bank {bank.folder} has no {split} utterances to draw from")
        if index is None and self.size > ALL_UP_TO:
            raise UserError(
                f"{self.size} {split} utterances in {bank.folder} and no index to find hard ones; expected one above "
                f"{ALL_UP_TO}: build it with `runner index build`"
            )
        if index is not None:
            index.check(bank)
        self.index = index
        self.embeddings: NDArray[np.float32] = bank.embeddings[self.first : end]
        self._labels = torch.from_numpy(np.array(bank.labels[self.first : end])).long()
        counts = torch.bincount(self._labels)
        self.speakers = int((counts > 0).sum())
        self.nearest = min(NEAREST + int(counts.max()), _MAX_RESULTS, self.size)

    def __len__(self) -> int:
        return self.size

    def vectors(self, rows: Tensor) -> Tensor:
        """(K, S) of rows (K,)."""
        return torch.from_numpy(np.asarray(self.embeddings[rows.numpy()]))

    def labels(self, rows: Tensor) -> Tensor:
        """Speakers of rows, of the same shape."""
        return self._labels[rows]

    def candidates(self, queries: list[Tensor], hard: bool, draw: torch.Generator) -> tuple[Tensor, list[Tensor]]:
        """Rows and their exact cosines; see `snac_core.speakers.sampling.EmbeddingPool`."""
        if self.size <= ALL_UP_TO:
            rows = torch.arange(self.size)
        else:
            rows = torch.randint(self.size, (RANDOM,), generator=draw).sort().values
        vectors = self.vectors(rows)
        cosines = [of @ vectors.T for of in queries]
        if self.size <= ALL_UP_TO or not hard:
            return rows.unsqueeze(0), cosines
        near = self._nearest_others(queries[0])
        found, place = torch.unique(near, return_inverse=True)  # queries share near rows: each is read once
        vectors = self.vectors(found)[place]
        near_cosines = [torch.einsum("ms,mks->mk", of, vectors) for of in queries]
        both = torch.cat([rows.expand(len(near), -1), near], dim=1)
        return both, [torch.cat([far, close], dim=1) for far, close in zip(cosines, near_cosines, strict=True)]

    def _nearest_others(self, queries: Tensor) -> Tensor:
        """(M, K) rows of this split near to each query (M, S), of other speakers than the nearest of all."""
        assert self.index is not None
        found = self.index.search(queries, self.nearest)[1] - self.first
        here = (found >= 0) & (found < self.size)
        found = torch.where(here, found, 0)
        labels = self._labels[found]
        other = here & (labels != labels[:, :1])
        order = torch.where(other, 0, found.shape[1]) + torch.arange(found.shape[1])
        kept = order.topk(min(NEAREST, found.shape[1]), largest=False).indices
        return found.gather(1, kept)
