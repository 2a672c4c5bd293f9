"""Banks of synthetic embeddings: speakers in a space of few directions, utterances around them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from snac_core.conditioning import EncoderIdentity
from snac_core.speakers.bank import Bank, write_bank
from snac_core.speakers.index import BankPool, build_index
from snac_core.speakers.sampling import SpeakerSampler, SpeakerTable


def arrays(speakers: int, each: int, dim: int = 16, seed: int = 0) -> dict[str, NDArray[Any]]:
    """What `write_bank` takes: `each` utterances of every speaker."""
    draw = np.random.default_rng(seed)
    centres = draw.normal(size=(speakers, dim))
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    labels = np.repeat(np.arange(speakers), each)
    embeddings = centres[labels] + 0.5 * draw.normal(size=(len(labels), dim)) / np.sqrt(dim)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    return {
        "embeddings": embeddings.astype(np.float32),
        "labels": labels.astype(np.int32),
        "keys": draw.integers(0, 256, (len(labels), 32), dtype=np.uint8),
        "conditioning": centres.astype(np.float32),
        "reference": centres.astype(np.float32),
        "speaker_keys": draw.integers(0, 256, (speakers, 32), dtype=np.uint8),
    }


def written(folder: Path, parts: dict[str, NDArray[Any]], encoder: str = "e" * 64) -> Bank:
    """A bank of these arrays; all utterances are of the train split, but those of the last fifth of the speakers."""
    rows, speakers = len(parts["labels"]), len(parts["reference"])
    train = speakers - speakers // 5
    cut = int((parts["labels"] < train).sum())
    return write_bank(
        folder,
        encoder=EncoderIdentity("synthetic", parts["embeddings"].shape[1], encoder),
        arrays=parts,
        ids=[f"u{row:06d}" for row in range(rows)],
        names=[f"s{label:04d}" for label in range(speakers)],
        splits={"train": (0, cut), "dev": (cut, rows), "test": (rows, rows)},
        speaker_splits={"train": (0, train), "dev": (train, speakers), "test": (speakers, speakers)},
    )


def table_of(bank: Bank) -> SpeakerTable:
    """The training speakers of a bank."""
    first, last = bank.header.speaker_splits["train"]
    conditioning, reference = (torch.from_numpy(np.array(a[first:last])) for a in (bank.conditioning, bank.reference))
    return SpeakerTable(tuple(bank.names[first:last]), conditioning, reference, bank.header.encoder_digest)


def sampler_of(bank: Bank, seed: int = 0) -> SpeakerSampler:
    """A sampler whose stratified choices draw from the utterances of a bank; its index is built."""
    table = table_of(bank)
    pool = BankPool(bank, build_index(bank)[0], table)
    return SpeakerSampler(table, seed, lambda: pool)
