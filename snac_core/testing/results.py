"""Rules, what running them gives, and the state of torch that running them leaves alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from snac_core.errors import UserError
from snac_core.plugin_guard import restore_settings, torch_settings

Subject = TypeVar("Subject")


@dataclass(frozen=True)
class RuleResult:
    """One rule on one plugin.

    Attributes:
        rule: name of the rule.
        passed: whether it holds.
        measured: what was seen, in one line.
        advice: what the author should change; empty where the rule holds.
    """

    rule: str
    passed: bool
    measured: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{'ok  ' if self.passed else 'FAIL'} {self.rule}: {self.measured}" + (
            f"; {self.advice}" if self.advice else ""
        )


@dataclass(frozen=True)
class Rule(Generic[Subject]):
    """A check of a subject: returns what it measured, raises `RuleViolation` (or anything else) where the rule does not hold.

    Attributes:
        name: of the rule.
        check: the measurement.
        advice: what to change, unless `RuleViolation` brings better advice.
        gate: whether the rules after it make no sense where it fails.
    """

    name: str
    check: Callable[[Subject], str]
    advice: str
    gate: bool = False


class RuleViolation(Exception):
    """A rule that does not hold: what was measured, and what to change."""

    def __init__(self, measured: str, advice: str = "") -> None:
        super().__init__(measured)
        self.measured = measured
        self.advice = advice


def run_rules(subject: Subject, rules: Sequence[Rule[Subject]]) -> Iterator[RuleResult]:
    """Each rule in order, from the same random state; ends after a failed gate."""
    for rule in rules:
        with isolated_random_state(seed=0):
            result = _run(subject, rule)
        yield result
        if rule.gate and not result.passed:
            break


def _run(subject: Subject, rule: Rule[Subject]) -> RuleResult:
    try:
        return RuleResult(rule.name, True, rule.check(subject))
    except RuleViolation as broken:
        return RuleResult(rule.name, False, broken.measured, broken.advice or rule.advice)
    except UserError as error:
        return RuleResult(rule.name, False, _one_line(error), rule.advice)
    except Exception as error:  # the plugin's own code: whatever it raises is what the rule measured
        return RuleResult(rule.name, False, f"raised {type(error).__name__}: {_one_line(error)}", rule.advice)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:400]


@contextmanager
def isolated_random_state(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Inside the block, torch's generators start at `seed` and gradients are on; both and torch's settings are restored.

    One thread: the tensors are small, and threads that wait for a busy core cost far more than they bring.
    """
    before = torch_settings()
    devices = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        torch.manual_seed(seed)
        torch.set_num_threads(1)
        try:
            yield
        finally:
            restore_settings({**before, "random seed": torch.initial_seed()})  # fork_rng puts the generators back
