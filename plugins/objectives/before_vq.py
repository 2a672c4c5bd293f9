"""Objectives about the codes can only teach what acts before the quantiser."""

from __future__ import annotations

from snac_core import ConditionedCodec, Strategy, UserError
from snac_core.taps import is_before_vq


def require_edits_before_vq(objective: Strategy, model: ConditionedCodec) -> None:
    """Raise UserError where no strategy of `model` acts before the quantiser, so that nothing can change the codes."""
    if not any(is_before_vq(tap) for tap in model.edits):
        raise UserError(
            f"{objective.name!r} is about the codes, which {' + '.join(model.strategies)} leaves as they are; "
            f"add a strategy that acts before the quantiser"
        )
