"""What result.json holds, as far as the report reads it: unknown fields are ignored, missing ones empty.

Reading a study folder, or one run's: result.json files and what lies beside them, and nothing else.

Whatever is missing, broken or unfinished becomes a note that the page states; only a folder without any result is an
error.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError, field_validator

from snac_core.errors import UserError
from snac_runner.config import SCHEMA, SYSTEMS, check_schema, schema_problem


class Measured(BaseModel):
    """A pooled metric: mean over `n_ok` of `n` utterances."""

    mean: float | None = None
    n_ok: int | None = None
    n: int | None = None
    unit: str = ""
    direction: Literal["up", "down", ""] = ""
    role: str = ""  # "content" for what may be the primary measure of content
    margin: float | None = None  # the largest loss that counts as not worse
    version: str = ""  # of the tool, where there may be several

    @field_validator("unit", "direction", "role", "version", mode="before")
    @classmethod
    def _none_is_empty(cls, value: Any) -> Any:
        return "" if value is None else value


class Conversion(BaseModel):
    """One converted pair and what was measured on it."""

    pair: str
    source_speaker: str = ""
    target_speaker: str = ""
    source: str = ""  # utterance
    same_sex: bool | None = None
    metrics: dict[str, float | None] = Field(default_factory=dict)


class Encoder(BaseModel):
    name: str = ""
    family: str = ""
    digest: str = ""


class Cost(BaseModel):
    """What a run took: seconds (as if alone = shared + own), steps, trainable parameters, bytes; and how many seconds
    of speech its model converts in one."""

    seconds_alone: float | None = None
    seconds_own: float | None = None
    seconds_shared: float | None = None
    steps: int | None = None
    parameters: int | None = None
    bytes: int | None = None
    peak_memory_bytes: float | None = None
    times_real_time: float | None = None


class Codes(BaseModel):
    """Per codebook level, coarse first: share of codes changed by the conditioning, perplexity, entries in use, and how
    often a linear probe hears source and target in the codes; per tap, the relative size of the edit."""

    changed: list[float | None] = Field(default_factory=list)
    perplexity: list[float | None] = Field(default_factory=list)
    used: list[float | None] = Field(default_factory=list)
    probe_source: list[float | None] = Field(default_factory=list)
    probe_target: list[float | None] = Field(default_factory=list)
    probe_speakers: int | None = None
    edits: dict[str, float | None] = Field(default_factory=dict)


class PairList(BaseModel):
    digest: str = ""
    n: int | None = None


class Result(BaseModel):
    """result.json. Every field a page can do without has a default; unknown ones are ignored."""

    schema_: int = Field(SCHEMA, alias="schema")
    study: str = ""
    arm: str
    kind: Literal["arm", "control", "system"] = "arm"
    seed: int | None = None
    status: Literal["success", "failed", "cancelled"]
    error: str | None = None
    strategies: list[str] = Field(default_factory=list)
    objectives: list[str] = Field(default_factory=list)
    config: dict[str, Any] = Field(default_factory=dict)
    config_hash: str = ""
    speaker_encoder: Encoder | None = None
    judges: list[Encoder] = Field(default_factory=list)
    split: str = ""
    pairs: PairList = PairList()
    metrics: dict[str, Measured] = Field(default_factory=dict)
    missing: dict[str, str] = Field(default_factory=dict)  # metric -> what it would need
    utterances: list[Conversion] = Field(default_factory=list)
    cost: Cost = Cost()
    codes: Codes = Codes()
    noise_floor: dict[str, float | None] = Field(default_factory=dict)
    calibration: dict[str, Any] = Field(default_factory=dict)
    versions: dict[str, Any] = Field(default_factory=dict)
    hardware: dict[str, Any] = Field(default_factory=dict)
    git: dict[str, Any] = Field(default_factory=dict)
    digests: dict[str, Any] = Field(default_factory=dict)
    data: dict[str, Any] = Field(default_factory=dict)
    started: str | None = None
    ended: str | None = None
    command: str = ""

    @field_validator(
        *(
            "cost",
            "codes",
            "pairs",
            "metrics",
            "noise_floor",
            "calibration",
            "versions",
            "hardware",
            "git",
            "digests",
            "config",
            "missing",
            "data",
        ),
        mode="before",
    )
    @classmethod
    def _null_is_empty(cls, value: Any) -> Any:
        return {} if value is None else value

    @field_validator("utterances", "judges", "strategies", "objectives", mode="before")
    @classmethod
    def _null_is_no_items(cls, value: Any) -> Any:
        return [] if value is None else value


@dataclass(frozen=True)
class Run:
    """One result with its folder. A run whose file is missing or broken has status "missing" or "unreadable"."""

    arm: str
    seed: int | None
    folder: Path
    status: str
    error: str
    result: Result | None

    @property
    def ok(self) -> bool:
        return self.status == "success"


@dataclass(frozen=True)
class Study:
    """Everything a report says is drawn from here."""

    folder: Path
    name: str
    title: str
    arms: dict[str, tuple[Run, ...]]  # in the study's order, runs by seed
    controls: dict[str, Run]  # and other systems
    sources: dict[str, str]  # pair -> source utterance, where a pair list is at hand
    notes: tuple[str, ...] = field(default=())

    def finished(self) -> list[str]:
        """Arms with at least one successful run."""
        return [name for name, runs in self.arms.items() if any(r.ok for r in runs)]

    def results(self) -> Iterator[Result]:
        """Every readable result, arms first."""
        for run in [r for runs in self.arms.values() for r in runs] + list(self.controls.values()):
            if run.result is not None:
                yield run.result

    def first(self) -> Result:
        """A result to speak for what all share: the first successful one, else the first readable one."""
        readable = list(self.results())
        return next((r for r in readable if r.status == "success"), readable[0])


def read_run(path: Path, arm: str, seed: int | None) -> Run:
    """Read one result.json; a broken one is a run with status "unreadable" that says why."""
    try:
        text = path.read_text(encoding="utf-8")
        stored = json.loads(text)
        if isinstance(stored, dict) and (problem := schema_problem(stored)):
            raise ValueError(problem)
        result = Result.model_validate(stored)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return Run(arm, seed, path.parent, "unreadable", f"result.json: {where}: {first['msg']}", None)
    except (ValueError, OSError) as error:
        return Run(arm, seed, path.parent, "unreadable", f"result.json: {error}", None)
    return Run(result.arm or arm, result.seed, path.parent, result.status, result.error or "", result)


def finite(value: Any) -> float | None:
    """A number as float, or None for everything else, NaN and infinities included."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if number else None


