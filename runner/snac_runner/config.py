"""Settings of a study and of its arms, from a TOML or JSON file and `--set key=value`.

A study file is TOML; an arm in it is a diff of a few lines. Settings that all arms share (data, base, batches, steps,
conditioning encoder) belong to `[study]`, so that arms differ only in what is compared.
"""

from __future__ import annotations

import copy
import json
import locale
import math
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from snac_core.errors import UserError, nearest
from snac_core.files import parse_json
from snac_core.settings import checked

SCHEMA = 2
"""Version of config.json, result.json and study.json."""

SHUFFLED = "shuffled"
"""Name of the control arm that is trained under the embeddings of wrong speakers."""

CONTROL_ROWS = ("source", "floor", "ceiling", "mismatched", "signal_processing", SHUFFLED)
"""Controls, in the order of the report."""

SYSTEMS = "systems"
"""Folder of the results of other systems."""

AUTO, NONE = "auto", "none"
"""Values of `bank` that are not a folder."""

DATASET = "hf:"
"""What the name of a data set of the Hugging Face library begins with, in `data`."""

RESERVED = frozenset({"controls", SYSTEMS, "tables", "trials", "export", "votes", SHUFFLED, ".", ".."})
"""Names that an arm cannot have: folders of a study, and the control arm."""

NOISE_SEED = 1
"""Seed of the decoder's noise: the same in all decodes that are compared."""

RENAMED = {
    "teacher": "speaker_encoder",
    "judge": "judges",
    "also": "extra_metrics",
    "without": "exclude_metrics",
    "targets": "targets_per_item",
    "shuffled": "shuffled_control",
    "critic_lr": "discriminator_lr",
    "critic_grad_clip": "discriminator_grad_clip",
}
"""Former names of settings, to the names that replace them."""

RENAMED_IN_ARM = RENAMED | {"shuffled": "shuffled_speakers"}
"""The same, inside an arm."""

RENAMED_METRICS = {
    "teacher_secs": "speaker_encoder_secs",
    "secs_roughened": "secs_degraded",
    "whisper_wer": "wer",
}
"""Former names of metrics, to the names that replace them."""

_BARE = re.compile(r"[A-Za-z0-9_-]+")  # a TOML key that needs no quotes
_COMMENT = re.compile(r'"(?:[^"\\\n]|\\.)*"|//[^\n]*')  # a string of JSON, or a comment outside of one


