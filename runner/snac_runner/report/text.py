"""What a reader of the numbers must know, generated from the numbers and from nothing else.

The verdict in words, generated from the numbers and from nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from snac_runner.config import CONTROL_ROWS
from snac_runner.evaluate.statistics import Estimate
from snac_runner.evaluate.verdict import ALPHA, MIN_RANGE, Comparison
from snac_runner.report.estimates import Numbers
from snac_runner.report.format import bracket, listed, number, plural, probability
from snac_runner.report.results import Study

SUSPICIOUS = 0.02  # of equal error rate above one half
FOOLED = 0.15  # of the way from floor to ceiling that the conditioning encoder may be ahead of the judge
FRAGILE = 0.05  # cosine that an arm may lose to degradation beyond what the bare codec loses
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
    """Arms that are farther on the way from floor to ceiling by their conditioning encoder than by the judge.

    Cosines of two encoders do not compare: each has its own zero and its own span.
    """
    told = []
    for arm in numbers.ranked:
        by_speaker_encoder, by_judge = (
            numbers.arms.get((arm, m)) for m in ("speaker_encoder_normalised", "normalised")
        )
        if (
            by_speaker_encoder
            and by_judge
            and min(by_speaker_encoder.mean - FOOLED, by_speaker_encoder.low) > by_judge.mean
        ):
            told.append(f"{arm} goes {number(100 * by_speaker_encoder.mean, 0)} % of the way by the conditioning encoder and "
                        f"{number(100 * by_judge.mean, 0)} % by the judge")  # fmt: skip
    if not told:
        return []
    more = [f"{len(told) - 3} more"] if len(told) > 3 else []
    return [f"The conditioning encoder scores higher than the judge does: {listed([*told[:3], *more])}."]


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


GAP, KEPT, MOVED, LOST = 0.1, 0.03, 0.6, 0.15  # the goal of a conversion: gap, spk_id, normalised SECS and content
MOST_PAIRS = 5  # pairs told in words; the table has all


@dataclass(frozen=True)
class Verdict:
    """`kind` is "difference", "inconclusive", "single" or "no verdict"; `missing` says what a verdict would need."""

    kind: str
    headline: str
    findings: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    cautions: tuple[str, ...] = ()


def verdict(study: Study, numbers: Numbers) -> Verdict:
    """What the numbers allow to be said."""
    said = cautions(study, numbers)
    finished = study.finished()
    if not finished:
        return Verdict("no verdict", "No verdict: no arm has finished.", cautions=tuple(said))
    distributed = [a for a in numbers.ranked if (a, "secs") in numbers.arms]
    if not distributed:
        headline = "No verdict: no finished arm was judged for speaker similarity."
        return Verdict("no verdict", headline, cautions=tuple(said))
    findings = [_place(numbers, arm) for arm in distributed[:3]] + _goal(numbers, distributed)
    if len(finished) == 1:
        missing = numbers.obstacles
        headline = f"One arm, {finished[0]}: nothing to compare it with."
        return Verdict("single", headline, tuple(findings), missing, tuple(said))
    words = {c.decision.word for c in numbers.comparisons}
    missing = tuple(dict.fromkeys(m for c in numbers.comparisons for m in c.decision.missing))
    if words == {"no verdict"}:
        headline = "No verdict: " + "; ".join(missing) + "."
        return Verdict("no verdict", headline, tuple(findings), missing, tuple(said))
    telling = sorted(numbers.comparisons, key=lambda c: (distributed[0] not in (c.a, c.b), abs(c.difference.mean)))
    findings += [_compared(c) for c in telling[:MOST_PAIRS]]
    if len(telling) > MOST_PAIRS:
        findings.append(f"{plural(len(telling) - MOST_PAIRS, 'more pair')} of arms: see the table of pairs.")
    headline = _headline(numbers)
    kind = "difference" if words & {"higher", "lower", "better", "worse"} else "inconclusive"
    return Verdict(kind, headline, tuple(findings), missing, tuple(said))


def _headline(numbers: Numbers) -> str:
    above: dict[str, set[str]] = {arm: set() for arm in numbers.ranked}
    for c in numbers.comparisons:
        if c.decision.word in ("higher", "better"):
            above[c.a].add(c.b)
        elif c.decision.word in ("lower", "worse"):
            above[c.b].add(c.a)
    arms = list(numbers.ranked)
    beaten = set().union(*above.values())
    whole = numbers.content is not None
    one, many = ("is better than", "are better than") if whole else (
        "has higher speaker similarity than", "have higher speaker similarity than")  # fmt: skip
    if not beaten:
        what = "speaker similarity or content" if whole else "speaker similarity"
        return f"Inconclusive: no difference in {what} between {plural(len(arms), 'arm')} is established."
    leaders = [arm for arm in arms if arm not in beaten]
    others = [arm for arm in arms if arm in beaten]
    if len(leaders) == 1 and set(others) <= above[leaders[0]]:
        against = others[0] if len(others) == 1 else f"the other {len(others)} arms"
        return f"{leaders[0]} {one} {against}."
    if len(leaders) == 1:
        rest = [o for o in others if o not in above[leaders[0]]]
        won = listed([o for o in others if o in above[leaders[0]]])
        return f"{leaders[0]} {one} {won}; against {listed(rest)} nothing is established."
    if leaders and all(set(others) <= above[arm] for arm in leaders):
        between = {c.decision.word for c in numbers.comparisons if c.a in leaders and c.b in leaders}
        left = "it is inconclusive" if between == {"inconclusive"} else "nothing is established"
        where = "between the two" if len(leaders) == 2 else "among themselves"
        return f"{listed(leaders)} {many} {listed(others)}; {where} {left}."
    parts = [f"{arm} above {listed([o for o in arms if o in above[arm]])}" for arm in arms if above[arm]]
    return f"{'Better' if whole else 'Speaker similarity'}: {'; '.join(parts)}; no other difference is established."


def _place(numbers: Numbers, arm: str) -> str:
    if numbers.score == "normalised" and (e := numbers.arms.get((arm, "normalised"))) is not None:
        where = f"{arm} goes {number(100 * e.mean, 0)} % of the way from the bare codec to the target's own voice"
        return f"{where} (normalised SECS {number(e.mean)} {bracket(e)})".replace(" )", ")") + "."
    e = numbers.arms[arm, "secs"]
    return f"{arm} scores SECS {number(e.mean, 3)} {bracket(e, 3)}".rstrip() + "."


def _goal(numbers: Numbers, arms: Sequence[str]) -> list[str]:
    """Whether conversions are as near to their speakers as identities, whose own quality was kept."""
    bare = numbers.controls.get(("floor", "spk_id"))
    if bare is None or not all((arm, "gap") in numbers.arms for arm in arms):
        return []
    parts = {
        "gap": (f"gap under {GAP:g}", GAP),
        "spk_id": (f"spk_id at most {KEPT:g} above the bare codec's {number(bare.mean, 3)}", bare.mean + KEPT),
        "normalised": (f"normalised SECS at least {MOVED:g}", -MOVED),
        "normalised_content": (f"normalised content error at most {LOST:g}", LOST),
    }
    measured = [m for m in parts if all((arm, m) in numbers.arms for arm in arms)]

    def reached(arm: str) -> bool:
        means = {m: numbers.arms[arm, m].mean for m in measured}
        return all((-mean if m == "normalised" else mean) <= parts[m][1] for m, mean in means.items())

    there = [arm for arm in arms if reached(arm)]
    goal = listed([parts[m][0] for m in measured])
    return [f"The goal ({goal}) is reached, by the means, by {listed(there) if there else 'no arm'}."]


def _compared(c: Comparison) -> str:
    a, b, sign = (c.a, c.b, 1) if c.difference.mean >= 0 else (c.b, c.a, -1)
    if c.decision.word in ("better", "worse"):
        a, b, sign = (c.a, c.b, 1) if c.decision.word == "better" else (c.b, c.a, -1)
    size = _signed(c.difference, sign)
    if c.decision.word == "no verdict":
        return f"{a} against {b}: no verdict ({'; '.join(c.decision.missing)})."
    content = ""
    if c.content is not None:
        points = _signed(c.content, sign, scale=100, digits=1)
        content = f"; content error {points} points, {probability(c.content_p_holm)}"
    if c.decision.word == "inconclusive":
        found = f"a difference of {number(c.detectable)} would have been found four times in five"
        if c.detectable > 1:  # two seeds far apart, say
            found = "not even the whole way from the bare codec to the target would have been found"
        if c.content is not None and c.p_holm < ALPHA and (c.difference.low > 0 or c.difference.high < 0):
            found = "ahead in speaker similarity, and not shown to keep its content within the margin"
            if c.content_p_holm < ALPHA and sign * c.content.low > 0 and sign * c.content.high > 0:
                found = "ahead in speaker similarity and behind in content"
        return f"{a} against {b}: inconclusive ({size}, {probability(c.p_holm)}; {found}{content})."
    if content:
        return f"{a} is better than {b}: {size} normalised SECS, {probability(c.p_holm)}{content} (Holm's correction)."
    found = f"{size.lstrip('+')} normalised SECS ({probability(c.p_holm)} after Holm's correction)"
    return f"{a} is higher than {b} by {found}."


def _signed(e: Estimate, sign: int, *, scale: float = 1.0, digits: int = 2) -> str:
    """A difference as +0.10 [0.05, 0.15], seen from the other side where `sign` is -1."""
    low, high = sorted((scale * sign * e.low, scale * sign * e.high))
    mean = number(scale * sign * e.mean, digits, signed=True)
    return f"{mean} [{number(low, digits)}, {number(high, digits)}]"