def read(folder: str | Path) -> Study:
    """Read a study folder, or the folder of one run.

    Raises UserError where there is no folder, or no result.json in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; expected a study folder or a run folder with a result.json")
    if (folder / "result.json").is_file():
        return _read_single(folder)
    notes: list[str] = []
    plan = _read_json(folder / "study.json", notes)
    if plan:
        check_schema(plan, folder / "study.json")
    found: dict[str, list[Run]] = {}
    for path in sorted(folder.glob("*/seed*/result.json")):
        seed = path.parent.name.removeprefix("seed")
        run = read_run(path, path.parent.parent.name, int(seed) if seed.isdigit() else None)
        found.setdefault(run.arm, []).append(run)
    controls = _read_controls(folder)
    if not found and not controls:
        raise UserError(f"no result.json under {folder}; expected <arm>/seed<k>/result.json, or one run's own folder")
    planned = [
        a if isinstance(a, str) else str(a.get("name")) for a in plan.get("arms") or [] if isinstance(a, str | dict)
    ]
    seeds = [s for s in plan.get("seeds") or [] if isinstance(s, int)]
    arms: dict[str, tuple[Run, ...]] = {}
    for name in planned + sorted(set(found) - set(planned)):
        runs = {r.seed: r for r in found.get(name, [])}
        if name in planned:
            for seed_number in seeds:
                missing = Run(name, seed_number, folder / name / f"seed{seed_number}", "missing", "has not run", None)
                runs.setdefault(seed_number, missing)
        arms[name] = tuple(sorted(runs.values(), key=lambda r: (r.seed is None, r.seed or 0)))
    name = str(plan.get("name") or folder.resolve().name)
    return Study(
        folder, name, str(plan.get("title") or name), arms, controls, _read_sources(folder, notes), tuple(notes)
    )


def _read_single(folder: Path) -> Study:
    run = read_run(folder / "result.json", folder.resolve().name, None)
    notes: list[str] = []
    if run.result is not None and run.result.kind == "control":
        raise UserError(f"{folder} holds a control; expected a study folder or the folder of a trained run")
    home = folder if (folder / "controls").is_dir() else folder.resolve().parent.parent
    controls = _read_controls(home) if (home / "controls").is_dir() else {}
    if run.result is None:
        raise UserError(f"cannot read {folder / 'result.json'}: {run.error.removeprefix('result.json: ')}")
    sources = _read_sources(home, notes)
    title = run.arm if run.seed is None else f"{run.arm}, seed {run.seed}"
    return Study(folder, run.result.study or run.arm, title, {run.arm: (run,)}, controls, sources, tuple(notes))


def _read_controls(folder: Path) -> dict[str, Run]:
    """Controls, and beside them the other systems that were judged on the same pairs."""
    paths = [*sorted(folder.glob("controls/*/result.json")), *sorted(folder.glob(f"{SYSTEMS}/*/result.json"))]
    return {path.parent.name: read_run(path, path.parent.name, None) for path in paths}


def _read_json(path: Path, notes: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        notes.append(f"{path.name} could not be read ({error}).")
        return {}
    return value if isinstance(value, dict) else {"pairs": value}


def _read_sources(folder: Path, notes: list[str]) -> dict[str, str]:
    """Which utterance each pair converts, from pairs.json; empty where there is none."""
    sources: dict[str, str] = {}
    for pair in _read_json(folder / "pairs.json", notes).get("pairs") or []:
        if not isinstance(pair, dict):
            continue
        source = pair.get("source")
        if isinstance(source, dict):
            source = source.get("utterance") or source.get("id")
        elif isinstance(source, list) and source:
            source = source[0]
        if source:
            sources[str(pair.get("id"))] = str(source)
    return sources
