"""Configuration files of the original phases 3, 4 and 6, in JSON, read as settings of today.

Keys that belong to a strategy are declared by it (`Strategy.legacy_keys`), so plugins can have such keys too. The keys
of the study are in `original_keys.toml`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from snac_core.errors import UserError, nearest
from snac_core.legacy import LegacyKeys, number
from snac_core.plugins import Registry
from snac_runner.config import AUTO, NONE, ArmSettings, StudySettings

_FROZEN = "freeze_base"  # its only possible value is true
_BANK = ("faiss_index_path", "embedding_cache_path")  # paths of what is one folder here, the first one given counts
_BANK_SWITCH = "use_faiss_hard_negatives"
_TODAY = {*StudySettings.model_fields, *ArmSettings.model_fields}


@cache
def _table() -> dict[str, Any]:
    return tomllib.loads(Path(__file__).with_name("original_keys.toml").read_text())


def _keys_of(strategies: Registry) -> dict[str, LegacyKeys]:
    """Strategy name to its legacy keys, in the order of registration."""
    return {name: cls.legacy_keys for name, cls in strategies.classes.items() if cls.legacy_keys is not None}


def _known(keys_of: Mapping[str, LegacyKeys]) -> set[str]:
    own = {key for keys in keys_of.values() for key in keys.keys}
    return {*_table()["renamed"], *_table()["ignored"], _FROZEN, *_BANK, *own}


def is_original(values: Mapping[str, Any], strategies: Registry) -> bool:
    """Whether these are settings of an original file: whether any key is one that only those have.

    Args:
        values: top-level keys of a file.
        strategies: the registered strategies.
    """
    return bool((values.keys() - _TODAY) & _known(_keys_of(strategies)))


def translated(values: Mapping[str, Any], where: str, strategies: Registry) -> tuple[dict[str, Any], list[str]]:
    """Settings of today, for one arm and its study, from those of an original file.

    Args:
        values: of the file.
        where: name of the file, for errors.
        strategies: the registered strategies.

    Returns:
        the settings in one flat mapping, and a line for each key that has no meaning here or no effect in this file.

    Raises:
        UserError: for an unknown key, with the nearest known one, and for a value that cannot be what the key means.
    """
    try:
        return _translated(values, where, _keys_of(strategies))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


def _translated(
    values: Mapping[str, Any], where: str, keys_of: Mapping[str, LegacyKeys]
) -> tuple[dict[str, Any], list[str]]:
    table, known = _table(), _known(keys_of) | _TODAY
    for key in values:
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}{nearest(key, known)}")
    if values.get(_FROZEN, True) is not True:
        raise UserError(f"{where}: {_FROZEN} = {values[_FROZEN]!r}; the base is always frozen here")
    adapter = _adapter(values, keys_of, where)
    objectives = _objectives(values, keys_of, adapter)
    used = {adapter: keys_of[adapter], **{name: keys_of[name] for name in objectives if name in keys_of}}
    found: dict[str, Any] = {"strategies": [adapter], "objectives": objectives, "weights": {}}
    defaults = {**keys_of[adapter].defaults, **table["defaults"]}
    missing = {key: value for key, value in defaults.items() if key not in values}
    remarks = [f"{where}: read as {adapter}{_because(values, keys_of[adapter])}"]
    remarks += [f"{where}: {key} is not given; the original's {value!r} is used" for key, value in missing.items()]
    values = {**values, **missing}
    ignored = {**table["ignored"], **{k: v for keys in keys_of.values() for k, v in keys.ignored.items()}}
    switches = {keys.switch for keys in keys_of.values()}
    # A key with several places comes first, so that the key of a single weight wins, in any order of the file.
    for key in sorted(values, key=lambda key: sum(len(keys.places_of(key)) for keys in keys_of.values()) < 2):
        owners = {name for name, keys in keys_of.items() if key in keys.owned}
        if key in ignored:
            remarks.append(f"{where}: {key} has no meaning here: {ignored[key]}")
        elif key not in switches and owners and not owners & used.keys():
            remarks.append(f"{where}: {key} has no effect: {_not_used(owners, keys_of)}")
        elif key in table["renamed"]:
            names = table["values"].get(key, {})
            found[table["renamed"][key]] = next((names[name] for name in names if name == values[key]), values[key])
        elif key in _TODAY:
            found[key] = values[key]
        for name, keys in used.items():
            for place in keys.places_of(key):
                _put(found, name, place, values[key])
    for name, keys in used.items():
        computed = keys.compute(values, name == adapter) if keys.compute else {}
        for place, value in computed.items():
            if not (place.startswith("arm.") and place.removeprefix("arm.") in values):  # the file's own setting wins
                _put(found, name, place, value)
    idle = [keys.remark(values) for keys in used.values() if keys.remark]
    if any(_BANK_SWITCH in keys.owned for keys in used.values()):
        bank, remark = _bank(values)
        found = {**bank, **found}  # the file's own setting wins
        idle.append(remark)
    else:
        idle += [f"{key} has no effect: nothing is drawn from an index" for key in _BANK if key in values]
    return found, [*remarks, *(f"{where}: {remark}" for remark in idle if remark)]


def _bank(values: Mapping[str, Any]) -> tuple[dict[str, str], str | None]:
    """The setting `bank`, and a remark on its folder.

    Raises:
        ValueError: for a path that is no text.
    """
    paths = {key: values[key] for key in _BANK if values.get(key)}
    for key, path in paths.items():
        if not isinstance(path, str):
            raise ValueError(f"{key} = {path!r}; expected a path")
    if not number(values, _BANK_SWITCH, 0):
        remark = f"{' and '.join(paths)}: no effect without {_BANK_SWITCH}" if paths else None
        return {"bank": NONE}, remark
    if not paths:
        return {"bank": AUTO}, None
    given = Path(next(iter(paths.values())))
    folder = str(given if given.is_dir() else given.with_suffix(".bank"))
    remark = (
        f"{' and '.join(paths)}: embeddings and index are in one folder, {folder}, which is built if it is missing; "
        "files of the original program are not read"
    )
    return {"bank": folder}, remark


def _adapter(values: Mapping[str, Any], keys_of: Mapping[str, LegacyKeys], where: str) -> str:
    """The strategy that the file is of: one that is never an objective first, the one without own keys last."""
    claims = {name: keys for name, keys in keys_of.items() if keys.known_by is not None}
    order = sorted(claims, key=lambda name: (not claims[name].known_by, claims[name].switch is not None))
    for name in order:
        known_by = claims[name].known_by
        if not known_by or values.keys() & set(known_by):
            return name
    raise UserError(f"{where}: no installed strategy reads such a file; expected a key of one of: {', '.join(order)}")


def _objectives(values: Mapping[str, Any], keys_of: Mapping[str, LegacyKeys], adapter: str) -> list[str]:
    """The default objectives, and those that the file switches on, in its order."""
    objectives = list(ArmSettings().objectives)
    for key in values:
        for name, keys in keys_of.items():
            if keys.switch == key and number(values, key, 0) and name not in (adapter, *objectives):
                objectives.append(name)
    return objectives


def _because(values: Mapping[str, Any], keys: LegacyKeys) -> str:
    """By which keys the file was recognized."""
    found = [key for key in keys.known_by or () if key in values]
    return f", because of {', '.join(found)}" if found else ", because it has no key of another phase"


def _not_used(owners: set[str], keys_of: Mapping[str, LegacyKeys]) -> str:
    """Why settings of these strategies have no effect, and which key would change that."""
    switches = [keys.switch for name, keys in keys_of.items() if name in owners and keys.switch]
    remedy = f"; {switches[0]} turns it on" if switches else ""
    return f"it is of {' and '.join(sorted(owners))}, which this file does not use{remedy}"


def _put(found: dict[str, Any], strategy: str, place: str, value: Any) -> None:
    """Set a place of a strategy; see `snac_core.legacy.LegacyKeys`."""
    head, _, rest = place.partition(".")
    if head == "weights" and rest:
        found["weights"][f"{strategy}/{rest}"] = value
    elif head == "arm" and rest:
        found[rest] = value
    else:
        *above, last = place.split(".")
        inner = found.setdefault(strategy, {})
        for part in above:
            inner = inner.setdefault(part, {})
        inner[last] = value
