"""ERes2NetV2 (Chen et al. 2024, arXiv 2406.02167), as 3D-Speaker defines it, for its checkpoint w24s4ep4."""

from __future__ import annotations

import os
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from snac_core.speakers.encoder import SpeakerEncoder, load_checkpoint, load_strictly, missing_weights
from snac_core.speakers.features import KaldiFbank

FILE = "pretrained_eres2netv2w24s4ep4.ckpt"
VARIABLE = "SNAC_ERES2NETV2"  # names the file for commands, which have no option for it
BASE_WIDTH, SCALE, EXPANSION = 24, 4, 4
BANDS = 80


def clipped(x: Tensor) -> Tensor:
    """ReLU clipped at 20."""
    return x.clamp(0, 20)


class AttentionalFusion(nn.Module):
    """Attentional fusion of two maps: x (1 + tanh a) + y (1 - tanh a), where a depends on both."""

    def __init__(self, channels: int, reduction: int = 4) -> None:
        super().__init__()
        inner = channels // reduction
        self.local_att = nn.Sequential(
            nn.Conv2d(2 * channels, inner, 1),
            nn.BatchNorm2d(inner),
            nn.SiLU(),
            nn.Conv2d(inner, channels, 1),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """(B, C, H, W) and (B, C, H, W) to (B, C, H, W)."""
        a = torch.tanh(self.local_att(torch.cat([x, y], dim=1)))
        return x * (1 + a) + y * (1 - a)


class Block(nn.Module):
    """Res2Net bottleneck: `SCALE` groups of channels, each combined with the output of the group before it.

    Args:
        channels: of the input.
        planes: the output has `EXPANSION` times as many channels.
        stride: of the first convolution.
        fused: combine groups by `AttentionalFusion` instead of a sum.
    """

    def __init__(self, channels: int, planes: int, stride: int, *, fused: bool) -> None:
        super().__init__()
        width = planes * BASE_WIDTH // 64
        out = planes * EXPANSION
        self.conv1 = nn.Conv2d(channels, width * SCALE, 1, stride=stride, bias=False)
        self.bn1 = nn.BatchNorm2d(width * SCALE)
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(SCALE))
        self.bns = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(SCALE))
        self.fuse_models = nn.ModuleList(AttentionalFusion(width) for _ in range(SCALE - 1)) if fused else None
        self.conv3 = nn.Conv2d(width * SCALE, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride=stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, planes * EXPANSION, H / stride, W / stride)."""
        outputs: list[Tensor] = []
        for i, part in enumerate(clipped(self.bn1(self.conv1(x))).chunk(SCALE, dim=1)):
            if outputs:
                part = self.fuse_models[i - 1](outputs[-1], part) if self.fuse_models else outputs[-1] + part
            outputs.append(clipped(self.bns[i](self.convs[i](part))))
        return clipped(self.bn3(self.conv3(torch.cat(outputs, dim=1))) + self.shortcut(x))


class ERes2NetV2Network(nn.Module):
    """Mel bands to embeddings, with the parameter names of 3D-Speaker."""

    def __init__(self, width: int = 64, blocks: tuple[int, int, int, int] = (3, 4, 6, 3), dim: int = 192) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        channels = width
        for number, count in enumerate(blocks, start=1):
            planes = width << (number - 1)
            layer: list[nn.Module] = []
            for i in range(count):
                stride = 2 if i == 0 and number > 1 else 1
                layer.append(Block(channels, planes, stride, fused=number > 2))
                channels = planes * EXPANSION
            self.add_module(f"layer{number}", nn.Sequential(*layer))
        self.layer3_ds = nn.Conv2d(channels // 2, channels, 3, stride=2, padding=1, bias=False)
        self.fuse34 = AttentionalFusion(channels)
        self.seg_1 = nn.Linear(2 * channels * (BANDS // 8), dim)

    def fused_map(self, bands: Tensor) -> Tensor:
        """(B, 80, F) to (B, 20480, ceil(F / 8)): fusion of the last two layers, with channels and bands in one axis."""
        x = self.bn1(self.conv1(bands.unsqueeze(1))).relu()
        third = self.get_submodule("layer3")(self.get_submodule("layer2")(self.get_submodule("layer1")(x)))
        fused: Tensor = self.fuse34(self.get_submodule("layer4")(third), self.layer3_ds(third))
        return fused.flatten(1, 2)

    def forward(self, bands: Tensor) -> Tensor:
        """(B, 80, F) to (B, 192)."""
        x = self.fused_map(bands)
        deviation = (x.var(-1) + 1e-8).sqrt()
        embedding: Tensor = self.seg_1(torch.cat([x.mean(-1), deviation], dim=1))
        return embedding


class ERes2NetV2(SpeakerEncoder):
    """ERes2NetV2, 192-d; the mean of each band over time is subtracted, as in 3D-Speaker's training."""

    name = "eres2netv2"
    family = "eres2netv2"
    training_data = "3d-speaker-200k"
    min_seconds = 0.2  # two frames are left after the strides, so that a deviation exists
    size: ClassVar[int] = 192

    def __init__(self, weights: str | Path | None = None) -> None:
        """Load `weights`, 3D-Speaker's checkpoint; None: the file that the environment variable SNAC_ERES2NETV2 names.

        Raises:
            UserError: without weights, or if they do not fit.
        """
        super().__init__()
        self.dim = self.size
        self.sample_rate = 16000
        self.bands = KaldiFbank(BANDS, self.sample_rate)
        weights = weights or os.environ.get(VARIABLE)
        if weights is None or not Path(weights).is_file():
            remedy = (
                f"download {FILE} (iic/speech_eres2netv2w24s4ep4_sv_zh-cn_16k-common on modelscope.cn, or sv/ in "
                f"lj1995/GPT-SoVITS on huggingface.co) and give its path as weights, or in the environment variable "
                f"{VARIABLE}"
            )
            missing_weights(self.name, weights or FILE, remedy, "'ecapa_tiny' or 'ge2e'")
        self.network = ERes2NetV2Network()
        load_strictly(self.network, load_checkpoint(weights, self.name), weights, self.name)
        self.freeze()

    def embed(self, audio: Tensor) -> Tensor:
        """(B, T) at 16 kHz to (B, 192)."""
        bands = self.bands(audio)
        embedding: Tensor = self.network(bands - bands.mean(-1, keepdim=True))
        return embedding


class ERes2NetV2Map(ERes2NetV2):
    """20,480-d: the mean of the fused map over time, without mean subtraction, as GPT-SoVITS uses it."""

    name = "eres2netv2_map"
    size: ClassVar[int] = 20480

    def embed(self, audio: Tensor) -> Tensor:
        """(B, T) at 16 kHz to (B, 20480)."""
        return self.network.fused_map(self.bands(audio)).mean(-1)
