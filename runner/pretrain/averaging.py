"""The mean of codecs that come from one another: often better than each of them."""

from __future__ import annotations

from collections.abc import Sequence

from snac_core.codec import SNAC
from snac_core.errors import UserError


def average(codecs: Sequence[str], shares: Sequence[float]) -> SNAC:
    """A codec whose weights are the weighted mean of others' (Wortsman et al. 2022, WiSE-FT, eq. 1).

    It works where one was trained on from the other for a short while: both then lie in one basin of the loss, and the
    mean is what a longer average over the training would have given.

    Args:
        codecs: bundled names, folders or hub ids, of one configuration.
        shares: one each, adding up to 1.

    Raises:
        UserError: for codecs of different configurations, or shares that are not a mean.
    """
    if len(codecs) != len(shares) or not codecs or abs(sum(shares) - 1) > 1e-6:
        raise UserError(f"{len(codecs)} codecs with shares {list(shares)}; expected one share each, adding up to 1")
    loaded = [SNAC.from_pretrained(name) for name in codecs]
    mean = SNAC.from_config(loaded[0].config)
    for name, codec in zip(codecs, loaded, strict=True):
        for key, value in codec.config.items():
            if value != mean.config[key]:
                raise UserError(f"{name} has {key} {value!r}, {codecs[0]} {mean.config[key]!r}; they have no mean")
    states = [codec.state_dict() for codec in loaded]
    weighted = {
        name: sum(share * state[name] for share, state in zip(shares[1:], states[1:], strict=True)) + shares[0] * first
        for name, first in states[0].items()
    }
    mean.load_state_dict(weighted)
    return mean.eval()
