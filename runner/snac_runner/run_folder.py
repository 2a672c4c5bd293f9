"""Run folders: what a run was asked to do, what came of it, and whether it is finished."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import io
import json
import platform
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import soundfile
import torch

from snac_core.errors import UserError
from snac_core.files import write_bytes, write_json
from snac_runner.config import ArmSettings, StudySettings
from snac_runner.evaluate.judges import ACCEPTANCE
from snac_runner.evaluate.scoring import Scores
from snac_runner.resources import StudyResources

SCHEMA = 1
# What does not change the numbers of a run: names, places, and how often it is saved.
_BESIDE_THE_POINT = {
    "study": {
        "name",
        "data",
        "base",
        "speaker_encoder",
        "judge",
        "seeds",
        "save_every",
        "samples",
        "device",
        "plugins",
        "shuffled_control",
        "exclude_metrics",
        "extra_metrics",
    },
    "arm": {"name"},
}


def run_config(study: StudySettings, arm: ArmSettings, seed: int, resources: StudyResources) -> dict[str, Any]:
    """All that decides a run, resolved, with digests in place of names; and its hash."""
    strategies = {
        name: resources.catalogue.strategies[name].Config(**arm.settings.get(name, {})).model_dump(mode="json")
        for name in arm.all_strategies
    }
    config: dict[str, Any] = {
        "study": study.model_dump(mode="json"),
        "arm": {**arm.model_dump(mode="json"), "settings": strategies},
        "seed": seed,
        "digests": resources.digests,
        "plugin_files": {name: _source_digest(resources, name) for name in arm.all_strategies},
    }
    deciding = {**config, **{part: _without(config[part], names) for part, names in _BESIDE_THE_POINT.items()}}
    config["hash"] = hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()
    return config


def _source_digest(resources: StudyResources, name: str) -> str | None:
    """sha256 of the file that a strategy came from; None for an installed plugin, which has a version."""
    file = resources.catalogue.strategies.origins[name].file
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else None


def check_folder(folder: Path, config: dict[str, Any]) -> str:
    """The status of the run at `folder`: "new", "unfinished", "success" or "failed".

    Raises:
        UserError: if the folder holds other files, or a run of another configuration; names the first keys that differ.
    """
    path = folder / "config.json"
    if not path.is_file():
        if folder.is_dir() and any(folder.iterdir()):
            raise UserError(f"{folder} holds files, but no run; give a new folder with --out")
        return "new"
    try:
        stored = json.loads(path.read_text())
        stored_hash = stored["hash"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no configuration of a run ({error}); give a new folder with --out") from error
    if stored_hash != config["hash"]:
        different = [
            f"{key}: {old!r} there, {new!r} asked for"
            for key, old, new in _differences(stored, config)
            if key.split(".")[-1] not in _BESIDE_THE_POINT.get(key.split(".")[0], set()) and key != "hash"
        ]
        raise UserError(
            f"{folder} holds a run of another configuration ({'; '.join(different[:3])}); give a new folder with --out"
        )
    status = result_status(folder)
    return status if status in ("success", "failed") else "unfinished"


def read_result(folder: Path) -> dict[str, Any]:
    """The folder's result.json; empty where there is no readable one."""
    try:
        found = json.loads((folder / "result.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def result_status(folder: Path) -> str | None:
    """The status in the folder's result.json; None where there is none."""
    return read_result(folder).get("status")


def write_result(
    folder: Path,
    *,
    study: StudySettings,
    resources: StudyResources,
    status: str,
    arm: str,
    kind: str = "arm",
    seed: int | None = None,
    settings: ArmSettings | None = None,
    config: dict[str, Any] | None = None,
    scores: Scores | None = None,
    cost: dict[str, Any] | None = None,
    noise_floor: dict[str, float] | None = None,
    error: str | None = None,
    started: str = "",
) -> None:
    """Write result.json, and the audio of the first conversions under samples/."""
    encoders = {
        role: {"name": encoder.name, "family": encoder.family, "digest": encoder.digest}
        for role, encoder in (("speaker_encoder", resources.speaker_encoder), ("judge", resources.judge))
    }
    if scores is not None:
        for pair, rendering in scores.renderings.items():
            for part in ("converted", "identity"):
                audio = getattr(rendering, part)
                if audio is not None:
                    name = f"{pair}.wav" if part == "converted" else f"{pair}.identity.wav"
                    write_wav(folder / "samples" / name, audio, resources.codec.sampling_rate)
        for pair, parts in scores.worst.items():
            for part, audio in parts.items():
                write_wav(folder / "samples" / "worst" / f"{pair}.{part}.wav", audio, resources.codec.sampling_rate)
    pairs = resources.test_pairs
    write_json(
        folder / "result.json",
        {
            "schema": SCHEMA,
            "study": study.name,
            "arm": arm,
            "kind": kind,
            "seed": seed,
            "status": status,
            "error": error,
            "strategies": list(settings.strategies) if settings else [],
            "objectives": list(settings.objectives) if settings else [],
            "config": config or {},
            "config_hash": config["hash"] if config else "",
            "speaker_encoder": encoders["speaker_encoder"],
            "judges": [encoders["judge"]],
            "split": pairs.split,
            "pairs": {"digest": pairs.digest, "n": len(pairs)},
            "metrics": scores.pooled if scores else {},
            "missing": scores.missing if scores else {},
            "utterances": scores.utterances if scores else [],
            "cost": cost or {},
            "codes": scores.codes if scores else {},
            "noise_floor": noise_floor or {},
            "calibration": _calibration(resources),
            "versions": versions(resources, settings),
            "hardware": hardware(),
            "git": git_state(),
            "digests": resources.digests,
            "data": {"name": resources.corpus.name, "notes": list(resources.corpus.notes)},
            "started": started,
            "ended": now(),
            "command": command_line(),
        },
    )


def _calibration(resources: StudyResources) -> dict[str, Any]:
    """From which cosine on the judge takes an output for the target, and what it errs by on real speech."""
    found = resources.calibration
    if found is None:
        return {}
    return {"threshold": found.threshold, "eer": found.kinds[ACCEPTANCE].eer, "splits": list(found.splits)}


def write_wav(path: Path, audio: torch.Tensor, sample_rate: int) -> None:
    """Write mono audio (T,) as 16-bit PCM; louder than full scale is clipped."""
    whole = io.BytesIO()
    soundfile.write(whole, audio.clamp(-1, 1).numpy(), sample_rate, subtype="PCM_16", format="WAV")
    write_bytes(path, whole.getvalue())


def versions(resources: StudyResources, settings: ArmSettings | None) -> dict[str, Any]:
    """Versions of this package, its main libraries, and the plugins that the run used."""
    names = ("snac-conditioning", "torch", "torchaudio", "numpy")
    found: dict[str, Any] = {name: importlib.metadata.version(name) for name in names}
    origins = resources.catalogue.strategies.origins
    found["python"] = platform.python_version()
    found["plugins"] = {
        name: {
            "distribution": origins[name].distribution,
            "version": origins[name].version,
            **({"file": Path(str(origins[name].file)).name} if origins[name].file else {}),
        }
        for name in (settings.all_strategies if settings else ())
    }
    return found


def hardware() -> dict[str, Any]:
    """What the run ran on."""
    found: dict[str, Any] = {"machine": platform.machine(), "system": platform.system()}
    found["threads"] = torch.get_num_threads()
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def git_state() -> dict[str, Any]:
    """Commit of the working folder's repository, and whether anything in it is not committed."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return {}


def command_line() -> str:
    """The command that was run, without the path of the program."""
    return " ".join(["runner", *sys.argv[1:]])


def peak_memory(device: torch.device) -> int:
    """Largest memory so far, in bytes: of the GPU where one is used, else of this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    kilo = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilo


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _without(table: dict[str, Any], names: set[str]) -> dict[str, Any]:
    return {key: value for key, value in table.items() if key not in names}


def _differences(old: Any, new: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys: Sequence[str] = sorted(old.keys() | new.keys())
        return [d for k in keys for d in _differences(old.get(k), new.get(k), f"{key}.{k}" if key else k)]
    return [] if old == new else [(key, old, new)]
