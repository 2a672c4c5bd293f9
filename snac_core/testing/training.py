"""Rules about how a strategy learns: gradients, loss terms, critics, and a base that stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from snac_core.conditioned import ConditionedCodec
from snac_core.errors import nearest
from snac_core.step import Step
from snac_core.testing.probes import flows, gradients, owned_base_tensors, perturbed
from snac_core.testing.results import Broken, Rule
from snac_core.testing.trial import NOISE, StrategyTrial

CUT = "let the loss depend on it through tensors: no integer codes, .detach(), torch.no_grad() or .item() on the way"
STEPS = 2


def _losses(trial: StrategyTrial) -> str:
    if "loss" not in trial.hooks:
        if trial.cls.default_weights:
            raise Broken(f"default_weights names {sorted(trial.cls.default_weights)[0]!r}, but there is no loss")
        return "no loss of its own"
    fresh = trial.training_model()
    for state, model in (("new", fresh), ("perturbed", perturbed(fresh, seed=0))):
        terms = trial.terms(model, trial.surroundings.step(model))
        for name, term in terms.items():
            if not term.isfinite():
                raise Broken(f"term {name!r} of the {state} model is {float(term)}")
            reached = [s for s, table in gradients(model, term).items() if any(g is not None for g in table.values())]
            if not reached:
                raise Broken(f"no gradient of term {name!r} reaches a strategy", CUT)
    for name in trial.cls.default_weights:
        if name not in terms:
            raise Broken(f"default_weights names {name!r}, which is no term of loss{nearest(name, terms)}")
    return f"{', '.join(f'{trial.cls.name}/{name}' for name in terms) or 'no terms'}: finite scalars with gradient"


def _gradient(trial: StrategyTrial) -> str:
    model = trial.training_model()
    if not any(True for _ in model.attached[trial.cls.name].adapted_parameters()):
        if trial.places:
            raise Broken("it edits the signal and has no parameters", "give it something to learn")
        return "no parameters"
    table = gradients(model, trial.total(model, trial.surroundings.step(model)))[trial.cls.name]
    moving = [name for name, grad in table.items() if flows(grad)]
    if not moving:
        raise Broken(
            f"at initialisation none of its {len(table)} parameters gets a gradient",
            f"zero one layer, not two in a row, and {CUT}",
        )
    return f"{len(moving)} of {len(table)} parameters move at the first step"


def _every_gradient(trial: StrategyTrial) -> str:
    model = perturbed(trial.training_model(), seed=0)
    table = gradients(model, trial.total(model, trial.surroundings.step(model)))[trial.cls.name]
    for name, grad in table.items():
        if grad is not None and not grad.isfinite().all():
            raise Broken(
                f"the gradient of {name!r} is not finite after all parameters were perturbed",
                "guard logarithms, roots and divisions: clamp their arguments away from zero",
            )
        if not flows(grad):
            raise Broken(
                f"after all parameters were perturbed, {name!r} gets no gradient", f"use {name!r}, or remove it; {CUT}"
            )
    return f"all {len(table)} parameters" if table else "no parameters"


def _critic(trial: StrategyTrial) -> str:
    model = trial.training_model()
    critic = [parameter for _, parameter in model.critic_parameters()]
    if "critic_loss" not in trial.hooks:
        if critic:
            raise Broken("self.critic has parameters, but there is no critic_loss to train them")
        return "no critic"
    if not critic:
        raise Broken("critic_loss has no parameters under self.critic to train")
    terms = trial.terms(model, trial.surroundings.step(model), "critic_loss")
    total = torch.stack(list(terms.values())).sum()
    if not total.requires_grad or not any(
        flows(grad) for grad in torch.autograd.grad(total, critic, allow_unused=True, retain_graph=True)
    ):
        raise Broken("no gradient of critic_loss reaches self.critic", CUT)
    for strategy, table in gradients(model, total).items():
        for name, grad in table.items():
            if flows(grad):
                raise Broken(f"critic_loss moves {strategy}.{name}", "detach what the critic looks at in critic_loss")
    return f"{', '.join(terms)}: for {sum(p.numel() for p in critic):,} parameters of the critic alone"


def _base(trial: StrategyTrial) -> str:
    audio, codec = trial.surroundings.audio, trial.codec
    model = trial.training_model()
    with codec.fixed_noise(NOISE):
        before = codec(audio)[0]
    if owned := owned_base_tensors(model):
        raise Broken(
            f"it holds the base's parameters as its own: {owned[0]}", "keep no reference to the codec in a strategy"
        )
    _train(trial, model)
    if changed := trial.base.changed():
        raise Broken(f"{len(changed)} tensors of the base changed, e.g. {changed[0]!r}")
    if codec.training or any(module.training for module in codec.modules()):
        raise Broken("the base is in train mode")
    with codec.fixed_noise(NOISE):
        after, bare = codec(audio)[0], model.reconstruct(audio).audio
    if not (torch.equal(before, after) and torch.equal(bare, after)):
        raise Broken("after training, the codec without an embedding gives other audio than before")
    return f"bit-equal after attaching and {STEPS} steps, and without an embedding the output too"


def _train(trial: StrategyTrial, model: ConditionedCodec) -> None:
    """Some steps as an arm takes them; Adam's first step is the sign of the gradient."""
    trained = [parameter for _, parameter in model.trained_parameters()]
    critics = [parameter for _, parameter in model.critic_parameters()]
    turns: list[tuple[list[nn.Parameter], Callable[[ConditionedCodec, Step], Tensor | None]]]
    turns = [(trained, trial.total), (critics, partial(_critic_total, trial))]
    for index in range(1, STEPS + 1):
        for parameters, total_of in turns:
            total = total_of(model, trial.surroundings.step(model, index))
            if parameters and total is not None and total.requires_grad:
                grads = torch.autograd.grad(total, parameters, allow_unused=True)
                with torch.no_grad():
                    for parameter, grad in zip(parameters, grads, strict=True):
                        if grad is not None:
                            parameter.sub_(1e-2 * grad.sign())
    model.train()


def _critic_total(trial: StrategyTrial, model: ConditionedCodec, step: Step) -> Tensor | None:
    terms = trial.terms(model, step, "critic_loss") if "critic_loss" in trial.hooks else {}
    return torch.stack(list(terms.values())).sum() if terms else None


TRAINING: list[Rule[StrategyTrial]] = [
    Rule(
        "loss terms", _losses, "return finite scalar tensors that depend on the output, by the names in default_weights"
    ),
    Rule("gradient at initialisation", _gradient, CUT),
    Rule("gradient of every parameter", _every_gradient, CUT),
    Rule("critic", _critic, "train what is under self.critic in critic_loss, on detached outputs"),
    Rule(
        "base untouched",
        _base,
        "never write to the codec, through step.model, context.model or a reference of your own",
    ),
]
