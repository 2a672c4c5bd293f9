"""Random numbers that depend on what they are for, and on nothing that ran before.

Every draw of the project comes from a generator made of (seed, step, purpose). Nothing reads a shared stream, so an arm
trained beside others, alone, or from a checkpoint sees the same numbers.
"""

from __future__ import annotations

import hashlib

import torch


def derive(*parts: object) -> int:
    """A seed in [0, 2^63) for these parts, e.g. `derive(seed, step, "crops")`; equal in every process."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(*parts: object, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator that starts at `derive(*parts)`."""
    return torch.Generator(device=device).manual_seed(derive(*parts))
