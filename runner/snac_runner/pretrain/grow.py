"""The codec that a training starts from: a new one, or a trained one with more levels, wider layers or other rates.

Also the mean of several trained codecs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from snac_core.codec import SNAC
from snac_core.codec.layers import Snake1d, WeightNorm, WNConv1d, WNConvTranspose1d
from snac_core.codec.vq import VectorQuantize
from snac_core.errors import UserError
from snac_core.seeding import derive
from snac_runner.pretrain.settings import PretrainSettings, codec_config


def initial_codec(settings: PretrainSettings, start: SNAC | None) -> SNAC:
    """`start` with the changes that the settings ask for, or a new codec if there is none.

    Raises:
        UserError: for settings that contradict each other or do not fit `start`.
    """
    if len(settings.widths) not in (0, 2):
        raise UserError(f"widths {list(settings.widths)}; expected two numbers, encoder_dim and decoder_dim")
    if len(settings.rates) not in (0, 2):
        raise UserError(f"rates has {len(settings.rates)} lists; expected two, encoder_rates and decoder_rates")
    frozen = set(settings.frozen)
    if frozen and settings.start is None:
        raise UserError(f"frozen {sorted(frozen)} needs `start`, the codec with the weights to keep")
    if len(frozen) == 3:
        raise UserError("all parts of the codec are frozen; leave at least one to train")
    if "quantizer" in frozen and settings.levels:
        raise UserError(f"levels {list(settings.levels)} would be added to a frozen quantizer and never trained")
    if frozen & {"encoder", "decoder"} and (settings.widths or settings.rates):
        raise UserError(f"widths and rates change encoder and decoder; frozen are {sorted(frozen)}")
    if start is None:
        if settings.levels or settings.widths or settings.rates:
            raise UserError("levels, widths and rates change the codec `start`; without it set them in `codec`")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(settings.seed, "codec weights"))
            return SNAC.from_config(codec_config(settings.codec))
    if settings.rates:
        start = change_rates(start, *settings.rates)
    if settings.widths:
        start = widen(start, *settings.widths, seed=settings.seed)
    return add_levels(start, settings.levels, seed=settings.seed) if settings.levels else start


def add_levels(codec: SNAC, strides: Sequence[int], *, seed: int) -> SNAC:
    """A codec with further quantizer levels after those of `codec`. Its output is the same until it is trained.

    The output projection of a new level has weight norm gains of 0, which training raises. Its input projection is a
    random orthogonal one of the residual.

    Args:
        codec: trained.
        strides: of the new levels, in frames of the latent.
        seed: of the new weights.

    Raises:
        UserError: for invalid strides.
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
    """A codec with wider layers than `codec`. Its output is the same, up to rounding, until it is trained.

    Old channels keep their weights and have weights of 0 for the new channels; new channels have random weights for
    all. This is a function-preserving growth as in Net2Net (Chen et al. 2016), but with random new channels instead of
    copies of old ones, because training would have to break the symmetry of copies.

    Args:
        codec: trained, without attention.
        encoder_dim, decoder_dim: of the wider codec.
        seed: of the new weights.

    Raises:
        UserError: if no layer gets wider, or for a codec with attention: its layer norms depend on all channels.
    """
    for name, width in (("encoder_dim", encoder_dim), ("decoder_dim", decoder_dim)):
        if width < codec.config[name]:
            raise UserError(f"{name} {width}; a codec of {codec.config[name]} can be widened, but not narrowed")
    if (encoder_dim, decoder_dim) == (codec.config["encoder_dim"], codec.config["decoder_dim"]):
        raise UserError(
            f"encoder_dim {encoder_dim} and decoder_dim {decoder_dim} are those of the codec; give larger ones"
        )
    if codec.attn_window_size is not None:
        raise UserError("a codec with attention cannot be widened: its layer norms depend on all channels")
    config = {**codec.config, "encoder_dim": encoder_dim, "decoder_dim": decoder_dim, "latent_dim": None}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "new channels"))
        wide = SNAC.from_config(config)
    layers = dict(codec.named_modules())
    for name, layer in wide.named_modules():
        old = layers.get(name)
        if isinstance(layer, WNConv1d | WNConvTranspose1d):
            assert isinstance(old, WNConv1d | WNConvTranspose1d)
            _copy_widened(layer, old)
        elif isinstance(layer, Snake1d):
            assert isinstance(old, Snake1d)
            layer.alpha[:, : old.alpha.shape[1]] = old.alpha
        elif isinstance(layer, nn.Embedding):
            assert isinstance(old, nn.Embedding)
            layer.weight.copy_(old.weight)
    return wide


