"""Checks of an arm before training, with its real codec and losses."""

from __future__ import annotations

from collections.abc import Callable, Collection

from torch import Tensor

from snac_core.conditioned import ConditionedCodec
from snac_core.conditioning import Conditioning
from snac_core.errors import UserError
from snac_core.frozen import FrozenActivations
from snac_core.seeding import derive
from snac_core.testing.probes import (
    SAME,
    BaseSnapshot,
    EditProbe,
    adapters,
    copied,
    edits_of,
    flows,
    gradients,
    owned_base_tensors,
    perturbed,
)
from snac_core.testing.results import isolated_random_state

CUT = "is it used, and does nothing cut the gradient (integer codes, .detach(), no_grad, .item())?"


def preflight(
    model: ConditionedCodec,
    loss: Callable[[ConditionedCodec], Tensor],
    audio: Tensor,
    cond: Conditioning,
    *,
    seed: int,
    frozen: Collection[str] = (),
) -> None:
    """Refuse an arm that cannot learn, ignores its embedding, mixes the items of a batch, or changes the base.

    Runs `loss` twice, each time on a copy of the strategies: unchanged, and with all parameters perturbed. The model,
    its gradients and torch's random state do not change. Call it after `training_start`.

    Args:
        model: the model of the arm.
        loss: computes the total, weighted loss of a model.
        audio: (B, 1, T) at the codec's sample rate.
        cond: one row, or one row per item.
        seed: of the perturbation.
        frozen: strategies that are not trained.

    Raises:
        UserError: names the strategy, the measurement, and the likely cause.
    """
    names = adapters(model)
    if not names:
        raise UserError(
            f"{' + '.join(model.strategies) or 'an arm without strategies'} edits nothing, so there is nothing to "
            f"train; add an adapter: a strategy with before_vq or after_vq"
        )
    if owned := owned_base_tensors(model):
        raise UserError(
            f"strategy {owned[0].split('.')[0]!r} touches the base: it holds {owned[0]!r} of the codec as its own "
            f"parameter and would train it; keep no reference to the codec in a strategy"
        )
    base = BaseSnapshot(model.codec)
    problem: UserError | None = None
    with (
        isolated_random_state(derive(seed, "preflight"), audio.device),
        model.codec.fixed_noise(derive(seed, "preflight")),
    ):
        try:
            _check_edits(perturbed(model, seed), names, audio, cond, seed)
            _check_gradients(model, [name for name in names if name not in frozen], loss, seed)
        except UserError as error:
            problem = error
        finally:
            touched = base.changed()
            base.restore()
    if touched:
        raise UserError(
            f"{' + '.join(model.strategies)} touches the base: {len(touched)} tensors of the codec changed in one "
            f"step, e.g. {touched[0]!r}; a strategy edits activations, never the codec"
        )
    if problem is not None:
        raise problem


def _check_gradients(
    model: ConditionedCodec, names: list[str], loss: Callable[[ConditionedCodec], Tensor], seed: int
) -> None:
    fresh = copied(model).train()
    tables = gradients(fresh, _total(fresh, loss, "at initialisation"))
    for name in names:
        if not tables[name]:
            raise UserError(f"strategy {name!r} edits the signal but has no parameters to train")
        if not any(flows(grad) for grad in tables[name].values()):
            raise UserError(
                f"strategy {name!r} gets no gradient from any loss term: at initialisation all {len(tables[name])} of "
                f"its parameters have gradient zero or none; {CUT}"
            )
    moved = perturbed(model, seed).train()
    tables = gradients(moved, _total(moved, loss, "after all parameters were perturbed"))
    for name in names:
        for parameter, grad in tables[name].items():
            if grad is not None and not grad.isfinite().all():
                raise UserError(
                    f"strategy {name!r}: the gradient of {parameter!r} is NaN or infinite after all parameters were "
                    f"perturbed; guard logarithms, roots and divisions"
                )
            if not flows(grad):
                raise UserError(
                    f"strategy {name!r}: parameter {parameter!r} gets no gradient from any loss term after all "
                    f"parameters were perturbed; {CUT}"
                )


def _total(model: ConditionedCodec, loss: Callable[[ConditionedCodec], Tensor], when: str) -> Tensor:
    total = loss(model)
    if not total.isfinite().all():
        raise UserError(f"{' + '.join(model.strategies)}: the loss is {float(total.detach())} {when}")
    return total


def _check_edits(model: ConditionedCodec, names: list[str], audio: Tensor, cond: Conditioning, seed: int) -> None:
    rows = max(2, audio.shape[0])
    if audio.shape[0] < rows:
        audio = audio.repeat(rows, 1, 1)
    bare, cond = FrozenActivations(model.codec, audio.detach()), cond.expand(rows)
    model.eval()
    for name in names:
        effects = []
        for edit in edits_of(model, name):
            probe = EditProbe(edit, bare, cond, seed)
            place = f"strategy {name!r} at tap {edit.tap.name!r}"
            effects.append(probe.effect())
            if effects[-1] == float("inf"):
                raise UserError(f"{place} gives NaN or infinity after all parameters were perturbed")
            if probe.overwrites_its_input():
                raise UserError(
                    f"{place} writes into its input, which other arms share; edit out of place: x = x + ..."
                )
            for mode in (True, False):
                model.train(mode)
                if (drift := probe.drift()) > SAME:
                    raise UserError(
                        f"{place} depends on earlier calls: equal input gives an output that differs by {drift:.2g} of "
                        "its range in the next call; keep no counter or other state that the edit reads"
                    )
                if (leak := probe.leak()) > SAME:
                    raise UserError(
                        f"{place} mixes the batch: an item's output moves by {leak:.2g} of its range when the other "
                        f"items change; compute each item from itself alone"
                    )
        if max(effects) <= SAME:
            raise UserError(
                f"strategy {name!r} ignores its speaker embedding: after all parameters were perturbed, another "
                f"embedding gives the same output; use cond.speaker in the edit"
            )
