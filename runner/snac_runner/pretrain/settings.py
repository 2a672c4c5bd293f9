"""What a training of a base codec can be told.

Recipes: which codec, and how it is trained."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from snac_core.codec import PRESETS as RELEASED
from snac_core.errors import UserError, nearest
from snac_core.settings import checked

Share = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class Settings(BaseModel):
    """Settings refuse unknown keys and cannot be changed once made."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class LossWeights(Settings):
    """What each raw term counts."""

    mel_log: float = Field(45.0, ge=0, description="Log mel magnitudes, L1 in bels.")
    mel_linear: float = Field(5.0, ge=0, description="Mel magnitudes, L1 relative to the target's mean.")
    stft_log: float = Field(10.0, ge=0, description="Log STFT magnitudes, L1 in bels.")
    stft_linear: float = Field(5.0, ge=0, description="STFT magnitudes, L1 relative to the target's mean.")
    commitment: float = Field(5.0, ge=0, description="Pulls encodings to their entries.")
    codebook: float = Field(1.0, ge=0, description="Pulls entries to their encodings.")
    adversarial: float = Field(1.0, ge=0, description="Hinge of the discriminators.")
    features: float = Field(10.0, ge=0, description="Distance of the discriminators' features, relative.")
    speaker: float = Field(0.0, ge=0, description="1 - cosine of `speaker_encoder`'s embeddings; 0: not computed.")


class QuantiserTraining(Settings):
    """What keeps the codes alive."""

    continuous: int | None = Field(
        None, ge=0, description="Steps in which the latent passes unrounded; None: 300, or 0 with `start`."
    )
    blend: int | None = Field(
        None, ge=0, description="Steps in which rounding is blended in after that; None: 300, or 0 with `start`."
    )
    kmeans_batches: int = Field(16, ge=0, description="Batches that the codebooks are laid into; 0: as initialised.")
    restart_every: int = Field(100, ge=0, description="Steps after which unused entries are moved; 0: never.")
    lr_scale: float = Field(5.0, gt=0, description="Learning rate of the entries, relative to that of the codec.")
    level_dropout: Share = Field(0.1, description="Share of the items that keep only some of the coarse levels.")


def _none(value: Any) -> Any:
    """A command line cannot write None; `none` is the word for it."""
    return None if value == "none" else value


class Adversary(Settings):
    """The discriminators."""

    after: int = Field(2000, ge=0, description="Step from which discriminators train and are listened to.")
    rise: int = Field(500, ge=0, description="Steps over which their weight rises to the full one.")
    lr: float = Field(3e-4, gt=0, description="Peak learning rate of the discriminators.")
    periods: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (2, 3, 5, 7, 11), description="Of the period discriminators, in samples."
    )
    n_ffts: tuple[Annotated[int, Field(ge=16)], ...] = Field(
        (512, 1024, 2048), description="Windows of the spectral discriminators, in samples."
    )
    period_channels: int = Field(32, ge=1, description="Of the first layer; the next have 2, 4 and 8 times as many.")
    spectral_channels: int = Field(32, ge=1, description="Of every layer.")
    seconds: float | None = Field(
        None, gt=0, description="Length of the stretch of a crop that discriminators hear, in s; None: all of it."
    )


class Augmentation(Settings):
    """What may happen to a crop before the codec hears it; the codec is to reproduce what it heard.

    Speed moves pitch and formants alike; with the formants moved back it is the pitch that has changed.
    """

    gain_db: float = Field(6.0, ge=0, description="Largest change of level, in dB, either way.")
    speed: float = Field(0.15, ge=0, lt=0.5, description="Largest change of speed, and with it of pitch, relative.")
    formant: float = Field(0.12, ge=0, lt=0.5, description="Largest change of the formants by themselves, relative.")
    changed: Share = Field(0.4, description="Share of the items whose speed and formants change.")


