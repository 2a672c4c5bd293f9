"""Cross-entropy of the output codes for conversions with known codes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from snac_core import Conditioning, Step, Strategy, UserError, hookimpl
from snac_core.augment import change_voice, imitate, random_equalization
from snac_core.conditioned import Latents
from snac_core.frozen import FrozenActivations
from snac_core.losses import alignment, code_entropy
from snac_core.seeding import generator
from snac_core.step import Imitation, TrainingContext
from snac_core.taps import is_before_vq
from snac_objectives.requirements import parallel_speech, require_edits_before_vq

_CONTEXT = 16  # latent frames of context on either side of a segment that is encoded alone

_Voice = tuple[Conditioning, FrozenActivations, FrozenActivations]
"""An embedding, the speech of a batch in that voice, and the speech to restore."""


class CodePrediction(Strategy):
    """Cross-entropy between the output codes and known codes; the decoder is not run.

    `identity`: the source with its own embedding; target codes: those of the bare codec.
    `moved`: the source with the embedding of a synthetic voice, the source with shifted pitch and formants; target
    codes: those of the synthetic voice. The shifts are random, or with `imitate` those that give the source the pitch,
    formants and long-term spectrum of another speaker of the batch.
    `restored`: the synthetic voice, also with another spectral balance, with the source's embedding; target codes:
    those of the source. These terms work with any speech.
    `crossed`: the source in one synthetic voice with the embedding of another one; target codes: those of the other
    one. Only with two imitations or more in the latent cache, see below.
    `parallel`: the source with a target's embedding; target codes: those of the target's own recording of the same
    words, aligned in time; zero for a target without such a recording. Only for data with such recordings: synthetic
    speakers, VCTK's common sentences.

    With `imitate` and imitations in the latent cache (the study setting `imitations`), the synthetic voices of whole
    utterances come from there, with an embedding of the whole utterance and without the random spectral balance: no
    step runs the encoder, changes a voice or computes an embedding.

    The straight-through gradient of a quantizer does not depend on which entry is chosen; the gradient of a
    cross-entropy over the entries does. The entries have the probabilities of a strategy that predicts codes
    (`code_logits`), if there is one, else those of their distances to the edited latent.
    """

    name = "code_prediction"

    class Config(Strategy.Config):
        parallel: bool = Field(False, description="Predict the codes of the target's recording of the same words.")
        temperature: float = Field(
            0.1,
            gt=0,
            description="Temperature of the softmax over cosines to the entries of a codebook, if no strategy predicts "
            "codes.",
        )
        imitate: bool = Field(
            False,
            description="In moved and restored, shift pitch, formants and long-term spectrum to those of another "
            "speaker of the batch, instead of pitch and formants at random.",
        )
        semitones: float = Field(6.0, ge=0, description="Largest random pitch shift up or down, in semitones.")
        formants: float = Field(0.2, ge=0, lt=0.5, description="Largest random relative formant shift.")
        equaliser_db: float = Field(
            6.0,
            ge=0,
            description="Largest gain of the random equalizer in restored, in dB; 0: none. Imitations from the latent "
            "cache have none.",
        )

    @hookimpl
    def training_start(self, context: TrainingContext) -> None:
        """Raise UserError if no strategy acts before the quantizer."""
        require_edits_before_vq(self, context.model)

    @hookimpl
    def loss(self, step: Step) -> dict[str, Tensor]:
        """`identity`, `moved`, `restored`, and where they apply `crossed` and `parallel`: nats per code, scalars."""
        bare = step.frozen_activations
        (voice, as_moved, as_disguised), *more = self._cached_voices(step) or [self._synthetic_voices(step)]
        terms = {
            "identity": self._entropy(step, bare, step.own, bare.codes, lambda: step.identity_latents).mean(),
            "moved": self._entropy(step, bare, voice, as_moved.codes).mean(),
            "restored": self._entropy(step, as_disguised, step.own, bare.codes).mean(),
        }
        for other, as_other, _ in more:
            terms["crossed"] = self._entropy(step, as_moved, other, as_other.codes).mean()
        if self.config.parallel:
            wanted, known = self.target_codes(step)
            found = self._entropy(step, bare, step.target, wanted, lambda: step.converted_latents)
            terms["parallel"] = (found * known).mean()
        return terms

    def _synthetic_voices(self, step: Step) -> _Voice:
        """`other_voices`: the embedding, and activations of the two."""
        moved, disguised = self.other_voices(step)
        as_moved = FrozenActivations(step.model.codec, moved)
        as_disguised = as_moved if disguised is moved else FrozenActivations(step.model.codec, disguised)
        return step.conditioning_of(moved), as_moved, as_disguised

    def _cached_voices(self, step: Step) -> list[_Voice]:
        """The same from the latent cache, of two voices if there are; empty without `imitate` or without a cache.

        Raises:
            UserError: if a strategy edits the encoder, of which the cache has no activations.
        """
        if not self.config.imitate or not step.imitations:
            return []
        for tap in step.model.edits:
            if is_before_vq(tap) and tap != "latent":
                raise UserError(
                    f"{self.name!r}: the latent cache has imitations at the tap 'latent' only, and "
                    f"{' + '.join(step.model.strategies)} edits {tap!r}; set imitations = 0"
                )

        def voice(imitation: Imitation) -> _Voice:
            imitated = FrozenActivations(step.model.codec, step.audio, latent=imitation.latent)
            return step.conditioning_on(lambda: imitation.embedding, imitation.speech), imitated, imitated

        return [voice(imitation) for imitation in step.imitations]

    def other_voices(self, step: Step) -> tuple[Tensor, Tensor]:
        """The batch (B, 1, T) in other voices, and that with another spectral balance; each item by its own amounts.

        The voice of an item is that of the next one in the batch, or has pitch and formants moved uniformly within the
        settings.
        """
        draw = generator(step.sampler.seed, step.index, "other voices")
        pitch, formants = 2 * torch.rand(2, len(step.batch_speaker_ids), generator=draw)[:, step.rows] - 1
        config, rate = self.config, step.sample_rate
        if config.imitate:
            moved = imitate(step.audio, rate, step.batch_audio.roll(1, 0)[step.rows])
        else:
            moved = change_voice(step.audio, rate, pitch * config.semitones, 1 + formants * config.formants)
        if not config.equaliser_db:
            return moved, moved
        count = len(step.batch_speaker_ids)
        return moved, random_equalization(moved, rate, config.equaliser_db, draw, count=count, rows=step.rows)

    @torch.no_grad()
    def target_codes(self, step: Step) -> tuple[list[Tensor], Tensor]:
        """Codes of the targets' recordings, aligned with the sources: one (N * B, F / stride) per level.

        F is the number of frames within the sources, without padding; at least one code of the coarsest level. Also
        returns which rows (N * B,) have a recording, 1 or 0.

        Raises:
            UserError: if the data has no two recordings of the same words.
        """
        recorded, lengths = parallel_speech(self, step)
        codec = step.model.codec
        block = codec.hop_length * codec.vq_strides[0]
        sources = step.audio if step.audio.shape[-1] >= block else codec.preprocess(step.audio)
        sources = sources[..., : sources.shape[-1] // block * block].repeat(len(recorded) // len(step.audio), 1, 1)
        path = alignment(sources, recorded, lengths, step.sample_rate, hop=codec.hop_length)
        # only the aligned part is encoded, with context for the encoder
        start = (path.amin(1, keepdim=True) - _CONTEXT).clamp(min=0)
        path = path - start
        span = (int(path.max()) + 1 + _CONTEXT) * codec.hop_length
        samples = start * codec.hop_length + torch.arange(span, device=path.device)
        z = FrozenActivations(codec, F.pad(recorded.squeeze(1), (0, span)).gather(1, samples).unsqueeze(1)).at("latent")
        aligned = z.gather(2, path.unsqueeze(1).expand(-1, z.shape[1], -1))
        codes: list[Tensor] = codec.quantizer(aligned)[1]
        return codes, (lengths > 0).to(z)

    def _entropy(
        self,
        step: Step,
        frozen: FrozenActivations,
        cond: Conditioning,
        codes: Sequence[Tensor],
        latents: Callable[[], Latents] | None = None,
    ) -> Tensor:
        """Per row of `cond`, by the strategy that predicts codes, else by the distances of the edited latents.

        Args:
            step: of the training.
            frozen: activations of the speech that is converted.
            cond: of the conversions.
            codes: those to predict, for all frames or the first ones.
            latents: computes the edited latents, or has them.
        """
        frames = codes[0].shape[-1] * step.model.codec.vq_strides[0]
        for _, code_logits in step.model.callers("code_logits"):
            x = frozen.at("latent")[..., :frames]
            logits = code_logits(x=x.repeat(len(cond) // len(x), 1, 1), cond=cond, codes=codes)
            if logits is not None:
                levels = zip(logits, codes, strict=True)
                return torch.stack([F.cross_entropy(*level, reduction="none").mean(1) for level in levels]).mean(0)
        edited = latents() if latents else step.model.latents(frozen.audio, cond, frozen=frozen)
        z = edited.z[..., :frames]
        return code_entropy(step.model.codec.quantizer, z, codes, temperature=self.config.temperature)
