"""The bare codec's work on one batch of audio, done once and shared by everything that edits it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from snac_core.plugin_guard import settled, switches
from snac_core.taps import is_before_vq

if TYPE_CHECKING:
    from snac_core.codec import SNAC


class FrozenActivations:
    """Activations of the unedited codec, computed on first use, each stage once.

    Arms trained side by side share one of these per batch: the encoder runs once for all of them. No gradient is kept,
    unless the audio itself requires one (a cycle loss re-encodes converted audio).

    Args:
        codec: the frozen codec.
        audio: (B, 1, T), unpadded.

    Attributes:
        seconds: spent on all this so far, so that shared work can be told from an arm's own.
    """

    def __init__(self, codec: SNAC, audio: Tensor) -> None:
        self.codec = codec
        self.audio = audio
        self.differentiable = audio.requires_grad and torch.is_grad_enabled()
        self.seconds = 0.0
        self._settings = switches()
        self._activations: dict[str, Tensor] = {}

    def at(self, tap: str) -> Tensor:
        """The unedited activation (B, C, F) at `tap`."""
        if tap == "quantized":
            return self._quantized[0]
        if tap not in self._activations:
            before, order = is_before_vq(tap), self._order
            upstream = [
                known for known in self._activations if is_before_vq(known) == before and order[known] < order[tap]
            ]
            start = max(upstream, key=order.__getitem__, default=None if before else "quantized")
            x = self._padded if start is None else self.at(start)
            with self._working():
                self._activations[tap] = self.codec.advance(x, start, tap)
        return self._activations[tap]

    @property
    def codes(self) -> list[Tensor]:
        """Codes of the unedited latent, one (B, F / stride) per codebook."""
        return self._quantized[1]

    @cached_property
    def output(self) -> Tensor:
        """The bare codec's audio (B, 1, T)."""
        z_q = self.at("quantized")
        with self._working():
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
        with self._working():
            z_q, codes = self.codec.quantizer(z)
        return z_q, codes

    @contextmanager
    def _working(self) -> Iterator[None]:
        started = time.perf_counter()
        # often computed inside an arm's hook: the others must not inherit what that hook did to torch's settings
        with settled(self._settings), torch.set_grad_enabled(self.differentiable):
            yield
        self.seconds += time.perf_counter() - started
