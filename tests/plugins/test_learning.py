"""Each objective alone teaches an adapter before the quantizer and one after it what it asks for.

What is compared is the objective's own weighted loss on batches that were not trained on, before and after: on speech
other utterances of other speakers, save for the codebook adversary, whose classifier knows no others. An adversary's
loss means something under one discriminator only: that is trained first and then stands still.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from snac_core import ConditionedCodec, UserError, discover
from snac_core.checkpoint import load_state, state_of
from snac_core.step import Step
from snac_core.testing import Fixtures, small_codec
from snac_runner.arm import Arm
from snac_runner.bench import objectives
from snac_runner.config import ArmSettings, StudySettings
from snac_runner.data.synth import synthesize
from snac_runner.resources import StudyResources
from snac_runner.train_step import loss_terms, make_step, weighted_sum

CATALOGUE = discover()
OBJECTIVES = objectives(CATALOGUE)
PLACEMENTS = ("phase4_decoder_film", "phase6_encoder_adapter")
PAIRS = [(adapter, name, settings) for adapter in PLACEMENTS for name, settings in OBJECTIVES.items()]
PARALLEL = [  # wants real speech
    *((adapter, "content", {"cycle": False, "parallel": True}) for adapter in PLACEMENTS),
    ("phase6_encoder_adapter", "code_prediction", {"parallel": True}),
]
RISES = {"codebook_adversary"}  # its classifier's error is to become larger
REFUSED = {("phase4_decoder_film", "codebook_adversary"), ("phase4_decoder_film", "code_prediction")}  # about codes
RATES = {"code_prediction": 1e-3}  # of the fast test; the others learn enough in a few large steps
SMALL = {"adversarial": {"periods": (2, 3), "n_ffts": (256,)}}
SPEAKER_DIM, LATE = 8, 10**6  # a step after every warm-up
STEPS, HELD_OUT = 100, 8  # of the slow test, and the batches that it is judged on
LONGER = {("phase4_decoder_film", "content"): 200}  # steps; after VQ the way back is learned slowly


def own_loss(step: Step, objective: str) -> torch.Tensor:
    """The weighted sum of an objective's terms."""
    weights = CATALOGUE.strategies[objective].default_weights
    terms = {name: term for name, term in loss_terms(step, "loss").items() if name.startswith(f"{objective}/")}
    return torch.stack([weights.get(name.split("/")[1], 1.0) * term for name, term in terms.items()]).sum()


@torch.no_grad()
def heard(model: ConditionedCodec, steps: Callable[[ConditionedCodec], list[Step]], objective: str) -> list[float]:
    """The objective's loss on each held-out batch; positive is bad."""
    with model.codec.fixed_noise(0):
        sign = -1 if objective in RISES else 1
        return [sign * float(own_loss(step, objective)) for step in steps(model)]


def fallen(
    model: ConditionedCodec,
    steps: Callable[[ConditionedCodec], list[Step]],
    objective: str,
    start: dict[str, torch.Tensor],
) -> tuple[list[float], list[float]]:
    """The loss on held-out batches with the strategies' `start`, and as they are now, under the same discriminators."""
    now = {key: value.clone() for key, value in state_of(model.attached).items()}
    after = heard(model, steps, objective)
    load_state(model.attached, start, "the start")
    before = heard(model, steps, objective)
    load_state(model.attached, now, "the end")
    return before, after


def discriminators_loss(step: Step) -> torch.Tensor:
    """The sum of the discriminators' terms."""
    return torch.stack(list(loss_terms(step, "discriminator_loss").values())).sum()


def teach(
    parameters: list[torch.nn.Parameter], steps: int, rate: float, loss_at: Callable[[int], torch.Tensor]
) -> None:
    """Steps of Adam on these parameters alone; what is heard by a discriminator is heard by one that stands still."""
    if not parameters:
        return
    optimizer = torch.optim.Adam(parameters, lr=rate)
    for index in range(1, steps + 1):
        for parameter, grad in zip(parameters, torch.autograd.grad(loss_at(index), parameters), strict=True):
            parameter.grad = grad
        optimizer.step()


def other_sounds(like: torch.Tensor, sample_rate: int) -> torch.Tensor:
    """Tones and noise of the shape (B, 1, T) of those that are trained on, at other pitches."""
    time = torch.arange(like.shape[-1]) / sample_rate
    tones = torch.stack([torch.sin(2 * torch.pi * 150 * 2**row * time) for row in range(len(like))]).unsqueeze(1)
    return 0.2 * tones + 0.05 * torch.randn(like.shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("adapter", "objective", "settings"), PAIRS)
