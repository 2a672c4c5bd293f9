"""The sentences of a report: the verdict, findings and cautions, generated from the estimates only.

`snac_runner.evaluate.verdict` defines the verdicts "better", "higher", "mixed", "inconclusive" and "no verdict".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from snac_runner.config import CONTROL_ROWS
from snac_runner.evaluate.statistics import Estimate
from snac_runner.evaluate.verdict import ALPHA, MIN_RANGE, SPEAKER_MARGIN, Comparison
from snac_runner.report.estimates import StudyEstimates
from snac_runner.report.format import bracket, display_of, listed, number, plural, short_label
from snac_runner.report.results import Study
from snac_runner.report.study_tables import needed_words

SUSPICIOUS_EER = 0.02  # above one half
OVERFITTED = 0.15  # of the gap between floor and ceiling: the conditioning encoder's normalised SECS above the judge's
WEAK_EER = 0.2  # of a judge, on real speech through the codec
FRAGILE = 0.05  # cosine: loss by degradation above the bare codec's
GOAL_GAP, GOAL_SPK_ID, GOAL_NORMALISED, GOAL_CONTENT = 0.1, 0.03, 0.6, 0.15
"""The goal of a conversion: gap, spk_id above the bare codec's, normalised SECS and normalised content error."""
MAX_PAIRS = 3  # of which the size is stated at the top; the table has all
SIMILARITY_ONLY = (
    "the verdicts are about speaker similarity only, and no arm is called better. An arm can gain similarity and lose "
    "content."
)


@dataclass(frozen=True)
class Verdict:
    """The text at the top of a report.

    Attributes:
        kind: "difference", "inconclusive", "single" (one arm) or "no verdict".
        headline: which arm is better at what, in one sentence.
        compared: what was compared, and on what.
        size: by how much, and with which certainty.
        next_step: what to do next.
        findings: further sentences on the arms.
        missing: what the data lack for a verdict.
        cautions: what limits the verdict.
    """

    kind: str
    headline: str
    compared: str = ""
    size: str = ""
    next_step: str = ""
    findings: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    cautions: tuple[str, ...] = ()


def verdict(study: Study, numbers: StudyEstimates) -> Verdict:
    """The sentences that the estimates allow."""
    warned, compared = tuple(cautions(study, numbers)), _subject(study, numbers)
    finished = study.finished()
    measured = [a for a in numbers.ranked if (a, "secs") in numbers.arms]
    if not measured:
        lacking = "speaker similarity was not measured for any arm" if finished else "no arm has finished"
        step = "Add the judge's SECS." if finished else _continue(study)
        return Verdict("no verdict", f"No verdict: {lacking}.", compared, next_step=step, cautions=warned)
    findings = tuple(_goal(numbers, measured))
    if len(finished) == 1:
        headline = f"One arm, {finished[0]}: there is nothing to compare it with."
        step = _train_longer(numbers) or "Add a second arm, or an external system, to compare it with."
        position = _position(numbers, finished[0])
        return Verdict("single", headline, compared, position, step, findings, numbers.obstacles, warned)
    words = {c.decision.word for c in numbers.comparisons}
    missing = tuple(dict.fromkeys(m for c in numbers.comparisons for m in c.decision.missing))
    if words == {"no verdict"}:
        headline = "No verdict: " + "; ".join(missing) + "."
        step = "Add what is missing. Until then, the numbers below are only a description of these runs."
        step = " ".join(filter(None, [_train_longer(numbers), step]))
        return Verdict("no verdict", headline, compared, _leading(numbers), step, findings, missing, warned)
    kind = "difference" if words & {"higher", "lower", "better", "worse", "mixed"} else "inconclusive"
    size = _sizes(numbers) if kind == "difference" else _leading(numbers)
    return Verdict(kind, _headline(numbers), compared, size, _next_step(numbers), findings, missing, warned)


def _continue(study: Study) -> str:
    """What to do where no run has succeeded."""
    if any(run.status == "failed" for runs in study.arms.values() for run in runs):
        return (
            "See Failures. A failed run is kept: once its cause is removed, delete its folder, and run the same "
            "command again."
        )
    return "See Failures, and run the same command again: it continues."


