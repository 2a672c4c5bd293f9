"""Studies that take seconds: a codec of a few thousand parameters, synthetic speech, three steps."""

from __future__ import annotations

import json
import resource
import textwrap
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from snac_core.plugins import discover
from snac_runner.cli import main
from snac_runner.config import ArmSettings, StudySettings
from snac_runner.console import Console
from snac_runner.resources import StudyResources
from snac_runner.study import run_arms

BASE: dict[str, Any] = {
    "sampling_rate": 16000,
    "encoder_dim": 4,
    "encoder_rates": [4, 4, 4],
    "decoder_dim": 32,
    "decoder_rates": [4, 4, 4],
    "attn_window_size": None,
    "codebook_size": 64,
    "codebook_dim": 4,
    "vq_strides": [2, 1],
}
SMALL: dict[str, Any] = {
    "speaker_encoder": "simple",
    "judges": ("ge2e",),
    "steps": 4,
    "batch_size": 3,
    "crop_seconds": 0.4,
    "dev_pairs": 2,
    "test_pairs": 2,
    "pair_seconds": 1.0,
    "save_every": 2,
    "samples": 1,
    "shuffled_control": False,
}
PHASES = ("phase3_contrastive", "phase4_decoder_film", "phase6_encoder_adapter")


class RecordedConsole(Console):
    """Collects lines; `step` is called with the arguments of `show_progress` of the training."""

    def __init__(self, lines: list[str], step: Callable[..., None] | None = None) -> None:
        self.lines = lines
        self.step = step

    def line(self, text: str) -> None:
        self.lines.append(text)

    def show_progress(self, *arguments: Any) -> None:
        if self.step:
            self.step(*arguments)


@dataclass
class Bench:
    """Speech, base and everything frozen, loaded once for all tests of the runner.

    Attributes:
        lines: what the console said in the latest `train`.
    """

    speech: Path
    base: Path
    loaded: StudyResources | None = None
    lines: list[str] = field(default_factory=list)

    def study(self, **changes: Any) -> StudySettings:
        """The small study with changes."""
        return StudySettings(**{**SMALL, "data": str(self.speech), "base": str(self.base), **changes})

    def resources(self, study: StudySettings, files: Iterable[Path] = ()) -> StudyResources:
        """StudyResources of a study of the same speech, base and encoders: those are not loaded again."""
        resources = StudyResources(study, discover(files))
        if self.loaded is None:
            first = StudyResources(self.study(), discover())
            for part in ("codec", "speaker_encoder", "judges", "corpus", "table", "dev", "test"):
                getattr(first, part)
            self.loaded = first
        known = vars(self.loaded)
        for part in ("codec", "speaker_encoder", "judges", "corpus", "table"):
            vars(resources)[part] = known[part]
        small, pairs = self.study(), ("pair_seconds", "pair_seed", "dev_pairs", "test_pairs")
        if all(getattr(study, key) == getattr(small, key) for key in pairs):
            for part in ("dev", "test", "test_pairs"):
                vars(resources)[part] = known[part]
        return resources

    def train(
        self,
        arms: Iterable[ArmSettings],
        folder: Path,
        *,
        files: Iterable[Path] = (),
        step: Callable[..., None] | None = None,
        **changes: Any,
    ) -> dict[str, Path]:
        """Train and judge arms into `folder`/<arm>; returns arm -> its folder (of the only seed).

        The noise floor is not measured: it takes longer than all the rest.
        """
        study, arms = self.study(**changes), list(arms)
        resources = self.resources(study, files)
        self.lines = []
        resources.console = RecordedConsole(self.lines, step)
        places = {(arm.title, seed): folder / arm.title / f"seed{seed}" for arm in arms for seed in study.seeds}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("snac_runner.unit.noise_floor", lambda *_: 0.0)
            run_arms(arms, places, resources)
        return {arm.title: folder / arm.title / f"seed{study.seeds[0]}" for arm in arms}

    def options(self, **changes: Any) -> list[str]:
        """The small study as options of the command line."""
        values = {**SMALL, **changes}
        options = ["--data", str(self.speech), "--base", str(self.base)]
        options += ["--judge", ",".join(values.pop("judges"))]
        for key in ("speaker_encoder", "steps", "save_every"):
            options += ["--" + key.replace("_", "-"), str(values.pop(key))]
        for key, value in values.items():
            options += ["--set", f"{key}={json.dumps(value)}"]
        return options


def arm(*strategies: str, **settings: Any) -> ArmSettings:
    """An arm of these strategies."""
    return ArmSettings(strategies=strategies, **settings)


def runner(*arguments: object) -> int:
    """Run the command line in this process; its exit code."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


def result(folder: Path) -> dict[str, Any]:
    """The result.json of a run."""
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


def records(folder: Path) -> list[dict[str, Any]]:
    """The metrics.jsonl of a run."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def steps(folder: Path) -> list[int]:
    """The training steps that metrics.jsonl tells of, in its order."""
    return [record["step"] for record in records(folder) if "dev" not in record]


def weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a run's model."""
    return load_file(folder / "model" / "model.safetensors")


@contextmanager
def full_disk(after: int) -> Iterator[None]:
    """No file may grow past `after` bytes: what the system says then is what it says of a full disk, or near it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (after, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file below a folder: its bytes, and when it was written."""
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


PLUGIN = '''
import torch
from torch import nn
from pydantic import Field
from snac_core import Strategy, hookimpl


class Gate(Strategy):
    """x * (1 + W s) at `quantized`."""

    name = "{name}"

    class Config(Strategy.Config):
        strength: float = Field(1.0, gt=0, description="Scales the edit.")

    def __init__(self, config, taps):
        super().__init__(config, taps)
        self.gate = nn.Linear(taps.speaker_dim, taps.match(("quantized",))[0].channels)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)
{body}

@hookimpl
def register_strategies(register):
    register(Gate)
'''
EDIT = """
    @hookimpl
    def after_vq(self, x, cond, tap):
        return x * (1 + self.config.strength * self.gate(cond.speaker)).unsqueeze(-1)
"""


def plugin(folder: Path, name: str, body: str = "", *, edit: str = EDIT) -> Path:
    """Write a plugin file with a strategy: a gate whose edit, and further methods, are given as source."""
    methods = textwrap.indent(textwrap.dedent(edit) + textwrap.dedent(body), "    ")
    path = folder / f"{name}.py"
    path.write_text(PLUGIN.format(name=name, body=methods))
    return path
