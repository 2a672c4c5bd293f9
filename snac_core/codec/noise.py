"""The decoder's noise: upstream's stream of random numbers, or, when fixed, a function of a seed."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from snac_core.errors import UserError
from snac_core.seeding import generator

_KEPT = 16  # drawn noises kept while a seed is fixed; a decoder has four or so per audio length
_ALIGNED = 16  # torch fills normal numbers in runs of 16; a length of whole runs is a prefix of any longer one


class NoiseSource:
    """Where the noise blocks of one codec draw from. A copy starts outside of every `fixed`."""

    def __init__(self) -> None:
        self._seed: int | None = None
        self._drawn: dict[tuple[int, int, torch.device, torch.dtype], Tensor] = {}

    def __reduce__(self) -> tuple[type[NoiseSource], tuple[()]]:
        return NoiseSource, ()  # copied inside `fixed`, nothing would ever end the copy's

    @contextmanager
    def fixed(self, seed: int) -> Iterator[None]:
        """Inside, noise depends on (seed, block) alone: not on what was drawn before, nor on the batch."""
        try:
            seed = operator.index(seed)
        except TypeError:
            raise UserError(f"a noise seed is a whole number; got {seed!r}") from None
        before = self._seed, self._drawn
        self._seed, self._drawn = seed, {}
        try:
            yield
        finally:
            self._seed, self._drawn = before

    def draw(self, x: Tensor, block: int) -> Tensor:
        """Standard normal noise for activations x (B, C, T): (B, 1, T), or (1, 1, T) for all items when fixed.

        Fixed noise comes from the CPU's generator on every device, and what a short item gets is the beginning of what
        a long one gets, so padding an item to the length of another does not change its noise.
        """
        if self._seed is None:
            return torch.randn((x.shape[0], 1, x.shape[-1]), device=x.device, dtype=x.dtype)
        frames = x.shape[-1]
        key = (block, frames, x.device, x.dtype)
        if key not in self._drawn:
            if len(self._drawn) >= _KEPT:
                self._drawn.clear()
            with torch.inference_mode(False):  # kept noise may be used in training next
                drawn = torch.randn(
                    (1, 1, frames + -frames % _ALIGNED),
                    generator=generator(self._seed, "decoder noise", block),
                    dtype=torch.float32,
                )
                self._drawn[key] = drawn[..., :frames].to(device=x.device, dtype=x.dtype)
        return self._drawn[key]
