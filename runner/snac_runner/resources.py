"""What all runs of a study share: the frozen codec and encoders, the speech, the batches, the conversions to score."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from snac_core.codec import SNAC
from snac_core.errors import UserError
from snac_core.frozen import FrozenActivations
from snac_core.plugins import Catalogue
from snac_core.speakers.bank import HEADER, open_bank
from snac_core.speakers.encoder import SpeakerEncoder, load_speaker_encoder
from snac_core.speakers.index import TABLE_UP_TO, BankPool, build_index, open_index
from snac_core.speakers.sampling import SpeakerSampler, SpeakerTable
from snac_core.step import Imitation
from snac_core.timing import Stopwatch
from snac_runner.bank_build import EncoderSpec, build_bank, check_is_of
from snac_runner.config import AUTO, NONE, StudySettings
from snac_runner.console import SILENT, Console
from snac_runner.data.corpus import Corpus, Segment
from snac_runner.data.crops import Batch, CropLoader, parallel_speech
from snac_runner.data.latents import ImitationCache, LatentCache
from snac_runner.data.loading import PrefetchingLoader
from snac_runner.data.open_corpus import open_corpus
from snac_runner.data.pairs import PairList, conversion_pairs
from snac_runner.data.references import POSITIVES, References
from snac_runner.devices import device_named, to_device
from snac_runner.distributed import DistributedContext
from snac_runner.embeddings import bank_folder, speaker_embeddings
from snac_runner.evaluate.codes import SpeakerProbe
from snac_runner.evaluate.content import PER
from snac_runner.evaluate.conversions import Conversions
from snac_runner.evaluate.judges import Calibration, calibrate, calibration_of, check_judges, load_judges
from snac_runner.evaluate.whisper import Whisper, find_whisper, not_found

CALIBRATION_PARTS = 4
"""Parts of 3 s of each dev speaker that judges are calibrated on, where `runner evaluate --calibrate` has not run."""
_COMPILED = 64  # variants of one function that torch compiles; its default, 8, is fewer than the layers of a codec
SPEECH_SECONDS = 2.56
"""Speech of a voice that strategies attend to in a training step, in s."""
_WORKERS = 4  # processes that read audio for a GPU


@dataclass(frozen=True)
class TrainingBatch:
    """What all arms of a seed train on at one step, or the part of it that is computed at once on this device.

    Attributes:
        index: number of the step, from 1.
        frozen: the audio (b, 1, T), and the frozen codec's activations of it, computed once for all arms.
        speakers: rows of the speaker table, of all items (B,) of the batch.
        targets: rows of the speaker table, of their targets (N * B,).
        rows: which items of the batch `frozen` has.
        imitations: `frozen` in other voices, if the study has caches of them.
        own_speech, target_speech: see `snac_core.step.Step`; where a strategy attends to them.
    """

    index: int
    frozen: FrozenActivations
    speakers: Tensor
    targets: Tensor
    rows: slice = field(default_factory=lambda: slice(None))
    imitations: tuple[Imitation, ...] = ()
    own_speech: Tensor | None = None
    target_speech: Callable[[], Tensor] | None = None

    @property
    def share(self) -> float:
        """This part's share of the batch, 0 to 1."""
        return len(self.frozen.audio) / len(self.speakers)


Spread = Callable[[Callable[["StudyResources", Any], Any], dict[str, Any]], Iterator[Any]]
"""What does parts of some work elsewhere: see `snac_runner.remote_resources.spread`."""


