"""Judged conversions as they come, one line each, so that judging goes on where it was stopped or killed.

Audio that sounds nearly the same to the ear: what a score loses on it was an inaudible attack on the judge.

From a system and a list of conversions to scores: per conversion, and pooled."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from snac_core.files import write_text
from snac_core.metric import OUTPUTS, Conversion, Metric
from snac_core.plugin_guard import describe_error
from snac_core.plugins import Catalogue
from snac_core.seeding import generator
from snac_core.speakers.encoder import SpeakerEncoder
from snac_runner.evaluate.codes import SpeakerProbe, summary
from snac_runner.evaluate.conversions import Conversions, Item
from snac_runner.evaluate.systems import Rendering, System


class Journal:
    """A file of rows that belongs to one system, list of conversions and set of metrics; any other file is begun anew.

    A line that was half written when the process died is dropped, and its conversion judged again.

    Args:
        path: of the file.
        key: all that the rows depend on.
    """

    def __init__(self, path: Path, key: Mapping[str, Any]) -> None:
        self.path = path
        self.rows: dict[str, dict[str, Any]] = {}
        header = json.dumps({"key": dict(key)}, sort_keys=True)
        lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
        if lines and lines[0] == header:
            for line in lines[1:-1]:  # what follows the last newline was cut off
                row = json.loads(line)
                self.rows[row["pair"]] = row
        write_text(path, "".join(f"{line}\n" for line in [header, *map(json.dumps, self.rows.values())]))

    def add(self, row: dict[str, Any]) -> None:
        """Append a row, on the disk before this returns."""
        self.rows[row["pair"]] = row
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())


def degraded(audio: Tensor, sample_rate: int) -> Tensor:
    """Audio (T,) after a 7 kHz low-pass, with white noise at 30 dB: to the ear nearly the same."""
    spectrum = torch.fft.rfft(audio.double())
    spectrum[torch.fft.rfftfreq(len(audio), 1 / sample_rate) > 7000] = 0
    filtered = torch.fft.irfft(spectrum, n=len(audio))
    noise = torch.randn(len(audio), generator=generator("degraded"), dtype=torch.float64)
    rough: Tensor = filtered + noise * filtered.square().mean().sqrt() * 10 ** (-30 / 20)
    return rough.to(audio.dtype)


SILENT = 1e-5
"""RMS below -100 dB re full scale is no output."""

_log = logging.getLogger(__name__)


@dataclass
class Scores:
    """What judging one system gave.

    Attributes:
        pooled: metric to mean, n_ok, n, unit, direction, role and margin where it has a role, and its version.
        utterances: one row a conversion: pair, speakers, metrics.
        codes: what the conditioning does inside; see `snac_runner.evaluate.codes.summary`.
        missing: metric to what it would need.
        renderings: the audio of the first conversions, by pair id.
        worst: the audio of the conversions least like their target, worst first, by pair id: "converted", "source" and
            "target" (T,).
    """

    pooled: dict[str, dict[str, Any]] = field(default_factory=dict)
    utterances: list[dict[str, Any]] = field(default_factory=list)
    codes: dict[str, Any] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    renderings: dict[str, Rendering] = field(default_factory=dict)
    worst: dict[str, dict[str, Tensor]] = field(default_factory=dict)


def available(catalogue: Catalogue, also: Collection[str] = ()) -> tuple[dict[str, Metric], dict[str, str]]:
    """The metrics that can run here, and for each other what it needs.

    Args:
        catalogue: where they come from.
        also: those that are asked for, of the ones that run only on request.
    """
    metrics, missing = {}, {}
    for name in catalogue.metrics:
        metric: Metric = catalogue.metrics[name]()
        lacking = [package for package in metric.requires if importlib.util.find_spec(package) is None]
        if metric.on_request and name not in also:
            missing[name] = f"only when asked for: extra_metrics = [{json.dumps(name)}]"
        elif lacking:
            missing[name] = f"needs {', '.join(lacking)}"
        else:
            try:
                metric.prepare()
            except Exception as error:  # a plugin's own code
                missing[name] = describe_error(error)
            else:
                metrics[name] = metric
    return metrics, missing


def score(
    system: System,
    conversions: Conversions,
    catalogue: Catalogue,
    *,
    only: Mapping[str, Metric] | None = None,
    keep: int = 0,
    worst: int = 0,
    journal: Path | None = None,
    key: Mapping[str, Any] | None = None,
    probe: SpeakerProbe | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """Render and judge every conversion.

    Args:
        system: what converts.
        conversions: what to convert.
        catalogue: where the metrics come from.
        only: these metrics instead of all that can run here.
        keep: of how many conversions to keep the audio.
        worst: of how many of the worst as well.
        journal: file of judged conversions; those in it are not judged again, where it belongs to the same `key`.
        key: all that identifies the system, for the journal.
        probe: hears who speaks in the codes.
        progress: called with (done, of how many).
    """
    metrics, missing = (dict(only), {}) if only is not None else available(catalogue)
    belongs = {
        **(key or {}),
        "pairs": conversions.pairs.digest,
        "metrics": {name: metrics[name].version for name in sorted(metrics)},
    }
    kept = Journal(journal, belongs) if journal is not None else None
    scores = Scores(missing=missing)
    rows: list[dict[str, Any]] = []
    items = conversions.items
    for number, item in enumerate(items):
        row = kept.rows.get(item.pair.id) if kept else None
        if row is None or number < keep:
            rendering = system(conversions, item)
            if number < keep:
                scores.renderings[item.pair.id] = rendering
            if row is None:
                row = {**judged_row(item, rendering, conversions, metrics), **_inside(rendering)}
                if kept:
                    kept.add(row)
        rows.append(row)
        if progress:
            progress(number + 1, len(items))
    scores.utterances = [{k: v for k, v in row.items() if k not in _INSIDE} for row in rows]
    scores.pooled = _pooled(scores.utterances, metrics)
    scores.codes = summary(rows, probe)
    scored = [n for n, row in enumerate(rows) if row["metrics"].get("secs") is not None]
    for number in sorted(scored, key=lambda n: (rows[n]["metrics"]["secs"], n))[:worst]:
        item = items[number]
        scores.worst[item.pair.id] = {
            "converted": system(conversions, item).converted,
            "source": item.audio[0],
            "target": conversions.target_audio(item.pair.target)[: round(4 * conversions.sample_rate)],
        }
    return scores


_INSIDE = ("codes", "bare_codes", "edits")  # of a row: what only the summary of codes needs


def _inside(rendering: Rendering) -> dict[str, Any]:
    return {
        "codes": [level.tolist() for level in rendering.codes],
        "bare_codes": [level.tolist() for level in rendering.bare_codes],
        "edits": rendering.edits,
    }


def judged_row(
    item: Item, rendering: Rendering, conversions: Conversions, metrics: Mapping[str, Metric]
) -> dict[str, Any]:
    parts = {name: getattr(rendering, name) for name in OUTPUTS}
    least = conversions.sample_rate * max(conversions.judge.min_seconds, conversions.speaker_encoder.min_seconds)
    sounding = {
        name: audio for name, audio in parts.items() if audio is not None and len(audio) >= least and _sounds(audio)
    }
    if "converted" in sounding:
        sounding["degraded"] = degraded(rendering.converted, conversions.sample_rate)
    pair = item.pair
    conversion = Conversion(
        pair=pair.id,
        sample_rate=conversions.sample_rate,
        source=item.audio[0],
        converted=rendering.converted,
        identity=rendering.identity,
        other=rendering.other,
        synthetic=rendering.synthetic,
        embeddings=_embedded(sounding, conversions.judge, conversions.sample_rate),
        references=_references(conversions.reference, pair.source_speaker, pair.target),
        speaker_encoder_embeddings=_embedded(
            _without_degraded(sounding), conversions.speaker_encoder, conversions.sample_rate
        ),
        speaker_encoder_references=_references(conversions.speaker_encoder_reference, pair.source_speaker, pair.target),
        text=pair.text,
        target=conversions.target_audio(pair.target),
        target_speaker=pair.target,
        candidates=conversions.candidates,
        same_words=rendering.same_words,
    )
    broken = {name for name, audio in parts.items() if audio is not None and name not in sounding}
    values: dict[str, float | None] = {}
    for name, metric in metrics.items():
        if broken.intersection(metric.outputs):
            values[name] = metric.worst
            continue
        try:
            value = metric(conversion)
        except Exception as error:  # a tool's own failure: the item counts as not ok, the others go on
            _log.warning("metric %s fails on %s: %s: %s", name, pair.id, type(error).__name__, error)
            values[name] = None
            continue
        if value is not None:
            values[name] = value if math.isfinite(value) else None
    return {
        "pair": pair.id,
        "source_speaker": pair.source_speaker,
        "target_speaker": pair.target,
        "source": pair.source.utterance,
        "same_sex": pair.same_sex,
        "metrics": values,
    }


def _without_degraded(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: audio for name, audio in parts.items() if name != "degraded"}


def _sounds(audio: Tensor) -> bool:
    return bool(audio.isfinite().all()) and float(audio.square().mean().sqrt()) > SILENT


def _embedded(parts: Mapping[str, Tensor], encoder: SpeakerEncoder, sample_rate: int) -> dict[str, Tensor]:
    """Unit vectors by the name of the part; parts of one length go through the encoder together."""
    found: dict[str, Tensor] = {}
    device = encoder.device
    by_length: dict[int, list[str]] = {}
    for name, audio in parts.items():
        by_length.setdefault(audio.shape[-1], []).append(name)
    for names in by_length.values():
        with torch.no_grad():
            embeddings = encoder(torch.stack([parts[name] for name in names]).unsqueeze(1).to(device), sample_rate)
        found.update(zip(names, embeddings.cpu(), strict=True))
    return found


def _references(table: Mapping[str, Tensor], source: str, target: str) -> dict[str, Tensor]:
    return {"source": table[source], "target": table[target]}


def _pooled(rows: list[dict[str, Any]], metrics: Mapping[str, Metric]) -> dict[str, dict[str, Any]]:
    pooled = {}
    for name, metric in metrics.items():
        applicable = [row["metrics"][name] for row in rows if name in row["metrics"]]
        values = [value for value in applicable if value is not None]
        if applicable:
            pooled[name] = {
                "mean": sum(values) / len(values) if values else None,
                "n_ok": len(values),
                "n": len(applicable),
                "unit": metric.unit,
                "direction": metric.direction,
                **({"role": metric.role, "margin": metric.margin} if metric.role else {}),
                **({"version": version} if (version := metric.version) else {}),
            }
    return pooled
