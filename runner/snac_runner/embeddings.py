"""Embeddings of utterances and speakers: computed in one way, once per encoder and audio, and remembered on disk.

Embedding banks of corpora: `snac_core.speakers.bank` holds their format, this how they come about.

What a bank of a corpus holds: its utterances in order, and what each speaker's embeddings are made of.

Embedding stretches of audio by several processes, each chunk written down as soon as it is there.

From a corpus to its embedding bank: from where a killed build stopped, and new files only."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors import numpy as safetensors_numpy
from safetensors.torch import load_file, save
from torch import Tensor

from snac_core.errors import UserError
from snac_core.files import write_bytes
from snac_core.plugins import discover
from snac_core.speakers.bank import HEADER, Bank, open_bank, write_bank
from snac_core.speakers.encoder import SpeakerEncoder, load_speaker_encoder
from snac_runner.data.audio import cache_folder, load_audio
from snac_runner.data.corpus import SPLITS, Corpus, Segment, Utterance, digest_of
from snac_runner.data.references import References, whole_of

SECONDS = 8.0
"""Longest stretch embedded at once, in s: long references are heard in parts, and their embeddings averaged."""
_VERSION = 2  # of the computation below: what an older one left in the cache is not read

_log = logging.getLogger(__name__)


def speaker_embeddings(
    corpus: Corpus,
    segments: Mapping[str, Sequence[Segment]],
    encoder: SpeakerEncoder,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Tensor]:
    """The mean embedding (S,), unit norm, of each speaker's segments.

    The answer is a function of the encoder's digest and the audio, and is kept in the cache folder under both. What
    stands in the bank that `runner index build` made of this corpus is read instead of computed; the bits are the same.
    """
    heard = [[speaker, [[*s, corpus.utterance(s.utterance).digest] for s in of]] for speaker, of in segments.items()]
    path = cache_folder() / "embeddings" / f"{digest_of([_VERSION, encoder.digest, SECONDS, heard])}.safetensors"
    try:
        return load_file(path)
    except (OSError, SafetensorError):
        pass  # not there yet, or damaged: computed, and written whole
    known = _banked(corpus, [segment for of in segments.values() for segment in of], encoder)
    found: dict[str, Tensor] = {}
    for number, (speaker, of) in enumerate(segments.items()):
        embeddings = [
            known[s] if s in known else segment_embedding(encoder, corpus.utterance(s.utterance), s) for s in of
        ]
        found[speaker] = pooled(embeddings, [s.seconds for s in of])
        if progress:
            progress(number + 1, len(segments))
    write_bytes(path, save(found))
    return found


def mean_embedding(encoder: SpeakerEncoder, audio: Sequence[Tensor]) -> Tensor:
    """(S,) of unit norm: the mean, weighted by length, of the embeddings of waveforms (1, T) at the encoder's rate."""
    return pooled([waveform_embedding(encoder, wave) for wave in audio], [wave.shape[-1] for wave in audio])