def _subject(study: Study, numbers: StudyEstimates) -> str:
    """What was compared, and on what."""
    seeds = {r.seed for runs in study.arms.values() for r in runs}
    judges = [j.name for j in study.first().judges[:1]] + list(numbers.agreement)
    measures = [f"speaker similarity{f' (judge: {listed(judges)})' if judges else ''}"]
    if numbers.content is not None:
        measures.append(f"content ({display_of(numbers.content.name).label.lower()})")
    verb = "were" if len(study.arms) > 1 else "was"
    return (
        f"{plural(len(study.arms), 'arm')} with {plural(len(seeds), 'seed')} {verb} compared in {listed(measures)} on "
        f"{plural(numbers.pairs, 'conversion')} to {plural(numbers.targets, 'target speaker')}."
    )


def _pair(numbers: StudyEstimates, a: str, b: str) -> tuple[Comparison, int] | None:
    """The comparison of two arms, and the sign that makes it A minus B."""
    return next(((c, 1 if c.a == a else -1) for c in numbers.comparisons if {c.a, c.b} == {a, b}), None)


def _below(numbers: StudyEstimates) -> dict[str, list[str]]:
    """Arm to the arms that it is better than, in the order of the ranking."""
    worse = {(c.b, c.a) if c.decision.word in ("lower", "worse") else (c.a, c.b)
             for c in numbers.comparisons if c.decision.word in ("higher", "better", "lower", "worse")}  # fmt: skip
    return {arm: [other for other in numbers.ranked if (arm, other) in worse] for arm in numbers.ranked}


def _unit(numbers: StudyEstimates) -> str:
    return "normalised SECS" if numbers.score == "normalised" else "SECS"


def _sizes(numbers: StudyEstimates) -> str:
    """By how much the arms that win are ahead of the best arm that they are better than; else, of mixed pairs."""
    told: list[str] = []
    for arm, others in _below(numbers).items():
        if not others or len(told) == MAX_PAIRS:
            continue
        found = _pair(numbers, arm, others[0])
        assert found is not None
        c, sign = found
        size = f"{arm} is ahead of {others[0]} by {_signed(c.difference, sign)} {_unit(numbers)}"
        if c.content is not None:
            size += f", with {_signed(c.content, sign, scale=100, digits=1)} points of content error"
        told.append(size)
    for c in () if told else _leading_mixed(numbers):
        ahead = c.fewer_errors or c.more_similar
        other, sign = (c.b, 1) if ahead == c.a else (c.a, -1)
        assert c.content is not None
        told.append(
            f"{ahead} against {other}: {_signed(c.content, sign, scale=100, digits=1)} points of content error, "
            f"{_signed(c.difference, sign)} {_unit(numbers)}"
        )
    return f"{'; '.join(told)}."


def _mixed(numbers: StudyEstimates) -> list[Comparison]:
    return [c for c in numbers.comparisons if c.decision.word == "mixed"]


def _leading_mixed(numbers: StudyEstimates) -> list[Comparison]:
    """The mixed pairs, if they are few; else the one of the arms that are ahead of most others in each measure."""
    pairs = _mixed(numbers)
    if len(pairs) <= MAX_PAIRS:
        return pairs
    leaders = {max(ahead, key=lambda arm: len(ahead[arm])) for ahead in _ahead(numbers).values() if ahead}
    return [c for c in pairs if {c.a, c.b} == leaders] or pairs[:1]


def _ahead(numbers: StudyEstimates) -> dict[str, dict[str, list[str]]]:
    """Of mixed pairs: measure to arm, by rank, to the arms that it is ahead of in this measure."""
    found: dict[str, dict[str, list[str]]] = {}
    for measure, better in (("content", "fewer_errors"), ("speaker similarity", "more_similar")):
        beaten: dict[str, list[str]] = {}
        for c in _mixed(numbers):
            if arm := getattr(c, better):
                beaten.setdefault(arm, []).append(c.b if arm == c.a else c.a)
        found[measure] = {arm: beaten[arm] for arm in numbers.ranked if arm in beaten}
    return found


def _in_one_measure(numbers: StudyEstimates) -> str:
    """What mixed pairs show: which arms are ahead in which measure; of many, the one that is ahead of most."""
    parts, few = [], len(_mixed(numbers)) <= MAX_PAIRS
    advantages = {"content": "fewer content errors", "speaker similarity": "higher speaker similarity"}
    for measure, beaten in _ahead(numbers).items():
        alike: dict[frozenset[str], list[str]] = {}  # arms to those that are ahead of exactly these
        for arm in beaten if few else [max(beaten, key=lambda arm: len(beaten[arm]))] if beaten else []:
            alike.setdefault(frozenset(beaten[arm]), []).append(arm)
        for others, arms in alike.items():
            verb = "has" if len(arms) == 1 else "have"
            than = listed([o for o in numbers.ranked if o in others]) if few else f"{len(others)} other arms"
            parts.append(f"{listed(arms)} {verb} {advantages[measure]} than {than}")
        if not beaten:
            parts.append(f"no difference in {measure} is shown")
    return f"{'; '.join(parts)}."


