"""The conversions of a split: sources, targets, and the embeddings that they are conditioned on and scored by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from snac_core.augment import change_voice
from snac_core.codec import SNAC
from snac_core.conditioned import ConditionedCodec
from snac_core.conditioning import Conditioning
from snac_core.frozen import FrozenActivations
from snac_core.seeding import generator
from snac_core.speakers.encoder import SpeakerEncoder
from snac_runner.console import SILENT, Console
from snac_runner.data.audio import load_audio
from snac_runner.data.corpus import Corpus, Segment
from snac_runner.data.pairs import Pair, PairList
from snac_runner.embeddings import speaker_embeddings

SHIFTS = torch.tensor([-2.5, -1.5, 1.5, 2.5]), torch.tensor([0.85, 0.93, 1.08, 1.15])
"""Shifts of pitch in semitones, and factors of formants, that turn a source into another voice. None is trained on."""


@dataclass(frozen=True)
class Item:
    """One conversion.

    Attributes:
        pair: source and target.
        audio: the source (1, T) at the codec's rate.
        other: a third speaker of the split, of the target's sex if possible (a change of sex alone is not specific);
            "" if there is none.
    """

    pair: Pair
    audio: Tensor
    other: str


class Conversions:
    """What is needed to convert and to score the pairs of one split: the same for all systems that are compared.

    Args:
        corpus: the speech.
        pairs: what to convert.
        sample_rate: of the codec, in Hz.
        speaker_encoder: the conditioning encoder.
        judges: the encoders of the scores, with different names; the first ranks the arms.
        console: where to report progress while embeddings are computed.

    Attributes:
        conditioning: speaker to the conditioning encoder's embedding (S,) of conditioning audio.
        speaker_encoder_reference: speaker to the conditioning encoder's embedding (S,) of scoring audio.
        references: judge to its embeddings (S,) of scoring audio, by speaker.
    """

    def __init__(
        self,
        corpus: Corpus,
        pairs: PairList,
        sample_rate: int,
        speaker_encoder: SpeakerEncoder,
        judges: Sequence[SpeakerEncoder],
        *,
        console: Console = SILENT,
    ) -> None:
        self.corpus = corpus
        self.pairs = pairs
        self.sample_rate = sample_rate
        self.speaker_encoder = speaker_encoder
        self.judges = {judge.name: judge for judge in judges}
        self._target_audio: dict[tuple[str, str], Tensor] = {}
        self._shifted: dict[str, Tensor] = {}
        self._latents: dict[str, tuple[SNAC, Tensor]] = {}
        self._targets: dict[str, tuple[SNAC, Conditioning]] = {}

        def embedded(role: str, encoder: SpeakerEncoder) -> dict[str, Tensor]:
            progress = console.progress(f"{encoder.name} on {pairs.split} speakers")
            segments = {speaker: roles[role] for speaker, roles in pairs.references.items()}
            return speaker_embeddings(corpus, segments, encoder, progress=progress)

        self.conditioning = embedded("conditioning", speaker_encoder)
        self.speaker_encoder_reference = embedded("scoring", speaker_encoder)
        self.references = {name: embedded("scoring", judge) for name, judge in self.judges.items()}

    @cached_property
    def items(self) -> list[Item]:
        """The conversions with their audio, in the order of the pairs."""
        speakers = sorted(self.pairs.references)
        items = []
        for pair in self.pairs.pairs:
            # the next speaker in the list that is neither source nor target: depends on the list only
            place = speakers.index(pair.target)
            others = [s for s in speakers[place:] + speakers[:place] if s not in (pair.target, pair.source_speaker)]
            others.sort(key=lambda s: self.corpus.sex(s) != self.corpus.sex(pair.target))
            items.append(Item(pair, self.segment_audio(pair.source), others[0] if others else ""))
        return items

    def bare(self, codec: SNAC, item: Item) -> FrozenActivations:
        """The bare codec's activations of the source. Its latent is kept: the encoder runs once for all arms."""
        audio = item.audio.unsqueeze(0).to(next(codec.parameters()).device)
        of, latent = self._latents.get(item.pair.id, (None, None))
        activations = FrozenActivations(codec, audio, latent=latent if of is codec else None)
        self._latents[item.pair.id] = codec, activations.at("latent")
        return activations

    def target(self, model: ConditionedCodec, speaker: str) -> Conditioning:
        """What an arm gets of a speaker, on its device: the embedding, and speech if a strategy attends to it.

        The latent of the speech is kept: the encoder runs once for all arms.
        """
        embedding = self.conditioning[speaker].unsqueeze(0).to(next(model.codec.parameters()).device)
        if not model.extras:
            return Conditioning(embedding)
        of, kept = self._targets.get(speaker, (None, None))
        if kept is None or of is not model.codec:
            speech = self.target_audio(speaker, "conditioning").view(1, 1, -1).to(embedding.device)
            kept = model.target(embedding, speech)
            self._targets[speaker] = model.codec, kept
        return kept

    def shifted(self, item: Item) -> Tensor:
        """The source (1, T) with shifted pitch and formants: another voice. The shifts depend on the pair's id."""
        if item.pair.id not in self._shifted:
            draw = generator(item.pair.id, "another voice")
            semitones, formants = (choices[torch.randint(len(choices), (1,), generator=draw)] for choices in SHIFTS)
            self._shifted[item.pair.id] = change_voice(item.audio.unsqueeze(0), self.sample_rate, semitones, formants)[
                0
            ]
        return self._shifted[item.pair.id]

    def ceiling_audio(self, item: Item) -> Tensor:
        """Another, real utterance of the target (1, T), at the codec's rate."""
        return self.segment_audio(self.pairs.references[item.pair.target]["ceiling"][0])

    def candidates(self, judge: str) -> dict[str, Tensor]:
        """A judge's embedding (S,) of every target speaker."""
        return {pair.target: self.references[judge][pair.target] for pair in self.pairs.pairs}

    def target_audio(self, speaker: str, role: str = "scoring") -> Tensor:
        """The first segment of a speaker's speech in that role (T,), at most 8 s, at the codec's rate."""
        if (speaker, role) not in self._target_audio:
            first = self.pairs.references[speaker][role][0]
            self._target_audio[speaker, role] = self.segment_audio(first._replace(seconds=min(8.0, first.seconds)))[0]
        return self._target_audio[speaker, role]

    def parallel_audio(self, pair: Pair) -> Tensor | None:
        """The target's own recording (T,) of the source's sentence, at the codec's rate; None if there is none."""
        return self.segment_audio(pair.parallel)[0] if pair.parallel else None

    def segment_audio(self, segment: Segment) -> Tensor:
        """A segment of the corpus (1, T), at the codec's rate."""
        utterance = self.corpus.utterance(segment.utterance)
        return load_audio(utterance, self.sample_rate, start=segment.start, seconds=segment.seconds)
