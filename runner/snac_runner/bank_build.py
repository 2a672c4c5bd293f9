"""Build the embedding bank of a corpus: in several processes, resumable, and only for audio that is new.

The format of a bank is in `snac_core.speakers.bank`. Nothing here is a Python object per utterance: of a million
utterances, keys and embeddings are arrays, and what is embedded is looked up when a process is free.
"""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from snac_core.conditioning import EncoderIdentity
from snac_core.errors import UserError
from snac_core.files import parse_json, write_json
from snac_core.plugins import discover
from snac_core.speakers.bank import HEADER, Bank, audio_digest, find_rows, open_bank, write_bank
from snac_core.speakers.encoder import SpeakerEncoder, load_speaker_encoder
from snac_runner.cluster import Cluster, WorkerConsole
from snac_runner.data.corpus import SPLITS, Corpus, Segment, Utterance
from snac_runner.data.loading import cores, exit_with_parent
from snac_runner.data.references import References, whole_seconds, whole_segment
from snac_runner.data.utterances import Rows
from snac_runner.embeddings import key_of, segment_embedding, segment_key, weighted_mean
from snac_runner.lock import locked

CORPUS = "corpus.json"
"""File of a bank's folder with the digests of the corpus that it was built of and of the bank's audio."""
_CHUNK = 16  # segments that a process embeds and stores at once: what an interrupted build loses, per process
_MIN_CHUNKS = 4  # per process: starting a process takes seconds
_AHEAD = 4  # chunks per process that wait for it
_SLAB = 65_536  # embeddings that are copied at once

