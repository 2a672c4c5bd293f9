"""The tables of a report: metrics, pairs of arms, codes, cost, settings, failures and provenance."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import compress
from typing import Any

from snac_runner.evaluate.statistics import Estimate
from snac_runner.evaluate.verdict import Comparison
from snac_runner.report.estimates import StudyEstimates
from snac_runner.report.format import (
    BY_JUDGE,
    DISPLAYS,
    MetricDisplay,
    bracket,
    by_judge,
    called,
    further_judges,
    measured_metrics,
    number,
)
from snac_runner.report.results import Calibration, Run, Study, finite
from snac_runner.report.tables import BLANK, EMPTY, Cell, Column, Row, Table, text_cell

COMPUTED = (
    *("normalised", "normalised_content", "specificity", "gap", "speaker_encoder_normalised", "overrating"),
    *("fragility", "accepted", "eer", "preferred", "lost"),
)
"""Metrics that the report computes from others, and displays although no result has them."""


NEEDED = "size with which a true difference as large as the measured one is found with a power of 80 %"
VERDICTS = (
    "mixed: a difference is shown in a measure, and neither arm is better; inconclusive: enough data for a verdict, "
    "and no difference is shown; no verdict: the data cannot carry a verdict"
)


def _blank(cell: Cell) -> Cell:
    return BLANK if cell.value is None else cell


def estimate_cell(e: Estimate | None, digits: int, *, scale: float = 1.0) -> Cell:
    """A mean with its interval, both multiplied by `scale`."""
    if e is None or not math.isfinite(e.mean):
        return EMPTY
    if scale != 1:
        e = replace(e, mean=scale * e.mean, low=scale * e.low, high=scale * e.high)
    low, high = (e.low, e.high) if math.isfinite(e.low) else (None, None)
    return Cell(number(e.mean, digits), e.mean, bracket(e, digits), low, high)


def column(metric: MetricDisplay) -> Column:
    """The column of a metric."""
    return Column(metric.label, metric.unit, metric.arrow, metric.meaning)


def metric_table(
    study: Study, numbers: StudyEstimates, name: str, title: str, metrics: Sequence[MetricDisplay]
) -> Table | None:
    """A row per arm and control, a column per metric; None if no metric was measured.

    `n_ok/N` is that of the metric with the smallest share of measured conversions.
    """
    metrics = [m for m in metrics if any(k[1] == m.name for k in [*numbers.arms, *numbers.controls])]
    if not metrics:
        return None
    columns = [Column("Arm", numeric=False), *(column(m) for m in metrics)]
    columns += [Column("n_ok/N", meaning="measured conversions / all conversions"), Column("Seeds")]
    rows = []
    for mark, (arm, runs) in enumerate(study.arms.items()):
        if arm not in study.finished():
            status = "/".join(dict.fromkeys(r.status for r in runs))
            rows.append(Row([text_cell(arm), *[Cell("—") for _ in metrics], EMPTY, Cell(status)], "failed", mark))
            continue
        counts = [numbers.ok[arm, m.name] for m in metrics if (arm, m.name) in numbers.ok]
        ok, n = min(counts, key=lambda c: c[0] / c[1], default=(0, 0))
        seeds = sum(r.ok for r in runs)
        shown = f"{seeds}/{len(runs)}" if seeds < len(runs) else str(seeds)
        cells = [estimate_cell(numbers.arms.get((arm, m.name)), m.digits) for m in metrics]
        rows.append(
            Row([text_cell(arm), *cells, Cell(f"{ok}/{n}", ok / n if n else None), Cell(shown, seeds)], "arm", mark)
        )
    for control in sorted(study.controls, key=lambda c: ({"source": 0, "floor": 1, "ceiling": 2}.get(c, 3), c)):
        cells = [estimate_cell(numbers.controls.get((control, m.name)), m.digits) for m in metrics]
        if metrics[0].name == "normalised_content" and control in ("floor", "mismatched"):
            exact = 0.0 if control == "floor" else 1.0
            cells[0] = Cell(number(exact), exact)
        if metrics[0].name.endswith("normalised") and control in ("floor", "ceiling"):
            exact = 0.0 if control == "floor" else 1.0
            cells[0] = Cell(number(exact), exact)
        if any(c.value is not None for c in cells):
            rows.append(Row([text_cell(called(control)), *map(_blank, cells), BLANK, BLANK], "control"))
    return Table(name, title, columns, rows) if any(row.kind != "failed" for row in rows) else None


def comparison_table(numbers: StudyEstimates) -> Table | None:
    """A row per pair of arms."""
    if not numbers.comparisons:
        return None
    unit = "normalised SECS" if numbers.score == "normalised" else "SECS"
    columns = [
        Column("Arm A", numeric=False),
        Column("Arm B", numeric=False),
        Column("A − B", unit, meaning="95 % interval, not corrected for the number of comparisons"),
        Column("P(A > B)", meaning="probability that A is above B in speaker similarity"),
        Column("p, corrected", meaning="the larger p of the sign-flip test (over target speakers) and of the interval, "
               "corrected for all pairs of arms and both measures (Shaffer)"),
        Column("Minimum detectable effect", unit, meaning="true difference that this study finds with a power of 80 %"),
    ]  # fmt: skip
    with_content = numbers.content is not None
    if with_content:
        columns += [
            Column("A − B, content error", "points", "", "95 % interval, not corrected; below zero is fewer errors"),
            Column("p, corrected", "content"),
            Column("Minimum detectable effect", "points"),
        ]
    columns.append(Column("Verdict" if with_content else "Speaker similarity", "", "", VERDICTS, numeric=False))
    needed = any(c.needed for c in numbers.comparisons)
    if needed:
        columns.append(Column("Would decide", "if the difference is as measured", "", NEEDED, numeric=False))
    rows = []
    for c in numbers.comparisons:
        words = {"higher": "A higher", "lower": "B higher", "better": "A better", "worse": "B better"}
        word = words.get(c.decision.word, c.decision.word)
        p = Cell(f"{c.p_adjusted:.3g}" if math.isfinite(c.p_adjusted) else "—", c.p_adjusted)
        size, above = estimate_cell(c.difference, 2), Cell(number(c.above), c.above)
        detectable = Cell("> 1" if c.detectable > 1 else number(c.detectable), c.detectable)
        content: list[Cell] = []
        if c.content is not None:
            of_content, effect = c.content_p_adjusted, 100 * c.content_detectable
            shown = Cell(f"{of_content:.3g}", of_content)
            content = [estimate_cell(c.content, 1, scale=100), shown, Cell(number(effect, 1), effect)]
        more = [text_cell(needed_words(c) or "—")] if needed else []
        rows.append(Row([text_cell(c.a), text_cell(c.b), size, above, p, detectable, *content, text_cell(word), *more]))
    return Table("comparisons", "Pairs of arms", columns, rows)


def needed_words(c: Comparison) -> str:
    """The sizes that would decide a pair; empty if none in reach would."""
    return " or ".join(f"{seeds} seeds and {targets} target speakers" for seeds, targets in c.needed)


def judges_table(study: Study, numbers: StudyEstimates) -> Table | None:
    """The judges of the speaker, if there are several: their error rates on real speech, and how far they agree."""
    if not numbers.agreement:
        return None
    judges = {judge.name: judge for result in study.results() for judge in result.judges}
    columns = [
        Column("Judge", numeric=False),
        Column("EER", "%", "↓", "equal error rate on real speech of dev speakers, through the codec"),
        Column("Threshold", "cosine", "", "from which on it accepts a speaker, on the same trials"),
        Column("Agreement over conversions", "Spearman", "↑", "rank correlation of SECS with that of the first judge"),
        Column("Agreement over arms", "Kendall", "↑", "rank correlation of the arms' mean SECS with the first judge's"),
    ]
    rows = []
    for name in dict.fromkeys([*judges, *numbers.agreement]):
        known = judges[name].calibration if name in judges else Calibration()
        eer = None if known.eer is None else 100 * known.eer
        agreement = numbers.agreement.get(name)
        ranks = (agreement.conversions, agreement.arms) if agreement else (None, None)
        cells = [Cell(number(eer, 1), eer), Cell(number(known.threshold, 3), known.threshold)]
        rows.append(Row([text_cell(name), *cells, *(Cell(number(rank), finite(rank)) for rank in ranks)]))
    return Table("judges", "Judges of the speaker", columns, rows)


def sex_table(study: Study, numbers: StudyEstimates) -> Table | None:
    """SECS by whether source and target are of the same sex."""
    if not numbers.by_sex:
        return None
    columns = [Column("Arm", numeric=False), Column("Same sex", "SECS", "↑"), Column("Different sex", "SECS", "↑")]
    marks = list(study.arms)
    rows = [
        Row(
            [text_cell(a), *(estimate_cell(numbers.by_sex.get((a, same)), 3) for same in (True, False))],
            "arm",
            marks.index(a),
        )
        for a in study.finished()
    ]
    return Table("sexes", "Pairs of the same sex and of different sex", columns, rows)


def all_tables(study: Study, numbers: StudyEstimates) -> dict[str, Table]:
    """Every table that is not empty, by name, in the order of the page."""
    metrics = measured_metrics(study.results())
    groups: dict[str, list[MetricDisplay]] = {}
    named = {n: DISPLAYS[n] for n in COMPUTED} | {m.name: m for m in metrics}
    order = {name: place for place, name in enumerate(DISPLAYS)}
    for m in sorted(named.values(), key=lambda m: order.get(m.name, len(order))):
        groups.setdefault(m.group, []).append(m)
    speaker = groups["speaker"]
    tables = [
        metric_table(study, numbers, "speaker", "Speaker similarity (judge)", speaker),
        judges_table(study, numbers),
        *(
            metric_table(
                study,
                numbers,
                f"speaker_{judge}",
                f"Speaker similarity (further judge {judge})",
                [by_judge(DISPLAYS[name], judge) for name in BY_JUDGE],
            )
            for judge in further_judges(study.results())
        ),
        metric_table(study, numbers, "embeddings", "SECS to the target under three embeddings", _by_embedding(groups)),
        comparison_table(numbers),
        metric_table(study, numbers, "content", "Content of the converted output", groups.get("content", [])),
        metric_table(study, numbers, "naturalness", "Naturalness", groups.get("naturalness", [])),
        metric_table(
            study, numbers, "parallel", "Distance to the target's recording of the sentence", groups.get("parallel", [])
        ),
        metric_table(study, numbers, "prosody", "Prosody of the converted output", groups.get("prosody", [])),
        metric_table(
            study,
            numbers,
            "identity",
            "Signal quality of the identity output",
            groups.get("identity", []),
        ),
        metric_table(
            study,
            numbers,
            "speaker_encoder",
            "Overfitting and adversarial attacks",
            _robustness(groups),
        ),
        sex_table(study, numbers),
        metric_table(study, numbers, "other", "Other metrics", groups.get("other", [])),
        codes_table(study),
        taps_table(study),
        cost_table(study),
    ]
    return {t.name: t for t in tables if t is not None}


def _by_embedding(groups: dict[str, list[MetricDisplay]]) -> list[MetricDisplay]:
    """SECS under the target's embedding, the source's own, and another speaker's."""
    others = groups.get("embedding", [])
    return [replace(DISPLAYS["secs"], label="SECS under the target's embedding"), *others] if others else []


