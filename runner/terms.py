"""What a step is measured by: raw scalar terms, each under the name of its strategy, and the teacher's distances."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from snac_core.losses import cosine_distance
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


@torch.no_grad()
def teachers_view(step: Step) -> dict[str, float]:
    """How far the outputs are from their speakers, by the teacher: what training curves show beside the losses."""
    spk_id = float(cosine_distance(step.identity_embedding, step.own_reference).mean())
    spk_vc = float(cosine_distance(step.converted_embedding, step.target_reference).mean())
    return {"spk_id": spk_id, "spk_vc": spk_vc, "gap": spk_vc - spk_id}
