"""Speaker verification trials: how well an encoder distinguishes speakers.

Utterances are cut into parts of about 3 s. Every pair of parts is a trial, either of one speaker (genuine) or of two
speakers (impostor), and the cosine of the two embeddings is its score.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from snac_core.seeding import derive
from snac_runner.data.audio import load_audio, resample
from snac_runner.data.corpus import Corpus, Segment
from snac_runner.evaluate.statistics import equal_error_rate

PART, LEAST = 3.0, 2.0
"""Length of a part, and of the shortest remainder that is a part, too, in s."""
Embed = Callable[[Tensor, int], Tensor]
"""From audio (B, 1, T) and its sample rate in Hz to embeddings (B, S)."""


@dataclass(frozen=True)
class Verification:
    """The result of a set of trials.

    Attributes:
        eer: equal error rate, 0 to 1.
        threshold: cosine at which the shares of misses and of false alarms are equal.
        same, different: mean cosine of the genuine and of the impostor trials.
        trials: number of genuine and of impostor trials.
    """

    eer: float
    threshold: float
    same: float
    different: float
    trials: tuple[int, int]

    @classmethod
    def of(cls, genuine: Tensor, impostor: Tensor) -> Verification:
        """From the scores of genuine trials (G,) and of impostor trials (I,); neither may be empty."""
        eer, threshold = equal_error_rate(genuine.numpy(), impostor.numpy())
        return cls(eer, threshold, genuine.mean().item(), impostor.mean().item(), (len(genuine), len(impostor)))

    def __str__(self) -> str:
        return f"EER {100 * self.eer:.1f} % (same {self.same:.3f}, different {self.different:.3f})"


@dataclass(frozen=True)
class Part:
    """A part of an utterance: audio (1, T)."""

    speaker: str
    utterance: str
    audio: Tensor


def parts_of(
    corpus: Corpus, splits: Sequence[str], sample_rate: int, *, seconds: float = PART, least: float = LEAST
) -> list[Part]:
    """The utterances of the splits, cut into parts; see `cut`."""
    utterances = (u for split in splits for u in corpus.splits.get(split, ()))
    whole = (Segment(u.id, 0.0, u.seconds) for u in utterances)
    return cut(corpus, whole, sample_rate, seconds=seconds, least=least)


def cut(
    corpus: Corpus, segments: Iterable[Segment], sample_rate: int, *, seconds: float = PART, least: float = LEAST
) -> list[Part]:
    """The segments, cut into parts of `seconds`. A remainder of at least `least` seconds is a part, too."""
    parts: list[Part] = []
    for segment in segments:
        utterance = corpus.utterance(segment.utterance)
        audio = load_audio(utterance, sample_rate, start=segment.start, seconds=segment.seconds)
        pieces = torch.split(audio, int(seconds * sample_rate), dim=-1)
        long_enough = (piece for piece in pieces if piece.shape[-1] >= least * sample_rate)
        parts.extend(Part(utterance.speaker, utterance.id, piece) for piece in long_enough)
    return parts


def after_codec(parts: Sequence[Part], codec: nn.Module, sample_rate: int, *, seed: int = 0) -> list[Part]:
    """The parts, resynthesized by the codec. `seed` fixes the codec's noise."""
    codec_rate, device = cast(int, codec.sampling_rate), next(codec.parameters()).device
    coded = []
    for part in parts:
        with torch.random.fork_rng(devices=[]), torch.inference_mode():
            torch.manual_seed(derive(seed, part.utterance, "codec noise"))
            audio = codec(resample(part.audio, sample_rate, codec_rate)[None].to(device))[0][0].cpu()
        coded.append(replace(part, audio=resample(audio.clone(), codec_rate, sample_rate)))
    return coded


def embed_parts(parts: Sequence[Part], embed: Embed, sample_rate: int, *, batch: int = 32) -> Tensor:
    """Embeddings of the parts, (N, S). Parts of equal length go through `embed` in batches."""
    by_length: dict[int, list[int]] = {}
    for index, part in enumerate(parts):
        by_length.setdefault(part.audio.shape[-1], []).append(index)
    found: dict[int, Tensor] = {}
    with torch.inference_mode():
        for indices in by_length.values():
            for start in range(0, len(indices), batch):
                chosen = indices[start : start + batch]
                embeddings = embed(torch.stack([parts[i].audio for i in chosen]), sample_rate)
                found.update(zip(chosen, embeddings, strict=True))
    return torch.stack([found[i] for i in range(len(parts))])


def pair_scores(parts: Sequence[Part], enrolled: Tensor, tested: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Cosines of all pairs of parts: of one speaker (G,), and of two speakers (I,).

    Two parts of one utterance are a trial only if their speaker has no other utterance.

    Args:
        parts: what the embeddings belong to, in order.
        enrolled: (N, S) embeddings of unit norm.
        tested: (N, S) embeddings of the same parts in another form, e.g. after a codec; None: `enrolled`.
    """
    tested = enrolled if tested is None else tested
    cosine = enrolled @ tested.T
    speakers = torch.tensor(_numbered([p.speaker for p in parts]))
    utterances = torch.tensor(_numbered([p.utterance for p in parts]))
    same = speakers[:, None] == speakers
    single = torch.tensor([len(set(utterances[speakers == s].tolist())) == 1 for s in speakers.tolist()])
    apart = (utterances[:, None] != utterances) | single[:, None]
    upper = torch.ones_like(same).triu(1)
    return cosine[same & apart & upper], cosine[~same & upper]


def reference_scores(parts: Sequence[Part], embeddings: Tensor, references: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Cosines of parts to speakers' mean embeddings: to the own speaker's (N,), and to all others' (N * (L - 1),).

    Args:
        parts: what the embeddings belong to, in order.
        embeddings: (N, S), of unit norm.
        references: speaker to mean embedding (S,), of L speakers.
    """
    names = sorted(references)
    cosine = embeddings @ torch.stack([references[name] for name in names]).T
    own = torch.tensor([names.index(part.speaker) for part in parts])[:, None] == torch.arange(len(names))
    return cosine[own], cosine[~own]


def _numbered(names: list[str]) -> list[int]:
    order = {name: index for index, name in enumerate(sorted(set(names)))}
    return [order[name] for name in names]