def _robustness(groups: dict[str, list[MetricDisplay]]) -> list[MetricDisplay]:
    """SECS by the conditioning encoder and after degradation, next to SECS by the judge."""
    measured = any(m.name == "speaker_encoder_secs" for m in groups["speaker_encoder"])
    degraded = any(m.name == "secs_degraded" for m in groups["speaker_encoder"])
    shown: list[str] = ["speaker_encoder_secs", "speaker_encoder_normalised", "overrating"] if measured else []
    shown += ["secs_degraded", "fragility"] if degraded else []
    return [DISPLAYS["secs"], *(DISPLAYS[name] for name in shown)] if shown else []


def codes_table(study: Study) -> Table | None:
    """Per codebook level, means over seeds: codes changed by conditioning, their use, speakers recognised in them."""
    fields = (
        ("changed", "Changed", "%", 100.0, 1, "share of codes that conditioning changes"),
        ("perplexity", "Perplexity", "", 1.0, 0, "of the converted output's codes"),
        ("used", "Used entries", "", 1.0, 0, "entries of the codebook that the conversions use"),
        ("probe_source", "Source recognised", "%", 100.0, 0,
         "conversions in which a linear probe, trained on the bare codec's codes, recognises the source speaker"),
        ("probe_target", "Target recognised", "%", 100.0, 0, "the same for the target speaker"),
    )  # fmt: skip
    runs = {name: [r.result.codes for r in runs if r.ok and r.result is not None] for name, runs in _with_codes(study)}
    marks = list(study.arms)
    columns, grid = [Column("Arm", numeric=False)], {name: [text_cell(called(name))] for name in runs}
    for field, label, unit, scale, digits, meaning in fields:
        averages = {name: _levels([getattr(c, field) for c in codes]) for name, codes in runs.items()}
        depth = max((len(x) for x in averages.values()), default=0)
        columns += [Column(f"{label}, level {i + 1}", unit, "", meaning) for i in range(depth)]
        for name, levels in averages.items():
            grid[name] += [
                Cell(number(scale * v, digits), scale * v) if v is not None else EMPTY for v in _padded(levels, depth)
            ]
    rows = [
        Row(cells, "arm" if name in marks else "control", marks.index(name) if name in marks else None)
        for name, cells in grid.items()
        if any(cell.value is not None for cell in cells[1:])
    ]
    speakers = {c.probe_speakers for codes in runs.values() for c in codes if c.probe_speakers}
    note = f"The chance level of the probe is {100 / min(speakers):.1f} %." if speakers else ""
    return Table("codes", "Codes (level 1 is the coarsest)", columns, rows, note) if rows else None


