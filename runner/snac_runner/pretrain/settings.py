"""Settings of a base codec's training, and a preset for each codec size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from snac_core.codec import PRESETS as RELEASED
from snac_core.errors import UserError, nearest
from snac_core.settings import checked

Share = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]

RENAMED = {
    "batch": "batch_size",
    "lr_warmup": "warmup_steps",
    "listen_every": "validate_every",
    "quantiser.continuous": "quantizer.unquantized_steps",
    "quantiser.blend": "quantizer.blend_steps",
    "quantiser": "quantizer",
    "quantizer.continuous": "quantizer.unquantized_steps",
    "quantizer.blend": "quantizer.blend_steps",
    "adversary.after": "adversary.start_step",
    "adversary.rise": "adversary.warmup_steps",
}
"""Settings that have another name: an error points to it."""


def check_names(values: Mapping[str, Any]) -> None:
    """Raise UserError for a key of RENAMED, with the name to use."""
    for name, new in RENAMED.items():
        group, _, key = name.rpartition(".")
        table = values.get(group) if group else values
        if isinstance(table, Mapping) and key in table:
            raise UserError(f"unknown setting {name!r} of a pretraining; the setting is called {new!r}")


class Settings(BaseModel):
    """Unknown keys are refused; values cannot be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class LossWeights(Settings):
    """Weights of the raw loss terms."""

    mel_log: float = Field(45.0, ge=0, description="Log mel magnitudes, L1 in bels.")
    mel_linear: float = Field(5.0, ge=0, description="Mel magnitudes, L1 relative to the target's mean.")
    stft_log: float = Field(10.0, ge=0, description="Log STFT magnitudes, L1 in bels.")
    stft_linear: float = Field(5.0, ge=0, description="STFT magnitudes, L1 relative to the target's mean.")
    commitment: float = Field(5.0, ge=0, description="Moves encodings towards their codebook entries.")
    codebook: float = Field(1.0, ge=0, description="Moves codebook entries towards their encodings.")
    adversarial: float = Field(1.0, ge=0, description="Hinge loss of the codec against the discriminators.")
    features: float = Field(10.0, ge=0, description="Feature matching: relative L1 of the discriminators' features.")
    speaker: float = Field(0.0, ge=0, description="1 - cosine of `speaker_encoder`'s embeddings; 0: not computed.")


class QuantizerTraining(Settings):
    """How codebook collapse is prevented."""

    unquantized_steps: int | None = Field(
        None, ge=0, description="First steps, in which the latent is not quantized; None: 300, or 0 with `start`."
    )
    blend_steps: int | None = Field(
        None, ge=0, description="Steps after that over which quantization sets in; None: 300, or 0 with `start`."
    )
    kmeans_batches: int = Field(
        16, ge=0, description="Batches for the k-means initialization of the codebooks; 0: random initialization."
    )
    restart_every: int = Field(100, ge=0, description="Steps between restarts of unused entries; 0: never.")
    lr_scale: float = Field(5.0, gt=0, description="Learning rate of the codebooks, relative to that of the codec.")
    level_dropout: Share = Field(0.1, description="Share of items that use only some of the coarse levels.")


def _none(value: Any) -> Any:
    """A command line cannot write None; `none` stands for it."""
    return None if value == "none" else value


class Adversary(Settings):
    """The discriminators."""

    start: str | None = Field(
        None, description="Run folder of a training whose discriminators to continue; None: new ones."
    )
    start_step: int = Field(2000, ge=0, description="Step from which the discriminators train and their losses count.")
    warmup_steps: int = Field(500, ge=0, description="Steps over which the weight of their losses rises from 0 to 1.")
    lr: float = Field(3e-4, gt=0, description="Peak learning rate of the discriminators.")
    periods: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (2, 3, 5, 7, 11), description="Periods of the multi-period discriminator, in samples."
    )
    n_ffts: tuple[Annotated[int, Field(ge=16)], ...] = Field(
        (512, 1024, 2048), description="Window lengths of the multi-resolution discriminator, in samples."
    )
    period_channels: int = Field(
        32,
        ge=1,
        description="Channels of a period discriminator's first layer; the next have 2, 4 and 8 times as many.",
    )
    spectral_channels: int = Field(32, ge=1, description="Channels of every layer of a spectral discriminator.")
    seconds: float | None = Field(
        None, gt=0, description="Length of the random segment that discriminators get, in s; None: the whole crop."
    )


