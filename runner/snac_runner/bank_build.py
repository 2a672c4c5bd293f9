"""Build the embedding bank of a corpus: in several processes, resumable, and only for audio that is new.

The format of a bank is in `snac_core.speakers.bank`.
"""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from snac_core.conditioning import EncoderIdentity
from snac_core.errors import UserError
from snac_core.files import write_bytes
from snac_core.plugins import discover
from snac_core.speakers.bank import HEADER, Bank, open_bank, write_bank
from snac_core.speakers.encoder import SpeakerEncoder, load_speaker_encoder
from snac_runner.data.corpus import SPLITS, Corpus, Segment, Utterance
from snac_runner.data.references import References, whole_segment
from snac_runner.embeddings import key_of, segment_embedding, segment_key, weighted_mean

_CHUNK = 16  # segments that a process embeds and stores at once: what an interrupted build loses, per process
_MIN_CHUNKS = 4  # per process: starting a process takes seconds

Embeddings = dict[bytes, NDArray[np.float32]]  # key of a segment -> embedding (S,)
Job = tuple[bytes, Utterance, Segment]  # key, and what to embed


@dataclass(frozen=True)
class EncoderSpec:
    """What a process needs to load a speaker encoder.

    Attributes:
        name: of the encoder.
        weights: path of its weights; None: its default weights.
        plugins: files with additional plugins.
        disable: installed plugins that are not loaded.
    """

    name: str
    weights: str | None = None
    plugins: tuple[str, ...] = ()
    disable: tuple[str, ...] = ()

    def load(self) -> SpeakerEncoder:
        """Load the encoder."""
        plugins = discover(self.plugins, disable=self.disable)
        return load_speaker_encoder(self.name, weights=self.weights, plugins=plugins)


@dataclass(frozen=True)
class BankContents:
    """What the bank of a corpus contains.

    Attributes:
        utterances: by row: those of train, then dev, then test.
        keys: (N, 32) keys of the utterances.
        speakers: by label, in the same order of splits.
        labels: (N,) speaker labels of the utterances.
        segments: the conditioning and the scoring segments, by speaker label.
        speaker_keys: (P, 32) keys of `segments`.
        splits, speaker_splits: see `snac_core.speakers.bank.BankHeader`.
    """

    utterances: list[Utterance]
    keys: NDArray[np.uint8]
    speakers: list[str]
    labels: NDArray[np.int32]
    segments: list[tuple[list[Segment], list[Segment]]]
    speaker_keys: NDArray[np.uint8]
    splits: dict[str, tuple[int, int]]
    speaker_splits: dict[str, tuple[int, int]]

    @classmethod
    def of(cls, corpus: Corpus) -> BankContents:
        """What the bank of this corpus contains."""
        utterances: list[Utterance] = []
        speakers: list[str] = []
        segments: list[tuple[list[Segment], list[Segment]]] = []
        splits, speaker_splits = {}, {}
        for split in SPLITS:
            new_utterances, new_speakers = corpus.splits.get(split, ()), corpus.speakers(split)
            splits[split] = (len(utterances), len(utterances) + len(new_utterances))
            speaker_splits[split] = (len(speakers), len(speakers) + len(new_speakers))
            utterances += new_utterances
            speakers += new_speakers
            if new_speakers:
                references = References(corpus, split)
                segments += [
                    (references.conditioning(speaker), references.scoring(speaker)) for speaker in new_speakers
                ]
        label_of = {speaker: label for label, speaker in enumerate(speakers)}
        return cls(
            utterances,
            np.stack([segment_key(u, whole_segment(u)) for u in utterances]),
            speakers,
            np.array([label_of[u.speaker] for u in utterances], dtype=np.int32),
            segments,
            np.stack([key_of([[_key(corpus, s).hex() for s in role] for role in roles]) for roles in segments]),
            splits,
            speaker_splits,
        )


def _key(corpus: Corpus, segment: Segment) -> bytes:
    return segment_key(corpus.utterance(segment.utterance), segment).tobytes()


