"""The learning-rate schedule of every training: linear warm-up, a constant part where one is wanted, cosine decay."""

from __future__ import annotations

import math


def learning_rate(
    step: int, peak: float, *, warmup_steps: int, decay_start: float, decay_end: float, min_ratio: float = 0.0
) -> float:
    """Learning rate of one step. It depends on nothing else, so a resumed training continues the same curve.

    With s the step, W `warmup_steps`, [a, b] the decay and r `min_ratio`:

        peak * s / W                                                for s <= W
        peak * (r + (1 - r) * (1 + cos(pi * (s - a) / (b - a))) / 2)  for s in [a, b]

    Between W and a the rate is `peak`, after b it is `r * peak`. The cosine is that of SGDR without restarts
    (Loshchilov and Hutter, https://arxiv.org/abs/1608.03983, equation 5).

    Args:
        step: number of the step, from 1.
        peak: highest learning rate.
        warmup_steps: the peak is reached at this step; 0: no warm-up.
        decay_start: step at which the decay starts.
        decay_end: step at which the decay ends.
        min_ratio: learning rate after the decay, as a share of the peak.
    """
    if step <= warmup_steps:
        return peak * step / warmup_steps
    share = min(1.0, max(0.0, (step - decay_start) / max(1, decay_end - decay_start)))
    return peak * (min_ratio + (1 - min_ratio) * (1 + math.cos(math.pi * share)) / 2)
