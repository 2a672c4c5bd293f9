"""Systems that can be evaluated: a conditioned codec, and the controls. A system turns a conversion into audio.

Controls are the source itself, the floor, the ceiling, the mismatched control and the signal-processing baseline, which
shifts the source's pitch and formants to the target's.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from snac_core.codec import SNAC
from snac_core.conditioned import ConditionedCodec, Reconstruction
from snac_core.frozen import FrozenActivations
from snac_core.metric import OUTPUTS, Metric
from snac_runner.config import NOISE_SEED
from snac_runner.data.pairs import Pair
from snac_runner.data.references import normalize_text
from snac_runner.evaluate.conversions import Conversions, Item
from snac_runner.evaluate.prosody import HIGHEST, LOWEST, mean_log2


@dataclass(frozen=True)
class Rendering:
    """The outputs of a system for one conversion: audio (T,) on the CPU; see `snac_core.metric.Conversion`.

    Attributes:
        codes: of the converted output, (F / stride,) per level; empty if the system has none.
        bare_codes: of the unconditioned source, likewise.
        edits: tap to the root mean square of the edit there, relative to what was edited.
        same_words: whether the output should say what the source says.
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


def needed_outputs(metrics: Iterable[Metric]) -> frozenset[str]:
    """The outputs that these metrics judge: no other needs to be rendered."""
    return frozenset(output for metric in metrics for output in metric.outputs)


def conditioned(model: ConditionedCodec, *, noise_seed: int = NOISE_SEED, outputs: Collection[str] = OUTPUTS) -> System:
    """A trained model, under the embeddings of the target, of the source itself and of a third speaker.

    The outputs are decoded one by one: on a CPU, a batch of long items does not fit into the processor's cache. Several
    threads can render at once inside `evaluating(model)`.

    Args:
        model: the conditioned codec.
        noise_seed: of the decoder's noise.
        outputs: which of OUTPUTS are needed, e.g. `needed_outputs`; "converted" always is.
    """
    device = next(model.codec.parameters()).device

    def render(conversions: Conversions, item: Item) -> Rendering:
        edits: dict[str, float] = {}

        def record_edit(tap: str, before: Tensor, after: Tensor) -> None:
            change = (after - before).square().mean() / before.square().mean().clamp(min=1e-20)
            edits[tap] = float(change.sqrt())

        def under(speaker: str, frozen: FrozenActivations) -> Reconstruction:
            return own_model.reconstruct(frozen.audio, conversions.target(model, speaker), frozen=frozen)

        def optional(output: str, speaker: str, frozen: FrozenActivations) -> Tensor | None:
            return under(speaker, frozen).audio[0, 0].cpu() if output in outputs and speaker else None

        own_model = copy.copy(model)  # shares everything but the callback
        with evaluating(model), model.codec.fixed_noise(noise_seed):
            bare = conversions.bare(model.codec, item)
            with own_model.on_edit(record_edit):
                converted = under(item.pair.target, bare)
            identity = optional("identity", item.pair.source_speaker, bare)
            other = optional("other", item.other, bare)
            synthetic = None
            if "synthetic" in outputs:
                another = FrozenActivations(model.codec, conversions.shifted(item).unsqueeze(0).to(device))
                synthetic = optional("synthetic", item.pair.source_speaker, another)
        return Rendering(
            converted=converted.audio[0, 0].cpu(),
            identity=identity,
            other=other,
            synthetic=synthetic,
            codes=[level[0].cpu() for level in converted.codes],
            bare_codes=[level[0].cpu() for level in bare.codes],
            edits=edits,
        )

    return render


def floor(codec: SNAC, outputs: Collection[str] = OUTPUTS) -> System:
    """The bare codec on the source: the score without any conditioning. `outputs`: as of `conditioned`."""

    def render(conversions: Conversions, item: Item) -> Rendering:
        audio = resynthesis(codec, item.audio)
        shifted = resynthesis(codec, conversions.shifted(item)) if "synthetic" in outputs else None
        return Rendering(converted=audio, identity=audio, synthetic=shifted)

    return render


def ceiling(codec: SNAC) -> System:
    """The bare codec on another real utterance of the target: the score of a perfect conversion."""

    def render(conversions: Conversions, item: Item) -> Rendering:
        return Rendering(converted=resynthesis(codec, conversions.ceiling_audio(item)), same_words=False)

    return render


def mismatched(codec: SNAC) -> System:
    """The bare codec on the next source with other words: the content error rate of a lost content."""

    def render(conversions: Conversions, item: Item) -> Rendering:
        items = conversions.items
        place = next(number for number, other in enumerate(items) if other.pair.id == item.pair.id)
        others = (other for other in items[place + 1 :] + items[:place] if not _same_words(other.pair, item.pair))
        return Rendering(converted=resynthesis(codec, next(others, item).audio))

    return render


