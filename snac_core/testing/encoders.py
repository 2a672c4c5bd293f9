"""`check_speaker_encoder`: the rules on one speaker encoder."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch

from snac_core.errors import UserError
from snac_core.speakers.encoder import SpeakerEncoder
from snac_core.testing.fixtures import speech_like
from snac_core.testing.probes import ROUNDING, distance, flows
from snac_core.testing.results import Rule, RuleResult, RuleViolation, isolated_random_state, run_rules

SECONDS = 1.7
RATE = 16000


def check_speaker_encoder(cls: type[SpeakerEncoder], *, weights: Any = None) -> list[RuleResult]:
    """Run the conformance rules on a speaker encoder class.

    Args:
        cls: the class.
        weights: file for its constructor; None: its default weights.

    Returns:
        one result per rule, in order; they end after a failed rule that later rules depend on.
    """
    with isolated_random_state(seed=0):
        trial = EncoderTrial(cls, weights)
    return list(run_rules(trial, RULES))


class EncoderTrial:
    """An encoder class under test, one instance of it, and audio (3, 1, T) of three voices."""

    def __init__(self, cls: type[SpeakerEncoder], weights: Any) -> None:
        self.cls = cls
        self.weights = weights
        self.audio = speech_like(RATE, SECONDS, rows=3)

    @cached_property
    def encoder(self) -> SpeakerEncoder:
        """The instance that the rules share."""
        return self.new()

    def new(self) -> SpeakerEncoder:
        """Another instance."""
        kind: Any = self.cls
        encoder: SpeakerEncoder = kind(self.weights)
        return encoder


def _declaration(trial: EncoderTrial) -> str:
    cls = trial.cls
    if not (isinstance(cls, type) and issubclass(cls, SpeakerEncoder)):
        raise RuleViolation(
            f"{cls!r} is not a subclass of SpeakerEncoder", "derive the class from snac_core.SpeakerEncoder"
        )
    for attribute in ("name", "family", "training_data"):
        value = getattr(cls, attribute, None)
        if not isinstance(value, str) or not value:
            raise RuleViolation(f"{attribute} = {value!r}", f"set {attribute} in the class, as a string")
    if not cls.name.isidentifier():
        raise RuleViolation(f"name = {cls.name!r}", "choose a name of letters, digits and underscores")
    return f"{cls.name}, family {cls.family}, trained on {cls.training_data}"


def _builds(trial: EncoderTrial) -> str:
    encoder = trial.encoder
    for attribute in ("dim", "sample_rate"):
        value = getattr(encoder, attribute, None)
        if not isinstance(value, int) or value < 1:
            raise RuleViolation(
                f"{attribute} = {value!r}", f"set self.{attribute} in __init__, a positive whole number"
            )
    return f"{encoder.dim}-d at {encoder.sample_rate} Hz"


def _output(trial: EncoderTrial) -> str:
    out = trial.encoder(trial.audio, RATE).detach()
    if out.shape != (3, trial.encoder.dim):
        raise RuleViolation(f"(3, 1, T) became {tuple(out.shape)}; expected {(3, trial.encoder.dim)}")
    if not out.isfinite().all():
        raise RuleViolation("the embedding has NaN or infinity")
    if (off := float((out.norm(dim=1) - 1).abs().max())) > 1e-4:
        raise RuleViolation(f"norms are off 1 by {off:.2g}", "leave forward to the base class, write embed")
    if distance(out[0], out[1]) < ROUNDING:
        raise RuleViolation("two different voices have the same embedding")
    for quiet in (torch.zeros(1, 1, RATE), 1e-4 * trial.audio[:1]):
        if not trial.encoder(quiet, RATE).isfinite().all():
            raise RuleViolation("silence or very quiet audio gives NaN", "guard logarithms and divisions by a floor")
    return "unit vectors, finite for silence too"


def _gradient(trial: EncoderTrial) -> str:
    audio = trial.audio.clone().requires_grad_(True)
    out = trial.encoder(audio, RATE)
    mixed = (out * torch.randn(out.shape)).sum()
    grad = torch.autograd.grad(mixed, audio, allow_unused=True)[0] if mixed.requires_grad else None
    if grad is None or not flows(grad):
        raise RuleViolation("no gradient reaches the audio")
    if not grad.isfinite().all():
        raise RuleViolation("the gradient in the audio is not finite", "guard logarithms and roots by a floor")
    return "reaches the audio"


def _frozen(trial: EncoderTrial) -> str:
    encoder = trial.encoder
    if any(parameter.requires_grad for parameter in encoder.parameters()):
        raise RuleViolation("its parameters ask for gradients")
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    encoder.train()
    if any(module.training for module in encoder.modules()):
        raise RuleViolation("train() puts it in train mode", "leave train() to the base class")
    encoder(trial.audio, RATE)
    for key, value in encoder.state_dict().items():
        if not torch.equal(value, before[key]):
            raise RuleViolation(f"{key!r} changes when it runs")
    return "weights and statistics stay, whatever train() is called on"


def _repeatable(trial: EncoderTrial) -> str:
    outputs, states, digests = [], [], set()
    for seed in (1, 2):
        torch.manual_seed(seed)
        encoder = trial.new()
        outputs.append(encoder(trial.audio, RATE))
        states.append(torch.get_rng_state())
        digests.add(encoder.digest)
    if not torch.equal(*outputs) or len(digests) != 1:
        raise RuleViolation("two instances disagree: its weights depend on the global random numbers")
    if torch.equal(*states):
        raise RuleViolation("it reseeds the global random numbers", "wrap the seeding in torch.random.fork_rng")
    if not torch.equal(trial.encoder(trial.audio, RATE), outputs[0]):
        raise RuleViolation("it does not repeat itself")
    return f"digest {digests.pop()[:12]}"


def _rows(trial: EncoderTrial) -> str:
    together = trial.encoder(trial.audio, RATE)
    alone = torch.cat([trial.encoder(row.unsqueeze(0), RATE) for row in trial.audio])
    if (apart := distance(together, alone)) > 10 * ROUNDING:
        raise RuleViolation(f"an item alone differs by {apart:.2g} from the same item in a batch")
    return f"an item alone differs by at most {apart:.1g}"


def _bad_input(trial: EncoderTrial) -> str:
    encoder, audio = trial.encoder, trial.audio
    short = int(encoder.min_seconds * RATE) - 1
    for what, given in (
        ("stereo audio", (audio.expand(3, 2, -1), RATE)),
        ("audio (B, T)", (audio[:, 0], RATE)),
        ("integer audio", ((audio * 1000).short(), RATE)),
        ("a sample rate of 0", (audio, 0)),
        (f"{short} samples", (audio[..., :short], RATE)),
    ):
        try:
            encoder(*given)
        except UserError:
            continue
        raise RuleViolation(f"it accepts {what}")
    shortest = audio[..., : int(encoder.min_seconds * RATE) + 1]
    if not encoder(shortest, RATE).isfinite().all():
        raise RuleViolation(f"audio of min_seconds = {encoder.min_seconds} gives NaN", "raise min_seconds")
    return f"refused; from {encoder.min_seconds} s on it works"


RULES: list[Rule[EncoderTrial]] = [
    Rule("declaration", _declaration, "set name, family and training_data in the class", gate=True),
    Rule("builds", _builds, "make __init__(self, weights=None) work, and end it with self.freeze()", gate=True),
    Rule("frozen", _frozen, "end __init__ with self.freeze(), and keep running statistics out of embed"),
    Rule("output", _output, "return (B, dim) from embed", gate=True),
    Rule("gradient", _gradient, "compute features with torch, without no_grad, detach or numpy"),
    Rule("repeatable", _repeatable, "load weights, or draw them under fork_rng from a seed of their own"),
    Rule("batch independence", _rows, "compute each item from itself alone"),
    Rule("bad input", _bad_input, "leave forward to the base class, which checks its input; write embed"),
]
