"""What objectives cost, in passes: counted, so that the figures do not depend on the machine."""

from __future__ import annotations

import re

from small_study import Bench

from snac_core.plugins import discover
from snac_runner.bench import objective_costs, objectives


def test_every_objective_is_measured_before_and_after_the_quantiser_or_refused(bench: Bench) -> None:
    catalogue = discover()
    study = bench.study(batch_size=4)
    lines = objective_costs(study, catalogue, 1)[1:]
    names = objectives(catalogue)
    assert len(lines) == 2 * len(names)
    passes = {}
    for line in lines:
        adapter, objective, rest = re.fullmatch(r"  (\w+), (\w+): (.*)", line).groups()  # type: ignore[union-attr]
        found = re.findall(r"(\w+) \d+ \((\d+) items\)", rest)
        passes[adapter, objective] = {part: int(rows) for part, rows in found}
    before, after = dict.fromkeys(adapter for adapter, _ in passes)
    assert passes[after, "codebook_adversary"] == {}, "it has nothing to learn from, and says so"
    one = {
        "encoder": 4,
        "quantiser": 8,
        "decoder": 8,
        "speaker_encoder": 8,
    }  # source and one target an item, in one batch
    for objective, more in {
        "voice_conversion": (0, 0, 0, 0),
        "phase3_contrastive": (0, 0, 0, 0),
        "adversarial": (0, 0, 0, 0),
        "codebook_adversary": (0, 0, -8, -8),  # learns from codes alone
        "code_prediction": (8, 16, -8, -4),  # two more voices are encoded, two more latents chosen, one embedded
        "synthetic_vc": (2, 2, -6, -6),  # half of the items once more; of the others only codes are asked for
        "content": (4, 4, 4, 0),  # every conversion back again
    }.items():
        expected = {part: rows + extra for (part, rows), extra in zip(one.items(), more, strict=True)}
        assert passes[before, objective] == expected, objective
