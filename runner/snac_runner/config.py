"""Names that a study keeps for itself.

Settings of a study: what all arms share, what an arm may differ in, and where they come from.

A study file is TOML; an arm in it is a diff of a few lines. Keys that change what all arms see (data, base, batches,
steps, conditioning encoder) belong to `[study]`, so that arms differ only in what is compared.
"""

from __future__ import annotations

import copy
import json
import math
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from snac_core.errors import UserError, nearest
from snac_core.settings import checked

SHUFFLED = "shuffled"
"""The control arm, trained under wrong embeddings."""

CONTROL_ROWS = ("source", "floor", "ceiling", "mismatched", "signal_processing", SHUFFLED)
"""What every report compares the arms with."""

SYSTEMS = "systems"
"""Folder of other systems' results."""

RESERVED = frozenset({"controls", SYSTEMS, "tables", "trials", "export", "votes", SHUFFLED, ".", ".."})
"""What no arm can be called: folders of a study, and the control arm."""


_BARE = re.compile(r"[A-Za-z0-9_-]+")  # a TOML key that needs no quotes
_COMMENT = re.compile(r'"(?:[^"\\\n]|\\.)*"|//[^\n]*')  # a string of JSON, or a comment outside of one


class ArmSettings(BaseModel):
    """What one arm may differ in."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field("", description="Name of the arm; the strategies joined by + where empty.")
    strategies: tuple[str, ...] = Field((), description="Strategies, in the order in which they act.")
    objectives: tuple[str, ...] = Field(("voice_conversion",), description="Objectives added after the strategies.")
    settings: dict[str, dict[str, Any]] = Field({}, description="Settings by strategy name.")
    weights: dict[str, float] = Field({}, description='Weight of a loss term by "<strategy>/<term>".')
    lr: float = Field(1e-3, gt=0, description="Learning rate of AdamW at its highest.")
    discriminator_lr: float = Field(1e-4, gt=0, description="Learning rate of the discriminators' own AdamW.")
    weight_decay: float = Field(1e-5, ge=0, description="Weight decay of AdamW.")
    betas: tuple[float, float] = Field((0.9, 0.999), description="Betas of AdamW.")
    grad_clip: float = Field(1.0, gt=0, description="Largest norm of the gradient of an arm.")
    discriminator_grad_clip: float = Field(1.0, gt=0, description="Largest norm of the gradient of the discriminators.")
    warmup_steps: int = Field(10, ge=0, description="Steps over which the rate rises from 0.")
    lr_min_ratio: float = Field(0.01, ge=0, le=1, description="Where the cosine of the rate ends, as a share of lr.")
    shuffled_speakers: bool = Field(
        False, description="Train under the embeddings of wrong speakers: a control, no arm."
    )

    @property
    def title(self) -> str:
        """The arm's name, also its folder."""
        return self.name or "+".join(self.strategies)

    @property
    def all_strategies(self) -> list[str]:
        """Strategies, then the objectives that are not among them."""
        return [*self.strategies, *(o for o in self.objectives if o not in self.strategies)]

    @model_validator(mode="after")
    def _usable_as_folder(self) -> Self:
        name = self.title
        control = name == SHUFFLED and self.shuffled_speakers
        if (name in RESERVED and not control) or set(name) & set('/\\:*?"<>|\0'):
            raise ValueError(f"{name!r} cannot be the name of an arm: it is also a folder's")
        return self


