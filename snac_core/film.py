"""FiLM: a per-channel affine map of features, computed from the speaker embedding (Perez et al. 2018)."""

from __future__ import annotations

from torch import Tensor, nn


class FiLM(nn.Module):
    """x * (1 + g(s)) + b(s), constant over time; exactly the identity at initialization.

    The scale is 1 + g, so that weight decay pulls it towards the identity.

    Args:
        speaker_dim: S.
        channels: C.
        hidden: widths of the ReLU layers between the embedding and the two linear heads.
    """

    def __init__(self, speaker_dim: int, channels: int, hidden: tuple[int, ...] = ()) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in hidden:
            layers += [nn.Linear(speaker_dim, width), nn.ReLU()]
            speaker_dim = width
        self.trunk = nn.Sequential(*layers)
        self.scale = nn.Linear(speaker_dim, channels)
        self.shift = nn.Linear(speaker_dim, channels)
        for head in (self.scale, self.shift):
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    def forward(self, x: Tensor, speaker: Tensor) -> Tensor:
        """x (B, C, F) and speaker (B, S) to (B, C, F)."""
        hidden = self.trunk(speaker)
        edited: Tensor = x * (1 + self.scale(hidden)).unsqueeze(-1) + self.shift(hidden).unsqueeze(-1)
        return edited
