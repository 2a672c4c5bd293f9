"""config.json of saved strategies: what must be in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from snac_core.errors import UserError
from snac_core.settings import describe as reason_of

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
