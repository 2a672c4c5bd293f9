"""How a judge scores real speech: at which cosine it takes two stretches for one speaker, and how often it errs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from runner.data import Corpus, References
from runner.data.content import cache_folder
from runner.data.corpus import digest_of
from runner.embeddings import speaker_embeddings
from runner.encoders.trials import (
    Part,
    Verification,
    after_codec,
    cut,
    embed_parts,
    pair_scores,
    parts_of,
    reference_scores,
)
from snac_core import atomic
from snac_core.codec import SNAC
from snac_core.errors import UserError
from snac_core.speakers.encoder import SpeakerEncoder

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
ACCEPTANCE = "reference x codec"
"""The trials that are like a scored conversion: a codec's output against the mean embedding of a speaker."""
_VERSION = 1  # of the trials below: a calibration by other trials is not read


@dataclass(frozen=True)
class TrialScores:
    """Scores of one kind of trials.

    Attributes:
        eer: equal error rate, 0 to 1.
        threshold: cosine at which misses and false alarms are equally frequent.
        same, different: cosines of trials of one speaker and of two, at `QUANTILES`.
        trials: how many of each.
    """

    eer: float
    threshold: float
    same: tuple[float, ...]
    different: tuple[float, ...]
    trials: tuple[int, int]


@dataclass(frozen=True)
class Calibration:
    """A judge's scores on real speech.

    Attributes:
        judge, base, data: names of encoder, codec and corpus.
        digests: of "judge", "base" and "data".
        splits: whose speakers were told apart.
        kinds: by kind of trial. Parts of 3 s against parts: "recorded", "codec" (both sides resynthesised) and
            "recorded x codec". A part against a speaker's mean embedding: "reference x recorded", "reference x codec".
    """

    judge: str
    base: str
    data: str
    digests: dict[str, str]
    splits: tuple[str, ...]
    kinds: dict[str, TrialScores]

    @property
    def threshold(self) -> float:
        """Cosine of a codec's output to a speaker's mean embedding from which on it is accepted as that speaker."""
        return self.kinds[ACCEPTANCE].threshold

    def accepted(self, cosines: Sequence[float]) -> float:
        """The share of these cosines (outputs to their targets' mean embeddings) that are accepted; at least one."""
        return sum(cosine >= self.threshold for cosine in cosines) / len(cosines)


