"""The rules for a strategy: its edits, global state, `torch.compile`, and training."""

from __future__ import annotations

import copy
import random
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from snac_core.conditioned import ConditionedCodec, Reconstruction
from snac_core.conditioning import Conditioning
from snac_core.errors import nearest
from snac_core.frozen import FrozenActivations
from snac_core.plugin_guard import TorchSettingChanged, restore_settings, torch_settings
from snac_core.step import Step
from snac_core.testing.fixtures import ROWS
from snac_core.testing.probes import ROUNDING, SAME, distance, edits_of, flows, gradients, owned_base_tensors, perturbed
from snac_core.testing.results import Rule, RuleViolation
from snac_core.testing.trial import NOISE, StrategyTrial, hooks_of

NOT_APPLICABLE = "not applicable: it edits nothing"


def _shapes(trial: StrategyTrial) -> str:
    if not trial.edited_taps:
        return NOT_APPLICABLE
    model, codec = trial.model(), trial.codec
    hop = codec.preprocess(torch.zeros(1, 1, 1)).shape[-1]
    for rows, samples in ((1, 1), (2, hop), (3, 5 * hop + 1)):
        for cond in (trial.fixtures.conditioning(rows), trial.fixtures.conditioning(1)):
            out = model.reconstruct(torch.zeros(rows, 1, samples), cond)
            if out.audio.shape != (rows, 1, samples):
                raise RuleViolation(f"audio {(rows, 1, samples)} became {tuple(out.audio.shape)}")
    return f"kept at {', '.join(trial.edited_taps)} for 1 to 3 rows and 1 to {5 * hop + 1} samples"


def _identity(trial: StrategyTrial) -> str:
    model = trial.model()
    bare = trial.reconstruct(model, None)
    taps = FrozenActivations(trial.codec, trial.fixtures.audio)
    for mode in (True, False):
        model.train(mode)
        for first in (0, 3):
            cond = trial.fixtures.conditioning(ROWS, first)
            with trial.codec.fixed_noise(NOISE):
                for edit in edits_of(model, trial.cls.name):
                    x = taps.at(edit.tap.name)
                    if not torch.equal(edited := edit(x.clone(), cond), x):
                        raise RuleViolation(
                            f"the new strategy changes tap {edit.tap.name!r} by {distance(edited, x):.2g} of its range"
                            + (" in train mode" if mode else "")
                        )
            if not equal(trial.reconstruct(model, cond), bare):
                raise RuleViolation("output of the new strategy differs from the bare codec's")
    return "output equals the bare codec's, bit for bit" if trial.edited_taps else NOT_APPLICABLE


def _input(trial: StrategyTrial) -> str:
    for probe in trial.probes(perturbed(trial.model(), seed=0)):
        if probe.overwrites_its_input():
            raise RuleViolation(f"the edit at tap {probe.edit.tap.name!r} writes into its input")
    return "left as it was" if trial.edited_taps else NOT_APPLICABLE


def _rows(trial: StrategyTrial) -> str:
    worst = 0.0
    moved = perturbed(trial.model(), seed=0)
    for probe in trial.probes(moved):
        place = f"tap {probe.edit.tap.name!r}"
        for mode in (True, False):
            moved.train(mode)
            if (drift := probe.drift()) > SAME:
                raise RuleViolation(
                    f"at {place} equal input gives an output that differs by {drift:.2g} of its range in the next call"
                    + (" (in train mode)" if mode else ""),
                    "an edit depends on its arguments and parameters only, not on counters or other state",
                )
            if (leak := probe.leak()) > SAME:
                raise RuleViolation(
                    f"at {place} an item's output moves by {leak:.2g} of its range when the other items change"
                    + (" (in train mode)" if mode else "")
                )
        if (apart := probe.alone()) > ROUNDING:
            raise RuleViolation(
                f"at {place} an item alone differs by {apart:.2g} of its range from the same item in a batch"
            )
        worst = max(worst, apart)
    return f"an item alone differs by at most {worst:.1g}" if trial.edited_taps else NOT_APPLICABLE


