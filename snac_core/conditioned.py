"""Which speaker encoder a model is conditioned with, and the refusal of any other.

A frozen codec with strategies attached: the one path of training, negatives, evaluation and conversion."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from snac_core.codec import SNAC
from snac_core.codec.checks import check_finite
from snac_core.conditioning import Conditioning
from snac_core.errors import UserError
from snac_core.frozen import FrozenActivations
from snac_core.hooks import Edit, edits_at_taps, hook_callers
from snac_core.plugin_guard import contained
from snac_core.plugins import Catalogue, discover
from snac_core.settings import validated
from snac_core.speakers.encoder import SpeakerEncoder
from snac_core.strategy import Strategy
from snac_core.taps import Taps, is_before_vq


@dataclass(frozen=True)
class EncoderIdentity:
    """A speaker encoder's name, dimension S, and digest of its weights (None: embeddings from elsewhere)."""

    name: str
    dim: int
    digest: str | None

    @classmethod
    def of(cls, encoder: SpeakerEncoder | str | None, dim: int | None, *, needed: bool) -> Self | None:
        """From an encoder, its name, or the dimension alone; None where neither is given nor `needed`."""
        if isinstance(encoder, str):
            from snac_core.speakers.encoder import load_speaker_encoder

            encoder = load_speaker_encoder(encoder)
        if encoder is not None:
            if dim is not None and dim != encoder.dim:
                raise UserError(f"speaker_dim {dim} beside {encoder.name!r}, which has {encoder.dim}; give one of them")
            return cls(encoder.name, encoder.dim, encoder.digest)
        if dim is not None:
            return cls("custom", dim, None)
        if needed:
            raise UserError("strategies need speaker_encoder='ge2e' (or another), or speaker_dim=S of your embeddings")
        return None

    def check(self, cond: Conditioning) -> None:
        """Raise UserError for embeddings of another dimension, or known to come from another encoder."""
        if cond.speaker.shape[1] != self.dim:
            raise UserError(
                f"speaker embedding of {cond.speaker.shape[1]} dimensions; this model is conditioned with "
                f"{self.name!r}, which has {self.dim}"
            )
        if cond.encoder and self.digest and cond.encoder != self.digest:
            raise UserError(
                f"the embedding comes from another speaker encoder (digest {cond.encoder[:12]}); this model is "
                f"conditioned with {self.name!r} (digest {self.digest[:12]})"
            )


Seen = Callable[[str, Tensor, Tensor], None]


@dataclass(frozen=True)
class Latents:
    """What the path gives for one batch up to the codes.

    Attributes:
        z: the latent that was quantised (B, C, F), edited where a strategy acts before VQ.
        z_q: its quantised value (B, C, F), before any edit after VQ.
        codes: one integer tensor (B, F / stride) per codebook.
    """

    z: Tensor
    z_q: Tensor
    codes: list[Tensor]

    def __getitem__(self, rows: slice) -> Latents:
        """These rows of the batch."""
        return Latents(self.z[rows], self.z_q[rows], [level[rows] for level in self.codes])