def _leading(numbers: StudyEstimates) -> str:
    """Which arm scored highest, and how probable it is that it is above the next one."""
    first, second = numbers.ranked[:2]
    found = _pair(numbers, first, second)
    scores = [f"{arm} ({number(e.mean)})" if (e := numbers.arms.get((arm, numbers.score))) else arm
              for arm in (first, second)]  # fmt: skip
    text = f"{scores[0]} has the highest {_unit(numbers)}, before {scores[1]}"
    if found is None or not math.isfinite(found[0].above):
        return f"{text}."
    c, sign = found
    probable = c.above if sign > 0 else 1 - c.above
    return f"{text}; the probability that it is above is {number(100 * probable, 0)} %."


def _train_longer(numbers: StudyEstimates) -> str:
    """What to do if no arm is shown to be specific; else empty."""
    if len(_not_specific(numbers)) < len(numbers.ranked):
        return ""
    which = "No arm is" if len(numbers.ranked) > 1 else "It is not"
    goal = "shown to convert to the target more than to another speaker"
    return f"{which} {goal}: train longer, or use more target speakers."


def _next_step(numbers: StudyEstimates) -> str:
    """Which arm to keep, or what would decide between the best ones."""
    below = _below(numbers)
    beaten = {other for others in below.values() for other in others}
    if not beaten and (step := _train_longer(numbers)):
        return step
    leaders = [arm for arm in numbers.ranked if arm not in beaten] or list(numbers.ranked)
    if len(leaders) == 1:
        return f"Keep {leaders[0]}."
    dropped = f"Drop {listed([arm for arm in numbers.ranked if arm in beaten])}. " if beaten else ""
    first, second = leaders[:2]
    found = _pair(numbers, first, second)
    assert found is not None
    c, sign = found
    pair = f"between {first} and {second}"
    if c.decision.word == "no verdict":
        return f"{dropped}A verdict {pair} {'; '.join(c.decision.missing)}."
    if not c.judges_agree:
        return f"{dropped}Listen to {first} and {second}: the judges of the speaker disagree on which is ahead."
    if c.p_adjusted < ALPHA and c.content is not None:
        return f"{dropped}{_by_content(c, first, sign)}."
    measure = ""
    if c.decision.word == "mixed":
        dropped += f"Keep {c.fewer_errors} if content is more important to you. "
        measure = " in speaker similarity"
    if numbers.score == "normalised" and max(-c.difference.low, c.difference.high) < SPEAKER_MARGIN:
        return f"{dropped}{first} and {second} differ by less than {SPEAKER_MARGIN:g}: keep the cheaper one."
    difference = number(abs(c.difference.mean))
    small = ""
    if c.detectable > 1:  # e.g. few seeds that differ much
        small = "This study is too small: its minimum detectable effect exceeds the full range. "
    if needed := needed_words(c):
        now = f"now {c.difference.seeds} and {c.difference.targets}"
        true = f"if the true difference is {difference} as measured"
        return f"{dropped}{small}To decide{measure} {pair}, use {needed} ({now}), {true}."
    told = f"The measured difference{measure} {pair} ({difference}) is too small to be decided: keep either."
    return f"{dropped}{small}{told}"


def _by_content(c: Comparison, ahead: str, sign: int) -> str:
    """Why an arm with significantly higher speaker similarity is not better."""
    assert c.content is not None
    if c.content_p_adjusted < ALPHA and sign * c.content.low > 0 and sign * c.content.high > 0:
        return f"{ahead} has higher speaker similarity and more content errors: choose by what you need"
    return (
        f"{ahead} has higher speaker similarity, but may lose more content than the margin: add target speakers to "
        "show that it does not"
    )


