"""Writing the report's files."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from runner.evaluate.statistics import Estimate
from runner.report import abx
from runner.report.contents import all_tables, estimate_cell
from runner.report.metrics import KNOWN
from runner.report.numbers import Numbers, compute
from runner.report.page import markdown, render, render_abx
from runner.report.provenance import failures_table, origin_table, settings_table
from runner.report.results import Study
from runner.report.sentences import Verdict, verdict
from runner.report.tables import Cell, Column, Row, Table, as_csv, as_tex, as_text, text_cell
from snac_core import atomic


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
        atomic.write_text(folder / "tables" / f"{name}.csv", as_csv(table))
        atomic.write_text(folder / "tables" / f"{name}.tex", as_tex(table))
    atomic.write_json(folder / "report.json", plain(study, numbers, said))
    atomic.write_text(folder / "report.md", markdown(study, numbers, said, tables))
    asked = abx.contents(abx.trials(study))
    if asked["trials"]:
        atomic.write_text(folder / "abx.html", render_abx(study, asked))
    page = folder / "report.html"
    atomic.write_text(page, render(study, numbers, said, tables, asks=len(asked["trials"])))
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
