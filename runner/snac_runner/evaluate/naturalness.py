"""Naturalness of an output, as a mean opinion score that a network predicts without a reference.

DistillMOS is measured wherever its package is installed, DNSMOS only on request. Both score the converted output, and
the output under the source speaker's own embedding.
"""

from __future__ import annotations

import importlib.metadata
import io
from contextlib import redirect_stdout
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from snac_core.metric import Conversion, Metric
from snac_runner.data.audio import resample

RATE = 16000  # Hz, of both networks
WINDOW = 122_880  # samples (7.68 s) that DistillMOS takes; its position encoding allows no other length
HOP = 16_000  # samples between the windows of longer audio, at most
_WINDOWS_AT_ONCE = 8  # bounds the memory of long audio


class DistillMOS(Metric):
    """Predicted mean opinion score of the converted output (DistillMOS: Stahl and Gamper 2025, arXiv 2502.05356).

    The level has no influence: the network normalises it. Audio below 7.68 s is padded, and scores of clips of very
    different lengths are not comparable. Synthetic voices get scores as low as noise: DNSMOS can judge them.
    """

    name, unit, direction, worst, requires = "distillmos", "MOS", "up", 1.0, ("distillmos",)
    outputs, role = ("converted",), "naturalness"

    @property
    def version(self) -> str:
        return f"distillmos {importlib.metadata.version('distillmos')}"

    def prepare(self) -> None:
        """Load the network, which is in the package."""
        _distillmos()

    def __call__(self, conversion: Conversion) -> float | None:
        return _of(conversion, self.outputs[0], distillmos)


class DistillMOSIdentity(DistillMOS):
    """DistillMOS of the output under the source speaker's own embedding."""

    name, outputs = "distillmos_identity", ("identity",)


class DNSMOS(Metric):
    """Predicted P.808 mean opinion score of the converted output (DNSMOS: Reddy et al. 2021, arXiv 2010.15258)."""

    name, unit, direction, worst, on_request = "dnsmos", "MOS", "up", 1.0, True
    requires = ("speechmos", "librosa", "onnxruntime")
    outputs, role = ("converted",), "naturalness"

    @property
    def version(self) -> str:
        return f"speechmos {importlib.metadata.version('speechmos')}"

    def __call__(self, conversion: Conversion) -> float | None:
        return _of(conversion, self.outputs[0], dnsmos)


class DNSMOSIdentity(DNSMOS):
    """DNSMOS of the output under the source speaker's own embedding."""

    name, outputs = "dnsmos_identity", ("identity",)


def _of(conversion: Conversion, output: str, score: Any) -> float | None:
    audio: Tensor | None = getattr(conversion, output)
    return None if audio is None else score(audio, conversion.sample_rate)


def distillmos(audio: Tensor, sample_rate: int) -> float:
    """DistillMOS of audio (T,), T > 0: the mean over windows of 7.68 s that are at most 1 s apart.

    The package computes the same, but all windows of a clip at once: two minutes would need gigabytes.
    """
    return _distillmos_of(audio.float().numpy().tobytes(), sample_rate)


@lru_cache(maxsize=8)
def _distillmos_of(samples: bytes, sample_rate: int) -> float:
    """Cached, because two outputs of a control are the same audio."""
    wave = resample(torch.frombuffer(bytearray(samples), dtype=torch.float32), sample_rate, RATE)
    over = max(0, len(wave) - WINDOW)
    starts = np.linspace(0, over, -(-over // HOP) + 1).astype(int)
    padded = F.pad(wave, (0, max(0, WINDOW - len(wave))))
    windows = torch.stack([padded[start : start + WINDOW] for start in starts])
    with torch.inference_mode():
        return float(torch.cat([_distillmos()(some) for some in torch.split(windows, _WINDOWS_AT_ONCE)]).mean())


class WithoutPadding(nn.Module):
    """The convolutions of DistillMOS, which most of its time is spent in, without those of the padding of a short clip.

    The features of silence are computed once. The result is that of the convolutions on the whole window.

    Args:
        layers: convolutions over (band, frame), without padding of bands.
    """

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = layers
        convolutions = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
        self.reach, self.stride = 0, 1  # frames of the input: on either side of a frame of the output, and between two
        for layer in convolutions:
            self.reach += self.stride * (layer.kernel_size[1] // 2)
            self.stride *= layer.stride[1]
        self.silence: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Spectra (B, C, N, F) to features (B, C', N', F / stride)."""
        sound = x.abs().amax(dim=(0, 1, 2)).nonzero()
        first = int(sound.max()) // self.stride + 1 if len(sound) else 0  # frame of the output after the last sound
        kept = first + -(-self.reach // self.stride)  # frames of the output that the sound reaches
        needed = self.stride * (kept + -(-self.reach // self.stride))  # frames of the input that these depend on
        if needed >= x.shape[-1]:
            result: Tensor = self.layers(x)
            return result
        if self.silence is None or self.silence.shape[-1] != x.shape[-1] // self.stride:
            self.silence = self.layers(torch.zeros_like(x[:1]))
        rest = self.silence[..., kept:].expand(len(x), -1, -1, -1)
        return torch.cat([self.layers(x[..., :needed])[..., :kept], rest], dim=-1)


@cache
def _distillmos() -> Any:
    from distillmos import ConvTransformerSQAModel

    # the constructor prints a line, and draws weights that are then overwritten
    with redirect_stdout(io.StringIO()), torch.random.fork_rng(devices=[]):
        network = ConvTransformerSQAModel().eval()
    network.cnn.cnn = WithoutPadding(network.cnn.cnn)
    return network


def dnsmos(audio: Tensor, sample_rate: int) -> float:
    """P.808 score of audio (T,), T > 0: the mean over windows of 9.01 s, 1 s apart; shorter audio is repeated."""
    from speechmos.dnsmos import run

    wave = resample(audio.float(), sample_rate, RATE).clamp(-1, 1)  # the package refuses values beyond
    return float(run(wave.numpy(), sr=RATE)["p808_mos"])
