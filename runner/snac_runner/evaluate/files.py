"""Scores of converted files that belong to no study: each against its source and speech of its target."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from snac_core.errors import UserError
from snac_core.files import check_names
from snac_core.metric import Conversion, Metric
from snac_core.speakers.encoder import SpeakerEncoder
from snac_runner.data.audio import load_audio, resample
from snac_runner.data.checks import check_audio
from snac_runner.data.decode import AUDIO_SUFFIXES
from snac_runner.embeddings import mean_embedding, waveform_embedding
from snac_runner.evaluate.metrics import BY_EVERY_JUDGE
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
    files = [file for file in sorted(path.rglob("[!.]*")) if file.suffix.lower() in AUDIO_SUFFIXES and file.is_file()]
    if not files:
        raise UserError(f"--{what} {path} has no audio file; expected {', '.join(AUDIO_SUFFIXES)}")
    check_names(files, f"--{what}")
    return {file.relative_to(path).with_suffix("").as_posix(): file for file in files}


BEFORE = "similarity of the source to the target"
Row = dict[tuple[str, str], float | None]
"""Metric and judge ("" for metrics that need none) to value."""


def score_file(files: ConvertedFile, judges: Sequence[SpeakerEncoder], metrics: Mapping[str, Metric]) -> Row:
    """The metrics of one conversion; those of speaker similarity, and `BEFORE`, by each judge.

    Metrics that need more than these files (such as the output under the source's own embedding) are left out; a metric
    that fails is None.

    Raises:
        UserError: if a file is silent, cut off, too short or unreadable.
    """
    for path in (files.source, files.converted, *files.targets):
        if problem := check_audio(path).problem:
            raise UserError(f"{path} {problem}")
    source, converted = (load_audio(path, SAMPLE_RATE)[0] for path in (files.source, files.converted))
    conversion = Conversion(
        pair=files.converted.stem,
        sample_rate=SAMPLE_RATE,
        source=source,
        converted=converted,
        target=load_audio(files.targets[0], SAMPLE_RATE)[0],
    )
    low = degraded(converted, SAMPLE_RATE).unsqueeze(0)
    row: Row = {}
    for judge in judges:
        own, output = (
            waveform_embedding(judge, load_audio(p, judge.sample_rate)) for p in (files.source, files.converted)
        )
        after = waveform_embedding(judge, resample(low, SAMPLE_RATE, judge.sample_rate))
        target = mean_embedding(judge, [load_audio(path, judge.sample_rate) for path in files.targets])
        row[BEFORE, judge.name] = float(own.double() @ target.double())
        conversion = replace(
            conversion,
            embeddings={"converted": output, "degraded": after},
            references={"source": own, "target": target},
        )
        of_speaker = {name: metric for name, metric in metrics.items() if isinstance(metric, BY_EVERY_JUDGE)}
        row |= {(name, judge.name): value for name, value in _values(conversion, of_speaker)}
    rest = {name: metric for name, metric in metrics.items() if not isinstance(metric, BY_EVERY_JUDGE)}
    return row | {(name, ""): value for name, value in _values(conversion, rest)}


def _values(conversion: Conversion, metrics: Mapping[str, Metric]) -> Iterator[tuple[str, float | None]]:
    """The metrics that apply; None for one that fails."""
    for name, metric in metrics.items():
        try:
            value = metric(conversion)
        except Exception:  # a failure of a metric's own tool: other metrics are still measured
            yield name, None
            continue
        if value is not None:
            yield name, value


def pooled(rows: Sequence[Row]) -> dict[tuple[str, str], tuple[float, int]]:
    """Mean and number of values of every metric by every judge, over the conversions in which it could be measured."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        for key, value in row.items():
            if value is not None:
                found.setdefault(key, []).append(value)
    return {key: (sum(values) / len(values), len(values)) for key, values in found.items()}
