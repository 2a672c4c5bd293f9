"""The parts of the page, gathered for the templates."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from runner.evaluate.statistics import Estimate
from runner.report import audio, curves
from runner.report.metrics import KNOWN, Metric, present
from runner.report.numbers import ENDS, Numbers
from runner.report.plots import COLOURS, MOST_NAMED, Bar, Point, key_mark, pareto, ranking
from runner.report.results import Study
from runner.report.sentences import Verdict
from runner.report.tables import Table, as_markdown
from runner.report.wording import bracket, called, number, plural

INTERVALS = (
    "Intervals are 95 %, over seeds, target speakers and source utterances, "
    "and not adjusted for the number of comparisons."
)
TEMPLATES = Path(__file__).parent / "templates"
SECTIONS = (
    *("speaker", "comparisons", "content", "prosody", "identity", "teacher", "embeddings", "sexes", "other"),
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
    groups, more = audio.groups(study)
    return environment.get_template("report.html").render(
        study=study,
        verdict=verdict,
        facts=facts(study, numbers),
        bars=bars,
        ticks=marks,
        score=KNOWN[numbers.score],
        asks=asks,
        content=numbers.content,
        worst=audio.worst(study),
        trades=_trades(study, numbers),
        most_named=MOST_NAMED,
        tables=dict.fromkeys(SECTIONS) | tables,
        panels=curves.panels(study),
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
    if first.teacher is not None and first.teacher.name:
        found.append(f"teacher {first.teacher.name}")
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
