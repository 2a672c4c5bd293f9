"""ECAPA-TDNN (Desplanques et al. 2020, arXiv 2005.07143): SpeechBrain's `ecapa`, and `ecapa_tiny` of this project.

Structure and parameter names are those of SpeechBrain (Apache 2.0), so its released weights load. `ecapa` computes the
whole pipeline of speechbrain/spkrec-ecapa-voxceleb from the weights alone: the speechbrain package is not needed, and
its loader would execute code that is named in a configuration file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from snac_core.speakers.encoder import SpeakerEncoder, load_checkpoint, load_strictly, missing_weights
from snac_core.speakers.features import LogMel
from snac_core.spectral import power_spectrum, speechbrain_filterbank


class Named(nn.Module):
    """A layer under the attribute name of the checkpoint."""

    def __init__(self, name: str, layer: nn.Module) -> None:
        super().__init__()
        self.add_module(name, layer)
        self._layer = name

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.get_submodule(self._layer)(x)
        return out


def convolution(channels: int, out: int, kernel: int = 1, dilation: int = 1, stride: int = 1) -> Named:
    """Convolution over time with reflected edges: (B, C, F) to (B, out, F / stride)."""
    padding = dilation * (kernel - 1) // 2
    mode: Literal["reflect", "zeros"] = "reflect" if padding else "zeros"  # reflection would copy, even without padding
    return Named("conv", nn.Conv1d(channels, out, kernel, stride, padding, dilation=dilation, padding_mode=mode))


def norm(channels: int) -> Named:
    """Batch norm over (B, C, F)."""
    return Named("norm", nn.BatchNorm1d(channels))


class TimeDelay(nn.Module):
    """Convolution, ReLU, batch norm."""

    def __init__(self, channels: int, out: int, kernel: int = 1, dilation: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.conv = convolution(channels, out, kernel, dilation, stride)
        self.norm = norm(out)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.conv(x).relu())
        return out


class Res2Net(nn.Module):
    """Groups of channels; each is added to the output of the group before it, and convolved. (B, C, F) to (B, C, F)."""

    def __init__(self, channels: int, scale: int, kernel: int, dilation: int) -> None:
        super().__init__()
        width = channels // scale
        self.scale = scale
        self.blocks = nn.ModuleList(TimeDelay(width, width, kernel, dilation) for _ in range(scale - 1))

    def forward(self, x: Tensor) -> Tensor:
        first, second, *rest = x.chunk(self.scale, dim=1)
        outputs = [first, self.blocks[0](second)]
        for block, part in zip(list(self.blocks)[1:], rest, strict=True):
            outputs.append(block(part + outputs[-1]))
        return torch.cat(outputs, dim=1)


class SqueezeExcitation(nn.Module):
    """Channels scaled by a sigmoid of their means over time."""

    def __init__(self, channels: int, bottleneck: int) -> None:
        super().__init__()
        self.conv1 = convolution(channels, bottleneck)
        self.conv2 = convolution(bottleneck, channels)

    def forward(self, x: Tensor) -> Tensor:
        weights: Tensor = self.conv2(self.conv1(x.mean(-1, keepdim=True)).relu())
        return x * weights.sigmoid()


class SERes2Net(nn.Module):
    """1x1, Res2Net, 1x1, squeeze-excitation, residual."""

    def __init__(self, channels: int, scale: int, bottleneck: int, kernel: int, dilation: int) -> None:
        super().__init__()
        self.tdnn1 = TimeDelay(channels, channels)
        self.res2net_block = Res2Net(channels, scale, kernel, dilation)
        self.tdnn2 = TimeDelay(channels, channels)
        self.se_block = SqueezeExcitation(channels, bottleneck)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.se_block(self.tdnn2(self.res2net_block(self.tdnn1(x))))
        return out


class AttentiveStatistics(nn.Module):
    """Attentive mean and standard deviation over time, with global context: (B, C, F) to (B, 2C, 1)."""

    def __init__(self, channels: int, bottleneck: int) -> None:
        super().__init__()
        self.tdnn = TimeDelay(3 * channels, bottleneck)
        self.conv = convolution(bottleneck, channels)

    def forward(self, x: Tensor) -> Tensor:
        even = torch.full_like(x[:, :1], 1 / x.shape[-1])
        context = [statistic.expand_as(x) for statistic in _statistics(x, even)]
        attention = self.conv(torch.tanh(self.tdnn(torch.cat([x, *context], dim=1)))).softmax(-1)
        return torch.cat(_statistics(x, attention), dim=1)


def _statistics(x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted mean and standard deviation over time, each (B, C, 1), in float32 at least."""
    if x.dtype != torch.float64:
        x, weights = x.float(), weights.float()
    mean = (x * weights).sum(-1, keepdim=True)
    variance = ((x - mean).square() * weights).sum(-1, keepdim=True)
    return mean, variance.clamp(min=1e-12).sqrt()