def _same_words(a: Pair, b: Pair) -> bool:
    if a.text is not None and b.text is not None:
        return normalize_text(a.text) == normalize_text(b.text)
    return a.source.utterance == b.source.utterance


def source(outputs: Collection[str] = OUTPUTS) -> System:
    """The source, copied. `outputs`: as of `conditioned`."""

    def render(conversions: Conversions, item: Item) -> Rendering:
        shifted = conversions.shifted(item)[0] if "synthetic" in outputs else None
        return Rendering(converted=item.audio[0], identity=item.audio[0], synthetic=shifted)

    return render


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Without gradients and in eval mode; afterwards the model has its previous mode."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def resynthesis(codec: SNAC, audio: Tensor) -> Tensor:
    """The bare codec's output (T,) of audio (1, T), on the CPU."""
    device = next(codec.parameters()).device
    with torch.no_grad(), codec.fixed_noise(NOISE_SEED):
        audio_hat: Tensor = codec(audio.unsqueeze(0).to(device))[0]
    return audio_hat[0, 0].cpu()


FORMANTS = (1, 2, 3)
RATIO = (0.75, 1.35)  # bounds of the ratio of mean formants: values beyond are measurement errors
# Praat resynthesizes unvoiced parts from pieces of random lengths
_PRAAT = threading.Lock()  # Praat has one random stream
_SEED = "random_initializeWithSeedUnsafelyButPredictably: 1"


def signal_processing(codec: SNAC) -> System:
    """The signal-processing baseline: Praat's "Change gender" to the target's mean log-F0 and formants, then the codec.

    They are measured on the target's conditioning audio, which is also all that an arm gets. Needs parselmouth.
    """
    means: dict[str, tuple[float | None, float | None]] = {}

    def of_speaker(conversions: Conversions, speaker: str) -> tuple[float | None, float | None]:
        if speaker not in means:
            audio = conversions.target_audio(speaker, "conditioning")
            means[speaker] = (mean_log2(audio, conversions.sample_rate), mean_formants(audio, conversions.sample_rate))
        return means[speaker]

    def converted(conversions: Conversions, item: Item, speaker: str) -> Tensor:
        rate = conversions.sample_rate
        pitch, formants = of_speaker(conversions, speaker)
        own = mean_formants(item.audio[0], rate)
        ratio = float(np.clip(formants / own, *RATIO)) if formants and own else 1.0
        median = 2.0**pitch if pitch is not None else 0.0  # 0: Praat leaves the pitch as it is
        return resynthesis(codec, praat_change_gender(item.audio[0], rate, median, ratio).unsqueeze(0))

    def render(conversions: Conversions, item: Item) -> Rendering:
        return Rendering(
            converted=converted(conversions, item, item.pair.target),
            identity=converted(conversions, item, item.pair.source_speaker),
            other=converted(conversions, item, item.other) if item.other else None,
        )

    return render


def praat_change_gender(audio: Tensor, sample_rate: int, median_hertz: float, formant_ratio: float) -> Tensor:
    """Praat's "Change gender" on audio (T,): overlap-add to a given median F0, with scaled formants.

    The baseline uses Praat instead of `snac_core.augment.change_voice`, which objectives train with, because it is the
    stronger baseline on synthetic voices and faster (docs/experiments/which-signal-processing-for-the-baseline.md).

    Args:
        audio: (T,).
        sample_rate: in Hz.
        median_hertz: median F0 of the result, in Hz; 0 keeps the median.
        formant_ratio: factor on the formant frequencies.

    Returns:
        (T,). The same audio always gives the same result.
    """
    import parselmouth

    sound = parselmouth.Sound(audio.double().numpy(), sampling_frequency=sample_rate)
    with _PRAAT:
        parselmouth.praat.run(_SEED)
        changed = parselmouth.praat.call(sound, "Change gender", LOWEST, HIGHEST, formant_ratio, median_hertz, 1.0, 1.0)
    samples = torch.from_numpy(np.asarray(changed.resample(sample_rate).values[0])).to(audio.dtype)
    return torch.nn.functional.pad(samples, (0, max(0, len(audio) - len(samples))))[: len(audio)]


def mean_formants(audio: Tensor, sample_rate: int) -> float | None:
    """Geometric mean over time of the first three formants of audio (T,) in Hz (Burg, five formants below 5.5 kHz).

    None if no formants are found.
    """
    import parselmouth

    sound = parselmouth.Sound(audio.double().numpy(), sampling_frequency=sample_rate)
    found = sound.to_formant_burg(0.01, 5.0, 5500.0)
    values = np.array([[found.get_value_at_time(n, t) for n in FORMANTS] for t in found.ts()])
    whole = values[np.isfinite(values).all(axis=1)] if len(values) else values
    return float(np.exp(np.log(whole).mean())) if len(whole) else None
