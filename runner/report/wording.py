"""Numbers and names as readers like them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from runner.evaluate.statistics import Estimate
from runner.names import SHUFFLED


def number(value: float | None, digits: int = 2, *, signed: bool = False) -> str:
    """A number for readers: a true minus sign, an em dash for what is not there."""
    if value is None or not math.isfinite(value):
        return "—"
    text = f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"
    if float(text) == 0:
        text = text.lstrip("+-")
    return text.replace("-", "−")


def bracket(e: Estimate, digits: int = 2) -> str:
    """The interval as [low, high], or nothing where there is none."""
    return f"[{number(e.low, digits)}, {number(e.high, digits)}]" if math.isfinite(e.low) else ""


def probability(p: float) -> str:
    if not math.isfinite(p):
        return "p unknown"
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def listed(names: Sequence[str]) -> str:
    """a, b and c."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def plural(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


_CONTROLS = {
    "mismatched": "mismatched: bare codec of another utterance",
    "moved_voice": "moved voice: pitch and formants, bare codec",
    SHUFFLED: "shuffled embeddings",
    "source": "source, unchanged",
    "floor": "floor: bare codec of the source",
    "ceiling": "ceiling: bare codec of the target",
}


def called(name: str) -> str:
    """A control as a table calls it: its name, after a colon what it is. Any other name is unchanged."""
    return _CONTROLS.get(name, name)
