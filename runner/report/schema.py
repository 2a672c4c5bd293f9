"""What result.json holds, as far as the report reads it: unknown fields are ignored, missing ones empty."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field, field_validator

SCHEMA = 1


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
    teacher: Encoder | None = None
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
