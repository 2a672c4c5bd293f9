"""From a system and a list of conversions to scores, per conversion and pooled.

A journal keeps the scores of each conversion on disk, so that an interrupted evaluation resumes where it stopped.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor

from snac_core.files import parse_json, write_text
from snac_core.metric import OUTPUTS, Conversion, Metric
from snac_core.plugin_guard import describe_error
from snac_core.plugins import Catalogue
from snac_core.seeding import generator
from snac_core.speakers.encoder import SpeakerEncoder
from snac_runner.console import SILENT, Progress
from snac_runner.data.audio import one_thread
from snac_runner.distributed import ALONE, DistributedContext
from snac_runner.evaluate.codes import SpeakerProbe, summary
from snac_runner.evaluate.content import WordEdits, WordErrors
from snac_runner.evaluate.conversions import Conversions, Item
from snac_runner.evaluate.metrics import ByJudge
from snac_runner.evaluate.systems import Rendering, System
from snac_runner.evaluate.whisper import Whisper, not_found

MIN_RMS = 1e-5
"""Output with a lower RMS, -100 dB re full scale, counts as silent."""
BLOCK = 16  # conversions that are rendered, and read by a recogniser, together
WORST = 10  # conversions least like their target whose audio is kept for the report
WORST_SECONDS = 4.0  # of the target that are kept with a conversion of the lowest SECS
_CODE_KEYS = ("codes", "bare_codes", "edits")  # of a row: only the summary of codes needs them
_log = logging.getLogger(__name__)


class Journal:
    """A file with a line per scored conversion. Rows under another key are discarded.

    A damaged line, or one that was only partly written when the process died, is discarded, too, and its conversion is
    scored again.

    Args:
        path: of the file.
        key: everything that the rows depend on; see `journal_key`.

    Attributes:
        rows: pair id to row.
    """

    def __init__(self, path: Path, key: Mapping[str, Any]) -> None:
        self.path = path
        self.rows: dict[str, dict[str, Any]] = {}
        header = json.dumps({"key": dict(key)}, sort_keys=True)
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []
        if lines and lines[0] == header:
            for line in lines[1:-1]:  # the text after the last newline is incomplete
                with suppress(ValueError, KeyError, TypeError):  # damaged, as after a power failure: scored again
                    row = parse_json(line)
                    self.rows[row["pair"]] = row
        write_text(path, "".join(f"{line}\n" for line in [header, *map(json.dumps, self.rows.values())]))

    def add(self, row: dict[str, Any]) -> None:
        """Append a row; it is on disk when this returns."""
        self.rows[row["pair"]] = row
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())


def journal_key(system: Mapping[str, Any], conversions: Conversions, metrics: Mapping[str, Metric]) -> dict[str, Any]:
    """Everything that the rows of a journal depend on: what identifies the system, the conversions and the metrics."""
    return {
        **system,
        "pairs": conversions.pairs.digest,
        "metrics": {name: metrics[name].version for name in sorted(metrics)},
    }


def degraded(audio: Tensor, sample_rate: int) -> Tensor:
    """Audio (T,) after a 7 kHz low-pass, with white noise at 30 dB SNR: it sounds nearly the same.

    A score that is much lower on it was raised by an adversarial attack on the judge. `sample_rate` is in Hz.
    """
    spectrum = torch.fft.rfft(audio.double())
    spectrum[torch.fft.rfftfreq(len(audio), 1 / sample_rate) > 7000] = 0
    filtered = torch.fft.irfft(spectrum, n=len(audio))
    # The name of a random stream is part of the numbers: changing it changes every score of this metric.
    noise = torch.randn(len(audio), generator=generator("roughened"), dtype=torch.float64)
    noisy: Tensor = filtered + noise * filtered.square().mean().sqrt() * 10 ** (-30 / 20)
    return noisy.to(audio.dtype)


@dataclass
class Scores:
    """The scores of one system.

    Attributes:
        pooled: metric to mean, n_ok, n, unit, direction, role and margin if it has a role, and its version.
        utterances: one row a conversion: pair, speakers, metrics.
        codes: how conditioning changes the codes; see `snac_runner.evaluate.codes.summary`.
        missing: metric that was not measured to the reason.
        renderings: pair id to the audio of the first conversions.
        lowest: pair id to the converted output of those of the `WORST` lowest SECS that were rendered.
        worst: pair id to the audio of the conversions with the lowest SECS; see `worst_conversions`.
    """

    pooled: dict[str, dict[str, Any]] = field(default_factory=dict)
    utterances: list[dict[str, Any]] = field(default_factory=list)
    codes: dict[str, Any] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    renderings: dict[str, Rendering] = field(default_factory=dict)
    lowest: dict[str, Tensor] = field(default_factory=dict)
    worst: dict[str, dict[str, Tensor]] = field(default_factory=dict)


def available(
    catalogue: Catalogue,
    requested: Collection[str] = (),
    *,
    excluded: Collection[str] = (),
    language: str = "en",
    recogniser: Callable[[], Whisper | None] = lambda: None,
) -> tuple[dict[str, Metric], dict[str, str]]:
    """The metrics that can be measured here, and for each other metric the reason why it cannot.

    Args:
        catalogue: the plugins.
        requested: names of metrics to measure although they are measured only on request.
        excluded: names of metrics not to measure.
        language: code of the language of the speech.
        recogniser: gives the recogniser of words; called only if a metric needs it.
    """
    metrics, missing = {}, {}
    for name in catalogue.metrics:
        metric: Metric = catalogue.metrics[name]()
        lacking = [package for package in metric.requires if importlib.util.find_spec(package) is None]
        if name in excluded or (isinstance(metric, WordEdits) and "wer" in excluded):
            missing[name] = "excluded by the study"
        elif metric.on_request and name not in requested:
            missing[name] = f"only when asked for: extra_metrics = [{json.dumps(name)}]"
        elif metric.languages and language not in metric.languages:
            missing[name] = f"judges only {', '.join(metric.languages)}, and language = {language!r}"
        elif isinstance(metric, WordErrors) and (words := recogniser()) is None and not lacking:
            missing[name] = not_found(language)
        elif lacking:
            missing[name] = f"needs {', '.join(lacking)}"
        else:
            if isinstance(metric, WordErrors):
                metric.recogniser = words
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
    metrics: Mapping[str, Metric],
    *,
    keep: int = 0,
    journal: Journal | None = None,
    probe: SpeakerProbe | None = None,
    context: DistributedContext = ALONE,
    progress: Progress = SILENT.progress(""),  # noqa: B008
) -> Scores:
    """Render and score every conversion; on a CPU, with a thread for each core that torch may use.

    Several processes divide the conversions among them.

    Args:
        system: what converts; a model must be in eval mode (`evaluating`).
        conversions: what to convert.
        metrics: what to measure, by name.
        keep: number of conversions of which the audio is kept.
        journal: conversions in it are not scored again, and every other one is added to it.
        probe: recognises speakers in the codes.
        context: this process among all that score; the journal and the audio are of the first.
        progress: called with (done, total).
    """
    scores = Scores()
    known = context.agree(dict(journal.rows) if journal else {})
    items, size = conversions.items, min(BLOCK, -(-len(conversions.items) // context.world))
    rows: list[dict[str, Any]] = []
    with _cores(next(iter(conversions.judges.values())).device) as side_by_side:
        for first in range(0, len(items), size * context.world):
            start = first + size * context.rank
            block = items[start : start + size]

            def rows_of_block(
                block: Sequence[Item] = block, start: int = start, done: int = len(rows)
            ) -> list[dict[str, Any]]:
                wanted = [
                    item for number, item in enumerate(block, start) if item.pair.id not in known or number < keep
                ]
                renderings = side_by_side(lambda item: system(conversions, item), wanted)
                rendered = dict(zip((item.pair.id for item in wanted), renderings, strict=True))
                scores.renderings.update(list(rendered.items())[: max(0, keep - start)])
                scores.lowest.update((id, rendering.converted) for id, rendering in rendered.items())
                new = [item for item in block if item.pair.id not in known]
                scored = score_conversions(
                    new, [rendered[item.pair.id] for item in new], conversions, metrics, side_by_side=side_by_side
                )
                found = []
                for item in block:
                    if item.pair.id not in known:
                        row = next(scored)
                        if journal:
                            journal.add(row)
                    else:
                        row = known[item.pair.id]
                    found.append(row)
                    progress(done + len(found), len(items))
                return found

            of_all = context.share(rows_of_block)
            for row in of_all:
                if journal and row["pair"] not in journal.rows:  # of another process
                    journal.add(row)
            rows += of_all
            scores.lowest = {id: scores.lowest[id] for id in _lowest(rows) if id in scores.lowest}
            if context.world > 1:
                progress(len(rows), len(items))
        elsewhere = [item for item in items[:keep] if item.pair.id not in scores.renderings]  # by other processes
        renderings = side_by_side(lambda item: system(conversions, item), elsewhere)
        scores.renderings.update(zip((item.pair.id for item in elsewhere), renderings, strict=True))
    scores.utterances = [{key: value for key, value in row.items() if key not in _CODE_KEYS} for row in rows]
    scores.pooled = _pooled(scores.utterances, metrics)
    scores.codes = summary(rows, probe)
    return scores


def worst_conversions(
    scores: Scores, system: System, conversions: Conversions, count: int
) -> dict[str, dict[str, Tensor]]:
    """The audio of the `count` conversions with the lowest SECS, lowest first.

    Returns:
        pair id to "converted", "source" and "target" (T,), at the codec's rate.
    """
    by_id = {item.pair.id: item for item in conversions.items}
    items = [by_id[id] for id in _lowest(scores.utterances)[:count]]
    most = round(WORST_SECONDS * conversions.sample_rate)
    return {
        item.pair.id: {
            "converted": kept
            if (kept := scores.lowest.get(item.pair.id)) is not None
            else system(conversions, item).converted,
            "source": item.audio[0],
            "target": conversions.target_audio(item.pair.target)[:most],
        }
        for item in items
    }


def _lowest(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Pair ids of the rows of the `WORST` lowest SECS, lowest first."""
    measured = [(secs, number) for number, row in enumerate(rows) if (secs := row["metrics"].get("secs")) is not None]
    return [rows[number]["pair"] for _, number in sorted(measured)[:WORST]]


