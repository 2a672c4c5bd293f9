"""What can be judged: a conditioned codec, and the controls beside it. Each turns conversions into audio."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from runner.data import Pair
from runner.data.references import same_words
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
        edits: tap to the size of the edit made there, relative to what was edited (root mean square over the item).
        same_words: whether it should say what the source says.
    """

    converted: Tensor
    identity: Tensor | None = None
    other: Tensor | None = None
    synthetic: Tensor | None = None
    codes: list[Tensor] = field(default_factory=list)
    bare_codes: list[Tensor] = field(default_factory=list)
    edits: dict[str, float] = field(default_factory=dict)
    same_words: bool = True


System = Callable[[Conversions, Item], Rendering]


def conditioned(model: ConditionedCodec, *, noise_seed: int = NOISE_SEED, synthetic: bool = True) -> System:
    """The trained model: under the target's, the source's own, and a third speaker's embedding, in one batch.

    `synthetic` also asks it to give the source back its own voice, after that was moved.
    """

    def render(conversions: Conversions, item: Item) -> Rendering:
        names = [item.pair.target, item.pair.source_speaker, *([item.other] if item.other else [])]
        device = next(model.codec.parameters()).device
        speakers = torch.stack([conversions.conditioning[name] for name in names]).to(device)
        edits: dict[str, float] = {}

        def seen(tap: str, before: Tensor, after: Tensor) -> None:
            """The first row is under the target's embedding."""
            change = (after[0] - before[0]).square().mean() / before[0].square().mean().clamp(min=1e-20)
            edits[tap] = float(change.sqrt())

        with evaluating(model), model.codec.fixed_noise(noise_seed), model.observed(seen):
            bare = BarePass(model.codec, item.audio.unsqueeze(0).to(device))
            out = model.reconstruct(bare.audio, Conditioning(speakers), bare=bare)
        moved = None
        if synthetic:
            with evaluating(model), model.codec.fixed_noise(noise_seed):
                another = conversions.moved(item).unsqueeze(0).to(device)
                moved = model.reconstruct(another, Conditioning(speakers[1:2])).audio[0, 0].cpu()
        audio = out.audio.squeeze(1).cpu()
        return Rendering(
            converted=audio[0],
            identity=audio[1],
            other=audio[2] if item.other else None,
            synthetic=moved,
            codes=[level[0].cpu() for level in out.codes],
            bare_codes=[level[0].cpu() for level in bare.codes],
            edits=edits,
        )

    return render


def floor(codec: SNAC) -> System:
    """The bare codec on the source: what no conditioning at all scores."""

    def render(conversions: Conversions, item: Item) -> Rendering:
        audio = resynthesis(codec, item.audio)
        return Rendering(converted=audio, identity=audio, synthetic=resynthesis(codec, conversions.moved(item)))

    return render


def ceiling(codec: SNAC) -> System:
    """The bare codec on another real utterance of the target: what a perfect conversion could score."""

    def render(conversions: Conversions, item: Item) -> Rendering:
        return Rendering(converted=resynthesis(codec, conversions.ceiling_audio(item)), same_words=False)

    return render


def mismatched(codec: SNAC) -> System:
    """The bare codec on the next source that says something else: what a content judge must find all wrong."""

    def render(conversions: Conversions, item: Item) -> Rendering:
        items = conversions.items
        place = next(number for number, other in enumerate(items) if other.pair.id == item.pair.id)
        others = (other for other in items[place + 1 :] + items[:place] if not _same_words(other.pair, item.pair))
        return Rendering(converted=resynthesis(codec, next(others, item).audio))

    return render


def _same_words(a: Pair, b: Pair) -> bool:
    if a.text is not None and b.text is not None:
        return same_words(a.text) == same_words(b.text)
    return a.source.utterance == b.source.utterance


def source() -> System:
    """The source, copied."""

    def render(conversions: Conversions, item: Item) -> Rendering:
        return Rendering(converted=item.audio[0], identity=item.audio[0], synthetic=conversions.moved(item)[0])

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


def resynthesis(codec: SNAC, audio: Tensor) -> Tensor:
    """What the bare codec makes of audio (1, T): (T,)."""
    device = next(codec.parameters()).device
    with torch.no_grad(), codec.fixed_noise(NOISE_SEED):
        audio_hat: Tensor = codec(audio.unsqueeze(0).to(device))[0]
    return audio_hat[0, 0].cpu()
