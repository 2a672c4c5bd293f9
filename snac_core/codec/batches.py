"""Batches of items of different lengths: each item gets the result that it gets alone.

Zeros after an item do not stay zeros: after the first convolution with a bias they differ from the zero padding that
the item has alone, and its last codes change. Items are therefore grouped by their padded length, and each group is
processed at that length. This holds for every strategy, also for one that depends on all frames.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from snac_core.errors import UserError

PADDING = -1
"""Where an item of a batch has no code."""


def checked_lengths(lengths: Sequence[int] | Tensor, rows: int, longest: int) -> list[int]:
    """The lengths as a list; UserError unless they are `rows` whole numbers from 1 to `longest`."""
    values = lengths.tolist() if isinstance(lengths, Tensor) else list(lengths)
    if not isinstance(values, list) or len(values) != rows:
        raise UserError(f"lengths are one number of samples per item; got {lengths!r} for {rows} items")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= longest:
            raise UserError(f"a length of {value!r}; expected a whole number of samples from 1 to {longest}")
    return values


def encode_each(
    encode: Callable[[Tensor, Tensor], Sequence[Tensor]], audio: Tensor, lengths: Sequence[int], multiple: int
) -> list[Tensor]:
    """The codes of each item, as `encode` computes them for it alone.

    Args:
        encode: from audio (b, 1, T) and the rows (b,) of the batch that it holds, to codes (b, F / stride) per level.
        audio: (B, 1, T); what comes after an item's length is not used.
        lengths: of the items, in samples.
        multiple: to which `encode` pads, in samples.

    Returns:
        codes (B, F / stride) per level, for the longest item; `PADDING` after the codes of a shorter one.
    """
    codes: list[Tensor] = []
    # the longest first, because the result has its number of frames
    for _, rows in sorted(_groups(lengths, multiple).items(), reverse=True):
        longest = max(lengths[row] for row in rows)
        index = torch.tensor(rows, device=audio.device)
        part = audio[index, :, :longest].clone()
        for number, row in enumerate(rows):
            part[number, :, lengths[row] :] = 0
        for level, found in enumerate(encode(part, index)):
            if len(codes) <= level:
                codes.append(found.new_full((audio.shape[0], found.shape[1]), PADDING))
            codes[level][index, : found.shape[1]] = found
    return codes


def decode_each(
    decode: Callable[[list[Tensor], Tensor], Tensor],
    codes: Sequence[Tensor],
    lengths: Sequence[int],
    samples: Sequence[int],
    multiple: int,
) -> Tensor:
    """The audio of each item, as `decode` computes it for the item alone.

    Args:
        decode: from codes (b, F / stride) per level and the rows (b,) of the batch that they hold, to audio (b, 1, T).
        codes: (B, F / stride) per level, as `encode_each` returns them.
        lengths: of the items, in samples.
        samples: per code of each level.
        multiple: to which `encode` pads, in samples.

    Returns:
        (B, 1, T) for the longest item; zeros after a shorter one.
    """
    audio: Tensor | None = None
    for size, rows in _groups(lengths, multiple).items():
        index = torch.tensor(rows, device=codes[0].device)
        found = decode([level[index, : size // each] for level, each in zip(codes, samples, strict=True)], index)
        if audio is None:
            audio = found.new_zeros((len(lengths), 1, max(lengths)))
        for number, row in enumerate(rows):
            audio[row, :, : lengths[row]] = found[number, :, : lengths[row]]
    assert audio is not None
    return audio


def _groups(lengths: Sequence[int], multiple: int) -> dict[int, list[int]]:
    """Padded length in samples to the rows of the batch that have it."""
    groups: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        groups.setdefault(-(-length // multiple) * multiple, []).append(row)
    return groups
