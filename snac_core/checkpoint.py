"""Strategies on disk: safetensors and a config that names the base and the speaker encoder they belong to."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from snac_core import atomic
from snac_core.codec import SNAC
from snac_core.errors import UserError
from snac_core.plugins import Catalogue, discover
from snac_core.settings import describe as reason_of
from snac_core.speakers.encoder import SpeakerEncoder

if TYPE_CHECKING:
    from snac_core.conditioned import ConditionedCodec

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
FORMAT = 1


def save_strategies(model: ConditionedCodec, folder: Path) -> None:
    """Write weights, config and a model card of `model`'s strategies into `folder`; critics are left out."""
    # weights first: they are what a full disk refuses, and then what was saved before stays whole
    atomic.write_bytes(folder / WEIGHTS, save(state_of(model), metadata={"format": "pt"}))
    atomic.write_json(folder / CONFIG, describe(model))
    atomic.write_text(folder / "README.md", model_card(model))


def state_of(model: ConditionedCodec) -> dict[str, Tensor]:
    """`<strategy>.<tensor>` to tensor: parameters and buffers of the strategies, critics left out."""
    return {
        f"{name}.{key}": value.detach().cpu().clone(memory_format=torch.contiguous_format)  # tied tensors come apart
        for name, strategy in model.attached.items()
        for key, value in strategy.state_dict().items()
        if key.split(".")[0] != "critic"
    }


def load_state(model: ConditionedCodec, state: dict[str, Tensor], source: str) -> None:
    """Put `state_of` tensors back; raises UserError naming the first tensor that is missing, foreign or misshapen."""
    expected = {
        f"{name}.{key}": value
        for name, strategy in model.attached.items()
        for key, value in strategy.state_dict(keep_vars=True).items()
        if key.split(".")[0] != "critic"
    }
    for key in sorted(expected.keys() ^ state.keys()):
        raise UserError(f"{source}: tensor {key!r} is {'missing' if key in expected else 'not of this model'}")
    for key, value in state.items():
        if value.shape != expected[key].shape:
            raise UserError(f"{source}: {key!r} has shape {tuple(value.shape)}; expected {tuple(expected[key].shape)}")
    with torch.no_grad():
        for key, value in state.items():
            expected[key].copy_(value)


def describe(model: ConditionedCodec) -> dict[str, Any]:
    """The JSON-able description from which the model is rebuilt."""
    encoder = model.encoder
    return {
        "format": FORMAT,
        "base": {"name": model.codec.name, "digest": model.codec.digest},
        "speaker_encoder": encoder and {"name": encoder.name, "dim": encoder.dim, "digest": encoder.digest},
        "strategies": [
            {"name": name, "config": strategy.config.model_dump(mode="json"), "module": type(strategy).__module__}
            for name, strategy in model.attached.items()
        ],
    }