class PretrainSettings(Settings):
    """A training of a base codec."""

    codec: str = Field("tiny", description="Preset, or a JSON file of SNAC's arguments; ignored with `start`.")
    start: str | None = Field(None, description="Bundled name, folder or hub id of a codec to continue from.")
    levels: tuple[int, ...] = Field((), description="Strides of quantiser levels to add to those of `start`.")
    widths: tuple[int, ...] = Field(
        (), description="encoder_dim and decoder_dim to widen `start` to; its output is at first the same."
    )
    rates: tuple[tuple[int, ...], ...] = Field(
        (), description="encoder_rates and decoder_rates to give to `start`, whose strided filters are stretched."
    )
    frozen: tuple[Literal["encoder", "quantizer", "decoder"], ...] = Field(
        (),
        description="Parts that keep the weights of `start`: encoder, quantizer (codes then mean the same), decoder.",
    )
    speaker_encoder: str = Field(
        "ecapa_tiny", description="Of the term `speaker`; who judges the codec must be of another family."
    )
    data: tuple[str, ...] = Field((), description="Folders of speech; their train splits are trained on.")
    synthetic: int = Field(
        80, ge=0, le=80, description="Synthetic speakers to add; the held-out ones are never trained on."
    )
    synthetic_sentences: int = Field(48, ge=1, le=48, description="Sentences of each synthetic speaker.")
    synthetic_share: Share = Field(0.25, description="Of each batch, where there is recorded speech too.")
    steps: int = Field(20000, ge=1, description="Of the optimizer.")
    batch: int = Field(8, ge=1, description="Crops a step, on each device.")
    crop_seconds: float = Field(0.72, gt=0, description="Length of a crop, in s.")
    lr: float = Field(6e-4, gt=0, description="Peak learning rate.")
    lr_warmup: int = Field(100, ge=0, description="Steps until the peak.")
    lr_min_ratio: Share = Field(0.02, description="Last learning rate relative to the peak; a cosine leads there.")
    weight_decay: float = Field(1e-3, ge=0, description="Of AdamW, on matrices only.")
    betas: tuple[Beta, Beta] = Field(
        (0.8, 0.99), description="Of the codec's AdamW; long memories suit weights that are done."
    )
    grad_clip: float = Field(5.0, gt=0, description="Largest gradient norm of the codec.")
    ema: float = Field(0.999, ge=0, lt=1, description="Memory of the averaged weights, which are the ones kept.")
    seed: int = Field(0, ge=0, description="Of everything random.")
    weights: LossWeights = LossWeights()
    quantiser: QuantiserTraining = QuantiserTraining()
    adversary: Annotated[Adversary | None, BeforeValidator(_none)] = Field(
        Adversary(), description="The discriminators; none: no adversary."
    )
    augmentation: Augmentation = Augmentation()
    device: str = Field("auto", description="cpu, cuda, or auto.")
    bf16: bool | None = Field(None, description="Mixed precision; None: where the device gains by it.")
    compile: bool | None = Field(
        None, description="torch.compile of the codec's layers; None: on CUDA devices where no step is recorded."
    )
    graphs: bool = Field(
        True, description="On one CUDA device a step is recorded and replayed, which starts its kernels sooner."
    )
    log_every: int = Field(50, ge=1, description="Steps between log lines.")
    loaders: int = Field(4, ge=1, description="Processes that prepare batches where an accelerator waits for them.")
    checkpoint_seconds: float = Field(180.0, gt=0, description="Between checkpoints, in s.")
    listen_every: int = Field(1000, ge=0, description="Steps between validations with audio in TensorBoard; 0: never.")


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
"""A base for CPUs: 3.7 M parameters, 16 kHz, codes at 25, 50 and 100 Hz, 1.75 kbps."""

_LARGE: dict[str, Any] = {
    "synthetic": 0,
    "steps": 400_000,
    "batch": 16,
    "lr": 3e-4,
    "lr_warmup": 1000,
    "lr_min_ratio": 0.05,
    "quantiser": {"continuous": 2000, "blend": 2000, "kmeans_batches": 64, "restart_every": 200},
    "adversary": {"after": 10_000, "rise": 5000, "lr": 3e-4},
    "listen_every": 5000,
    "log_every": 100,
}
_RECIPES: dict[str, dict[str, Any]] = {
    "tiny": {},
    # crops hold a whole number of the coarsest code's frames and, at 32 and 44 kHz, of attention windows
    "snac_24khz": {**_LARGE, "crop_seconds": 18 * 2048 / 24000},
    "snac_32khz": {**_LARGE, "crop_seconds": 4 * 12288 / 32000},
    "snac_44khz": {**_LARGE, "crop_seconds": 5 * 12288 / 44100},
}
PRESETS = tuple(_RECIPES)


def recipe(name: str, **changes: Any) -> PretrainSettings:
    """The settings of a preset, with changes by field.

    Args:
        name: tiny, or snac_24khz, snac_32khz or snac_44khz: upstream's sizes. To fine-tune released weights add
            `start="hubertsiuzdak/snac_24khz"`, a lower `lr`, and `quantiser={"continuous": 0, "blend": 0}`.
        changes: fields of PretrainSettings; nested ones as mappings, which change single entries.

    Raises:
        UserError: for an unknown preset, or a field that is unknown or has no such value.
    """
    if name not in _RECIPES:
        raise UserError(f"unknown preset {name!r}{nearest(name, PRESETS)}")
    fields = {"codec": name, **_RECIPES[name]}
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(fields.get(key), dict)
        fields[key] = {**fields[key], **value} if both else value
    settings: PretrainSettings = checked(PretrainSettings, fields, f"the preset {name!r}")
    return settings


def codec_config(name: str) -> dict[str, Any] | str:
    """What SNAC.from_config takes for a preset's name or a file."""
    return dict(TINY) if name == "tiny" else dict(RELEASED[name]) if name in RELEASED else name
