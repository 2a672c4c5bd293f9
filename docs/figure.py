"""Draw the README's picture from a study folder: `python docs/figure.py STUDY ARM` writes docs/images/study.png.

Left, the ranking of the report (report.json). Right, the mel spectrograms of one conversion by ARM: its source, the
conversion, and a real utterance of the target through the codec.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import soundfile
import torch
from PIL import Image
from torchaudio.transforms import MelSpectrogram

OUT = Path(__file__).parent / "images" / "study.png"


def log_mel(path: Path) -> torch.Tensor:
    """Log mel spectrogram (80, F) in dB below the maximum, of a wav file."""
    audio, rate = soundfile.read(path, dtype="float32")
    power = MelSpectrogram(rate, n_fft=1024, hop_length=rate // 100, n_mels=80, power=2.0)(torch.from_numpy(audio))
    level = 10 * torch.log10(power + 1e-8)
    return level - level.max()


def draw_ranking(axes: Any, report: dict[str, Any]) -> None:
    """Normalised SECS of every arm with its 95 % interval."""
    arms = list(reversed(report["ranking"]))
    for row, arm in enumerate(arms):
        score = report["arms"][arm]["metrics"]["normalised"]
        axes.plot([score["low"], score["high"]], [row, row], color="C0", lw=2)
        axes.plot([score["mean"]], [row], "o", color="C0")
    axes.set_yticks(range(len(arms)), arms)
    axes.set_ylim(-0.6, len(arms) - 0.4)
    for place, name in ((0, "floor"), (1, "ceiling")):
        axes.axvline(place, color="0.5", ls=":")
        axes.text(place, len(arms) - 0.4, name, ha="center", va="bottom", color="0.4")
    axes.set_xlabel("normalised speaker similarity, 95 % interval")


def main(study: Path, arm: str) -> None:
    """Draw and write the picture."""
    report = json.loads((study / "report.json").read_text())
    samples = min((study / arm).glob("seed*/samples"))
    pair = next(path.name for path in sorted(samples.glob("*.wav")) if path.stem.count(".") == 0)
    sounds = {
        "source": study / "controls" / "source" / "samples" / pair,
        f"conversion, {arm}": samples / pair,
        "target, another sentence": study / "controls" / "ceiling" / "samples" / pair,
    }
    figure, places = plt.subplot_mosaic(
        [["ranking", name] for name in sounds], figsize=(10, 4.2), width_ratios=[1, 1.1], layout="constrained"
    )
    draw_ranking(places["ranking"], report)
    for name, path in sounds.items():
        places[name].imshow(log_mel(path), origin="lower", aspect="auto", vmin=-70, vmax=0, cmap="magma")
        places[name].set_title(name, fontsize=9)
        places[name].set_xticks([])
        places[name].set_yticks([])
    OUT.parent.mkdir(exist_ok=True)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=90)
    Image.open(buffer).convert("RGB").quantize(128).save(OUT, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
