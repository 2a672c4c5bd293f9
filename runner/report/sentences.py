"""The verdict in words, generated from the numbers and from nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from runner.evaluate.comparing import Comparison
from runner.evaluate.statistics import Estimate
from runner.evaluate.verdict import ALPHA
from runner.report.cautions import cautions
from runner.report.numbers import Numbers
from runner.report.results import Study
from runner.report.wording import bracket, listed, number, plural, probability

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
    placed = [a for a in numbers.ranked if (a, "secs") in numbers.arms]
    if not placed:
        headline = "No verdict: no finished arm was judged for speaker similarity."
        return Verdict("no verdict", headline, cautions=tuple(said))
    findings = [_place(numbers, arm) for arm in placed[:3]] + _goal(numbers, placed)
    if len(finished) == 1:
        missing = numbers.obstacles
        headline = f"One arm, {finished[0]}: nothing to compare it with."
        return Verdict("single", headline, tuple(findings), missing, tuple(said))
    words = {c.decision.word for c in numbers.comparisons}
    missing = tuple(dict.fromkeys(m for c in numbers.comparisons for m in c.decision.missing))
    if words == {"no verdict"}:
        headline = "No verdict: " + "; ".join(missing) + "."
        return Verdict("no verdict", headline, tuple(findings), missing, tuple(said))
    telling = sorted(numbers.comparisons, key=lambda c: (placed[0] not in (c.a, c.b), abs(c.difference.mean)))
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
