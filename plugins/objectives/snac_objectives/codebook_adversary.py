"""A speaker classifier as adversary of the quantized vectors. Not recommended; see `CodebookAdversary`."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from snac_core import Step, Strategy, Taps, hookimpl
from snac_core.discriminators import without_parameter_gradients
from snac_core.step import TrainingContext
from snac_objectives.requirements import require_edits_before_vq


class _Reversal(torch.autograd.Function):
    """Gradient reversal: the identity with a negated gradient (Ganin and Lempitsky 2015, eq. 13 and 14)."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: object, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return -gradient


class SpeakerClassifier(nn.Module):
    """Speaker classifier of latents: two convolutions and the mean over time.

    Args:
        channels: C.
        speakers: P.
        hidden: width.
    """

    def __init__(self, channels: int, speakers: int, hidden: int) -> None:
        super().__init__()
        self.frames = nn.Sequential(
            nn.Conv1d(channels, hidden, 5, padding=2), nn.ReLU(), nn.Conv1d(hidden, hidden, 5, padding=2), nn.ReLU()
        )
        self.out = nn.Linear(hidden, speakers)

    def forward(self, z_q: Tensor) -> Tensor:
        """(B, C, F) to logits (B, P)."""
        logits: Tensor = self.out(self.frames(z_q).mean(-1))
        return logits


class CodebookAdversary(Strategy):
    """A classifier learns to identify the source speaker from converted codes; the adapter learns to prevent it.

    Its input is the straight-through quantized vectors, which have a gradient, in contrast to code indices. It needs an
    adapter before the quantizer. Not recommended: with phase 6 and two seeds, no metric improved
    (docs/experiments/README.md).
    """

    name = "codebook_adversary"
    default_weights = {"speaker": 0.1}  # noqa: RUF012  (a constant of the class)

    class Config(Strategy.Config):
        hidden_dim: int = Field(128, ge=1, description="Width of the classifier.")

    def __init__(self, config: Config, taps: Taps) -> None:
        super().__init__(config, taps)
        self.channels = taps.match(("quantized",))[0].channels
        self.discriminator = SpeakerClassifier(self.channels, 1, config.hidden_dim)

    @hookimpl
    def training_start(self, context: TrainingContext) -> None:
        """Build a classifier with one output per training speaker.

        Raises:
            UserError: if no strategy acts before the quantizer, so that the codes cannot change.
        """
        require_edits_before_vq(self, context.model)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(context.generator.initial_seed())
            device = self.discriminator.out.weight.device
            self.discriminator = SpeakerClassifier(self.channels, len(context.speakers), self.config.hidden_dim).to(
                device
            )

    @hookimpl
    def loss(self, step: Step) -> dict[str, Tensor]:
        """`speaker`: the classifier's cross-entropy, with reversed gradient; a scalar in nats."""
        reversed_: Tensor = _Reversal.apply(step.converted_latents.z_q)
        with without_parameter_gradients(self.discriminator):
            return {"speaker": self._entropy(reversed_, step)}

    @hookimpl
    def discriminator_loss(self, step: Step) -> dict[str, Tensor]:
        """`classifier`: the cross-entropy on detached vectors, for the classifier; a scalar in nats."""
        return {"classifier": self._entropy(step.converted_latents.z_q.detach(), step)}

    def _entropy(self, z_q: Tensor, step: Step) -> Tensor:
        sources = step.speaker_ids.repeat(len(z_q) // len(step.speaker_ids)).to(z_q.device)
        return F.cross_entropy(self.discriminator(z_q), sources)