Job = tuple[Utterance, Segment]


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
        corpus: the speech.
        keys: (N, 32) keys of the utterances: those of train, then dev, then test.
        labels: (N,) speaker labels of the utterances.
        speakers: by label, in the same order of splits.
        splits, speaker_splits: see `snac_core.speakers.bank.BankHeader`.
    """

    corpus: Corpus
    keys: NDArray[np.uint8]
    labels: NDArray[np.int32]
    speakers: list[str]
    splits: dict[str, tuple[int, int]]
    speaker_splits: dict[str, tuple[int, int]]

    @classmethod
    def of(cls, corpus: Corpus) -> BankContents:
        """What the bank of this corpus contains."""
        parts = [corpus.parts[split] for split in SPLITS]
        rows = np.cumsum([0, *map(len, parts)]).tolist()
        speakers = np.cumsum([0, *(len(part.speakers) for part in parts)]).tolist()
        keys = np.empty((rows[-1], 32), dtype=np.uint8)
        row = 0
        for part in parts:
            for digest, start, seconds in zip(part.digests(), part.columns["start"], part.seconds, strict=True):
                keys[row] = key_of([digest, round(float(start), 4), round(whole_seconds(float(seconds)), 4)])
                row += 1
        return cls(
            corpus,
            keys,
            np.concatenate([part.columns["speaker"] + first for part, first in zip(parts, speakers, strict=False)],
                           dtype=np.int32),
            [name for part in parts for name in part.speakers],
            {split: (rows[i], rows[i + 1]) for i, split in enumerate(SPLITS)},
            {split: (speakers[i], speakers[i + 1]) for i, split in enumerate(SPLITS)},
        )  # fmt: skip

    def utterance(self, row: int) -> Utterance:
        """The utterance of a row."""
        split = next(split for split in SPLITS if row < self.splits[split][1])
        return self.corpus.parts[split][row - self.splits[split][0]]


class _Ids(Rows[str]):
    """The ids of the utterances, by row."""

    def __init__(self, contents: BankContents) -> None:
        self.contents = contents

    def __len__(self) -> int:
        return len(self.contents.keys)

    def at(self, row: int) -> str:
        return self.contents.utterance(row).id

    def __iter__(self) -> Iterator[str]:
        for split in SPLITS:
            yield from self.contents.corpus.parts[split].ids()


class _Roles:
    """The conditioning and the scoring segments of every speaker.

    Attributes:
        keys: (Q, 32) of the segments, speaker by speaker, those for conditioning first.
        seconds: (Q,) lengths, in s.
        ends: (P, 2) where the conditioning and the scoring segments of a speaker end in both.
        speaker_keys: (P, 32) keys of a speaker's segments.
        pieces: key to each segment that is not a whole utterance.
    """

    def __init__(self, corpus: Corpus) -> None:
        keys, seconds, ends, speakers = bytearray(), [], [], bytearray()
        self.pieces: dict[bytes, Segment] = {}
        for split in SPLITS:
            if not len(corpus.parts[split]):
                continue
            references = References(corpus, split)
            for speaker in references.speakers:
                hexes: list[list[str]] = []
                for segments in (references.conditioning(speaker), references.scoring(speaker)):
                    hexes.append([])
                    for segment in segments:
                        utterance = corpus.utterance(segment.utterance)
                        key = segment_key(utterance, segment).tobytes()
                        if segment != whole_segment(utterance):
                            self.pieces[key] = segment
                        hexes[-1].append(key.hex())
                        keys += key
                        seconds.append(segment.seconds)
                    ends.append(len(seconds))
                speakers += key_of(hexes).tobytes()
        self.keys, self.speaker_keys = (np.frombuffer(bytes(b), np.uint8).reshape(-1, 32) for b in (keys, speakers))
        self.seconds = np.array(seconds)
        self.ends = np.array(ends).reshape(-1, 2)

    def of(self, label: int) -> tuple[slice, slice]:
        """Where the conditioning and the scoring segments of a speaker are."""
        first = int(self.ends[label - 1, 1]) if label else 0
        middle, last = self.ends[label].tolist()
        return slice(first, middle), slice(middle, last)


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
    workers: int | Cluster = 0,
    progress: Callable[[int, int], None] | None = None,
    wait_for_others: bool = False,
) -> BuildResult:
    """Build or update the bank at `folder`; only audio that it does not contain is embedded.

    The bits of the result depend only on corpus and encoder: not on the number of processes, on interruptions, or on an
    older bank.

    Args:
        corpus: the speech.
        folder: of the bank; created if missing.
        spec: the speaker encoder.
        workers: number of processes, of one thread each; 0: one per core, or none if there is little to embed. Or a
            cluster; the audio files have the same paths on its machines.
        progress: called with (segments embedded, segments in all).
        wait_for_others: wait for another command that builds the bank, instead of the error.

    Raises:
        UserError: if the folder contains the bank of another encoder, another command is building it, or an embedding
            has NaN or infinite values.
    """
    encoder = spec.load()
    with locked(folder, "is building the bank", wait=wait_for_others):
        old = open_bank(folder, encoder=encoder) if (folder / HEADER).is_file() else None
        if old is not None:
            old.verify()
        contents, roles = BankContents.of(corpus), _Roles(corpus)
        old_speakers = np.full(len(contents.speakers), -1) if old is None else old.find_speakers(roles.speaker_keys)
        pieces = _pieces(roles, old_speakers)
        keys = np.concatenate([contents.keys, *(np.frombuffer(key, np.uint8).reshape(1, 32) for key in pieces)])
        known = _Known(old, folder / f"partial-{encoder.digest[:16]}", encoder.dim)
        known.find(keys)
        first = np.unique(_as_bytes(keys), return_index=True)[1]  # the same audio twice is embedded once
        missing = np.sort(first[known.missing[first]])
        segments = list(pieces.values())

        def job(row: int) -> Job:
            if row >= len(contents.keys):
                segment = segments[row - len(contents.keys)]
                return corpus.utterance(segment.utterance), segment
            utterance = contents.utterance(row)
            return utterance, whole_segment(utterance)

        done = 0
        for rows, embeddings in _embed_chunks(missing, job, encoder, spec, workers):
            known.add(keys[rows], embeddings)
            done += len(rows)
            if progress:
                progress(done, len(missing))
        known.find(keys)
        conditioning, reference = _speaker_means(roles, keys, known, old, old_speakers)
        bank = write_bank(
            folder,
            encoder=EncoderIdentity(encoder.name, encoder.dim, encoder.digest),
            arrays={
                "embeddings": known.gathered(len(contents.keys)),
                "labels": contents.labels,
                "keys": contents.keys,
                "conditioning": conditioning,
                "reference": reference,
                "speaker_keys": roles.speaker_keys,
            },
            ids=_Ids(contents),
            names=contents.speakers,
            splits=contents.splits,
            speaker_splits=contents.speaker_splits,
        )
        write_json(folder / CORPUS, {"digest": corpus.digest, "audio": bank.header.audio})
        shutil.rmtree(known.folder, ignore_errors=True)
    return BuildResult(bank, embedded=len(missing), reused=len(first) - len(missing))


def check_is_of(bank: Bank, corpus: Corpus) -> None:
    """Raise UserError unless a bank was made of the audio and the speakers of this corpus."""
    try:
        stored = parse_json((bank.folder / CORPUS).read_text())
    except (OSError, ValueError):
        stored = None  # of an interrupted build: compared by the keys of all utterances
    if stored == {"digest": corpus.digest, "audio": bank.header.audio}:
        return
    contents = BankContents.of(corpus)
    if audio_digest(contents.keys, contents.labels) != bank.header.audio:
        raise UserError(
            f"{bank.folder} is stale: it was made of other audio than {corpus.root}; bring it up to date with "
            f"`runner index build --data {corpus.root} --encoder {bank.header.encoder} --out {bank.folder}`"
        )


def _pieces(roles: _Roles, old_speakers: NDArray[np.int64]) -> dict[bytes, Segment]:
    """The segments, other than whole utterances, of the speakers that an older bank does not have, by key."""
    pieces = {}
    for label in np.flatnonzero(old_speakers < 0).tolist():
        conditioning, scoring = roles.of(label)
        for key in (row.tobytes() for row in roles.keys[conditioning.start : scoring.stop]):
            if key in roles.pieces:
                pieces[key] = roles.pieces[key]
    return pieces


def _as_bytes(keys: NDArray[np.uint8]) -> NDArray[np.void]:
    return np.ascontiguousarray(keys).view("V32").ravel().view("S32")


class _Known:
    """Embeddings by key: those of an older bank, and those that this build or an interrupted one has computed.

    The latter are appended to a file of records, so that an interrupted build loses the last one at most.

    Args:
        old: the older bank.
        folder: of the file.
        dim: S.
    """

    def __init__(self, old: Bank | None, folder: Path, dim: int) -> None:
        self.old = old
        self.folder = folder
        self.file = folder / "embeddings.bin"
        self.kind = np.dtype([("key", np.uint8, 32), ("embedding", np.float32, dim)])
        folder.mkdir(parents=True, exist_ok=True)
        with self.file.open("ab") as file:
            file.truncate(file.tell() // self.kind.itemsize * self.kind.itemsize)
        self._sound = np.concatenate([np.zeros(0, bool), *map(_has_unit_norm, self._slabs())])

    def _slabs(self) -> Iterator[NDArray[np.float32]]:
        records = self._records()
        for first in range(0, len(records), _SLAB):
            yield records["embedding"][first : first + _SLAB]

    def _records(self) -> NDArray[np.void]:
        if not self.file.stat().st_size:
            return np.empty(0, self.kind)
        return np.memmap(self.file, self.kind, mode="r")

    def add(self, keys: NDArray[np.uint8], embeddings: NDArray[np.float32]) -> None:
        """Store embeddings (K, S) under keys (K, 32)."""
        records = np.empty(len(keys), self.kind)
        records["key"], records["embedding"] = keys, embeddings
        with self.file.open("ab") as file:
            file.write(records.tobytes())

    def find(self, keys: NDArray[np.uint8]) -> None:
        """Look up keys (R, 32): then `missing` (R,) tells which are not there, and `at` gives the others."""
        self._records_now = self._records()
        stored = self._records_now["key"].copy()
        stored[: len(self._sound)][~self._sound] = 0  # what a loss of power has left
        self._rows = find_rows(stored, keys)
        self._old_rows = np.full(len(keys), -1) if self.old is None else self.old.find(keys)
        self.missing = (self._rows < 0) & (self._old_rows < 0)

    def at(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """The embeddings (K, S) of the keys at `rows` of the latest `find`."""
        found = np.empty((len(rows), self.kind["embedding"].shape[0]), np.float32)
        of_old = self._old_rows[rows] >= 0
        if self.old is not None:
            found[of_old] = self.old.embeddings[self._old_rows[rows[of_old]]]
        found[~of_old] = self._records_now["embedding"][self._rows[rows[~of_old]]]
        return found

    def gathered(self, count: int) -> NDArray[np.float32]:
        """The embeddings (count, S) of the first keys, in a memory-mapped file."""
        shape, path = (count, self.kind["embedding"].shape[0]), self.folder / "embeddings.npy"
        whole: NDArray[np.float32] = open_memmap(path, "w+", np.float32, shape)
        if hasattr(os, "posix_fallocate"):  # on a full disk, an error here instead of a signal at the first write
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        for first in range(0, count, _SLAB):
            whole[first : first + _SLAB] = self.at(np.arange(first, min(first + _SLAB, count)))
        return whole


def _has_unit_norm(embeddings: NDArray[np.float32]) -> NDArray[np.bool_]:
    near: NDArray[np.bool_] = np.abs(np.linalg.norm(embeddings, axis=1) - 1) < 1e-3
    return near


class _Chunk(NamedTuple):
    """Rows of segments that are embedded together."""

    rows: NDArray[np.int64]

    def __str__(self) -> str:
        return f"embeddings of {len(self.rows)} segments"


def _embed_chunks(
    rows: NDArray[np.int64],
    job: Callable[[int], Job],
    encoder: SpeakerEncoder,
    spec: EncoderSpec,
    workers: int | Cluster,
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """The rows in chunks, each with its embeddings (K, S), in the order in which they are done."""
    chunks = [rows[first : first + _CHUNK] for first in range(0, len(rows), _CHUNK)]
    if isinstance(workers, Cluster):
        work = partial(_embed_on_machine, spec, encoder.digest)
        for chunk_of_rows, embeddings in workers.run(
            work, [_Chunk(chunk) for chunk in chunks], pack=lambda one: [job(row) for row in one.rows.tolist()]
        ):
            yield chunk_of_rows.rows, embeddings
        return
    processes = min(workers, len(chunks)) if workers else min(cores(), -(-len(chunks) // _MIN_CHUNKS))
    if processes <= 1:
        for chunk in chunks:
            yield chunk, _embed(encoder, [job(row) for row in chunk.tolist()])
        return
    arguments = (spec, encoder.digest)
    with ProcessPoolExecutor(processes, get_context("spawn"), initializer=_start_worker, initargs=arguments) as pool:
        running: dict[Future[NDArray[np.float32]], NDArray[np.int64]] = {}
        try:
            for number, chunk in enumerate(chunks, 1):
                running[pool.submit(_embed_in_worker, [job(row) for row in chunk.tolist()])] = chunk
                while len(running) >= _AHEAD * processes or (running and number == len(chunks)):
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        yield running.pop(future), future.result()
        except BrokenProcessPool:
            raise UserError("a worker process was killed; run the same command again to continue") from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


@lru_cache(maxsize=1)
def _loaded(spec: EncoderSpec) -> SpeakerEncoder:
    return spec.load()


def _embed_on_machine(
    spec: EncoderSpec, digest: str, jobs: Sequence[Job], console: WorkerConsole
) -> NDArray[np.float32]:
    """The embeddings (K, S) of K jobs, in a process of a cluster."""
    encoder = _loaded(spec)
    if encoder.digest != digest:
        raise UserError(
            f"{console.host} has another {spec.name} (digest {encoder.digest[:12]}; the command has {digest[:12]})"
        )
    return _embed(encoder, jobs)


def _embed(encoder: SpeakerEncoder, jobs: Sequence[Job]) -> NDArray[np.float32]:
    """The embeddings (K, S) of K jobs, computed as in training."""
    return np.stack([segment_embedding(encoder, utterance, segment).numpy() for utterance, segment in jobs])


_WORKER_ENCODER: list[SpeakerEncoder] = []  # of a worker process


def _start_worker(spec: EncoderSpec, digest: str) -> None:
    """Set up a worker process: one thread, its own encoder, no reaction to Ctrl-C, and an exit with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=exit_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    encoder = spec.load()
    assert encoder.digest == digest, "the encoder's digest differs between processes"
    _WORKER_ENCODER.append(encoder)


def _embed_in_worker(jobs: Sequence[Job]) -> NDArray[np.float32]:
    return _embed(_WORKER_ENCODER[0], jobs)


def _speaker_means(
    roles: _Roles, keys: NDArray[np.uint8], known: _Known, old: Bank | None, old_speakers: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Conditioning and reference embeddings (P, S), as in `speaker_embeddings`; from the old bank if unchanged."""
    rows = find_rows(keys, roles.keys)
    means = tuple(np.empty((len(old_speakers), known.kind["embedding"].shape[0]), np.float32) for _ in range(2))
    for label, row in enumerate(old_speakers.tolist()):
        if row >= 0:
            assert old is not None
            means[0][label], means[1][label] = old.conditioning[row], old.reference[row]
            continue
        for of_role, part in zip(means, roles.of(label), strict=True):
            embeddings = [torch.from_numpy(embedding) for embedding in known.at(rows[part])]
            of_role[label] = weighted_mean(embeddings, roles.seconds[part].tolist()).numpy()
    return means[0], means[1]
