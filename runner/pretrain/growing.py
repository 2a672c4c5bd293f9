"""More or fewer levels for a trained codec."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from snac_core.codec import SNAC
from snac_core.codec.vq import VectorQuantize
from snac_core.errors import UserError
from snac_core.seeding import derive


def add_levels(codec: SNAC, strides: Sequence[int], *, seed: int) -> SNAC:
    """A codec with further levels behind those of `codec`, to be trained: its output is at first the same.

    What a new level gives is multiplied by lengths of 0 (`out_proj`'s weight norm), which training raises; what it
    looks at are random directions, orthogonal to one another, of what the levels before it left.

    Args:
        codec: trained.
        strides: of the new levels, in frames of the latent.
        seed: of their weights.

    Raises:
        UserError: for strides that the configuration refuses.
    """
    config = dict(codec.config)
    before = len(config["vq_strides"])
    config["vq_strides"] = [*config["vq_strides"], *strides]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "added levels"))
        grown = SNAC.from_config(config)
        for level in list(grown.quantizer.quantizers)[before:]:
            assert isinstance(level, VectorQuantize)
            nn.init.orthogonal_(level.in_proj.get_parameter("parametrizations.weight.original1"))
            nn.init.ones_(level.in_proj.get_parameter("parametrizations.weight.original0"))
            nn.init.zeros_(level.out_proj.get_parameter("parametrizations.weight.original0"))
            for projection in (level.in_proj, level.out_proj):
                assert projection.bias is not None
                nn.init.zeros_(projection.bias)
    grown.load_state_dict({**grown.state_dict(), **codec.state_dict()})
    return grown


def first_levels(codec: SNAC, count: int) -> SNAC:
    """A codec of the first `count` quantiser levels alone: fewer bits, what the others added is missing.

    Args:
        codec: trained.
        count: of levels to keep, at least 1.

    Raises:
        UserError: if the codec has fewer.
    """
    if not 1 <= count <= codec.n_codebooks:
        raise UserError(f"{count} levels of a codec that has {codec.n_codebooks}; expected 1 to {codec.n_codebooks}")
    kept = SNAC.from_config({**codec.config, "vq_strides": codec.config["vq_strides"][:count]})
    state = codec.state_dict()
    kept.load_state_dict({name: state[name] for name in kept.state_dict()})
    return kept.eval()