@torch.no_grad()
def change_rates(codec: SNAC, encoder_rates: Sequence[int], decoder_rates: Sequence[int]) -> SNAC:
    """A codec with other strides, as a better initialization than random weights.

    The kernel of a strided convolution has two strides; it is resampled linearly to its new length. All other weights
    are kept, although some layers then run at another frame rate than in training.

    Args:
        codec: trained.
        encoder_rates, decoder_rates: new strides of the blocks, as many as the codec has.

    Raises:
        UserError: for another number of blocks, or invalid rates.
    """
    for name, rates in (("encoder_rates", encoder_rates), ("decoder_rates", decoder_rates)):
        if len(rates) != len(codec.config[name]):
            blocks = len(codec.config[name])
            raise UserError(f"{name} {list(rates)}; expected {blocks}, one for each block, as in {codec.config[name]}")
    config = {**codec.config, "encoder_rates": list(encoder_rates), "decoder_rates": list(decoder_rates)}
    with torch.random.fork_rng(devices=[]):  # its random weights are all replaced
        changed = SNAC.from_config(config)
    state = codec.state_dict()
    layers = dict(codec.named_modules())
    for name, layer in changed.named_modules():
        old = layers.get(name)
        if isinstance(layer, WNConv1d | WNConvTranspose1d) and isinstance(old, WNConv1d | WNConvTranspose1d):
            before, after = old.kernel_size[0], layer.kernel_size[0]
            if before != after:
                weight = nn.functional.interpolate(old.weight, after, mode="linear")
                if isinstance(layer, WNConv1d):  # keeps the gain; a transposed one sums two taps at any length
                    weight = weight * (before / after)
                state[f"{name}.parametrizations.weight.original0"] = torch.norm_except_dim(weight, 2, 0)
                state[f"{name}.parametrizations.weight.original1"] = weight
    changed.load_state_dict(state)
    return changed


def average(codecs: Sequence[str], shares: Sequence[float]) -> SNAC:
    """A codec with the weighted mean of the weights of others (Wortsman et al. 2022, WiSE-FT, equation 1).

    This helps if one codec is a short fine-tuning of the other, so that both lie in the same basin of the loss.

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
                raise UserError(
                    f"{name} has {key} {value!r}, {codecs[0]} {mean.config[key]!r}; expected equal configurations"
                )
    states = [codec.state_dict() for codec in loaded]
    weighted = {
        name: sum(share * state[name] for share, state in zip(shares[1:], states[1:], strict=True)) + shares[0] * first
        for name, first in states[0].items()
    }
    mean.load_state_dict(weighted)
    return mean.eval()


def _copy_widened(layer: WNConv1d | WNConvTranspose1d, old: WNConv1d | WNConvTranspose1d) -> None:
    """Copy `old` to the first channels of `layer`, and set the weights from new to old channels to 0."""
    new_norm, old_norm = layer.parametrizations["weight"], old.parametrizations["weight"]
    assert isinstance(new_norm, WeightNorm)
    assert isinstance(old_norm, WeightNorm)
    gain, direction = new_norm.original0, new_norm.original1
    rows, columns = old_norm.original1.shape[:2]
    if isinstance(layer, WNConvTranspose1d):  # (in, out, kernel): norms are over outputs, so gains change
        direction[:rows, :columns] = old.weight
        direction[rows:, :columns] = 0
        gain.copy_(torch.norm_except_dim(direction, 2, 0))
    else:  # (out, in, kernel); depthwise ones have in = 1
        direction[:rows, :columns] = old_norm.original1
        direction[:rows, columns:] = 0
        gain[:rows] = old_norm.original0
    if layer.bias is not None:
        assert old.bias is not None
        layer.bias[: len(old.bias)] = old.bias