def _effect(trial: StrategyTrial) -> str:
    if not trial.edited_taps:
        return NOT_APPLICABLE
    moved = perturbed(trial.model(), seed=0)
    effects = {probe.edit.tap.name: probe.effect() for probe in trial.probes(moved)}
    if max(effects.values()) <= SAME:
        raise RuleViolation("after all parameters were perturbed, another speaker embedding gives the same output")
    before, after = (trial.reconstruct(moved, trial.fixtures.conditioning(ROWS, first)) for first in (0, 3))
    changed = torch.cat([(a != b).flatten() for a, b in zip(before.codes, after.codes, strict=True)]).float().mean()
    return (
        f"another embedding moves {max(effects, key=effects.__getitem__)} by {max(effects.values()):.2g} of its range"
        + (f", and {100 * float(changed):.0f} % of the codes" if changed else "")
    )


def _finite(trial: StrategyTrial) -> str:
    for state, model in (("new", trial.model()), ("perturbed", perturbed(trial.model(), seed=0))):
        for what, audio in (("sound", trial.fixtures.audio), ("silence", torch.zeros(ROWS, 1, 1000))):
            out = model.reconstruct(audio, trial.fixtures.conditioning(ROWS))
            if not (out.audio.isfinite().all() and out.z.isfinite().all()):
                raise RuleViolation(f"the {state} strategy makes NaN or infinity of {what}")
    return "new and perturbed, on sound and silence"


def _bfloat16(trial: StrategyTrial) -> str:
    new, cond = trial.model(), trial.fixtures.conditioning(ROWS)
    with new.codec.computing(autocast=torch.bfloat16):
        if not equal(trial.reconstruct(new, cond), trial.reconstruct(new, None)):
            raise RuleViolation("with autocast to bfloat16, the new strategy is not the identity")
    moved = perturbed(trial.model(), seed=0)
    half = cond.to(cond.speaker.bfloat16())
    probes = trial.probes(moved)
    moved.strategies.bfloat16()
    for probe in probes:
        out = probe.edit(probe.x.bfloat16(), half)
        if not out.isfinite().all():
            raise RuleViolation(f"NaN or infinity at tap {probe.edit.tap.name!r} in bfloat16")
    return "keeps type, stays finite, and is the identity when new" if trial.edited_taps else NOT_APPLICABLE


def _device(trial: StrategyTrial) -> str:
    if not torch.cuda.is_available():
        return "no accelerator here"
    model = copy.deepcopy(trial.model()).cuda()
    cond = trial.fixtures.conditioning(ROWS)
    cond = cond.to(cond.speaker.cuda())
    with model.codec.fixed_noise(NOISE):
        bare = model.reconstruct(trial.fixtures.audio.cuda())
        if not equal(model.reconstruct(trial.fixtures.audio.cuda(), cond), bare):
            raise RuleViolation("on the accelerator the new strategy is not the identity")
    return f"works on {torch.cuda.get_device_name()}"


def _save_and_load(trial: StrategyTrial) -> str:
    moved = perturbed(trial.model(), seed=0)
    cond = trial.fixtures.conditioning(ROWS)
    with tempfile.TemporaryDirectory() as folder:
        moved.save_pretrained(folder)
        size = (Path(folder) / "model.safetensors").stat().st_size
        loaded = ConditionedCodec.from_pretrained(folder, codec=trial.codec, plugins=trial.offering())
    if not equal(trial.reconstruct(loaded, cond), trial.reconstruct(moved, cond)):
        raise RuleViolation("the loaded strategy gives other output than the saved one")
    return f"{size:,} bytes, same output"


def _deepcopy(trial: StrategyTrial) -> str:
    cond = trial.fixtures.conditioning(ROWS)
    original = perturbed(trial.model(), seed=0)
    expected = trial.reconstruct(original, cond)
    twin = copy.deepcopy(original)
    with twin.codec.fixed_noise(NOISE):
        if not equal(twin.reconstruct(trial.fixtures.audio, cond), expected):
            raise RuleViolation("a deep copy gives other output")
    with torch.no_grad():
        for parameter in twin.strategies.parameters():
            parameter.add_(1.0)
    if not equal(trial.reconstruct(original, cond), expected):
        raise RuleViolation("changing a deep copy changes the original")
    return "same output, nothing shared"


