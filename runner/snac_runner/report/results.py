"""Reading result files: of a study folder, of one run, or of several studies as one.

A report reads nothing else. Unknown fields of result.json are ignored, and missing ones are empty. What is missing,
damaged or unfinished becomes a note of the report; only a folder without any result is an error.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError, field_validator

from snac_core.errors import UserError
from snac_core.files import parse_json
from snac_runner.config import SCHEMA, SYSTEMS, check_schema, schema_problem


class Measured(BaseModel):
    """A pooled metric: the mean over `n_ok` of `n` conversions."""

    mean: float | None = None
    n_ok: int | None = None
    n: int | None = None
    unit: str = ""
    direction: Literal["up", "down", ""] = ""
    role: str = ""  # "content": may be the primary measure of content; "speaker": by a further judge
    margin: float | None = None  # largest loss that counts as not inferior
    version: str = ""  # of the tool, if there may be several

    @field_validator("unit", "direction", "role", "version", mode="before")
    @classmethod
    def _none_is_empty(cls, value: Any) -> Any:
        return "" if value is None else value


class Conversion(BaseModel):
    """One conversion and its metrics."""

    pair: str
    source_speaker: str = ""
    target_speaker: str = ""
    source: str = ""  # utterance
    same_sex: bool | None = None
    metrics: dict[str, float | None] = Field(default_factory=dict)


class Calibration(BaseModel):
    """A judge on real speech through the codec: its threshold for accepting a speaker, and its equal error rate."""

    threshold: float | None = None
    eer: float | None = None
    splits: list[str] = Field(default_factory=list)


class Encoder(BaseModel):
    """A speaker encoder; a judge may be calibrated."""

    name: str = ""
    family: str = ""
    digest: str = ""
    calibration: Calibration = Calibration()


class Cost(BaseModel):
    """What a run cost: seconds (alone = shared + own), steps, trainable parameters, size of the model, memory.

    `times_real_time` is the inverse of the real-time factor: seconds of speech converted per second.
    """

    seconds_alone: float | None = None
    seconds_own: float | None = None
    seconds_shared: float | None = None
    steps: int | None = None
    parameters: int | None = None
    bytes: int | None = None
    peak_memory_bytes: float | None = None
    times_real_time: float | None = None


class Codes(BaseModel):
    """How conditioning changes the codes; see `snac_runner.evaluate.codes.summary`.

    Lists have a value per codebook level, the coarsest first; `edits` has the relative size of the edit per tap.
    """

    changed: list[float | None] = Field(default_factory=list)
    perplexity: list[float | None] = Field(default_factory=list)
    used: list[float | None] = Field(default_factory=list)
    probe_source: list[float | None] = Field(default_factory=list)
    probe_target: list[float | None] = Field(default_factory=list)
    probe_speakers: int | None = None
    edits: dict[str, float | None] = Field(default_factory=dict)


class PairList(BaseModel):
    """Digest and size of a list of pairs."""

    digest: str = ""
    n: int | None = None


class Result(BaseModel):
    """The content of result.json. Every field that a report does not need has a default."""

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
    missing: dict[str, str] = Field(default_factory=dict)  # metric to the reason why it was not measured
    utterances: list[Conversion] = Field(default_factory=list)
    cost: Cost = Cost()
    codes: Codes = Codes()
    noise_floor: dict[str, float | None] = Field(default_factory=dict)
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
    """One result with its folder. If its file is missing or damaged, the status is "missing" or "unreadable"."""

    arm: str
    seed: int | None
    folder: Path
    status: str
    error: str
    result: Result | None

    @property
    def ok(self) -> bool:
        """Whether the run succeeded."""
        return self.status == "success"


@dataclass(frozen=True)
class Study:
    """Everything that a report is made of.

    Attributes:
        folder: of the study.
        name, title: of the study.
        arms: name to runs, by seed; arms in the study's order.
        controls: name to run, of controls and of other systems.
        sources: pair id to source utterance, if there is a pair list.
        notes: sentences for the report.
    """

    folder: Path
    name: str
    title: str
    arms: dict[str, tuple[Run, ...]]
    controls: dict[str, Run]
    sources: dict[str, str]
    notes: tuple[str, ...] = field(default=())

    def finished(self) -> list[str]:
        """The arms with at least one successful run."""
        return [name for name, runs in self.arms.items() if any(r.ok for r in runs)]

    def systems(self) -> list[str]:
        """The systems among the controls: what was not trained in the study."""
        return [name for name, run in self.controls.items() if run.result is not None and run.result.kind == "system"]

    def results(self) -> Iterator[Result]:
        """Every readable result, arms first."""
        for run in [r for runs in self.arms.values() for r in runs] + list(self.controls.values()):
            if run.result is not None:
                yield run.result

    def first(self) -> Result:
        """The first successful result, else the first readable one: for what all results share."""
        readable = list(self.results())
        return next((r for r in readable if r.status == "success"), readable[0])


def read_run(path: Path, arm: str, seed: int | None) -> Run:
    """Read one result.json. A damaged one gives a run with status "unreadable" and the reason."""
    try:
        text = path.read_text(encoding="utf-8")
        stored = parse_json(text)
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
    """A number as float; None for everything else, including NaN and infinity."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if number else None


