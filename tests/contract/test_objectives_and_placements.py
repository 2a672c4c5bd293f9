"""Every registered objective with every registered adapter: its gradient is that of finite differences.

Rounding to codes has no derivative, so here the codec's quantizer lets everything pass; what is left is smooth, but for
the corners of a few absolute values. Numbers are of double precision.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from snac_core import ConditionedCodec, UserError, discover
from snac_core.codec.vq import ResidualVectorQuantize
from snac_core.speakers.sampling import SpeakerSampler
from snac_core.testing import Fixtures, small_codec
from snac_core.testing.probes import gradients, perturbed
from snac_core.testing.trial import hooks_of

CATALOGUE = discover()
HOOKS = {name: set(hooks_of(CATALOGUE.strategies[name])) for name in CATALOGUE.strategies}
EDITS = {"before_vq", "after_vq"}
PLACEMENTS = [name for name, hooks in HOOKS.items() if hooks & EDITS]
OBJECTIVES = [
    name
    for name, hooks in HOOKS.items()
    if "loss" in hooks and (not hooks & EDITS or "path" in CATALOGUE.strategies[name].Config.model_fields)
]
# an objective and its settings: all as by default, and another form
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in OBJECTIVES),
    ("phase3_contrastive", {"form": "margin", "margin": 2.0}),
]
REVERSED = {"codebook_adversary/speaker"}  # terms whose gradient is turned round on purpose
SPEAKER_DIM, LATE = 8, 10**6  # a step after every warm-up
EPSILON = 1e-6


class Passing(ResidualVectorQuantize):
    """A quantizer whose rounding changes nothing: (B, C, F) to itself and its codes."""

    def forward(self, z: Tensor) -> tuple[Tensor, list[Tensor]]:
        return z, super().forward(z)[1]


@pytest.fixture(scope="module")
def fixtures() -> Fixtures:
    codec = small_codec(encoder_dim=2, decoder_dim=16)
    around = Fixtures(codec, SPEAKER_DIM)
    quantizer = Passing(codec.latent_dim, codec.codebook_size, codec.codebook_dim, codec.vq_strides)
    quantizer.load_state_dict(codec.quantizer.state_dict())
    codec.quantizer = quantizer.requires_grad_(False)
    codec.double()
    around.audio, around.speaker_encoder = around.audio.double(), around.speaker_encoder.double()
    table = around.table
    table = replace(table, conditioning=table.conditioning.double(), reference=table.reference.double())
    around.table, around.sampler = table, SpeakerSampler(table, seed=0)
    return around


def conditioned(around: Fixtures, adapter: str, objective: str, settings: dict[str, Any]) -> ConditionedCodec:
    """A codec with both, where the objective leaves a path of its own out."""
    names = list(dict.fromkeys([adapter, objective]))
    alone = "path" in CATALOGUE.strategies[objective].Config.model_fields and adapter != objective
    config = {objective: {**settings, **({"path": False} if alone else {})}}
    return ConditionedCodec(around.codec, names, speaker_dim=SPEAKER_DIM, config=config, plugins=CATALOGUE)


def test_there_are_pairs_to_look_at() -> None:
    assert len(PLACEMENTS) >= 3
    assert len(OBJECTIVES) >= 6


@pytest.mark.parametrize(("objective", "settings"), VARIANTS)
@pytest.mark.parametrize("adapter", PLACEMENTS)
def test_the_gradient_of_every_term_in_a_placement_is_that_of_finite_differences(
    fixtures: Fixtures, adapter: str, objective: str, settings: dict[str, Any]
) -> None:
    model = conditioned(fixtures, adapter, objective, settings).double()
    try:
        for _, start in model.callers("training_start"):
            start(context=fixtures.context(model))
    except UserError as refusal:
        if objective not in str(refusal) or adapter not in str(refusal):
            raise
        return
    model = perturbed(model.double(), seed=0)
    hook = dict(model.callers("loss"))[objective]
    parameters = dict(model.attached[adapter].adapted_parameters())
    way = {name: torch.randn_like(parameter) for name, parameter in parameters.items()}

    def terms() -> dict[str, Tensor]:
        with model.codec.fixed_noise(0):
            found: dict[str, Tensor] = hook(step=fixtures.step(model, LATE))
            return found

    def go(distance: float) -> None:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.add_(way[name], alpha=distance)

    tables = {name: gradients(model, term)[adapter] for name, term in terms().items()}
    go(EPSILON)
    further = terms()
    go(-2 * EPSILON)
    nearer = terms()
    for name, table in tables.items():
        slope = sum(float((grad * way[key]).sum()) for key, grad in table.items() if grad is not None)
        measured = float(further[name].detach() - nearer[name].detach()) / (2 * EPSILON)
        if f"{objective}/{name}" in REVERSED:
            measured = -measured
        assert measured != 0, f"{objective}/{name} does not depend on {adapter}"
        assert slope == pytest.approx(measured, rel=1e-2), f"{objective}/{name}"


@pytest.fixture(scope="module")
def rounding() -> Fixtures:
    """With the codec's own quantizer."""
    return Fixtures(small_codec(encoder_dim=2, decoder_dim=16), SPEAKER_DIM)


@pytest.mark.parametrize(("objective", "settings"), VARIANTS)
@pytest.mark.parametrize("adapter", PLACEMENTS)
def test_through_real_codes_every_objective_teaches_the_placement_and_nothing_frozen(
    rounding: Fixtures, adapter: str, objective: str, settings: dict[str, Any]
) -> None:
    model = conditioned(rounding, adapter, objective, settings)
    try:
        for _, start in model.callers("training_start"):
            start(context=rounding.context(model))
    except UserError:
        return  # the pair is refused; the test above looks at what is said
    model = perturbed(model, seed=0)
    before = {name: value.clone() for name, value in model.codec.state_dict().items()}
    terms = dict(model.callers("loss"))[objective](step=rounding.step(model, LATE))
    torch.stack(list(terms.values())).sum().backward()
    learned = [parameter.grad for _, parameter in model.attached[adapter].adapted_parameters()]
    assert any(grad is not None and bool(grad.abs().sum() > 0) for grad in learned)
    assert all(grad is None or bool(grad.isfinite().all()) for grad in learned)
    for frozen in (*model.codec.parameters(), *rounding.speaker_encoder.parameters()):
        assert not frozen.requires_grad
        assert frozen.grad is None
    assert all(torch.equal(before[name], value) for name, value in model.codec.state_dict().items())
    discriminators = [parameter for _, parameter in model.discriminator_parameters()]
    assert all(discriminator.grad is None for discriminator in discriminators), (
        "the arm's own loss teaches no discriminator"
    )
    own = [parameter for _, parameter in model.trained_parameters()]
    for _, hook in model.callers("discriminator_loss"):
        for parameter in own:
            parameter.grad = None
        found = hook(step=rounding.step(model, LATE))
        torch.stack(list(found.values())).sum().backward()
        assert all(parameter.grad is None for parameter in own), "a discriminator's loss teaches no strategy"
        assert all(discriminator.grad is not None for discriminator in discriminators)
