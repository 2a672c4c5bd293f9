"""Measurements of a conditioned codec, for the conformance rules and for `preflight`."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from snac_core.codec import SNAC
from snac_core.conditioned import ConditionedCodec
from snac_core.conditioning import Conditioning
from snac_core.frozen import FrozenActivations
from snac_core.hooks import Edit
from snac_core.seeding import generator

SPREAD = 0.1
"""Standard deviation of the perturbation of parameters: it leaves zero, and does not saturate nonlinearities."""

SAME = 1e-5
"""Tolerance, as a relative difference, for results of the same batch size."""

ROUNDING = 1e-3
"""Tolerance for results of different batch sizes, which may sum in another order."""


def copied(model: ConditionedCodec) -> ConditionedCodec:
    """A deep copy of the strategies on the same codec."""
    return copy.deepcopy(model, {id(model.codec): model.codec})


def perturbed(model: ConditionedCodec, seed: int) -> ConditionedCodec:
    """A copy with random values added to all parameters of the strategies, so that none is zero."""
    moved = copied(model)
    numbers = generator(seed, "perturbation")
    with torch.no_grad():
        for strategy in moved.attached.values():
            for parameter in strategy.parameters():
                parameter.add_(SPREAD * torch.randn(parameter.shape, generator=numbers).to(parameter))
    return moved


def adapters(model: ConditionedCodec) -> list[str]:
    """Names of the strategies that edit the signal, in listed order."""
    editing = {edit.strategy for edits in model.edits.values() for edit in edits}
    return [name for name in model.attached if name in editing]


def edits_of(model: ConditionedCodec, strategy: str) -> Iterator[Edit]:
    """The edits of one strategy, in signal order."""
    return (edit for edits in model.edits.values() for edit in edits if edit.strategy == strategy)


def gradients(model: ConditionedCodec, total: Tensor) -> dict[str, dict[str, Tensor | None]]:
    """Strategy to parameter name to its gradient of `total`; None where `total` does not depend on it.

    Discriminators and parameters that ask for no gradient are left out. No `.grad` is touched.
    """
    named = [
        (strategy_name, name, parameter)
        for strategy_name, strategy in model.attached.items()
        for name, parameter in strategy.adapted_parameters()
        if parameter.requires_grad
    ]
    table: dict[str, dict[str, Tensor | None]] = {name: {} for name in model.attached}
    grads: tuple[Tensor | None, ...] = (None,) * len(named)
    if named and total.requires_grad:
        grads = torch.autograd.grad(total, [parameter for *_, parameter in named], allow_unused=True, retain_graph=True)
    for (strategy_name, name, _), grad in zip(named, grads, strict=True):
        table[strategy_name][name] = grad
    return table


def flows(grad: Tensor | None) -> bool:
    """Whether there is a gradient, and not all of it is zero."""
    return grad is not None and bool(grad.count_nonzero())


def other_speakers(cond: Conditioning, seed: int) -> Conditioning:
    """The same rows with random embeddings of unit norm."""
    drawn = torch.randn(cond.speaker.shape, generator=generator(seed, "other speakers"))
    return replace(cond, speaker=F.normalize(drawn, dim=1).to(cond.speaker))


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference of two tensors, relative to the largest value; infinite if there is a NaN."""
    a, b = a.detach(), b.detach()
    scale = max(float(a.abs().max()), float(b.abs().max()), 1e-12) if a.numel() else 1.0
    difference = float((a - b).abs().max()) / scale if a.numel() else 0.0
    return difference if difference == difference else float("inf")


class EditProbe:
    """Measurements of one edit, on the bare codec's activation at its tap.

    Args:
        edit: of the model under test.
        bare: activations of the bare codec for at least two items.
        cond: one row per item.
        seed: for the values that other rows are changed to.
    """

    def __init__(self, edit: Edit, bare: FrozenActivations, cond: Conditioning, seed: int) -> None:
        self.edit = edit
        self.x = bare.at(edit.tap.name).detach()
        self.cond = cond
        self.seed = seed

    @torch.no_grad()
    def overwrites_its_input(self) -> bool:
        """Whether the edit modifies its input in place; other arms share that tensor."""
        x = self.x.clone()
        self.edit(x, self.cond)
        return not torch.equal(x, self.x)

    @torch.no_grad()
    def effect(self) -> float:
        """Relative change of the output for another embedding."""
        return distance(self._seeded(self.x, self.cond), self._seeded(self.x, other_speakers(self.cond, self.seed)))

    @torch.no_grad()
    def drift(self) -> float:
        """Relative difference between the outputs of two calls with equal input."""
        return distance(self._seeded(self.x, self.cond), self._seeded(self.x, self.cond))

    @torch.no_grad()
    def leak(self) -> float:
        """Relative change of the first row's output when the audio and embeddings of all other rows change."""
        x, cond = self.x.clone(), other_speakers(self.cond, self.seed)
        x[1:] = 0.5 * x[1:].flip(-1) + 0.1 * torch.randn(x[1:].shape, generator=generator(self.seed, "leak")).to(x)
        speaker = torch.cat([self.cond.speaker[:1], cond.speaker[1:]])
        changed = self._seeded(x, replace(cond, speaker=speaker))
        return distance(self._seeded(self.x, self.cond)[:1], changed[:1])

    @torch.no_grad()
    def alone(self) -> float:
        """Relative difference between the first row's output in the batch and alone."""
        return distance(self._seeded(self.x, self.cond)[:1], self._seeded(self.x[:1], self.cond.first(1)))

    def _seeded(self, x: Tensor, cond: Conditioning) -> Tensor:
        """The edit, always from the same random state, so that dropout makes no difference."""
        with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
            torch.manual_seed(0)
            return self.edit(x.clone(), cond)


class BaseSnapshot:
    """A copy of all tensors of a codec, with its folded weights.

    Args:
        codec: frozen.
    """

    def __init__(self, codec: SNAC) -> None:
        self.codec = codec
        self._kept = {name: tensor.detach().clone() for name, tensor in self._tensors()}

    def changed(self) -> list[str]:
        """Names of tensors that changed, require a gradient, were added, or were removed."""
        now = dict(self._tensors())
        return [
            name
            for name in sorted(now.keys() | self._kept.keys())
            if name not in now
            or name not in self._kept
            or now[name].requires_grad
            or not torch.equal(now[name], self._kept[name])
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Restore every tensor."""
        now = dict(self._tensors())
        for name, kept in self._kept.items():
            if name in now:
                now[name].requires_grad_(False).copy_(kept)

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.codec.named_parameters()
        yield from self.codec.named_buffers()


def owned_base_tensors(model: ConditionedCodec) -> list[str]:
    """Parameters of the codec that strategies would train."""
    base = {id(parameter) for parameter in model.codec.parameters()}
    return [
        f"{name}.{parameter_name}"
        for name, strategy in model.attached.items()
        for parameter_name, parameter in strategy.named_parameters()
        if id(parameter) in base
    ]
