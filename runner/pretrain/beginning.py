"""What a training begins with: the codec, and whether the settings fit it."""

from __future__ import annotations

import torch

from runner.pretrain.growing import add_levels, change_rates, widen
from runner.pretrain.losses import windows
from runner.pretrain.presets import codec_config
from runner.pretrain.settings import Adversary, PretrainSettings
from snac_core.codec import SNAC
from snac_core.errors import UserError
from snac_core.seeding import derive
from snac_core.speakers.encoder import SpeakerEncoder


def codec_to_train(settings: PretrainSettings, start: SNAC | None) -> SNAC:
    """`start`, grown as the settings ask, or a new codec where there is none.

    Raises:
        UserError: for settings that do not fit together, or not to `start`.
    """
    if len(settings.widths) not in (0, 2):
        raise UserError(f"widths are two, encoder_dim and decoder_dim; got {list(settings.widths)}")
    if len(settings.rates) not in (0, 2):
        raise UserError(f"rates are two lists, of the encoder and of the decoder; got {len(settings.rates)}")
    _check_frozen(settings)
    if start is not None:
        if settings.rates:
            start = change_rates(start, *settings.rates)
        if settings.widths:
            start = widen(start, *settings.widths, seed=settings.seed)
        return add_levels(start, settings.levels, seed=settings.seed) if settings.levels else start
    if settings.levels or settings.widths or settings.rates:
        raise UserError("levels, widths and rates change those of `start`; without it give a `codec` that has them")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(settings.seed, "codec weights"))
        return SNAC.from_config(codec_config(settings.codec))


def _check_frozen(settings: PretrainSettings) -> None:
    frozen = set(settings.frozen)
    if frozen and settings.start is None:
        raise UserError(f"frozen {sorted(frozen)}, but there is no `start` whose weights could be kept")
    if len(frozen) == 3:
        raise UserError("all of the codec is frozen; something must be left to train")
    if "quantizer" in frozen and settings.levels:
        raise UserError(f"levels {list(settings.levels)} are added to a frozen quantizer, where they would stay silent")
    if frozen & {"encoder", "decoder"} and (settings.widths or settings.rates):
        raise UserError(f"widths and rates change encoder and decoder; frozen are {sorted(frozen)}")


def check_lengths(codec: SNAC, settings: PretrainSettings, ear: SpeakerEncoder | None) -> None:
    """Raise UserError unless crops are long enough for all that hears them, and critics' stretches lie within them."""
    block = codec.preprocess(torch.zeros(1, 1, 1)).shape[-1]
    spectra = (*windows(codec.sampling_rate), *(settings.adversary.n_ffts if settings.adversary else ()))
    least = max(block, max(spectra) // 2 + 1)  # a window reaches half its length past the ends, by reflection
    if settings.crop_seconds * codec.sampling_rate < least:
        raise UserError(
            f"crop_seconds {settings.crop_seconds:g} are {round(settings.crop_seconds * codec.sampling_rate)} samples; "
            f"this codec and its losses need {least}, {least / codec.sampling_rate:.3f} s"
        )
    if settings.adversary is not None:
        _check_stretch(codec, settings.adversary, settings.crop_seconds)
    if ear is not None and settings.crop_seconds < ear.min_seconds:
        raise UserError(f"crop_seconds {settings.crop_seconds:g}; {ear.name} needs {ear.min_seconds:g} s")


def _check_stretch(codec: SNAC, how: Adversary, crop_seconds: float) -> None:
    hearing = [n_fft // 2 + 1 for n_fft in how.n_ffts] + [4 * period for period in how.periods]  # samples
    if not hearing:
        raise UserError("an adversary without critics; give adversary.periods or adversary.n_ffts, or adversary=none")
    least = max(hearing) / codec.sampling_rate
    if how.seconds is not None and not least <= how.seconds <= crop_seconds:
        raise UserError(
            f"adversary.seconds {how.seconds:g}; these critics need {least:.3f} s, and a crop has "
            f"{crop_seconds:g} (crop_seconds)"
        )
