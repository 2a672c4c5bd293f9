"""Before an arm trains: whether it can learn at all, on the real codec and a real batch, without a trace."""

from __future__ import annotations

from torch import Tensor

from runner.arm import Arm
from runner.terms import terms_of
from snac_core.bare import BarePass
from snac_core.conditioned import ConditionedCodec
from snac_core.conditioning import Conditioning
from snac_core.testing import preflight as check_rules

ROWS = 3


def preflight(arm: Arm) -> None:
    """Refuse an arm with a strategy that gets no gradient, ignores its embedding, mixes the batch, or changes shapes.

    Raises:
        UserError: naming the strategy and what to change; or a weight for a term that nothing computes.
    """
    materials = arm.materials
    batch = materials.batches(arm.seed).at(0)
    rows = min(ROWS, len(batch.speakers))
    audio = batch.audio[:rows].to(materials.device)
    speakers = materials.table.rows(batch.speakers[:rows])
    targets = arm.sampler.targets(speakers, 0, 1)
    cond = Conditioning(materials.table.conditioning[targets].to(materials.device), encoder=materials.table.encoder)

    def loss(model: ConditionedCodec) -> Tensor:
        step = arm.make_step(0, BarePass(materials.codec, audio), speakers, targets, model)
        terms = terms_of(step, "loss")
        arm.check_weights({*terms, *terms_of(step, "critic_loss")})
        return arm.weighted(terms)

    check_rules(arm.model, loss, audio, cond, seed=arm.seed)
