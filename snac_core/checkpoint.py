"""config.json of saved strategies: what must be in it.

Strategies on disk: safetensors and a config that names the base and the speaker encoder they belong to."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from snac_core import hub
from snac_core.codec import SNAC
from snac_core.codec.pretrained import bundled
from snac_core.errors import UserError
from snac_core.files import tensor_digest, write_bytes, write_json, write_text
from snac_core.model_card import strategies_card
from snac_core.plugins import Catalogue, discover
from snac_core.settings import describe as reason_of
from snac_core.speakers.encoder import SpeakerEncoder

if TYPE_CHECKING:
    from snac_core.conditioned import ConditionedCodec


FORMAT = 1


class _Base(BaseModel):
    name: str
    revision: str | None = None
    digest: str


class _Encoder(BaseModel):
    name: str
    dim: int
    digest: str | None


class _Strategy(BaseModel):
    name: str
    config: dict[str, Any]
    module: str


class _Figure(BaseModel):
    mean: float | None
    n_ok: int
    n: int
    unit: str
    direction: Literal["up", "down"]


class _Evaluation(BaseModel):
    weights: str
    metrics: dict[str, _Figure]
    about: dict[str, str | int | float]


class _Stored(BaseModel):
    """What `describe` writes."""

    format: int
    base: _Base
    speaker_encoder: _Encoder | None
    strategies: list[_Strategy]
    evaluation: _Evaluation | None = None


def read_config(path: Path) -> dict[str, Any]:
    """What `snac_core.checkpoint.describe` wrote.

    Raises:
        UserError: for a file that is missing, damaged, of another format, or something else.
    """
    try:
        stored = json.loads(path.read_text())
        if isinstance(stored, dict) and "format" in stored and stored["format"] != FORMAT:
            raise UserError(f"{path} has format {stored['format']!r}; this version reads {FORMAT}")
        return _Stored.model_validate(stored).model_dump()
    except ValidationError as error:
        raise UserError(f"{path} is no config of strategies: {reason_of(error)}") from error
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no config of strategies: {error}") from error


WEIGHTS = "model.safetensors"
CONFIG = "config.json"


def save_strategies(model: ConditionedCodec, folder: Path) -> None:
    """Write weights, config and a model card of `model`'s strategies into `folder`; discriminators are left out."""
    # weights first: they are what a full disk refuses, and then what was saved before stays whole
    write_bytes(folder / WEIGHTS, save(state_of(model), metadata={"format": "pt"}))
    described = describe(model)
    count = sum(parameter.numel() for _, parameter in model.trained_parameters())
    write_json(folder / CONFIG, described)
    write_text(folder / "README.md", strategies_card(described, count))


def state_of(model: ConditionedCodec) -> dict[str, Tensor]:
    """`<strategy>.<tensor>` to tensor: parameters and buffers of the strategies, discriminators left out."""
    return {
        f"{name}.{key}": value.detach().cpu().clone(memory_format=torch.contiguous_format)  # tied tensors come apart
        for name, strategy in model.attached.items()
        for key, value in strategy.state_dict().items()
        if key.split(".")[0] != "discriminator"
    }