@dataclass(frozen=True)
class BuildResult:
    """A bank, the number of segments that were embedded for it, and the number of embeddings that were reused."""

    bank: Bank
    embedded: int
    reused: int


def build_bank(
    corpus: Corpus,
    folder: Path,
    spec: EncoderSpec,
    *,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> BuildResult:
    """Build or update the bank at `folder`; only audio that it does not contain is embedded.

    The bits of the result depend only on corpus and encoder: not on the number of processes, on interruptions, or on an
    older bank.

    Args:
        corpus: the speech.
        folder: of the bank; created if missing.
        spec: the speaker encoder.
        workers: number of processes, of one thread each; 0: one per core, or none if there is little to embed.
        progress: called with (segments embedded, segments in all).

    Raises:
        UserError: if the folder contains the bank of another encoder, another process is building it, or an embedding
            has NaN or infinite values.
    """
    encoder = spec.load()
    with _locked(folder):
        old = open_bank(folder, encoder=encoder) if (folder / HEADER).is_file() else None
        if old is not None:
            old.verify()
        partial = folder / f"partial-{encoder.digest[:16]}"
        contents = BankContents.of(corpus)
        old_rows = np.full(len(contents.speakers), -1) if old is None else old.find_speakers(contents.speaker_keys)
        needed = _needed(corpus, contents, old_rows)
        embeddings = _existing(old, partial, list(needed), encoder.dim)
        jobs = [(key, *needed[key]) for key in needed if key not in embeddings]
        embeddings |= embed_segments(jobs, partial, encoder, spec, workers, progress)
        conditioning, reference = _speaker_means(corpus, contents, embeddings, old, old_rows)
        bank = write_bank(
            folder,
            encoder=EncoderIdentity(encoder.name, encoder.dim, encoder.digest),
            arrays={
                "embeddings": np.stack([embeddings[key.tobytes()] for key in contents.keys]),
                "labels": contents.labels,
                "keys": contents.keys,
                "conditioning": conditioning,
                "reference": reference,
                "speaker_keys": contents.speaker_keys,
            },
            ids=[u.id for u in contents.utterances],
            names=contents.speakers,
            splits=contents.splits,
            speaker_splits=contents.speaker_splits,
        )
        shutil.rmtree(partial, ignore_errors=True)
    return BuildResult(bank, embedded=len(jobs), reused=len(needed) - len(jobs))


def _needed(
    corpus: Corpus, contents: BankContents, old_rows: NDArray[np.int64]
) -> dict[bytes, tuple[Utterance, Segment]]:
    """The segments that a bank needs, by key: all utterances, and the roles of speakers not in the old bank."""
    needed = {key.tobytes(): (u, whole_segment(u)) for key, u in zip(contents.keys, contents.utterances, strict=True)}
    for roles, row in zip(contents.segments, old_rows.tolist(), strict=True):
        if row < 0:
            for segment in (*roles[0], *roles[1]):
                needed.setdefault(_key(corpus, segment), (corpus.utterance(segment.utterance), segment))
    return needed


def _existing(old: Bank | None, partial: Path, keys: Sequence[bytes], dim: int) -> Embeddings:
    """The embeddings for these keys that an older bank or an interrupted build contains."""
    embeddings: Embeddings = {}
    if old is not None:
        rows = old.find(np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, 32))
        embeddings = {key: old.embeddings[row] for key, row in zip(keys, rows.tolist(), strict=True) if row >= 0}
    wanted = set(keys)
    for path in sorted(partial.glob("*.safetensors")):
        try:
            stored = load_file(path)
        except (OSError, SafetensorError):
            continue  # damaged: computed again
        if set(stored) == {"keys", "embeddings"} and stored["embeddings"].shape[1:] == (dim,):
            pairs = zip((key.tobytes() for key in stored["keys"]), stored["embeddings"], strict=True)
            embeddings |= {key: embedding for key, embedding in pairs if key in wanted}
    return embeddings


