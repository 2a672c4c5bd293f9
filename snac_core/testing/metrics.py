"""`check_metric`: the rules on one metric."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from snac_core.metric import OUTPUTS, Conversion, Metric
from snac_core.seeding import generator
from snac_core.testing.fixtures import speech_like
from snac_core.testing.results import Rule, RuleResult, RuleViolation, isolated_random_state, run_rules

RATE = 16000


def check_metric(cls: type[Metric]) -> list[RuleResult]:
    """Run the conformance rules on a metric class; one result per rule, up to a failed rule that others depend on."""
    with isolated_random_state(seed=0):
        trial = MetricTrial(cls)
    return list(run_rules(trial, RULES))


class MetricTrial:
    """A metric class under test, and a conversion of 1.5 s."""

    def __init__(self, cls: type[Metric]) -> None:
        self.cls = cls
        source, converted, identity, other, synthetic = speech_like(RATE, 1.5, rows=5)[:, 0]
        numbers = generator("metric trial")

        def vectors(*names: str) -> dict[str, Tensor]:
            return {name: F.normalize(torch.randn(16, generator=numbers), dim=0) for name in names}

        self.conversion = Conversion(
            "utterance-to-speaker",
            RATE,
            source,
            converted,
            identity=identity,
            other=other,
            synthetic=synthetic,
            embeddings=vectors(*OUTPUTS, "degraded"),
            references=vectors("source", "target"),
            speaker_encoder_embeddings=vectors(*OUTPUTS),
            speaker_encoder_references=vectors("source", "target"),
            target=source.flip(0),
            parallel=source.roll(RATE // 10),
            target_speaker="b",
            candidates=vectors("a", "b"),
            text="the boat sank near the shore",
        )

    def value(self, conversion: Conversion | None = None) -> float | None:
        """The value of a new instance for a conversion, with its type checked."""
        value: Any = self.cls()(conversion or self.conversion)
        if value is None:
            return None
        if isinstance(value, Tensor) or not isinstance(value, int | float):
            raise RuleViolation(
                f"it returned {type(value).__name__}", "return a float, or None where it does not apply"
            )
        if not math.isfinite(value):
            raise RuleViolation(
                f"it returned {value}", "raise where the tool fails; return None where it does not apply"
            )
        return float(value)


def _declaration(trial: MetricTrial) -> str:
    cls = trial.cls
    if not (isinstance(cls, type) and issubclass(cls, Metric)):
        raise RuleViolation(f"{cls!r} is not a subclass of Metric", "derive the class from snac_core.Metric")
    if not cls.name.isidentifier():
        raise RuleViolation(f"name = {cls.name!r}", "choose a name of letters, digits and underscores")
    if cls.direction not in ("up", "down"):
        raise RuleViolation(f"direction = {cls.direction!r}", "say which is better: 'up' or 'down'")
    if isinstance(cls.requires, str) or not all(isinstance(name, str) for name in cls.requires):
        raise RuleViolation(f"requires = {cls.requires!r}", "list importable packages: requires = ('package',)")
    if isinstance(cls.outputs, str) or not cls.outputs or not set(cls.outputs) <= set(OUTPUTS):
        raise RuleViolation(f"outputs = {cls.outputs!r}", f"list what it judges, of {', '.join(OUTPUTS)}")
    known = [field.name for field in fields(Conversion)]
    if isinstance(cls.references, str) or not set(cls.references) <= set(known):
        raise RuleViolation(f"references = {cls.references!r}", f"list attributes of Conversion: {', '.join(known)}")
    if not isinstance(cls.unit, str):
        raise RuleViolation(f"unit = {cls.unit!r}", "give the unit as a string; '' for a pure number")
    if cls.role not in ("", "content", "naturalness", "speaker"):
        raise RuleViolation(
            f"role = {cls.role!r}",
            "leave it empty, or say 'content' for an error rate of what is said, 'naturalness' for an opinion score, "
            "'speaker' for a similarity to the target by a further judge",
        )
    if cls.role in ("naturalness", "speaker") and cls.direction != "up":
        raise RuleViolation(f"role {cls.role!r} with direction 'down'", "an opinion score or a similarity is better up")
    if cls.role == "content" and not (cls.direction == "down" and cls.margin > 0):
        raise RuleViolation(f"role {cls.role!r} with direction {cls.direction!r} and margin {cls.margin!r}",
                     "a primary measure of content is an error rate, 'down', with a margin above 0")  # fmt: skip
    return f"{cls.name}{f' in {cls.unit}' if cls.unit else ''}, better {cls.direction}"


def _requires(trial: MetricTrial) -> str:
    missing = [name for name in trial.cls.requires if importlib.util.find_spec(name) is None]
    if missing:
        raise RuleViolation(
            f"needs {', '.join(missing)}, which is not installed", f"install {' '.join(missing)} to check it"
        )
    return ", ".join(trial.cls.requires) or "nothing"


def _value(trial: MetricTrial) -> str:
    value = trial.value()
    return "None: does not apply" if value is None else f"{value:.4g} {trial.cls.unit}".rstrip()


def _repeatable(trial: MetricTrial) -> str:
    states, values = [], []
    for seed in (1, 2):
        torch.manual_seed(seed)
        values.append(trial.value())
        states.append(torch.get_rng_state())
    if values[0] != values[1]:
        raise RuleViolation(f"two calls gave {values[0]} and {values[1]}")
    if torch.equal(*states):
        raise RuleViolation("it reseeds the global random numbers")
    return "two calls agree"


def _input(trial: MetricTrial) -> str:
    def tensors() -> list[Tensor]:
        values = [getattr(trial.conversion, field.name) for field in fields(Conversion)]
        flat = [v for value in values for v in (value.values() if isinstance(value, dict) else [value])]
        return [value for value in flat if isinstance(value, Tensor)]

    before = [tensor.clone() for tensor in tensors()]
    trial.value()
    if not all(torch.equal(a, b) for a, b in zip(before, tensors(), strict=True)):
        raise RuleViolation("it writes into the conversion that it measures")
    return "left as it was"


def _partial(trial: MetricTrial) -> str:
    given = trial.conversion
    cases = {
        "the converted output alone": replace(given, identity=None, other=None, synthetic=None),
        "no text": replace(given, text=None),
        "no parallel recording": replace(given, parallel=None),
        "no conditioning encoder": replace(given, speaker_encoder_embeddings={}, speaker_encoder_references={}),
    }
    said = {what: trial.value(conversion) for what, conversion in cases.items()}
    return "; ".join(f"{what}: {'None' if value is None else 'a value'}" for what, value in said.items())


RULES: list[Rule[MetricTrial]] = [
    Rule("declaration", _declaration, "set name, unit and direction in the class", gate=True),
    Rule("requires", _requires, "name importable packages in requires", gate=True),
    Rule("value", _value, "return a float, or None where it does not apply", gate=True),
    Rule("input untouched", _input, "work on a copy: other metrics see the same conversion"),
    Rule("repeatable", _repeatable, "draw random numbers from snac_core.seeding.generator(...)"),
    Rule("partial conversions", _partial, "return None where what it needs is None or missing"),
]
