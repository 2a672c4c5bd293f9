"""Write docs/listen.md and docs/audio/: ten conversions by the bundled adapters, not chosen by ear.

python docs/listen.py librispeech_mini --whisper base.en
"""

from __future__ import annotations

from pathlib import Path

import soundfile
import typer

from snac_core.checkpoint import bundled_adapters
from snac_core.plugins import discover
from snac_runner.config import StudySettings
from snac_runner.controls import CONTROLS, wanted_metrics
from snac_runner.evaluate.scoring import score
from snac_runner.evaluate.systems import System, conditioned
from snac_runner.external import load_adapters
from snac_runner.resources import StudyResources

DOCS = Path(__file__).parent
METRICS = ("secs", "wer")
HEAD = """# Listen to conversions

Ten test conversions of a subset of LibriSpeech by the bundled adapters, written by
`python docs/listen.py librispeech_mini --whisper base.en`. They are drawn by a fixed seed, between speakers that were
not used in training. Below each recording are its similarity to the target (SECS by `ge2e`, a cosine) and its word
error rate by Whisper. The target is a recording through the codec, of other words.

| | source | bare codec | {names} | target |
|---|---|---|{lines}---|
"""
FOOT = """
Speech: LibriSpeech (c) 2014 Vassil Panayotov, [CC BY 4.0](https://creativecommons.org/licenses/by/4.0/), converted.
The base `tiny` is hoarse, which every column but the first has.
"""


def main(data: str, whisper: str = "") -> None:
    """Convert, measure, and write."""
    names = tuple(bundled_adapters())
    study = StudySettings(data=data, whisper=whisper, test_pairs=10, adapters=names, device="cpu")
    resources = StudyResources(study, discover())
    found = wanted_metrics(resources).metrics
    metrics = {name: found[name] for name in METRICS if name in found}
    systems: dict[str, System] = {
        name: CONTROLS[name](resources.codec, ("converted",)) for name in ("source", "floor", "ceiling")
    }
    for adapter in load_adapters(DOCS, [], resources):
        systems[adapter.name] = conditioned(adapter.model, outputs=("converted",))
    (DOCS / "audio").mkdir(exist_ok=True)
    cells: dict[str, dict[str, str]] = {}
    for name, system in systems.items():
        scores = score(system, resources.test, metrics, keep=len(resources.test.items))
        for number, row in enumerate(scores.utterances, 1):
            file = f"audio/{number:02}_{name}.opus"
            wave = scores.renderings[row["pair"]].converted
            soundfile.write(DOCS / file, wave.numpy(), resources.codec.sampling_rate, format="OGG", subtype="OPUS")
            shown = [metric for metric in metrics if name != "ceiling" or metric == "secs"]
            measured = [f"{row['metrics'][metric]:.2f}" for metric in shown]
            cells.setdefault(row["pair"], {})[name] = f"[play]({file})<br>{', '.join(measured)}"
    order = ("source", "floor", *names, "ceiling")
    table = "".join(
        f"| {number} | {' | '.join(row[name] for name in order)} |\n" for number, row in enumerate(cells.values(), 1)
    )
    head = HEAD.format(names=" | ".join(f"`{name}`" for name in names), lines="---|" * len(names))
    (DOCS / "listen.md").write_text(head + table + FOOT)


if __name__ == "__main__":
    typer.run(main)
