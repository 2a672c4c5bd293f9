"""What a judged run says of itself on the model card of its weights."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from runner.evaluate.judging import Scores
from runner.materials import Materials
from snac_core.checkpoint import digest_of
from snac_core.conditioned import ConditionedCodec


def evaluation(
    model: ConditionedCodec, scores: Scores, materials: Materials, *, seed: int, steps: int
) -> dict[str, Any]:
    """The pooled figures of a run, bound to the weights they were measured on: a `ConditionedCodec.evaluation`."""
    pairs = materials.test_pairs
    return {
        "weights": digest_of(model),
        "metrics": {
            name: {key: figure[key] for key in ("mean", "n_ok", "n", "unit", "direction")}
            for name, figure in scores.pooled.items()
        },
        "about": {
            "data": materials.corpus.name,
            "split": pairs.split,
            "conversions": len(pairs),
            "judge": f"{materials.judge.name} ({materials.judge.digest[:12]})",
            "teacher": f"{materials.teacher.name} ({materials.teacher.digest[:12]})",
            "seed": seed,
            "steps": steps,
            "version": version("snac-conditioning"),
        },
    }
