"""The parts of the page, gathered for the templates.

Several studies as one: only where they judged the same conversions by the same judge through the same base.

Writing the report's files.

From result files to a page that people can read, hear and check.

`build` writes report.html, report.md, report.json, abx.html and tables/ into a study folder, or into the folder of one
run; it reads nothing but result files and votes, and writes the same bytes whenever it is called on the same ones.
`build_leaderboard` does the same over several studies. `summary` is the short table for a terminal.
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

from snac_core.errors import UserError
from snac_core.files import write_json, write_text
from snac_runner.evaluate.statistics import Estimate
from snac_runner.report import listening, plots
from snac_runner.report.estimates import ENDS, Numbers, compute
from snac_runner.report.format import KNOWN, Metric, bracket, called, number, plural, present
from snac_runner.report.plots import COLOURS, MOST_NAMED, Bar, Point, key_mark, pareto, ranking
from snac_runner.report.results import Study, read
from snac_runner.report.study_tables import all_tables, estimate_cell, failures_table, origin_table, settings_table
from snac_runner.report.tables import Cell, Column, Row, Table, as_csv, as_markdown, as_tex, as_text, text_cell
from snac_runner.report.text import Verdict, verdict

INTERVALS = (
    "Intervals are 95 %, over seeds, target speakers and source utterances, "
    "and not adjusted for the number of comparisons."
)
TEMPLATES = Path(__file__).parent / "templates"
SECTIONS = (
    *("speaker", "comparisons", "content", "prosody", "identity", "speaker_encoder", "embeddings", "sexes", "other"),
    *("codes", "taps", "cost", "settings", "failures"),
)


@dataclass(frozen=True)
class Trade:
    """One Pareto plot."""

    metric: Metric
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


def render_abx(study: Study, asked: dict[str, Any]) -> str:
    """The blind listening test as one HTML text."""
    data = Markup(json.dumps(asked))  # numbers, base64 and hexadecimal digits only
    return _environment().get_template("abx.html").render(study=study, data=data)


def render(study: Study, numbers: Numbers, verdict: Verdict, tables: dict[str, Table], *, asks: int = 0) -> str:
    """The whole page as one HTML text; `asks` is the number of questions of the listening test beside it."""
    environment = _environment()
    bars, marks = _ranking(study, numbers)
    groups, more = listening.groups(study)
    return environment.get_template("report.html").render(
        study=study,
        verdict=verdict,
        facts=facts(study, numbers),
        bars=bars,
        ticks=marks,
        score=KNOWN[numbers.score],
        asks=asks,
        content=numbers.content,
        worst=listening.worst(study),
        trades=_trades(study, numbers),
        most_named=MOST_NAMED,
        tables=dict.fromkeys(SECTIONS) | tables,
        panels=plots.panels(study),
        groups=groups,
        more=more,
        arms=[(arm, key_mark(mark), mark % COLOURS) for mark, arm in enumerate(study.arms)],
        seeds=sorted({r.seed for runs in study.arms.values() for r in runs if r.seed is not None}),
        key_mark=key_mark,
        number=number,
    )


def breakable(text: str) -> Markup:
    """Names may break after underscores and the like, where a column is narrow."""
    return Markup(re.sub(r"([_/.,+])(?=\w)", r"\1<wbr>", str(escape(text))))


def facts(study: Study, numbers: Numbers) -> list[str]:
    """What was compared, on what, and who judged: the line under the title."""
    seeds = {r.seed for runs in study.arms.values() for r in runs}
    found = [plural(len(study.arms), "arm"), plural(len(seeds), "seed")]
    found.append(f"{plural(numbers.pairs, 'conversion')} to {plural(numbers.targets, 'target speaker')}")
    first = study.first()
    if first.split:
        found.append(f"{first.split} split")
    if first.judges:
        found.append(f"judge {first.judges[0].name}")
    if first.speaker_encoder is not None and first.speaker_encoder.name:
        found.append(f"conditioning encoder {first.speaker_encoder.name}")
    return found


def markdown(study: Study, numbers: Numbers, verdict: Verdict, tables: dict[str, Table]) -> str:
    """The page without its plots and sounds."""
    parts = [f"# {study.title}\n", f"{' · '.join(facts(study, numbers))}\n", f"**{verdict.headline}**\n"]
    parts += ["".join(f"- {item}\n" for item in items) for items in (verdict.findings, verdict.cautions) if items]
    if verdict.missing:
        parts.append("A verdict needs more:\n\n" + "".join(f"- {item}\n" for item in verdict.missing))
    parts += [f"## {table.title}\n\n{as_markdown(table)}" for table in tables.values()]
    parts.append(f"{INTERVALS}\n")
    return "\n".join(parts)


def _known(e: Estimate) -> tuple[float | None, float | None]:
    return (e.low, e.high) if e.low == e.low else (None, None)


def _beside(study: Study) -> list[str]:
    """What converts too and stands in every plot: other systems, and the controls that are no end of a scale."""
    return [name for name in study.controls if name not in ENDS and name != "source"]


def _short(control: str) -> str:
    return called(control).partition(":")[0]


def _ranking(study: Study, numbers: Numbers) -> tuple[list[Bar], list[tuple[float, str]]]:
    marks = {arm: i for i, arm in enumerate(study.arms)}
    digits = KNOWN[numbers.score].digits
    rows: list[tuple[str, int | None, float, float | None, float | None, str, str]] = []
    for arm in numbers.ranked:
        e = numbers.arms.get((arm, numbers.score))
        if e is not None:
            rows.append((arm, marks[arm], e.mean, *_known(e), number(e.mean, digits), bracket(e, digits)))
    if not rows:
        return [], []
    for name in _beside(study):  # after the arms, which are what is ranked
        e = numbers.controls.get((name, numbers.score))
        if e is not None:
            rows.append((_short(name), None, e.mean, *_known(e), number(e.mean, digits), bracket(e, digits)))
    if numbers.score == "normalised":
        return ranking(rows, [0.0, 1.0])
    return ranking(rows, [e.mean for c in ("floor", "ceiling") if (e := numbers.controls.get((c, "secs"))) is not None])


def _trades(study: Study, numbers: Numbers) -> list[Trade]:
    """Speaker similarity against content where it is judged, and against each identity measure that was taken."""
    found = []
    content = [KNOWN["normalised_content"]] if numbers.content is not None else []
    for metric in [*content, *(m for m in present(study.results()) if m.group == "identity")]:
        points = []
        for mark, arm in enumerate(study.arms):
            x, y = numbers.arms.get((arm, metric.name)), numbers.arms.get((arm, numbers.score))
            if x is not None and y is not None:
                points.append(Point(arm, mark, x.mean, y.mean, *_known(x), *_known(y)))
        if not points:
            continue
        zero = 0.0 if metric.name == "normalised_content" else None
        floor = numbers.controls.get(("floor", metric.name))
        at = zero if zero is not None else floor.mean if floor is not None else None
        if at is not None and numbers.score == "normalised":
            points.append(Point("bare codec", None, at, 0.0))
        for name in _beside(study):
            x, y = (numbers.controls.get((name, m)) for m in (metric.name, numbers.score))
            if x is not None and y is not None:
                points.append(Point(_short(name), None, x.mean, y.mean, *_known(x), *_known(y)))
        good = {"up": "right is better", "down": "left is better"}.get(metric.direction, "")
        unit = f" ({metric.unit})" if metric.unit else ""
        label = f"{KNOWN[numbers.score].label} against {metric.label}, every arm with its intervals"
        svg = pareto(points, f"{metric.label}{unit}{f' · {good}' if good else ''}", KNOWN[numbers.score].label, label)
        found.append(Trade(metric, svg))
    return found


def merged(folders: Sequence[Path], out: Path) -> tuple[Study, list[str]]:
    """One study of all arms, named "<study>: <arm>", and a line for each study that does not fit the first one.

    Raises:
        UserError: if not even two studies fit together.
    """
    studies = [read(folder) for folder in folders]
    first, *others = studies
    refused = []
    fitting = [first]
    for study in others:
        reasons = differences(first, study)
        if reasons:
            refused.append(f"{study.folder} is left out: {'; '.join(reasons)}")
        else:
            fitting.append(study)
    if len(fitting) < 2:
        raise UserError(f"no study can be compared with {first.folder}: " + " | ".join(refused))
    names = [study.name if [s.name for s in fitting].count(study.name) == 1 else str(study.folder) for study in fitting]
    arms = {f"{n}: {arm}": runs for n, study in zip(names, fitting, strict=True) for arm, runs in study.arms.items()}
    controls = dict(first.controls)
    for name, study in zip(names, fitting, strict=True):
        controls |= {
            f"{name}: {control}": run
            for control, run in study.controls.items()
            if control not in first.controls or (run.result is not None and run.result.kind == "system")
        }
    notes = tuple(dict.fromkeys([*(note for study in fitting for note in study.notes), *(f"{r}." for r in refused)]))
    title = f"Leaderboard of {len(fitting)} studies"
    return Study(out, "leaderboard", title, arms, controls, first.sources, notes), refused


def differences(one: Study, other: Study) -> list[str]:
    """What forbids comparing two studies; empty where nothing does."""
    a, b = one.first(), other.first()
    facts = {
        "other conversions (digest of the pair list)": (a.pairs.digest, b.pairs.digest),
        "another judge": (_digests(a.judges), _digests(b.judges)),
        "another base": (a.digests.get("base"), b.digests.get("base")),
        "other speech": (a.digests.get("data"), b.digests.get("data")),
        "another split": (a.split, b.split),
    }
    return [f"{what}: {str(y)[:16]}, not {str(x)[:16]}" for what, (x, y) in facts.items() if x != y]


def _digests(judges: Sequence[object]) -> str:
    return ", ".join(str(getattr(judge, "digest", "")) for judge in judges)


def write(study: Study) -> Path:
    """Compute, and write every file of the report into the study's folder."""
    folder = study.folder
    numbers = compute(study)
    said = verdict(study, numbers)
    tables = all_tables(study, numbers)
    for table in (settings_table(study), failures_table(study), origin_table(study)):
        if table is not None:
            tables[table.name] = table
    for name, table in tables.items():
        write_text(folder / "tables" / f"{name}.csv", as_csv(table))
        write_text(folder / "tables" / f"{name}.tex", as_tex(table))
    write_json(folder / "report.json", plain(study, numbers, said))
    write_text(folder / "report.md", markdown(study, numbers, said, tables))
    asked = listening.contents(listening.trials(study))
    if asked["trials"]:
        write_text(folder / "abx.html", render_abx(study, asked))
    page = folder / "report.html"
    write_text(page, render(study, numbers, said, tables, asks=len(asked["trials"])))
    return page