class ArmSettings(BaseModel):
    """Settings in which arms can differ."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str = Field("", description="Name of the arm; the strategies joined by + where empty.")
    strategies: tuple[str, ...] = Field((), description="Strategies, in the order in which they are applied.")
    objectives: tuple[str, ...] = Field(("voice_conversion",), description="Objectives added after the strategies.")
    settings: dict[str, dict[str, Any]] = Field({}, description="Settings by strategy name.")
    weights: dict[str, float] = Field({}, description='Weight of a loss term by "<strategy>/<term>".')
    lr: float = Field(1e-3, gt=0, description="Peak learning rate of AdamW.")
    discriminator_lr: float = Field(1e-4, gt=0, description="Peak learning rate of the discriminators' own AdamW.")
    weight_decay: float = Field(1e-5, ge=0, description="Weight decay of AdamW.")
    betas: tuple[float, float] = Field((0.9, 0.999), description="Betas of AdamW.")
    grad_clip: float = Field(1.0, gt=0, description="Maximum gradient norm of an arm.")
    discriminator_grad_clip: float = Field(1.0, gt=0, description="Maximum gradient norm of the discriminators.")
    warmup_steps: int = Field(10, ge=0, description="Steps of linear warm-up of the learning rates.")
    lr_min_ratio: float = Field(
        0.01, ge=0, le=1, description="Learning rate after the cosine decay, as a share of the peak."
    )
    start: str = Field(
        "", description="Trained strategies to start from: a run folder, a bundled adapter, or a hub id; empty: none."
    )
    frozen: tuple[str, ...] = Field(
        (), description="Strategies of `start` that keep their weights; others are trained."
    )
    shuffled_speakers: bool = Field(False, description="Train under the embeddings of wrong speakers, as a control.")

    @property
    def title(self) -> str:
        """The arm's name, also its folder."""
        return self.name or "+".join(self.strategies)

    @property
    def all_strategies(self) -> list[str]:
        """Strategies, then the objectives that are not among them."""
        return [*self.strategies, *(o for o in self.objectives if o not in self.strategies)]

    @model_validator(mode="after")
    def _frozen_are_started_from(self) -> Self:
        for name in self.frozen:
            if name not in self.strategies:
                raise ValueError(f"frozen = {name!r}{nearest(name, self.strategies)}; expected a strategy of the arm, "
                                 f"{', '.join(self.strategies)}")  # fmt: skip
        if self.frozen and not self.start:
            raise ValueError(f"frozen = {', '.join(self.frozen)}: new weights would stay as they are, the identity; "
                             "expected start = RUN, with their trained weights")  # fmt: skip
        return self

    @model_validator(mode="after")
    def _usable_as_folder(self) -> Self:
        name = self.title
        control = name == SHUFFLED and self.shuffled_speakers
        if (name in RESERVED and not control) or set(name) & set('/\\:*?"<>|\0'):
            raise ValueError(f"{name!r} cannot be the name of an arm, which is also the name of its folder")
        return self