def read(folder: str | Path) -> Study:
    """Read a study folder, or the folder of one run.

    Raises:
        UserError: if there is no folder, no readable result.json in it, or another version wrote it.
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
    runs_there = [run for runs in found.values() for run in runs] + list(controls.values())
    if not any(run.result for run in runs_there):
        damaged = runs_there[0]
        raise UserError(f"no result.json under {folder} can be read; {damaged.folder}: {damaged.error}")
    planned = [
        a if isinstance(a, str) else str(a.get("name")) for a in _items(plan, "arms") if isinstance(a, str | dict)
    ]
    seeds = [s for s in _items(plan, "seeds") if isinstance(s, int)]
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
    """Controls, and other systems that were evaluated on the same pairs."""
    paths = [*sorted(folder.glob("controls/*/result.json")), *sorted(folder.glob(f"{SYSTEMS}/*/result.json"))]
    return {path.parent.name: read_run(path, path.parent.name, None) for path in paths}


def _read_json(path: Path, notes: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        notes.append(f"{path.name} could not be read ({error}).")
        return {}
    return value if isinstance(value, dict) else {"pairs": value}


def _items(table: dict[str, Any], key: str) -> list[Any]:
    """The list with this key; empty where there is none."""
    value = table.get(key)
    return value if isinstance(value, list) else []


def _read_sources(folder: Path, notes: list[str]) -> dict[str, str]:
    """Pair id to source utterance, from pairs.json; empty if there is none."""
    sources: dict[str, str] = {}
    for pair in _items(_read_json(folder / "pairs.json", notes), "pairs"):
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


def merge_studies(folders: Sequence[Path], out: Path) -> tuple[Study, list[str]]:
    """All arms of several studies as one study, named "<study>: <arm>".

    Studies can be merged if they have the same pairs, judge, base and data as the first.

    Returns:
        the study, and a line for each study that cannot be compared with the first.

    Raises:
        UserError: if there are not two studies that can be compared.
    """
    first, *others = (read(folder) for folder in folders)
    fitting, refused = [first], []
    for study in others:
        if reasons := _incompatibilities(first, study):
            refused.append(f"{study.folder} is left out: {'; '.join(reasons)}")
        else:
            fitting.append(study)
    if len(fitting) < 2:
        raise UserError(f"no study can be compared with {first.folder}: " + " | ".join(refused))
    names = [study.name if [s.name for s in fitting].count(study.name) == 1 else str(study.folder) for study in fitting]
    arms = {f"{n}: {arm}": runs for n, study in zip(names, fitting, strict=True) for arm, runs in study.arms.items()}
    controls = dict(first.controls)
    for name, study in zip(names, fitting, strict=True):
        controls |= {
            f"{name}: {control}": run
            for control, run in study.controls.items()
            if control not in first.controls or control in study.systems()
        }
    notes = tuple(dict.fromkeys([*(note for study in fitting for note in study.notes), *(f"{r}." for r in refused)]))
    title = f"Leaderboard of {len(fitting)} studies"
    return Study(out, "leaderboard", title, arms, controls, first.sources, notes), refused


def _incompatibilities(one: Study, other: Study) -> list[str]:
    """Why two studies cannot be compared; empty if they can."""
    a, b = one.first(), other.first()
    facts = {
        "other conversions (digest of the pair list)": (a.pairs.digest, b.pairs.digest),
        "another judge": tuple(", ".join(judge.digest for judge in r.judges) for r in (a, b)),
        "another base": (a.digests.get("base"), b.digests.get("base")),
        "other data": (a.digests.get("data"), b.digests.get("data")),
        "another split": (a.split, b.split),
    }
    return [f"{what}: {str(y)[:16]}, not {str(x)[:16]}" for what, (x, y) in facts.items() if x != y]
