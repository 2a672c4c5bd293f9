"""Validation of a codec's configuration, audio and codes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from snac_core.errors import UserError

HEAD = 64  # channels of an attention head


def resolved_config(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """SNAC's constructor arguments, checked, JSON-able, with `latent_dim` filled in.

    Raises:
        UserError: for values of the wrong kind, and rates or widths that do not fit together.
    """
    config = dict(arguments)
    for key in ("sampling_rate", "encoder_dim", "decoder_dim", "codebook_size", "codebook_dim"):
        _require_whole(key, config[key])
    for key in ("latent_dim", "attn_window_size"):
        if config[key] is not None:
            _require_whole(key, config[key])
    # a block that does not change the rate has a kernel of 2, which gives one frame too many
    for key, least in (("encoder_rates", 2), ("decoder_rates", 2), ("vq_strides", 1)):
        if isinstance(config[key], str) or not isinstance(config[key], Sequence) or not config[key]:
            raise UserError(f"{key} is a list of whole numbers, at least one; got {config[key]!r}")
        for rate in config[key]:
            _require_whole(f"each of {key}", rate, least)
        config[key] = list(config[key])
    for key in ("noise", "depthwise"):
        if not isinstance(config[key], bool):
            raise UserError(f"{key} is true or false; got {config[key]!r}")
    latent = config["encoder_dim"] * 2 ** len(config["encoder_rates"])
    if config["latent_dim"] not in (None, latent):
        raise UserError(
            f"latent_dim {config['latent_dim']} is not what the encoder gives; expected {latent} "
            f"(encoder_dim {config['encoder_dim']}, doubled {len(config['encoder_rates'])} times), or None"
        )
    config["latent_dim"] = latent
    _require_that_it_fits(config)
    return config


def _require_that_it_fits(config: Mapping[str, Any]) -> None:
    encoder, decoder = math.prod(config["encoder_rates"]), math.prod(config["decoder_rates"])
    if encoder != decoder:
        raise UserError(
            f"the decoder does not mirror the encoder: encoder_rates {config['encoder_rates']} make a hop of "
            f"{encoder}, decoder_rates {config['decoder_rates']} one of {decoder}; e.g. decoder_rates "
            f"{config['encoder_rates'][::-1]}"
        )
    halved = len(config["decoder_rates"])
    if config["decoder_dim"] % 2**halved:
        raise UserError(
            f"decoder_dim {config['decoder_dim']} is halved {halved} times; expected a multiple of {2**halved}"
        )
    if any(config["vq_strides"][0] % stride for stride in config["vq_strides"]):
        raise UserError(f"every one of vq_strides must divide the first; got {config['vq_strides']}")
    if config["attn_window_size"] is not None:
        for name in ("latent_dim", "decoder_dim"):
            if config[name] % HEAD:
                raise UserError(
                    f"attention has heads of {HEAD} channels; {name} is {config[name]}, expected a multiple of {HEAD} "
                    f"(or attn_window_size None)"
                )


def _require_whole(name: str, value: object, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{name} is a whole number of at least {least}; got {value!r}")


def check_audio(audio: Tensor, like: Tensor) -> None:
    """Raise UserError unless `audio` is (B, 1, T) with samples, of the dtype and on the device of the weight `like`."""
    if not isinstance(audio, Tensor):
        raise UserError(f"audio is a tensor (B, 1, T); got {type(audio).__name__}")
    if audio.dim() != 3 or audio.shape[1] != 1:
        raise UserError(f"audio has the shape (B, 1, T): batch, one channel, samples; got {tuple(audio.shape)}")
    if 0 in audio.shape:
        raise UserError(f"audio holds nothing; expected (B, 1, T) with B and T above 0, got {tuple(audio.shape)}")
    if not audio.is_floating_point():
        raise UserError(f"audio is floating point between -1 and 1; got {audio.dtype}")
    if audio.device != like.device:
        raise UserError(f"audio is on {audio.device}, the codec on {like.device}; move one of them with .to()")
    if audio.dtype != like.dtype and not torch.is_autocast_enabled(audio.device.type):
        raise UserError(f"audio is {audio.dtype}, the codec's weights are {like.dtype}; convert one with .to()")


def check_finite(audio: Tensor) -> None:
    """Raise UserError if `audio` holds NaN or infinity, which would become codes like any other."""
    if not torch.compiler.is_compiling() and not bool(torch.isfinite(audio).all()):
        rows = (~torch.isfinite(audio).all(dim=-1)).flatten().nonzero().flatten().tolist()
        raise UserError(f"audio holds NaN or infinity in item {rows[0]} of the batch; expected finite samples")


def check_embedding(speaker: Tensor) -> None:
    """Raise UserError unless every row of speaker embeddings (B, S) has unit norm, up to rounding to half precision."""
    if torch.compiler.is_compiling():
        return
    norms = speaker.detach().float().norm(dim=1)
    wrong = (~((norms - 1).abs() < 0.05)).nonzero().flatten().tolist()  # NaN is wrong, too
    if wrong:
        raise UserError(
            f"speaker embedding {wrong[0]} of {len(norms)} has the norm {float(norms[wrong[0]]):.3g}; expected 1: "
            "torch.nn.functional.normalize(embedding, dim=-1)"
        )


def check_codes(
    codes: Sequence[Tensor],
    strides: Sequence[int],
    size: int,
    window: int | None = None,
    device: torch.device | None = None,
) -> None:
    """Raise UserError unless `codes` are integers (B, F / stride) in [0, size), one tensor per stride.

    F must be a multiple of the first stride, and of the attention window where there is one. All are on `device`, if it
    is given.
    """
    if isinstance(codes, Tensor) or len(codes) != len(strides):
        got = f"one tensor {tuple(codes.shape)}" if isinstance(codes, Tensor) else f"{len(codes)}"
        raise UserError(f"codes are {len(strides)} tensors, one per codebook; got {got}")
    for level, indices in enumerate(codes):
        if indices.dim() != 2 or indices.is_floating_point() or indices.dtype == torch.bool:
            raise UserError(
                f"codes of level {level} are integers (B, F / {strides[level]}); "
                f"got {tuple(indices.shape)} {indices.dtype}"
            )
        if device is not None and indices.device != device:
            raise UserError(
                f"codes of level {level} are on {indices.device}, the codec on {device}; move one of them with .to()"
            )
    batch, coarse = codes[0].shape
    frames = coarse * strides[0]
    if batch == 0 or frames == 0:
        raise UserError(f"codes hold nothing; got {tuple(codes[0].shape)} at level 0")
    if window is not None and frames % window:
        raise UserError(
            f"codes of {frames} frames; this codec's attention needs a multiple of {window} frames, that is of "
            f"{math.lcm(window, strides[0]) // strides[0]} codes at level 0"
        )
    for level, (indices, stride) in enumerate(zip(codes, strides, strict=True)):
        if tuple(indices.shape) != (batch, frames // stride):
            raise UserError(
                f"codes of level {level} have the shape {tuple(indices.shape)}; expected {(batch, frames // stride)}, "
                f"as level 0 has {(batch, coarse)} and the strides are {list(strides)}"
            )
        if not torch.compiler.is_compiling():
            least, most = (int(bound) for bound in indices.aminmax())
            if least < 0 or most >= size:
                hint = " (-1 is padding: give lengths)" if least == -1 else ""
                raise UserError(
                    f"codes of level {level} reach from {least} to {most}{hint}; expected 0 to {size - 1}, its entries"
                )