def taps_table(study: Study) -> Table | None:
    """Relative size of the edit at every tap, mean over seeds."""
    edits = {
        name: [r.result.codes.edits for r in runs if r.ok and r.result is not None] for name, runs in _with_codes(study)
    }
    taps = sorted({tap for of in edits.values() for e in of for tap in e}, key=_order_of_tap)
    if not taps:
        return None
    marks, rows = list(study.arms), []
    for name, of in edits.items():
        means = [_mean([v for e in of if (v := finite(e.get(tap))) is not None]) for tap in taps]
        if any(m is not None for m in means):
            cells = [Cell(number(100 * m, 1), 100 * m) if m is not None else BLANK for m in means]
            mark = marks.index(name) if name in marks else None
            rows.append(Row([text_cell(called(name)), *cells], "control" if mark is None else "arm", mark))
    columns = [Column("Arm", numeric=False), *(Column(tap, "%") for tap in taps)]
    return Table("taps", "Size of the edit at every tap, relative to the signal there", columns, rows)


def _with_codes(study: Study) -> list[tuple[str, tuple[Run, ...]]]:
    """The finished arms, and the control that is trained like an arm."""
    controls = [
        (name, (run,)) for name, run in study.controls.items() if run.result is not None and run.result.codes.edits
    ]
    return [*((arm, study.arms[arm]) for arm in study.finished()), *controls]