def _composition(trial: StrategyTrial) -> str:
    cond = trial.fixtures.conditioning(ROWS)
    bare = trial.reconstruct(trial.model(), None)
    partners = []
    for name in trial.catalogue.strategies:
        other = trial.catalogue.strategies[name]
        if name == trial.cls.name or not {"before_vq", "after_vq"} & set(hooks_of(other)):
            continue
        for first in (True, False):
            model = trial.model([other], first=first)
            if not equal(trial.reconstruct(model, cond), bare):
                raise RuleViolation(f"{' + '.join(model.strategies)}, both new, is not the identity")
            out = trial.reconstruct(perturbed(model, seed=0), cond)
            if not out.audio.isfinite().all():
                raise RuleViolation(f"{' + '.join(model.strategies)}, perturbed, gives NaN or infinity")
        partners.append(name)
    return f"in both orders with {', '.join(partners)}" if partners else "no other adapter is registered"


def equal(a: Reconstruction, b: Reconstruction) -> bool:
    pairs: list[tuple[Tensor, Tensor]] = [(a.audio, b.audio), (a.z, b.z), *zip(a.codes, b.codes, strict=True)]
    return all(torch.equal(one, other) for one, other in pairs)


BEHAVIOUR: list[Rule[StrategyTrial]] = [
    Rule(
        "shapes",
        _shapes,
        "return a tensor of the input's shape and type from every edit, for every number of rows and frames",
        gate=True,
    ),
    Rule(
        "identity at initialisation",
        _identity,
        "make a new strategy do exactly nothing: zero the last layer, write a scale as 1 + g with g = 0",
    ),
    Rule("finite", _finite, "guard logarithms, roots and divisions: clamp their arguments away from zero"),
    Rule(
        "input untouched", _input, "edit out of place (x = x + ...): other arms share the activation that you are given"
    ),
    Rule(
        "batch independence",
        _rows,
        "compute each item from itself alone: no statistic, softmax or batch norm over the batch dimension",
    ),
    Rule("embedding has an effect", _effect, "use cond.speaker in the edit"),
    Rule(
        "save and load",
        _save_and_load,
        "keep all state in parameters, buffers and config",
    ),
    Rule("deepcopy", _deepcopy, "hold no reference to self in closures, lambdas or class attributes"),
    Rule("composition", _composition, "act on x alone: another strategy may have edited it before, or will after"),
    Rule(
        "bfloat16",
        _bfloat16,
        "keep x's type: make constants with x.new_tensor or .to(x), and cast what comes back; compare what is nearly "
        "equal in float32, inside torch.autocast(x.device.type, enabled=False)",
    ),
    Rule("device", _device, "make tensors on x.device, and keep constants in buffers"),
]


def _global_state(trial: StrategyTrial) -> str:
    cond = trial.fixtures.conditioning(ROWS)
    first = perturbed(trial.model(), seed=0)
    before = trial.reconstruct(first, cond)
    second = trial.model()
    with torch.no_grad():
        for parameter in second.strategies.parameters():
            parameter.add_(1.0)
    trial.reconstruct(second, cond)
    if not equal(trial.reconstruct(first, cond), before):
        raise RuleViolation(
            "two instances share state: running one changes the output of the other, or one alone is not deterministic"
        )
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        trial.cls(trial.cls.Config(), trial.taps)
        trial.reconstruct(first.train(), cond)
        model = trial.training_model()
        trial.total(model, trial.fixtures.step(model))
        states.append((float(torch.rand(())), random.random(), float(np.random.rand())))
    for library, one, other in zip(("torch", "random", "numpy"), *states, strict=True):
        if one == other:
            raise RuleViolation(
                f"it reseeds the global random numbers of {library}",
                "draw from snac_core.seeding.generator(...) instead",
            )
    return "two instances share no state; global random numbers are not reseeded"


def _settings(trial: StrategyTrial) -> str:
    """Build the strategy and run every hook once; later rules report all errors except a changed setting."""
    before = torch_settings()
    try:
        trial.cls(trial.cls.Config(), trial.taps)
        model = trial.training_model()
        step = trial.fixtures.step(model)
        for hook in ("loss", "discriminator_loss"):
            trial.terms(model, step, hook)
        trial.total(model, step)
    except TorchSettingChanged as error:
        raise RuleViolation(str(error)) from error
    except Exception:  # whatever else is wrong has a rule of its own
        return "left alone, as far as it ran"
    if changed := restore_settings(before):
        raise RuleViolation(f"it changes torch's {changed[0]}")
    return "left alone by __init__ and every hook"