def calibrate(
    judge: SpeakerEncoder,
    corpus: Corpus,
    codec: SNAC,
    *,
    base: str,
    splits: Sequence[str] = ("dev",),
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[Calibration, Path]:
    """Score real trials, as recorded and after the codec, and keep the outcome under the digests of all involved.

    Args:
        judge: the encoder.
        corpus: the speech.
        codec: resynthesises the trials; frozen.
        base: its name.
        splits: whose speakers are told apart.
        progress: called with (text, done, of how many).

    Returns:
        the calibration, and the file that holds it.

    Raises:
        UserError: if there are fewer than two speakers, no parts of 2 s, or no two parts of one speaker.
    """
    rate = judge.sample_rate
    parts = parts_of(corpus, splits, rate)
    references: dict[str, Tensor] = {}
    probes: list[Part] = []  # of audio that the mean embeddings are not made of
    for split in splits:
        roles = References(corpus, split)
        scoring = {speaker: roles.scoring(speaker) for speaker in roles.speakers}
        references |= speaker_embeddings(corpus, scoring, judge)
        probes += cut(corpus, (segment for speaker in roles.speakers for segment in roles.source(speaker)), rate)
    where = f"{corpus.root}, {' and '.join(splits)}"
    if not parts or not probes:
        raise UserError(f"{where}: no stretch of 2 s to compare speakers by; a judge is calibrated on real speech")
    coded: list[Part] = []
    for number, part in enumerate([*parts, *probes]):
        coded += after_codec([part], codec, rate)
        if progress:
            progress(f"{base} on {' and '.join(splits)} speech", number + 1, len(parts) + len(probes))
    recorded, resynthesised = _embedded(parts, judge), _embedded(coded[: len(parts)], judge)
    probed, probed_coded = _embedded(probes, judge), _embedded(coded[len(parts) :], judge)
    scores = {
        "recorded": pair_scores(parts, recorded),
        "codec": pair_scores(parts, resynthesised),
        "recorded x codec": pair_scores(parts, recorded, resynthesised),
        "reference x recorded": reference_scores(probes, probed, references),
        ACCEPTANCE: reference_scores(probes, probed_coded, references),
    }
    kinds = {kind: _trial_scores(*of, f"{where}: {kind} trials") for kind, of in scores.items()}
    digests = {"judge": judge.digest, "base": codec.digest, "data": corpus.digest}
    calibration = Calibration(judge.name, base, corpus.name, digests, tuple(splits), kinds)
    path = _place(digests, splits)
    atomic.write_json(path, asdict(calibration))
    return calibration, path


def calibration_of(
    judge: SpeakerEncoder, corpus: Corpus, codec: SNAC, splits: Sequence[str] = ("dev",)
) -> Calibration | None:
    """The calibration that `calibrate` kept for this judge, speech and codec; None where there is none."""
    path = _place({"judge": judge.digest, "base": codec.digest, "data": corpus.digest}, splits)
    try:
        stored = json.loads(path.read_text())
        stored["splits"] = tuple(stored["splits"])
        stored["kinds"] = {kind: TrialScores(**_with_tuples(of)) for kind, of in stored["kinds"].items()}
        return Calibration(**stored)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # not there, or damaged: it is made anew by calibrating


def described(calibration: Calibration) -> str:
    """A Markdown table: a line per kind of trial; same and different speakers by their 5, 50 and 95 % quantiles."""
    lines = [
        "| trials | EER % | threshold | same: 5, 50, 95 % | different: 5, 50, 95 % | same | different |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind, of in calibration.kinds.items():
        same, different = (
            ", ".join(f"{by[QUANTILES.index(q)]:.3f}" for q in (0.05, 0.5, 0.95)) for by in (of.same, of.different)
        )
        lines.append(
            f"| {kind} | {100 * of.eer:.1f} | {of.threshold:.3f} | {same} | {different} | {of.trials[0]} | "
            f"{of.trials[1]} |"
        )
    return "\n".join(lines)


def _embedded(parts: Sequence[Part], judge: SpeakerEncoder) -> Tensor:
    device = judge.device

    def embed(audio: Tensor, sample_rate: int) -> Tensor:
        embeddings: Tensor = judge(audio.to(device), sample_rate)
        return embeddings.cpu()

    return embed_parts(parts, embed, judge.sample_rate)


def _trial_scores(same: Tensor, different: Tensor, where: str) -> TrialScores:
    if not len(same) or not len(different):
        lacking = "two stretches of 2 s by one speaker" if not len(same) else "two speakers with 2 s of speech"
        raise UserError(f"{where}: no {lacking}; a judge is calibrated by telling speakers apart")
    if not (same.isfinite().all() and different.isfinite().all()):
        raise UserError(f"{where}: the judge gives NaN or infinite embeddings; expected unit vectors")
    verification = Verification.of(same, different)
    return TrialScores(
        verification.eer, verification.threshold, _quantiles(same), _quantiles(different), verification.trials
    )


def _quantiles(scores: Tensor) -> tuple[float, ...]:
    at = np.quantile(scores.double().numpy(), QUANTILES)
    return tuple(round(float(value), 6) for value in at)


def _with_tuples(stored: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in stored.items()}


def _place(digests: dict[str, str], splits: Sequence[str]) -> Path:
    """Named by the judge first, so that all calibrations of a judge stand together."""
    rest = digest_of([_VERSION, digests, list(splits)])
    return cache_folder() / "calibrations" / digests["judge"][:16] / f"{rest[:32]}.json"
