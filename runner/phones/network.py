"""The network of the phone recogniser: log-mel bands to a distribution over phones every 30 ms."""

from __future__ import annotations

from torch import Tensor, nn

from runner.phones.alphabet import PHONES
from snac_core.speakers.logmel import LogMel

SAMPLE_RATE = 16000  # Hz
BLANK = 0  # of CTC; phone i of PHONES is class i + 1
BANDS = 80
FRAME = 480  # samples between two frames of the output; frame f looks at sample 480 f and around it


class Residual(nn.Module):
    """x + relu(norm(conv(x))), over time, (B, C, F) to the same."""

    def __init__(self, channels: int, kernel: int, dilation: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels, channels, kernel, padding=dilation * (kernel // 2), dilation=dilation)
        self.norm = nn.BatchNorm1d(channels)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + nn.functional.relu(self.norm(self.conv(x)))
        return out


class PhoneNetwork(nn.Module):
    """Convolutions for what a phone sounds like, then an LSTM both ways for what stands around it.

    Every item is read by itself: features are normalised per item, batch norms use stored statistics in eval mode.
    """

    def __init__(self, channels: int = 176, blocks: int = 6, hidden: int = 176, dropout: float = 0.1) -> None:
        super().__init__()
        self.features = LogMel(BANDS, SAMPLE_RATE)
        self.stem = nn.Sequential(
            nn.Conv1d(BANDS, 128, 5, padding=2),
            nn.BatchNorm1d(128),
            nn.ReLU(),
            nn.Conv1d(128, channels, 5, stride=3, padding=2),
            nn.BatchNorm1d(channels),
            nn.ReLU(),
        )
        self.blocks = nn.Sequential(*[Residual(channels, 5, 1 + i % 2) for i in range(blocks)])
        self.context = nn.LSTM(channels, hidden, batch_first=True, bidirectional=True)
        self.dropout = nn.Dropout(dropout)
        self.classify = nn.Linear(2 * hidden, len(PHONES) + 1)

    def read(self, features: Tensor) -> Tensor:
        """(B, 80, F) -> logits (B, ceil(F / 3), 40)."""
        x = self.blocks(self.stem(features)).transpose(1, 2)
        x, _ = self.context(self.dropout(x))
        logits: Tensor = self.classify(self.dropout(x))
        return logits

    def forward(self, audio: Tensor) -> Tensor:
        """(B, T) at 16 kHz -> logits (B, F, 40), 100 frames in 3 s; class 0 is CTC's blank."""
        return self.read(self.features(audio))
