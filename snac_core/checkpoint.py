"""Strategies on disk: safetensors, and a config.json that names the base and the speaker encoder they belong to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from snac_core import hub
from snac_core.codec import SNAC
from snac_core.codec.pretrained import ASSETS, bundled
from snac_core.conditioning import EncoderIdentity
from snac_core.errors import UserError, nearest
from snac_core.files import parse_json, tensor_digest, write_bytes, write_json, write_text
from snac_core.model_card import strategies_card
from snac_core.settings import describe as reason_of
from snac_core.strategy import DISCRIMINATOR, Strategy

FORMAT = 1
WEIGHTS = "model.safetensors"
CONFIG = "config.json"


def bundled_adapters() -> list[str]:
    """Names of the strategies with weights that are part of this package, for `ConditionedCodec.from_pretrained`."""
    return sorted(path.parent.name for path in ASSETS.glob(f"*/{CONFIG}") if '"strategies"' in path.read_text())


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


class Description(BaseModel):
    """The content of config.json, from which a model is rebuilt.

    Attributes:
        format: version of this layout.
        base: name, revision on the hub and digest of the codec.
        speaker_encoder: as in `EncoderIdentity`; None without strategies.
        strategies: name, settings and defining module of each strategy, in listed order.
        evaluation: figures of a judge, and the digest of the weights that they were measured on.
    """

    format: int
    base: _Base
    speaker_encoder: _Encoder | None
    strategies: list[_Strategy]
    evaluation: _Evaluation | None = None

    @classmethod
    def of(
        cls,
        codec: SNAC,
        encoder: EncoderIdentity | None,
        strategies: Mapping[str, Strategy],
        evaluation: Mapping[str, Any] | None,
    ) -> Self:
        """Describe a model; an `evaluation` of other weights than these is left out."""
        if evaluation and evaluation["weights"] != digest_of(strategies):
            evaluation = None
        values = {
            "format": FORMAT,
            "base": {"name": codec.name, "revision": codec.revision, "digest": codec.digest},
            "speaker_encoder": asdict(encoder) if encoder else None,
            "strategies": [
                {"name": name, "config": strategy.config.model_dump(mode="json"), "module": type(strategy).__module__}
                for name, strategy in strategies.items()
            ],
            "evaluation": evaluation,
        }
        return cls.model_validate(values)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read config.json.

        Raises:
            UserError: for a file that is missing, damaged, of another format, or something else.
        """
        try:
            stored = parse_json(path.read_text())
            if isinstance(stored, dict) and "format" in stored and stored["format"] != FORMAT:
                raise UserError(f"{path} has format {stored['format']!r}; this version reads {FORMAT}")
            return cls.model_validate(stored)
        except ValidationError as error:
            raise UserError(f"{path} is not a config of strategies: {reason_of(error):.200}") from error
        except (OSError, ValueError) as error:
            raise UserError(f"{path} is not a config of strategies: {error}") from error

    @property
    def encoder(self) -> EncoderIdentity | None:
        """The speaker encoder that the strategies were trained with."""
        return EncoderIdentity(**self.speaker_encoder.model_dump()) if self.speaker_encoder else None


@dataclass(frozen=True)
class Stored:
    """Saved strategies, before their tensors are read.

    Attributes:
        source: folder or hub id, for messages.
        description: the content of config.json.
        weights: path of the safetensors file.
        options: of the hub, also for the base where that comes from the hub.
    """

    source: str
    description: Description
    weights: Path
    options: Mapping[str, Any]

    @classmethod
    def find(cls, name_or_folder: str | Path, **options: Any) -> Self:
        """Open a folder that `save_pretrained` wrote, or that of a run, or fetch the files of a hub id.

        Raises:
            UserError: for a missing or damaged file.
        """
        config, weights = _files(name_or_folder, options)
        return cls(str(name_or_folder), Description.read(config), weights, options)

    def base(self, codec: SNAC | str | Path | None) -> SNAC:
        """The base that the strategies were trained on: `codec` if given, else the one that they name.

        Of a base from a local folder only the folder's name is known, so it must be given on another machine.

        Raises:
            UserError: if the base is not known here, or has another digest.
        """
        stored = self.description.base
        name, digest = stored.name, stored.digest
        remedy = "give it: from_pretrained(..., codec=FOLDER), or --base FOLDER"
        if codec is None:
            local, on_hub = Path(name).is_dir(), hub.is_hub_id(name)
            if not name:
                raise UserError(f"{self.source} was trained on an unnamed base; {remedy}")
            if not (name in bundled() or on_hub or local):
                raise UserError(
                    f"{self.source} was trained on base {name!r} (digest {digest[:12]}), a folder elsewhere; {remedy}"
                )
            options = {**self.options, "revision": stored.revision} if on_hub and not local else {}
            codec = SNAC.from_pretrained(name, **options)
        elif not isinstance(codec, SNAC):
            codec = SNAC.from_pretrained(codec)
        if codec.digest != digest:
            raise UserError(
                f"{self.source} belongs to base {name or 'unnamed'!r} with digest {digest[:12]}; "
                f"got a base with digest {codec.digest[:12]}"
            )
        return codec


