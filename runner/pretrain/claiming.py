"""Whose a run folder is: free, or that of the very training that is asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runner.pretrain.devices import Place
from runner.pretrain.settings import PretrainSettings
from snac_core import atomic
from snac_core.errors import UserError

# of a training that is not at its end: where and how fast it runs, what is told of it, and where the rate falls to
_MAY_CHANGE = {
    "data", "device", "log_every", "checkpoint_seconds", "listen_every", "loaders", "graphs", "steps",
}  # fmt: skip


def claim(out: Path, settings: PretrainSettings, made_of: dict[str, Any], place: Place) -> Path:
    """Where the checkpoint is or will be, after making sure that `out` is free or holds this very training.

    `made_of` is what the settings only name: the codec's arguments, digests of the start and of the speaker encoder.

    Raises:
        UserError: for a folder that holds another training, a finished one, or other files.
    """
    path, wanted = out / "config.json", json.loads(settings.model_dump_json())
    if path.is_file():
        try:
            found = json.loads(path.read_text())
            # what was not there yet when it began is as by default
            stored = json.loads(PretrainSettings(**found["settings"]).model_dump_json())
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path} is no configuration of a pretraining; give a new folder with --out") from None
        different = [
            f"{key}: {stored.get(key)!r} there, {value!r} asked for"
            for key, value in wanted.items()
            if key not in _MAY_CHANGE and stored.get(key) != value
        ]
        different += [
            f"{key}: {_difference(found[key], value)}"
            for key, value in made_of.items()
            if key in found and found[key] != value
        ]
        if different:
            raise UserError(
                f"{out} holds a training with other settings ({'; '.join(different[:3])}); give a new folder with "
                f"--out{_building_on(out)}"
            )
        if (out / "result.json").is_file():
            raise UserError(f"{out} holds a finished training; give a new folder with --out{_building_on(out)}")
    elif out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out} holds files, but no training; give a new folder with --out")
    place.wait()
    if place.first and not path.is_file():
        atomic.write_json(path, {"settings": wanted, **made_of})
    return out / "checkpoint" / "state.pt"


def _building_on(out: Path) -> str:
    return f", and --start {out / 'model'} to build on its weights" if (out / "model").is_dir() else ""


def _difference(found: Any, value: Any) -> str:
    """What is there and what is asked for, in few words."""
    if isinstance(found, dict) and isinstance(value, dict):
        keys = [key for key in {**found, **value} if found.get(key) != value.get(key)]
        return ", ".join(f"{key} {found.get(key)} there, {value.get(key)} now" for key in keys)
    return f"{str(found)[:12]} there, {str(value)[:12]} now"


def agree_on_the_end(
    out: Path, settings: PretrainSettings, step: int, place: Place, say: Callable[[str], None]
) -> None:
    """Let a training that stands at `step` end elsewhere than was said before; config.json keeps what was said."""
    if step > settings.steps:
        raise UserError(f"steps {settings.steps}, but the training in {out} is at step {step}; ask for more")
    path = out / "config.json"
    found = json.loads(path.read_text())
    before = found["settings"]["steps"]
    place.wait()
    if place.first and before != settings.steps:
        say(f"the rate falls towards step {settings.steps} from here; so far it fell towards {before}")
        found["settings"]["steps"] = settings.steps
        found["ends_before"] = [*found.get("ends_before", []), {"steps": before, "until_step": step}]
        atomic.write_json(path, found)
