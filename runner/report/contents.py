"""Which tables a report has, filled from the numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from runner.evaluate.statistics import Estimate
from runner.report.inside import codes_table, cost_table, taps_table
from runner.report.metrics import KNOWN, Metric, present
from runner.report.numbers import Numbers
from runner.report.results import Study
from runner.report.tables import BLANK, EMPTY, Cell, Column, Row, Table, text_cell
from runner.report.wording import bracket, called, number

COMPUTED = (
    *(
        "normalised",
        "normalised_content",
        "specificity",
        "gap",
        "teacher_normalised",
        "overrating",
        "fragility",
        "accepted",
        "eer",
        "preferred",
        "lost",
    ),
)  # here, from what the results measure


def _blank(cell: Cell) -> Cell:
    return BLANK if cell.value is None else cell


def estimate_cell(e: Estimate | None, digits: int, *, scale: float = 1.0) -> Cell:
    """A mean with its interval in small print."""
    if e is None or not math.isfinite(e.mean):
        return EMPTY
    if scale != 1:
        e = replace(e, mean=scale * e.mean, low=scale * e.low, high=scale * e.high)
    low, high = (e.low, e.high) if math.isfinite(e.low) else (None, None)
    return Cell(number(e.mean, digits), e.mean, bracket(e, digits), low, high)


def column(metric: Metric) -> Column:
    return Column(metric.label, metric.unit, metric.arrow, metric.meaning)


def metric_table(
    study: Study,
    numbers: Numbers,
    name: str,
    title: str,
    metrics: Sequence[Metric],
    *,
    controls: bool = True,
) -> Table | None:
    """Arms and controls by metrics."""
    metrics = [m for m in metrics if any(k[1] == m.name for k in [*numbers.arms, *numbers.controls])]
    if not metrics:
        return None
    columns = [Column("Arm", numeric=False), *(column(m) for m in metrics), Column("n_ok/N"), Column("Seeds")]
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
    for control in sorted(
        study.controls if controls else (), key=lambda c: ({"source": 0, "floor": 1, "ceiling": 2}.get(c, 3), c)
    ):
        cells = [estimate_cell(numbers.controls.get((control, m.name)), m.digits) for m in metrics]
        if metrics[0].name == "normalised_content" and control in ("floor", "mismatched"):
            exact = 0.0 if control == "floor" else 1.0
            cells[0] = Cell(number(exact), exact)
        if metrics[0].name == "normalised" and numbers.score == "normalised" and control in ("floor", "ceiling"):
            exact = 0.0 if control == "floor" else 1.0
            cells[0] = Cell(number(exact), exact)
        if any(c.value is not None for c in cells):
            rows.append(Row([text_cell(called(control)), *map(_blank, cells), BLANK, BLANK], "control"))
    return Table(name, title, columns, rows) if any(row.kind != "failed" for row in rows) else None


def comparison_table(numbers: Numbers) -> Table | None:
    if not numbers.comparisons:
        return None
    unit = "normalised SECS" if numbers.score == "normalised" else "SECS"
    columns = [
        Column("Arm A", numeric=False),
        Column("Arm B", numeric=False),
        Column("A − B", unit, meaning="95 % interval, not adjusted for the number of comparisons"),
        Column("p", meaning="two-sided; the larger of the sign-flip test's over target speakers and the interval's"),
        Column("p, Holm", meaning="adjusted over all pairs of arms and both primaries"),
        Column("Detectable", unit, meaning="true difference that this study would find with 80 % power"),
    ]
    judged = numbers.content is not None
    if judged:
        columns += [
            Column("A − B, content error", "points", "", "95 % interval, not adjusted; below zero is fewer errors"),
            Column("p, Holm", "content"),
            Column("Detectable", "points"),
        ]
    columns.append(Column("Verdict" if judged else "Speaker similarity", numeric=False))
    rows = []
    for c in numbers.comparisons:
        word = {"higher": "A higher", "lower": "B higher", "better": "A better", "worse": "B better"}
        said = word.get(c.decision.word, c.decision.word)
        ps = [Cell(f"{p:.3g}" if math.isfinite(p) else "—", p) for p in (c.p, c.p_holm)]
        size = estimate_cell(c.difference, 2)
        detectable = Cell(number(c.detectable), c.detectable)
        content: list[Cell] = []
        if c.content is not None:
            p, effect = c.content_p_holm, 100 * c.content_detectable
            content = [estimate_cell(c.content, 1, scale=100), Cell(f"{p:.3g}", p), Cell(number(effect, 1), effect)]
        rows.append(Row([text_cell(c.a), text_cell(c.b), size, *ps, detectable, *content, text_cell(said)]))
    return Table("comparisons", "Pairs of arms", columns, rows)


def sex_table(study: Study, numbers: Numbers) -> Table | None:
    if not numbers.by_sex:
        return None
    columns = [Column("Arm", numeric=False), Column("Same sex", "SECS", "↑"), Column("Cross sex", "SECS", "↑")]
    marks = list(study.arms)
    rows = [
        Row(
            [text_cell(a), *(estimate_cell(numbers.by_sex.get((a, same)), 3) for same in (True, False))],
            "arm",
            marks.index(a),
        )
        for a in study.finished()
    ]
    return Table("sexes", "Same-sex and cross-sex pairs", columns, rows)


def all_tables(study: Study, numbers: Numbers) -> dict[str, Table]:
    """Every table with something in it, by name, in the page's order."""
    metrics = present(study.results())
    groups: dict[str, list[Metric]] = {}
    named = {n: KNOWN[n] for n in COMPUTED} | {m.name: m for m in metrics}
    for m in sorted(named.values(), key=lambda m: list(KNOWN).index(m.name) if m.name in KNOWN else len(KNOWN)):
        groups.setdefault(m.group, []).append(m)
    speaker = groups["speaker"]
    tables = [
        metric_table(study, numbers, "speaker", "Speaker similarity, by the judge", speaker),
        metric_table(study, numbers, "embeddings", "SECS to the target, by the embedding given", _given(groups)),
        comparison_table(numbers),
        metric_table(study, numbers, "content", "Content, of the converted output", groups.get("content", [])),
        metric_table(study, numbers, "prosody", "Prosody, of the converted output", groups.get("prosody", [])),
        metric_table(
            study, numbers, "identity", "Identity quality, under the own embedding", groups.get("identity", [])
        ),
        metric_table(study, numbers, "teacher", "Is the judge fooled?", _teacher(groups)),
        sex_table(study, numbers),
        metric_table(study, numbers, "other", "Other measures", groups.get("other", [])),
        codes_table(study),
        taps_table(study),
        cost_table(study),
    ]
    return {t.name: t for t in tables if t is not None}


def _given(groups: dict[str, list[Metric]]) -> list[Metric]:
    """Under the target's embedding, the source's own, and another speaker's."""
    others = groups.get("embedding", [])
    return [replace(KNOWN["secs"], label="SECS under the target's embedding"), *others] if others else []


def _teacher(groups: dict[str, list[Metric]]) -> list[Metric]:
    measured = any(m.name == "teacher_secs" for m in groups["teacher"])
    rough = any(m.name == "secs_roughened" for m in groups["teacher"])
    shown: list[str] = ["teacher_secs", "teacher_normalised", "overrating"] if measured else []
    shown += ["secs_roughened", "fragility"] if rough else []
    return [KNOWN["secs"], *(KNOWN[name] for name in shown)] if shown else []