class StudySettings(BaseModel):
    """Settings that all arms of a study share."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str = Field("study", description="Name of the study.")
    data: str = Field("", description="Folder of speech, a manifest, or a data set (hf:ID).")
    base: str = Field("tiny", description="Codec: a bundled name, a folder, or a hub id.")
    speaker_encoder: str = Field("ecapa_tiny", description="Speaker encoder for conditioning and losses.")
    judges: tuple[str, ...] = Field(
        ("ge2e",),
        min_length=1,
        description="Speaker encoders for evaluation, of other families than the conditioning encoder; NAME:FILE gives "
        "weights. The first ranks the arms; verdicts need all of them to agree.",
    )
    whisper: str = Field(
        "",
        description="Whisper for word errors: a folder, or a name that faster-whisper downloads, such as base.en or "
        "large-v3. Empty: $SNAC_WHISPER, else base.en if it was downloaded before.",
    )
    language: str = Field("en", description="Language of the speech, as a code such as en or de.")
    seeds: tuple[int, ...] = Field((0,), min_length=1, description="Seeds; every arm is trained once with each.")
    steps: int = Field(200, ge=1, description="Training steps.")
    batch_size: int = Field(8, ge=1, description="Crops in a batch.")
    crop_seconds: float = Field(1.28, gt=0.1, description="Length of a crop, in s.")
    latent_cache: bool = Field(
        False,
        description="Read the codec's latents of the training speech from a cache on disk, which is built on first "
        "use: the encoder does not run in training.",
    )
    imitations: int = Field(
        0,
        ge=0,
        description="Voices of other training speakers in which the latent cache also holds each utterance, for "
        "objectives that train on imitated voices. 0: they change voices in each step.",
    )
    targets_per_item: int = Field(1, ge=1, description="Target speakers drawn for every crop at every step.")
    target_choice: Literal["random", "in_batch", "stratified"] = Field(
        "random", description="How targets are drawn: uniformly, from the batch, or by similarity (easy, medium, hard)."
    )
    bank: str = Field(
        "auto",
        min_length=1,
        description="What stratified targets and negatives are drawn from: a folder with the embedding bank of the "
        "training speech, built if it is missing; auto: one in the cache folder, for more than 4096 training "
        "utterances, else the speakers; none: the speakers.",
    )
    eval_every: int = Field(0, ge=0, description="Steps between evaluations on dev speakers; 0: only at the end.")
    dev_pairs: int = Field(
        16, ge=0, description="Conversions of dev speakers in such an evaluation; a default is a maximum; 0: none."
    )
    test_pairs: int = Field(
        40, ge=0, description="Conversions of test speakers for the report; a default is a maximum; 0: no evaluation."
    )
    pair_seconds: float = Field(4.0, gt=0.5, description="Maximum length of a source, in s.")
    pair_seed: int = Field(0, description="Seed of the choice of pairs, the same for all training seeds.")
    select: Literal["last", "best"] = Field("last", description="Checkpoint to keep: the last, or the best on dev.")
    patience: int = Field(0, ge=0, description="Stop after this many evaluations without improvement; 0: never.")
    save_every: int = Field(50, ge=1, description="Steps between checkpoints.")
    adapters: tuple[str, ...] = Field(
        (),
        description="Trained adapters that are evaluated beside the arms: bundled names, run folders, or hub ids. They "
        "have the study's base and conditioning encoder.",
    )
    shuffled_control: bool = Field(
        True, description="Also train the first arm under the embeddings of wrong speakers, as a control."
    )
    exclude_metrics: tuple[str, ...] = Field((), description="Metrics to leave out.")
    extra_metrics: tuple[str, ...] = Field((), description="Metrics to add that are measured on request only.")
    samples: int = Field(4, ge=0, description="Number of conversions with audio in the report.")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:N or mps.")
    precision: Literal["fp32", "tf32", "bf16"] = Field(
        "fp32",
        description="Of training: float32; with products rounded to TF32 on CUDA; or bfloat16 in codec and adapters, "
        "with a float32 quantizer and losses.",
    )
    accumulate: int = Field(
        1, ge=1, description="Parts in which each device computes its batch, one after the other: less memory."
    )
    checkpoint_decoder: bool = Field(
        False, description="Compute the decoder's activations again for the gradient: less memory, more time."
    )
    compile: bool = Field(False, description="Compile codec and adapters with torch.compile; the first steps are slow.")
    workers: int = Field(
        -1, ge=-1, description="Processes that read audio ahead; 0: none; -1: 4 with a GPU, none on the CPU."
    )
    plugins: tuple[str, ...] = Field((), description="Python files with plugins.")

    @model_validator(mode="after")
    def _imitations_are_in_the_latent_cache(self) -> Self:
        if self.imitations and not self.latent_cache:
            raise ValueError(f"imitations = {self.imitations} needs latent_cache = true, got false")
        return self

    @model_validator(mode="after")
    def _selection_needs_evaluations(self) -> Self:
        if (self.patience or self.select == "best") and not 0 < self.eval_every < self.steps:
            raise ValueError(
                f"patience and select = 'best' need evaluations during training; "
                f"set eval_every between 1 and {self.steps - 1}, got {self.eval_every}"
            )
        return self

    @field_validator("judges")
    @classmethod
    def _no_judge_twice(cls, judges: tuple[str, ...]) -> tuple[str, ...]:
        names = [judge.partition(":")[0] for judge in judges]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"judge {name!r} is listed twice; every further judge is another encoder")
        return judges

    @field_validator("language")
    @classmethod
    def _a_code(cls, language: str) -> str:
        code = r"[a-z]{2,3}"
        if not re.fullmatch(code, language):
            meant = locale.normalize(language.replace("-", "_")).partition("_")[0]  # "English", "en-US": en
            known = f"; did you mean {meant!r}?" if re.fullmatch(code, meant) else ""
            raise ValueError(f"expected the code of a language, such as en or de{known}")
        return language

    @field_validator("dev_pairs", "test_pairs")
    @classmethod
    def _none_or_several(cls, pairs: int) -> int:
        if pairs == 1:
            raise ValueError("one conversion is too few to evaluate; expected at least 2, or 0 for no evaluation")
        return pairs

    @field_validator("seeds")
    @classmethod
    def _each_once(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("a seed is listed twice; every arm is trained once with each seed")
        return seeds


def read_values(path: Path) -> dict[str, Any]:
    """Plain values of a TOML file, or of a JSON file with // comments.

    Raises:
        UserError: naming the file and what is wrong with it.
    """
    try:
        text = path.read_text()
        values = parse_json(_COMMENT.sub(_kept, text)) if path.suffix == ".json" else tomllib.loads(text)
    except FileNotFoundError:
        raise UserError(f"no file {path}; expected settings as TOML or JSON") from None
    except (OSError, ValueError, RecursionError) as error:
        kind = "JSON" if path.suffix == ".json" else "TOML"
        raise UserError(f"{path} is not a valid {kind} file: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}; expected keys and values")
    return values


def _kept(found: re.Match[str]) -> str:
    """A JSON string unchanged; an empty string for a comment."""
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
    """Study, arms and learning rates to choose from.

    Args:
        shared: of [study]; keys of an arm in it are defaults of every arm.
        arms: of each [[arm]].
        where: the file or command, for errors.

    Raises:
        UserError: for an unknown or renamed key, or a value that is not allowed.
    """
    _check_renamed(shared, RENAMED, where)
    rates = shared.get("lr")
    rates = rates if isinstance(rates, list) else []
    for rate in rates:
        if not isinstance(rate, int | float) or isinstance(rate, bool) or rate <= 0:
            raise UserError(f"{where}: lr = {rates!r}; expected a positive number, or a list of them to choose from")
    common = {key: value for key, value in shared.items() if key in StudySettings.model_fields}
    defaults = {key: value for key, value in shared.items() if key not in common and not (key == "lr" and rates)}
    study = checked(StudySettings, common, where)
    arms = list(arms)
    single = len(arms) == 1 and "name" not in arms[0]
    composed = [
        _arm(given, defaults, where if single else f"{where}: arm {given.get('name', number)!r}")
        for number, given in enumerate(arms)
    ]
    titles = [arm.title for arm in composed]
    for title in titles:
        if titles.count(title) > 1:
            raise UserError(f"{where}: two arms are called {title!r}; give each its own name")
    used = {name for arm in composed for name in arm.all_strategies}
    for key in defaults.keys() - ArmSettings.model_fields.keys() - used:
        if isinstance(defaults[key], Mapping):
            raise UserError(f"{where}: settings for {key!r}, which no arm uses{nearest(key, used)}")
        known = [*StudySettings.model_fields, *ArmSettings.model_fields, *used]
        raise UserError(f"{where}: unknown key {key!r}{nearest(key, known)}")
    return study, composed, [float(rate) for rate in rates]


def schema_problem(stored: Mapping[str, Any]) -> str:
    """Why this version cannot read a config.json, result.json or study.json; empty if it can."""
    found = stored.get("schema", 1)
    if found == SCHEMA:
        return ""
    age = "an earlier" if isinstance(found, int) and found < SCHEMA else "another"
    return f"written by {age} version of snac-conditioning (schema {found}; this version reads schema {SCHEMA})"


def check_schema(stored: Mapping[str, Any], path: Path) -> None:
    """Raise UserError for a file of a run or a study that another version has written."""
    if problem := schema_problem(stored):
        raise UserError(
            f"{path} was {problem}; its model/ can still be used, but a report or more training needs a new run in a "
            "new folder (--out)"
        )


def _check_renamed(values: Mapping[str, Any], renamed: Mapping[str, str], where: str) -> None:
    """Raise UserError for a key that has another name now."""
    for key in values:
        if key in renamed:
            raise UserError(f"{where}: {key!r} is now {renamed[key]!r}")


def _arm(given: Mapping[str, Any], defaults: Mapping[str, Any], where: str) -> ArmSettings:
    """One arm from its diff: its own keys over the study's defaults, and tables of settings by strategy name."""
    _check_renamed(given, RENAMED_IN_ARM, where)
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
            known = [*ArmSettings.model_fields, *StudySettings.model_fields, *arm.all_strategies]
            what = ", which is no strategy of this arm" if isinstance(value, Mapping) else ""
            raise UserError(f"{where}: unknown key {key!r}{what}{nearest(key, known)}")
        settings[key] = {**settings.get(key, {}), **value}
    return arm.model_copy(update={"settings": settings})