def load_state(model: ConditionedCodec, state: dict[str, Tensor], source: str) -> None:
    """Put `state_of` tensors back; raises UserError naming the first tensor that is missing, foreign or misshapen."""
    expected = {
        f"{name}.{key}": value
        for name, strategy in model.attached.items()
        for key, value in strategy.state_dict(keep_vars=True).items()
        if key.split(".")[0] != "discriminator"
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
    encoder, codec = model.encoder, model.codec
    evaluation = model.evaluation
    if evaluation and evaluation["weights"] != digest_of(model):
        evaluation = None  # figures of other weights than these
    return {
        "format": FORMAT,
        "base": {"name": codec.name, "revision": codec.revision, "digest": codec.digest},
        "speaker_encoder": encoder and {"name": encoder.name, "dim": encoder.dim, "digest": encoder.digest},
        "strategies": [
            {"name": name, "config": strategy.config.model_dump(mode="json"), "module": type(strategy).__module__}
            for name, strategy in model.attached.items()
        ],
        "evaluation": evaluation,
    }


def digest_of(model: ConditionedCodec) -> str:
    """sha256, in hex, over the strategies' tensors."""
    return tensor_digest(sorted(state_of(model).items()))


def load_strategies(
    cls: type[ConditionedCodec],
    name_or_folder: str | Path,
    *,
    codec: SNAC | str | Path | None,
    plugins: Catalogue | None,
    speaker_encoder: SpeakerEncoder | None = None,
    **options: Any,
) -> ConditionedCodec:
    """Rebuild a model from a folder or a hub id. Hub options: `revision`, `token`, `cache_dir`, `local_files_only`.

    Options but the revision hold for the base too, where that comes from the hub.

    Raises:
        UserError: for a missing or damaged file, another base than the weights were trained on, another speaker
            encoder, or a strategy that no installed plugin offers.
    """
    config, weights = _files(name_or_folder, options)
    stored = read_config(config)
    codec = _base(stored["base"], codec, str(name_or_folder), options)
    encoder = stored["speaker_encoder"]
    if speaker_encoder is not None and encoder and encoder["digest"] not in (None, speaker_encoder.digest):
        raise UserError(
            f"{name_or_folder} is conditioned with {encoder['name']!r}, digest {encoder['digest'][:12]}; "
            f"got {speaker_encoder.name!r}, digest {speaker_encoder.digest[:12]}"
        )
    catalogue = plugins or discover()
    for strategy in stored["strategies"]:
        if strategy["name"] not in catalogue.strategies:
            raise UserError(
                f"{name_or_folder} needs strategy {strategy['name']!r} from module {strategy['module']!r}, "
                f"which no plugin here offers; install its plugin or name its file (--plugin FILE, discover([file]))"
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
    load_state(model, read_tensors(weights), str(weights))
    model.evaluation = stored["evaluation"]
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
    """Upload what `save_strategies` writes; see `snac_core.hub.push`. Returns the repository's address."""
    with tempfile.TemporaryDirectory() as folder:
        save_strategies(model, Path(folder))
        return hub.push(Path(folder), repo_id, **options)


def _files(name: str | Path, options: dict[str, Any]) -> tuple[Path, Path]:
    """Paths of config and weights, of a folder or from the hub."""
    folder = Path(name)
    if folder.is_dir():
        return folder / CONFIG, folder / WEIGHTS
    if isinstance(name, Path) or not hub.is_hub_id(name):
        raise UserError(
            f"no folder {name}; expected a folder written by save_pretrained, or a hub id like 'me/adapter'"
        )
    config, weights = hub.fetch(name, [CONFIG], [WEIGHTS], **options)
    return config, weights


def _base(stored: dict[str, Any], codec: SNAC | str | Path | None, source: str, options: dict[str, Any]) -> SNAC:
    """The base that strategies from `source` were trained on: `codec` where given, else as its name says.

    A base that was trained or kept in a folder has that folder's name alone, which says nothing on another machine.
    """
    name, digest = stored["name"], stored["digest"]
    remedy = "give it: from_pretrained(..., codec=FOLDER), or --base FOLDER"
    if codec is None and not name:
        raise UserError(f"{source} was trained on an unnamed base; {remedy}")
    if codec is None and not (name in bundled() or hub.is_hub_id(name) or Path(name).is_dir()):
        raise UserError(f"{source} was trained on base {name!r} (digest {digest[:12]}), a folder elsewhere; {remedy}")
    if codec is None:
        of_hub = {"revision": stored["revision"], **{k: v for k, v in options.items() if k != "revision"}}
        codec = SNAC.from_pretrained(name, **(of_hub if hub.is_hub_id(name) and not Path(name).is_dir() else {}))
    elif not isinstance(codec, SNAC):
        codec = SNAC.from_pretrained(codec)
    if codec.digest != digest:
        raise UserError(
            f"{source} belongs to base {name or 'unnamed'!r} with digest {digest[:12]}; "
            f"got a base with digest {codec.digest[:12]}"
        )
    return codec
