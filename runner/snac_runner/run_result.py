"""Results of runs, controls and other systems: what is written into result.json, and the machine it was measured on."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from snac_core.checkpoint import digest_of
from snac_core.conditioned import ConditionedCodec
from snac_core.files import write_json
from snac_core.speakers.encoder import SpeakerEncoder
from snac_runner.config import SCHEMA, ArmSettings
from snac_runner.data.media import AudioFormat
from snac_runner.evaluate.judges import ACCEPTANCE, Calibration
from snac_runner.evaluate.scoring import Scores
from snac_runner.resources import StudyResources
from snac_runner.run_folder import plugin_files


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
    """Write result.json, and the audio that the scores kept under samples/; of several processes, the first does it."""
    if not resources.context.first:
        return
    settings, scores, pairs = result.settings, result.scores, resources.test_pairs
    calibrations: Mapping[str, Calibration] = {}
    if resources.evaluates:  # without scores, as after Ctrl-C, nothing is computed for them
        calibrations = resources.calibrations if result.status == "success" else resources.stored_calibrations
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
            "judges": [_judge(judge, calibrations) for judge in resources.judges] if resources.evaluates else [],
            "split": pairs.split,
            "pairs": {"digest": pairs.digest, "n": len(pairs)},
            "metrics": scores.pooled,
            "missing": scores.missing,
            "utterances": scores.utterances,
            "cost": result.cost,
            "codes": scores.codes,
            "noise_floor": result.noise_floor,
            "versions": versions(resources, settings),
            "hardware": hardware(resources.device),
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
            "judge": ", ".join(f"{judge.name} ({judge.digest[:12]})" for judge in resources.judges),
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
                AudioFormat().write(folder / f"{pair}{suffix}", [audio], sample_rate)
    for pair, parts in scores.worst.items():
        for part, audio in parts.items():
            AudioFormat().write(folder / "worst" / f"{pair}.{part}.wav", [audio], sample_rate)


def _identity(encoder: SpeakerEncoder) -> dict[str, str]:
    return {"name": encoder.name, "family": encoder.family, "digest": encoder.digest}


def _judge(judge: SpeakerEncoder, calibrations: Mapping[str, Calibration]) -> dict[str, Any]:
    """A judge, its threshold for accepting an output as the target, and its equal error rate on real speech."""
    found = calibrations.get(judge.name)
    if found is None:
        return _identity(judge)
    of_codec = found.kinds[ACCEPTANCE]
    calibration = {"threshold": of_codec.threshold, "eer": of_codec.eer, "trials": list(of_codec.trials)}
    return {**_identity(judge), "calibration": {**calibration, "splits": list(found.splits)}}


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


def compared_values(arms: Sequence[ArmSettings], resources: StudyResources) -> dict[str, str]:
    """Data, versions and settings, in words, to their value or digest: processes that share a study have the same."""
    of_package = versions(resources, None)
    del of_package["plugins"]
    values = {f"version of {name}": str(version) for name, version in of_package.items()}
    for arm in arms:
        plugins, files = versions(resources, arm)["plugins"], plugin_files(arm, resources)
        values |= {f"version of {name}": str(about["version"]) for name, about in plugins.items()}
        values |= {f"plugin file of {name}": str(digest) for name, digest in files.items()}
    shared = resources.study.model_dump(mode="json", exclude={"plugins"})  # files have digests
    settings = [shared, *(arm.model_dump(mode="json") for arm in arms)]
    return {
        **values,
        **{f"digest of {name}": digest for name, digest in resources.digests.items()},
        "settings": json.dumps(settings, sort_keys=True),
    }


def hardware(device: torch.device) -> dict[str, Any]:
    """The machine: architecture, operating system, threads of torch, and the GPU if `device` is one."""
    found: dict[str, Any] = {"machine": platform.machine(), "system": platform.system()}
    found["threads"] = torch.get_num_threads()
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
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