def test_an_objective_alone_lowers_itself_on_what_it_was_not_trained_on(
    adapter: str, objective: str, settings: dict[str, Any]
) -> None:
    fixtures, other = (Fixtures(small_codec(decoder_dim=16), SPEAKER_DIM) for _ in range(2))
    other.codec = fixtures.codec
    other.audio = other_sounds(fixtures.audio, fixtures.codec.sampling_rate)
    model = ConditionedCodec(
        fixtures.codec,
        [adapter, objective],
        speaker_dim=SPEAKER_DIM,
        config={objective: {**settings, **SMALL.get(objective, {})}},
        plugins=CATALOGUE,
    ).train()
    try:
        for _, hook in model.callers("training_start"):
            hook(context=fixtures.context(model))
    except UserError:
        assert (adapter, objective) in REFUSED
        return
    start = {key: value.clone() for key, value in state_of(model.attached).items()}
    discriminator = [parameter for _, parameter in model.discriminator_parameters()]
    own = [parameter for _, parameter in model.trained_parameters()]
    teach(discriminator, 4, 1e-2, lambda index: discriminators_loss(fixtures.step(model, LATE + index)))
    rate = RATES.get(objective, 1e-2)
    teach(own, 6, rate, lambda index: own_loss(fixtures.step(model, LATE + index), objective))
    before, after = fallen(model, lambda m: [other.step(m, 2 * LATE + i) for i in range(1)], objective, start)
    assert sum(after) < sum(before)


@pytest.fixture(scope="module")
def heard_and_unheard(tmp_path_factory: pytest.TempPathFactory) -> tuple[StudyResources, StudyResources]:
    """The bundled base and conditioning encoder with twelve synthetic voices to train on, and with eight others."""
    speech = synthesize(tmp_path_factory.mktemp("speech") / "voices", 24, 8)
    swapped = speech / "swapped.jsonl"
    utterances = [json.loads(line) for line in (speech / "manifest.jsonl").read_text().splitlines()]
    splits = {"train": "test", "dev": "dev", "test": "train"}
    swapped.write_text("".join(json.dumps({**u, "split": splits[u["split"]]}) + "\n" for u in utterances))
    study = StudySettings(batch_size=4, crop_seconds=0.64, steps=STEPS)
    one, other = (StudyResources(study.model_copy(update={"data": str(data)}), CATALOGUE) for data in (speech, swapped))
    assert not set(one.table.names) & set(other.table.names)
    return one, other


def drawn(arm: Arm, index: int, model: ConditionedCodec) -> Step:
    """A step of a model on the speech of an arm."""
    batch = arm.resources.draw(index, arm.resources.batches(0), arm.sampler)
    return make_step(arm, batch, model)


@pytest.mark.slow
@pytest.mark.parametrize(("adapter", "objective", "settings"), PAIRS + PARALLEL)
def test_on_the_small_base_an_objective_alone_lowers_itself_on_voices_that_it_never_heard(
    heard_and_unheard: tuple[StudyResources, StudyResources],
    adapter: str,
    objective: str,
    settings: dict[str, Any],
    tmp_path: Path,
) -> None:
    alone = ArmSettings(strategies=(adapter,), objectives=(objective,), settings={objective: settings})
    try:
        arm, unheard = (
            Arm.new(alone, 0, tmp_path / str(number), resources) for number, resources in enumerate(heard_and_unheard)
        )
    except UserError:
        assert (adapter, objective) in REFUSED
        return
    start = {key: value.clone() for key, value in state_of(arm.model.attached).items()}
    discriminator = [parameter for _, parameter in arm.model.discriminator_parameters()]
    own = [parameter for _, parameter in arm.model.trained_parameters()]
    teach(
        discriminator,
        STEPS,
        arm.settings.discriminator_lr,
        lambda index: discriminators_loss(drawn(arm, LATE + index, arm.model)),
    )
    # with the adapter's own terms beside it, as in any arm
    steps = LONGER.get((adapter, objective), STEPS)
    teach(own, steps, 1e-3, lambda index: weighted_sum(arm, loss_terms(drawn(arm, LATE + index, arm.model), "loss")))
    judged = arm if objective in RISES else unheard
    before, after = fallen(
        arm.model, lambda m: [drawn(judged, 2 * LATE + i, m) for i in range(HELD_OUT)], objective, start
    )
    print(f"{adapter}, {objective} {settings}: {sum(before) / HELD_OUT:.4f} to {sum(after) / HELD_OUT:.4f}")
    assert all(a < b for a, b in zip(after, before, strict=True))
