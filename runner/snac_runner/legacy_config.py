"""Configuration files of the original phases 3, 4 and 6, in JSON: a table of renames into settings of today.

The table is `original_keys.toml` beside this file. What it cannot say stands here: switches, the weight of the
adversary, which multiplies two others, and the layers of an adapter, which were counted with its heads.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from snac_core.errors import UserError, nearest
from snac_runner.config import ArmSettings, StudySettings

_HERE = {  # keys whose meaning is in this file
    "freeze_base", "lambda_adv", "lambda_fm", "use_stratified_negatives", "use_faiss_hard_negatives",
    "use_formant_shift",
}  # fmt: skip
_TODAY = {*StudySettings.model_fields, *ArmSettings.model_fields}


@cache
def _table() -> dict[str, Any]:
    return tomllib.loads(Path(__file__).with_name("original_keys.toml").read_text())


def _known() -> set[str]:
    table = _table()
    return {*table["renamed"], *table["turns_on"], *table["without_meaning"], *_HERE}


def is_original(values: Mapping[str, Any]) -> bool:
    """Whether these are settings of an original file: any key that only those have."""
    return bool((values.keys() & _known()) - _TODAY)


def translated(values: Mapping[str, Any], where: str) -> tuple[dict[str, Any], list[str]]:
    """Settings of today for one arm and its study, flat, from those of an original file.

    Args:
        values: of the file.
        where: its name, for errors.

    Returns:
        the settings, and a line for each key that has no meaning here or no effect in this file, with the reason.

    Raises:
        UserError: for an unknown key, with the nearest known one; or a value that cannot be what the key means.
    """
    table, found, remarks = _table(), dict[str, Any](), list[str]()
    for key in values:
        if key not in _known() | _TODAY:
            raise UserError(f"{where}: unknown key {key!r}{nearest(key, _known() | _TODAY)}")
    if values.get("freeze_base", True) is not True:
        raise UserError(f"{where}: freeze_base = {values['freeze_base']!r}; the base is always frozen here")
    phase = next(p for p in table["phase"] if not p["known_by"] or values.keys() & set(p["known_by"]))
    strategies, objectives = list(phase["strategies"]), ["voice_conversion"]
    for key, name in table["turns_on"].items():
        if _number(values, key, 0, where) and name not in strategies:
            objectives.append(name)
    found |= {"strategies": strategies, "objectives": objectives, "weights": dict(phase.get("weights", {}))}
    left_out = {key: value for key, value in phase["left_out"].items() if key not in values}
    remarks.append(f"{where}: read as {strategies[0]}{_because(values, phase['known_by'])}")
    remarks += [f"{where}: {key} is not given; the original's {value!r} is used" for key, value in left_out.items()]
    values = {**values, **left_out}
    # keys that stand for several weights first, so that a weight's own key wins, wherever it stands
    for key in sorted(values, key=lambda key: not isinstance(table["renamed"].get(key), list)):
        value = values[key]
        if key in table["without_meaning"]:
            remarks.append(f"{where}: {key} has no meaning here: {table['without_meaning'][key]}")
        elif key not in table["turns_on"] and (owners := _owners(key)) and not owners & {*strategies, *objectives}:
            remarks.append(f"{where}: {key} has no effect: {_not_in_use(owners)}")
        elif key in _TODAY - set(table["renamed"]):
            found[key] = value
        elif key in table["renamed"]:
            _rename(found, key, value, {*strategies, *objectives})
    _finish(found, values, strategies, objectives, where)
    if strata := _idle_strata(found, values):
        remarks.append(f"{where}: {', '.join(strata)}: no effect without use_stratified_negatives")
    return found, remarks


def _because(values: Mapping[str, Any], known_by: list[str]) -> str:
    """By which keys a phase was recognised."""
    found = [key for key in known_by if key in values]
    return f", because of {', '.join(found)}" if found else ", because it has no key of another phase"


def _number(values: Mapping[str, Any], key: str, default: float, where: str) -> float:
    """A number, or a switch, of the file."""
    value = values.get(key, default)
    if not isinstance(value, int | float):
        raise UserError(f"{where}: {key} = {value!r}; expected a number, or true or false")
    return value


def _places(key: str) -> list[str]:
    """Where a key's value goes: `setting`, `strategy.setting` or `weights.strategy/term`; none for other keys."""
    places = _table()["renamed"].get(key, [])
    return [places] if isinstance(places, str) else places