class Augmentation(Settings):
    """Random changes of a crop before it is both the codec's input and its target.

    A change of speed moves pitch and formants together; an opposite change of the formants leaves a change of pitch.
    """

    gain_db: float = Field(6.0, ge=0, description="Largest change of level, in dB, up or down.")
    speed: float = Field(0.15, ge=0, lt=0.5, description="Largest change of speed, and with it of pitch, relative.")
    formant: float = Field(0.12, ge=0, lt=0.5, description="Largest change of the formants alone, relative.")
    changed: Share = Field(0.4, description="Share of items with a change of speed and formants.")


class PretrainSettings(Settings):
    """Settings of a base codec's training."""

    codec: str = Field("tiny", description="Preset, or a JSON file of SNAC's arguments; ignored with `start`.")
    start: str | None = Field(None, description="Bundled name, folder or hub id of a codec to continue from.")
    levels: tuple[int, ...] = Field((), description="Strides of quantizer levels to add to those of `start`.")
    widths: tuple[int, ...] = Field(
        (), description="encoder_dim and decoder_dim to widen `start` to; at first its output does not change."
    )
    rates: tuple[tuple[int, ...], ...] = Field(
        (), description="New encoder_rates and decoder_rates of `start`; its strided filters are resampled."
    )
    frozen: tuple[Literal["encoder", "quantizer", "decoder"], ...] = Field(
        (), description="Parts that keep the weights of `start`. Codes stay valid with encoder and quantizer frozen."
    )
    speaker_encoder: str = Field(
        "ecapa_tiny", description="Encoder of the loss term `speaker`; evaluate with one of another family."
    )
    data: tuple[str, ...] = Field((), description="Folders of speech; their train splits are used.")
    synthetic: int = Field(
        80, ge=0, le=80, description="Number of synthetic speakers to add; held-out ones are never trained on."
    )
    synthetic_sentences: int = Field(48, ge=1, le=48, description="Sentences per synthetic speaker.")
    synthetic_share: Share = Field(0.25, description="Synthetic share of each batch, if `data` is given too.")
    steps: int = Field(20000, ge=1, description="Training steps.")
    batch_size: int = Field(8, ge=1, description="Crops per step, on each device.")
    crop_seconds: float = Field(0.72, gt=0, description="Length of a crop, in s.")
    lr: float = Field(6e-4, gt=0, description="Peak learning rate.")
    warmup_steps: int = Field(100, ge=0, description="Steps of linear warm-up of the learning rate.")
    lr_min_ratio: Share = Field(0.02, description="Learning rate at the end of the cosine decay, relative to the peak.")
    weight_decay: float = Field(1e-3, ge=0, description="Weight decay of AdamW, on matrices only.")
    betas: tuple[Beta, Beta] = Field(
        (0.8, 0.99), description="Betas of the codec's AdamW; fine-tune with larger ones, e.g. [0.9, 0.999]."
    )
    grad_clip: float = Field(5.0, gt=0, description="Largest gradient norm.")
    ema: float = Field(0.999, ge=0, lt=1, description="Decay of the moving average of the weights, which is saved.")
    seed: int = Field(0, ge=0, description="Seed of all random numbers.")
    weights: LossWeights = LossWeights()
    quantizer: QuantizerTraining = QuantizerTraining()
    adversary: Annotated[Adversary | None, BeforeValidator(_none)] = Field(
        Adversary(), description="The discriminators; none: no adversary."
    )
    augmentation: Augmentation = Augmentation()
    device: str = Field("auto", description="auto, cpu, cuda, cuda:N or mps.")
    bf16: bool | None = Field(None, description="Mixed precision; None: on CUDA devices.")
    compile: bool | None = Field(
        None, description="torch.compile of the codec's layers; None: on CUDA devices without `graphs`."
    )
    graphs: bool = Field(True, description="On a single CUDA device, run each step as a CUDA graph.")
    log_every: int = Field(50, ge=1, description="Steps between log lines.")
    loaders: int = Field(4, ge=1, description="Data loading processes, on CUDA devices.")
    checkpoint_seconds: float = Field(180.0, gt=0, description="Time between checkpoints, in s.")
    validate_every: int = Field(
        1000, ge=0, description="Steps between validations with audio in TensorBoard; 0: never."
    )

    @model_validator(mode="before")
    @classmethod
    def _names(cls, values: Any) -> Any:
        if isinstance(values, Mapping):
            check_names(values)
        return values


