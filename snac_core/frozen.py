"""Activations of the bare codec on one batch of audio, computed once and shared by all arms."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor

from snac_core.codec.snac import SNAC
from snac_core.plugin_guard import torch_settings, with_settings
from snac_core.taps import is_before_vq
from snac_core.timing import Stopwatch


class FrozenActivations:
    """Activations of the codec without edits, computed on first use, each stage once.

    Arms trained on the same batch share one object, so that the encoder runs once for all of them. Gradients are
    recorded only if the audio requires one (a cycle loss re-encodes converted audio).

    Args:
        codec: the frozen codec.
        audio: (B, 1, T), unpadded.
        latent: the activation at "latent" (B, C, F), if it is known; the encoder then runs only for earlier taps.
        stopwatch: measures the computing time, which all arms share.
    """

    def __init__(
        self, codec: SNAC, audio: Tensor, *, latent: Tensor | None = None, stopwatch: Stopwatch | None = None
    ) -> None:
        self.codec = codec
        self.audio = audio
        self.differentiable = audio.requires_grad and torch.is_grad_enabled()
        self.stopwatch = stopwatch or Stopwatch(audio.device)
        self._settings = torch_settings()
        self._activations: dict[str, Tensor] = {} if latent is None else {"latent": latent}

    def at(self, tap: str) -> Tensor:
        """The activation (B, C, F) at `tap`."""
        if tap == "quantized":
            return self._quantized[0]
        if tap not in self._activations:
            before, order = is_before_vq(tap), self._order
            upstream = [
                known for known in self._activations if is_before_vq(known) == before and order[known] < order[tap]
            ]
            start = max(upstream, key=order.__getitem__, default=None if before else "quantized")
            x = self._padded if start is None else self.at(start)
            with self._timed():
                self._activations[tap] = self.codec.advance(x, start, tap)
        return self._activations[tap]

    @property
    def codes(self) -> list[Tensor]:
        """Codes of the latent, one (B, F / stride) per codebook."""
        return self._quantized[1]

    @cached_property
    def output(self) -> Tensor:
        """The bare codec's audio (B, 1, T)."""
        z_q = self.at("quantized")
        with self._timed():
            audio = self.codec.advance(z_q, "quantized", "audio")
        return audio[..., : self.audio.shape[-1]]

    @cached_property
    def _padded(self) -> Tensor:
        return self.codec.preprocess(self.audio)

    @cached_property
    def _order(self) -> dict[str, int]:
        return {tap.name: position for position, tap in enumerate(self.codec.taps)}

    @cached_property
    def _quantized(self) -> tuple[Tensor, list[Tensor]]:
        z = self.at("latent")
        with self._timed():
            z_q, codes = self.codec.quantizer(z)
        return z_q, codes

    @contextmanager
    def _timed(self) -> Iterator[None]:
        # Often computed inside a hook of one arm: its changes to torch's settings must not affect the other arms.
        with self.stopwatch, with_settings(self._settings), torch.set_grad_enabled(self.differentiable):
            yield
