"""Random numbers that depend only on their purpose, not on earlier draws.

Every draw comes from a generator that is seeded with (seed, step, purpose). No code draws from a shared stream, so an
arm gets the same numbers whether it is trained alone, together with others, or from a checkpoint.
"""

from __future__ import annotations

import hashlib

import torch


def derive(*parts: object) -> int:
    """A seed in [0, 2^63) for these parts, e.g. `derive(seed, step, "crops")`; the same in every process."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(*parts: object, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator that starts at `derive(*parts)`."""
    return torch.Generator(device=device).manual_seed(derive(*parts))
