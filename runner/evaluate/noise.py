"""The noise floor: how far a score moves when nothing changes but the decoder's noise."""

from __future__ import annotations

import torch

from runner.evaluate.conversions import Conversions
from runner.evaluate.judging import judged_row
from runner.evaluate.systems import conditioned
from snac_core.conditioned import ConditionedCodec
from snac_core.metric import Metric


def noise_floor(model: ConditionedCodec, conversions: Conversions, metric: Metric, *, items: int = 4) -> float:
    """Standard deviation of a metric over decodes with different noise, the mean over the first `items` conversions."""
    spreads = []
    for item in conversions.items[:items]:
        values = []
        for seed in (1, 2, 3):
            rendering = conditioned(model, noise_seed=seed, synthetic=False)(conversions, item)
            values.append(judged_row(item, rendering, conversions, {metric.name: metric}))
        spreads.append(torch.tensor([row["metrics"][metric.name] for row in values], dtype=torch.float64).std())
    return float(torch.stack(spreads).mean())
