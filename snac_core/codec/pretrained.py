"""Files of a codec on disk, in the package and on the hub, and the configurations of the released models."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from snac_core import hub
from snac_core.errors import UserError, nearest
from snac_core.files import parse_json, write_bytes, write_json

_ATTENTIVE: dict[str, Any] = {
    "encoder_dim": 64,
    "encoder_rates": [2, 3, 8, 8],
    "decoder_dim": 1536,
    "decoder_rates": [8, 8, 3, 2],
    "attn_window_size": 32,
    "codebook_size": 4096,
    "codebook_dim": 8,
    "vq_strides": [8, 4, 2, 1],
    "noise": True,
    "depthwise": True,
}

# The arguments of the released models are those of hubertsiuzdak/snac, issue 17.
PRESETS: dict[str, dict[str, Any]] = {
    "snac_24khz": {
        "sampling_rate": 24000,
        "encoder_dim": 48,
        "encoder_rates": [2, 4, 8, 8],
        "decoder_dim": 1024,
        "decoder_rates": [8, 8, 4, 2],
        "attn_window_size": None,
        "codebook_size": 4096,
        "codebook_dim": 8,
        "vq_strides": [4, 2, 1],
        "noise": True,
        "depthwise": True,
    },
    "snac_32khz": {"sampling_rate": 32000, **_ATTENTIVE},
    "snac_44khz": {"sampling_rate": 44100, **_ATTENTIVE},
}


ASSETS = Path(__file__).parent.parent / "assets"
CONFIG, SAFETENSORS, PICKLED = "config.json", "model.safetensors", "pytorch_model.bin"


def bundled() -> list[str]:
    """Names of the codecs that are part of this package."""
    return sorted(path.parent.name for path in ASSETS.glob(f"*/{CONFIG}") if "encoder_rates" in path.read_text())


@dataclass(frozen=True)
class CodecFiles:
    """Where a codec's files are.

    Attributes:
        config, weights: paths on this machine.
        name: what the codec is called from now on: the hub id, or the last part of a folder's path.
        revision: commit on the hub; None for a folder.
    """

    config: Path
    weights: Path
    name: str
    revision: str | None

    @classmethod
    def find(cls, name_or_folder: str | Path, *, revision: str | None = None, **options: Any) -> CodecFiles:
        """Files of a bundled name, a folder, or a hub id; see `SNAC.from_pretrained`."""
        name = name_or_folder
        folder = ASSETS / name if isinstance(name, str) and name in bundled() else Path(name)
        if folder.is_dir():
            if revision is not None:
                raise UserError(
                    f"revision {revision!r} of {str(name)!r}, which is a local folder; only hub ids have them"
                )
            return cls(*_files_of(folder), folder.resolve().name, None)
        config, weights = _fetch(str(name), {"revision": revision, **options})
        return cls(config, weights, str(name), hub.commit_of(weights))


def read_config(config: Mapping[str, Any] | str | Path, arguments: Collection[str]) -> dict[str, Any]:
    """Constructor arguments from a mapping, a preset's name or a JSON file.

    Args:
        config: one of the three.
        arguments: names that the constructor accepts.

    Raises:
        UserError: for a missing or damaged file, or a key that is not among `arguments`.
    """
    if isinstance(config, Mapping):
        values, where = dict(config), "config"
    elif isinstance(config, str) and config in PRESETS:
        return dict(PRESETS[config])
    else:
        where = str(config)
        if not Path(config).exists():
            raise UserError(f"no file {config}; expected a codec's config.json or a preset{nearest(where, PRESETS)}")
        try:
            values = parse_json(Path(config).read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{config} is not a JSON file: {error}; expected SNAC's constructor arguments") from error
        if not isinstance(values, dict):
            raise UserError(f"{config} holds a {type(values).__name__}; expected an object of SNAC's arguments")
    for key in values:
        if key not in arguments:
            raise UserError(f"{where}: SNAC has no argument {key!r}{nearest(key, arguments)}")
    return values


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, or of a torch file with `weights_only`: no pickle is executed.

    Raises:
        UserError: for a damaged file, or one with other content.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise UserError(
            f"{path} is truncated, or holds pickled objects other than tensors, which are never executed; "
            f"expected a state dict"
        ) from error
    except (SafetensorError, OSError, EOFError, RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} holds no readable weights (truncated, or another format): {reason}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} is not a state dict; expected tensors by name")
    return state


def save_codec(folder: Path, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Write config.json and model.safetensors, each as a whole or not at all.

    Raises:
        UserError: if `folder` is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; expected a folder to write {CONFIG} and {SAFETENSORS} into")
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    write_bytes(folder / SAFETENSORS, save(tensors, metadata={"format": "pt"}))
    write_json(folder / CONFIG, dict(config))


def load_weights(codec: nn.Module, path: Path) -> None:
    """Load the tensors of the file `path` into `codec`.

    Raises:
        UserError: names the first tensor that is missing, unknown, of another shape, or not finite.
    """
    state, expected = read_weights(path), codec.state_dict()
    for key in [*(k for k in expected if k not in state), *(k for k in state if k not in expected)]:
        if key in expected:
            raise UserError(f"{path}: tensor {key!r} is missing; {len(expected)} are expected, {len(state)} are there")
        raise UserError(f"{path}: tensor {key!r} is not of this configuration{nearest(key, expected)[:200]}")
    for key, value in state.items():
        if value.shape != expected[key].shape:
            raise UserError(f"{path}: {key!r} has shape {tuple(value.shape)}; expected {tuple(expected[key].shape)}")
        if not bool(torch.isfinite(value).all()):
            raise UserError(f"{path}: {key!r} holds NaN or infinity; expected finite weights")
    codec.load_state_dict(state)


def _files_of(folder: Path) -> tuple[Path, Path]:
    for weights in (folder / SAFETENSORS, folder / PICKLED):
        if weights.is_file() and (folder / CONFIG).is_file():
            return folder / CONFIG, weights
    missing = f"{SAFETENSORS} or {PICKLED}" if (folder / CONFIG).is_file() else CONFIG
    raise UserError(f"{folder} has no {missing}; expected {CONFIG} and weights, as save_pretrained writes them")


def _fetch(name: str, options: dict[str, Any]) -> tuple[Path, Path]:
    if not hub.is_hub_id(name):
        known = [*bundled(), *(f"hubertsiuzdak/{preset}" for preset in PRESETS)]
        raise UserError(f"no codec {name!r}: neither a folder, nor a bundled name, nor a hub id{nearest(name, known)}")
    hub.check_no_path(name)
    try:
        config, weights = hub.fetch(name, [CONFIG], [SAFETENSORS, PICKLED], **options)
    except UserError as error:
        raise UserError(f"{error}; bundled: {', '.join(bundled())}") from error
    return config, weights