def _headline(numbers: StudyEstimates) -> str:
    below: dict[str, set[str]] = {arm: set() for arm in numbers.ranked}  # arm to the arms that it is better than
    undecided: dict[frozenset[str], str] = {}
    for c in numbers.comparisons:
        if c.decision.word in ("higher", "better"):
            below[c.a].add(c.b)
        elif c.decision.word in ("lower", "worse"):
            below[c.b].add(c.a)
        else:
            undecided[frozenset((c.a, c.b))] = c.decision.word
    arms = list(numbers.ranked)
    beaten = set().union(*below.values())
    whole = numbers.content is not None
    one, many = ("is better than", "are better than") if whole else (
        "has higher speaker similarity than", "have higher speaker similarity than")  # fmt: skip
    if not beaten and _mixed(numbers):
        return _in_one_measure(numbers)
    if not beaten:
        measure = "speaker similarity or content" if whole else "speaker similarity"
        return f"Inconclusive: no difference in {measure} between {plural(len(arms), 'arm')} is shown."
    leaders = [arm for arm in arms if arm not in beaten]
    others = [arm for arm in arms if arm in beaten]
    if len(leaders) == 1 and set(others) <= below[leaders[0]]:
        against = others[0] if len(others) == 1 else f"the other {len(others)} arms"
        return f"{leaders[0]} {one} {against}."
    if len(leaders) == 1:
        rest = [o for o in others if o not in below[leaders[0]]]
        won = listed([o for o in others if o in below[leaders[0]]])
        result = _result({undecided[frozenset((leaders[0], o))] for o in rest})
        return f"{leaders[0]} {one} {won}. Compared with {listed(rest)}: {result}."
    if leaders and all(set(others) <= below[arm] for arm in leaders):
        result = _result({word for pair, word in undecided.items() if pair <= set(leaders)})
        between = "these two" if len(leaders) == 2 else "these"
        return f"{listed(leaders)} {many} {listed(others)}. Between {between}: {result}."
    word = "better" if whole else "higher"
    parts = [f"{arm} is {word} than {listed([o for o in arms if o in below[arm]])}" for arm in arms if below[arm]]
    other = f" Other pairs: {_result(set(undecided.values()))}." if undecided else ""
    return f"{'Overall' if whole else 'Speaker similarity'}: {'; '.join(parts)}.{other}"


def _result(words: set[str]) -> str:
    return " or ".join(sorted(words))


def _position(numbers: StudyEstimates, arm: str) -> str:
    """Where an arm is between floor and ceiling."""
    if numbers.score == "normalised" and (e := numbers.arms.get((arm, "normalised"))) is not None:
        closes = f"{arm} closes {number(100 * e.mean, 0)} % of the gap between floor and ceiling"
        return f"{closes} (normalised SECS {f'{number(e.mean)} {bracket(e)}'.rstrip()})."
    e = numbers.arms[arm, "secs"]
    return f"{arm} has a SECS of {number(e.mean, 3)} {bracket(e, 3)}".rstrip() + "."


def _goal(numbers: StudyEstimates, arms: Sequence[str]) -> list[str]:
    """Which arms reach the goal: conversions as close to their speakers as identities, and good identities."""
    bare = numbers.controls.get(("floor", "spk_id"))
    if bare is None or not all((arm, "gap") in numbers.arms for arm in arms):
        return []
    parts = {
        "gap": (f"gap below {GOAL_GAP:g}", GOAL_GAP),
        "spk_id": (
            f"spk_id at most {GOAL_SPK_ID:g} above the bare codec's {number(bare.mean, 3)}",
            bare.mean + GOAL_SPK_ID,
        ),
        "normalised": (f"normalised SECS at least {GOAL_NORMALISED:g}", -GOAL_NORMALISED),
        "normalised_content": (f"normalised content error at most {GOAL_CONTENT:g}", GOAL_CONTENT),
    }
    measured = [m for m in parts if all((arm, m) in numbers.arms for arm in arms)]

    def reached(arm: str) -> bool:
        means = {m: numbers.arms[arm, m].mean for m in measured}
        return all((-mean if m == "normalised" else mean) <= parts[m][1] for m, mean in means.items())

    there = [arm for arm in arms if reached(arm)]
    goal = listed([parts[m][0] for m in measured])
    verb = "reaches" if len(there) < 2 else "reach"
    return [f"{listed(there) if there else 'No arm'} {verb} the goal in the mean ({goal})."]


def _signed(e: Estimate, sign: int, *, scale: float = 1.0, digits: int = 2) -> str:
    """A difference as +0.10 [0.05, 0.15]; a `sign` of -1 exchanges the arms."""
    low, high = sorted((scale * sign * e.low, scale * sign * e.high))
    mean = number(scale * sign * e.mean, digits, signed=True)
    return f"{mean} [{number(low, digits)}, {number(high, digits)}]"


