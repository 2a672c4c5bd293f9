"""Files of codes: .safetensors, .npz, or .jsonl (JSON lines, one item a line).

All three hold the same: the codes of each level, or one sequence of tokens, and a description of the item.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from snac_core.codec import SNAC
from snac_core.codec.checks import check_codes
from snac_core.codec.tokens import TokenLayout
from snac_core.errors import UserError
from snac_core.files import parse_json, write_bytes, writing

CODE_SUFFIXES = (".safetensors", ".npz", ".jsonl")
_FORMAT = "snac-codes 1"
_LAYOUT = ("order", "offsets", "first_token")


@dataclass(frozen=True)
class Item:
    """The codes of one recording.

    Attributes:
        codes: (1, F / stride) per level, coarse first.
        length: of the audio, in samples.
        base: digest of the codec.
        source: path of the recording; "" if it is not known.
    """

    codes: list[Tensor]
    length: int
    base: str
    source: str = ""

    def packed(self, layout: TokenLayout | None) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors (1, N), "codes_<level>" or, in a layout, "tokens"; and the description, as strings."""
        about = {"format": _FORMAT, "base": self.base, "length": str(self.length), "source": self.source}
        if layout is None:
            return {f"codes_{level}": indices.cpu() for level, indices in enumerate(self.codes)}, about
        about |= {key: str(getattr(layout, key)) for key in _LAYOUT}
        return {"tokens": layout.flatten(self.codes).cpu()}, about

    @classmethod
    def unpacked(cls, tensors: Mapping[str, Tensor], about: Mapping[str, str], codec: SNAC) -> Item:
        """From tensors and description.

        Raises:
            UserError: for codes of another base, or tokens that are not whole frames of the stated layout.
            KeyError, ValueError: for a file of another content.
        """
        if about["format"] != _FORMAT:
            raise ValueError(f"format {about['format']!r}; expected {_FORMAT!r}")
        length, base = int(about["length"]), about["base"]
        if base != codec.digest:
            raise UserError(f"was encoded with a base of digest {base[:12]}; this one has {codec.digest[:12]}")
        if "tokens" in tensors:
            order, offsets, first = (about[key] for key in _LAYOUT)
            codes = codec.token_layout(order, offsets=offsets, first_token=int(first)).unflatten(tensors["tokens"])
        else:
            codes = [tensors[f"codes_{level}"].reshape(1, -1).long() for level in range(len(tensors))]
        check_codes(codes, codec.vq_strides, codec.codebook_size, codec.attn_window_size)  # on the CPU
        return cls(codes, length, base, about.get("source", ""))


def check_suffix(path: Path) -> None:
    """Raise UserError unless `path` has the suffix of a file of codes."""
    if path.suffix.lower() not in CODE_SUFFIXES:
        raise UserError(f"--out {path}: expected a name that ends in {', '.join(CODE_SUFFIXES)}")


def write_items(path: Path, items: Iterable[Item], layout: TokenLayout | None = None) -> None:
    """Write items to a file; more than one only to .jsonl.

    Args:
        path: of the file; its suffix is the format.
        items: in order.
        layout: in which codes are written as tokens; None: as levels.
    """
    packed = (item.packed(layout) for item in items)
    if path.suffix.lower() == ".jsonl":
        with writing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            for tensors, about in packed:
                line: dict[str, Any] = {**about, "length": int(about["length"])}
                if "first_token" in line:
                    line["first_token"] = int(line["first_token"])
                line |= {key: tensor[0].tolist() for key, tensor in tensors.items()}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        return
    ((tensors, about),) = packed
    small = {key: tensor.to(torch.int32).contiguous() for key, tensor in tensors.items()}
    if path.suffix.lower() == ".npz":
        with writing(path) as temporary, temporary.open("wb") as binary:
            arrays = {key: tensor.numpy() for key, tensor in small.items()}
            np.savez(binary, **arrays, **{key: np.array(value) for key, value in about.items()})  # type: ignore[arg-type]
    else:
        write_bytes(path, save(small, metadata=about))


def read_item(path: Path, codec: SNAC, line: int | None = None) -> Item:
    """One item of a file of codes.

    Args:
        path: of the file.
        codec: whose codes they are.
        line: of a .jsonl file, from 1; None: its only one.

    Raises:
        UserError: for a damaged file, codes of another base, or a line that is missing or not given.
    """
    reader: Callable[[], tuple[dict[str, Tensor], dict[str, str]]]
    reader = {".jsonl": lambda: _read_line(path, line), ".npz": lambda: _read_npz(path)}.get(
        path.suffix.lower(), lambda: _read_safetensors(path)
    )
    if line is not None and path.suffix.lower() != ".jsonl":
        raise UserError(f"--line {line}: only .jsonl files have lines; got {path}")
    try:
        return Item.unpacked(*reader(), codec)
    except UserError as error:
        raise UserError(f"{path}: {error}" if str(path) not in str(error) else str(error)) from error
    except Exception as error:  # numpy, zipfile and torch raise many kinds for a damaged file
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path} is not a file of codes as `runner encode` writes it ({reason})") from error


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def _read_npz(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with path.open("rb") as stream, np.load(stream) as file:  # numpy leaves a damaged file open that it opened itself
        arrays = {key: file[key] for key in file.files}
    tensors = {key: torch.from_numpy(value) for key, value in arrays.items() if value.dtype.kind in "iu"}
    return tensors, {key: str(value) for key, value in arrays.items() if key not in tensors}


def _read_line(path: Path, line: int | None) -> tuple[dict[str, Tensor], dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        lines = [text for text in file if text.strip()]
    if line is None and len(lines) != 1:
        raise UserError(f"{path} has {len(lines)} items; choose one with --line 1 to {len(lines)}")
    if line is not None and not 0 < line <= len(lines):
        raise UserError(f"{path} has no line {line}; expected 1 to {len(lines)}")
    values = parse_json(lines[(line or 1) - 1])
    tensors = {key: torch.tensor(value) for key, value in values.items() if isinstance(value, list)}
    return tensors, {key: str(value) for key, value in values.items() if key not in tensors}
