"""No ranking by what the arms learn from: a judge must be another encoder than the teacher, and hear otherwise."""

from __future__ import annotations

import hashlib
import json

import torch
from torch import Tensor

from runner.data import Corpus
from runner.data.content import cache_folder
from runner.data.corpus import SPLITS, Segment, Utterance, digest_of
from runner.embeddings import segment_embedding
from snac_core import atomic
from snac_core.errors import UserError
from snac_core.plugins import Catalogue
from snac_core.speakers.encoder import SpeakerEncoder

CORRELATED = 0.98
"""Pearson correlation of two encoders' scores of the same trials above which they are one encoder for this purpose."""
SPEAKERS, UTTERANCES = 40, 2  # most speakers of a corpus, and utterances of each, that are trials
SECONDS = 4.0  # most of an utterance, in s
FEWEST = 15  # scores: a correlation over fewer says nothing


def check_judge(judge: SpeakerEncoder, teacher: SpeakerEncoder, catalogue: Catalogue) -> None:
    """Refuse to rank on an encoder that the arms learn from: by name, family and digest."""
    if judge.name == teacher.name or judge.family == teacher.family or judge.digest == teacher.digest:
        raise UserError(
            f"judge {judge.name!r} (family {judge.family}) is of the same family as the teacher {teacher.name!r}; "
            f"a ranking by what the arms learn from says nothing; {_that_would_do(catalogue, teacher)}"
        )


def check_scores(judge: SpeakerEncoder, teacher: SpeakerEncoder, corpus: Corpus, catalogue: Catalogue) -> None:
    """Refuse to rank on an encoder that scores the study's own speech as the teacher does, whatever it is called."""
    correlation = score_correlation(judge, teacher, corpus)
    if correlation is not None and correlation > CORRELATED:
        raise UserError(
            f"judge {judge.name!r} scores real trials of {corpus.name} as the teacher {teacher.name!r} does "
            f"(correlation {correlation:.4f}, above {CORRELATED}); a ranking by what the arms learn from says nothing; "
            f"{_that_would_do(catalogue, teacher, judge)}"
        )


def score_correlation(one: SpeakerEncoder, other: SpeakerEncoder, corpus: Corpus) -> float | None:
    """Pearson correlation of two encoders' cosines over all pairs of some utterances; None where there are too few.

    The utterances are the first two of at most 40 speakers, both by a hash. The answer is kept in the cache folder.
    """
    utterances = _chosen(corpus)
    if len(utterances) * (len(utterances) - 1) // 2 < FEWEST:
        return None
    key = digest_of(["correlation 1", one.digest, other.digest, [[u.digest, u.start, u.seconds] for u in utterances]])
    path = cache_folder() / "correlations" / f"{key}.json"
    try:
        return float(json.loads(path.read_text())["correlation"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not there yet, or damaged
    found = float(torch.corrcoef(torch.stack([_cosines(encoder, utterances) for encoder in (one, other)]))[0, 1])
    found = found if found == found else 1.0  # an encoder that gives every pair one score judges nothing
    atomic.write_json(path, {"correlation": found, "encoders": [one.name, other.name], "utterances": len(utterances)})
    return found


def _chosen(corpus: Corpus) -> list[Utterance]:
    def order(name: str) -> bytes:
        return hashlib.sha256(name.encode()).digest()

    speakers = sorted((s for split in SPLITS for s in corpus.speakers(split)), key=order)[:SPEAKERS]
    return [u for s in speakers for u in sorted(corpus.of_speaker(s), key=lambda u: order(u.id))[:UTTERANCES]]


def _cosines(encoder: SpeakerEncoder, utterances: list[Utterance]) -> Tensor:
    """(N (N - 1) / 2,) cosines of all pairs."""
    embeddings = torch.stack([segment_embedding(encoder, u, Segment(u.id, 0.0, SECONDS)) for u in utterances]).double()
    above = torch.triu_indices(len(utterances), len(utterances), 1)
    return (embeddings @ embeddings.T)[above[0], above[1]]


def _that_would_do(catalogue: Catalogue, *refused: SpeakerEncoder) -> str:
    """Trained encoders of other families, as the end of an error message."""
    kinds = {name: catalogue.speaker_encoders[name] for name in catalogue.speaker_encoders}
    names = [
        name
        for name, kind in kinds.items()
        if name not in {encoder.name for encoder in refused}
        and kind.family not in {encoder.family for encoder in refused}
        and kind.training_data != "untrained"
    ]
    return f"judges that would do: {', '.join(names) or 'none'}"