def plain(study: Study, numbers: Numbers, said: Verdict) -> dict[str, Any]:
    """The report as JSON: what a program would want of it. A number that is not there is null."""

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
        "verdict": asdict(said),
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
    """Headline, arms ranked, cautions; plain text."""
    numbers = compute(study)
    said = verdict(study, numbers)
    names = [n for n in ("normalised", "secs", "specificity", "gap", "stoi") if any(m == n for _, m in numbers.arms)]
    columns = [Column("arm", numeric=False), *(Column(KNOWN[n].label, arrow=KNOWN[n].arrow) for n in names)]
    columns += [Column("seconds"), Column("runs", numeric=False)]
    rows = []
    for arm in [*numbers.ranked, *(a for a in study.arms if a not in numbers.ranked)]:
        runs = study.arms[arm]
        cells = [estimate_cell(numbers.arms.get((arm, n)), KNOWN[n].digits) for n in names]
        cells = [c if i == 0 else Cell(c.text, c.value) for i, c in enumerate(cells)]  # one interval is enough here
        seconds = [s for r in runs if r.ok and r.result and (s := r.result.cost.seconds_alone) is not None]
        time = f"{sum(seconds) / len(seconds):.0f}" if seconds else "—"
        states = [r.status for r in runs]
        counted = ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states))
        rows.append(Row([text_cell(arm), *cells, Cell(time), text_cell(counted)]))
    for control in ("floor", "ceiling") if "secs" in names else ():
        if (e := numbers.controls.get((control, "secs"))) is not None:
            cells = [Cell(estimate_cell(e, 3).text) if n == "secs" else Cell("") for n in names]
            rows.append(Row([text_cell(f"({control})"), *cells, Cell(""), text_cell("")]))
    lines = [said.headline, "", as_text(Table("summary", "", columns, rows)).rstrip(), ""]
    lines += ["seconds: of training one run as if alone, shared work included", ""]
    lines += [f"- {caution}" for caution in said.cautions]
    return "\n".join(lines).rstrip() + "\n"


def build(study_folder: str | Path) -> Path:
    """Write the report of a study folder, or of a run's folder; return the path of report.html.

    Raises snac_core.errors.UserError where the folder is missing or holds no result. Whatever else is missing, failed
    or broken is stated in the page.
    """
    from snac_runner.report.results import read

    return write(read(study_folder))


def summary(study_folder: str | Path) -> str:
    """The verdict and a table of the arms as plain text, for the end of a command."""
    from snac_runner.report.results import read

    return summarise(read(study_folder))


def add_votes(study_folder: str | Path, votes: str | Path) -> Path:
    """Keep the votes that abx.html exported with their study; the next `build` shows them."""
    from snac_runner.report.listening import accept
    from snac_runner.report.results import read

    return accept(read(study_folder), Path(votes))


def build_leaderboard(study_folders: Sequence[str | Path], out: str | Path) -> tuple[Path, str, list[str]]:
    """Write one report over several studies into `out`.

    Returns:
        the path of report.html, the summary, and a line for each study that cannot be compared with the first.
    """

    study, refused = merged([Path(folder) for folder in study_folders], Path(out))
    return write(study), summarise(study), refused
