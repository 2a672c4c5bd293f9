"""A frozen codec with strategies attached: the one signal path of training, evaluation and conversion."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from snac_core import hub
from snac_core.checkpoint import Description, Stored, load_state, read_tensors, save_strategies
from snac_core.codec import SNAC
from snac_core.codec.batches import checked_lengths, decode_each, encode_each
from snac_core.codec.checks import check_audio, check_embedding, check_finite
from snac_core.conditioning import REFERENCE, REFERENCE_SECONDS, Conditioning, EncoderIdentity
from snac_core.errors import UserError
from snac_core.frozen import FrozenActivations
from snac_core.hooks import Edit, hook_tables
from snac_core.plugin_guard import guarded
from snac_core.plugins import Catalogue, discover
from snac_core.settings import validated
from snac_core.speakers.encoder import SpeakerEncoder, load_speaker_encoder
from snac_core.strategy import Strategy
from snac_core.taps import Taps, is_before_vq

EditCallback = Callable[[str, Tensor, Tensor], None]


@dataclass(frozen=True)
class Latents:
    """One batch up to the codes.

    Attributes:
        z: the latent that was quantized (B, C, F), edited where a strategy acts before VQ.
        z_q: its quantized value (B, C, F), before any edit after VQ.
        codes: one integer tensor (B, F / stride) per codebook, coarse first.
    """

    z: Tensor
    z_q: Tensor
    codes: list[Tensor]

    def __getitem__(self, rows: slice) -> Latents:
        """These rows of the batch."""
        return Latents(self.z[rows], self.z_q[rows], [level[rows] for level in self.codes])


@dataclass(frozen=True)
class Reconstruction:
    """One batch through the whole path.

    Attributes:
        audio: (B, 1, T), of the input's length.
        z, z_q, codes: as in Latents.
    """

    audio: Tensor
    z: Tensor
    z_q: Tensor
    codes: list[Tensor]

    def __getitem__(self, rows: slice) -> Reconstruction:
        """These rows of the batch."""
        return Reconstruction(self.audio[rows], self.z[rows], self.z_q[rows], [level[rows] for level in self.codes])


class ConditionedCodec(nn.Module):
    """A codec, frozen, and the strategies that condition it.

    Args:
        codec: a `SNAC` (frozen in place) or a name for `SNAC.from_pretrained`.
        strategies: names of registered strategies, or `Strategy` classes, in the order in which they act.
        speaker_encoder: the encoder whose embeddings condition the model, or its name.
        speaker_dim: S, for embeddings from another source; give either this or `speaker_encoder`.
        config: settings per strategy name.
        plugins: the catalogue to look names up in; defaults to the installed plugins.

    Attributes:
        codec: the frozen `SNAC`.
        encoder: identity of the speaker encoder; None without strategies.
        evaluation: figures of a judge for the model card. They are saved only if the weights have not changed since.

    Raises:
        UserError: for an unknown strategy, setting or tap, a strategy listed twice, an invalid hook, or neither a
            speaker encoder nor a dimension.
    """

    def __init__(
        self,
        codec: SNAC | str,
        strategies: Sequence[str | type[Strategy]] = (),
        *,
        speaker_encoder: SpeakerEncoder | str | None = None,
        speaker_dim: int | None = None,
        config: Mapping[str, Mapping[str, Any]] | None = None,
        plugins: Catalogue | None = None,
    ) -> None:
        super().__init__()
        self.codec = (SNAC.from_pretrained(codec) if isinstance(codec, str) else codec).freeze()
        self.encoder = _identity(speaker_encoder, speaker_dim, needed=bool(strategies))
        taps = Taps(self.encoder.dim if self.encoder else 0, self.codec.taps, self.codec.quantizer)
        self.evaluation: dict[str, Any] | None = None
        self._edit_scale = 1.0
        self.strategies = nn.ModuleDict()
        if isinstance(strategies, str | Mapping):
            raise UserError(
                f"strategies is {strategies!r:.60}; expected a list, such as ['phase6_encoder_adapter'], and their "
                "settings as config={name: {...}}"
            )
        settings = dict(config or {})
        for strategy in strategies:
            if isinstance(strategy, str):
                plugins = plugins or discover()
                cls: type[Strategy] = plugins.strategies[strategy]
            else:
                cls = strategy
            if cls.name in self.strategies:
                raise UserError(f"strategy {cls.name!r} is listed twice; each acts once, in listed order")
            if hasattr(nn.ModuleDict, cls.name):
                raise UserError(f"strategy {cls.name!r}: torch needs this name for itself; choose another")
            values = validated(cls, settings.pop(cls.name, {}))
            with guarded(f"__init__ of strategy {cls.name!r}"):
                self.strategies[cls.name] = cls(values, taps)
        if settings:
            raise UserError(f"settings for {sorted(settings)[0]!r}, which is not among {list(self.strategies)}")
        self._hooks = hook_tables(list(self.attached.values()), taps)
        self._on_edit: EditCallback | None = None

    # ---------------------------------------------------------------- the path

    @property
    def edit_scale(self) -> float:
        """Factor of every edit: 1, the default, is the edit as trained, 0 the bare codec. Not saved.

        Above 1, outputs are more similar to the target up to a point, and lose words. What is multiplied is the change
        of the activation, or what a strategy that takes `scale` (see `before_vq`) multiplies itself.

        Raises:
            UserError: if set to a negative or not finite number.
        """
        return self._edit_scale

    @edit_scale.setter
    def edit_scale(self, scale: float) -> None:
        if isinstance(scale, bool) or not isinstance(scale, Real) or not 0 <= scale < float("inf"):
            raise UserError(f"edit_scale is a number of at least 0; got {scale!r}")
        self._edit_scale = float(scale)

    def latents(
        self, audio: Tensor, cond: Tensor | Conditioning | None = None, *, frozen: FrozenActivations | None = None
    ) -> Latents:
        """Encode, edit, quantize: the part of `reconstruct` before the decoder.

        Arguments and errors as in `reconstruct`; the result has B, or k * B, rows.
        """
        frozen = frozen or FrozenActivations(self.codec, audio)
        if cond is None:
            return Latents(frozen.at("latent"), frozen.at("quantized"), frozen.codes)
        cond, copies = self._rows(cond, audio.shape[0])
        if first := self._first(before_vq=True):
            z = self._apply_edits(frozen, first, "latent", cond, copies)
            return Latents(z, *self.codec.quantizer(z))
        codes = [_repeat(level, copies) for level in frozen.codes]
        return Latents(_repeat(frozen.at("latent"), copies), _repeat(frozen.at("quantized"), copies), codes)

    def reconstruct(
        self,
        audio: Tensor,
        cond: Tensor | Conditioning | None = None,
        *,
        frozen: FrozenActivations | None = None,
        latents: Latents | None = None,
    ) -> Reconstruction:
        """Encode, edit, quantize, edit, decode; differentiable through the quantizer (straight-through).

        Args:
            audio: (B, 1, T) at the codec's sample rate.
            cond: one row for all items, B rows, or k * B rows (k targets per item; row n * B + b belongs to item b), or
                the embeddings alone. None: the bare codec.
            frozen: activations of the bare codec on the same `audio`, to share their computation.
            latents: of the same `audio` and `cond`, if they have been computed.

        Returns:
            a Reconstruction of B, or k * B, rows.

        Raises:
            UserError: for audio of another shape, dtype or device, embeddings of another dimension or encoder, or
                another number of rows.
        """
        frozen = frozen or FrozenActivations(self.codec, audio)
        latents = latents or self.latents(audio, cond, frozen=frozen)
        if cond is None:
            return Reconstruction(frozen.output, latents.z, latents.z_q, latents.codes)
        cond, copies = self._rows(cond, audio.shape[0])
        if self._first(before_vq=True):
            audio_hat = self.decode_quantized(latents.z_q, cond)
        elif first := self._first(before_vq=False):
            audio_hat = self._apply_edits(frozen, first, "audio", cond, copies)
        else:
            audio_hat = _repeat(frozen.output, copies)
        return Reconstruction(audio_hat[..., : audio.shape[-1]], latents.z, latents.z_q, latents.codes)

    def forward(
        self, audio: Tensor, speaker_embedding: Tensor | Conditioning | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Encode and decode, conditioned on both sides of the quantizer.

        Args:
            audio: (B, 1, T) at the codec's sample rate.
            speaker_embedding: (B, S), (1, S) or (S,), of unit norm, or a `Conditioning`. None: the bare codec.

        Returns:
            audio (B, 1, T), and codes as `encode` returns them.

        Raises:
            UserError: as `reconstruct`, and for NaN or infinity in `audio`.
        """
        check_audio(audio, next(self.codec.parameters()))
        check_finite(audio)
        cond = None if speaker_embedding is None else _conditioning(speaker_embedding)
        if cond is not None:
            self._rows(cond, len(audio))
            check_embedding(cond.speaker)
        out = self.reconstruct(audio, cond)
        return out.audio, out.codes

    def encode(
        self,
        audio: Tensor,
        speaker_embedding: Tensor | Conditioning | None = None,
        *,
        lengths: Sequence[int] | Tensor | None = None,
    ) -> list[Tensor]:
        """Audio to codes, conditioned by the strategies that act before VQ.

        Args:
            audio: (B, 1, T) at the codec's sample rate.
            speaker_embedding: (B, S), (1, S) or (S,), of unit norm, or a `Conditioning`. None: the bare codec.
            lengths: of items of different lengths, in samples, as in `SNAC.encode`.

        Returns:
            one integer tensor (B, F / stride) per codebook, coarse first.

        Raises:
            UserError: as `forward`, and for an embedding if no strategy acts before VQ.
        """
        cond = self.conditioning(speaker_embedding, before_vq=True)
        if cond is None:
            return self.codec.encode(audio, lengths=lengths)
        check_audio(audio, next(self.codec.parameters()))
        cond = cond.expand(audio.shape[0])
        if lengths is None:
            check_finite(audio)
            return self.latents(audio, cond).codes
        counts = checked_lengths(lengths, audio.shape[0], audio.shape[-1])
        return encode_each(lambda part, rows: self.encode(part, cond[rows]), audio, counts, self.codec.padding_multiple)

    def decode(
        self,
        codes: Sequence[Tensor],
        speaker_embedding: Tensor | Conditioning | None = None,
        *,
        length: int | None = None,
        lengths: Sequence[int] | Tensor | None = None,
    ) -> Tensor:
        """Codes to audio, conditioned by the strategies that act after VQ.

        Args:
            codes: one integer tensor (B, F / stride) per codebook, coarse first.
            speaker_embedding: (B, S), (1, S) or (S,), of unit norm, or a `Conditioning`. None: the bare codec.
            length: number of samples to return; None: all, with the padding of `encode`.
            lengths: of items of different lengths, in samples, as in `SNAC.decode`.

        Returns:
            (B, 1, T) at the codec's sample rate.

        Raises:
            UserError: for codes that are not this codec's, a `length` beyond them, an embedding of another dimension
                or encoder, and for an embedding if no strategy acts after VQ.
        """
        cond = self.conditioning(speaker_embedding, before_vq=False)
        if cond is None:
            return self.codec.decode(list(codes), length, lengths=lengths)
        if lengths is not None:
            counts, rows = self.codec.item_lengths(codes, lengths, length), cond.expand(codes[0].shape[0])
            return decode_each(
                lambda part, index: self.decode(part, rows[index]), codes, counts,
                [self.codec.hop_length * stride for stride in self.codec.vq_strides], self.codec.padding_multiple,
            )  # fmt: skip
        self.codec.check_codes(codes)
        audio = self.decode_quantized(self.codec.quantizer.from_codes(list(codes)), cond.expand(codes[0].shape[0]))
        if length is not None and not 0 < length <= audio.shape[-1]:
            raise UserError(f"length {length} of audio from codes that hold {audio.shape[-1]} samples")
        return audio[..., :length]

    def compile(self) -> Self:  # type: ignore[override]  # as in SNAC
        """`SNAC.compile` of the codec; the edits of strategies stay as they are."""
        self.codec.compile()
        return self

    def acts(self, *, before_vq: bool) -> bool:
        """Whether a strategy edits the signal before the quantizer, or after it."""
        return self._first(before_vq=before_vq) is not None

    def conditioning(self, speaker_embedding: Tensor | Conditioning | None, *, before_vq: bool) -> Conditioning | None:
        """What one side of the quantizer is conditioned on; None without an embedding.

        Raises:
            UserError: if no strategy acts on that side, and for an embedding of another dimension or encoder.
        """
        if speaker_embedding is None:
            return None
        if not self.acts(before_vq=before_vq):
            other, call = ("after", "decode(codes") if before_vq else ("before", "encode(audio")
            verb = "encode" if before_vq else "decode"
            raise UserError(
                f"{self._title()} acts only {other} VQ, so an embedding has no effect on {verb}; "
                f"give it to {call}, speaker_embedding=...)"
            )
        cond = _conditioning(speaker_embedding)
        self._check(cond)
        check_embedding(cond.speaker)
        return cond.to(next(self.codec.parameters()))

    @property
    def extras(self) -> frozenset[str]:
        """Names of what the strategies need of `Conditioning.extras`, beside the speaker embedding."""
        return frozenset(name for strategy in self.attached.values() for name in strategy.extras)

    @torch.no_grad()
    def target(self, speaker_embedding: Tensor | Conditioning, speech: Tensor) -> Conditioning:
        """What to convert to, with everything that the strategies need.

        Args:
            speaker_embedding: (B, S), (1, S) or (S,), of unit norm, or a `Conditioning`.
            speech: (B, 1, T) of the targets, at the codec's rate. Its first `REFERENCE_SECONDS` are encoded by the bare
                codec if a strategy attends to them, else it is not used.

        Raises:
            UserError: for speech of another shape, dtype or device, with NaN or infinity, or another number of rows.
        """
        cond = _conditioning(speaker_embedding)
        if REFERENCE not in self.extras:
            return cond
        check_audio(speech, next(self.codec.parameters()))
        check_finite(speech)
        speech = speech[..., : round(REFERENCE_SECONDS * self.codec.sampling_rate)]
        frames = -(-speech.shape[-1] // self.codec.hop_length)  # without the padding
        latent = FrozenActivations(self.codec, speech).at("latent")[..., :frames]
        return Conditioning(cond.speaker, {**cond.extras, REFERENCE: latent.to(cond.speaker)}, cond.encoder)

    def encode_latent(self, audio: Tensor, cond: Conditioning | None = None) -> Tensor:
        """The part of `reconstruct` before the quantizer.

        Args:
            audio: (B, 1, T), padded as by `SNAC.preprocess`.
            cond: of B rows. None: the bare codec.

        Returns:
            the latent (B, C, F).
        """
        if cond is None:
            return self.codec.advance(audio, None, "latent")
        x, position = audio, None
        for tap in self._edited(before_vq=True):
            x = self.codec.advance(x, position, tap)
            x, position = self._edit(x, tap, cond), tap
        return self.codec.advance(x, position, "latent")

    def decode_quantized(self, z_q: Tensor, cond: Conditioning | None = None) -> Tensor:
        """The part of `reconstruct` after the quantizer.

        Args:
            z_q: quantized latent (B, C, F).
            cond: of B rows. None: the bare codec.

        Returns:
            audio (B, 1, T), with the padding of `encode`.
        """
        if cond is None:
            return self.codec.advance(z_q, "quantized", "audio")
        x, position = z_q, "quantized"
        for tap in self._edited(before_vq=False):
            x = self.codec.advance(x, position, tap) if tap != position else x
            x, position = self._edit(x, tap, cond), tap
        return self.codec.advance(x, position, "audio")

    def _apply_edits(self, frozen: FrozenActivations, first: str, end: str, cond: Conditioning, copies: int) -> Tensor:
        """The activation at `end`, from the bare one at `first`, the first edited tap of that side."""
        x, position = _repeat(frozen.at(first), copies), first
        for tap in self._edited(before_vq=is_before_vq(first)):
            x = self.codec.advance(x, position, tap) if tap != position else x
            x, position = self._edit(x, tap, cond), tap
        return self.codec.advance(x, position, end) if position != end else x

    def _edit(self, x: Tensor, tap: str, cond: Conditioning) -> Tensor:
        edited = x
        with self.codec.autocast(x.device):
            for edit in self.edits[tap]:
                edited = edit(edited, cond, self.edit_scale)
        if self._on_edit is not None:
            self._on_edit(tap, x, edited)
        return edited

    @contextmanager
    def on_edit(self, callback: EditCallback) -> Iterator[None]:
        """Inside the block, `callback(tap, before, after)` is called with every edited activation (B, C, F)."""
        self._on_edit = callback
        try:
            yield
        finally:
            self._on_edit = None

    # ---------------------------------------------------------------- strategies and hooks

    @property
    def attached(self) -> dict[str, Strategy]:
        """Strategy name to strategy, in listed order."""
        return {name: cast(Strategy, strategy) for name, strategy in self.strategies.items()}

    @property
    def edits(self) -> Mapping[str, tuple[Edit, ...]]:
        """Tap name to the edits made there, in order; only taps with an edit, in signal order."""
        return self._hooks.edits

    def callers(self, hook: str) -> list[tuple[str, Any]]:
        """(strategy name, callable) for each implementation of `hook`, in listed order.

        Args:
            hook: "loss", "discriminator_loss" or "training_start". Call it with the hook's arguments by name.
        """
        return [(call.strategy, call) for call in self._hooks.calls[hook]]

    def trained_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Named parameters of the strategies that ask for a gradient, without those of discriminators."""
        for name, strategy in self.attached.items():
            for parameter_name, parameter in strategy.adapted_parameters():
                if parameter.requires_grad:
                    yield f"{name}.{parameter_name}", parameter

    def discriminator_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Named parameters of the discriminators."""
        for name, strategy in self.attached.items():
            for parameter_name, parameter in strategy.discriminator_parameters():
                yield f"{name}.{parameter_name}", parameter

    def _edited(self, *, before_vq: bool) -> list[str]:
        return [tap for tap in self.edits if is_before_vq(tap) == before_vq]

    def _first(self, *, before_vq: bool) -> str | None:
        return next(iter(self._edited(before_vq=before_vq)), None)

    def _title(self) -> str:
        return " + ".join(self.strategies) or "a codec without strategies"

    def _check(self, cond: Conditioning) -> None:
        """Raise UserError for an embedding of another dimension or encoder, and for a missing extra."""
        if self.encoder is not None:
            self.encoder.check(cond)
        if missing := self.extras - set(cond.extras):
            raise UserError(
                f"{self._title()} needs {', '.join(sorted(missing))} beside the speaker embedding; give "
                "model.target(embedding, speech) with speech of the target at the codec's rate"
            )
        reference, channels = cond.extras.get(REFERENCE), self.codec.latent_dim
        if reference is not None and (reference.dim() != 3 or reference.shape[1] != channels or not reference.numel()):
            raise UserError(
                f"{REFERENCE!r} is a latent of the codec, (B, {channels}, R) with R above 0; "
                f"got {tuple(reference.shape)}"
            )

    def _rows(self, cond: Tensor | Conditioning, rows: int, *, multiple: bool = True) -> tuple[Conditioning, int]:
        """Check `cond` against this model; returns one row per output, and the number of outputs per item."""
        cond = _conditioning(cond)
        self._check(cond)
        cond = cond.to(next(self.codec.parameters()))
        if multiple and len(cond) > rows and len(cond) % rows == 0:
            return cond, len(cond) // rows
        return cond.expand(rows), 1

    # ---------------------------------------------------------------- storage

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the strategies, without the base: model.safetensors, config.json and a model card (README.md).

        Args:
            folder: created if missing; each file is replaced as a whole.
        """
        description = Description.of(self.codec, self.encoder, self.attached, self.evaluation)
        save_strategies(Path(folder), self.attached, description)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload what `save_pretrained` writes.

        Args:
            repo_id: "owner/name"; created if missing.
            options: `token`, `private`, `revision` (a branch, created if missing).

        Returns:
            the address of the repository.

        Raises:
            UserError: without a network, a token, or write access.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return hub.push(Path(folder), repo_id, **options)

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path,
        *,
        codec: SNAC | str | Path | None = None,
        plugins: Catalogue | None = None,
        speaker_encoder: SpeakerEncoder | None = None,
        **options: Any,
    ) -> Self:
        """Load strategies and the base that they were trained on; in eval mode.

        Args:
            name_or_folder: a bundled name such as "phase6_tiny", a folder written by `save_pretrained`, or a hub id.
            codec: the base, if it cannot be loaded by the name that the strategies state.
            plugins: the catalogue to look strategies up in; defaults to the installed plugins.
            speaker_encoder: the encoder that you will condition with, to check it against the stored one.
            options: of the hub: `revision`, `token`, `cache_dir`, `local_files_only`. All but `revision` apply to the
                base too.

        Raises:
            UserError: for a missing or damaged file, another base or speaker encoder than the strategies were trained
                with, or a strategy that no plugin offers.
        """
        stored = Stored.find(name_or_folder, **options)
        description, encoder = stored.description, stored.description.encoder
        codec = stored.base(codec)
        if speaker_encoder is not None and encoder and encoder.digest not in (None, speaker_encoder.digest):
            raise UserError(
                f"{stored.source} is conditioned with {encoder.name!r}, digest {(encoder.digest or '')[:12]}; "
                f"got {speaker_encoder.name!r}, digest {speaker_encoder.digest[:12]}"
            )
        plugins = plugins or discover()
        for strategy in description.strategies:
            if strategy.name not in plugins.strategies:
                raise UserError(
                    f"{stored.source} needs strategy {strategy.name!r} from module {strategy.module!r}, which no "
                    f"plugin here offers; install its plugin or name its file (--plugin FILE, discover([file]))"
                )
        model = cls(
            codec,
            [strategy.name for strategy in description.strategies],
            speaker_dim=encoder.dim if encoder else None,
            config={strategy.name: strategy.config for strategy in description.strategies},
            plugins=plugins,
        )
        model.encoder = encoder
        load_state(model.attached, read_tensors(stored.weights), str(stored.weights))
        model.evaluation = description.evaluation.model_dump() if description.evaluation else None
        return model.eval()


def _identity(encoder: SpeakerEncoder | str | None, dim: int | None, *, needed: bool) -> EncoderIdentity | None:
    """From an encoder, its name, or the dimension alone; None where neither is given nor `needed`."""
    if isinstance(encoder, str):
        encoder = load_speaker_encoder(encoder)
    if encoder is not None:
        if dim is not None and dim != encoder.dim:
            raise UserError(f"speaker_dim {dim} and {encoder.name!r}, which has {encoder.dim}; give only one of them")
        return EncoderIdentity(encoder.name, encoder.dim, encoder.digest)
    if dim is not None:
        return EncoderIdentity("custom", dim, None)
    if needed:
        raise UserError("strategies need speaker_encoder='ge2e' (or another), or speaker_dim=S of your embeddings")
    return None


def _conditioning(embedding: Tensor | Conditioning) -> Conditioning:
    return Conditioning(embedding) if isinstance(embedding, Tensor) else embedding


def _repeat(x: Tensor, copies: int) -> Tensor:
    """(B, ...) to (copies * B, ...), item index fastest."""
    return x if copies == 1 else torch.cat([x] * copies)
