"""Where the taps of a codec lie among its layers, and what passes there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from snac_core.errors import UserError, nearest
from snac_core.taps import Tap, is_before_vq


class SignalPath:
    """The taps of one configuration, and the layers between them.

    Names count the resampling blocks alone: they are the same with and without attention and depthwise convolutions.

    Args:
        config: SNAC's constructor arguments, resolved.
        encoder_layers, decoder_layers: how many layers the two sides have in all.
    """

    def __init__(self, config: Mapping[str, Any], encoder_layers: int, decoder_layers: int) -> None:
        rate, channels = float(config["sampling_rate"]), config["encoder_dim"]
        taps = [Tap("encoder_0", channels, rate)]
        ends = {"encoder_0": 1}  # layers of a tap's side that lie before it
        for number, factor in enumerate(config["encoder_rates"], 1):
            rate, channels = rate / factor, channels * 2
            taps.append(Tap(f"encoder_{number}", channels, rate))
            ends[f"encoder_{number}"] = 1 + number
        taps += [Tap("latent", channels, rate), Tap("quantized", channels, rate)]
        ends |= {"latent": encoder_layers, "quantized": 0}
        channels = config["decoder_dim"]
        stem = decoder_layers - len(config["decoder_rates"]) - 3  # Snake, convolution and tanh come last
        for number, factor in enumerate([1, *config["decoder_rates"]]):
            rate = rate * factor
            taps.append(Tap(f"decoder_{number}", channels // 2**number, rate))
            ends[f"decoder_{number}"] = stem + number
        ends["audio"] = decoder_layers
        self.taps = tuple(taps)
        self._channels = {tap.name: tap.channels for tap in taps}
        self._ends = ends

    def between(self, after: str | None, upto: str) -> tuple[str, int, int]:
        """The side ("encoder" or "decoder") and its layers [first, last) that lead from `after` to `upto`."""
        for name in (after, upto):
            if name is not None and name not in self._ends:
                raise UserError(f"no tap {name!r} in this codec{nearest(name, self._ends)}")
        if after == "audio":
            raise UserError("nothing comes after 'audio'")
        before = after is None or is_before_vq(after)
        if before != is_before_vq(upto):
            raise UserError(
                f"from {after or 'the start'!r} to {upto!r} lies the quantiser; go from the audio to 'latent', call "
                f"quantizer(z), and go on from 'quantized'"
            )
        first, last = 0 if after is None else self._ends[after], self._ends[upto]
        if first > last:
            raise UserError(f"{upto!r} comes before {after!r} in the signal path; taps go forward only")
        return "encoder" if before else "decoder", first, last

    def check(self, x: Tensor, after: str | None) -> None:
        """Raise UserError unless `x` has the shape (B, C, F) of what passes at `after`."""
        channels = 1 if after is None else self._channels[after]
        if x.dim() != 3 or x.shape[1] != channels:
            place = f"at tap {after!r}" if after else "for audio"
            raise UserError(f"an activation of shape {tuple(x.shape)}; expected (B, {channels}, F) {place}")