@contextmanager
def _cores(device: torch.device) -> Iterator[Callable[..., Iterable[Any]]]:
    """A `map` with a thread for each core that torch may use, each with one thread of torch; see `one_thread`.

    Operators of one conversion are too small to use several cores well. On another device than the CPU it is `map`.
    """
    if device.type != "cpu" or torch.get_num_threads() == 1:
        yield map
        return
    with one_thread() as cores:
        pool = ThreadPoolExecutor(cores)
        try:
            yield pool.map
        finally:
            pool.shutdown(cancel_futures=True)


def rows_of(
    system: System,
    items: Sequence[Item],
    conversions: Conversions,
    metrics: Mapping[str, Metric],
    progress: Progress = SILENT.progress(""),  # noqa: B008
) -> list[dict[str, Any]]:
    """The rows of some conversions, as a journal has them; see `score`."""
    rows = []
    with _cores(next(iter(conversions.judges.values())).device) as side_by_side:
        renderings = list(side_by_side(lambda item: system(conversions, item), items))
        for row in score_conversions(items, renderings, conversions, metrics, side_by_side=side_by_side):
            rows.append(row)
            progress(len(rows), len(items))
    return rows


def score_conversions(
    items: Sequence[Item],
    renderings: Sequence[Rendering],
    conversions: Conversions,
    metrics: Mapping[str, Metric],
    *,
    side_by_side: Callable[..., Iterable[Any]] = map,
) -> Iterator[dict[str, Any]]:
    """The scores of conversions, one by one: a row with pair, speakers, metrics and codes each.

    NaN or silent output gets a metric's worst value. A metric that does not apply is left out; one that fails is None.

    Args:
        items: the conversions.
        renderings: of each.
        conversions: that the items are of.
        metrics: what to measure, by name.
        side_by_side: a `map` that may use threads. A metric measures one conversion at a time.
    """
    further = {metric.judge for metric in metrics.values() if isinstance(metric, ByJudge)}
    evaluated = list(
        side_by_side(lambda item, rendering: _evaluated(item, rendering, conversions, further), items, renderings)
    )
    for name, metric in metrics.items():
        try:
            metric.prefetch([e.conversion for e in evaluated if not e.broken.intersection(metric.outputs)])
        except Exception as error:  # a failure of a metric's own tool: its calls say for which conversion
            _log.warning("metric %s cannot prepare a block: %s: %s", name, type(error).__name__, error)
    locks = {name: Lock() for name in metrics}
    measured = side_by_side(lambda one: _measured(one, metrics, locks), evaluated)
    for item, rendering, values in zip(items, renderings, measured, strict=True):
        pair = item.pair
        yield {
            "pair": pair.id,
            "source_speaker": pair.source_speaker,
            "target_speaker": pair.target,
            "source": pair.source.utterance,
            "same_sex": pair.same_sex,
            "metrics": values,
            "codes": [level.tolist() for level in rendering.codes],
            "bare_codes": [level.tolist() for level in rendering.bare_codes],
            "edits": rendering.edits,
        }


