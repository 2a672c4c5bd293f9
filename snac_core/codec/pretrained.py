"""Constructor arguments of the released models (hubertsiuzdak/snac, issue 17).

Codecs on disk, in the package, and on the hub."""

from __future__ import annotations

import inspect
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from snac_core import hub
from snac_core.codec.snac import SNAC
from snac_core.errors import UserError, nearest
from snac_core.files import write_bytes, write_json, write_text
from snac_core.model_card import base_card

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

Codec = TypeVar("Codec", bound=SNAC)


def bundled() -> list[str]:
    """Names of the bases that come with the package."""
    return sorted(path.parent.name for path in ASSETS.glob(f"*/{CONFIG}") if "encoder_rates" in path.read_text())


def read_config(config: Mapping[str, Any] | str | Path) -> dict[str, Any]:
    """Constructor arguments from a mapping, a preset's name or a JSON file.

    Raises:
        UserError: for a missing or damaged file, or a key that SNAC does not have.
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
            values = json.loads(Path(config).read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{config} is no JSON file: {error}; expected SNAC's constructor arguments") from error
        if not isinstance(values, dict):
            raise UserError(f"{config} holds a {type(values).__name__}; expected an object of SNAC's arguments")
    known = [name for name in inspect.signature(SNAC.__init__).parameters if name != "self"]
    for key in values:
        if key not in known:
            raise UserError(f"{where}: SNAC has no argument {key!r}{nearest(key, known)}")
    return values


def load_codec(cls: type[Codec], name: str | Path, *, revision: str | None = None, **options: Any) -> Codec:
    """Build a codec and load its weights; see `SNAC.from_pretrained`."""
    folder = ASSETS / name if isinstance(name, str) and name in bundled() else Path(name)
    if folder.is_dir():
        if revision is not None:
            raise UserError(f"revision {revision!r} of {str(name)!r}, which is a local folder; only hub ids have them")
        config, weights = _files_of(folder)
    else:
        config, weights = _fetch(str(name), {"revision": revision, **options})
    with torch.random.fork_rng(devices=[]):  # initial values are thrown away; nobody's stream should move for them
        codec = cls(**read_config(config))
    _load(codec, read_weights(weights), weights)
    # a path means nothing on another machine: of a folder the last part counts, of the hub the commit
    codec.name = folder.resolve().name if folder.is_dir() else str(name)
    codec.revision = None if folder.is_dir() else hub.commit_of(weights)
    return codec


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, or of a torch file by `weights_only`: no pickle is ever executed."""
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
        raise UserError(f"{path} is no state dict; expected tensors by name")
    return state


def save_codec(codec: SNAC, folder: Path) -> None:
    """Write config.json and model.safetensors, each whole or not at all."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; expected a folder to write {CONFIG} and {SAFETENSORS} into")
    state = {key: value.detach().cpu().contiguous() for key, value in codec.state_dict().items()}
    write_bytes(folder / SAFETENSORS, save(state, metadata={"format": "pt"}))
    write_json(folder / CONFIG, codec.config)


def _load(codec: SNAC, state: dict[str, Tensor], path: Path) -> None:
    """Give `codec` the tensors of `state`; raise UserError naming the first that does not fit."""
    expected = codec.state_dict()
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
    try:
        config, weights = hub.fetch(name, [CONFIG], [SAFETENSORS, PICKLED], **options)
    except UserError as error:
        raise UserError(f"{error}; bundled: {', '.join(bundled())}") from error
    return config, weights


def push_codec(codec: SNAC, repo_id: str, **options: Any) -> str:
    """Upload configuration, weights and a model card; see `snac_core.hub.push`. Returns the repository's address."""
    with tempfile.TemporaryDirectory() as folder:
        save_codec(codec, Path(folder))
        write_text(Path(folder) / "README.md", base_card(codec))
        return hub.push(Path(folder), repo_id, **options)