class StudyResources:
    """Each part is loaded on first use, once.

    Args:
        study: the shared settings.
        catalogue: the plugins.
        console: where long work reports.
        context: this process among all that train together; by default, it is the only one.

    Attributes:
        speech_frames: how much speech of a voice strategies attend to in a training step, in latent frames; 0: none.
        spread: what shares out the evaluation of conversions over other machines; None: they are evaluated here.
    """

    def __init__(
        self,
        study: StudySettings,
        catalogue: Catalogue,
        *,
        console: Console = SILENT,
        context: DistributedContext | None = None,
    ) -> None:
        if not study.data:
            raise UserError("no data: give a folder of speech with --data DIR (`runner data synth` makes one)")
        self.study = study
        self.catalogue = catalogue
        self.console = console
        self.context = context or DistributedContext(device_named(study.device))
        self.device = self.context.device
        self._loaders: dict[int, CropLoader] = {}
        self.drawn_from = ""  # what `utterances` says
        self.shared_time = Stopwatch(self.device)  # of the work that all arms of a step share
        self.speech_frames = 0
        self.spread: Spread | None = None

    @cached_property
    def codec(self) -> SNAC:
        """The base codec, frozen."""
        codec = SNAC.from_pretrained(self.study.base).freeze().to(self.device)
        if self.study.compile:
            self.console.line("compile = true: codec and adapters are compiled in the first steps, which takes minutes")
            torch._dynamo.config.recompile_limit = _COMPILED  # layers of one class share it
            for layer in (*codec.encoder.block, *codec.decoder.model):
                layer.compile()
        return codec

    @cached_property
    def speaker_encoder(self) -> SpeakerEncoder:
        """The conditioning encoder, also used in losses."""
        return load_speaker_encoder(self.study.speaker_encoder, plugins=self.catalogue).to(self.device)

    @cached_property
    def judges(self) -> tuple[SpeakerEncoder, ...]:
        """The speaker encoders of the scores. They must be independent of what the arms learn from: it is checked."""
        judges = tuple(judge.to(self.device) for judge in load_judges(self.study.judges, self.catalogue))
        check_judges(judges, self.speaker_encoder, self.corpus, self.catalogue)
        return judges

    @property
    def judge(self) -> SpeakerEncoder:
        """The first judge, which ranks the arms."""
        return self.judges[0]

    @cached_property
    def whisper(self) -> Whisper | None:
        """The recogniser of words; None, which is said once, if there is none on this computer.

        Raises:
            UserError: if the study asks for one that cannot be used.
        """
        study = self.study
        found = find_whisper(study.whisper, study.language, self.device, workers=torch.get_num_threads())
        if found is None:
            judged = "judged by the bundled phone recogniser" if study.language in PER.languages else "not judged"
            self.console.line(f"content is {judged}: {not_found(study.language)}")
        return found

    @cached_property
    def corpus(self) -> Corpus:
        """The speech."""
        progress = self.console.progress("reading the audio files")
        return open_corpus(self.study.data, warn=self.console.warning, progress=progress)

    @cached_property
    def table(self) -> SpeakerTable:
        """The conditioning encoder's embeddings of the training speakers; the first process computes them for all."""
        return self.context.agree(self._table() if self.context.first else None)  # type: ignore[return-value]

    def _table(self) -> SpeakerTable:
        references = self._train_references

        def embedded(segments: dict[str, list[Segment]]) -> dict[str, Tensor]:
            progress = self.console.progress(f"{self.speaker_encoder.name} on train speakers")
            return speaker_embeddings(self.corpus, segments, self.speaker_encoder, progress=progress)

        names = references.speakers
        means = [embedded({name: of(name) for name in names}) for of in (references.conditioning, references.scoring)]
        single = embedded(
            {f"{name}/{i}": [part] for name in names for i, part in enumerate(references.positives(name))}
        )
        conditioning, scoring = (torch.stack([mean[name] for name in names]) for mean in means)
        parts = torch.stack([torch.stack([single[f"{name}/{i}"] for i in range(POSITIVES)]) for name in names])
        return SpeakerTable(tuple(names), conditioning, scoring, self.speaker_encoder.digest, parts)

    @cached_property
    def utterances(self) -> BankPool | None:
        """What stratified targets and negatives are drawn from instead of `table`; which of the two it is, is said.

        The first process builds the bank if it is missing; every process maps its files into memory.

        Raises:
            UserError: if the bank belongs to another encoder or to other speech, or the processes differ in it.
        """
        study, corpus, table = self.study, self.corpus, self.table
        count, what = len(corpus.split("train")), "stratified targets and negatives are drawn from"
        if study.bank == NONE or (study.bank == AUTO and count <= TABLE_UP_TO):
            reason = "bank = 'none'" if study.bank == NONE else f"{TABLE_UP_TO} utterances are too few for an index"
            self._say_drawn_from(f"{what} the embeddings of {len(table)} speakers ({reason}; there are {count})")
            return None
        folder = Path(self.context.first_decides(lambda: str(self._built_bank())))
        bank = open_bank(folder, encoder=self.speaker_encoder)
        device = self.device
        index = open_index(bank, gpu=(device.index or 0) if device.type == "cuda" else None)
        pool = BankPool(bank, index, table)
        kind = index.search_kind.split(", on")[0]
        self.context.check_equal({"index": kind, "digest of the index": index.header.sha256})
        self._say_drawn_from(
            f"{what} {len(pool)} utterances of {len(table)} speakers in {folder} (index {index.search_kind}, "
            f"recall@100 {index.header.recall:.2f})"
        )
        return pool

    def _say_drawn_from(self, text: str) -> None:
        self.drawn_from = text
        self.console.line(text)

    def _built_bank(self) -> Path:
        """The folder of the bank, which is built if it is missing, or is in the cache folder and not up to date."""
        study, encoder, corpus = self.study, self.speaker_encoder, self.corpus
        folder = bank_folder(corpus, encoder) if study.bank == AUTO else Path(study.bank)
        try:
            if study.bank != AUTO and (folder / HEADER).is_file():
                check_is_of(open_bank(folder, encoder=encoder), corpus)
            else:
                spec = EncoderSpec(study.speaker_encoder, plugins=study.plugins)
                progress = self.console.progress(f"{encoder.name} on all utterances")
                build_bank(corpus, folder, spec, progress=progress, wait_for_others=True)
            bank = open_bank(folder, encoder=encoder)
            try:
                open_index(bank)
            except UserError:  # missing, or of the bank before
                build_index(bank)
        except OSError as error:
            raise UserError(f"cannot write the embedding bank {folder}: {error.strerror or error}") from error
        return folder

    @property
    def digests(self) -> dict[str, str]:
        """Digests of everything that a score depends on, except the arm."""
        return {
            "data": self.corpus.digest,
            "base": self.codec.digest,
            "speaker_encoder": self.speaker_encoder.digest,
            **({"judge": "+".join(judge.digest for judge in self.judges)} if self.evaluates else {}),
        }

    def batches(self, seed: int) -> CropLoader:
        """Batches of training crops for a seed."""
        study, rate = self.study, self.codec.sampling_rate
        return CropLoader(
            self.corpus, "train", rate, study.crop_seconds, study.batch_size, seed,
            latents=self.latents, imitations=self.imitations, speech_frames=self.speech_frames,
        )  # fmt: skip

    def read_speech(self, arm: str) -> None:
        """From now on, read speech of every voice for strategies that attend to it.

        Args:
            arm: title of the arm that needs it.

        Raises:
            UserError: if the study has no latent cache.
        """
        if not self.study.latent_cache:
            raise UserError(f"arm {arm!r} attends to latents of speech, which it reads from a latent cache; expected "
                            "latent_cache = true")  # fmt: skip
        self.speech_frames = round(SPEECH_SECONDS * self.codec.sampling_rate / self.codec.hop_length)

    def speech_of(self, rows: Tensor) -> Tensor:
        """The latent (M, C, R) of conditioning speech of the speakers of M rows of the table; needs `read_speech`."""
        assert self.latents is not None
        found = []
        for row in rows.tolist():
            part = self._train_references.conditioning(self.table.names[row])[0]
            found.append(self.latents.speech(self.corpus.utterance(part.utterance), self.speech_frames, part.start))
        return to_device(torch.stack(found), self.device)

    @cached_property
    def _train_references(self) -> References:
        return References(self.corpus, "train")

    @cached_property
    def latents(self) -> LatentCache | None:
        """The latents of the training speech, built here if they are not on disk; None if the study has no cache."""
        if (cache := self.latent_cache()) is not None:
            self._build(cache, "latents of the training speech")
        return cache

    @cached_property
    def imitations(self) -> list[ImitationCache]:
        """The training speech in other voices, one cache a voice, built here where they are not on disk."""
        caches = self.imitation_caches()
        for number, cache in enumerate(caches, 1):
            self._build(cache, f"imitated voice {number} of {len(caches)}")
        return caches

    def _build(self, cache: LatentCache, what: str) -> None:
        self.console.line(f"latent cache: {what}, {cache.size / 1e6:.0f} MB in {cache.folder}")
        cache.build(self.console.progress(what))

    def latent_cache(self) -> LatentCache | None:
        """The cache of `latents`, as it is on disk."""
        if not self.study.latent_cache:
            return None
        return LatentCache(self.corpus.split("train"), self.codec, self._crop_samples)

    def imitation_caches(self) -> list[ImitationCache]:
        """The caches of `imitations`, as they are on disk."""
        train, codec, encoder = self.corpus.split("train"), self.codec, self.speaker_encoder
        return [
            ImitationCache(train, codec, self._crop_samples, encoder=encoder, voice=voice)
            for voice in range(self.study.imitations)
        ]

    @property
    def _crop_samples(self) -> int:
        return round(self.study.crop_seconds * self.codec.sampling_rate)

    def batches_ahead(self, seed: int) -> PrefetchingLoader[Batch]:
        """The same, which other processes read ahead of the device; see the setting `workers`. Close it after use."""
        workers = self.study.workers
        if workers < 0:
            workers = 0 if self.device.type == "cpu" else _WORKERS
        return PrefetchingLoader(self.batches(seed), self.study.steps + 1, workers, self.parts)

    def with_batch(self, size: int, seconds: float) -> StudyResources:
        """The same resources, with batches of another size that are computed at once.

        Args:
            size: number of crops.
            seconds: length of a crop; with a latent cache, that of the study.
        """
        _ = self.codec, self.speaker_encoder, self.corpus, self.table  # loaded for both
        other = copy(self)
        other.study = self.study.model_copy(update={"batch_size": size, "crop_seconds": seconds, "accumulate": 1})
        other._loaders = {}
        return other

    @property
    def parts(self) -> list[slice]:
        """The rows of a batch that this process trains on, in the parts that are computed at once.

        Raises:
            UserError: if the batch has fewer items than all processes have parts.
        """
        size, accumulate, context = self.study.batch_size, self.study.accumulate, self.context
        count = context.world * accumulate
        if count > size:
            raise UserError(
                f"a batch of {size} items cannot be divided into {count} parts ({context.world} device(s) x accumulate "
                f"= {accumulate}); expected a batch_size of at least {count}"
            )
        bounds = [size * part // count for part in range(count + 1)]
        mine = range(context.rank * accumulate, (context.rank + 1) * accumulate)
        return [slice(bounds[part], bounds[part + 1]) for part in mine]

    def draw(
        self,
        index: int,
        batches: CropLoader | PrefetchingLoader[Batch],
        sampler: SpeakerSampler,
        rows: slice = slice(None),
    ) -> TrainingBatch:
        """What every arm of a seed trains on at step `index`, from 1; a function of (seed, index).

        Args:
            index: number of the step.
            batches: of the seed.
            sampler: of the targets.
            rows: which items of the batch to read; targets are drawn for all.
        """
        table = self.table
        with self.shared_time:
            crops = batches.at(index, rows)
            loader = batches.batches if isinstance(batches, PrefetchingLoader) else batches
            speakers = table.indices(loader.speakers_at(index))
            targets = sampler.targets(speakers, index, self.study.targets_per_item, choice=self.study.target_choice)
            audio = to_device(crops.audio, self.device)
            latent = None if crops.latents is None else to_device(crops.latents, self.device)
        frozen = FrozenActivations(self.codec, audio, latent=latent, stopwatch=self.shared_time)
        return self.batch_of(index, crops, frozen, speakers, targets, rows)

    def batch_of(
        self, index: int, crops: Batch, frozen: FrozenActivations, speakers: Tensor, targets: Tensor, rows: slice
    ) -> TrainingBatch:
        """A training batch of crops that have been read. Arguments as its attributes; `frozen` is of the crops."""

        def moved(x: Tensor | None) -> Tensor | None:
            return None if x is None else to_device(x, self.device)

        imitations = tuple(
            Imitation(to_device(one.latent, self.device), to_device(one.embedding, self.device), moved(one.speech))
            for one in crops.imitations
        )
        here = torch.arange(len(targets)).view(-1, len(speakers))[:, rows].flatten()
        target_speech = functools.cache(lambda: self.speech_of(targets[here])) if self.speech_frames else None
        return TrainingBatch(index, frozen, speakers, targets, rows, imitations, moved(crops.speech), target_speech)

    def parallel(self, seed: int, step: int, targets: Tensor, rows: slice) -> tuple[Tensor, Tensor] | None:
        """Speech of the targets with the words of items of a batch; see `snac_core.step.Step`.

        Args:
            seed, step: of the batch.
            targets: rows of the table (N * b,), of the items' targets.
            rows: the b items.
        """
        names = [self.table.names[row] for row in targets.tolist()]
        found = parallel_speech(self._loader(seed), step, names, rows)
        return found and (to_device(found[0], self.device), to_device(found[1], self.device))

    def audio(self, seed: int, step: int) -> Tensor:
        """The audio (B, 1, T) of a whole batch."""
        return to_device(self._loader(seed).at(step).audio, self.device)

    def _loader(self, seed: int) -> CropLoader:
        """One loader per seed, for speech beside the crops."""
        if seed not in self._loaders:
            self._loaders[seed] = self.batches(seed)
        return self._loaders[seed]

    @cached_property
    def dev(self) -> Conversions:
        """Conversions of dev speakers, evaluated during training."""
        return self._conversions(self.dev_pairs)

    @cached_property
    def test(self) -> Conversions:
        """Conversions of test speakers, evaluated after training."""
        return self._conversions(self.test_pairs)

    @cached_property
    def probe(self) -> SpeakerProbe:
        """Linear probe of the speaker in the codes of test conversions."""
        return SpeakerProbe(self.codec, self.test)

    @cached_property
    def stored_calibrations(self) -> dict[str, Calibration]:
        """Judge to its error rates on dev speakers, through the codec, as stored by `runner evaluate --calibrate`."""
        stored = {judge.name: calibration_of(judge, self.corpus, self.codec) for judge in self.judges}
        return {name: calibration for name, calibration in stored.items() if calibration}

    @cached_property
    def calibrations(self) -> dict[str, Calibration]:
        """`stored_calibrations`; for several judges, those that are not stored are computed, from few parts."""
        corpus, codec, most = self.corpus, self.codec, CALIBRATION_PARTS
        found = dict(self.stored_calibrations)
        if len(self.judges) == 1 or len(corpus.speakers("dev")) < 2:
            return found
        for judge in (judge for judge in self.judges if judge.name not in found):
            try:
                found[judge.name] = (
                    calibration_of(judge, corpus, codec, most=most)
                    or calibrate(judge, corpus, codec, base=self.study.base, most=most, console=self.console)[0]
                )
            except UserError as error:
                self.console.warning(f"judge {judge.name} is not calibrated: {error}")
        return found

    @cached_property
    def test_pairs(self) -> PairList:
        """The list of test conversions; building it reads no audio."""
        return self._pairs("test", self.study.test_pairs)

    @cached_property
    def dev_pairs(self) -> PairList:
        """The list of dev conversions; empty if the study has none."""
        return self._pairs("dev", self.study.dev_pairs)

    @property
    def evaluates(self) -> bool:
        """Whether anything is evaluated, on dev or on test speakers."""
        return bool(self.study.dev_pairs or self.study.test_pairs)

    def check(self, *, choose_rates: bool = False) -> None:
        """Check before the first step that the speech has everything that the evaluations need.

        Args:
            choose_rates: whether learning rates are chosen by dev score.

        Raises:
            UserError: saying which speakers are missing.
        """
        study, dev, test = self.study, self.dev_pairs, self.test_pairs
        reasons = {"a list of learning rates": choose_rates, "select = 'best'": study.select == "best",
                   "patience": study.patience > 0}  # fmt: skip
        for reason, needed in reasons.items():
            if needed and not len(dev):
                raise UserError(f"{reason} needs evaluations on dev speakers, and there are none; expected at least 6 "
                                "speakers, so that 2 are in dev, and dev_pairs above 0")  # fmt: skip
        if study.test_pairs and not len(test):
            raise UserError(f"no conversion is possible in the test split of {self.corpus.root}")
        if self.evaluates:
            _ = self.judges
        if study.target_choice == "stratified" or study.bank not in (AUTO, NONE):
            _ = self.utterances

    def _pairs(self, split: str, n: int) -> PairList:
        study = self.study
        seed, seconds = study.pair_seed, study.pair_seconds
        asked = f"{split}_pairs" in study.model_fields_set
        empty = not self.corpus.splits.get(split)
        if not n or (empty and split == "dev" and not asked):
            if n:
                self.console.warning("no dev speakers (6 speakers are needed in all): no evaluation during training")
            return PairList.none(split, seed=seed, seconds=seconds)
        if empty:
            raise UserError(
                f"the {split} split of {self.corpus.root} is empty; expected at least {4 if split == 'test' else 6} "
                "speakers, or `runner train --no-evaluation`, which keeps a model that was not evaluated"
            )
        try:
            pairs = conversion_pairs(self.corpus, split, n=n, seed=seed, seconds=seconds, at_most=not asked)
        except UserError as error:
            raise UserError(f"{error} (--set {split}_pairs=N sets how many)") from error
        if len(pairs) < n:
            self.console.warning(f"only {len(pairs)} different conversions of {split} speakers are possible (the "
                                 f"default is {n}); the intervals of the report are wide")  # fmt: skip
        return pairs

    def _conversions(self, pairs: PairList) -> Conversions:
        return Conversions(
            self.corpus, pairs, self.codec.sampling_rate, self.speaker_encoder, self.judges, console=self.console
        )
