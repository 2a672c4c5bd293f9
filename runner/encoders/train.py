"""Training `ecapa_tiny`: classify speakers under an angular margin, while their speech is disturbed in many ways."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor, nn

from runner.encoders.augment import disturb, mask_features
from runner.encoders.margin import AngularMargin
from runner.encoders.voices import Voices
from snac_core.seeding import derive, generator
from snac_core.speakers.ecapa_tiny import SpeakerNetwork


@dataclass(frozen=True)
class Settings:
    """How the encoder is trained.

    Attributes:
        steps: of the optimizer.
        batch: crops a step.
        shortest, longest: of the crops, in s; each batch has one length.
        lr: peak learning rate, reached after a twentieth of the steps; a cosine leads to zero.
        weight_decay: of AdamW, on matrices only.
        margin: in radians, reached after `ramp` of the steps, from 0.
        scale: of the cosines in the softmax.
        disturbed: share of the batches' items that are disturbed; all are masked.
        seed: of everything random.
    """

    steps: int = 2200
    batch: int = 64
    shortest: float = 1.0
    longest: float = 2.5
    lr: float = 2e-3
    weight_decay: float = 5e-2
    margin: float = 0.2
    ramp: float = 0.4
    scale: float = 30.0
    disturbed: float = 0.8
    seed: int = 0


def train_speaker_encoder(
    voices: Voices,
    settings: Settings,
    *,
    report: Callable[[dict[str, float]], None] | None = None,
    every: int = 100,
    checkpoint: Callable[[int, SpeakerNetwork], None] | None = None,
    checkpoint_every: int = 500,
) -> SpeakerNetwork:
    """Train a network from nothing.

    Args:
        voices: the classes to tell apart.
        settings: how.
        report: called every `every` steps with step, loss, accuracy, lr and seconds.
        checkpoint: called with the step and the network, in eval mode, every `checkpoint_every` steps and at the end.

    Returns:
        The network in eval mode.
    """
    s = settings
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(s.seed, "encoder weights"))
        network = SpeakerNetwork()
    head = AngularMargin(network.dim, len(voices.names), scale=s.scale, generator=generator(s.seed, "centres"))
    parameters = [*network.parameters(), *head.parameters()]
    matrices = [p for p in parameters if p.ndim > 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": s.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=s.lr,
    )
    begun = perf_counter()
    losses: list[float] = []
    accuracies: list[float] = []
    network.train()
    for step in range(s.steps):
        for group in optimizer.param_groups:
            group["lr"] = s.lr * _schedule(step, s.steps)
        audio, label = crops(voices, s, step)
        draw = generator(s.seed, step, "mask")
        with torch.autocast("cpu", torch.bfloat16):
            embedding = network.embed_features(mask_features(network.features(audio), draw))
        loss, accuracy = head(embedding.float(), label, s.margin * min(1.0, step / max(1, s.ramp * s.steps)))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()
        losses.append(loss.item())
        accuracies.append(accuracy.item())
        done = step + 1
        if report is not None and done % every == 0:
            report(
                {
                    "step": done,
                    "loss": sum(losses) / len(losses),
                    "accuracy": sum(accuracies) / len(accuracies),
                    "lr": optimizer.param_groups[0]["lr"],
                    "seconds": perf_counter() - begun,
                }
            )
            losses, accuracies = [], []
        if checkpoint is not None and (done % checkpoint_every == 0 or done == s.steps):
            network.eval()
            checkpoint(done, network)
            network.train()
    return network.eval()


def crops(voices: Voices, settings: Settings, step: int) -> tuple[Tensor, Tensor]:
    """The batch of a step: disturbed crops (B, T) and labels (B,), a pure function of (seed, step)."""
    s = settings
    draw = generator(s.seed, step, "disturbance")
    seconds = s.shortest + (s.longest - s.shortest) * torch.rand((), generator=draw).item()
    samples = round(seconds * 10) * voices.sample_rate // 10  # whole tenths: sizes that Fourier transforms are quick at
    audio, label = voices.batch(s.batch, samples, s.seed, step)
    untouched = torch.rand(s.batch, 1, generator=draw) >= s.disturbed
    return torch.where(untouched, audio, disturb(audio, voices.sample_rate, draw)), label


def _schedule(step: int, steps: int) -> float:
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
