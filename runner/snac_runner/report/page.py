"""Writing a report: a page with plots and audio, the tables as files, JSON, and a short summary for a terminal.

`build` writes report.html, report.md, report.json, abx.html and tables/ into the folder of a study or of one run. It
reads only result files and votes, and writes equal bytes for equal files. `build_leaderboard` does the same for several
studies.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from snac_core.files import write_json, write_text
from snac_runner.evaluate.statistics import Estimate
from snac_runner.report import listening, plots, samples
from snac_runner.report.estimates import ENDS, StudyEstimates, compute
from snac_runner.report.format import (
    DISPLAYS,
    MetricDisplay,
    bracket,
    further_judges,
    measured_metrics,
    number,
    plural,
    short_label,
)
from snac_runner.report.plots import COLOURS, MAX_NAMED, Bar, Point, RankedMean, key_mark, pareto, ranking
from snac_runner.report.results import Study, merge_studies, read
from snac_runner.report.study_tables import all_tables, estimate_cell, failures_table, origin_table, settings_table
from snac_runner.report.tables import Cell, Column, Row, Table, as_csv, as_markdown, as_tex, as_text, text_cell
from snac_runner.report.text import Verdict, verdict

INTERVALS = (
    "Intervals are 95 % confidence intervals over seeds, target speakers and source utterances, "
    "not corrected for the number of comparisons."
)
TEMPLATES = Path(__file__).parent / "templates"
MEASURES = (
    "content",
    "naturalness",
    "parallel",
    "prosody",
    "identity",
    "speaker_encoder",
    "embeddings",
    "sexes",
    "other",
)
SECTIONS = ("speaker", "comparisons", *MEASURES, "codes", "taps", "cost", "settings", "failures")
QUALITY = ("naturalness", "identity")  # groups of metrics that speaker similarity is plotted against


@dataclass(frozen=True)
class TradeOff:
    """A plot of speaker similarity against another metric."""

    metric: MetricDisplay
    svg: Markup


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breakable"] = breakable
    return environment


def render_abx(study: Study, questions: dict[str, Any]) -> str:
    """The blind listening test as one HTML text."""
    data = Markup(json.dumps(questions))  # numbers, base64 and hexadecimal digits only
    return _environment().get_template("abx.html").render(study=study, data=data)


def render(
    study: Study, numbers: StudyEstimates, verdict: Verdict, tables: dict[str, Table], *, questions: int = 0
) -> str:
    """The whole page as one HTML text. `questions` is the number of questions of the listening test."""
    environment = _environment()
    bars, marks = _ranking(study, numbers)
    groups, more = samples.groups(study)
    return environment.get_template("report.html").render(
        study=study,
        verdict=verdict,
        facts=facts(study, numbers),
        bars=bars,
        ticks=marks,
        score=DISPLAYS[numbers.score],
        questions=questions,
        intervals=INTERVALS,
        content=numbers.content,
        worst=samples.worst(study),
        trades=_trades(study, numbers),
        max_named=MAX_NAMED,
        tables=dict.fromkeys(SECTIONS) | tables,
        measures=["speaker", "judges", *(f"speaker_{judge}" for judge in further_judges(study.results())), *MEASURES],
        panels=plots.panels(study),
        groups=groups,
        more=more,
        arms=[(arm, key_mark(mark), mark % COLOURS) for mark, arm in enumerate(study.arms)],
        seeds=sorted({r.seed for runs in study.arms.values() for r in runs if r.seed is not None}),
        key_mark=key_mark,
        number=number,
    )


def breakable(text: str) -> Markup:
    """Text that may break after underscores and similar characters, for narrow columns."""
    return Markup(re.sub(r"([_/.,+])(?=\w)", r"\1<wbr>", str(escape(text))))


def facts(study: Study, numbers: StudyEstimates) -> list[str]:
    """The line under the title: numbers of sources, split, judge and conditioning encoder."""
    first, found = study.first(), [plural(numbers.sources, "source utterance")]
    if first.split:
        found.append(f"{first.split} split")
    if first.judges:
        names = [judge.name for judge in first.judges]
        found.append(f"judge{'s' if len(names) > 1 else ''} {', '.join(names)}")
    if first.speaker_encoder is not None and first.speaker_encoder.name:
        found.append(f"conditioning encoder {first.speaker_encoder.name}")
    return found


def lines_of(verdict: Verdict) -> list[str]:
    """The three lines at the top of a report, as Markdown paragraphs."""
    result = f"**{verdict.headline}** {verdict.size}".rstrip()
    return [f"{verdict.compared}\n", f"{result}\n", *([f"Next: {verdict.next_step}\n"] if verdict.next_step else [])]


def markdown(study: Study, numbers: StudyEstimates, verdict: Verdict, tables: dict[str, Table]) -> str:
    """The page without plots and audio."""
    parts = [f"# {study.title}\n", f"{' · '.join(facts(study, numbers))}\n", *lines_of(verdict)]
    parts += ["".join(f"- {item}\n" for item in items) for items in (verdict.findings, verdict.cautions) if items]
    if verdict.missing:
        parts.append("What the data lack for a verdict:\n\n" + "".join(f"- {item}\n" for item in verdict.missing))
    parts += [f"## {table.title}\n\n{as_markdown(table)}" for table in tables.values()]
    parts.append(f"{INTERVALS}\n")
    return "\n".join(parts)


def _bounds(e: Estimate) -> tuple[float | None, float | None]:
    return (e.low, e.high) if e.low == e.low else (None, None)


def _baselines(study: Study) -> list[str]:
    """What is plotted with the arms: other systems, and the controls that do not define a scale."""
    return [name for name in study.controls if name not in ENDS and name != "source"]


def _ranking(study: Study, numbers: StudyEstimates) -> tuple[list[Bar], list[tuple[float, str]]]:
    marks = {arm: i for i, arm in enumerate(study.arms)}
    digits = DISPLAYS[numbers.score].digits
    rows: list[RankedMean] = []

    def add(label: str, mark: int | None, e: Estimate) -> None:
        rows.append(RankedMean(label, mark, e.mean, *_bounds(e), number(e.mean, digits), bracket(e, digits)))

    for arm in numbers.ranked:
        e = numbers.arms.get((arm, numbers.score))
        if e is not None:
            add(arm, marks[arm], e)
    if not rows:
        return [], []
    for name in _baselines(study):  # after the arms: only arms are ranked
        e = numbers.controls.get((name, numbers.score))
        if e is not None:
            add(short_label(name), None, e)
    if numbers.score == "normalised":
        return ranking(rows, [0.0, 1.0])
    return ranking(rows, [e.mean for c in ("floor", "ceiling") if (e := numbers.controls.get((c, "secs"))) is not None])


def _trades(study: Study, numbers: StudyEstimates) -> list[TradeOff]:
    """Speaker similarity against content, if it was judged, naturalness, and each measured metric of signal quality."""
    found = []
    content = [DISPLAYS["normalised_content"]] if numbers.content is not None else []
    for metric in [*content, *(m for m in measured_metrics(study.results()) if m.group in QUALITY)]:
        points = []
        for mark, arm in enumerate(study.arms):
            x, y = numbers.arms.get((arm, metric.name)), numbers.arms.get((arm, numbers.score))
            if x is not None and y is not None:
                points.append(Point(arm, mark, x.mean, y.mean, *_bounds(x), *_bounds(y)))
        if not points:
            continue
        zero = 0.0 if metric.name == "normalised_content" else None
        floor = numbers.controls.get(("floor", metric.name))
        at = zero if zero is not None else floor.mean if floor is not None else None
        if at is not None and numbers.score == "normalised":
            points.append(Point("bare codec", None, at, 0.0))
        for name in _baselines(study):
            x, y = (numbers.controls.get((name, m)) for m in (metric.name, numbers.score))
            if x is not None and y is not None:
                points.append(Point(short_label(name), None, x.mean, y.mean, *_bounds(x), *_bounds(y)))
        good = {"up": "higher is better", "down": "lower is better"}.get(metric.direction, "")
        unit = f" ({metric.unit})" if metric.unit else ""
        score = DISPLAYS[numbers.score].label
        label = f"{score} against {metric.label}, every arm with its intervals"
        svg = pareto(points, f"{metric.label}{unit}{f' · {good}' if good else ''}", score, label)
        found.append(TradeOff(metric, svg))
    return found


def write(study: Study) -> Path:
    """Compute the estimates and write every file of the report; the path of report.html."""
    folder = study.folder
    numbers = compute(study)
    text = verdict(study, numbers)
    tables = all_tables(study, numbers)
    for table in (settings_table(study), failures_table(study), origin_table(study)):
        if table is not None:
            tables[table.name] = table
    for old in (folder / "tables").glob("*.*"):  # of an earlier report, which may have had other tables
        if old.suffix in (".csv", ".tex") and old.stem not in tables:
            old.unlink(missing_ok=True)
    for name, table in tables.items():
        write_text(folder / "tables" / f"{name}.csv", as_csv(table))
        write_text(folder / "tables" / f"{name}.tex", as_tex(table))
    write_json(folder / "report.json", as_json(study, numbers, text))
    write_text(folder / "report.md", markdown(study, numbers, text, tables))
    questions = listening.contents(listening.trials(study))
    if questions["trials"]:
        write_text(folder / "abx.html", render_abx(study, questions))
    page = folder / "report.html"
    write_text(page, render(study, numbers, text, tables, questions=len(questions["trials"])))
    return page


def as_json(study: Study, numbers: StudyEstimates, text: Verdict) -> dict[str, Any]:
    """The report for programs. A missing number is null."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: clean(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [clean(v) for v in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    def by_name(found: dict[tuple[str, str], Estimate]) -> dict[str, dict[str, Any]]:
        nested: dict[str, dict[str, Any]] = {}
        for (name, metric), estimate in found.items():
            nested.setdefault(name, {})[metric] = asdict(estimate)
        return nested

    arms = by_name(numbers.arms)
    runs = {
        a: [{"seed": r.seed, "status": r.status, "error": r.error or None} for r in rs] for a, rs in study.arms.items()
    }
    report = {
        "schema": 1,
        "study": study.name,
        "verdict": asdict(text),
        "ranked_by": numbers.score,
        "ranking": list(numbers.ranked),
        "dead": list(numbers.dead),
        "conversions": numbers.pairs,
        "target_speakers": numbers.targets,
        "arms": {a: {"runs": runs[a], "metrics": arms.get(a, {})} for a in study.arms},
        "n_ok": {a: {m: list(v) for (b, m), v in numbers.ok.items() if a == b} for a in study.finished()},
        "controls": by_name(numbers.controls),
        "comparisons": [asdict(c) for c in numbers.comparisons],
    }
    return clean(report)  # type: ignore[no-any-return]


