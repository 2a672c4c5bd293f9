"""How fast a conditioned codec converts."""

from __future__ import annotations

import time

from runner.evaluate.conversions import Conversions
from runner.evaluate.systems import NOISE_SEED, evaluating
from snac_core.conditioned import ConditionedCodec
from snac_core.conditioning import Conditioning


def times_real_time(model: ConditionedCodec, conversions: Conversions, *, rounds: int = 4) -> float:
    """Seconds of speech that a second of work converts: the first source, by itself, the best of a few rounds.

    The best, because other work on a machine can only slow it down. The inverse of the real-time factor.
    """
    device = next(model.codec.parameters()).device
    item = conversions.items[0]
    speaker = Conditioning(conversions.conditioning[item.pair.target].unsqueeze(0).to(device))
    seconds = []
    with evaluating(model), model.codec.fixed_noise(NOISE_SEED):
        for _ in range(rounds):
            started = time.perf_counter()
            audio = model.reconstruct(item.audio.unsqueeze(0).to(device), speaker).audio.cpu()
            seconds.append(time.perf_counter() - started)
    return audio.shape[-1] / conversions.sample_rate / min(seconds)