def cautions(study: Study, numbers: StudyEstimates) -> list[str]:
    """What limits the verdict, the most serious first."""
    return [
        *_unfinished(study),
        *_dead(numbers),
        *_unspecific(numbers),
        *_fragile(numbers),
        *_overfitted(numbers),
        *_suspicious(numbers),
        *_judges(study, numbers),
        *_others(study, numbers),
        *_systems(study),
        *_content(numbers),
    ]


def _unfinished(study: Study) -> list[str]:
    unfinished = [run for runs in study.arms.values() for run in runs if not run.ok]
    total = sum(len(runs) for runs in study.arms.values())
    if not unfinished:
        return []
    counts = {s: sum(r.status == s for r in unfinished) for s in ("failed", "cancelled", "missing", "unreadable")}
    parts = [f"{n} {status}" for status, n in counts.items() if n]
    return [f"{plural(len(unfinished), 'run')} of {total} did not succeed ({listed(parts)}); see Failures."]


def _systems(study: Study) -> list[str]:
    names = study.systems()
    if not names:
        return []
    verb, them = ("was", "it") if len(names) == 1 else ("were", "them")
    return [f"{listed(names)} {verb} not trained in this study, and no verdict includes {them}."]


def _dead(numbers: StudyEstimates) -> list[str]:
    names = list(numbers.dead)
    if not names:
        return []
    verb = "is" if len(names) == 1 else "are"
    return [f"{listed(names)} {verb} dead: the embedding changes the judge's score by less than decoding noise does."]


def _not_specific(numbers: StudyEstimates) -> dict[str, Estimate]:
    """Arms of which the specificity is not shown to be above zero."""
    found = {arm: numbers.arms.get((arm, "specificity")) for arm in numbers.ranked}
    return {arm: e for arm, e in found.items() if e is not None and math.isfinite(e.low) and e.low <= 0}


def _unspecific(numbers: StudyEstimates) -> list[str]:
    found = [
        f"{arm} {number(e.mean, 3)} {bracket(e, 3)}"
        for arm, e in _not_specific(numbers).items()
        if arm not in numbers.dead
    ]
    if not found:
        return []
    return [
        f"Specificity is not shown to be above zero: {listed(found)}. An average voice, or a change of sex alone, "
        "would score the same."
    ]


def _fragile(numbers: StudyEstimates) -> list[str]:
    """Arms that lose more SECS by degradation than the bare codec."""
    bare = numbers.controls.get(("floor", "fragility"))
    found = [
        f"{arm} loses {number(e.mean, 3)}"
        for arm in numbers.ranked
        if bare is not None and (e := numbers.arms.get((arm, "fragility"))) and e.mean > bare.mean + FRAGILE
    ]
    if not found or bare is None:
        return []
    return [
        f"Degradation (a 7 kHz low-pass and noise at 30 dB) lowers SECS by more than it does for the bare codec "
        f"({number(bare.mean, 3)}): {listed(found)}. This indicates an adversarial attack on the judge."
    ]


def _overfitted(numbers: StudyEstimates) -> list[str]:
    """Arms with a higher normalised SECS by their conditioning encoder than by the judge.

    Only normalised values can be compared: cosines of two encoders have different zeros and ranges.
    """
    found = []
    for arm in numbers.ranked:
        by_encoder = numbers.arms.get((arm, "speaker_encoder_normalised"))
        by_judge = numbers.arms.get((arm, "normalised"))
        if by_encoder and by_judge and min(by_encoder.mean - OVERFITTED, by_encoder.low) > by_judge.mean:
            found.append(
                f"{arm} closes {number(100 * by_encoder.mean, 0)} % of the gap by the conditioning encoder and "
                f"{number(100 * by_judge.mean, 0)} % by the judge"
            )
    if not found:
        return []
    more = [f"{len(found) - 3} more"] if len(found) > 3 else []
    return [f"The conditioning encoder scores higher than the judge: {listed([*found[:3], *more])}."]


def _suspicious(numbers: StudyEstimates) -> list[str]:
    """Arms with an equal error rate above one half."""
    names = [arm for arm in numbers.ranked if (e := numbers.arms.get((arm, "eer"))) and e.mean > 0.5 + SUSPICIOUS_EER]
    if not names:
        return []
    return [
        f"The judge finds conversions of {listed(names)} more similar to the target than the target's own speech "
        "through the codec (equal error rate above 50 %). They may be optimised for the judge and not for a listener."
    ]