def pooled(embeddings: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """(S,) of unit norm: the weighted mean of embeddings (S,); one alone comes back as it is, bit for bit."""
    if len(embeddings) == 1:
        return embeddings[0]
    total = (torch.stack(list(embeddings)).double() * torch.tensor(weights, dtype=torch.float64).unsqueeze(1)).sum(0)
    return torch.nn.functional.normalize(total, dim=0).float()


def segment_embedding(encoder: SpeakerEncoder, utterance: Utterance, segment: Segment) -> Tensor:
    """(S,) of unit norm: the embedding of a part of an utterance.

    Raises:
        UserError: if the encoder gives NaN or infinite values.
    """
    audio = load_audio(utterance, encoder.sample_rate, start=segment.start, seconds=segment.seconds)
    embedding = waveform_embedding(encoder, audio)
    if not bool(embedding.isfinite().all()):
        raise UserError(
            f"speaker encoder {encoder.name!r} gives NaN or infinite values for {utterance.path}; leave the file out, "
            "or use another encoder"
        )
    return embedding


@torch.no_grad()
def waveform_embedding(encoder: SpeakerEncoder, wave: Tensor) -> Tensor:
    """(S,) of unit norm: the mean, weighted by length, over parts of at most `SECONDS` of a waveform (1, T).

    The waveform is at the encoder's own rate. Each part is embedded by itself, on one thread, so that the bits depend
    neither on what else is in a batch nor on the number of threads.
    """
    total = torch.zeros(encoder.dim)
    device = encoder.device
    pieces = -(-wave.shape[-1] // round(SECONDS * encoder.sample_rate))
    with _one_thread():
        for part in wave.tensor_split(max(1, pieces), dim=-1):
            total += encoder(part.unsqueeze(0).to(device), encoder.sample_rate)[0].cpu() * part.shape[-1]
        return torch.nn.functional.normalize(total, dim=0)


def segment_key(utterance: Utterance, segment: Segment) -> NDArray[np.uint8]:
    """sha256 (32,) of what is heard in a part of an utterance: the file's bytes, and where in it the part lies."""
    heard = [utterance.digest, round(utterance.start + segment.start, 4), round(segment.seconds, 4)]
    return key_of(heard)


def key_of(value: object) -> NDArray[np.uint8]:
    """sha256 (32,) of a value's canonical JSON, with the rules by which audio is embedded."""
    digest = hashlib.sha256(digest_of([_VERSION, SECONDS, value]).encode()).digest()
    return np.frombuffer(digest, dtype=np.uint8)


def bank_folder(corpus: Corpus, encoder: SpeakerEncoder) -> Path:
    """Where the bank of a corpus lies unless told otherwise: one place per encoder and folder of speech."""
    place = hashlib.sha256(str(corpus.root.resolve()).encode()).hexdigest()
    return cache_folder() / "banks" / f"{encoder.name}-{encoder.digest[:12]}-{corpus.name}-{place[:12]}"


def _banked(corpus: Corpus, segments: Sequence[Segment], encoder: SpeakerEncoder) -> dict[Segment, Tensor]:
    """The segments that the corpus's bank knows, where there is one of this very encoder."""
    from snac_core.speakers.bank import HEADER, open_bank

    folder = bank_folder(corpus, encoder)
    if not segments or not (folder / HEADER).is_file():
        return {}
    try:
        bank = open_bank(folder, encoder=encoder)
    except UserError as error:
        _log.warning("%s; embeddings are computed anew", error)
        return {}
    rows = bank.rows_of(np.stack([segment_key(corpus.utterance(s.utterance), s) for s in segments]))
    return {
        segment: torch.from_numpy(np.array(bank.embeddings[row]))
        for segment, row in zip(segments, rows.tolist(), strict=True)
        if row >= 0
    }


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class Wanted:
    """What a bank of a corpus holds.

    Attributes:
        utterances: by row: those of train, then dev, then test.
        keys: (N, 32) of them.
        speakers: by label, likewise.
        labels: (N,) the utterances' speakers.
        roles: the parts that condition, and the parts that score, by label.
        speaker_keys: (P, 32) of both.
        splits, speaker_splits: see `snac_core.speakers.bank.BankHeader`.
    """

    utterances: list[Utterance]
    keys: NDArray[np.uint8]
    speakers: list[str]
    labels: NDArray[np.int32]
    roles: list[tuple[list[Segment], list[Segment]]]
    speaker_keys: NDArray[np.uint8]
    splits: dict[str, tuple[int, int]]
    speaker_splits: dict[str, tuple[int, int]]

    @classmethod
    def of(cls, corpus: Corpus) -> Wanted:
        """What the bank of this corpus holds."""
        utterances: list[Utterance] = []
        speakers: list[str] = []
        roles: list[tuple[list[Segment], list[Segment]]] = []
        splits, speaker_splits = {}, {}
        for split in SPLITS:
            here, voices = corpus.splits.get(split, ()), corpus.speakers(split)
            splits[split] = (len(utterances), len(utterances) + len(here))
            speaker_splits[split] = (len(speakers), len(speakers) + len(voices))
            utterances += here
            speakers += voices
            if voices:
                references = References(corpus, split)
                roles += [(references.conditioning(speaker), references.scoring(speaker)) for speaker in voices]
        number = {speaker: label for label, speaker in enumerate(speakers)}
        return cls(
            utterances,
            np.stack([segment_key(u, whole_of(u)) for u in utterances]),
            speakers,
            np.array([number[u.speaker] for u in utterances], dtype=np.int32),
            roles,
            np.stack([key_of([[_heard(corpus, s) for s in role] for role in both]) for both in roles]),
            splits,
            speaker_splits,
        )


def _heard(corpus: Corpus, segment: Segment) -> str:
    return segment_key(corpus.utterance(segment.utterance), segment).tobytes().hex()


CHUNK = 16  # segments embedded and written down at once: what a killed build loses, for each process
WORTH_A_PROCESS = 4  # chunks: starting a process takes seconds

Known = dict[bytes, NDArray[np.float32]]
Todo = tuple[bytes, Utterance, Segment]


@dataclass(frozen=True)
class EncoderSource:
    """How a process gets the encoder."""

    name: str
    weights: str | None = None
    plugins: tuple[str, ...] = ()
    disable: tuple[str, ...] = ()

    def load(self) -> SpeakerEncoder:
        return load_speaker_encoder(
            self.name, weights=self.weights, plugins=discover(self.plugins, disable=self.disable)
        )


def embed_all(
    todo: Sequence[Todo],
    partial: Path,
    encoder: SpeakerEncoder,
    source: EncoderSource,
    workers: int,
    progress: Callable[[int, int], None] | None,
) -> Known:
    """Embed chunk by chunk, each written down as soon as it is there."""
    chunks = [todo[first : first + CHUNK] for first in range(0, len(todo), CHUNK)]
    found: Known = {}

    def keep(chunk: Sequence[Todo], embeddings: NDArray[np.float32]) -> None:
        keys = np.frombuffer(b"".join(key for key, _, _ in chunk), dtype=np.uint8).reshape(-1, 32)
        name = key_of([key.tobytes().hex() for key in keys]).tobytes().hex()[:32]
        write_bytes(partial / f"{name}.safetensors", safetensors_numpy.save({"keys": keys, "embeddings": embeddings}))
        found.update(zip((key for key, _, _ in chunk), embeddings, strict=True))
        if progress:
            progress(len(found), len(todo))

    processes = min(workers or os.cpu_count() or 1, -(-len(chunks) // WORTH_A_PROCESS) if not workers else len(chunks))
    if processes <= 1:
        for chunk in chunks:
            keep(chunk, _embedded(encoder, [(u, s) for _, u, s in chunk]))
        return found
    start = (source, encoder.digest)
    with ProcessPoolExecutor(processes, get_context("spawn"), initializer=_start, initargs=start) as pool:
        futures = {pool.submit(_in_worker, [(u, s) for _, u, s in chunk]): chunk for chunk in chunks}
        try:
            for future in as_completed(futures):
                keep(futures[future], future.result())
        except BrokenProcessPool:
            raise UserError(
                "a process that embeds was ended from outside; the same command goes on from here"
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return found


def _embedded(encoder: SpeakerEncoder, parts: Sequence[tuple[Utterance, Segment]]) -> NDArray[np.float32]:
    """(K, S) of parts of utterances: what training computes."""
    return np.stack([segment_embedding(encoder, utterance, segment).numpy() for utterance, segment in parts])


_ENCODER: list[SpeakerEncoder] = []  # of a worker process


def _start(source: EncoderSource, digest: str) -> None:
    """Make this process a worker: one thread, its own encoder, Ctrl-C left to the parent, and no life without it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    torch.set_num_threads(1)
    encoder = source.load()
    assert encoder.digest == digest, "the encoder's digest differs between processes"
    _ENCODER.append(encoder)


def _in_worker(parts: Sequence[tuple[Utterance, Segment]]) -> NDArray[np.float32]:
    return _embedded(_ENCODER[0], parts)


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
            stored = safetensors_numpy.load_file(path)
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