class StudySettings(BaseModel):
    """What all arms of a study share."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field("study", description="Name of the study.")
    data: str = Field("", description="Folder of speech, or a manifest.")
    base: str = Field("tiny", description="Codec: a bundled name, a folder, or a hub id.")
    speaker_encoder: str = Field("ecapa_tiny", description="Speaker encoder of conditioning and loss.")
    judge: str = Field(
        "ge2e", description="Speaker encoder of the scores; of another family than the conditioning encoder."
    )
    seeds: tuple[int, ...] = Field((0,), min_length=1, description="One run of every arm for each.")
    steps: int = Field(200, ge=1, description="Training steps.")
    batch_size: int = Field(8, ge=1, description="Crops in a batch.")
    crop_seconds: float = Field(1.28, gt=0.1, description="Length of a crop, in s.")
    targets_per_item: int = Field(1, ge=1, description="Targets drawn for every crop at every step.")
    target_choice: Literal["random", "in_batch", "stratified"] = Field(
        "random", description="How they are drawn: uniformly, from the batch, or easy, medium and hard ones in shares."
    )
    eval_every: int = Field(0, ge=0, description="Steps between judged conversions of dev speakers; 0: at the end.")
    dev_pairs: int = Field(16, ge=2, description="Conversions of dev speakers that are judged while training.")
    test_pairs: int = Field(40, ge=2, description="Conversions of test speakers that the report is about.")
    pair_seconds: float = Field(4.0, gt=0.5, description="Longest source of a conversion, in s.")
    pair_seed: int = Field(0, description="Seed of the choice of pairs, the same for all seeds of training.")
    select: Literal["last", "best"] = Field("last", description="Checkpoint to keep: the last, or the best on dev.")
    patience: int = Field(0, ge=0, description="Judged evaluations without a better one before stopping; 0: never.")
    save_every: int = Field(50, ge=1, description="Steps between checkpoints.")
    shuffled_control: bool = Field(
        True, description="Train the first arm once more under wrong embeddings, as a control."
    )
    exclude_metrics: tuple[str, ...] = Field((), description="Metrics that are not measured.")
    extra_metrics: tuple[str, ...] = Field(
        (), description="Metrics that are measured only when asked for, as whisper_wer."
    )
    samples: int = Field(4, ge=0, description="Conversions whose audio is kept for the report.")
    device: str = Field("cpu", description="cpu, cuda, or cuda:N.")
    plugins: tuple[str, ...] = Field((), description="Plugin files.")

    @model_validator(mode="after")
    def _selection_needs_evaluations(self) -> Self:
        if (self.patience or self.select == "best") and not 0 < self.eval_every < self.steps:
            raise ValueError(
                f"patience and select = 'best' choose among judged evaluations; "
                f"set eval_every between 1 and {self.steps - 1}, got {self.eval_every}"
            )
        return self

    @field_validator("seeds")
    @classmethod
    def _each_once(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("a seed is listed twice; each makes one run of every arm")
        return seeds


def read_values(path: Path) -> dict[str, Any]:
    """Plain values of a TOML file, or of a JSON file in which // may begin a comment.

    Raises:
        UserError: naming the file and what is wrong with it.
    """
    try:
        text = path.read_text()
        values = json.loads(_COMMENT.sub(_kept, text)) if path.suffix == ".json" else tomllib.loads(text)
    except FileNotFoundError:
        raise UserError(f"no file {path}; expected settings as TOML or JSON") from None
    except (OSError, ValueError) as error:
        kind = "JSON" if path.suffix == ".json" else "TOML"
        raise UserError(f"{path} is no {kind} file: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}; expected keys and values")
    return values


def _kept(found: re.Match[str]) -> str:
    """A string of JSON as it is; of a comment nothing."""
    return "" if found[0].startswith("//") else found[0]


def to_toml(values: Mapping[str, Any]) -> str:
    """A study's plain values as a TOML file: [study], then each [[arm]]."""

    def string(text: str) -> str:
        return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")  # JSON allows DEL in a string

    def literal(value: Any) -> str:
        if isinstance(value, Mapping):
            return "{ " + ", ".join(f"{string(k)} = {literal(v)}" for k, v in value.items()) + " }"
        if isinstance(value, list | tuple):
            return "[" + ", ".join(literal(item) for item in value) + "]"
        if isinstance(value, str):
            return string(value)
        if isinstance(value, float) and not math.isfinite(value):
            return str(value)
        return json.dumps(value)

    def table(header: str, entries: Mapping[str, Any]) -> str:
        lines = (f"{key if _BARE.fullmatch(key) else string(key)} = {literal(v)}" for key, v in entries.items())
        return "\n".join([header, *lines]) + "\n"

    parts = [table("[study]", values.get("study", {})), *(table("[[arm]]", arm) for arm in values.get("arm", []))]
    return "\n".join(parts)


