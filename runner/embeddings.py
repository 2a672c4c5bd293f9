"""Embeddings of speakers, computed once per encoder and corpus and remembered on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from runner.data import Corpus, Segment, load_audio
from runner.data.content import cache_folder
from runner.data.corpus import digest_of
from snac_core import atomic
from snac_core.speakers.encoder import SpeakerEncoder

SECONDS = 8.0
"""Longest stretch embedded at once, in s: long references are heard in parts, and their embeddings averaged."""


def speaker_embeddings(
    corpus: Corpus,
    segments: Mapping[str, Sequence[Segment]],
    encoder: SpeakerEncoder,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Tensor]:
    """The mean embedding (S,), unit norm, of each speaker's segments.

    The answer is a function of the encoder's digest and the audio, and is kept in the cache folder under both.
    """
    heard = [[speaker, [[*s, corpus.utterance(s.utterance).digest] for s in of]] for speaker, of in segments.items()]
    path = cache_folder() / "embeddings" / f"{digest_of([encoder.digest, SECONDS, heard])}.safetensors"
    try:
        return load_file(path)
    except (OSError, SafetensorError):
        pass  # not there yet, or damaged: computed, and written whole
    found: dict[str, Tensor] = {}
    for number, (speaker, of) in enumerate(segments.items()):
        found[speaker] = mean_embedding(encoder, [_audio(corpus, segment, encoder.sample_rate) for segment in of])
        if progress:
            progress(number + 1, len(segments))
    atomic.write_bytes(path, save(found))
    return found


@torch.no_grad()
def mean_embedding(encoder: SpeakerEncoder, audio: Sequence[Tensor]) -> Tensor:
    """(S,) of unit norm: the mean, weighted by length, over parts of at most `SECONDS` of waveforms (1, T).

    Waveforms are at the encoder's own rate. Each part is embedded by itself, so that the result does not depend on
    what else is in a batch.
    """
    total = torch.zeros(encoder.dim)
    device = next(encoder.parameters()).device
    for wave in audio:
        pieces = -(-wave.shape[-1] // round(SECONDS * encoder.sample_rate))
        for part in wave.tensor_split(max(1, pieces), dim=-1):
            total += encoder(part.unsqueeze(0).to(device), encoder.sample_rate)[0].cpu() * part.shape[-1]
    return torch.nn.functional.normalize(total, dim=0)


def _audio(corpus: Corpus, segment: Segment, sample_rate: int) -> Tensor:
    utterance = corpus.utterance(segment.utterance)
    return load_audio(utterance, sample_rate, start=segment.start, seconds=segment.seconds)