SETTINGS: Rule[StrategyTrial] = Rule(
    "global settings",
    _settings,
    "leave torch's settings alone, everything else shares them: for random numbers, draw from "
    "snac_core.seeding.generator(...); for types, say dtype=...; for no gradient, `with torch.no_grad():`",
    gate=True,
)
ISOLATION: list[Rule[StrategyTrial]] = [
    Rule("no global state", _global_state, "keep state on the instance, not on the class, the module or torch"),
]


def _compiles(trial: StrategyTrial) -> str:
    probes = trial.probes(perturbed(trial.model(), seed=0))
    for probe in probes:

        def run(x: Tensor, speaker: Tensor, edit: object = probe.edit, cond: Conditioning = probe.cond) -> Tensor:
            edited: Tensor = edit(x, replace(cond, speaker=speaker))  # type: ignore[operator]
            return edited

        torch._dynamo.reset()
        compiled = torch.compile(run, backend="aot_eager")(probe.x, probe.cond.speaker)
        if (apart := distance(compiled, run(probe.x, probe.cond.speaker))) > ROUNDING:
            raise RuleViolation(f"compiled, the edit at {probe.edit.tap.name!r} differs by {apart:.2g} of its range")
    return f"{len(probes)} edits agree"


COMPILING: list[Rule[StrategyTrial]] = [
    Rule("torch.compile", _compiles, "keep Python side effects and data-dependent branches out of the edits"),
]


CUT = "let the loss depend on it through tensors: no integer codes, .detach(), torch.no_grad() or .item() on the way"
STEPS = 2


def _losses(trial: StrategyTrial) -> str:
    if "loss" not in trial.hooks:
        if trial.cls.default_weights:
            raise RuleViolation(f"default_weights names {sorted(trial.cls.default_weights)[0]!r}, but there is no loss")
        return "no loss of its own"
    fresh = trial.training_model()
    for state, model in (("new", fresh), ("perturbed", perturbed(fresh, seed=0))):
        terms = trial.terms(model, trial.fixtures.step(model))
        for name, term in terms.items():
            if not term.isfinite():
                raise RuleViolation(f"term {name!r} of the {state} model is {float(term)}")
            reached = [s for s, table in gradients(model, term).items() if any(g is not None for g in table.values())]
            if not reached:
                raise RuleViolation(f"no gradient of term {name!r} reaches a strategy", CUT)
    for name in trial.cls.default_weights:
        if name not in terms:
            raise RuleViolation(f"default_weights names {name!r}, which is not a term of loss{nearest(name, terms)}")
    return f"{', '.join(f'{trial.cls.name}/{name}' for name in terms) or 'no terms'}: finite scalars with gradient"


def _gradient(trial: StrategyTrial) -> str:
    model = trial.training_model()
    if not any(True for _ in model.attached[trial.cls.name].adapted_parameters()):
        if trial.edited_taps:
            raise RuleViolation("it edits the signal and has no parameters", "give it something to learn")
        return "no parameters"
    table = gradients(model, trial.total(model, trial.fixtures.step(model)))[trial.cls.name]
    moving = [name for name, grad in table.items() if flows(grad)]
    if not moving:
        raise RuleViolation(
            f"at initialisation none of its {len(table)} parameters gets a gradient",
            f"zero one layer, not two in a row, and {CUT}",
        )
    return f"{len(moving)} of {len(table)} parameters move at the first step"


def _every_gradient(trial: StrategyTrial) -> str:
    model = perturbed(trial.training_model(), seed=0)
    table = gradients(model, trial.total(model, trial.fixtures.step(model)))[trial.cls.name]
    for name, grad in table.items():
        if grad is not None and not grad.isfinite().all():
            raise RuleViolation(
                f"the gradient of {name!r} is not finite after all parameters were perturbed",
                "guard logarithms, roots and divisions: clamp their arguments away from zero",
            )
        if not flows(grad):
            raise RuleViolation(
                f"after all parameters were perturbed, {name!r} gets no gradient", f"use {name!r}, or remove it; {CUT}"
            )
    return f"all {len(table)} parameters" if table else "no parameters"


