"""Requirements of objectives, checked with an error that names what is missing."""

from __future__ import annotations

from torch import Tensor

from snac_core import ConditionedCodec, Step, Strategy, UserError
from snac_core.taps import is_before_vq


def require_edits_before_vq(objective: Strategy, model: ConditionedCodec) -> None:
    """Raise UserError if no strategy of `model` acts before the quantizer, so that the codes cannot change."""
    if not any(is_before_vq(tap) for tap in model.edits):
        raise UserError(
            f"{objective.name!r} is about the codes, which {' + '.join(model.strategies)} leaves as they are; "
            f"add a strategy that acts before the quantizer"
        )


def parallel_speech(objective: Strategy, step: Step) -> tuple[Tensor, Tensor]:
    """`Step.parallel`: the targets' recordings of the same words, and their lengths; UserError if there are none."""
    if step.parallel is None:
        raise UserError(f"{objective.name!r}: no two speakers of this data say the same words; set parallel = false")
    return step.parallel