def read_study(path: Path) -> dict[str, Any]:
    """Plain values of a study file: a table "study", a list of tables "arm".

    Raises:
        UserError: if the file cannot be read, or has anything else.
    """
    return check_tables(read_values(path), str(path))


def check_tables(values: dict[str, Any], where: str) -> dict[str, Any]:
    """The values of a study file, if they are a [study] and [[arm]]s and nothing else; UserError otherwise."""
    for key in values:
        if key not in ("study", "arm"):
            raise UserError(f"{where}: unknown key {key!r} outside of its tables; expected [study] and [[arm]]")
    if not isinstance(values.get("study", {}), dict):
        raise UserError(f"{where}: study = {values['study']!r}; expected a table, [study]")
    arms = values.get("arm", [])
    if not isinstance(arms, list) or not all(isinstance(arm, dict) for arm in arms):
        raise UserError(f"{where}: arm is not a list of tables; expected [[arm]], with two brackets, for every arm")
    return {"study": values.get("study", {}), "arm": arms}


def stored_study(path: Path) -> StudySettings:
    """The shared settings of a study.toml."""
    values = read_study(path)
    return compose(values["study"], values["arm"], str(path))[0]


def with_data(shared: Mapping[str, Any], file: Path | None) -> dict[str, Any]:
    """The settings with absolute paths of data, bank and plugin files, given from the working folder, else from the
    settings file: a run continues from any folder."""

    def absolute(path: str) -> str:
        places = [Path(path), *([file.parent / path] if file else [])]
        return str(next((p for p in places if p.exists()), places[0]).resolve())

    settings, data, bank = dict(shared), shared.get("data"), shared.get("bank")
    if isinstance(data, str) and data and not data.startswith(DATASET):
        settings["data"] = absolute(data)
    if isinstance(bank, str) and bank and bank not in (AUTO, NONE):
        settings["bank"] = absolute(bank)
    if isinstance(plugins := shared.get("plugins"), list):
        settings["plugins"] = [absolute(path) if isinstance(path, str) else path for path in plugins]
    return settings