TINY: dict[str, Any] = {
    "sampling_rate": 16000,
    "encoder_dim": 16,
    "encoder_rates": [4, 4, 5, 2],
    "decoder_dim": 384,
    "decoder_rates": [2, 5, 4, 4],
    "attn_window_size": None,
    "codebook_size": 1024,
    "codebook_dim": 8,
    "vq_strides": [4, 2, 1],
    "noise": True,
    "depthwise": False,
}
"""A codec for CPUs: 3.7 M parameters, 16 kHz, codes at 25, 50 and 100 Hz, 1.75 kbps."""

_LARGE: dict[str, Any] = {
    "synthetic": 0,
    "steps": 400_000,
    "batch_size": 16,
    "lr": 3e-4,
    "warmup_steps": 1000,
    "lr_min_ratio": 0.05,
    "quantizer": {"unquantized_steps": 2000, "blend_steps": 2000, "kmeans_batches": 64, "restart_every": 200},
    "adversary": {"start_step": 10_000, "warmup_steps": 5000, "lr": 3e-4},
    "validate_every": 5000,
    "log_every": 100,
}
_RECIPES: dict[str, dict[str, Any]] = {
    "tiny": {},
    # a crop is a whole number of frames of the coarsest level and, at 32 and 44 kHz, of attention windows
    "snac_24khz": {**_LARGE, "crop_seconds": 18 * 2048 / 24000},
    "snac_32khz": {**_LARGE, "crop_seconds": 4 * 12288 / 32000},
    "snac_44khz": {**_LARGE, "crop_seconds": 5 * 12288 / 44100},
}
PRESETS = tuple(_RECIPES)


def recipe(name: str, **changes: Any) -> PretrainSettings:
    """The settings of a preset, with changes by field.

    Args:
        name: tiny, or snac_24khz, snac_32khz or snac_44khz: upstream's sizes. To fine-tune released weights add
            `start="hubertsiuzdak/snac_24khz"`, a lower `lr`, and
            `quantizer={"unquantized_steps": 0, "blend_steps": 0}`.
        changes: fields of PretrainSettings; nested ones as mappings, which change single entries.

    Raises:
        UserError: for an unknown preset, an unknown field, or an invalid value.
    """
    check_names(changes)
    if name not in _RECIPES:
        raise UserError(f"unknown preset {name!r}{nearest(name, PRESETS)}")
    fields = {"codec": name, **_RECIPES[name]}
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(fields.get(key), dict)
        fields[key] = {**fields[key], **value} if both else value
    settings: PretrainSettings = checked(PretrainSettings, fields, f"the preset {name!r}")
    return settings


def codec_config(name: str) -> dict[str, Any] | str:
    """The argument of SNAC.from_config for a preset's name or a JSON file."""
    return dict(TINY) if name == "tiny" else dict(RELEASED[name]) if name in RELEASED else name
