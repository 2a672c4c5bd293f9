"""Naturalness, and distance to the target's recording, of the controls on any speech: `python naturalness.py FOLDER`.

Prints a Markdown table with a row per control, and the median CPU seconds of each metric.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import Tensor

from snac_core import SNAC, load_speaker_encoder
from snac_core.metric import Conversion, Metric
from snac_core.seeding import generator
from snac_runner.data.open_corpus import open_corpus
from snac_runner.data.pairs import conversion_pairs
from snac_runner.evaluate import systems
from snac_runner.evaluate.conversions import Conversions, Item
from snac_runner.evaluate.naturalness import DNSMOS, DistillMOS
from snac_runner.evaluate.parallel import F0RMSE, MCD
from snac_runner.evaluate.scoring import score
from snac_runner.evaluate.systems import Rendering, System


def noise(conversions: Conversions, item: Item) -> Rendering:
    """White noise of the source's level."""
    level = item.audio[0].square().mean().sqrt()
    return Rendering(level * torch.randn(item.audio.shape[-1], generator=generator(item.pair.id)))


def target_recording(codec: SNAC) -> System:
    """The bare codec on the target's own recording of the sentence: the least distance that a conversion can reach."""

    def render(conversions: Conversions, item: Item) -> Rendering:
        recording: Tensor | None = conversions.parallel_audio(item.pair)
        audio = conversions.ceiling_audio(item) if recording is None else recording[None]
        return Rendering(systems.resynthesis(codec, audio), same_words=recording is not None)

    return render


def timed(metric: Metric, seconds: list[float]) -> Metric:
    """The metric; every call appends its CPU seconds."""
    measure = metric.__call__

    def call(self: Metric, conversion: Conversion) -> float | None:
        started = time.process_time()
        value = measure(conversion)
        seconds.append(time.process_time() - started)
        return value

    made: Metric = type(type(metric).__name__, (type(metric),), {"__call__": call})()
    return made


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="speech, as for `runner ablate --data`")
    parser.add_argument("--split", default="test")
    parser.add_argument("--pairs", type=int, default=15, help="number of conversions of up to 4 s")
    given = parser.parse_args()
    torch.set_num_threads(1)
    codec = SNAC.from_pretrained("tiny").eval()
    corpus = open_corpus(given.folder)
    encoder = load_speaker_encoder("simple")  # no metric here uses an embedding
    pairs = conversion_pairs(corpus, given.split, n=given.pairs, seed=0)
    conversions = Conversions(corpus, pairs, codec.sampling_rate, encoder, [encoder])
    seconds: dict[str, list[float]] = {metric.name: [] for metric in (DistillMOS, DNSMOS, MCD, F0RMSE)}
    metrics = {metric.name: timed(metric(), seconds[metric.name]) for metric in (DistillMOS, DNSMOS, MCD, F0RMSE)}
    rows: dict[str, System] = {
        "source, unchanged": systems.source(),
        "bare codec of the source": systems.floor(codec),
        "signal-processing baseline": systems.signal_processing(codec),
        "bare codec of the target's recording": target_recording(codec),
        "white noise": noise,
    }
    print(f"| {given.pairs} conversions | {' | '.join(metrics)} |\n|---|{'---|' * len(metrics)}")
    for label, system in rows.items():
        pooled = score(system, conversions, metrics).pooled
        means = [f"{pooled[name]['mean']:.2f}" if name in pooled else "" for name in metrics]
        print(f"| {label} | {' | '.join(means)} |", flush=True)
    print(f"| CPU s per output | {' | '.join(f'{statistics.median(t):.3f}' if t else '' for t in seconds.values())} |")


if __name__ == "__main__":
    main()
