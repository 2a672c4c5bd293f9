"""Run folders: the settings of a run, its status, and what it stores. Nothing here trains or evaluates."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snac_core.checkpoint import Stored
from snac_core.errors import UserError
from snac_core.files import parse_json
from snac_core.plugins import Catalogue
from snac_runner.config import SCHEMA, ArmSettings, StudySettings, check_schema, stored_study
from snac_runner.console import Console

if TYPE_CHECKING:
    from snac_runner.resources import StudyResources

CHECKPOINT = Path("checkpoint", "state.pt")
"""The file in a run folder that its training resumes from."""

# Settings that do not change the numbers of a run: names, places (their digests are compared), how often it is saved.
_NOT_COMPARED = {
    "study": {
        "name",
        "data",
        "base",
        "speaker_encoder",
        "judges",
        "whisper",
        "language",
        "seeds",
        "save_every",
        "samples",
        "device",
        "accumulate",
        "checkpoint_decoder",
        "compile",
        "workers",
        "plugins",
        "adapters",
        "shuffled_control",
        "exclude_metrics",
        "extra_metrics",
    },
    "arm": {"name"},
}


def run_config(arm: ArmSettings, seed: int, resources: StudyResources) -> dict[str, Any]:
    """Everything that determines a run, with defaults written out and digests in place of names; and its hash."""
    strategies = {
        name: resources.catalogue.strategies[name].Config(**arm.settings.get(name, {})).model_dump(mode="json")
        for name in arm.all_strategies
    }
    config: dict[str, Any] = {
        "study": resources.study.model_dump(mode="json", exclude=_left_out(resources.study)),
        "arm": {**arm.model_dump(mode="json", exclude=_empty(arm)), "settings": strategies},
        "seed": seed,
        "digests": resources.digests,
        "plugin_files": plugin_files(arm, resources),
    }
    compared = {**config, **{part: _without(config[part], names) for part, names in _NOT_COMPARED.items()}}
    config["hash"] = hashlib.sha256(json.dumps(compared, sort_keys=True).encode()).hexdigest()
    if arm.start:
        config["start_weights"] = _start_digest(arm.start)
    return {"schema": SCHEMA, **config}


def _start_digest(source: str) -> str | None:
    """sha256 of the weights that the setting `start` names; None where they are gone: a trained run needs none."""
    try:
        return hashlib.sha256(Stored.find(source).weights.read_bytes()).hexdigest()
    except (UserError, OSError):
        return None


def _left_out(study: StudySettings) -> set[str]:
    """Settings that are not written out with their default, so that runs of earlier versions stay the same runs."""
    return {"precision"} if study.precision == StudySettings().precision else set()


def _empty(arm: ArmSettings) -> set[str]:
    """The same for an arm."""
    return {name for name in ("start", "frozen") if not getattr(arm, name)}


def stored_run(folder: Path) -> tuple[StudySettings, ArmSettings]:
    """The settings of the run at `folder`.

    Raises:
        UserError: if there is no run, its config.json is damaged, or another version has written it.
    """
    path = folder / "config.json"
    try:
        config = parse_json(path.read_text())
        if {"study", "arm", "hash"} <= config.keys():
            check_schema(config, path)
        defaults = StudySettings().model_dump(mode="json")  # left out: a size that was not asked for is a maximum
        given = {key: value for key, value in config["study"].items() if key not in defaults or value != defaults[key]}
        if "judge" in given:  # runs of before there could be several
            given["judges"] = [given.pop("judge")]
        study = StudySettings(**{**given, "seeds": [config["seed"]]})
        return study, ArmSettings(**config["arm"])
    except FileNotFoundError:
        raise UserError(
            f"no run at {folder}: it has no config.json; expected a folder written by runner train"
        ) from None
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not the configuration of a run: {' '.join(str(error).split())[:200]}") from error


def study_of(folder: Path) -> StudySettings:
    """The settings of the study, or of the single run, in `folder`.

    Raises:
        UserError: if there is neither, or another version has written it.
    """
    if (folder / "study.toml").is_file():
        check_study_schema(folder)
        return stored_study(folder / "study.toml")
    if (folder / "config.json").is_file():
        return stored_run(folder)[0]
    raise UserError(f"{folder} does not hold a study beside the list of pairs; give the pairs.json in a study's folder")


def check_study_schema(folder: Path) -> None:
    """Raise UserError if another version has written the study in `folder`."""
    path = folder / "study.json"
    if path.is_file():
        check_schema(parse_json(path.read_text()), path)


def plugin_files(arm: ArmSettings, resources: StudyResources) -> dict[str, str | None]:
    """Strategy to sha256 of the plugin file that defines it; None for an installed plugin, which has a version."""
    return {name: _plugin_file(name, resources.catalogue) for name in arm.all_strategies}


def _plugin_file(strategy: str, catalogue: Catalogue) -> str | None:
    file = catalogue.strategies.origins[strategy].file
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else None


def warn_of_changed_plugins(run: Path, catalogue: Catalogue, console: Console) -> None:
    """Warn if a strategy of the run, or of the run of the model, is in another plugin file than when it was trained."""
    folder = run.parent if run.name == "model" else run
    for name, digest in read_config(folder).get("plugin_files", {}).items():
        if digest and name in catalogue.strategies and _plugin_file(name, catalogue) not in (None, digest):
            console.warning(f"the plugin file of {name} has changed since {run} was trained")


def check_folder(folder: Path, config: dict[str, Any]) -> str:
    """The status of the run at `folder`: "new", "unfinished", "success" or "failed".

    Raises:
        UserError: if the folder holds other files, or a run of another configuration, and names the first keys that
            differ; or if a seed of the arm has started from other weights.
    """
    path = folder / "config.json"
    if weights := config.get("start_weights"):
        for seed in folder.parent.glob("seed*"):
            if (before := read_config(seed).get("start_weights") or weights) != weights:
                raise UserError(
                    f"{seed} has started from other weights of {config['arm']['start']} (sha256 {before[:12]}) than "
                    f"are there now ({weights[:12]}); restore them, or give a new folder with --out"
                )
    if not path.is_file():
        if folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
            raise UserError(f"{folder} holds files that are not a run; give a new folder with --out")
        return "new"
    try:
        stored = parse_json(path.read_text())
        stored_hash = stored["hash"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not the configuration of a run ({error}); give a new folder with --out") from error
    check_schema(stored, path)
    if stored_hash != config["hash"]:
        different = [
            f"{key}: {old!r} there, {new!r} asked for"
            for key, old, new in _differences(stored, config)
            if key.split(".")[-1] not in _NOT_COMPARED.get(key.split(".")[0], set()) and key != "hash"
        ]
        raise UserError(
            f"{folder} holds a run of another configuration ({'; '.join(different[:3])}); give a new folder with --out"
        )
    status = result_status(folder)
    return status if status in ("success", "failed") else "unfinished"


def read_result(folder: Path) -> dict[str, Any]:
    """The folder's result.json; empty where there is no readable one."""
    return _read_table(folder / "result.json")


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json, unchecked; empty where there is no readable one. See `stored_run`."""
    return _read_table(folder / "config.json")


def _read_table(path: Path) -> dict[str, Any]:
    try:
        found = parse_json(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def result_status(folder: Path) -> str | None:
    """The status in the folder's result.json; None where there is none."""
    return read_result(folder).get("status")


def _without(table: dict[str, Any], names: set[str]) -> dict[str, Any]:
    return {key: value for key, value in table.items() if key not in names}


def _differences(old: Any, new: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys: Sequence[str] = sorted(old.keys() | new.keys())
        return [d for k in keys for d in _differences(old.get(k), new.get(k), f"{key}.{k}" if key else k)]
    return [] if old == new else [(key, old, new)]