def save_strategies(folder: Path, strategies: Mapping[str, Strategy], description: Description) -> None:
    """Write weights, config and a model card of strategies; discriminators are left out.

    Args:
        folder: created if missing.
        strategies: by name.
        description: of their model.
    """
    # Weights first: a full disk refuses them, and then the files of an earlier save stay complete.
    write_bytes(folder / WEIGHTS, save(state_of(strategies), metadata={"format": "pt"}))
    described = description.model_dump()
    count = sum(parameter.numel() for strategy in strategies.values() for _, parameter in strategy.adapted_parameters())
    write_json(folder / CONFIG, described)
    write_text(folder / "README.md", strategies_card(described, count))


def state_of(strategies: Mapping[str, Strategy]) -> dict[str, Tensor]:
    """`<strategy>.<tensor>` to tensor, copied to the CPU: parameters and buffers without those of discriminators."""
    return {
        key: value.detach().cpu().clone(memory_format=torch.contiguous_format)  # a tied tensor is stored twice
        for key, value in _tensors(strategies).items()
    }


def load_state(strategies: Mapping[str, Strategy], state: Mapping[str, Tensor], source: str) -> None:
    """Copy the tensors of `state_of` back.

    Args:
        strategies: by name.
        state: from `state_of`.
        source: where it comes from, for messages.

    Raises:
        UserError: names the first tensor that is missing, unknown, or of another shape.
    """
    expected = _tensors(strategies)
    for key in sorted(expected.keys() ^ state.keys()):
        raise UserError(f"{source}: tensor {key!r} is {'missing' if key in expected else 'not of this model'}")
    for key, value in state.items():
        if value.shape != expected[key].shape:
            raise UserError(f"{source}: {key!r} has shape {tuple(value.shape)}; expected {tuple(expected[key].shape)}")
    with torch.no_grad():
        for key, value in state.items():
            expected[key].copy_(value)


def digest_of(strategies: Mapping[str, Strategy]) -> str:
    """sha256 (hex) over the strategies' tensors."""
    return tensor_digest(sorted(state_of(strategies).items()))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, by name. No other format is read, and no pickle is executed.

    Raises:
        UserError: for a missing or damaged file.
    """
    if not path.is_file():
        raise UserError(f"no file {path}; expected the strategies' weights there")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is not a complete safetensors file: {' '.join(str(error).split())}") from error


def _tensors(strategies: Mapping[str, Strategy]) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": value
        for name, strategy in strategies.items()
        for key, value in strategy.state_dict(keep_vars=True).items()
        if key.split(".")[0] != DISCRIMINATOR
    }


def _files(name: str | Path, options: Mapping[str, Any]) -> tuple[Path, Path]:
    """Paths of config and weights: of a bundled name, in a folder, or in the hub's cache."""
    folder = ASSETS / name if isinstance(name, str) and name in bundled_adapters() else Path(name)
    if folder.is_dir():
        of_run = folder / "model"
        folder = of_run if (of_run / CONFIG).is_file() else folder
        return folder / CONFIG, folder / WEIGHTS
    if isinstance(name, Path) or not hub.is_hub_id(name):
        raise UserError(
            f"no folder {name}; expected a folder written by save_pretrained, a hub id like 'me/adapter', or a bundled "
            f"name{nearest(str(name), bundled_adapters())}"
        )
    hub.check_no_path(name)
    config, weights = hub.fetch(name, [CONFIG], [WEIGHTS], **options)
    return config, weights
