"""The run folder of a training: check that it is free or holds the same training, and resume from its checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from pydantic import ValidationError

from snac_core.errors import UserError
from snac_core.files import parse_json, write_json
from snac_core.settings import describe
from snac_runner.console import Console
from snac_runner.distributed import DistributedContext
from snac_runner.pretrain.settings import PretrainSettings
from snac_runner.pretrain.step import TrainingState
from snac_runner.run_folder import CHECKPOINT

# settings that a resumed training may change; `data` may have moved, and its digests are in the checkpoint
_CHANGEABLE = {
    "data", "device", "log_every", "checkpoint_seconds", "validate_every", "loaders", "graphs", "steps",
}  # fmt: skip


def claim(out: Path, settings: PretrainSettings, inputs: dict[str, Any], context: DistributedContext) -> Path:
    """Check that `out` is free or holds this training, and write its config.json; returns the path of the checkpoint.

    Args:
        out: the run folder.
        settings: of the training.
        inputs: what `settings` only names: arguments of the codec, digests of `start` and of the speaker encoder.
        context: rank 0 writes.

    Raises:
        UserError: for a folder that holds another training, a finished one, or other files.
    """
    path, wanted = out / "config.json", json.loads(settings.model_dump_json())
    if path.is_file():
        stored, found = _stored(path)
        different = [
            f"{key}: {stored.get(key)!r} in the folder, {value!r} requested"
            for key, value in wanted.items()
            if key not in _CHANGEABLE and stored.get(key) != value
        ]
        different += [
            f"{key}: {_difference(found[key], value)}"
            for key, value in inputs.items()
            if key in found and found[key] != value
        ]
        if different:
            raise UserError(
                f"{out} holds a training with other settings ({'; '.join(different[:3])}); {_alternatives(out)}"
            )
        if (out / "result.json").is_file():
            raise UserError(f"{out} holds a finished training; {_alternatives(out)}")
    elif out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out} holds files, but no training; give a new folder with --out")
    context.wait()
    if context.first and not path.is_file():
        write_json(path, {"settings": wanted, **inputs})
    return out / CHECKPOINT


def _stored(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings in a config.json, with defaults for missing ones, and the whole file."""
    try:
        found = parse_json(path.read_text())
        return json.loads(PretrainSettings(**found["settings"]).model_dump_json()), found
    except (ValueError, KeyError, TypeError) as error:
        reason = f" ({describe(error)})" if isinstance(error, ValidationError) else ""
        raise UserError(
            f"{path} is not the configuration of a pretraining{reason}; give a new folder with --out"
        ) from None


def _alternatives(out: Path) -> str:
    also = f", and --start {out / 'model'} to continue from its weights" if (out / "model").is_dir() else ""
    return f"give a new folder with --out{also}"


def _difference(found: Any, value: Any) -> str:
    if isinstance(found, dict) and isinstance(value, dict):
        keys = [key for key in {**found, **value} if found.get(key) != value.get(key)]
        return ", ".join(f"{key} {found.get(key)} in the folder, {value.get(key)} now" for key in keys)
    return f"{str(found)[:12]} in the folder, {str(value)[:12]} now"


def resume(state: TrainingState, checkpoint: Path, out: Path, console: Console) -> None:
    """Load the checkpoint if there is one, else the discriminators of the setting `adversary.start`.

    If `steps` has changed, config.json gets the new number and keeps the old.

    Raises:
        UserError: for a damaged checkpoint, one of other data, fewer `steps` than are done, or a folder
            `adversary.start` without such discriminators.
    """
    steps, context = state.settings.steps, state.context
    if checkpoint.is_file():
        data = state.data
        try:
            state.load(checkpoint)
        except (OSError, EOFError, KeyError, RuntimeError, UnpicklingError) as error:
            # torch's message for a damaged file says how to load it with pickle; nobody should do that
            reason = "it is damaged" if isinstance(error, UnpicklingError) else " ".join(str(error).split())[:200]
            raise UserError(
                f"{checkpoint} is not a checkpoint of this training: {reason}; give a new folder"
            ) from error
        if state.data != data:
            raise UserError(f"{checkpoint} is of a training on other speech; give the same speech, or a new folder")
        console.line(f"continuing from step {state.step} of {steps}")
    elif state.settings.adversary is not None and state.settings.adversary.start is not None:
        _continue_discriminators(state, Path(state.settings.adversary.start))
    if state.step > steps:
        raise UserError(f"steps {steps}, but the training in {out} is at step {state.step}; give more steps")
    path = out / "config.json"
    config = parse_json(path.read_text())
    before = config["settings"]["steps"]
    context.wait()
    if context.first and before != steps:
        console.line(f"the learning rate now decays until step {steps}; so far until step {before}")
        config["settings"]["steps"] = steps
        config["ends_before"] = [*config.get("ends_before", []), {"steps": before, "until_step": state.step}]
        write_json(path, config)


def _continue_discriminators(state: TrainingState, run: Path) -> None:
    """Load the discriminators of another training."""
    path = run / CHECKPOINT
    if not path.is_file():
        raise UserError(f"adversary.start {run}: no checkpoint {path}; expected the run folder of a pretraining")
    assert state.discriminators is not None
    try:
        stored = torch.load(path, map_location=state.context.device, weights_only=True).get("discriminators")
        if stored is None:
            raise UserError(f"adversary.start {run}: that training has no discriminators (adversary=none)")
        state.discriminators.load_state_dict(stored)
    except (OSError, EOFError, AttributeError, RuntimeError, UnpicklingError) as error:
        reason = "damaged" if isinstance(error, UnpicklingError) else " ".join(str(error).split())[:200]
        raise UserError(
            f"adversary.start {run}: its discriminators cannot be loaded ({reason}); expected the same periods, "
            "n_ffts, period_channels and spectral_channels"
        ) from error
