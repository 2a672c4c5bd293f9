"""How fast a conditioned codec converts."""

from __future__ import annotations

import time

from runner.evaluate.conversions import Conversions
from runner.evaluate.systems import NOISE_SEED, evaluating
from snac_core.conditioned import ConditionedCodec
from snac_core.conditioning import Conditioning


def times_real_time(model: ConditionedCodec, conversions: Conversions, *, items: int = 4) -> float:
    """Seconds of speech that a second of work converts, one source at a time: the best of the first `items` sources.

    The best, because other work on a machine can only slow it down. The inverse of the real-time factor.
    """
    device = next(model.codec.parameters()).device
    found = []
    for item in conversions.items[:items]:
        speaker = Conditioning(conversions.conditioning[item.pair.target].unsqueeze(0).to(device))
        with evaluating(model), model.codec.fixed_noise(NOISE_SEED):
            started = time.perf_counter()
            audio = model.reconstruct(item.audio.unsqueeze(0).to(device), speaker).audio.cpu()
            found.append(audio.shape[-1] / conversions.sample_rate / (time.perf_counter() - started))
    return max(found)
