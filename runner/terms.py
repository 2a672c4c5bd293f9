"""What the losses of a step return: raw scalar terms, each under the name of its strategy."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from snac_core.step import Step


class TrainingFailure(RuntimeError):
    """This arm cannot go on; the message says at which step and why. The other arms can."""


def terms_of(step: Step, hook: str) -> dict[str, Tensor]:
    """All raw terms of a hook of the step's model, as `<strategy>/<term>`."""
    terms: dict[str, Tensor] = {}
    for name, implementation in step.model.callers(hook):
        found = implementation(step=step)
        if not isinstance(found, dict) or not all(
            isinstance(value, Tensor) and value.numel() == 1 for value in found.values()
        ):
            raise TrainingFailure(f"{hook} of {name!r} must return a dict of scalar tensors; got {_shape(found)}")
        terms.update({f"{name}/{term}": value.reshape(()) for term, value in found.items()})
    return terms


def _shape(found: Any) -> str:
    if not isinstance(found, dict):
        return "None" if found is None else type(found).__name__
    shapes = {k: tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__ for k, v in found.items()}
    return f"{shapes}"