class _Evaluated(NamedTuple):
    """A conversion to measure, the same with the embeddings of further judges, and its outputs that cannot be judged.

    Those outputs are NaN, silent or too short.
    """

    conversion: Conversion
    by_judge: dict[str, Conversion]
    broken: frozenset[str]


def _evaluated(item: Item, rendering: Rendering, conversions: Conversions, further: Collection[str]) -> _Evaluated:
    outputs = {name: audio for name in OUTPUTS if (audio := getattr(rendering, name)) is not None}
    encoders = [conversions.speaker_encoder, *conversions.judges.values()]
    least = conversions.sample_rate * max(encoder.min_seconds for encoder in encoders)
    valid = {name: audio for name, audio in outputs.items() if len(audio) >= least and _is_sound(audio)}
    for_judge = dict(valid)
    if "converted" in valid:
        for_judge["degraded"] = degraded(rendering.converted, conversions.sample_rate)
    pair = item.pair

    def judged(name: str) -> dict[str, Any]:
        return {
            "embeddings": _embedded(for_judge, conversions.judges[name], conversions.sample_rate),
            "references": _references(conversions.references[name], pair.source_speaker, pair.target),
            "candidates": conversions.candidates(name),
        }

    conversion = Conversion(
        pair=pair.id,
        sample_rate=conversions.sample_rate,
        source=item.audio[0],
        converted=rendering.converted,
        identity=rendering.identity,
        other=rendering.other,
        synthetic=rendering.synthetic,
        speaker_encoder_embeddings=_embedded(valid, conversions.speaker_encoder, conversions.sample_rate),
        speaker_encoder_references=_references(conversions.speaker_encoder_reference, pair.source_speaker, pair.target),
        text=pair.text,
        target=conversions.target_audio(pair.target),
        parallel=conversions.parallel_audio(pair),
        target_speaker=pair.target,
        same_words=rendering.same_words,
        **judged(next(iter(conversions.judges))),
    )
    by_judge = {name: replace(conversion, **judged(name)) for name in sorted(further)}
    return _Evaluated(conversion, by_judge, frozenset(outputs.keys() - valid.keys()))


