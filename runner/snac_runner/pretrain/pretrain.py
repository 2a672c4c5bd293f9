"""Train a base codec on folders of speech."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from snac_core.codec import SNAC
from snac_core.errors import UserError
from snac_core.files import write_json
from snac_core.seeding import derive
from snac_core.speakers.encoder import SpeakerEncoder, load_speaker_encoder
from snac_runner.console import SILENT, Console
from snac_runner.data.audio import load_audio
from snac_runner.data.corpus import Corpus
from snac_runner.data.loading import PrefetchingLoader
from snac_runner.data.open_corpus import open_corpus
from snac_runner.data.synth import synthesize
from snac_runner.distributed import DistributedContext, distributed_context
from snac_runner.logs import RunLog
from snac_runner.pretrain.data import SpeechMix
from snac_runner.pretrain.grow import initial_codec
from snac_runner.pretrain.losses import SpectralDistance, windows
from snac_runner.pretrain.resume import claim, resume
from snac_runner.pretrain.settings import PretrainSettings
from snac_runner.pretrain.step import Diverged, TrainingState
from snac_runner.train import stoppable

Share = tuple[Corpus, float]


def pretrain(settings: PretrainSettings, out: str | Path, *, console: Console = SILENT) -> Path | None:
    """Train a base codec, or resume the training in `out`.

    `out` receives config.json, metrics.jsonl, training.log, TensorBoard events, checkpoint/ (for an exact resume),
    result.json, and model/ with the averaged weights, for SNAC.from_pretrained.

    Args:
        settings: of codec, data and training.
        out: the run folder.
        console: displays progress, and lines about skipped files and resuming.

    Returns:
        `out`/model; None if the training was stopped (Ctrl-C). Call again with the same arguments to resume it.

    Raises:
        UserError: for settings that contradict each other, unusable speech, a folder with another or a finished
            training, or a gradient that is not finite; then the message names the last checkpoint.
    """
    out = Path(out)
    with distributed_context(settings.device) as context:
        console = console if context.first else SILENT
        start = None if settings.start is None else SNAC.from_pretrained(settings.start)
        codec = initial_codec(settings, start)
        encoder = (
            load_speaker_encoder(settings.speaker_encoder).to(context.device) if settings.weights.speaker else None
        )
        check_lengths(codec, settings, encoder)
        digests = {"start_digest": start and start.digest, "speaker_digest": encoder and encoder.digest}
        checkpoint = claim(out, settings, {"codec": codec.config, **digests}, context)
        corpora = _corpora(settings, out, context, console)
        state = TrainingState(codec, settings, context, encoder)
        state.data = [f"{corpus.digest} {share:.6f}" for corpus, share in corpora]
        resume(state, checkpoint, out, console)
        with _batches(state, corpora) as batches:
            finished = _train(state, batches, corpora, checkpoint, console)
        if context.first and finished:
            state.averaged().save_pretrained(out / "model")
            _write_result(out, state, corpora)
        context.wait()
    return out / "model" if finished else None


def _train(
    state: TrainingState,
    batches: SpeechMix | PrefetchingLoader[Tensor],
    corpora: list[Share],
    checkpoint: Path,
    console: Console,
) -> bool:
    """The training loop: all remaining steps. Returns False if it is stopped before the last one."""
    s, context, out = state.settings, state.context, checkpoint.parent.parent
    log = RunLog(out, batches.steps_per_epoch, state.step) if context.first else None
    validation = AudioValidation(out / "validation", corpora, state) if context.first and s.validate_every else None
    progress = console.progress("training the base codec")
    sums: dict[str, Tensor] = {}
    count, note = 0, ""
    seconds_before = state.seconds
    started = saved = time.monotonic()
    try:
        with stoppable(console) as stop_requested:
            while state.step < s.steps:
                terms = state.train_step(batches)
                sums = {name: value + sums.get(name, 0.0) for name, value in terms.items()}
                count += 1
                state.seconds = seconds_before + time.monotonic() - started
                if log is not None and state.step % s.log_every == 0:
                    state.check_finite()
                    means = {name: float(value) / count for name, value in sums.items()}
                    usage = state.last_usage or state.usage.statistics()
                    log.write({"step": state.step, "seconds": state.seconds, **means, **usage})
                    note, sums, count = f"loss {means['loss']:.2f}", {}, 0
                if log is not None and validation is not None and state.step % s.validate_every == 0:
                    log.write({"step": state.step, "dev": validation.run(state)})
                progress(state.step, s.steps, note)
                stop = context.total(torch.tensor(float(stop_requested.is_set()))) > 0
                if stop or state.step == s.steps or time.monotonic() - saved > s.checkpoint_seconds:
                    if log is not None:
                        log.flush()
                        state.save(checkpoint)
                    saved = time.monotonic()
                if stop and state.step < s.steps:
                    console.line(f"stopped after step {state.step} of {s.steps}; the same command resumes the training")
                    return False
    except Diverged as error:
        kept = f"the last checkpoint is {checkpoint}" if checkpoint.is_file() else "there is no checkpoint yet"
        raise UserError(
            f"{error}; {kept}; try a lower lr or grad_clip, in a new folder, from `start` if you have weights"
        ) from None
    finally:
        for opened in (log, validation):
            if opened is not None:
                opened.close()
    return True


def check_lengths(codec: SNAC, settings: PretrainSettings, encoder: SpeakerEncoder | None) -> None:
    """Check that crops are long enough for codec, losses, discriminators and speaker encoder.

    Raises:
        UserError: with the shortest length.
    """
    rate, crop_seconds, adversary = codec.sampling_rate, settings.crop_seconds, settings.adversary
    block = codec.preprocess(torch.zeros(1, 1, 1)).shape[-1]
    spectra = (*windows(rate), *(adversary.n_ffts if adversary else ()))
    least = max(block, max(spectra) // 2 + 1)  # reflection padding of half a window needs more samples than it adds
    if crop_seconds * rate < least:
        raise UserError(
            f"crop_seconds {crop_seconds:g} are {round(crop_seconds * rate)} samples; this codec and its losses need "
            f"{least}, {least / rate:.3f} s"
        )
    if adversary is not None:
        needed = [n_fft // 2 + 1 for n_fft in adversary.n_ffts] + [
            4 * period for period in adversary.periods
        ]  # samples
        if not needed:
            raise UserError(
                "an adversary without discriminators; set adversary.periods or adversary.n_ffts, or adversary=none"
            )
        least_seconds = max(needed) / rate
        if adversary.seconds is not None and not least_seconds <= adversary.seconds <= crop_seconds:
            raise UserError(
                f"adversary.seconds {adversary.seconds:g}; these discriminators need {least_seconds:.3f} s, and a crop "
                f"has {crop_seconds:g} (crop_seconds)"
            )
    if encoder is not None and crop_seconds < encoder.min_seconds:
        raise UserError(f"crop_seconds {crop_seconds:g}; {encoder.name} needs {encoder.min_seconds:g} s")


def _corpora(settings: PretrainSettings, out: Path, context: DistributedContext, console: Console) -> list[Share]:
    """Corpora with their shares of a batch: recorded speech in proportion to its length, and the synthetic share."""
    recorded = [open_corpus(path, seed=settings.seed, warn=console.warning) for path in settings.data]
    for corpus in recorded:
        for note in corpus.notes:
            console.line(f"{corpus.name}: {note}")
    seconds = [sum(u.seconds for u in corpus.split("train")) for corpus in recorded]
    share = settings.synthetic_share if settings.synthetic else 0.0
    corpora = [(c, (1 - share) * s / sum(seconds)) for c, s in zip(recorded, seconds, strict=True)]
    if settings.synthetic and (share or not recorded):
        folder = out / "synthetic"
        if context.first:
            synthesize(folder, speakers=settings.synthetic, sentences=settings.synthetic_sentences, seed=settings.seed)
        context.wait()
        corpora.append((open_corpus(folder), share if recorded else 1.0))
    if not corpora:
        raise UserError("no speech to train on; give folders in `data`, or a number of `synthetic` speakers")
    return corpora


@contextmanager
def _batches(state: TrainingState, corpora: list[Share]) -> Iterator[SpeechMix | PrefetchingLoader[Tensor]]:
    """The source of batches; on accelerators, which would wait for them, with prefetching."""
    s, rate = state.settings, state.codec.sampling_rate
    seed = derive(s.seed, "speech", state.context.rank)
    mix = SpeechMix(corpora, rate, round(s.crop_seconds * rate), s.batch_size, s.augmentation, seed)
    if state.context.device.type == "cpu":
        yield mix
        return
    loader = PrefetchingLoader(mix, s.steps, s.loaders)
    try:
        yield loader
    finally:
        loader.close()


def _write_result(out: Path, state: TrainingState, corpora: list[Share]) -> None:
    result: dict[str, Any] = {
        "status": "success",
        "steps": state.step,
        "seconds": state.seconds,
        "device": state.context.describe(),
        "torch": torch.__version__,
        "data": {corpus.name: corpus.digest for corpus, _ in corpora},
        "digest": state.averaged().digest,
    }
    write_json(out / "result.json", result)


class AudioValidation:
    """Reconstructs the same dev utterances in each validation: spectral distances, and audio for TensorBoard.

    Args:
        folder: for the TensorBoard events with the audio.
        corpora: one utterance of each of the first dev speakers is used.
        state: gives the sample rate; at step 0 the originals are written too.
    """

    SECONDS = 4.0  # of an utterance
    SPEAKERS = 2  # of each corpus

    def __init__(self, folder: Path, corpora: list[Share], state: TrainingState) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.sample_rate = state.codec.sampling_rate
        self.audio: dict[str, Tensor] = {}  # (1, T) each
        for corpus, _ in corpora:
            dev = corpus.splits.get("dev", ())
            first_of = {utterance.speaker: utterance for utterance in reversed(dev)}
            for speaker in sorted(first_of)[: self.SPEAKERS]:
                audio = load_audio(first_of[speaker], self.sample_rate, seconds=self.SECONDS)
                self.audio[f"{corpus.name}/{speaker}"] = audio
        self.distance = SpectralDistance(self.sample_rate)
        self.events = SummaryWriter(str(folder))
        if state.step == 0:
            for name, audio in self.audio.items():
                self.events.add_audio(f"{name}/original", audio[0], 0, self.sample_rate)

    def run(self, state: TrainingState) -> dict[str, float]:
        """Spectral distances of the averaged codec, means over the utterances."""
        codec = state.averaged().freeze()
        means: dict[str, float] = {}
        with torch.inference_mode(), codec.fixed_noise(0):
            for name, audio in self.audio.items():
                output = codec(audio.unsqueeze(0))[0]
                self.events.add_audio(f"{name}/codec", output[0, 0], state.step, self.sample_rate)
                for term, value in self.distance(output, audio.unsqueeze(0)).items():
                    means[term] = means.get(term, 0.0) + float(value) / len(self.audio)
        self.events.flush()
        return means

    def close(self) -> None:
        """Close the event file."""
        self.events.close()
