"""Settings of a strategy, checked, with errors in one line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from snac_core.errors import UserError, nearest


def checked(model: type[BaseModel], values: Mapping[str, Any], where: str) -> Any:
    """`model(**values)`; a UserError names the first bad key with what was got and what was expected."""
    unknown = [key for key in values if key not in model.model_fields]
    if unknown and model.model_config.get("extra") == "forbid":
        raise UserError(f"unknown setting {unknown[0]!r} of {where}{nearest(unknown[0], model.model_fields)}")
    try:
        return model(**values)
    except ValidationError as error:
        raise UserError(f"{where}: {describe(error)}") from error


def validated(strategy: Any, values: Mapping[str, Any] | BaseModel) -> Any:
    """The `Config` of a strategy class from plain values (an instance of it passes through)."""
    if isinstance(values, strategy.Config):
        return values
    if isinstance(values, BaseModel):
        raise UserError(
            f"settings of {strategy.name!r} are a {type(values).__qualname__}; expected {strategy.name}.Config"
        )
    return checked(strategy.Config, values, f"{strategy.name!r}")


def describe(error: ValidationError) -> str:
    """The first problem of a pydantic error in one line: key, what was got, what was expected."""
    first = error.errors()[0]
    if not first["loc"]:
        return first["msg"].removeprefix("Value error, ")
    key = ".".join(str(part) for part in first["loc"])
    return f"{key} = {first['input']!r}: {first['msg'].removeprefix('Value error, ')}"
