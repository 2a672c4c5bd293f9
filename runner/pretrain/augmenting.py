"""Other voices out of the ones there are: changes of level, speed (with pitch and formants) and formants alone."""

from __future__ import annotations

import torch
from torch import Tensor

from runner.pretrain.settings import Augmentation
from snac_core.augment import move_formants, read_faster


def augment(audio: Tensor, samples: int, sample_rate: int, how: Augmentation, draw: torch.Generator) -> Tensor:
    """Change each item by amounts of its own, a pure function of the generator's state.

    Args:
        audio: (B, 1, T') with T' at least `samples * (1 + speed)`.
        samples: T of the result (B, 1, T).
        sample_rate: in Hz.
        how: by how much.
        draw: four numbers an item are drawn.
    """
    gain, chance, speed, formant = torch.rand(len(audio), 4, generator=draw).T
    changed = chance < how.changed
    made: Tensor = audio[..., :samples].clone()
    if changed.any():
        moved = read_faster(audio[changed], 1 + (2 * speed[changed] - 1) * how.speed, samples)
        if how.formant:
            moved = move_formants(moved, sample_rate, 1 + (2 * formant[changed] - 1) * how.formant)
        made[changed] = moved
    made *= (10 ** ((2 * gain - 1) * how.gain_db / 20)).view(-1, 1, 1)
    return made / made.abs().amax(dim=-1, keepdim=True).clamp(min=1)