class ECAPATDNN(nn.Module):
    """Features (B, bands, F) to embeddings (B, dim) of any norm.

    The defaults are those of the released model. `stride` of the first convolution is not in the paper; 2 halves the
    number of frames and the cost.
    """

    def __init__(
        self,
        *,
        bands: int = 80,
        channels: int = 1024,
        pooled: int = 3072,
        scale: int = 8,
        squeeze: int = 128,
        attention: int = 128,
        dim: int = 192,
        stride: int = 1,
    ) -> None:
        super().__init__()
        blocks = [SERes2Net(channels, scale, squeeze, 3, dilation) for dilation in (2, 3, 4)]
        self.blocks = nn.ModuleList([TimeDelay(bands, channels, 5, stride=stride), *blocks])
        self.mfa = TimeDelay(3 * channels, pooled)
        self.asp = AttentiveStatistics(pooled, attention)
        self.asp_bn = norm(2 * pooled)
        self.fc = convolution(2 * pooled, dim)

    def forward(self, features: Tensor) -> Tensor:
        x = features
        outputs = []
        for block in self.blocks:
            x = block(x)
            outputs.append(x)
        embedding: Tensor = self.fc(self.asp_bn(self.asp(self.mfa(torch.cat(outputs[1:], dim=1)))))
        return embedding.squeeze(-1)


HUB = "speechbrain/spkrec-ecapa-voxceleb"
FILE = "embedding_model.ckpt"


class SpeechBrainFbank(nn.Module):
    """Mel band levels in dB, at most 80 dB below the maximum, minus the mean of each band over time."""

    def __init__(self, bands: int = 80, sample_rate: int = 16000) -> None:
        super().__init__()
        self.window: Tensor
        self.filters: Tensor
        self.register_buffer("window", torch.hamming_window(400), persistent=False)
        self.register_buffer("filters", speechbrain_filterbank(bands, 400, sample_rate), persistent=False)

    def forward(self, audio: Tensor) -> Tensor:
        """(B, T) at 16 kHz to (B, bands, T // 160 + 1), in dB."""
        power = self.filters @ power_spectrum(audio, self.window, 160, padding="constant")
        level = 10 * power.clamp(min=1e-10).log10()
        level = torch.maximum(level, level.amax(dim=(1, 2), keepdim=True) - 80)
        return level - level.mean(-1, keepdim=True)


class Ecapa(SpeakerEncoder):
    """SpeechBrain's ECAPA-TDNN of VoxCeleb 1 and 2, 192-d."""

    name = "ecapa"
    family = "ecapa_tdnn"
    training_data = "voxceleb1+voxceleb2"

    def __init__(self, weights: str | Path | None = None) -> None:
        """Load `weights` (the released embedding_model.ckpt), or download them from the hub.

        Raises:
            UserError: if they cannot be downloaded, or do not fit.
        """
        super().__init__()
        self.dim = 192
        self.sample_rate = 16000
        self.features = SpeechBrainFbank()
        self.network = ECAPATDNN()
        path = Path(weights) if weights is not None else _fetched()
        load_strictly(self.network, load_checkpoint(path, self.name), path, self.name)
        self.freeze()

    def embed(self, audio: Tensor) -> Tensor:
        """(B, T) at 16 kHz to (B, 192)."""
        embedding: Tensor = self.network(self.features(audio))
        return embedding


def _fetched() -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(HUB, FILE))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError):
        remedy = f"they could not be fetched; download {FILE} of {HUB} from huggingface.co and give its path as weights"
        missing_weights("ecapa", f"huggingface.co/{HUB}", remedy, "'ecapa_tiny' or 'ge2e'")


ASSET = Path(__file__).resolve().parent.parent / "assets" / "ecapa_tiny" / "model.safetensors"
SAMPLE_RATE = 16000  # Hz


class SpeakerNetwork(nn.Module):
    """Features and ECAPA-TDNN: audio (B, T) at 16 kHz to (B, 192) of any norm."""

    dim = 192

    def __init__(self) -> None:
        super().__init__()
        self.features = LogMel(64, SAMPLE_RATE)
        self.net = ECAPATDNN(
            bands=64, channels=256, pooled=512, scale=4, squeeze=64, attention=128, dim=self.dim, stride=2
        )

    def embed_features(self, features: Tensor) -> Tensor:
        """(B, 64, F) to (B, 192)."""
        embedding: Tensor = self.net(features)
        return embedding

    def forward(self, audio: Tensor) -> Tensor:
        """(B, T) at 16 kHz to (B, 192)."""
        return self.embed_features(self.features(audio))


class EcapaTiny(SpeakerEncoder):
    """Small ECAPA-TDNN (1.5 M parameters), trained with an additive angular margin; see its model card."""

    name = "ecapa_tiny"
    family = "ecapa_tdnn"
    training_data = "librispeech_mini-train+espeak-ng"

    def __init__(self, weights: str | Path | None = None) -> None:
        """Load `weights` (safetensors of a `SpeakerNetwork`), or the bundled file.

        Raises:
            UserError: if the file does not exist or does not fit.
        """
        super().__init__()
        self.dim = SpeakerNetwork.dim
        self.sample_rate = SAMPLE_RATE
        self.network = SpeakerNetwork()
        path = Path(weights) if weights is not None else ASSET
        if not path.is_file():
            remedy = "reinstall this package, or train them with `python recipes/speaker_encoder.py train`"
            missing_weights(self.name, path, remedy, "'ge2e'")
        load_strictly(self.network, load_checkpoint(path, self.name), path, self.name)
        self.freeze()

    def embed(self, audio: Tensor) -> Tensor:
        """(B, T) at 16 kHz to (B, 192)."""
        embedding: Tensor = self.network(audio)
        return embedding
