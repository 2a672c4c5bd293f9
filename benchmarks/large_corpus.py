"""Cost of a large corpus on this machine: scanning, opening, a batch, memory; and how fast crops are read.

Example: python benchmarks/large_corpus.py --utterances 1000000
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import numpy as np
import soundfile
import typer

RATE = 24_000
EACH = 500  # utterances of a speaker

_OPEN = """
import json, resource, sys, time
from pathlib import Path
import torch
from snac_runner.data.crops import CropLoader
from snac_runner.data.open_corpus import open_corpus

torch.set_num_threads(1)
begun, busy = time.perf_counter(), time.process_time()
corpus = open_corpus(Path(sys.argv[1]))
opened, busy = time.perf_counter() - begun, time.process_time() - busy
size = sum(len(part) for part in corpus.parts.values())
begun = time.perf_counter()
loader = CropLoader(corpus, "train", 24000, 1.28, 8, 0)
loader.at(0)
first = time.perf_counter() - begun
begun = time.perf_counter()
for step in range(1, 101):
    loader.at(step)
each = (time.perf_counter() - begun) / 100
print(json.dumps([size, opened, busy, first, each, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]))
"""


def at_scale(utterances: int, folder: Path) -> Iterator[str]:
    """A Markdown table of scanning and opening a corpus in `folder`, made of real wav and flac files.

    The files of a format have the same second of audio, and differ in an identifier in their header: reading, hashing,
    decoding and checking cost what they cost for other files of this size. The second row opens the corpus again.
    """
    begun = time.perf_counter()
    synthetic(folder, utterances)
    yield f"{utterances:,} files made in {time.perf_counter() - begun:.0f} s"
    yield "| | utterances | opening, s | CPU s | first batch, ms | batch of 8, ms | peak memory, MB |"
    yield "|---|---|---|---|---|---|---|"
    for what in ("scanned", "opened again"):
        done = subprocess.run(
            [sys.executable, "-c", _OPEN, str(folder)], check=True, capture_output=True, text=True, env=os.environ
        )
        size, opened, busy, first, each, peak = json.loads(done.stdout)
        yield (
            f"| {what} | {size:,} | {opened:.1f} | {busy:.1f} | {1e3 * first:.0f} | {1e3 * each:.1f} | "
            f"{peak / 1e6:.0f} |"
        )


def synthetic(folder: Path, utterances: int) -> None:
    """Files of one second at 24 kHz, half wav and half flac; 500 of each speaker."""
    time_axis = np.arange(RATE) / RATE
    tone = 0.1 * np.sin(2 * np.pi * 150 * time_axis) * (1 + np.sin(2 * np.pi * 4 * time_axis))
    tone = np.where(time_axis < 0.1, tone, 0)  # mostly zeros, so that a flac file is small and a wav file is sparse
    wav, flac = (_encoded(tone, kind) for kind in ("WAV", "FLAC"))
    for number in range(utterances):
        speaker = folder / f"s{number // EACH:05d}"
        if number % EACH == 0:
            speaker.mkdir(parents=True, exist_ok=True)
        name = number.to_bytes(8, "little")
        path = speaker / f"{number % EACH:04d}.{'flac' if number % 2 else 'wav'}"
        if number % 2:  # an APPLICATION block after STREAMINFO; RFC 9639, section 8.4
            path.write_bytes(flac[:42] + b"\x02\x00\x00\x0ctest" + name + flac[42:])
            continue
        chunk = b"test\x08\x00\x00\x00" + name
        head = b"RIFF" + (len(wav) + len(chunk) - 8).to_bytes(4, "little") + wav[8:12] + chunk + wav[12:]
        with path.open("wb") as file:
            file.write(head[:8192])
            file.truncate(len(head))


def _encoded(samples: np.ndarray, kind: str) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, RATE, format=kind, subtype="PCM_16")
    return buffer.getvalue()


def reading(folder: Path, seconds: float, batches: int) -> Iterator[str]:
    """A Markdown table of how fast one worker reads crops from noise like speech, at several rates and formats."""
    import torch

    from snac_runner.data.crops import CropLoader
    from snac_runner.data.open_corpus import open_corpus

    torch.set_num_threads(1)
    yield "| files | crops at | batch of 8 x 1.28 s, ms | times real time |"
    yield "|---|---|---|---|"
    for suffix, rate, target in (
        ("wav", 24_000, 24_000), ("flac", 24_000, 24_000), ("flac", 16_000, 24_000), ("flac", 48_000, 24_000),
        ("ogg", 24_000, 24_000),
    ):  # fmt: skip
        root = folder / f"{suffix}{rate}"
        draw = np.random.default_rng(0)
        for speaker in range(10):
            for number in range(4):
                path = root / f"s{speaker}" / f"{number}.{suffix}"
                path.parent.mkdir(parents=True, exist_ok=True)
                noise = draw.normal(size=round(seconds * rate)) * 0.1
                noise *= np.abs(np.sin(np.pi * np.arange(len(noise)) / rate * 2))
                soundfile.write(path, np.cumsum(noise) * 0.02 + noise, rate, format="OGG" if suffix == "ogg" else None)
        loader = CropLoader(open_corpus(root, dev=0.0, test=0.0), "train", target, 1.28, 8, 0)
        for step in range(20):
            loader.at(step)  # decodes copies of what cannot seek
        for row in range(len(loader.utterances)):
            loader._crop(loader.utterances[row], torch.Generator())
        begun = time.perf_counter()
        for step in range(batches):
            loader.at(step)
        spent = (time.perf_counter() - begun) / batches
        yield f"| {suffix}, {rate} Hz | {target} Hz | {1e3 * spent:.1f} | {8 * 1.28 / spent:.0f} |"


def main(
    utterances: Annotated[int, typer.Option(min=EACH, help="Number of utterances.")] = 1_000_000,
    folder: Annotated[Path | None, typer.Option(help="Where the files are made; default: a temporary folder.")] = None,
) -> None:
    """Print both tables."""
    with TemporaryDirectory(dir=folder) as place:
        os.environ["SNAC_CACHE"] = str(Path(place) / "cache")
        for line in (*reading(Path(place) / "reading", 12.0, 200), "", *at_scale(utterances, Path(place) / "speech")):
            print(line, flush=True)


if __name__ == "__main__":
    typer.run(main)
