"""Scores of converted files that belong to no study: each against its source and speech of its target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from snac_core.errors import UserError
from snac_core.metric import Conversion, Metric
from snac_core.speakers.encoder import SpeakerEncoder
from snac_runner.data.audio import check_audio, load_audio, resample
from snac_runner.data.formats import AUDIO_SUFFIXES
from snac_runner.embeddings import mean_embedding, waveform_embedding
from snac_runner.evaluate.scoring import degraded

SAMPLE_RATE = 16_000
"""Sample rate at which files are compared, in Hz."""


@dataclass(frozen=True)
class ConvertedFile:
    """A conversion on disk: its source, and one or several files with speech of its target."""

    source: Path
    converted: Path
    targets: tuple[Path, ...]


def matched(source: Path, converted: Path, target: Path) -> list[ConvertedFile]:
    """Conversions of files, or of folders in which a source and its conversion have the same name (without suffix).

    A target is a file, or a folder: with a file of every conversion's name, or else with speech of one speaker.

    Raises:
        UserError: if a path is missing, or a conversion has no source of its name.
    """
    targets = _files(target, "target")
    if converted.is_file() and source.is_file():
        return [ConvertedFile(source, converted, tuple(targets.values()))]
    if not (converted.is_dir() and source.is_dir()):
        raise UserError(f"--source {source} and --converted {converted}: expected two files, or two folders")
    sources, found = _files(source, "source"), _files(converted, "converted")
    for name, path in found.items():
        if name not in sources:
            raise UserError(f"{path} has no source of the same name in {source}; expected {name}.wav (or flac, ...)")
    each = target.is_dir() and found.keys() <= targets.keys()
    return [
        ConvertedFile(sources[name], path, (targets[name],) if each else tuple(targets.values()))
        for name, path in found.items()
    ]


def _files(path: Path, what: str) -> dict[str, Path]:
    """Path below `path` without suffix to the audio file."""
    if path.is_file():
        return {path.stem: path}
    if not path.is_dir():
        raise UserError(f"--{what} {path} does not exist; expected an audio file or a folder of them")
    files = [file for file in sorted(path.rglob("*")) if file.suffix.lower() in AUDIO_SUFFIXES and file.is_file()]
    if not files:
        raise UserError(f"--{what} {path} has no audio file; expected {', '.join(AUDIO_SUFFIXES)}")
    return {file.relative_to(path).with_suffix("").as_posix(): file for file in files}


def score_file(
    files: ConvertedFile, judge: SpeakerEncoder, metrics: Mapping[str, Metric]
) -> tuple[dict[str, float | None], float]:
    """The metrics of one conversion, and the judge's cosine similarity of the source to the target.

    Metrics that need more than these files (such as the output under the source's own embedding) are left out; a metric
    that fails is None.

    Raises:
        UserError: if a file is silent, cut off, too short or unreadable.
    """
    for path in (files.source, files.converted, *files.targets):
        if problem := check_audio(path).problem:
            raise UserError(f"{path} {problem}")
    source, converted = (load_audio(path, SAMPLE_RATE)[0] for path in (files.source, files.converted))
    speech = [load_audio(path, judge.sample_rate) for path in files.targets]
    reference = mean_embedding(judge, speech)

    def embedded(path: Path) -> torch.Tensor:
        return waveform_embedding(judge, load_audio(path, judge.sample_rate))

    own = embedded(files.source)
    low = degraded(converted, SAMPLE_RATE).unsqueeze(0)
    conversion = Conversion(
        pair=files.converted.stem,
        sample_rate=SAMPLE_RATE,
        source=source,
        converted=converted,
        embeddings={
            "converted": embedded(files.converted),
            "degraded": waveform_embedding(judge, resample(low, SAMPLE_RATE, judge.sample_rate)),
        },
        references={"source": own, "target": reference},
        target=load_audio(files.targets[0], SAMPLE_RATE)[0],
    )
    values: dict[str, float | None] = {}
    for name, metric in metrics.items():
        try:
            value = metric(conversion)
        except Exception:  # a failure of a metric's own tool: other metrics are still measured
            values[name] = None
            continue
        if value is not None:
            values[name] = value
    return values, float(own.double() @ reference.double())


def pooled(rows: Sequence[Mapping[str, float | None]]) -> dict[str, tuple[float, int]]:
    """Mean and number of values of every metric, over the conversions in which it could be measured."""
    found: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            if value is not None:
                found.setdefault(name, []).append(value)
    return {name: (sum(values) / len(values), len(values)) for name, values in found.items()}
