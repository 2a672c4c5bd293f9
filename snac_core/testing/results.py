"""Rules of the conformance kit, their results, and a runner that restores the global state of torch."""

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
    """Result of one rule for one plugin.

    Attributes:
        rule: name of the rule.
        passed: whether the plugin follows the rule.
        measured: the measurement, in one line.
        advice: what the author should change; empty if the rule passed.
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
    """A check of a subject. It returns what it measured, and raises `RuleViolation`, or another error, if it fails.

    Attributes:
        name: of the rule.
        check: the measurement.
        advice: what to change, unless the `RuleViolation` has its own advice.
        gate: whether the rules after it are skipped if it fails.
    """

    name: str
    check: Callable[[Subject], str]
    advice: str
    gate: bool = False


class RuleViolation(Exception):
    """A failed rule: what was measured, and what to change."""

    def __init__(self, measured: str, advice: str = "") -> None:
        super().__init__(measured)
        self.measured = measured
        self.advice = advice


def run_rules(subject: Subject, rules: Sequence[Rule[Subject]]) -> Iterator[RuleResult]:
    """Run the rules in order, each from the same random state; stop after a failed gate."""
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
    except Exception as error:  # the plugin's code may raise anything; it is the result of the rule
        return RuleResult(rule.name, False, f"raised {type(error).__name__}: {_one_line(error)}", rule.advice)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:400]


@contextmanager
def isolated_random_state(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Inside the block, torch's generators start at `seed`, gradients are on, and torch uses one thread.

    All of that, and torch's other global settings, are restored at the end. One thread is faster for small tensors.
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