def with_plugins(shared: Mapping[str, Any], plugins: Sequence[str]) -> dict[str, Any]:
    """The settings with more plugin files, by their absolute paths."""
    given = shared.get("plugins", [])
    if not isinstance(given, list) or not all(isinstance(file, str) for file in given):
        raise UserError(f"plugins = {given!r}; expected a list of files: ['my_strategy.py']")
    files = [*given, *(str(Path(file).resolve()) for file in plugins)]
    return {**shared, "plugins": files} if files else dict(shared)


def with_overrides(values: dict[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """Apply `--set key=value` to plain values; dots lead into tables, values are TOML (bare words are strings)."""
    values = copy.deepcopy(values)
    for assignment in assignments:
        key, separator, text = assignment.partition("=")
        if not separator or not key.strip():
            raise UserError(f"--set {assignment!r}: expected key=value, e.g. --set lr=3e-4")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except (tomllib.TOMLDecodeError, RecursionError):
            value = text.strip()
        path = _dotted(key.strip())
        table = values
        for part in path[:-1]:
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                raise UserError(f"--set {assignment!r}: {part!r} is not a table")
        table[path[-1]] = value
    return values


def _dotted(key: str) -> list[str]:
    """Parts of `a.b.c`; in `weights.a/b`, the name of the term is one part, with or without quotes."""
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
