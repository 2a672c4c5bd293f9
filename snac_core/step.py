"""What the hooks of a training see: `loss` one step with its outputs, `training_start` the whole training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from snac_core.conditioned import ConditionedCodec, Latents, Reconstruction
from snac_core.conditioning import REFERENCE, Conditioning
from snac_core.errors import UserError
from snac_core.frozen import FrozenActivations
from snac_core.speakers.encoder import SpeakerEncoder
from snac_core.speakers.sampling import SpeakerSampler


class Imitation(NamedTuple):
    """A batch in the voices of other speakers.

    Attributes:
        latent: (B, C, F) of the bare codec.
        embedding: (B, S) of those voices, by the conditioning encoder.
        speech: latent (B, C, R) of other speech in those voices, for strategies that attend to it.
    """

    latent: Tensor
    embedding: Tensor
    speech: Tensor | None = None


class Step:
    """One training step of one arm; outputs are computed on first use, once.

    Identity and converted outputs come from one batched pass through the model, and their embeddings from one batched
    pass through the conditioning encoder. Gradients flow from all of them to the strategies.

    With several devices, or an accumulated gradient, a batch is divided into parts, and a step sees one of them. The
    loss of the batch is the mean over its items, so every loss term is a mean of terms of single items. What looks
    across the batch uses `batch_speaker_ids` and `batch_target_ids`; random numbers for items are drawn for the whole
    batch, and `rows` selects those of this part.

    Args:
        speaker_ids: of the whole batch, as `batch_speaker_ids`.
        target_ids: of the whole batch, as `batch_target_ids`.
        rows: which items of the batch `audio` has; all by default.
        own_speech: latent (B, C, R) of other parts of the utterances that `audio` is from, for strategies that attend
            to it; see `snac_core.conditioning.REFERENCE`.
        target_speech: reads the same (N * B, C, R) of speech of the targets, on first use of `target`.

    Attributes:
        model: the conditioned codec that is trained.
        audio: (B, 1, T) at the codec's sample rate; B items, all of the batch or a part of it.
        batch_speaker_ids: rows (W,) of the speaker table, of all W items of the batch.
        batch_target_ids: the same (N * W,), of their targets.
        rows: positions (B,) of this part's items in the batch.
        output_rows: positions (N * B,) of this part's targets in `batch_target_ids`.
        sample_rate: of `audio`, in Hz.
        speaker_ids: rows (B,) of the source speakers in the sampler's table.
        target_ids: rows (N * B,) of the target speakers: N targets per item; index n * B + b is target n of item b.
        own: conditioning on the source's own speaker (B rows).
        own_reference: (B, S), an embedding of the own speaker from other audio than `own`; no gradient.
        target_reference: (N * B, S), the same for the targets.
        speaker_encoder: the frozen conditioning encoder.
        sampler: targets and negatives.
        index: number of the step, from 1.
        frozen_activations: activations of the bare codec on `audio`, shared by all arms.
        imitations: `audio` in the voices of other speakers, at most twice; none if they were not computed beforehand.
    """

    def __init__(
        self,
        model: ConditionedCodec,
        audio: Tensor,
        *,
        sample_rate: int,
        speaker_ids: Tensor,
        target_ids: Tensor,
        speaker_encoder: SpeakerEncoder,
        sampler: SpeakerSampler,
        index: int,
        rows: slice = slice(None),
        frozen_activations: FrozenActivations | None = None,
        imitations: Sequence[Imitation] = (),
        own_speech: Tensor | None = None,
        target_speech: Callable[[], Tensor] | None = None,
        parallel: Callable[[], tuple[Tensor, Tensor] | None] | None = None,
        batch_audio: Callable[[], Tensor] | None = None,
    ) -> None:
        self.model = model
        self.audio = audio
        self.sample_rate = sample_rate
        self.batch_speaker_ids = speaker_ids
        self.batch_target_ids = target_ids
        self.rows = torch.arange(len(speaker_ids))[rows]
        self.output_rows = torch.arange(len(target_ids)).view(-1, len(speaker_ids))[:, rows].flatten()
        self.speaker_ids = speaker_ids = speaker_ids[self.rows]
        self.target_ids = target_ids = target_ids[self.output_rows]
        self.speaker_encoder = speaker_encoder
        self.sampler = sampler
        self.index = index
        self._find_parallel = parallel
        self._find_batch_audio = batch_audio
        self.frozen_activations = frozen_activations or FrozenActivations(model.codec, audio)
        self.imitations = imitations
        table = sampler.table
        self._find_target_speech = target_speech
        if table.shuffled and target_speech is not None:  # as in `conditioning_on`
            own_speech = target_speech()[: len(audio)]
        own = table.conditioning[speaker_ids].to(audio.device)
        self.own = Conditioning.attending(own, own_speech, table.encoder)
        self.own_reference = table.reference[speaker_ids].to(audio.device)
        self.target_reference = table.reference[target_ids].to(audio.device)

    @torch.no_grad()
    def conditioning_of(self, audio: Tensor) -> Conditioning:
        """Conditioning on the speakers of `audio` (B, 1, T) at `sample_rate`, B rows, from the conditioning encoder.

        Rows of an arm with shuffled speakers as in `conditioning_on`.

        Raises:
            UserError: if a strategy attends to other speech in these voices, of which there is none.
        """
        if REFERENCE in self.model.extras:
            raise UserError(
                f"{' + '.join(self.model.strategies)} attends to speech in the voice of the target, and this voice was "
                "computed from the batch alone; expected voices from the latent cache: set imitations = 2 and "
                "code_prediction.imitate = true"
            )
        return self.conditioning_on(lambda: self.speaker_encoder(audio, self.sample_rate))

    def conditioning_on(self, embeddings: Callable[[], Tensor], speech: Tensor | None = None) -> Conditioning:
        """Conditioning on embeddings (B, S) of the conditioning encoder, which are computed if they are needed.

        In an arm with shuffled speakers every row has the embedding of a speaker that was drawn at random.

        Args:
            embeddings: computes them.
            speech: latent (B, C, R) of speech in these voices, for strategies that attend to it.
        """
        table = self.sampler.table
        if table.shuffled:
            return self.target.first(len(self.audio))
        return Conditioning.attending(embeddings(), speech, table.encoder)

    @cached_property
    def target(self) -> Conditioning:
        """Conditioning on the targets: N * B rows."""
        table, speech = self.sampler.table, self._find_target_speech
        embeddings = table.conditioning[self.target_ids].to(self.audio.device)
        return Conditioning.attending(embeddings, speech() if speech else None, table.encoder)

    @property
    def teacher(self) -> SpeakerEncoder:
        """Alias of `speaker_encoder`."""
        return self.speaker_encoder

    @property
    def identity(self) -> Reconstruction:
        """The batch conditioned on its own speakers: B rows."""
        return self._outputs[0]

    @property
    def converted(self) -> Reconstruction:
        """The batch conditioned on the targets: N * B rows."""
        return self._outputs[1]

    @property
    def decoded(self) -> bool:
        """Whether `identity` and `converted` have been computed."""
        return "_outputs" in self.__dict__

    @property
    def identity_latents(self) -> Latents:
        """`identity` up to the codes, B rows; does not run the decoder."""
        return self._latents[: len(self.audio)]

    @property
    def converted_latents(self) -> Latents:
        """`converted` up to the codes, N * B rows; does not run the decoder."""
        return self._latents[len(self.audio) :]

    @cached_property
    def bare(self) -> Reconstruction:
        """The batch through the codec alone: B rows, no gradient."""
        return self.model.reconstruct(self.audio, frozen=self.frozen_activations)

    @property
    def identity_embedding(self) -> Tensor:
        """(B, S), the conditioning encoder's embedding of `identity.audio`."""
        return self._embeddings[: len(self.audio)]

    @property
    def converted_embedding(self) -> Tensor:
        """(N * B, S), the conditioning encoder's embedding of `converted.audio`."""
        return self._embeddings[len(self.audio) :]

    @cached_property
    def batch_audio(self) -> Tensor:
        """(W, 1, T), the audio of the whole batch; where this step sees a part of it, it is read on first use."""
        if len(self.rows) == len(self.batch_speaker_ids):
            return self.audio
        assert self._find_batch_audio is not None
        return self._find_batch_audio()

    @cached_property
    def parallel(self) -> tuple[Tensor, Tensor] | None:
        """The targets' own recordings of the same words, read on first use.

        Audio (N * B, 1, T') at `sample_rate`, and the number of valid samples of each row (N * B,), 0 where there is
        no recording. None where the data is not parallel.
        """
        return self._find_parallel() if self._find_parallel else None

    @cached_property
    def _outputs(self) -> tuple[Reconstruction, Reconstruction]:
        out = self.model.reconstruct(
            self.audio, self._conditioning, frozen=self.frozen_activations, latents=self._latents
        )
        return out[: len(self.audio)], out[len(self.audio) :]

    @cached_property
    def _latents(self) -> Latents:
        return self.model.latents(self.audio, self._conditioning, frozen=self.frozen_activations)

    @cached_property
    def _conditioning(self) -> Conditioning:
        return Conditioning.cat([self.own, self.target])

    @cached_property
    def _embeddings(self) -> Tensor:
        audio = torch.cat([self.identity.audio, self.converted.audio])
        embeddings: Tensor = self.speaker_encoder(audio, self.sample_rate)
        return embeddings


@dataclass(frozen=True)
class TrainingContext:
    """What `training_start` sees, once, before step 1.

    Attributes:
        model: the conditioned codec that will be trained.
        sampler: targets and negatives of the study.
        speakers: names of the training speakers.
        generator: random numbers for the strategy's setup, seeded from (seed, strategy name).
    """

    model: ConditionedCodec
    sampler: SpeakerSampler
    speakers: tuple[str, ...]
    generator: torch.Generator