def _measured(
    evaluated: _Evaluated, metrics: Mapping[str, Metric], locks: Mapping[str, Lock]
) -> dict[str, float | None]:
    values: dict[str, float | None] = {}
    broken = evaluated.broken
    for name, metric in metrics.items():
        conversion = evaluated.by_judge[metric.judge] if isinstance(metric, ByJudge) else evaluated.conversion
        if any(getattr(conversion, reference) is None for reference in metric.references):
            continue
        if broken.intersection(metric.outputs):
            values[name] = metric.worst
            continue
        try:
            with locks[name]:
                value = metric(conversion)
        except Exception as error:  # a failure of a metric's own tool: other metrics are still measured
            _log.warning("metric %s fails on %s: %s: %s", name, conversion.pair, type(error).__name__, error)
            values[name] = None
            continue
        if value is not None:
            values[name] = value if math.isfinite(value) else None
    return values


def _is_sound(audio: Tensor) -> bool:
    return bool(audio.isfinite().all()) and float(audio.square().mean().sqrt()) > MIN_RMS


def _embedded(outputs: Mapping[str, Tensor], encoder: SpeakerEncoder, sample_rate: int) -> dict[str, Tensor]:
    """Embeddings (S,) of audio (T,) by name. Outputs of equal length go through the encoder in one batch."""
    found: dict[str, Tensor] = {}
    device = encoder.device
    by_length: dict[int, list[str]] = {}
    for name, audio in outputs.items():
        by_length.setdefault(audio.shape[-1], []).append(name)
    for names in by_length.values():
        with torch.no_grad():
            embeddings = encoder(torch.stack([outputs[name] for name in names]).unsqueeze(1).to(device), sample_rate)
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
