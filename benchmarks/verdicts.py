"""How often simulated studies reach a verdict: false differences, power, coverage, minimum detectable effect.

Example: python benchmarks/verdicts.py --studies 200 --seeds 3 --targets 40 --arms 3
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray

from snac_runner.evaluate.verdict import ArmScores, compare

SD_TARGET, SD_SOURCE, SD_REST = 0.15, 0.10, 0.20  # of a difference between two arms, in normalised SECS
PER_TARGET = 4  # conversions
CONTENT = 0.3  # of these standard deviations, in error rate
UNEQUAL = (1.0, 1.0, 3.0)  # ratio of the arms' standard deviations between seeds

Labels = NDArray[np.int64]


def drawn_study(
    rng: np.random.Generator, *, seeds: int, targets: int, sources: int, sds: Sequence[float], effect: float
) -> tuple[dict[str, ArmScores], Labels, Labels]:
    """One arm for each of `sds` (between seeds, of a difference); the first gains `effect`."""
    pairs = PER_TARGET * targets
    target = np.repeat(np.arange(targets), PER_TARGET)
    source = rng.permutation(np.arange(pairs) % sources).astype(np.int64)

    def scores(sd_seed: float) -> NDArray[np.float64]:
        own = sd_seed * rng.standard_normal((seeds, 1)) + SD_REST * rng.standard_normal((seeds, pairs))
        own += (SD_TARGET * rng.standard_normal(targets))[target] + (SD_SOURCE * rng.standard_normal(sources))[source]
        return 2**-0.5 * own

    arms = {
        f"arm {k}": ArmScores(list(range(seeds)), scores(sd) + (effect if k == 0 else 0.0), CONTENT * scores(sd))
        for k, sd in enumerate(sds)
    }
    return arms, target, source


def measured(rng: np.random.Generator, studies: int, *, effect: float, **size: object) -> dict[str, float]:
    """Shares of `studies` of equal arms that call any pair different, and of pairs whose interval holds the truth (the
    mean, and the pair that is worst); of `studies` with one arm ahead by `effect`, the share that finds it against
    the second arm, and against any. The minimum detectable effect is the median of what the reports state."""
    false = 0
    covered: list[list[bool]] = []
    detectable: list[float] = []
    first = any_found = 0
    for _ in range(studies):
        arms, *labels = drawn_study(rng, effect=0.0, **size)  # type: ignore[arg-type]
        equal = compare(arms, *labels, content_margin=0.05)
        false += any(c.decision.word in ("better", "worse", "mixed") for c in equal)
        covered.append([c.difference.low <= 0 <= c.difference.high for c in equal])
        detectable += [c.detectable for c in equal]
        arms, *labels = drawn_study(rng, effect=effect, **size)  # type: ignore[arg-type]
        alone = {name: ArmScores(arm.seeds, arm.speaker) for name, arm in arms.items()}
        found = [c.decision.word == "higher" for c in compare(alone, *labels) if c.a == "arm 0"]
        first, any_found = first + found[0], any_found + any(found)
    by_pair = np.mean(covered, axis=0)
    return {
        "false": false / studies, "covered": float(by_pair.mean()), "worst pair": float(by_pair.min()),
        "found": first / studies, "any found": any_found / studies, "detectable": float(np.median(detectable)),
    }  # fmt: skip


def main(
    studies: Annotated[int, typer.Option(help="Simulated studies per case.")] = 200,
    seeds: Annotated[list[int], typer.Option(help="Seeds; may be repeated.")] = [2, 3, 5],  # noqa: B006
    targets: Annotated[list[int], typer.Option(help="Target speakers; may be repeated.")] = [10, 20, 40],  # noqa: B006
    arms: Annotated[list[int], typer.Option(help="Arms; may be repeated.")] = [2, 3, 6],  # noqa: B006
    sd_seed: Annotated[list[float], typer.Option(help="Standard deviations between seeds.")] = [0.024, 0.2],  # noqa: B006
    sources: Annotated[int, typer.Option(help="Source utterances per target speaker.")] = 4,
    effect: Annotated[float, typer.Option(help="By which the first arm is ahead, in normalised SECS.")] = 0.1,
) -> None:
    """Print one Markdown row for each case; unequal arms have the ratio 1:1:3."""
    names = ("false", "covered", "worst pair", "found", "any found", "detectable")
    print(f"| seeds | targets | arms | seed sd | spread | {' | '.join(names)} |\n|{'---|' * (5 + len(names))}")
    for s, t, k, sd, unequal in product(seeds, targets, arms, sd_seed, (False, True)):
        ratio = [UNEQUAL[-(i % 3) - 1] for i in range(k)] if unequal else [1.0] * k
        sds = [sd * r / max(ratio) for r in ratio]
        rng = np.random.default_rng([s, t, k, round(1000 * sd), unequal])
        row = measured(rng, studies, effect=effect, seeds=s, targets=t, sources=sources * t, sds=sds)
        shown = [f"{row[n]:.2f}" if n == "detectable" else f"{row[n]:.1%}" for n in names]
        print(f"| {s} | {t} | {k} | {sd:g} | {'1:1:3' if unequal else 'equal'} | {' | '.join(shown)} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
