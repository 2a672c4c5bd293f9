"""Which encoders may be judges, and what their scores mean on real speech.

A judge must not be the encoder that the arms learn from, under any name. So its name, family and digest, and its scores
of the study's own speech, are compared with those of the conditioning encoder. `calibrate` measures a judge on
verification trials of real speech: its equal error rate, and the cosine from which on it accepts a speaker.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from snac_core.codec import SNAC
from snac_core.errors import UserError
from snac_core.files import parse_json, write_json
from snac_core.plugins import Catalogue
from snac_core.speakers.encoder import SpeakerEncoder, load_speaker_encoder
from snac_runner.console import SILENT, Console
from snac_runner.data.cache import cache_folder
from snac_runner.data.corpus import SPLITS, Corpus, Segment, Utterance, digest_of
from snac_runner.data.references import References
from snac_runner.embeddings import segment_embedding, speaker_embeddings
from snac_runner.evaluate.verification import (
    LEAST,
    PART,
    Part,
    Verification,
    after_codec,
    cut,
    embed_parts,
    pair_scores,
    reference_scores,
)

CORRELATED = 0.98
"""Two encoders whose scores of the same trials have a higher Pearson correlation count as one encoder."""
SPEAKERS, UTTERANCES = 40, 2  # of a corpus, and of each speaker, at most
SECONDS = 4.0  # of an utterance, at most
FEWEST = 15  # scores that a correlation needs


def load_judges(names: Sequence[str], catalogue: Catalogue) -> tuple[SpeakerEncoder, ...]:
    """Judges by name, or as NAME:FILE with the file of their weights.

    Raises:
        UserError: for an unknown name, weights that are missing or do not fit, or the same judge twice.
    """
    judges: list[SpeakerEncoder] = []
    for given in names:
        name, _, file = given.partition(":")
        judge = load_speaker_encoder(name.strip(), weights=file.strip() or None, plugins=catalogue)
        if judge.name in [other.name for other in judges]:
            raise UserError(f"judge {judge.name!r} is listed twice; every further judge is another encoder")
        judges.append(judge)
    return tuple(judges)


def check_judges(
    judges: Sequence[SpeakerEncoder], speaker_encoder: SpeakerEncoder, corpus: Corpus, catalogue: Catalogue
) -> None:
    """Refuse a judge that arms learn from, under any name, and two judges that are one.

    Raises:
        UserError: see `check_judge` and `check_scores`; or if the scores of two judges have a correlation above
            `CORRELATED`.
    """
    for judge in judges:
        check_judge(judge, speaker_encoder, catalogue)
        check_scores(judge, speaker_encoder, corpus, catalogue)
    for one, other in combinations(judges, 2):
        correlation = score_correlation(one, other, corpus)
        if correlation is not None and correlation > CORRELATED:
            raise UserError(
                f"judges {one.name!r} and {other.name!r} score real trials of {corpus.name} alike (correlation "
                f"{correlation:.4f}, above {CORRELATED}): their agreement would show nothing; leave one of them out"
            )


def check_judge(judge: SpeakerEncoder, speaker_encoder: SpeakerEncoder, catalogue: Catalogue) -> None:
    """Refuse a judge that is the conditioning encoder or of its family.

    Raises:
        UserError: if name, family or digest of the two encoders are equal.
    """
    if (
        judge.name == speaker_encoder.name
        or judge.family == speaker_encoder.family
        or judge.digest == speaker_encoder.digest
    ):
        raise UserError(
            f"judge {judge.name!r} (family {judge.family}) is of the same family as the conditioning encoder "
            f"{speaker_encoder.name!r}, so its ranking would only show what the arms were trained on; "
            f"{_alternatives(catalogue, speaker_encoder)}"
        )


def check_scores(judge: SpeakerEncoder, speaker_encoder: SpeakerEncoder, corpus: Corpus, catalogue: Catalogue) -> None:
    """Refuse a judge that scores the study's own speech as the conditioning encoder does, under any name.

    Raises:
        UserError: if the scores of the two encoders have a correlation above `CORRELATED`.
    """
    correlation = score_correlation(judge, speaker_encoder, corpus)
    if correlation is not None and correlation > CORRELATED:
        raise UserError(
            f"judge {judge.name!r} scores real trials of {corpus.name} as the conditioning encoder "
            f"{speaker_encoder.name!r} does (correlation {correlation:.4f}, above {CORRELATED}), so its ranking would "
            f"only show what the arms were trained on; {_alternatives(catalogue, speaker_encoder, judge)}"
        )


def score_correlation(one: SpeakerEncoder, other: SpeakerEncoder, corpus: Corpus) -> float | None:
    """Pearson correlation of the cosines of two encoders over all pairs of some utterances.

    The utterances are two each of at most 40 speakers, chosen by a hash. The result is kept in the cache folder.

    Returns:
        None if the corpus has too few utterances.
    """
    utterances = _chosen(corpus)
    if len(utterances) * (len(utterances) - 1) // 2 < FEWEST:
        return None
    key = digest_of(["correlation 1", one.digest, other.digest, [[u.digest, u.start, u.seconds] for u in utterances]])
    path = cache_folder() / "correlations" / f"{key}.json"
    try:
        return float(parse_json(path.read_text())["correlation"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not computed yet, or damaged
    found = float(torch.corrcoef(torch.stack([_cosines(encoder, utterances) for encoder in (one, other)]))[0, 1])
    found = found if found == found else 1.0  # an encoder with one score for all pairs cannot be a judge either
    write_json(path, {"correlation": found, "encoders": [one.name, other.name], "utterances": len(utterances)})
    return found


def _chosen(corpus: Corpus) -> list[Utterance]:
    def order(name: str) -> bytes:
        return hashlib.sha256(name.encode()).digest()

    speakers = sorted((s for split in SPLITS for s in corpus.speakers(split)), key=order)[:SPEAKERS]
    return [u for s in speakers for u in sorted(corpus.of_speaker(s), key=lambda u: order(u.id))[:UTTERANCES]]


def _cosines(encoder: SpeakerEncoder, utterances: list[Utterance]) -> Tensor:
    """Cosines of all pairs, (N (N - 1) / 2,)."""
    embeddings = torch.stack([segment_embedding(encoder, u, Segment(u.id, 0.0, SECONDS)) for u in utterances]).double()
    above = torch.triu_indices(len(utterances), len(utterances), 1)
    return (embeddings @ embeddings.T)[above[0], above[1]]


def _alternatives(catalogue: Catalogue, *refused: SpeakerEncoder) -> str:
    """The trained encoders of other families, as the end of an error message."""
    encoders = {name: catalogue.speaker_encoders[name] for name in catalogue.speaker_encoders}
    names = [
        name
        for name, encoder in encoders.items()
        if name not in {other.name for other in refused}
        and encoder.family not in {other.family for other in refused}
        and encoder.training_data != "untrained"
    ]
    return f"possible judges: {', '.join(names) or 'none'}"


QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
ACCEPTANCE = "reference x codec"
"""The trials that resemble a scored conversion: a codec's output against the mean embedding of a speaker."""
_VERSION = 1  # of the trials below: calibrations of other versions are ignored