def _owner(place: str) -> str | None:
    """The strategy or objective that a place belongs to; None for one of the arm or the study."""
    head, _, rest = place.partition(".")
    return (rest.partition("/")[0] if head == "weights" else head) if rest else None


def _owners(key: str) -> set[str]:
    """The strategies and objectives that a key is a setting of; none for one of the arm or the study."""
    owners = {_table()["only_with"].get(key), *map(_owner, _places(key))}
    return {owner for owner in owners if owner is not None}


def _not_in_use(owners: set[str]) -> str:
    """Why settings of these do nothing, and which key would change that."""
    keys = [key for key, name in _table()["turns_on"].items() if name in owners]
    how = f"; {keys[0]} turns it on" if keys else ""
    return f"it is of {' and '.join(sorted(owners))}, which this file does not use{how}"


def _idle_strata(found: Mapping[str, Any], values: Mapping[str, Any]) -> list[str]:
    """Keys about strata of negatives, where negatives are drawn without strata."""
    settings = found.get(_table()["turns_on"]["contrastive_weight"], {})
    if "strata" not in settings or settings.get("negatives") == "stratified":
        return []
    return [key for key in values if any(".strata." in place for place in _places(key))]


def _rename(found: dict[str, Any], key: str, value: Any, used: set[str]) -> None:
    """Put a value where its key points to, in the strategies that are used."""
    table = _table()
    if isinstance(value, str):
        value = table["values"].get(key, {}).get(value, value)
    for place in _places(key):
        owner, (head, _, rest) = _owner(place), place.partition(".")
        if owner is not None and owner not in used:
            continue  # one of several places, e.g. of synthetic_vc beside voice_conversion
        if head == "weights":
            found.setdefault("weights", {})[rest] = value
            continue
        *above, last = place.split(".")
        inner = found
        for part in above:
            inner = inner.setdefault(part, {})
        inner[last] = value


def _finish(
    found: dict[str, Any], values: Mapping[str, Any], strategies: list[str], objectives: list[str], where: str
) -> None:
    """What more than one key decides."""
    contrastive, synthetic, adversary = _table()["turns_on"].values()
    if contrastive in strategies + objectives:
        settings = found.setdefault(contrastive, {})
        settings |= {"path": contrastive in strategies, "batch_negatives": False, "source_negative": False}
        if "contrastive_margin" in values:
            settings["form"] = "margin"
        if values.get("use_stratified_negatives") or values.get("use_faiss_hard_negatives"):
            settings["negatives"] = "stratified"
    if synthetic in objectives:
        settings = found.setdefault(synthetic, {})
        settings["equaliser_db"] = 0.0
        if not values.get("use_formant_shift", True):
            settings["formants"] = []
    if adversary in objectives:
        found.setdefault("betas", [0.5, 0.9])
        whole, weights = _number(values, "gan_weight", 1, where), found.setdefault("weights", {})
        weights[f"{adversary}/adv"] = whole * _number(values, "lambda_adv", 1, where)
        weights[f"{adversary}/features"] = whole * _number(values, "lambda_fm", 2, where)
    layers = values.get("adapter_num_layers")
    if isinstance(layers, int):
        if layers < 2:
            raise UserError(f"{where}: adapter_num_layers = {layers}; it counts the heads too, so at least 2")
        found[strategies[0]]["num_layers"] = layers - 1
