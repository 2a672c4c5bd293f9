"""What a reader of the numbers must know, generated from the numbers and from nothing else."""

from __future__ import annotations

import math

from runner.evaluate.verdict import ALPHA, MIN_RANGE
from runner.names import CONTROL_ROWS
from runner.report.numbers import Numbers
from runner.report.results import Study
from runner.report.wording import bracket, listed, number, plural

SUSPICIOUS = 0.02  # of equal error rate above one half
FOOLED = 0.15  # of the way from floor to ceiling that the teacher may be ahead of the judge
FRAGILE = 0.05  # cosine that an arm may lose to roughening beyond what the bare codec loses
NO_CONTENT = (
    "these are statements about speaker similarity only, and no arm is called better. "
    "An arm can gain similarity by losing words."
)


def cautions(study: Study, numbers: Numbers) -> list[str]:
    """All of them, the gravest first."""
    return [
        *_unfinished(study),
        *_dead(study, numbers),
        *_unspecific(numbers),
        *_fragile(numbers),
        *_fooled(numbers),
        *_suspicious(numbers),
        *_others(study, numbers),
        *_content(numbers),
    ]


def _unfinished(study: Study) -> list[str]:
    wrong = [run for runs in study.arms.values() for run in runs if not run.ok]
    total = sum(len(runs) for runs in study.arms.values())
    if not wrong:
        return []
    counts = {s: sum(r.status == s for r in wrong) for s in ("failed", "cancelled", "missing", "unreadable")}
    parts = [f"{n} {status}" for status, n in counts.items() if n]
    return [f"{plural(len(wrong), 'run')} of {total} did not succeed ({listed(parts)}); see Failures."]


def _dead(study: Study, numbers: Numbers) -> list[str]:
    names = list(numbers.dead)
    if not names:
        return []
    verb = "is" if len(names) == 1 else "are"
    return [f"{listed(names)} {verb} dead: the embedding moves the judge's score by less than repeated decodes do."]


def _unspecific(numbers: Numbers) -> list[str]:
    """Arms that move towards the target no more under its embedding than under another speaker's."""
    found = []
    for arm in numbers.ranked:
        e = numbers.arms.get((arm, "specificity"))
        if arm in numbers.dead or e is None or not math.isfinite(e.low) or e.low > 0:
            continue
        found.append(f"{arm} {number(e.mean, 3)} {bracket(e, 3)}")
    if not found:
        return []
    return [
        "Not shown to follow the speaker that it is given (specificity does not clear zero; an average voice, or a "
        f"mere change of sex, would score the same): {listed(found)}."
    ]


def _fragile(numbers: Numbers) -> list[str]:
    """Arms whose score suffers from an inaudible change more than the bare codec's does."""
    bare = numbers.controls.get(("floor", "fragility"))
    found = [
        f"{arm} loses {number(e.mean, 3)}"
        for arm in numbers.ranked
        if bare is not None and (e := numbers.arms.get((arm, "fragility"))) and e.mean > bare.mean + FRAGILE
    ]
    if not found or bare is None:
        return []
    return [
        "A 7 kHz low-pass and noise at 30 dB take more from the judge's score than from the bare codec's "
        f"({number(bare.mean, 3)}): {listed(found)}. That is what an inaudible attack on the judge looks like."
    ]


def _fooled(numbers: Numbers) -> list[str]:
    """Arms that are farther on the way from floor to ceiling by their teacher than by the judge.

    Cosines of two encoders do not compare: each has its own zero and its own span.
    """
    told = []
    for arm in numbers.ranked:
        by_teacher, by_judge = (numbers.arms.get((arm, m)) for m in ("teacher_normalised", "normalised"))
        if by_teacher and by_judge and min(by_teacher.mean - FOOLED, by_teacher.low) > by_judge.mean:
            told.append(f"{arm} goes {number(100 * by_teacher.mean, 0)} % of the way by the teacher and "
                        f"{number(100 * by_judge.mean, 0)} % by the judge")  # fmt: skip
    if not told:
        return []
    more = [f"{len(told) - 3} more"] if len(told) > 3 else []
    return [f"The teacher scores higher than the judge does: {listed([*told[:3], *more])}."]


def _suspicious(numbers: Numbers) -> list[str]:
    """Arms that the judge takes for the target more readily than the target itself."""
    names = [arm for arm in numbers.ranked if (e := numbers.arms.get((arm, "eer"))) and e.mean > 0.5 + SUSPICIOUS]
    if not names:
        return []
    return [
        f"The judge takes conversions of {listed(names)} for the target more readily than the target's own speech "
        "through the codec (equal error rate above 50 %): they may please the judge rather than a listener."
    ]


def _others(study: Study, numbers: Numbers) -> list[str]:
    found = []
    missing = [c for c in CONTROL_ROWS if c not in study.controls or not study.controls[c].ok]
    if missing:
        found.append(f"Control{'s' if len(missing) > 1 else ''} missing: {listed(missing)}.")
    if math.isfinite(numbers.noise):
        found.append(f"Decoding again with other noise moves SECS by up to {number(numbers.noise, 4)}; "
                     "smaller differences are none.")  # fmt: skip
    seeds = max((c.difference.seeds for c in numbers.comparisons), default=0)
    if seeds == 2:
        found.append("With two seeds the spread over seeds has one degree of freedom, so only large differences can be "
                     "told from it. A third seed halves the intervals where seeds differ.")  # fmt: skip
    splits = sorted({r.split for r in study.results() if r.kind == "arm" and r.split} - {"test"})
    if splits:
        found.append(f"These numbers are of the {listed(splits)} split, which settings may have been chosen on.")
    weak = [c for c in numbers.comparisons if c.decision.word == "inconclusive" and c.difference.clears(0)]
    weak += [c for c in numbers.comparisons if c.decision.word == "inconclusive" and c.difference.high < 0]
    if any(c.p_holm >= ALPHA for c in weak):
        found.append("An interval may clear zero and the pair still be inconclusive: intervals are not corrected for "
                     "the number of comparisons, p-values are.")  # fmt: skip
    told_of_data = dict.fromkeys(str(n) for r in study.results() for n in r.data.get("notes") or [])
    found += [f"Data: {note}{'' if note.endswith('.') else '.'}" for note in told_of_data]
    lacking = {name: need for r in study.results() for name, need in r.missing.items()}
    if lacking:
        found.append(f"Not measured: {listed([f'{name} ({need})' for name, need in sorted(lacking.items())])}.")
    return [*found, *study.notes]


def _content(numbers: Numbers) -> list[str]:
    """Which content judge the verdict rests on, or why none."""
    tried = [
        f"{c.name} (it tells the right words from another utterance's by {number(100 * c.range, 0)} points)"
        if c.measured
        else f"{c.name} (the controls were judged without it)"
        for c in numbers.content_judges
    ]
    if numbers.content is not None:
        rest = f", beside it by {listed(tried[1:])}" if tried[1:] else ""
        margin = f"a loss of {number(100 * numbers.content.margin, 0)} points or more would count as worse"
        return [f"Content is judged by {tried[0]}{rest}; {margin}."]
    if tried:
        needed = f"{100 * MIN_RANGE:.0f} are needed"
        return [f"Content cannot be judged by {listed(tried)}; {needed}: {NO_CONTENT}"]
    return [f"Content has not been judged: {NO_CONTENT}"]