def embed_segments(
    jobs: Sequence[Job],
    partial: Path,
    encoder: SpeakerEncoder,
    spec: EncoderSpec,
    workers: int,
    progress: Callable[[int, int], None] | None,
) -> Embeddings:
    """Embed segments in chunks, each of which is stored in the folder `partial` as soon as it is done."""
    chunks = [jobs[first : first + _CHUNK] for first in range(0, len(jobs), _CHUNK)]
    embeddings: Embeddings = {}
    for chunk, rows in _embed_chunks(chunks, encoder, spec, workers):
        _store(chunk, rows, partial)
        embeddings.update(zip((key for key, _, _ in chunk), rows, strict=True))
        if progress:
            progress(len(embeddings), len(jobs))
    return embeddings


def _embed_chunks(
    chunks: Sequence[Sequence[Job]], encoder: SpeakerEncoder, spec: EncoderSpec, workers: int
) -> Iterator[tuple[Sequence[Job], NDArray[np.float32]]]:
    """Each chunk with its embeddings (K, S), in the order in which they are done."""
    processes = min(workers, len(chunks)) if workers else min(os.cpu_count() or 1, -(-len(chunks) // _MIN_CHUNKS))
    if processes <= 1:
        for chunk in chunks:
            yield chunk, _embed(encoder, chunk)
        return
    arguments = (spec, encoder.digest)
    with ProcessPoolExecutor(processes, get_context("spawn"), initializer=_start_worker, initargs=arguments) as pool:
        futures = {pool.submit(_embed_in_worker, chunk): chunk for chunk in chunks}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool:
            raise UserError("a worker process was killed; run the same command again to continue") from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _store(chunk: Sequence[Job], embeddings: NDArray[np.float32], partial: Path) -> None:
    keys = np.frombuffer(b"".join(key for key, _, _ in chunk), dtype=np.uint8).reshape(-1, 32)
    name = key_of([key.hex() for key, _, _ in chunk]).tobytes().hex()[:32]
    write_bytes(partial / f"{name}.safetensors", save({"keys": keys, "embeddings": embeddings}))


def _embed(encoder: SpeakerEncoder, jobs: Sequence[Job]) -> NDArray[np.float32]:
    """The embeddings (K, S) of K jobs, computed as in training."""
    return np.stack([segment_embedding(encoder, utterance, segment).numpy() for _, utterance, segment in jobs])


_WORKER_ENCODER: list[SpeakerEncoder] = []  # of a worker process


def _start_worker(spec: EncoderSpec, digest: str) -> None:
    """Set up a worker process: one thread, its own encoder, no reaction to Ctrl-C, and an exit with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    encoder = spec.load()
    assert encoder.digest == digest, "the encoder's digest differs between processes"
    _WORKER_ENCODER.append(encoder)


def _exit_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _embed_in_worker(jobs: Sequence[Job]) -> NDArray[np.float32]:
    return _embed(_WORKER_ENCODER[0], jobs)


def _speaker_means(
    corpus: Corpus, contents: BankContents, embeddings: Embeddings, old: Bank | None, old_rows: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Conditioning and reference embeddings (P, S), as in `speaker_embeddings`; from the old bank if unchanged."""
    means: tuple[list[NDArray[np.float32]], list[NDArray[np.float32]]] = ([], [])
    for roles, row in zip(contents.segments, old_rows.tolist(), strict=True):
        if row >= 0:
            assert old is not None
            means[0].append(old.conditioning[row])
            means[1].append(old.reference[row])
            continue
        for role_means, segments in zip(means, roles, strict=True):
            tensors = [torch.from_numpy(np.array(embeddings[_key(corpus, s)])) for s in segments]
            role_means.append(weighted_mean(tensors, [s.seconds for s in segments]).numpy())
    return np.stack(means[0]), np.stack(means[1])


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock the folder against other builds; the lock ends with the process, even if it is killed."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / "building.lock", timeout=0):
            yield
    except Timeout:
        raise UserError(f"another process is building the bank {folder}; wait for it, or give another --out") from None
