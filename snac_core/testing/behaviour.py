"""Rules about what a strategy does to the signal."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from snac_core.bare import BarePass
from snac_core.conditioned import ConditionedCodec, Reconstruction
from snac_core.conditioning import Conditioning
from snac_core.testing.probes import ROUNDING, SAME, distance, edits_of, perturbed
from snac_core.testing.results import Broken, Rule
from snac_core.testing.surroundings import ROWS
from snac_core.testing.trial import NOISE, StrategyTrial, hooks_of

NOT_APPLICABLE = "not applicable: it edits nothing"


def _shapes(trial: StrategyTrial) -> str:
    if not trial.places:
        return NOT_APPLICABLE
    model, codec = trial.model(), trial.codec
    hop = codec.preprocess(torch.zeros(1, 1, 1)).shape[-1]
    for rows, samples in ((1, 1), (2, hop), (3, 5 * hop + 1)):
        for cond in (trial.surroundings.conditioning(rows), trial.surroundings.conditioning(1)):
            out = model.reconstruct(torch.zeros(rows, 1, samples), cond)
            if out.audio.shape != (rows, 1, samples):
                raise Broken(f"audio {(rows, 1, samples)} became {tuple(out.audio.shape)}")
    return f"kept at {', '.join(trial.places)} for 1 to 3 rows and 1 to {5 * hop + 1} samples"


def _identity(trial: StrategyTrial) -> str:
    model = trial.model()
    bare = trial.reconstruct(model, None)
    taps = BarePass(trial.codec, trial.surroundings.audio)
    for mode in (True, False):
        model.train(mode)
        for first in (0, 3):
            cond = trial.surroundings.conditioning(ROWS, first)
            with trial.codec.fixed_noise(NOISE):
                for edit in edits_of(model, trial.cls.name):
                    x = taps.at(edit.tap.name)
                    if not torch.equal(edited := edit(x.clone(), cond), x):
                        raise Broken(
                            f"the new strategy changes tap {edit.tap.name!r} by {distance(edited, x):.2g} of its range"
                            + (" in train mode" if mode else "")
                        )
            if not equal(trial.reconstruct(model, cond), bare):
                raise Broken("output of the new strategy differs from the bare codec's")
    return "output equals the bare codec's, bit for bit" if trial.places else NOT_APPLICABLE


def _input(trial: StrategyTrial) -> str:
    for probe in trial.probes(perturbed(trial.model(), seed=0)):
        if probe.overwrites_its_input():
            raise Broken(f"the edit at tap {probe.edit.tap.name!r} writes into its input")
    return "left as it was" if trial.places else NOT_APPLICABLE


def _rows(trial: StrategyTrial) -> str:
    worst = 0.0
    moved = perturbed(trial.model(), seed=0)
    for probe in trial.probes(moved):
        place = f"tap {probe.edit.tap.name!r}"
        for mode in (True, False):
            moved.train(mode)
            if (leak := probe.leak()) > SAME:
                raise Broken(
                    f"at {place} an item's output moves by {leak:.2g} of its range when the other items change"
                    + (" (in train mode)" if mode else "")
                )
        if (apart := probe.alone()) > ROUNDING:
            raise Broken(f"at {place} an item alone differs by {apart:.2g} of its range from the same item in a batch")
        worst = max(worst, apart)
    return f"an item alone differs by at most {worst:.1g}" if trial.places else NOT_APPLICABLE


def _effect(trial: StrategyTrial) -> str:
    if not trial.places:
        return NOT_APPLICABLE
    moved = perturbed(trial.model(), seed=0)
    effects = {probe.edit.tap.name: probe.effect() for probe in trial.probes(moved)}
    if max(effects.values()) <= SAME:
        raise Broken("after all parameters were perturbed, another speaker embedding gives the same output")
    before, after = (trial.reconstruct(moved, trial.surroundings.conditioning(ROWS, first)) for first in (0, 3))
    changed = torch.cat([(a != b).flatten() for a, b in zip(before.codes, after.codes, strict=True)]).float().mean()
    return (
        f"another embedding moves {max(effects, key=effects.__getitem__)} by {max(effects.values()):.2g} of its range"
        + (f", and {100 * float(changed):.0f} % of the codes" if changed else "")
    )


def _finite(trial: StrategyTrial) -> str:
    for state, model in (("new", trial.model()), ("perturbed", perturbed(trial.model(), seed=0))):
        for what, audio in (("sound", trial.surroundings.audio), ("silence", torch.zeros(ROWS, 1, 1000))):
            out = model.reconstruct(audio, trial.surroundings.conditioning(ROWS))
            if not (out.audio.isfinite().all() and out.z.isfinite().all()):
                raise Broken(f"the {state} strategy makes NaN or infinity of {what}")
    return "new and perturbed, on sound and silence"


def _bfloat16(trial: StrategyTrial) -> str:
    moved = perturbed(trial.model(), seed=0)
    cond = trial.surroundings.conditioning(ROWS)
    half = Conditioning(cond.speaker.bfloat16())
    probes = trial.probes(moved)
    moved.strategies.bfloat16()
    for probe in probes:
        out = probe.edit(probe.x.bfloat16(), half)
        if not out.isfinite().all():
            raise Broken(f"NaN or infinity at tap {probe.edit.tap.name!r} in bfloat16")
    return "keeps type and stays finite" if trial.places else NOT_APPLICABLE


def _device(trial: StrategyTrial) -> str:
    if not torch.cuda.is_available():
        return "no accelerator here"
    model = copy.deepcopy(trial.model()).cuda()
    cond = Conditioning(trial.surroundings.conditioning(ROWS).speaker.cuda())
    with model.codec.fixed_noise(NOISE):
        bare = model.reconstruct(trial.surroundings.audio.cuda())
        if not equal(model.reconstruct(trial.surroundings.audio.cuda(), cond), bare):
            raise Broken("on the accelerator the new strategy is not the identity")
    return f"works on {torch.cuda.get_device_name()}"


def _save_and_load(trial: StrategyTrial) -> str:
    moved = perturbed(trial.model(), seed=0)
    cond = trial.surroundings.conditioning(ROWS)
    with tempfile.TemporaryDirectory() as folder:
        moved.save_pretrained(folder)
        size = (Path(folder) / "model.safetensors").stat().st_size
        loaded = ConditionedCodec.from_pretrained(folder, codec=trial.codec, plugins=trial.offering())
    if not equal(trial.reconstruct(loaded, cond), trial.reconstruct(moved, cond)):
        raise Broken("the loaded strategy gives other output than the saved one")
    return f"{size:,} bytes, same output"


def _deepcopy(trial: StrategyTrial) -> str:
    cond = trial.surroundings.conditioning(ROWS)
    original = perturbed(trial.model(), seed=0)
    expected = trial.reconstruct(original, cond)
    twin = copy.deepcopy(original)
    with twin.codec.fixed_noise(NOISE):
        if not equal(twin.reconstruct(trial.surroundings.audio, cond), expected):
            raise Broken("a deep copy gives other output")
    with torch.no_grad():
        for parameter in twin.strategies.parameters():
            parameter.add_(1.0)
    if not equal(trial.reconstruct(original, cond), expected):
        raise Broken("changing a deep copy changes the original")
    return "same output, nothing shared"


def _composition(trial: StrategyTrial) -> str:
    cond = trial.surroundings.conditioning(ROWS)
    bare = trial.reconstruct(trial.model(), None)
    partners = []
    for name in trial.catalogue.strategies:
        other = trial.catalogue.strategies[name]
        if name == trial.cls.name or not {"before_vq", "after_vq"} & set(hooks_of(other)):
            continue
        for first in (True, False):
            model = trial.model([other], first=first)
            if not equal(trial.reconstruct(model, cond), bare):
                raise Broken(f"{' + '.join(model.strategies)}, both new, is not the identity")
            out = trial.reconstruct(perturbed(model, seed=0), cond)
            if not out.audio.isfinite().all():
                raise Broken(f"{' + '.join(model.strategies)}, perturbed, gives NaN or infinity")
        partners.append(name)
    return f"in both orders with {', '.join(partners)}" if partners else "no other placement is registered"


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
    Rule("bfloat16", _bfloat16, "keep x's type: make constants with x.new_tensor or .to(x), and cast what comes back"),
    Rule("device", _device, "make tensors on x.device, and keep constants in buffers"),
]
