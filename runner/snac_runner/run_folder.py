"""Run folders: the configuration of a run, its result, and whether it is finished."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import platform
import resource
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import soundfile
import torch

from snac_core.checkpoint import digest_of
from snac_core.conditioned import ConditionedCodec
from snac_core.errors import UserError
from snac_core.files import write_json, writing
from snac_core.speakers.encoder import SpeakerEncoder
from snac_runner.config import SCHEMA, ArmSettings, StudySettings, check_schema, stored_study
from snac_runner.evaluate.judges import ACCEPTANCE
from snac_runner.evaluate.scoring import Scores
from snac_runner.resources import StudyResources

# Settings that do not change the numbers of a run: names, places (their digests are compared), how often it is saved.
_NOT_COMPARED = {
    "study": {
        "name",
        "data",
        "base",
        "speaker_encoder",
        "judge",
        "whisper",
        "language",
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


def run_config(arm: ArmSettings, seed: int, resources: StudyResources) -> dict[str, Any]:
    """Everything that determines a run, with defaults written out and digests in place of names; and its hash."""
    strategies = {
        name: resources.catalogue.strategies[name].Config(**arm.settings.get(name, {})).model_dump(mode="json")
        for name in arm.all_strategies
    }
    config: dict[str, Any] = {
        "study": resources.study.model_dump(mode="json"),
        "arm": {**arm.model_dump(mode="json", exclude=set() if arm.start else {"start"}), "settings": strategies},
        "seed": seed,
        "digests": resources.digests,
        "plugin_files": {name: _source_digest(resources, name) for name in arm.all_strategies},
    }
    compared = {**config, **{part: _without(config[part], names) for part, names in _NOT_COMPARED.items()}}
    config["hash"] = hashlib.sha256(json.dumps(compared, sort_keys=True).encode()).hexdigest()
    return {"schema": SCHEMA, **config}


def stored_run(folder: Path) -> tuple[StudySettings, ArmSettings]:
    """The settings of the run at `folder`.

    Raises:
        UserError: if there is no run, its config.json is damaged, or another version has written it.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
        if {"study", "arm", "hash"} <= config.keys():
            check_schema(config, path)
        defaults = StudySettings().model_dump(mode="json")  # left out: a size that was not asked for is a maximum
        given = {key: value for key, value in config["study"].items() if key not in defaults or value != defaults[key]}
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
        check_schema(json.loads(path.read_text()), path)


def _source_digest(resources: StudyResources, name: str) -> str | None:
    """sha256 of the plugin file that defines a strategy; None for an installed plugin, which has a version."""
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
            raise UserError(f"{folder} holds files that are not a run; give a new folder with --out")
        return "new"
    try:
        stored = json.loads(path.read_text())
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
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def result_status(folder: Path) -> str | None:
    """The status in the folder's result.json; None where there is none."""
    return read_result(folder).get("status")


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


@dataclass
class Result:
    """The result of a run, of a control, or of another system; `write_result` writes it.

    Attributes:
        folder: where result.json is written.
        arm: name of the arm, the control or the system.
        kind: what it is.
        seed, settings, config: of a run; see `run_config`.
        status: "success", "failed" or "cancelled".
        error: why it is not a success.
        scores: pooled and per conversion.
        cost: time in s, steps, parameters, bytes, memory.
        noise_floor: metric to its standard deviation over decodes with different noise.
        started: time in UTC at which the work started.
    """

    folder: Path
    arm: str
    kind: Literal["arm", "control", "system"]
    seed: int | None = None
    settings: ArmSettings | None = None
    config: dict[str, Any] = field(default_factory=dict)
    status: Literal["success", "failed", "cancelled"] = "success"
    error: str | None = None
    scores: Scores = field(default_factory=Scores)
    cost: dict[str, Any] = field(default_factory=dict)
    noise_floor: dict[str, float] = field(default_factory=dict)
    started: str = field(default_factory=now)

    @property
    def journal(self) -> Path:
        """File of the conversions that have been scored, so that scoring resumes after a stop."""
        return self.folder / "judged.jsonl"


