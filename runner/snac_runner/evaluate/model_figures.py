"""Figures of a trained model apart from its scores: decoding noise and speed."""

from __future__ import annotations

import time

import torch

from snac_core.conditioned import ConditionedCodec
from snac_core.metric import Metric
from snac_runner.config import NOISE_SEED
from snac_runner.evaluate.conversions import Conversions
from snac_runner.evaluate.scoring import rows_of
from snac_runner.evaluate.systems import conditioned, evaluating


def noise_floor(model: ConditionedCodec, conversions: Conversions, metric: Metric, *, items: int = 4) -> float:
    """Decoding noise: standard deviation of a metric over three decodes with different noise.

    The mean over the first `items` conversions.
    """
    with evaluating(model):
        decodes = [
            rows_of(
                conditioned(model, noise_seed=seed, outputs=metric.outputs), conversions.items[:items], conversions,
                {metric.name: metric},
            )
            for seed in (1, 2, 3)
        ]  # fmt: skip
    values = torch.tensor([[row["metrics"][metric.name] for row in rows] for rows in decodes], dtype=torch.float64)
    return float(values.std(dim=0).mean())


def times_real_time(model: ConditionedCodec, conversions: Conversions, *, rounds: int = 4) -> float:
    """Seconds of speech converted per second of computation: the inverse of the real-time factor.

    The first source is converted alone; the result is the best of `rounds`, because other work on the machine can only
    slow it down.
    """
    device = next(model.codec.parameters()).device
    item = conversions.items[0]
    speaker = conversions.target(model, item.pair.target)
    seconds = []
    with evaluating(model), model.codec.fixed_noise(NOISE_SEED):
        for _ in range(rounds):
            started = time.perf_counter()
            audio = model.reconstruct(item.audio.unsqueeze(0).to(device), speaker).audio.cpu()
            seconds.append(time.perf_counter() - started)
    return audio.shape[-1] / conversions.sample_rate / min(seconds)
