"""Embeddings of utterances and speakers: computed in one way, once per encoder and audio, and remembered on disk."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from runner.data import Corpus, Segment, Utterance, load_audio
from runner.data.content import cache_folder
from runner.data.corpus import digest_of
from snac_core import atomic
from snac_core.errors import UserError
from snac_core.speakers.encoder import SpeakerEncoder

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
    atomic.write_bytes(path, save(found))
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
