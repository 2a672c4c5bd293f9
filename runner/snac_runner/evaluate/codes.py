"""What the conditioning does inside: codes it changes, how many it uses, who can be heard in them, edits per tap."""

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

WINDOW = 1.0  # s of speech that the probe hears at once
RIDGE = 1e-2  # of the probe, per window and standardised feature

Summary = dict[str, Any]


class SpeakerProbe:
    """A linear classifier of speakers on the codes of each level, learned from the bare codec's codes of real speech.

    It hears windows of 1 s: mean and standard deviation of the code vectors, standardised; ridge regression to one
    column per speaker, the columns of a conversion's windows added up. What it says of an arm's codes tells
    which level carries the source's voice, and which the target's. Chance is one in `speakers`.

    Args:
        codec: frozen; makes the codes.
        conversions: whose speakers are told apart, by up to 8 s each of what conditions and of what scores.
    """

    def __init__(self, codec: SNAC, conversions: Conversions) -> None:
        self.names = sorted(conversions.pairs.references)
        levels = [level for level in codec.quantizer.quantizers if isinstance(level, VectorQuantize)]
        self.tables = [level.codebook.weight.detach().cpu().double() for level in levels]
        self.windows = [
            max(2, round(WINDOW * codec.sampling_rate / codec.hop_length / stride)) for stride in codec.vq_strides
        ]
        heard: list[list[Tensor]] = [[] for _ in self.tables]
        labels: list[list[int]] = [[] for _ in self.tables]
        device = next(codec.parameters()).device
        for number, speaker in enumerate(self.names):
            for role in ("conditioning", "scoring"):
                audio = conversions.target_audio(speaker, role).to(device)
                with torch.no_grad():
                    codes = codec.encode(audio[None, None])
                for level, found in enumerate(codes):
                    x = self._features(found[0].cpu(), level)
                    heard[level].append(x)
                    labels[level] += [number] * len(x)
        self.weights = [
            _ridge(torch.cat(x), torch.tensor(y), len(self.names)) for x, y in zip(heard, labels, strict=True)
        ]

    def who(self, codes: Sequence[Tensor]) -> list[str]:
        """The speaker heard in one utterance's codes (F / stride,), per level."""
        found = []
        for level, (indices, (mean, std, weight)) in enumerate(zip(codes, self.weights, strict=True)):
            x = (self._features(indices, level) - mean) / std
            found.append(self.names[int((F.pad(x, (0, 1), value=1.0) @ weight).sum(0).argmax())])
        return found

    def _features(self, indices: Tensor, level: int) -> Tensor:
        """(windows, 2 D): half-overlapping windows of a level's codes (F,)."""
        vectors = self.tables[level][indices.long()]
        size = min(self.windows[level], len(vectors))
        windows = vectors.unfold(0, size, max(1, size // 2))  # (windows, D, size)
        return torch.cat([windows.mean(-1), windows.std(-1, correction=0)], dim=1)


def _ridge(x: Tensor, labels: Tensor, speakers: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and spread of features x (N, K), and weights (K + 1, speakers) on the standardised ones and a constant."""
    mean, std = x.mean(0), x.std(0, correction=0).clamp(min=1e-6)
    x = F.pad((x - mean) / std, (0, 1), value=1.0)
    wanted = F.one_hot(labels, speakers).double()
    weight: Tensor = torch.linalg.solve(x.T @ x + RIDGE * len(x) * torch.eye(x.shape[1]).double(), x.T @ wanted)
    return mean, std, weight


def summary(rows: Sequence[Mapping[str, Any]], probe: SpeakerProbe | None) -> Summary:
    """Per level, over the conversions of one system: share of codes changed, perplexity, used entries, probe's hits.

    Args:
        rows: each with "codes" and "bare_codes" (lists per level), "edits" (tap to size), and the two speakers.
        probe: None: nobody listens.

    Returns:
        "changed", "perplexity", "used", "probe_source", "probe_target" (a value per level) and "edits" (tap to the
        mean size of the edit there, relative to what was edited); what there is nothing of is left out.
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
            said = [probe.who([torch.tensor(level) for level in row["codes"]]) for row in coded]
            for role in ("source", "target"):
                hits = [[who == row[f"{role}_speaker"] for who in of] for of, row in zip(said, coded, strict=True)]
                found[f"probe_{role}"] = [sum(column) / len(coded) for column in zip(*hits, strict=True)]
            found["probe_speakers"] = len(probe.names)
    taps = list(dict.fromkeys(tap for row in rows for tap in row["edits"]))
    if taps:
        found["edits"] = {tap: sum(row["edits"].get(tap, 0.0) for row in rows) / len(rows) for tap in taps}
    return found


def _perplexity(counts: Tensor) -> float:
    p = counts[counts > 0] / counts.sum()
    return math.exp(-float((p * p.log()).sum()))
