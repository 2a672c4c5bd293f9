"""Training the phone recogniser: connectionist temporal classification (Graves et al. 2006) of disturbed speech."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from runner.encoders.augment import disturb, mask_features
from runner.phones.material import UNKNOWN, Material
from runner.phones.network import BLANK, SAMPLE_RATE, PhoneNetwork
from snac_core import atomic
from snac_core.errors import UserError
from snac_core.seeding import derive, generator


@dataclass(frozen=True)
class Settings:
    """How the recogniser is trained.

    Attributes:
        steps: of the optimizer.
        seconds: of speech a step, in s.
        lr: peak learning rate, reached after `warm` steps and left again for zero in the last 0.3 of the steps.
        warm: steps with a rising learning rate.
        alone: steps on the first kind of material only: clean speech teaches what a phone is, the rest comes after.
        framewise: weight of the cross entropy of frames, where espeak-ng says when it speaks which phone: an alignment
            that CTC would take many steps to find.
        weight_decay: of AdamW, on matrices only.
        disturbed: share of the items that are disturbed; all are warped and masked.
        warp: largest change of the mel axis, up or down: vocal tracts of other lengths (Jaitly and Hinton 2013).
        seed: of everything random.
    """

    steps: int = 2000
    seconds: float = 64.0
    lr: float = 1.5e-3
    warm: int = 60
    alone: int = 300
    framewise: float = 0.5
    weight_decay: float = 1e-2
    disturbed: float = 0.6
    warp: float = 0.12
    seed: int = 0


def train_phones(
    first_kind: Material,
    material: Material,
    settings: Settings,
    *,
    state: Path | None = None,
    report: Callable[[dict[str, float]], None] | None = None,
    every: int = 50,
    checkpoint: Callable[[int, PhoneNetwork], None] | None = None,
    checkpoint_every: int = 400,
) -> PhoneNetwork:
    """Train a network from nothing, or go on from `state`.

    Args:
        first_kind: what to learn in the first `settings.alone` steps.
        material: what to learn in all others.
        settings: how.
        state: file of weights and optimizer, written at every report, read when it is there: training goes on exactly.
        report: called every `every` steps with step, loss, lr and seconds.
        checkpoint: called with the step and the network, in eval mode, every `checkpoint_every` steps and at the end.

    Returns:
        The network in eval mode.

    Raises:
        UserError: if `state` was made with other settings.
    """
    s = settings
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(s.seed, "phone weights"))
        network = PhoneNetwork()
    parameters = list(network.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": s.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=s.lr,
        betas=(0.9, 0.98),
    )
    first, losses, seconds = _resume(state, network, optimizer, s)
    network.train()
    for step in range(first, s.steps):
        begun = perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = s.lr * _schedule(step, s)
        loss = _loss(network, first_kind if step < s.alone else material, s, step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 2.0)
        optimizer.step()
        losses.append(loss.item())
        seconds += perf_counter() - begun
        done = step + 1
        if done % every == 0:
            line = {"step": done, "loss": sum(losses) / len(losses), "lr": s.lr * _schedule(step, s)}
            losses = []
            if report is not None:
                report(line | {"seconds": seconds})
            if state is not None:
                _keep(state, network, optimizer, s, done, seconds)
        if checkpoint is not None and (done % checkpoint_every == 0 or done == s.steps):
            network.eval()
            checkpoint(done, network)
            network.train()
    return network.eval()


def _loss(network: PhoneNetwork, material: Material, s: Settings, step: int) -> Tensor:
    """CTC loss per phone on the batch of a step; a function of the weights and (seed, step)."""
    batch = material.batch(s.seconds, s.seed, step)
    draw = generator(s.seed, step, "phone disturbance")
    untouched = torch.rand(len(batch.audio), 1, generator=draw) >= s.disturbed
    audio = torch.where(untouched, batch.audio, disturb(batch.audio, SAMPLE_RATE, draw))
    features = warp_bands(network.features(audio), s.warp, draw)
    for _ in range(2):
        features = mask_features(features, draw, bands=12, frames=15)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(s.seed, step, "phone dropout"))
        with torch.autocast("cpu", torch.bfloat16):
            logits = network.read(features)
    log_probabilities = logits.float().log_softmax(-1)
    length = torch.full((len(audio),), logits.shape[1])
    ctc = nn.functional.ctc_loss(
        log_probabilities.transpose(0, 1), batch.phones, length, batch.counts, blank=BLANK,
        reduction="none", zero_infinity=True,
    )  # fmt: skip
    loss = ctc.sum() / batch.counts.sum()
    if (batch.frames != UNKNOWN).any():
        loss = loss + s.framewise * nn.functional.nll_loss(log_probabilities.transpose(1, 2), batch.frames)
    return loss


def warp_bands(features: Tensor, most: float, draw: torch.Generator) -> Tensor:
    """Stretch or squeeze the mel axis of each item (B, M, F) by a factor in 1 - most .. 1 + most."""
    items, bands, frames = features.shape
    factor = 1 + most * (2 * torch.rand(items, 1, generator=draw) - 1)
    place = (torch.arange(bands) * factor).clamp(max=bands - 1)
    below = place.floor().long().clamp(max=bands - 2)
    part = (place - below).unsqueeze(-1)
    low, high = (features.gather(1, i.unsqueeze(-1).expand(-1, -1, frames)) for i in (below, below + 1))
    return low + part * (high - low)


def _schedule(step: int, s: Settings) -> float:
    """Up, level, and down along a cosine: how long it stays level can be decided while it is."""
    if step < s.warm:
        return (step + 1) / s.warm
    left = (s.steps - step) / (0.3 * s.steps)
    return 1.0 if left >= 1 else 0.5 * (1 - math.cos(math.pi * left))


def _keep(
    path: Path, network: PhoneNetwork, optimizer: torch.optim.Optimizer, s: Settings, step: int, seconds: float
) -> None:
    with atomic.writing(path) as working:
        torch.save(
            {
                "settings": asdict(s),
                "step": step,
                "seconds": seconds,
                "network": network.state_dict(),
                "optimizer": optimizer.state_dict(),
            },
            working,
        )


def _resume(
    path: Path | None, network: PhoneNetwork, optimizer: torch.optim.Optimizer, s: Settings
) -> tuple[int, list[float], float]:
    """First step to do, losses since the last report (none), seconds spent."""
    if path is None or not path.is_file():
        return 0, [], 0.0
    kept: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    same = asdict(s) | {"steps": kept["settings"]["steps"]}  # more or fewer steps in all are no other training
    if kept["settings"] != same:
        raise UserError(f"{path} was made with {kept['settings']}; the settings are now {asdict(s)}; give a new folder")
    network.load_state_dict(kept["network"])
    optimizer.load_state_dict(kept["optimizer"])
    return kept["step"], [], kept["seconds"]
