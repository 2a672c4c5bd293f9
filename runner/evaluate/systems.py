"""What can be judged: a conditioned codec, and the controls beside it. Each turns conversions into audio."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from runner.evaluate.conversions import Conversions, Item
from snac_core.bare import BarePass
from snac_core.codec import SNAC
from snac_core.conditioned import ConditionedCodec
from snac_core.conditioning import Conditioning

NOISE_SEED = 1
"""Every decode that is compared adds the same noise."""


@dataclass(frozen=True)
class Rendering:
    """One conversion as audio (T,), on the CPU; see `snac_core.metric.Conversion` for the parts.

    Attributes:
        codes: of the converted output, (F / stride,) per level; empty where there are none.
        bare_codes: of the unconditioned source, likewise.
    """

    converted: Tensor
    identity: Tensor | None = None
    other: Tensor | None = None
    codes: list[Tensor] = field(default_factory=list)
    bare_codes: list[Tensor] = field(default_factory=list)


System = Callable[[Conversions, Item], Rendering]


def conditioned(model: ConditionedCodec, *, noise_seed: int = NOISE_SEED) -> System:
    """The trained model: under the target's, the source's own, and a third speaker's embedding, in one batch."""

    def render(conversions: Conversions, item: Item) -> Rendering:
        names = [item.pair.target, item.pair.source_speaker, *([item.other] if item.other else [])]
        device = next(model.codec.parameters()).device
        speakers = torch.stack([conversions.conditioning[name] for name in names]).to(device)
        with evaluating(model), model.codec.fixed_noise(noise_seed):
            bare = BarePass(model.codec, item.audio.unsqueeze(0).to(device))
            out = model.reconstruct(bare.audio, Conditioning(speakers), bare=bare)
        audio = out.audio.squeeze(1).cpu()
        return Rendering(
            converted=audio[0],
            identity=audio[1],
            other=audio[2] if item.other else None,
            codes=[level[0].cpu() for level in out.codes],
            bare_codes=[level[0].cpu() for level in bare.codes],
        )

    return render


def floor(codec: SNAC) -> System:
    """The bare codec on the source: what no conditioning at all scores."""

    def render(conversions: Conversions, item: Item) -> Rendering:
        audio = _resynthesis(codec, item.audio)
        return Rendering(converted=audio, identity=audio)

    return render


def ceiling(codec: SNAC) -> System:
    """The bare codec on another real utterance of the target: what a perfect conversion could score."""

    def render(conversions: Conversions, item: Item) -> Rendering:
        return Rendering(converted=_resynthesis(codec, conversions.ceiling_audio(item)))

    return render


def source() -> System:
    """The source, copied."""

    def render(conversions: Conversions, item: Item) -> Rendering:
        return Rendering(converted=item.audio[0], identity=item.audio[0])

    return render


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """No gradients, and the strategies in eval mode; the mode of before comes back."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def _resynthesis(codec: SNAC, audio: Tensor) -> Tensor:
    device = next(codec.parameters()).device
    with torch.no_grad(), codec.fixed_noise(NOISE_SEED):
        audio_hat: Tensor = codec(audio.unsqueeze(0).to(device))[0]
    return audio_hat[0, 0].cpu()