def _order_of_tap(tap: str) -> tuple[int, str]:
    order = ("encoder", "latent", "quantized", "decoder")
    return next((i for i, start in enumerate(order) if tap.startswith(start)), len(order)), tap


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _padded(values: list[float | None], depth: int) -> list[float | None]:
    return values + [None] * (depth - len(values))


def _levels(runs: Sequence[Sequence[float | None]]) -> list[float | None]:
    depth = max((len(r) for r in runs), default=0)
    found: list[float | None] = []
    for i in range(depth):
        known = [v for r in runs if i < len(r) and (v := finite(r[i])) is not None]
        found.append(sum(known) / len(known) if known else None)
    return found


def cost_table(study: Study) -> Table | None:
    """Means over an arm's successful runs."""
    fields = (
        (
            "seconds_alone",
            Column("Alone", "s", "↓", "training time as if the arm were trained alone: shared + own"),
            1,
            1.0,
        ),
        ("seconds_own", Column("Own", "s", "↓"), 1, 1.0),
        ("seconds_shared", Column("Shared", "s", "", "work that is done once for all arms of a seed"), 1, 1.0),
        ("steps", Column("Steps"), 0, 1.0),
        ("parameters", Column("Parameters", "thousand", "↓", "trainable"), 1, 1e-3),
        ("bytes", Column("Model", "MB", "↓", "size of the saved strategies"), 2, 1e-6),
        (
            "peak_memory_bytes",
            Column("Peak memory", "MB", "↓", "during the steps of this arm; of the whole process on a CPU"),
            0,
            1e-6,
        ),
        (
            "times_real_time",
            Column(
                "Inverse real-time factor",
                "× real time",
                "↑",
                "seconds of speech converted per second, one source at a time, on the machine that evaluated the run",
            ),
            1,
            1.0,
        ),
    )
    marks = list(study.arms)
    rows = []
    for arm in study.finished():
        costs = [r.result.cost for r in study.arms[arm] if r.ok and r.result is not None]
        cells: list[Cell] = []
        for name, _, digits, scale in fields:
            known = [v * scale for c in costs if (v := finite(getattr(c, name))) is not None]
            mean = sum(known) / len(known) if known else math.nan
            cells.append(Cell(number(mean, digits), mean) if known else EMPTY)
        rows.append(Row([text_cell(arm), *cells], "arm", marks.index(arm)))
    known_of = [any(row.cells[1 + place].value is not None for row in rows) for place in range(len(fields))]
    if not any(known_of):
        return None
    columns = [Column("Arm", numeric=False), *compress((field[1] for field in fields), known_of)]
    rows = [replace(row, cells=list(compress(row.cells, [True, *known_of]))) for row in rows]
    return Table("cost", "Cost of one run", columns, rows)


