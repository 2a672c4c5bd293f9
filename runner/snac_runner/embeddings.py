"""Speaker embeddings of a corpus: computed from its audio, or read from the cache or the corpus's embedding bank."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from snac_core.errors import UserError
from snac_core.files import write_bytes
from snac_core.speakers.bank import HEADER, open_bank
from snac_core.speakers.encoder import SpeakerEncoder
from snac_runner.data.audio import load_audio, one_thread
from snac_runner.data.cache import cache_folder
from snac_runner.data.corpus import Corpus, Segment, Utterance, digest_of

MAX_SECONDS = 8.0
"""Maximum length that is embedded at once, in s. Longer audio is embedded in parts, which are averaged."""
PART_SECONDS, MIN_PARTS, MAX_PARTS = 2.0, 4, 32  # of the parts that `two_voices` compares
TWO_VOICES = 1.5
"""Ratio of the distances between and within two groups of parts, above which they are of two speakers."""
_VERSION = 2  # of the computation below; cached results of other versions are ignored

_log = logging.getLogger(__name__)


def speaker_embeddings(
    corpus: Corpus,
    segments: Mapping[str, Sequence[Segment]],
    encoder: SpeakerEncoder,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Tensor]:
    """The mean embedding of the segments of each speaker.

    The result depends on the encoder's digest, the audio and, by rounding, the type of device, and is cached under all
    three. Embeddings in the bank of the corpus (`runner index build`) are read instead of computed; they are those of
    the CPU, bit for bit.

    Args:
        corpus: the speech.
        segments: speaker -> segments.
        encoder: the speaker encoder.
        progress: called with (speakers done, speakers in all).

    Returns:
        Speaker -> embedding (S,) of unit norm.

    Raises:
        UserError: if the encoder returns NaN or infinite values.
    """

    def identified(segment: Segment) -> list[object]:
        utterance = corpus.utterance(segment.utterance)
        return [*segment, utterance.digest, utterance.start]

    content = [[speaker, [identified(s) for s in of]] for speaker, of in segments.items()]
    elsewhere = [encoder.device.type] if encoder.device.type != "cpu" else []
    key = digest_of([_VERSION, encoder.digest, MAX_SECONDS, content, *elsewhere])
    path = cache_folder() / "embeddings" / f"{key}.safetensors"
    try:
        return load_file(path)
    except (OSError, SafetensorError):
        pass  # not cached, or damaged
    banked = _from_bank(corpus, [segment for of in segments.values() for segment in of], encoder)
    means: dict[str, Tensor] = {}
    for done, (speaker, of) in enumerate(segments.items(), 1):
        embeddings = [
            banked[s] if s in banked else segment_embedding(encoder, corpus.utterance(s.utterance), s) for s in of
        ]
        means[speaker] = weighted_mean(embeddings, [s.seconds for s in of])
        if progress:
            progress(done, len(segments))
    write_bytes(path, save(means))
    return means


def mean_embedding(encoder: SpeakerEncoder, audio: Sequence[Tensor]) -> Tensor:
    """The mean embedding (S,), weighted by length, of waveforms (1, T) at the encoder's sample rate; unit norm."""
    return weighted_mean([waveform_embedding(encoder, wave) for wave in audio], [wave.shape[-1] for wave in audio])