@dataclass(frozen=True)
class TrialScores:
    """Scores of one kind of trials.

    Attributes:
        eer: equal error rate, 0 to 1.
        threshold: cosine at which the shares of misses and of false alarms are equal.
        same, different: cosines of genuine and of impostor trials, at `QUANTILES`.
        trials: number of genuine and of impostor trials.
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
        splits: the splits of which the speakers were compared.
        kinds: kind of trial to scores. Parts of 3 s against parts: "recorded", "codec" (both resynthesized) and
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
        """From this cosine to a speaker's mean embedding on, a codec's output is accepted as that speaker."""
        return self.kinds[ACCEPTANCE].threshold

    def accepted(self, cosines: Sequence[float]) -> float:
        """The share of cosines (outputs to their targets' mean embeddings; at least one) that are accepted."""
        return sum(cosine >= self.threshold for cosine in cosines) / len(cosines)


def calibrate(
    judge: SpeakerEncoder,
    corpus: Corpus,
    codec: SNAC,
    *,
    base: str,
    splits: Sequence[str] = ("dev",),
    most: int | None = None,
    console: Console = SILENT,
) -> tuple[Calibration, Path]:
    """Score real trials, as recorded and after the codec, and store the result under the digests of all inputs.

    Args:
        judge: the encoder.
        corpus: the speech.
        codec: resynthesizes the trials; frozen.
        base: name of the codec.
        splits: the splits of which the speakers are compared.
        most: number of parts of each speaker that are compared, and that are embedded for its mean, for at most 40
            speakers of a split; None: all of all.
        console: where to report progress.

    Returns:
        the calibration, and the file that contains it.

    Raises:
        UserError: if there are fewer than two speakers, no parts of 2 s, or no two parts of one speaker.
    """
    rate = judge.sample_rate
    parts: list[Part] = []
    references: dict[str, Tensor] = {}
    probes: list[Part] = []  # of audio that the mean embeddings are not computed from
    for split in splits:
        roles = References(corpus, split)
        speakers = roles.speakers if most is None else roles.speakers[:SPEAKERS]
        whole = {s: [Segment(u.id, 0.0, u.seconds) for u in corpus.of_speaker(s)] for s in speakers}
        parts += cut(corpus, (segment for s in speakers for segment in _few(whole[s], most)), rate)
        scoring = {s: _few(roles.scoring(s), most) or roles.scoring(s) for s in speakers}
        references |= speaker_embeddings(corpus, scoring, judge)
        probes += cut(corpus, (segment for s in speakers for segment in _few(roles.source(s), most)), rate)
    where = f"{corpus.root}, {' and '.join(splits)}"
    if not parts or not probes:
        raise UserError(f"{where}: no stretch of 2 s to compare speakers by; a judge is calibrated on real speech")
    coded: list[Part] = []
    progress = console.progress(f"{base} on {' and '.join(splits)} speech")
    for number, part in enumerate([*parts, *probes]):
        coded += after_codec([part], codec, rate)
        progress(number + 1, len(parts) + len(probes))
    recorded, resynthesized = _embedded(parts, judge), _embedded(coded[: len(parts)], judge)
    probed, probed_coded = _embedded(probes, judge), _embedded(coded[len(parts) :], judge)
    scores = {
        "recorded": pair_scores(parts, recorded),
        "codec": pair_scores(parts, resynthesized),
        "recorded x codec": pair_scores(parts, recorded, resynthesized),
        "reference x recorded": reference_scores(probes, probed, references),
        ACCEPTANCE: reference_scores(probes, probed_coded, references),
    }
    kinds = {kind: _trial_scores(*of, f"{where}: {kind} trials") for kind, of in scores.items()}
    digests = {"judge": judge.digest, "base": codec.digest, "data": corpus.digest}
    calibration = Calibration(judge.name, base, corpus.name, digests, tuple(splits), kinds)
    path = _calibration_file(digests, splits, most)
    write_json(path, asdict(calibration))
    return calibration, path


def calibration_of(
    judge: SpeakerEncoder, corpus: Corpus, codec: SNAC, splits: Sequence[str] = ("dev",), *, most: int | None = None
) -> Calibration | None:
    """The stored calibration of this judge on this speech and codec; None if there is none."""
    path = _calibration_file({"judge": judge.digest, "base": codec.digest, "data": corpus.digest}, splits, most)
    try:
        stored = parse_json(path.read_text())
        stored["splits"] = tuple(stored["splits"])
        stored["kinds"] = {kind: TrialScores(**_with_tuples(of)) for kind, of in stored["kinds"].items()}
        return Calibration(**stored)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # there is none, or it is damaged: `calibrate` writes it again


def described(calibration: Calibration) -> str:
    """A Markdown table with a row per kind of trial; cosines by their 5, 50 and 95 % quantiles."""
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
        raise UserError(f"{where}: no {lacking}; a judge is calibrated on pairs of one speaker and of two")
    if not (same.isfinite().all() and different.isfinite().all()):
        raise UserError(f"{where}: the judge gives NaN or infinite embeddings; expected unit vectors")
    found = Verification.of(same, different)
    return TrialScores(found.eer, found.threshold, _quantiles(same), _quantiles(different), found.trials)


def _quantiles(scores: Tensor) -> tuple[float, ...]:
    at = np.quantile(scores.double().numpy(), QUANTILES)
    return tuple(round(float(value), 6) for value in at)


def _with_tuples(stored: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in stored.items()}


def _few(segments: Sequence[Segment], most: int | None) -> list[Segment]:
    """One part of each of the first `most` segments; of a single segment, up to `most` parts. None: all."""
    if most is None:
        return list(segments)
    usable = [segment for segment in segments if segment.seconds >= LEAST]
    seconds = PART if len(usable) > 1 else most * PART
    return [segment._replace(seconds=min(segment.seconds, seconds)) for segment in usable[:most]]


def _calibration_file(digests: dict[str, str], splits: Sequence[str], most: int | None) -> Path:
    """In a folder per judge."""
    rest = digest_of([_VERSION, digests, list(splits), *([] if most is None else [most])])
    return cache_folder() / "calibrations" / digests["judge"][:16] / f"{rest[:32]}.json"
