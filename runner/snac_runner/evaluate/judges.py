"""Speaker verification trials: how well an encoder tells speakers apart.

No ranking by what the arms learn from: a judge must be another encoder than the conditioning encoder, and hear otherwise.

How a judge scores real speech: at which cosine it takes two stretches for one speaker, and how often it errs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from snac_core.codec import SNAC
from snac_core.errors import UserError
from snac_core.files import write_json
from snac_core.plugins import Catalogue
from snac_core.seeding import derive
from snac_core.speakers.encoder import SpeakerEncoder
from snac_runner.console import SILENT, Console
from snac_runner.data.audio import cache_folder, load_audio, resample
from snac_runner.data.corpus import SPLITS, Corpus, Segment, Utterance, digest_of
from snac_runner.data.references import References
from snac_runner.embeddings import segment_embedding, speaker_embeddings

Embed = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Verification:
    """Outcome of all trials between parts of speech.

    Attributes:
        eer: equal error rate, 0 to 1.
        threshold: cosine at which misses and false alarms are equally frequent.
        same, different: mean cosine of trials of one speaker, and of two.
        trials: how many of each.
    """

    eer: float
    threshold: float
    same: float
    different: float
    trials: tuple[int, int]

    @classmethod
    def of(cls, genuine: Tensor, impostor: Tensor) -> Verification:
        """From the cosines of trials of one speaker (G,) and of two (I,); neither may be empty."""
        eer, threshold = equal_error(genuine, impostor)
        return cls(eer, threshold, genuine.mean().item(), impostor.mean().item(), (len(genuine), len(impostor)))

    def __str__(self) -> str:
        return f"EER {100 * self.eer:.1f} % (same {self.same:.3f}, different {self.different:.3f})"


@dataclass(frozen=True)
class Part:
    """A stretch of an utterance: audio (1, T)."""

    speaker: str
    utterance: str
    audio: Tensor


@dataclass(frozen=True)
class Trials:
    """Parts of a corpus at `sample_rate` (Hz), and the same after a codec where there is one."""

    name: str
    sample_rate: int
    parts: list[Part]
    coded: list[Part]


def trials_of(corpus: Corpus, splits: Sequence[str], sample_rate: int, *, codec: nn.Module | None = None) -> Trials:
    """The parts of the splits' utterances, all pairs of which are trials.

    Raises:
        UserError: if there are none.
    """
    parts = parts_of(corpus, splits, sample_rate)
    if not parts:
        raise UserError(f"{corpus.root} has no speech of 2 s or more in {' and '.join(splits)} to compare speakers by")
    return Trials(corpus.name, sample_rate, parts, after_codec(parts, codec, sample_rate) if codec else [])


def parts_of(
    corpus: Corpus, splits: Sequence[str], sample_rate: int, *, seconds: float = 3.0, least: float = 2.0
) -> list[Part]:
    """Every utterance of the splits cut into parts of `seconds`; a rest of at least `least` seconds is a part too."""
    utterances = (u for split in splits for u in corpus.splits.get(split, ()))
    whole = (Segment(u.id, 0.0, u.seconds) for u in utterances)
    return cut(corpus, whole, sample_rate, seconds=seconds, least=least)


def cut(
    corpus: Corpus, segments: Iterable[Segment], sample_rate: int, *, seconds: float = 3.0, least: float = 2.0
) -> list[Part]:
    """The segments cut into parts of `seconds`; a rest of at least `least` seconds is a part too."""
    parts: list[Part] = []
    for segment in segments:
        utterance = corpus.utterance(segment.utterance)
        audio = load_audio(utterance, sample_rate, start=segment.start, seconds=segment.seconds)
        pieces = torch.split(audio, int(seconds * sample_rate), dim=-1)
        long_enough = (piece for piece in pieces if piece.shape[-1] >= least * sample_rate)
        parts.extend(Part(utterance.speaker, utterance.id, piece) for piece in long_enough)
    return parts


def after_codec(parts: Sequence[Part], codec: nn.Module, sample_rate: int, *, seed: int = 0) -> list[Part]:
    """The same parts as the codec gives them back; the codec's noise is fixed by the seed."""
    codec_rate = cast(int, codec.sampling_rate)
    coded = []
    for part in parts:
        with torch.random.fork_rng(devices=[]), torch.inference_mode():
            torch.manual_seed(derive(seed, part.utterance, "codec noise"))
            audio = codec(resample(part.audio, sample_rate, codec_rate)[None])[0][0]
        coded.append(replace(part, audio=resample(audio.clone(), codec_rate, sample_rate)))
    return coded