def _judges(study: Study, numbers: StudyEstimates) -> list[str]:
    """How far further judges of the speaker agree with the first one, and which judges are weak."""
    judges = {judge.name: judge for result in study.results() for judge in result.judges}
    weak = [
        f"{name} ({number(100 * rate, 0)} %)"
        for name, judge in judges.items()
        if (rate := judge.calibration.eer) is not None and rate > WEAK_EER
    ]
    found = []
    if weak:
        found.append(f"Judges that often confuse real speakers through the codec (equal error rate): {listed(weak)}.")
    if numbers.agreement:
        told = [
            f"{name} {number(a.conversions)} over conversions (Spearman), {number(a.arms)} over arms (Kendall)"
            for name, a in numbers.agreement.items()
        ]
        split = [f"{c.a} and {c.b}" for c in numbers.comparisons if not c.judges_agree]
        differing = f" They disagree on which arm is ahead for {listed(split)}: no difference counts." if split else ""
        found.append(f"Rank correlation of further judges with the first one: {'; '.join(told)}.{differing}")
    return found


def _others(study: Study, numbers: StudyEstimates) -> list[str]:
    found = []
    missing = [c for c in CONTROL_ROWS if c not in study.controls or not study.controls[c].ok]
    if missing:
        found.append(f"Control{'s' if len(missing) > 1 else ''} missing: {listed([short_label(c) for c in missing])}.")
    if math.isfinite(numbers.noise):
        found.append(f"Differences below {number(numbers.noise, 4)} SECS are decoding noise.")
    splits = sorted({r.split for r in study.results() if r.kind == "arm" and r.split} - {"test"})
    if splits:
        found.append(f"The scores are of the {listed(splits)} split, on which settings may have been selected.")
    weak = [c for c in numbers.comparisons if c.decision.word == "inconclusive" and c.difference.clears(0)]
    weak += [c for c in numbers.comparisons if c.decision.word == "inconclusive" and c.difference.high < 0]
    if any(c.p_adjusted >= ALPHA for c in weak):
        found.append("A pair can be inconclusive although its interval excludes zero: p-values are corrected for the "
                     "number of comparisons, intervals are not.")  # fmt: skip
    notes = dict.fromkeys(str(n) for r in study.results() for n in r.data.get("notes") or [])
    found += [f"Data: {note}{'' if note.endswith('.') else '.'}" for note in notes]
    found += _several_versions(study)
    reasons: dict[str, list[str]] = {}
    for name, need in sorted({name: need for r in study.results() for name, need in r.missing.items()}.items()):
        reasons.setdefault(need, []).append(name)
    if reasons:
        found.append(f"Not measured: {'; '.join(f'{listed(names)} ({need})' for need, names in reasons.items())}.")
    return [*found, *study.notes]


def _content(numbers: StudyEstimates) -> list[str]:
    """The content judge of the verdict, or why there is none."""
    tried = []
    for c in numbers.content_judges:
        extent = f"range {number(100 * c.range, 0)} points" if c.measured else "not measured on the controls"
        tried.append(f"{display_of(c.name).label} ({extent})")
    if numbers.content is not None:
        rest = f". Also measured: {listed(tried[1:])}" if tried[1:] else ""
        margin = f"A loss of {number(100 * numbers.content.margin, 0)} points or more counts as worse"
        return [f"Content metric: {tried[0]}{rest}. {margin}."]
    if tried:
        return [f"Content cannot be judged: no content metric has a range of {100 * MIN_RANGE:.0f} points "
                f"({'; '.join(tried)}). So {SIMILARITY_ONLY}"]  # fmt: skip
    return [f"Content has not been judged: {SIMILARITY_ONLY}"]


def _several_versions(study: Study) -> list[str]:
    """Which results are of which version of the package, if not all are of one."""
    named = [(f"{arm}, seed {run.seed}", run.result) for arm, runs in study.arms.items() for run in runs]
    named += [(name, run.result) for name, run in study.controls.items()]
    by_version: dict[str, list[str]] = {}
    for name, result in named:
        if result and (version := str(result.versions.get("snac-conditioning") or "")):
            by_version.setdefault(version, []).append(name)
    if len(by_version) < 2:
        return []
    most = max(by_version, key=lambda version: len(by_version[version]))
    others = "; ".join(f"{version}: {', '.join(names)}" for version, names in by_version.items() if version != most)
    return [f"The results were evaluated by different versions of snac-conditioning. {others}; the others: {most}."]
