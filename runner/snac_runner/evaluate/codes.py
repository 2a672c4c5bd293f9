"""How conditioning changes the codes: share changed, codebook usage, speakers recognised in them, edits per tap."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from snac_core.codec import SNAC
from snac_core.codec.vq import VectorQuantize
from snac_runner.evaluate.conversions import Conversions

WINDOW = 1.0  # s of speech in a window of the probe
RIDGE = 1e-2  # penalty of the probe, per window and standardised feature

Summary = dict[str, Any]


class SpeakerProbe:
    """A linear classifier of speakers on the codes of each level, trained on the bare codec's codes of real speech.

    Features are the mean and standard deviation of the code vectors in windows of 1 s, standardised. Ridge regression
    gives a score per window and speaker, and an utterance's scores are summed. On an arm's codes it shows which level
    contains the source's voice, and which the target's. The chance level is one in the number of speakers.

    Args:
        codec: frozen.
        conversions: their speakers are the classes, with up to 8 s each of conditioning and of scoring audio.
    """

    def __init__(self, codec: SNAC, conversions: Conversions) -> None:
        self.names = sorted(conversions.pairs.references)
        levels = [level for level in codec.quantizer.quantizers if isinstance(level, VectorQuantize)]
        self.tables = [level.codebook.weight.detach().cpu().double() for level in levels]
        self.windows = [
            max(2, round(WINDOW * codec.sampling_rate / codec.hop_length / stride)) for stride in codec.vq_strides
        ]
        features: list[list[Tensor]] = [[] for _ in self.tables]
        labels: list[list[int]] = [[] for _ in self.tables]
        device = next(codec.parameters()).device
        for number, speaker in enumerate(self.names):
            for role in ("conditioning", "scoring"):
                audio = conversions.target_audio(speaker, role).to(device)
                with torch.no_grad():
                    codes = codec.encode(audio[None, None])
                for level, found in enumerate(codes):
                    x = self._features(found[0].cpu(), level)
                    features[level].append(x)
                    labels[level] += [number] * len(x)
        self.weights = [
            _ridge(torch.cat(x), torch.tensor(y), len(self.names)) for x, y in zip(features, labels, strict=True)
        ]

    def who(self, codes: Sequence[Tensor]) -> list[str]:
        """The speaker recognised in the codes of one utterance (F / stride,), per level."""
        found = []
        for level, (indices, (mean, std, weight)) in enumerate(zip(codes, self.weights, strict=True)):
            x = (self._features(indices, level) - mean) / std
            found.append(self.names[int((F.pad(x, (0, 1), value=1.0) @ weight).sum(0).argmax())])
        return found

    def _features(self, indices: Tensor, level: int) -> Tensor:
        """Features of half-overlapping windows of a level's codes (F,): (windows, 2 D)."""
        vectors = self.tables[level][indices.long()]
        size = min(self.windows[level], len(vectors))
        windows = vectors.unfold(0, size, max(1, size // 2))  # (windows, D, size)
        return torch.cat([windows.mean(-1), windows.std(-1, correction=0)], dim=1)


def _ridge(x: Tensor, labels: Tensor, speakers: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and standard deviation of features x (N, K), and weights (K + 1, speakers) of the standardised features."""
    mean, std = x.mean(0), x.std(0, correction=0).clamp(min=1e-6)
    x = F.pad((x - mean) / std, (0, 1), value=1.0)
    wanted = F.one_hot(labels, speakers).double()
    weight: Tensor = torch.linalg.solve(x.T @ x + RIDGE * len(x) * torch.eye(x.shape[1]).double(), x.T @ wanted)
    return mean, std, weight


def summary(rows: Sequence[Mapping[str, Any]], probe: SpeakerProbe | None) -> Summary:
    """Statistics of the codes of one system over its conversions, per codebook level.

    Args:
        rows: one a conversion, with "codes" and "bare_codes" (lists per level), "edits" (tap to size), and the two
            speakers.
        probe: recognises speakers; None: no probe.

    Returns:
        "changed" (share of codes that differ from the bare codec's), "perplexity", "used" (entries), "probe_source",
        "probe_target" (share of conversions in which the probe recognises them), each a value per level; "edits" (tap
        to the mean relative size of the edit). Empty values are left out.
    """
    coded = [row for row in rows if row["codes"]]
    found: Summary = {}
    if coded:
        depth = len(coded[0]["codes"])
        pooled = [torch.tensor([c for row in coded for c in row["codes"][level]]) for level in range(depth)]
        bare = [torch.tensor([c for row in coded for c in row["bare_codes"][level]]) for level in range(depth)]
        found["changed"] = [float((a != b).double().mean()) for a, b in zip(pooled, bare, strict=True)]
        counts = [torch.bincount(level).double() for level in pooled]
        found["perplexity"] = [_perplexity(c) for c in counts]
        found["used"] = [int((c > 0).sum()) for c in counts]
        if probe is not None:
            recognised = [probe.who([torch.tensor(level) for level in row["codes"]]) for row in coded]
            for role in ("source", "target"):
                hits = [
                    [who == row[f"{role}_speaker"] for who in of] for of, row in zip(recognised, coded, strict=True)
                ]
                found[f"probe_{role}"] = [sum(column) / len(coded) for column in zip(*hits, strict=True)]
            found["probe_speakers"] = len(probe.names)
    taps = list(dict.fromkeys(tap for row in rows for tap in row["edits"]))
    if taps:
        found["edits"] = {tap: sum(row["edits"].get(tap, 0.0) for row in rows) / len(rows) for tap in taps}
    return found


def _perplexity(counts: Tensor) -> float:
    p = counts[counts > 0] / counts.sum()
    return math.exp(-float((p * p.log()).sum()))
