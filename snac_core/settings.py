"""Validation of settings with errors in one line, and descriptions of settings for help texts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from snac_core.errors import UserError, nearest


def checked(model: type[BaseModel], values: Mapping[str, Any], where: str) -> Any:
    """`model(**values)`.

    Raises:
        UserError: names the first invalid key, the value, and what is expected.
    """
    unknown = [key for key in values if key not in model.model_fields]
    if unknown and model.model_config.get("extra") == "forbid":
        raise UserError(f"unknown setting {unknown[0]!r} of {where}{nearest(unknown[0], model.model_fields)}")
    try:
        return model(**values)
    except ValidationError as error:
        raise UserError(f"{where}: {describe(error)}") from error


def validated(strategy: Any, values: Mapping[str, Any] | BaseModel) -> Any:
    """The `Config` of a strategy class from plain values; an instance of it is returned unchanged."""
    if isinstance(values, strategy.Config):
        return values
    if isinstance(values, BaseModel):
        raise UserError(
            f"settings of {strategy.name!r} are a {type(values).__qualname__}; expected {strategy.name}.Config"
        )
    return checked(strategy.Config, values, f"{strategy.name!r}")


def describe(error: ValidationError) -> str:
    """The first problem of a pydantic error in one line: key, value, and what is expected."""
    first = error.errors()[0]
    if not first["loc"]:
        return first["msg"].removeprefix("Value error, ")
    key = ".".join(str(part) for part in first["loc"])
    return f"{key} = {first['input']!r}: {first['msg'].removeprefix('Value error, ')}"


def stated(key: str, field: FieldInfo) -> str:
    """One setting in a line: `kernel = 5 (int, >= 1): Frames that one convolution sees.`"""
    return f"{key} = {default_of(field)} ({accepted(field)}): {field.description or ''}"


def default_of(field: FieldInfo) -> str:
    """The default, as written in a study file."""
    return json.dumps(field.get_default(call_default_factory=True), ensure_ascii=False, default=str)


def accepted(field: FieldInfo) -> str:
    """The valid values of a setting, in words: `int, >= 1`, `"conv" | "film"`, `list of str, at least 1`."""
    return ", ".join([_kind(field.annotation), *(_limit(limit) for limit in field.metadata)])


_BOUNDS = {"ge": ">= {}", "gt": "> {}", "le": "<= {}", "lt": "< {}", "multiple_of": "a multiple of {}",
           "min_length": "at least {}", "max_length": "at most {}", "pattern": "matching {}"}  # fmt: skip


def _limit(limit: Any) -> str:
    known = [words.format(getattr(limit, name)) for name, words in _BOUNDS.items() if hasattr(limit, name)]
    return " and ".join(known) or str(limit)


def _kind(annotation: Any) -> str:
    if annotation is NoneType:
        return "nothing"
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        limits = [limit for note in arguments[1:] for limit in getattr(note, "metadata", ())]
        return ", ".join([_kind(arguments[0]), *(_limit(limit) for limit in limits)])
    if origin is Literal:
        return " | ".join(json.dumps(choice) for choice in arguments)
    if annotation is bool:
        return "true | false"
    if origin in (tuple, list, set, frozenset):
        items = [argument for argument in arguments if argument is not Ellipsis]
        return f"list of {_kind(items[0])}" + (f", {len(items)} of them" if len(items) > 1 else "")
    if origin is dict:
        return f"table of {_kind(arguments[1])}"
    if arguments:
        return " or ".join(_kind(argument) for argument in arguments)
    return getattr(annotation, "__name__", str(annotation))