def _discriminator(trial: StrategyTrial) -> str:
    model = perturbed(trial.training_model(), seed=0)  # before that, real and converted are one and cancel each other
    discriminator = [parameter for _, parameter in model.discriminator_parameters()]
    if "discriminator_loss" not in trial.hooks:
        if discriminator:
            raise RuleViolation("self.discriminator has parameters, but there is no discriminator_loss to train them")
        return "no discriminator"
    if not discriminator:
        raise RuleViolation("discriminator_loss has no parameters under self.discriminator to train")
    terms = trial.terms(model, trial.fixtures.step(model), "discriminator_loss")
    total = torch.stack(list(terms.values())).sum()
    if not total.requires_grad or not any(
        flows(grad) for grad in torch.autograd.grad(total, discriminator, allow_unused=True, retain_graph=True)
    ):
        raise RuleViolation("no gradient of discriminator_loss reaches self.discriminator", CUT)
    for strategy, table in gradients(model, total).items():
        for name, grad in table.items():
            if flows(grad):
                raise RuleViolation(
                    f"discriminator_loss moves {strategy}.{name}",
                    "detach the input of the discriminator in discriminator_loss",
                )
    return f"{', '.join(terms)}: for {sum(p.numel() for p in discriminator):,} parameters of the discriminator alone"


def _base(trial: StrategyTrial) -> str:
    audio, codec = trial.fixtures.audio, trial.codec
    model = trial.training_model()
    with codec.fixed_noise(NOISE):
        before = codec(audio)[0]
    if owned := owned_base_tensors(model):
        raise RuleViolation(
            f"it holds the base's parameters as its own: {owned[0]}", "keep no reference to the codec in a strategy"
        )
    _train(trial, model)
    if changed := trial.base.changed():
        raise RuleViolation(f"{len(changed)} tensors of the base changed, e.g. {changed[0]!r}")
    if codec.training or any(module.training for module in codec.modules()):
        raise RuleViolation("the base is in train mode")
    with codec.fixed_noise(NOISE):
        after, bare = codec(audio)[0], model.reconstruct(audio).audio
    if not (torch.equal(before, after) and torch.equal(bare, after)):
        raise RuleViolation("after training, the codec without an embedding gives other audio than before")
    return f"bit-equal after attaching and {STEPS} steps, and without an embedding the output too"


def _train(trial: StrategyTrial, model: ConditionedCodec) -> None:
    """A few training steps; the sign of the gradient is the first step of Adam."""
    trained = [parameter for _, parameter in model.trained_parameters()]
    discriminators = [parameter for _, parameter in model.discriminator_parameters()]
    turns: list[tuple[list[nn.Parameter], Callable[[ConditionedCodec, Step], Tensor | None]]]
    turns = [(trained, trial.total), (discriminators, partial(_discriminator_total, trial))]
    for index in range(1, STEPS + 1):
        for parameters, total_of in turns:
            total = total_of(model, trial.fixtures.step(model, index))
            if parameters and total is not None and total.requires_grad:
                grads = torch.autograd.grad(total, parameters, allow_unused=True)
                with torch.no_grad():
                    for parameter, grad in zip(parameters, grads, strict=True):
                        if grad is not None:
                            parameter.sub_(1e-2 * grad.sign())
    model.train()


def _discriminator_total(trial: StrategyTrial, model: ConditionedCodec, step: Step) -> Tensor | None:
    terms = trial.terms(model, step, "discriminator_loss") if "discriminator_loss" in trial.hooks else {}
    return torch.stack(list(terms.values())).sum() if terms else None


TRAINING: list[Rule[StrategyTrial]] = [
    Rule(
        "loss terms", _losses, "return finite scalar tensors that depend on the output, by the names in default_weights"
    ),
    Rule("gradient at initialisation", _gradient, CUT),
    Rule("gradient of every parameter", _every_gradient, CUT),
    Rule(
        "discriminator",
        _discriminator,
        "train what is under self.discriminator in discriminator_loss, on detached outputs",
    ),
    Rule(
        "base untouched",
        _base,
        "never write to the codec, through step.model, context.model or a reference of your own",
    ),
]