@dataclass(frozen=True)
class Reconstruction:
    """What the path gives for one batch.

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
        speaker_dim: S, for embeddings from elsewhere; give this or `speaker_encoder`.
        config: settings per strategy name.
        plugins: the catalogue to look names up in; the installed plugins where not given.

    Attributes:
        evaluation: what a judge measured, for the model card; saved as long as the weights are those it measured.

    Raises:
        UserError: unknown strategy, setting or tap; a strategy listed twice; a hook that pluggy does not know.
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
        self.encoder = EncoderIdentity.of(speaker_encoder, speaker_dim, needed=bool(strategies))
        taps = Taps(self.encoder.dim if self.encoder else 0, self.codec.taps)
        self.evaluation: dict[str, Any] | None = None
        self.strategies = nn.ModuleDict()
        settings = dict(config or {})
        catalogue = plugins
        for given in strategies:
            if isinstance(given, str):
                catalogue = catalogue or discover()
                cls: type[Strategy] = catalogue.strategies[given]
            else:
                cls = given
            if cls.name in self.strategies:
                raise UserError(f"strategy {cls.name!r} is listed twice; each acts once, in listed order")
            if hasattr(nn.ModuleDict, cls.name):
                raise UserError(f"strategy {cls.name!r}: torch needs this name for itself; choose another")
            values = validated(cls, settings.pop(cls.name, {}))
            with contained(f"__init__ of strategy {cls.name!r}"):
                self.strategies[cls.name] = cls(values, taps)
        if settings:
            raise UserError(f"settings for {sorted(settings)[0]!r}, which is not among {list(self.strategies)}")
        self._edits = edits_at_taps(list(self.attached.values()), taps)
        self._seen: Seen | None = None

    # ---------------------------------------------------------------- the path

    def latents(
        self, audio: Tensor, cond: Conditioning | None = None, *, bare: FrozenActivations | None = None
    ) -> Latents:
        """Encode, edit, quantise: the part of `reconstruct` before the decoder, for what needs no audio.

        Arguments as in `reconstruct`; the result has B, or k * B, rows.
        """
        bare = bare or FrozenActivations(self.codec, audio)
        if cond is None:
            return Latents(bare.at("latent"), bare.at("quantized"), bare.codes)
        cond, copies = self._rows(cond, audio.shape[0])
        if first := self._first(before_vq=True):
            z = self._fold(bare, first, "latent", cond, copies)
            return Latents(z, *self.codec.quantizer(z))
        codes = [_repeat(level, copies) for level in bare.codes]
        return Latents(_repeat(bare.at("latent"), copies), _repeat(bare.at("quantized"), copies), codes)

    def reconstruct(
        self,
        audio: Tensor,
        cond: Conditioning | None = None,
        *,
        bare: FrozenActivations | None = None,
        latents: Latents | None = None,
    ) -> Reconstruction:
        """Encode, edit, quantise, edit, decode; differentiable through the quantiser (straight-through).

        Args:
            audio: (B, 1, T) at the codec's rate.
            cond: one row for all, B rows, or k * B rows (k targets of every item, items fastest). None: the bare codec.
            bare: the unedited pass over the same `audio`, to share its work.
            latents: of the same `audio` and `cond`, where they are there already.

        Returns:
            a Reconstruction of B, or k * B, rows.
        """
        bare = bare or FrozenActivations(self.codec, audio)
        latents = latents or self.latents(audio, cond, bare=bare)
        if cond is None:
            return Reconstruction(bare.output, latents.z, latents.z_q, latents.codes)
        cond, copies = self._rows(cond, audio.shape[0])
        if self._first(before_vq=True):
            audio_hat = self._decode(latents.z_q, cond)
        elif first := self._first(before_vq=False):
            audio_hat = self._fold(bare, first, "audio", cond, copies)
        else:
            audio_hat = _repeat(bare.output, copies)
        return Reconstruction(audio_hat[..., : audio.shape[-1]], latents.z, latents.z_q, latents.codes)

    def forward(
        self, audio: Tensor, speaker_embedding: Tensor | Conditioning | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Both sides conditioned: audio (B, 1, T) to (audio (B, 1, T), codes); NaN and infinity are refused."""
        check_finite(audio)
        out = self.reconstruct(audio, None if speaker_embedding is None else _given(speaker_embedding))
        return out.audio, out.codes

    def encode(self, audio: Tensor, speaker_embedding: Tensor | Conditioning | None = None) -> list[Tensor]:
        """Audio (B, 1, T) to codes, conditioned by the strategies that act before VQ."""
        if speaker_embedding is None:
            return self.codec.encode(audio)
        if self._first(before_vq=True) is None:
            raise UserError(
                f"{self._named()} acts only after VQ, so an embedding has no effect on encode; "
                f"give it to decode(codes, speaker_embedding=...)"
            )
        check_finite(audio)
        cond, _ = self._rows(_given(speaker_embedding), audio.shape[0], multiple=False)
        return self.latents(audio, cond).codes

    def decode(
        self,
        codes: Sequence[Tensor],
        speaker_embedding: Tensor | Conditioning | None = None,
        *,
        length: int | None = None,
    ) -> Tensor:
        """Codes to audio (B, 1, T), conditioned by the strategies that act after VQ; untrimmed without `length`."""
        if speaker_embedding is None:
            return self.codec.decode(list(codes), length=length)
        if self._first(before_vq=False) is None:
            raise UserError(
                f"{self._named()} acts only before VQ, so an embedding has no effect on decode; "
                f"give it to encode(audio, speaker_embedding=...)"
            )
        self.codec.check_codes(codes)
        cond, _ = self._rows(_given(speaker_embedding), codes[0].shape[0], multiple=False)
        audio = self._decode(self.codec.quantizer.from_codes(list(codes)), cond)
        if length is not None and not 0 < length <= audio.shape[-1]:
            raise UserError(f"length {length} of audio from codes that hold {audio.shape[-1]} samples")
        return audio[..., :length]

    def _decode(self, z_q: Tensor, cond: Conditioning) -> Tensor:
        """Quantised (B, C, F) to untrimmed audio (B, 1, T), through the edits after VQ."""
        x, at = z_q, "quantized"
        for tap in self._edited(before_vq=False):
            x = self.codec.advance(x, at, tap) if tap != at else x
            x, at = self._edit(x, tap, cond), tap
        return self.codec.advance(x, at, "audio")

    def _fold(self, bare: FrozenActivations, first: str, upto: str, cond: Conditioning, copies: int) -> Tensor:
        """Take the unedited activation at the `first` edited tap of a side, edit it, and go on to `upto`."""
        x, at = _repeat(bare.at(first), copies), first
        for tap in self._edited(before_vq=is_before_vq(first)):
            x = self.codec.advance(x, at, tap) if tap != at else x
            x, at = self._edit(x, tap, cond), tap
        return self.codec.advance(x, at, upto) if at != upto else x

    def _edit(self, x: Tensor, tap: str, cond: Conditioning) -> Tensor:
        edited = x
        for edit in self._edits[tap]:
            edited = edit(edited, cond)
        if self._seen is not None:
            self._seen(tap, x, edited)
        return edited

    @contextmanager
    def observed(self, seen: Seen) -> Iterator[None]:
        """Within this, `seen(tap, before, after)` is called with every edited activation (B, C, F)."""
        self._seen = seen
        try:
            yield
        finally:
            self._seen = None

    # ---------------------------------------------------------------- what acts where

    @property
    def attached(self) -> dict[str, Strategy]:
        """Strategy name to strategy, in listed order."""
        return {name: cast(Strategy, strategy) for name, strategy in self.strategies.items()}

    @property
    def edits(self) -> Mapping[str, tuple[Edit, ...]]:
        """Tap name to the edits made there, in order; only taps with an edit, in signal order."""
        return self._edits

    def callers(self, hook: str) -> list[tuple[str, Any]]:
        """(strategy name, bound implementation) of `hook`, in listed order."""
        return hook_callers(list(self.attached.values()), hook)

    def trained_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Named parameters of the strategies, discriminators left out."""
        for name, strategy in self.attached.items():
            for parameter_name, parameter in strategy.adapted_parameters():
                yield f"{name}.{parameter_name}", parameter

    def discriminator_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Named parameters of the discriminators."""
        for name, strategy in self.attached.items():
            for parameter_name, parameter in strategy.discriminator_parameters():
                yield f"{name}.{parameter_name}", parameter

    def _edited(self, *, before_vq: bool) -> list[str]:
        return [tap for tap in self._edits if is_before_vq(tap) == before_vq]

    def _first(self, *, before_vq: bool) -> str | None:
        return next(iter(self._edited(before_vq=before_vq)), None)

    def _named(self) -> str:
        return " + ".join(self.strategies) or "a codec without strategies"

    def _rows(self, cond: Conditioning, rows: int, *, multiple: bool = True) -> tuple[Conditioning, int]:
        """Check the embedding against this model; returns it with a row for every item, and the copies of the batch."""
        if self.encoder is not None:
            self.encoder.check(cond)
        if multiple and len(cond) > rows and len(cond) % rows == 0:
            return cond, len(cond) // rows
        return cond.expand(rows), 1

    # ---------------------------------------------------------------- storage

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the strategies alone: model.safetensors, config.json and a model card (README.md)."""
        from snac_core.checkpoint import save_strategies

        save_strategies(self, Path(folder))

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload what `save_pretrained` writes; returns the address. Options: `token`, `private`, `revision`."""
        from snac_core.checkpoint import push_strategies

        return push_strategies(self, repo_id, **options)

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path,
        *,
        codec: SNAC | str | Path | None = None,
        plugins: Catalogue | None = None,
        **options: Any,
    ) -> ConditionedCodec:
        """Load strategies, fetch the base they name (or take `codec`), and check its digest.

        Options of the hub: `revision`, `token`, `cache_dir`, `local_files_only`.
        """
        from snac_core.checkpoint import load_strategies

        return load_strategies(cls, name_or_folder, codec=codec, plugins=plugins, **options)


def _given(embedding: Tensor | Conditioning) -> Conditioning:
    return Conditioning(embedding) if isinstance(embedding, Tensor) else embedding


def _repeat(x: Tensor, copies: int) -> Tensor:
    """(B, ...) to (copies * B, ...), items fastest."""
    return x if copies == 1 else torch.cat([x] * copies)