def flattened(value: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as dotted keys with printable values, without the prefixes "arm." and "settings."."""
    found: dict[str, str] = {}
    for key, item in value.items():
        name = f"{prefix}{key}".removeprefix("arm.").removeprefix("settings.")
        if isinstance(item, Mapping) and item:
            found |= flattened(item, f"{name}.")
        else:
            found[name] = item if isinstance(item, str) else json.dumps(item, ensure_ascii=False, sort_keys=True)
    return found


def settings_table(study: Study) -> Table | None:
    """Every setting in which arms differ; settings that differ between the seeds of one arm are left out."""
    by_arm: dict[str, dict[str, str]] = {}
    for arm, runs in study.arms.items():
        settings: list[dict[str, str]] = []
        for run in runs:
            if run.result is not None:
                lists = {"strategies": ", ".join(run.result.strategies), "objectives": ", ".join(run.result.objectives)}
                settings.append(flattened(run.result.config) | lists)
        if settings:
            same = {k: v for k, v in settings[0].items() if all(other.get(k) == v for other in settings)}
            by_arm[arm] = {k: v for k, v in same.items() if v != arm or k == "strategies"}
    keys = sorted({k for s in by_arm.values() for k in s} - {"seed", "name", "hash"})
    differing = [k for k in keys if len({s.get(k) for s in by_arm.values()}) > 1]
    if not differing:
        return None
    columns = [Column("Setting", numeric=False), *(Column(arm, numeric=False) for arm in by_arm)]
    rows = [Row([text_cell(k), *(text_cell(by_arm[arm].get(k, "—")) for arm in by_arm)]) for k in differing]
    return Table("settings", "Settings that differ between arms", columns, rows)


def failures_table(study: Study) -> Table | None:
    """Every run that did not succeed, with its error."""
    rows = []
    for runs in [*study.arms.values(), *((run,) for run in study.controls.values())]:
        for run in runs:
            if not run.ok:
                seed = "—" if run.seed is None else str(run.seed)
                error = run.error or "no reason given"
                rows.append(
                    Row([text_cell(run.arm), text_cell(seed), text_cell(run.status), text_cell(error)], "failed")
                )
    columns = [Column(name, numeric=False) for name in ("Arm", "Seed", "Status", "Error")]
    return Table("failures", "Runs that did not succeed", columns, rows) if rows else None


def origin_table(study: Study) -> Table:
    """Versions, hardware, digests and commands; if runs differ, every value is listed."""
    collected: dict[str, dict[str, None]] = {}

    def note(key: str, value: object) -> None:
        if value not in (None, "", {}, []):
            collected.setdefault(key, {})[str(value)] = None

    for r in study.results():
        note("command", r.command)
        note("split", r.split)
        note("pairs", f"{r.pairs.n or len(r.utterances)} conversions, digest {r.pairs.digest[:16] or 'not recorded'}")
        note(
            "conditioning encoder",
            r.speaker_encoder
            and f"{r.speaker_encoder.name} (family {r.speaker_encoder.family}, {r.speaker_encoder.digest[:16]})",
        )
        for judge in r.judges:
            note("judge", f"{judge.name} (family {judge.family}, {judge.digest[:16]})")
        for name, measured in r.metrics.items():
            note(f"metric: {name}", measured.version)
        versions = {k: v for k, v in r.versions.items() if k != "plugins"}
        for key, value in flattened(versions).items():
            note(f"version: {key}", value)
        plugins = r.versions.get("plugins")
        for name, plugin in plugins.items() if isinstance(plugins, dict) else []:
            stated = f"{plugin.get('distribution')} {plugin.get('version')}" if isinstance(plugin, dict) else plugin
            note(f"plugin: {name}", stated)
        for key, value in flattened(r.hardware).items():
            note(f"hardware: {key}", value)
        for key, value in flattened(r.digests).items():
            note(f"digest: {key}", value)
        commit = r.git.get("commit")
        note("git", commit and f"{commit}{', with uncommitted changes' if r.git.get('dirty') else ''}")
        note(f"settings: {r.arm}", r.config_hash if r.kind == "arm" else None)
    started = sorted(r.started for r in study.results() if r.started)
    ended = sorted(r.ended for r in study.results() if r.ended)
    rows = [Row([text_cell(key), text_cell("; ".join(values))]) for key, values in collected.items()]
    if started and ended:
        rows.append(Row([text_cell("measured"), text_cell(f"{started[0]} to {ended[-1]}")]))
    rows.append(Row([text_cell("this page"), text_cell(f"runner report {study.folder.resolve().name}")]))
    return Table("provenance", "Provenance", [Column("Key", numeric=False), Column("Value", numeric=False)], rows)
