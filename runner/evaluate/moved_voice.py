"""The control without learning: the source's pitch and formants moved to the target's, then the bare codec."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from runner.evaluate.conversions import Conversions, Item
from runner.evaluate.prosody import HIGHEST, LOWEST, mean_log2
from runner.evaluate.systems import Rendering, System, resynthesis
from snac_core.codec import SNAC

FORMANTS = (1, 2, 3)
SHIFT = (0.75, 1.35)  # bounds of the formants' ratio: measured means beyond are errors of measurement
# Praat lays voiceless stretches anew out of pieces of random lengths
_SEED = "random_initializeWithSeedUnsafelyButPredictably: 1"


def moved_voice(codec: SNAC) -> System:
    """Praat's overlap-add "Change gender" to the target's mean log-F0 and formants, then the bare codec.

    The target's are measured on its conditioning audio, which is all that an arm hears of it as well. Needs
    parselmouth.
    """
    means: dict[str, tuple[float | None, float | None]] = {}

    def of_speaker(conversions: Conversions, speaker: str) -> tuple[float | None, float | None]:
        if speaker not in means:
            audio = conversions.target_audio(speaker, "conditioning")
            means[speaker] = (mean_log2(audio, conversions.sample_rate), mean_formants(audio, conversions.sample_rate))
        return means[speaker]

    def moved(conversions: Conversions, item: Item, speaker: str) -> Tensor:
        rate = conversions.sample_rate
        pitch, formants = of_speaker(conversions, speaker)
        own = mean_formants(item.audio[0], rate)
        ratio = float(np.clip(formants / own, *SHIFT)) if formants and own else 1.0
        median = 2.0**pitch if pitch is not None else 0.0  # 0: Praat leaves the pitch as it is
        return resynthesis(codec, change_voice(item.audio[0], rate, median, ratio).unsqueeze(0))

    def render(conversions: Conversions, item: Item) -> Rendering:
        return Rendering(
            converted=moved(conversions, item, item.pair.target),
            identity=moved(conversions, item, item.pair.source_speaker),
            other=moved(conversions, item, item.other) if item.other else None,
        )

    return render


def change_voice(audio: Tensor, sample_rate: int, median_hertz: float, formant_ratio: float) -> Tensor:
    """Audio (T,) with its median pitch at `median_hertz` (0: as it is) and its formants times `formant_ratio`.

    The same audio gives the same result every time.
    """
    import parselmouth

    parselmouth.praat.run(_SEED)
    sound = parselmouth.Sound(audio.double().numpy(), sampling_frequency=sample_rate)
    moved = parselmouth.praat.call(sound, "Change gender", LOWEST, HIGHEST, formant_ratio, median_hertz, 1.0, 1.0)
    samples = torch.from_numpy(np.asarray(moved.resample(sample_rate).values[0])).to(audio.dtype)
    return torch.nn.functional.pad(samples, (0, max(0, len(audio) - len(samples))))[: len(audio)]


def mean_formants(audio: Tensor, sample_rate: int) -> float | None:
    """Geometric mean of the first three formants in Hz, over time (Burg, five poles below 5.5 kHz)."""
    import parselmouth

    sound = parselmouth.Sound(audio.double().numpy(), sampling_frequency=sample_rate)
    found = sound.to_formant_burg(0.01, 5.0, 5500.0)
    values = np.array([[found.get_value_at_time(n, t) for n in FORMANTS] for t in found.ts()])
    whole = values[np.isfinite(values).all(axis=1)] if len(values) else values
    return float(np.exp(np.log(whole).mean())) if len(whole) else None