def load_strategies(
    cls: type[ConditionedCodec],
    name_or_folder: str | Path,
    *,
    codec: SNAC | None,
    plugins: Catalogue | None,
    speaker_encoder: SpeakerEncoder | None = None,
    **options: Any,
) -> ConditionedCodec:
    """Rebuild a model from a folder or a hub id. Hub options: `revision`, `token`, `local_files_only`.

    Raises:
        UserError: for a missing or damaged file, another base than the weights were trained on, another speaker
            encoder, or a strategy that no installed plugin offers.
    """
    folder = _folder(name_or_folder, options)
    stored = _config(folder)
    base = stored["base"]
    if codec is None:
        if not base["name"]:
            raise UserError(f"{folder} was trained on an unnamed base; give it: from_pretrained(..., codec=codec)")
        codec = SNAC.from_pretrained(base["name"])
    if codec.digest != base["digest"]:
        raise UserError(
            f"{folder} belongs to base {base['name'] or 'unnamed'!r} with digest {base['digest'][:12]}; "
            f"got a base with digest {codec.digest[:12]}"
        )
    encoder = stored["speaker_encoder"]
    if speaker_encoder is not None and encoder and encoder["digest"] not in (None, speaker_encoder.digest):
        raise UserError(
            f"{folder} is conditioned with {encoder['name']!r}, digest {encoder['digest'][:12]}; "
            f"got {speaker_encoder.name!r}, digest {speaker_encoder.digest[:12]}"
        )
    catalogue = plugins or discover()
    for strategy in stored["strategies"]:
        if strategy["name"] not in catalogue.strategies:
            raise UserError(
                f"{folder} needs strategy {strategy['name']!r} from module {strategy['module']!r}, which no plugin "
                f"here offers; install its plugin or name its file (--plugin FILE, discover([file]))"
            )
    model = cls(
        codec,
        [strategy["name"] for strategy in stored["strategies"]],
        speaker_dim=encoder["dim"] if encoder else None,
        config={strategy["name"]: strategy["config"] for strategy in stored["strategies"]},
        plugins=catalogue,
    )
    if encoder:
        model.encoder = type(model.encoder)(**encoder)  # type: ignore[misc]
    load_state(model, read_tensors(folder / WEIGHTS), str(folder / WEIGHTS))
    return model.eval()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; no other format is read, and no pickle is ever executed."""
    if not path.is_file():
        raise UserError(f"no file {path}; expected the strategies' weights there")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is no whole safetensors file: {' '.join(str(error).split())}") from error


def push_strategies(model: ConditionedCodec, repo_id: str, **options: Any) -> str:
    """Upload a model's folder; creates the repository where it is missing. Returns its address."""
    api = HfApi(token=options.pop("token", None))
    private = options.pop("private", None)
    with tempfile.TemporaryDirectory() as folder:
        save_strategies(model, Path(folder))
        repository = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload strategies", **options)
    return str(repository)


def model_card(model: ConditionedCodec) -> str:
    """A README.md for a hub page: what it is, what it belongs to, how to load it."""
    described = describe(model)
    encoder = described["speaker_encoder"] or {"name": "none", "digest": None}
    base = described["base"]
    rows = "\n".join(
        f"| `{s['name']}` | `{json.dumps(s['config'], sort_keys=True)}` |" for s in described["strategies"]
    )
    count = sum(parameter.numel() for _, parameter in model.trained_parameters())
    return f"""---
library_name: snac-conditioning
tags: [neural-audio-codec, snac, voice-conversion]
base_model: {base["name"] or "unnamed"}
---
# {" + ".join(model.strategies) or "no strategy"} on {base["name"] or "an unnamed base"}

Conditioning strategies for a frozen SNAC codec: {count:,} parameters. The base is not included.

| strategy | settings |
|---|---|
{rows}

| belongs to | name | sha256 |
|---|---|---|
| base | {base["name"] or "unnamed"} | `{base["digest"]}` |
| speaker encoder | {encoder["name"]} | `{encoder["digest"]}` |

```python
from snac_core import ConditionedCodec

model = ConditionedCodec.from_pretrained("this folder or repository")
```
"""


def _folder(name: str | Path, options: dict[str, Any]) -> Path:
    folder = Path(name)
    if folder.is_dir():
        return folder
    if isinstance(name, Path) or str(name).startswith((".", "/", "~")) or str(name).count("/") != 1:
        raise UserError(
            f"no folder {name}; expected a folder written by save_pretrained, or a hub id like 'me/adapter'"
        )
    try:
        return Path(snapshot_download(str(name), allow_patterns=[CONFIG, WEIGHTS], **options))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(f"cannot fetch {name!r} from the hub: {' '.join(str(error).split())}") from error


def _config(folder: Path) -> dict[str, Any]:
    try:
        stored = json.loads((folder / CONFIG).read_text())
        if isinstance(stored, dict) and "format" in stored and stored["format"] != FORMAT:
            raise UserError(f"{folder / CONFIG} has format {stored['format']!r}; this version reads {FORMAT}")
        return _Stored.model_validate(stored).model_dump()
    except ValidationError as error:
        raise UserError(f"{folder / CONFIG} is no config of strategies: {reason_of(error)}") from error
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{folder / CONFIG} is no config of strategies: {error}") from error


class _Base(BaseModel):
    name: str
    digest: str


class _Encoder(BaseModel):
    name: str
    dim: int
    digest: str | None


class _Strategy(BaseModel):
    name: str
    config: dict[str, Any]
    module: str


class _Stored(BaseModel):
    """What `describe` writes."""

    format: int
    base: _Base
    speaker_encoder: _Encoder | None
    strategies: list[_Strategy]
