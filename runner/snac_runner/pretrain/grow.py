"""The mean of codecs that come from one another: often better than each of them.

A trained codec with more levels, fewer, wider layers, or codes at another rate."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from snac_core.codec import SNAC
from snac_core.codec.layers import Snake1d, WeightNorm, WNConv1d, WNConvTranspose1d
from snac_core.codec.vq import VectorQuantize
from snac_core.errors import UserError
from snac_core.seeding import derive


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


@torch.no_grad()
def widen(codec: SNAC, encoder_dim: int, decoder_dim: int, *, seed: int) -> SNAC:
    """A codec with wider layers than those of `codec`, to be trained: its output is at first the same, up to rounding.

    The channels there were keep their weights and hear nothing of the new ones; the new ones hear all, by weights as
    freshly drawn (after the function-preserving growth of Chen et al. 2016, Net2Net, without copies that would have to
    be told apart).

    Args:
        codec: trained, without attention.
        encoder_dim, decoder_dim: of the wider codec.
        seed: of the new weights.

    Raises:
        UserError: for no wider layers than there are, or a codec with attention, whose norms count all channels.
    """
    for name, width in (("encoder_dim", encoder_dim), ("decoder_dim", decoder_dim)):
        if width < codec.config[name]:
            raise UserError(f"{name} {width}; a codec of {codec.config[name]} can be widened, not narrowed")
    if (encoder_dim, decoder_dim) == (codec.config["encoder_dim"], codec.config["decoder_dim"]):
        raise UserError(f"the codec is {encoder_dim} and {decoder_dim} wide already")
    if codec.attn_window_size is not None:
        raise UserError("a codec with attention cannot be widened: its layer norms would hear the new channels")
    config = {**codec.config, "encoder_dim": encoder_dim, "decoder_dim": decoder_dim, "latent_dim": None}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "new channels"))
        wide = SNAC.from_config(config)
    layers = dict(codec.named_modules())
    for name, layer in wide.named_modules():
        old = layers.get(name)
        if isinstance(layer, WNConv1d | WNConvTranspose1d):
            assert isinstance(old, WNConv1d | WNConvTranspose1d)
            _put_into(layer, old)
        elif isinstance(layer, Snake1d):
            assert isinstance(old, Snake1d)
            layer.alpha[:, : old.alpha.shape[1]] = old.alpha
        elif isinstance(layer, nn.Embedding):
            assert isinstance(old, nn.Embedding)
            layer.weight.copy_(old.weight)
    return wide


@torch.no_grad()
def change_rates(codec: SNAC, encoder_rates: Sequence[int], decoder_rates: Sequence[int]) -> SNAC:
    """A codec whose blocks change the sampling rate by other factors, to be trained: a start nearer than a random one.

    A block's strided convolution, two strides long, is stretched to the new length: the filter it was, over more
    frames or fewer. All other weights stay; those of layers that now run at another rate find their input faster or
    slower than they knew it.

    Args:
        codec: trained.
        encoder_rates, decoder_rates: as many as the codec has.

    Raises:
        UserError: for another number of blocks, or rates that the configuration refuses.
    """
    for name, rates in (("encoder_rates", encoder_rates), ("decoder_rates", decoder_rates)):
        if len(rates) != len(codec.config[name]):
            blocks = len(codec.config[name])
            raise UserError(f"{name} {list(rates)}; expected {blocks}, one for each block, as in {codec.config[name]}")
    config = {**codec.config, "encoder_rates": list(encoder_rates), "decoder_rates": list(decoder_rates)}
    with torch.random.fork_rng(devices=[]):  # every weight that is drawn here is replaced
        changed = SNAC.from_config(config)
    state = codec.state_dict()
    layers = dict(codec.named_modules())
    for name, layer in changed.named_modules():
        old = layers.get(name)
        if isinstance(layer, WNConv1d | WNConvTranspose1d) and isinstance(old, WNConv1d | WNConvTranspose1d):
            before, after = old.kernel_size[0], layer.kernel_size[0]
            if before != after:
                weight = nn.functional.interpolate(old.weight, after, mode="linear")
                if isinstance(layer, WNConv1d):  # a sum over the kernel; transposed, two taps whatever its length
                    weight = weight * (before / after)
                state[f"{name}.parametrizations.weight.original0"] = torch.norm_except_dim(weight, 2, 0)
                state[f"{name}.parametrizations.weight.original1"] = weight
    changed.load_state_dict(state)
    return changed


def _put_into(layer: WNConv1d | WNConvTranspose1d, old: WNConv1d | WNConvTranspose1d) -> None:
    """Give the first channels of a convolution another's weights, and silence what they would hear of the rest."""
    normed, kept = layer.parametrizations["weight"], old.parametrizations["weight"]
    assert isinstance(normed, WeightNorm)
    assert isinstance(kept, WeightNorm)
    length, direction = normed.original0, normed.original1
    rows, columns = kept.original1.shape[:2]
    if isinstance(layer, WNConvTranspose1d):  # (in, out, kernel): the old rows go on to new channels too
        direction[:rows, :columns] = old.weight
        direction[rows:, :columns] = 0
        length.copy_(torch.norm_except_dim(direction, 2, 0))
    else:  # (out, in, kernel); a depthwise one has a single column
        direction[:rows, :columns] = kept.original1
        direction[:rows, columns:] = 0
        length[:rows] = kept.original0
    if layer.bias is not None:
        assert old.bias is not None
        layer.bias[: len(old.bias)] = old.bias


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