def weighted_mean(embeddings: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The weighted mean (S,) of embeddings (S,), of unit norm; a single embedding is returned unchanged."""
    if len(embeddings) == 1:
        return embeddings[0].clone()  # several parts of a speaker can be one segment, and files hold no shared memory
    total = (torch.stack(list(embeddings)).double() * torch.tensor(weights, dtype=torch.float64).unsqueeze(1)).sum(0)
    return torch.nn.functional.normalize(total, dim=0).float()


def segment_embedding(encoder: SpeakerEncoder, utterance: Utterance, segment: Segment) -> Tensor:
    """The embedding (S,) of a segment of an utterance; unit norm.

    Raises:
        UserError: if the encoder returns NaN or infinite values.
    """
    audio = load_audio(utterance, encoder.sample_rate, start=segment.start, seconds=segment.seconds)
    embedding = waveform_embedding(encoder, audio)
    if not bool(embedding.isfinite().all()):
        raise UserError(
            f"speaker encoder {encoder.name!r} returns NaN or infinite values for {utterance.path}; exclude the file, "
            "or use another encoder"
        )
    return embedding


@torch.no_grad()
def waveform_embedding(encoder: SpeakerEncoder, wave: Tensor) -> Tensor:
    """The embedding (S,) of a waveform (1, T) at the encoder's sample rate; unit norm.

    It is the mean, weighted by length, over parts of at most `MAX_SECONDS`. Each part is embedded alone and on one
    thread, so that the bits depend neither on a batch nor on the number of threads.
    """
    total = torch.zeros(encoder.dim)
    parts = max(1, -(-wave.shape[-1] // round(MAX_SECONDS * encoder.sample_rate)))
    with one_thread():
        for part in wave.tensor_split(parts, dim=-1):
            total += encoder(part.unsqueeze(0).to(encoder.device), encoder.sample_rate)[0].cpu() * part.shape[-1]
        return torch.nn.functional.normalize(total, dim=0)


@torch.no_grad()
def two_voices(encoder: SpeakerEncoder, audio: Sequence[Tensor]) -> list[int]:
    """Which of several recordings seem to be of another speaker than the rest.

    Parts of `PART_SECONDS` are embedded and divided in two groups along the direction in which they differ most. They
    are of two speakers if the mean cosine distance between the groups is more than `TWO_VOICES` times that within them.
    Of 8 to 16 s of one recorded speaker, 0 to 2 % are reported with `ecapa_tiny`; of two speakers in turn, 86 to 95 %.

    Args:
        encoder: the speaker encoder.
        audio: waveforms (1, T) at the encoder's sample rate.

    Returns:
        Indices into `audio` of the recordings with parts in the smaller group; empty if all parts seem to be of one
        speaker, or there are fewer than `MIN_PARTS`.
    """
    length = round(PART_SECONDS * encoder.sample_rate)
    parts = [
        (i, wave[:, start : start + length])
        for i, wave in enumerate(audio)
        for start in range(0, wave.shape[-1] - length + 1, length)
    ]
    parts = parts[:: -(-len(parts) // MAX_PARTS) or 1]
    if len(parts) < MIN_PARTS:
        return []
    with one_thread():
        embeddings = torch.cat([encoder(p.unsqueeze(0).to(encoder.device), encoder.sample_rate) for _, p in parts])
    rows = torch.nn.functional.normalize(embeddings.cpu().double(), dim=1)
    direction = torch.linalg.svd(rows - rows.mean(0), full_matrices=False).Vh[0]
    second = (rows - rows.mean(0)) @ direction > 0
    if second.sum() > len(rows) / 2:
        second = ~second
    distance = 1 - rows @ rows.T
    groups = [distance[group][:, group] for group in (second, ~second)]
    if min(map(len, groups)) < 2:  # one part that differs: a noise, or a laugh
        return []
    within = sum(float(d.sum()) / (len(d) * (len(d) - 1)) for d in groups) / 2
    if float(distance[second][:, ~second].mean()) <= TWO_VOICES * within:
        return []
    return sorted({i for (i, _), other in zip(parts, second.tolist(), strict=True) if other})


def segment_key(utterance: Utterance, segment: Segment) -> NDArray[np.uint8]:
    """sha256 (32,) that identifies the audio of a segment: the digest of the file, and the position in it."""
    return key_of([utterance.digest, round(utterance.start + segment.start, 4), round(segment.seconds, 4)])


def key_of(value: object) -> NDArray[np.uint8]:
    """sha256 (32,) of a value's canonical JSON and of the version of the computation of embeddings."""
    digest = hashlib.sha256(digest_of([_VERSION, MAX_SECONDS, value]).encode()).digest()
    return np.frombuffer(digest, dtype=np.uint8)


def bank_folder(corpus: Corpus, encoder: SpeakerEncoder) -> Path:
    """The default folder of a corpus's bank: one per encoder and corpus folder, in the cache folder."""
    root = hashlib.sha256(str(corpus.root.resolve()).encode()).hexdigest()
    return cache_folder() / "banks" / f"{encoder.name}-{encoder.digest[:12]}-{corpus.name}-{root[:12]}"


def _from_bank(corpus: Corpus, segments: Sequence[Segment], encoder: SpeakerEncoder) -> dict[Segment, Tensor]:
    """The embeddings of those segments that are in the corpus's default bank; empty if there is no such bank."""
    folder = bank_folder(corpus, encoder)
    if not segments or not (folder / HEADER).is_file():
        return {}
    try:
        bank = open_bank(folder, encoder=encoder)
    except UserError as error:
        _log.warning("%s; the embeddings are computed instead", error)
        return {}
    rows = bank.find(np.stack([segment_key(corpus.utterance(s.utterance), s) for s in segments]))
    return {
        segment: torch.from_numpy(np.array(bank.embeddings[row]))
        for segment, row in zip(segments, rows.tolist(), strict=True)
        if row >= 0
    }
