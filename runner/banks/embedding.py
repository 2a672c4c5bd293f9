"""Embedding stretches of audio by several processes, each chunk written down as soon as it is there."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save

from runner.data import Segment, Utterance
from runner.embeddings import key_of, segment_embedding
from snac_core import atomic
from snac_core.errors import UserError
from snac_core.plugins import discover
from snac_core.speakers import load_speaker_encoder
from snac_core.speakers.encoder import SpeakerEncoder

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
        atomic.write_bytes(partial / f"{name}.safetensors", save({"keys": keys, "embeddings": embeddings}))
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