def compose(
    shared: Mapping[str, Any], arms: Iterable[Mapping[str, Any]], where: str
) -> tuple[StudySettings, list[ArmSettings], list[float]]:
    """Study and arms from plain values; `shared` may hold arm keys too, as defaults of every arm."""
    rates = shared.get("lr")
    rates = rates if isinstance(rates, list) else []
    for rate in rates:
        if not isinstance(rate, int | float) or isinstance(rate, bool) or rate <= 0:
            raise UserError(f"{where}: lr = {rates!r}; expected a positive number, or a list of them to choose from")
    common = {key: value for key, value in shared.items() if key in StudySettings.model_fields}
    defaults = {key: value for key, value in shared.items() if key not in common and not (key == "lr" and rates)}
    study = checked(StudySettings, common, where)
    composed = [
        _arm(given, defaults, f"{where}: arm {given.get('name', number)!r}") for number, given in enumerate(arms)
    ]
    titles = [arm.title for arm in composed]
    for title in titles:
        if titles.count(title) > 1:
            raise UserError(f"{where}: two arms are called {title!r}; give each a name of its own")
    used = {name for arm in composed for name in arm.all_strategies}
    for key in defaults.keys() - ArmSettings.model_fields.keys() - used:
        if isinstance(defaults[key], Mapping):
            raise UserError(f"{where}: settings for {key!r}, which is in no arm{nearest(key, used)}")
        known = [*StudySettings.model_fields, *ArmSettings.model_fields, *used]
        raise UserError(f"{where}: unknown key {key!r}{nearest(key, known)}")
    return study, composed, [float(rate) for rate in rates]


def _arm(given: Mapping[str, Any], defaults: Mapping[str, Any], where: str) -> ArmSettings:
    """One arm from its diff: its own keys over the study's defaults, and tables of settings under strategy names."""
    for key in given:
        if key in StudySettings.model_fields and key not in ArmSettings.model_fields:
            raise UserError(f"{where}: {key!r} is shared by all arms; set it in [study]")
    values = _merged(defaults, given)
    plain = {key: value for key, value in values.items() if key in ArmSettings.model_fields}
    arm: ArmSettings = checked(ArmSettings, plain, where)
    if not arm.strategies:
        raise UserError(f"{where} has no strategies; expected strategies = ['<name>', ...]")
    settings = dict(arm.settings)
    for key, value in values.items():
        if key in plain or (key in defaults and key not in given and key not in arm.all_strategies):
            continue
        if key not in arm.all_strategies or not isinstance(value, Mapping):
            known = [*ArmSettings.model_fields, *arm.all_strategies]
            raise UserError(f"{where}: unknown key {key!r}{nearest(key, known)}")
        settings[key] = {**settings.get(key, {}), **value}
    return arm.model_copy(update={"settings": settings})


def with_overrides(values: dict[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """Apply `--set key=value` to plain values; dots descend into tables, values are TOML (bare words are strings)."""
    values = copy.deepcopy(values)
    for assignment in assignments:
        key, separator, text = assignment.partition("=")
        if not separator or not key.strip():
            raise UserError(f"--set {assignment!r}: expected key=value, e.g. --set lr=3e-4")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text.strip()
        path = _dotted(key.strip())
        table = values
        for part in path[:-1]:
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                raise UserError(f"--set {assignment!r}: {part!r} is no table")
        table[path[-1]] = value
    return values


def _dotted(key: str) -> list[str]:
    """`a."b/c".d` to its parts; a weight's `weights.a/b` needs no quotes."""
    head, _, rest = key.partition(".")
    if head == "weights" and rest:
        return [head, rest.strip("\"'")]
    return key.split(".")


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` over `below`, tables merged key by key."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if both else value
    return merged
