"""Audio in a report: the same conversions by every arm side by side, as wav data and small spectrograms."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import soundfile
from numpy.typing import NDArray

from snac_runner.report.results import Run, Study, finite

MAX_BYTES = 11_000_000  # of wav data in the page, which base64 makes a third larger
MAX_PAIRS = 12
MAX_WORST = 10
WORST_BYTES = 5_000_000
IDENTITY = ".identity"  # suffix of a sample under the source's own embedding
IMAGE = (150, 56)  # spectrogram, in pixels


@dataclass(frozen=True)
class Clip:
    """One audio file of a pair.

    Attributes:
        label: who converted it.
        mark: number of the arm; None for a control.
        seconds: length.
        audio: wav data, base64; empty if there is none.
        image: spectrogram as PNG data, base64.
        score: SECS.
        problem: why there is no audio.
    """

    label: str
    mark: int | None
    seconds: float
    audio: str = ""
    image: str = ""
    score: float | None = None
    problem: str = ""


@dataclass(frozen=True)
class Group:
    """The clips of a pair, controls first."""

    pair: str
    source_speaker: str
    target_speaker: str
    clips: tuple[Clip, ...]
    identity: tuple[Clip, ...] = ()  # by the arms under the source's own embedding, if runs kept them


def groups(study: Study) -> tuple[list[Group], int]:
    """Pairs with samples, and the number of pairs that do not fit into the page.

    The samples of an arm are those of its first successful seed. Pairs that every arm has are first.
    """
    columns: list[tuple[str, int | None, Run]] = []
    names = {"source": "source", "ceiling": "target (ceiling)", "floor": "bare codec (floor)"}
    for control in [*names, *sorted(set(study.controls) - {*names, "mismatched"})]:
        run = study.controls.get(control)
        columns += [(names.get(control, control), None, run)] if run is not None and run.ok else []
    first_runs = {arm: first for arm, runs in study.arms.items() if (first := next((r for r in runs if r.ok), None))}
    usual = min((r.seed for r in first_runs.values() if r.seed is not None), default=None)
    for mark, arm in enumerate(study.arms):
        if arm in first_runs:
            seed = first_runs[arm].seed
            columns.append((arm if seed == usual else f"{arm} (seed {seed})", mark, first_runs[arm]))
    files = [{p.stem: p for p in sorted((run.folder / "samples").glob("[!.]*.wav"))} for _, _, run in columns]
    own = [{k.removesuffix(IDENTITY): f.pop(k) for k in list(f) if k.endswith(IDENTITY)} for f in files]
    names_of = sorted({pair for f in files for pair in f}, key=lambda pair: (-sum(pair in f for f in files), pair))
    found: list[Group] = []
    spent = 0
    for pair in names_of[:MAX_PAIRS]:
        clips = tuple(
            _clip(label, mark, run, pair, f.get(pair)) for (label, mark, run), f in zip(columns, files, strict=True)
        )
        kept = [
            (*column, f[pair]) for column, f in zip(columns, own, strict=True) if pair in f and column[1] is not None
        ]
        identity = tuple(replace(_clip(label, mark, run, pair, path), score=None) for label, mark, run, path in kept)
        size = sum(len(c.audio) for c in clips + identity) * 3 // 4
        if found and spent + size > MAX_BYTES:
            break
        spent += size
        described = next((u for r in study.results() for u in r.utterances if u.pair == pair), None)
        speakers = (described.source_speaker, described.target_speaker) if described else ("", "")
        found.append(Group(pair, *speakers, clips, identity))
    return found, len(names_of) - len(found)


def worst(study: Study) -> list[Group]:
    """The conversions with the lowest SECS over the first successful seed of every arm, lowest first."""
    scored: list[tuple[float, str, int, str, Run]] = []
    for mark, (arm, runs) in enumerate(study.arms.items()):
        run = next((r for r in runs if r.ok and r.result is not None), None)
        if run is None or run.result is None:
            continue
        kept = {
            p.name.removesuffix(".converted.wav") for p in (run.folder / "samples/worst").glob("[!.]*.converted.wav")
        }
        scored += [
            (score, arm, mark, item.pair, run)
            for item in run.result.utterances
            if item.pair in kept and (score := finite(item.metrics.get("secs"))) is not None
        ]
    found: list[Group] = []
    spent = 0
    for _, arm, mark, pair, run in sorted(scored, key=lambda s: (s[0], s[1], s[3]))[:MAX_WORST]:
        parts = {part: run.folder / "samples" / "worst" / f"{pair}.{part}.wav" for part in ("source", "target")}
        references = [
            replace(_clip(part, None, run, pair, path if path.is_file() else None), score=None)
            for part, path in parts.items()
        ]
        clips = (*references, _clip(arm, mark, run, pair, run.folder / "samples" / "worst" / f"{pair}.converted.wav"))
        spent += sum(len(c.audio) for c in clips) * 3 // 4
        if found and spent > WORST_BYTES:
            break
        item = next(u for u in run.result.utterances if u.pair == pair) if run.result else None
        speakers = (item.source_speaker, item.target_speaker) if item else ("", "")
        found.append(Group(f"{pair} by {arm}", *speakers, clips))
    return found


def _clip(label: str, mark: int | None, run: Run, pair: str, path: Path | None) -> Clip:
    if path is None:
        return Clip(label, mark, 0.0, problem="no sample")
    score = None
    if run.result is not None:
        item = next((u for u in run.result.utterances if u.pair == pair), None)
        score = finite(item.metrics.get("secs")) if item is not None else None
    return replace(clip_of(path), label=label, mark=mark, score=score)


def clip_of(path: Path) -> Clip:
    """The audio and spectrogram of a file, or the reason why there is none."""
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError, ValueError) as error:
        return Clip("", None, 0.0, problem=f"cannot be read ({type(error).__name__})")
    mono = samples.mean(axis=1)
    if not mono.size:
        return Clip("", None, 0.0, problem="empty")
    if not np.isfinite(mono).all():
        return Clip("", None, mono.size / rate, problem="NaN in the audio")
    wav, png = encode_wav(mono, rate), spectrogram_png(mono, rate)
    return Clip("", None, mono.size / rate, _base64(wav), _base64(png))


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def encode_wav(mono: NDArray[np.float32], rate: int) -> bytes:
    """Samples (T,) as a wav file: 16-bit PCM, clipped at full scale."""
    out = io.BytesIO()
    soundfile.write(out, np.clip(mono, -1, 1), rate, format="WAV", subtype="PCM_16")
    return out.getvalue()


def spectrogram_png(mono: NDArray[np.float32], rate: int, size: tuple[int, int] = IMAGE) -> bytes:
    """A log-frequency spectrogram of samples (T,) over 60 dB, as a PNG of `size` (width, height) in pixels.

    Frames are spread evenly over the clip, one a column. The image is a transparency of one colour, so that it fits
    light and dark pages.
    """
    width, height = size
    window = 512 if rate <= 24_000 else 1024
    padded = np.pad(mono.astype(np.float64), (window // 2, window))
    starts = np.linspace(0, max(0, len(mono) - 1), width).astype(int)
    frames = padded[starts[:, None] + np.arange(window)] * np.hanning(window)
    power = np.abs(np.fft.rfft(frames, axis=1)) ** 2  # (width, window / 2 + 1)
    edges = np.geomspace(80, rate / 2, height + 1) / rate * window
    bands = np.stack([power[:, int(lo) : max(int(hi), int(lo) + 1)].mean(axis=1) for lo, hi in pairwise(edges)])
    level = 10 * np.log10(bands + 1e-12)
    shade = np.clip((level - level.max() + 60) / 60, 0, 1)
    return alpha_png((shade[::-1] * 15).round().astype(np.uint8))


def alpha_png(shades: NDArray[np.uint8], colour: tuple[int, int, int] = (86, 110, 168)) -> bytes:
    """A palette PNG of one colour with 16 levels of opacity, from levels (H, W) (PNG specification, section 11.2)."""
    height, width = shades.shape
    nibbles = np.pad(shades, ((0, 0), (0, width % 2)))
    packed = (nibbles[:, ::2] << 4) | nibbles[:, 1::2]
    raw = b"".join(b"\0" + row.tobytes() for row in packed)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 4, 3, 0, 0, 0)
    alphas = bytes(round(i / 15 * 255) for i in range(16))
    body = [chunk(b"IHDR", header), chunk(b"PLTE", bytes(colour) * 16), chunk(b"tRNS", alphas)]
    return b"\x89PNG\r\n\x1a\n" + b"".join([*body, chunk(b"IDAT", zlib.compress(raw, 9)), chunk(b"IEND", b"")])