def write_result(result: Result, resources: StudyResources) -> None:
    """Write result.json, and the audio that the scores kept under samples/."""
    settings, scores, pairs = result.settings, result.scores, resources.test_pairs
    _write_samples(result.folder / "samples", scores, resources.codec.sampling_rate)
    write_json(
        result.folder / "result.json",
        {
            "schema": SCHEMA,
            "study": resources.study.name,
            "arm": result.arm,
            "kind": result.kind,
            "seed": result.seed,
            "status": result.status,
            "error": result.error,
            "strategies": list(settings.strategies) if settings else [],
            "objectives": list(settings.objectives) if settings else [],
            "config": result.config,
            "config_hash": result.config.get("hash", ""),
            "speaker_encoder": _identity(resources.speaker_encoder),
            "judges": [_identity(resources.judge)] if resources.evaluates else [],
            "split": pairs.split,
            "pairs": {"digest": pairs.digest, "n": len(pairs)},
            "metrics": scores.pooled,
            "missing": scores.missing,
            "utterances": scores.utterances,
            "cost": result.cost,
            "codes": scores.codes,
            "noise_floor": result.noise_floor,
            "calibration": _calibration(resources) if resources.evaluates else {},
            "versions": versions(resources, settings),
            "hardware": hardware(),
            "git": git_state(),
            "digests": resources.digests,
            "data": {"name": resources.corpus.name, "notes": list(resources.corpus.notes)},
            "started": result.started,
            "ended": now(),
            "command": command_line(),
        },
    )


def evaluation(
    model: ConditionedCodec, scores: Scores, resources: StudyResources, *, seed: int, steps: int
) -> dict[str, Any]:
    """The pooled metrics of a run with the digest of its weights, as `ConditionedCodec.evaluation`."""
    pairs = resources.test_pairs
    return {
        "weights": digest_of(model.attached),
        "metrics": {
            name: {key: figure[key] for key in ("mean", "n_ok", "n", "unit", "direction")}
            for name, figure in scores.pooled.items()
        },
        "about": {
            "data": resources.corpus.name,
            "split": pairs.split,
            "conversions": len(pairs),
            "judge": f"{resources.judge.name} ({resources.judge.digest[:12]})",
            "speaker_encoder": f"{resources.speaker_encoder.name} ({resources.speaker_encoder.digest[:12]})",
            "seed": seed,
            "steps": steps,
            "version": importlib.metadata.version("snac-conditioning"),
        },
    }


def _write_samples(folder: Path, scores: Scores, sample_rate: int) -> None:
    for pair, rendering in scores.renderings.items():
        for suffix, audio in ((".wav", rendering.converted), (".identity.wav", rendering.identity)):
            if audio is not None:
                write_wav(folder / f"{pair}{suffix}", audio, sample_rate)
    for pair, parts in scores.worst.items():
        for part, audio in parts.items():
            write_wav(folder / "worst" / f"{pair}.{part}.wav", audio, sample_rate)


def _identity(encoder: SpeakerEncoder) -> dict[str, str]:
    return {"name": encoder.name, "family": encoder.family, "digest": encoder.digest}


def _calibration(resources: StudyResources) -> dict[str, Any]:
    """The judge's threshold for accepting an output as the target, and its equal error rate on real speech."""
    found = resources.calibration
    if found is None:
        return {}
    return {"threshold": found.threshold, "eer": found.kinds[ACCEPTANCE].eer, "splits": list(found.splits)}


def write_wav(path: Path, audio: torch.Tensor | Iterable[torch.Tensor], sample_rate: int) -> None:
    """Write mono audio, (T,) or pieces of it, as 16-bit PCM, atomically; samples beyond full scale are clipped."""
    pieces = [audio] if isinstance(audio, torch.Tensor) else audio
    with writing(path) as temporary:
        try:
            with soundfile.SoundFile(str(temporary), "w", sample_rate, 1, "PCM_16", format="WAV") as file:
                for piece in pieces:
                    file.write(piece.clamp(-1, 1).cpu().numpy())
        except soundfile.LibsndfileError as error:
            raise UserError(f"cannot write {path}: {error.error_string}") from error


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
    """The machine: architecture, operating system, threads of torch, GPU."""
    found: dict[str, Any] = {"machine": platform.machine(), "system": platform.system()}
    found["threads"] = torch.get_num_threads()
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def git_state() -> dict[str, Any]:
    """Commit of the working folder's repository, and whether it has uncommitted changes."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return {}


def command_line() -> str:
    """The command line, without the path of the program."""
    return " ".join(["runner", *sys.argv[1:]])


def peak_memory(device: torch.device) -> int:
    """Largest memory so far, in bytes: of the GPU where one is used, else of this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    kilo = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilo


def _without(table: dict[str, Any], names: set[str]) -> dict[str, Any]:
    return {key: value for key, value in table.items() if key not in names}


def _differences(old: Any, new: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys: Sequence[str] = sorted(old.keys() | new.keys())
        return [d for k in keys for d in _differences(old.get(k), new.get(k), f"{key}.{k}" if key else k)]
    return [] if old == new else [(key, old, new)]
