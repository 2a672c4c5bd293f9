"""Drawing from the utterances of a bank: easy ones at random, hard ones from the index, one search a batch."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from snac_core.errors import UserError
from snac_core.speakers.bank import Bank
from snac_core.speakers.index import SpeakerIndex

ALL_UP_TO = 4096
"""Rows up to which every row is a candidate, and no index is needed."""
RANDOM = 1024
"""Rows drawn at random for each batch: what is one in a hundred of all comes ten times."""
NEAREST = 32
"""Rows of other speakers, nearest to each query, that are looked at for hard ones."""
_MOST = 1024  # rows asked of the index for a query


class BankGallery:
    """A split of a bank, for `SpeakerSampler`: rows are utterances, numbered from the split's first.

    Every random row is equally likely, so a speaker comes as often as it has utterances. The index is searched for the
    nearest rows of other speakers: as many more as the largest speaker has rows, up to a thousand.

    Args:
        bank: the embeddings.
        index: of the same bank; may be left out where the split has at most `ALL_UP_TO` utterances.
        split: whose utterances are drawn; "train" in training.
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
        self.nearest = min(NEAREST + int(counts.max()), _MOST, self.size)

    def __len__(self) -> int:
        return self.size

    def vectors(self, rows: Tensor) -> Tensor:
        """(K, S) of rows (K,)."""
        return torch.from_numpy(np.asarray(self.embeddings[rows.numpy()]))

    def labels(self, rows: Tensor) -> Tensor:
        """Speakers of rows, of the same shape."""
        return self._labels[rows]

    def candidates(self, queries: list[Tensor], hard: bool, draw: torch.Generator) -> tuple[Tensor, list[Tensor]]:
        """Rows and their exact cosines; see `snac_core.speakers.sampling.Gallery`."""
        if self.size <= ALL_UP_TO:
            rows = torch.arange(self.size)
        else:
            rows = torch.randint(self.size, (RANDOM,), generator=draw).sort().values
        vectors = self.vectors(rows)
        cosines = [of @ vectors.T for of in queries]
        if self.size <= ALL_UP_TO or not hard:
            return rows.unsqueeze(0), cosines
        near = self._nearest_others(queries[0])
        found, place = torch.unique(near, return_inverse=True)  # near rows repeat between queries: each is read once
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