def summarise(study: Study) -> str:
    """Headline, ranked arms and cautions as plain text."""
    numbers = compute(study)
    text = verdict(study, numbers)
    names = [
        n
        for n in ("normalised", "secs", "specificity", "gap", "distillmos", "stoi")
        if any(m == n for _, m in numbers.arms)
    ]
    columns = [Column("arm", numeric=False), *(Column(DISPLAYS[n].label, arrow=DISPLAYS[n].arrow) for n in names)]
    columns += [Column("seconds"), Column("runs", numeric=False)]
    rows = []
    for arm in [*numbers.ranked, *(a for a in study.arms if a not in numbers.ranked)]:
        runs = study.arms[arm]
        cells = [estimate_cell(numbers.arms.get((arm, n)), DISPLAYS[n].digits) for n in names]
        cells[1:] = [Cell(c.text, c.value) for c in cells[1:]]  # only the first metric has an interval here
        seconds = [s for r in runs if r.ok and r.result and (s := r.result.cost.seconds_alone) is not None]
        time = f"{sum(seconds) / len(seconds):.0f}" if seconds else "—"
        states = [r.status for r in runs]
        counted = ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states))
        rows.append(Row([text_cell(arm), *cells, Cell(time), text_cell(counted)]))
    systems = study.systems()
    for name in (*systems, "floor", "ceiling"):
        found = {n: numbers.controls.get((name, n)) for n in names if name in systems or n == "secs"}
        if any(found.values()):
            cells = [estimate_cell(found[n], DISPLAYS[n].digits) if found.get(n) else Cell("") for n in names]
            cells = [cells[0], *(Cell(cell.text) for cell in cells[1:])]
            rows.append(Row([text_cell(f"({name})"), *cells, Cell(""), text_cell("")]))
    result = f"{text.headline} {text.size}".rstrip()
    lines = [
        text.compared,
        result,
        *([f"Next: {text.next_step}"] if text.next_step else []),
        "",
        as_text(Table("summary", "", columns, rows)).rstrip(),
        "",
    ]
    lines += ["seconds: training time of one run as if the arm were trained alone", ""]
    lines += [f"- {caution}" for caution in text.cautions]
    return "\n".join(lines).rstrip() + "\n"


def build(study_folder: str | Path) -> Path:
    """Write the report of a study, or of one run, into its folder; the path of report.html.

    What is missing, failed or damaged is stated in the report.

    Raises:
        UserError: if the folder is missing, contains no result, or was written by another version.
    """
    return write(read(study_folder))


def summary(study_folder: str | Path) -> str:
    """The verdict and a table of the arms as plain text."""
    return summarise(read(study_folder))


def add_votes(study_folder: str | Path, votes: str | Path) -> Path:
    """Store votes that abx.html exported in the study's folder; the next `build` displays them."""
    return listening.accept(read(study_folder), Path(votes))


def build_leaderboard(study_folders: Sequence[str | Path], out: str | Path) -> tuple[Path, str, list[str]]:
    """Write one report on several studies into `out`.

    Returns:
        the path of report.html, the summary, and a line for each study that cannot be compared with the first.
    """

    study, refused = merge_studies([Path(folder) for folder in study_folders], Path(out))
    return write(study), summarise(study), refused
