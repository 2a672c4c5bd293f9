"""From a corpus to its embedding bank: from where a killed build stopped, and new files only."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from runner.banks.contents import Wanted
from runner.banks.embedding import EncoderSource, Known, embed_all
from runner.data import Corpus
from runner.data.references import whole_of
from runner.embeddings import pooled, segment_key
from snac_core.errors import UserError
from snac_core.speakers.bank import HEADER, Bank, open_bank, write_bank


@dataclass(frozen=True)
class Built:
    """A bank, how many stretches of audio were embedded for it, and how many embeddings were there already."""

    bank: Bank
    embedded: int
    reused: int


def build_bank(
    corpus: Corpus,
    folder: Path,
    source: EncoderSource,
    *,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Built:
    """Bring the bank at `folder` up to date with a corpus; only audio that it does not know is embedded.

    The bits of the result depend on corpus and encoder alone: not on how it came about, in one process or several, at
    once, from a killed build, or from an older bank.

    Args:
        corpus: the speech.
        folder: of the bank; made when missing.
        source: of the encoder.
        workers: processes, each on one thread; 0: as many as there are cores, and none where there is little to do.
        progress: called with (embedded, of how many).

    Raises:
        UserError: if the folder holds the bank of another encoder, another process is writing it, or an embedding is
            NaN or infinite.
    """
    encoder = source.load()
    with _alone(folder):
        old = open_bank(folder, encoder=encoder) if (folder / HEADER).is_file() else None
        if old is not None:
            old.verify()
        partial = folder / f"partial-{encoder.digest[:16]}"
        wanted = Wanted.of(corpus)
        same = np.full(len(wanted.speakers), -1) if old is None else old.speaker_rows_of(wanted.speaker_keys)
        needed = {wanted.keys[row].tobytes(): (u, whole_of(u)) for row, u in enumerate(wanted.utterances)}
        for both, row in zip(wanted.roles, same.tolist(), strict=True):
            for segment in (s for role in both if row < 0 for s in role):
                utterance = corpus.utterance(segment.utterance)
                needed.setdefault(segment_key(utterance, segment).tobytes(), (utterance, segment))
        known = _known(old, partial, list(needed), encoder.dim)
        todo = [(key, *needed[key]) for key in needed if key not in known]
        reused = len(needed) - len(todo)
        known |= embed_all(todo, partial, encoder, source, workers, progress)
        conditioning, reference = _of_speakers(corpus, wanted, known, old, same)
        bank = write_bank(
            folder,
            encoder=encoder.name,
            encoder_digest=encoder.digest,
            arrays={
                "embeddings": np.stack([known[key.tobytes()] for key in wanted.keys]),
                "labels": wanted.labels,
                "keys": wanted.keys,
                "conditioning": conditioning,
                "reference": reference,
                "speaker_keys": wanted.speaker_keys,
            },
            ids=[u.id for u in wanted.utterances],
            names=wanted.speakers,
            splits=wanted.splits,
            speaker_splits=wanted.speaker_splits,
        )
        shutil.rmtree(partial, ignore_errors=True)
    return Built(bank, len(todo), reused)


def _known(old: Bank | None, partial: Path, keys: Sequence[bytes], dim: int) -> Known:
    """Embeddings that an older bank, or a build that was stopped, has for these keys."""
    known: Known = {}
    if old is not None:
        rows = old.rows_of(np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, 32))
        known = {key: old.embeddings[row] for key, row in zip(keys, rows.tolist(), strict=True) if row >= 0}
    wanted = set(keys)
    for path in sorted(partial.glob("*.safetensors")):
        try:
            stored = load_file(path)
        except (OSError, SafetensorError):
            continue  # damaged: computed anew
        if set(stored) == {"keys", "embeddings"} and stored["embeddings"].shape[1:] == (dim,):
            pairs = zip((key.tobytes() for key in stored["keys"]), stored["embeddings"], strict=True)
            known |= {key: embedding for key, embedding in pairs if key in wanted}
    return known


def _of_speakers(
    corpus: Corpus, wanted: Wanted, known: Known, old: Bank | None, same: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Conditioning and reference (P, S), pooled as `speaker_embeddings` does; from the older bank where unchanged."""
    rows: tuple[list[NDArray[np.float32]], list[NDArray[np.float32]]] = ([], [])
    for both, row in zip(wanted.roles, same.tolist(), strict=True):
        if row >= 0:
            assert old is not None
            rows[0].append(old.conditioning[row])
            rows[1].append(old.reference[row])
            continue
        for role, segments in zip(rows, both, strict=True):
            keys = [segment_key(corpus.utterance(s.utterance), s).tobytes() for s in segments]
            embeddings = [torch.from_numpy(np.array(known[key])) for key in keys]
            role.append(pooled(embeddings, [s.seconds for s in segments]).numpy())
    return np.stack(rows[0]), np.stack(rows[1])


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder against other builds; the lock ends with the process, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "building.lock").open("w") as lock:
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            pass  # no such locks on this system
        except OSError:
            raise UserError(
                f"another process is building the bank {folder}; wait for it, or give another --out"
            ) from None
        yield