def embed_parts(parts: Sequence[Part], embed: Embed, sample_rate: int, *, batch: int = 32) -> Tensor:
    """(N, S): embeddings of the parts; those of equal length go through `embed` together."""
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


def verify(parts: Sequence[Part], enrolled: Tensor, tested: Tensor | None = None) -> Verification:
    """The outcome of all pairs of parts as trials; arguments as for `pair_scores`."""
    return Verification.of(*pair_scores(parts, enrolled, tested))


def pair_scores(parts: Sequence[Part], enrolled: Tensor, tested: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Cosines of all pairs of parts: of one speaker (G,), and of two (I,).

    Parts of one utterance meet only where their speaker has no other utterance.

    Args:
        parts: what the rows of the embeddings are of.
        enrolled: (N, S) unit embeddings.
        tested: (N, S) of the same parts in another form, e.g. after a codec; None: `enrolled`.
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
    """Cosines of parts (N, S) to speakers' mean embeddings: each part to its own speaker (N,), and to all others."""
    names = sorted(references)
    cosine = embeddings @ torch.stack([references[name] for name in names]).T
    own = torch.tensor([names.index(part.speaker) for part in parts])[:, None] == torch.arange(len(names))
    return cosine[own], cosine[~own]


def equal_error(genuine: Tensor, impostor: Tensor) -> tuple[float, float]:
    """Equal error rate and its threshold: where the shares of genuine below and impostor at or above it meet."""
    scores = torch.cat([genuine, impostor]).sort().values
    misses = torch.searchsorted(genuine.sort().values, scores) / len(genuine)
    alarms = 1 - torch.searchsorted(impostor.sort().values, scores) / len(impostor)
    best = (misses - alarms).abs().argmin()
    return ((misses[best] + alarms[best]) / 2).item(), scores[best].item()


def _numbered(names: list[str]) -> list[int]:
    order = {name: index for index, name in enumerate(sorted(set(names)))}
    return [order[name] for name in names]


CORRELATED = 0.98
"""Pearson correlation of two encoders' scores of the same trials above which they are one encoder for this purpose."""
SPEAKERS, UTTERANCES = 40, 2  # most speakers of a corpus, and utterances of each, that are trials
SECONDS = 4.0  # most of an utterance, in s
FEWEST = 15  # scores: a correlation over fewer says nothing


def check_judge(judge: SpeakerEncoder, speaker_encoder: SpeakerEncoder, catalogue: Catalogue) -> None:
    """Refuse to rank on an encoder that the arms learn from: by name, family and digest."""
    if (
        judge.name == speaker_encoder.name
        or judge.family == speaker_encoder.family
        or judge.digest == speaker_encoder.digest
    ):
        raise UserError(
            f"judge {judge.name!r} (family {judge.family}) is of the same family as the conditioning encoder {speaker_encoder.name!r}; "
            f"a ranking by what the arms learn from says nothing; {_that_would_do(catalogue, speaker_encoder)}"
        )


def check_scores(judge: SpeakerEncoder, speaker_encoder: SpeakerEncoder, corpus: Corpus, catalogue: Catalogue) -> None:
    """Refuse to rank on an encoder that scores the study's own speech as the conditioning encoder does, whatever it is called."""
    correlation = score_correlation(judge, speaker_encoder, corpus)
    if correlation is not None and correlation > CORRELATED:
        raise UserError(
            f"judge {judge.name!r} scores real trials of {corpus.name} as the conditioning encoder {speaker_encoder.name!r} does "
            f"(correlation {correlation:.4f}, above {CORRELATED}); a ranking by what the arms learn from says nothing; "
            f"{_that_would_do(catalogue, speaker_encoder, judge)}"
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
    write_json(path, {"correlation": found, "encoders": [one.name, other.name], "utterances": len(utterances)})
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
    console: Console = SILENT,
) -> tuple[Calibration, Path]:
    """Score real trials, as recorded and after the codec, and keep the outcome under the digests of all involved.

    Args:
        judge: the encoder.
        corpus: the speech.
        codec: resynthesises the trials; frozen.
        base: its name.
        splits: whose speakers are told apart.
        console: where to report.

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
    progress = console.progress(f"{base} on {' and '.join(splits)} speech")
    for number, part in enumerate([*parts, *probes]):
        coded += after_codec([part], codec, rate)
        progress(number + 1, len(parts) + len(probes))
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
    write_json(path, asdict(calibration))
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
