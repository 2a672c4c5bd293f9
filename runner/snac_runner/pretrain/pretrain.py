"""Validation while a codec trains: the same utterances again and again, measured, and heard in TensorBoard.

Whose a run folder is: free, or that of the very training that is asked for.

What a training begins with: the codec, and whether the settings fit it.

`pretrain`: from folders of speech to a base codec, in one run folder that can be stopped and continued."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from snac_core.codec import SNAC
from snac_core.errors import UserError
from snac_core.files import write_json
from snac_core.seeding import derive
from snac_core.speakers.encoder import SpeakerEncoder, load_speaker_encoder
from snac_runner.data.audio import load_audio
from snac_runner.data.corpus import Corpus
from snac_runner.data.open_corpus import open_corpus
from snac_runner.data.synth import synthesize
from snac_runner.logs import RunLog
from snac_runner.pretrain.data import PrefetchingLoader, SpeechMix
from snac_runner.pretrain.distributed import DistributedContext, distributed_context
from snac_runner.pretrain.grow import add_levels, change_rates, widen
from snac_runner.pretrain.losses import SpectralDistance, windows
from snac_runner.pretrain.settings import Adversary, PretrainSettings, codec_config
from snac_runner.pretrain.step import Diverged, Trainer
from snac_runner.train import stoppable

SECONDS = 4.0  # of an utterance
_EACH = 2  # utterances of each corpus, of different speakers


class AudioValidation:
    """What the averaged codec makes of fixed speech of speakers it is not trained on.

    Args:
        folder: for TensorBoard's events; they hold the audio.
        corpora: the first speakers of their dev splits are heard.
        trainer: decides the rate.
    """

    def __init__(self, folder: Path, corpora: list[tuple[Corpus, float]], trainer: Trainer) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.rate = trainer.codec.sampling_rate
        self.speech: dict[str, Tensor] = {}
        for corpus, _ in corpora:
            dev = corpus.splits.get("dev", ())
            firsts = {utterance.speaker: utterance for utterance in reversed(dev)}
            for speaker in sorted(firsts)[:_EACH]:
                self.speech[f"{corpus.name}/{speaker}"] = load_audio(firsts[speaker], self.rate, seconds=SECONDS)
        self.distance = SpectralDistance(self.rate)
        self.events = SummaryWriter(str(folder))
        if trainer.step == 0:
            for name, audio in self.speech.items():
                self.events.add_audio(f"{name}/original", audio[0], 0, self.rate)

    def hear(self, trainer: Trainer) -> dict[str, float]:
        """The distances, means over the utterances; the audio goes to TensorBoard."""
        codec = trainer.averaged().freeze()
        found: dict[str, float] = {}
        with torch.inference_mode(), codec.fixed_noise(0):
            for name, audio in self.speech.items():
                made = codec(audio.unsqueeze(0))[0]
                self.events.add_audio(f"{name}/codec", made[0, 0], trainer.step, self.rate)
                for term, value in self.distance(made, audio.unsqueeze(0)).items():
                    found[term] = found.get(term, 0.0) + float(value) / len(self.speech)
        self.events.flush()
        return found

    def close(self) -> None:
        """No more audio."""
        self.events.close()


# of a training that is not at its end: where and how fast it runs, what is told of it, and where the rate falls to
_MAY_CHANGE = {
    "data", "device", "log_every", "checkpoint_seconds", "listen_every", "loaders", "graphs", "steps",
}  # fmt: skip


def claim(out: Path, settings: PretrainSettings, made_of: dict[str, Any], place: DistributedContext) -> Path:
    """Where the checkpoint is or will be, after making sure that `out` is free or holds this very training.

    `made_of` is what the settings only name: the codec's arguments, digests of the start and of the speaker encoder.

    Raises:
        UserError: for a folder that holds another training, a finished one, or other files.
    """
    path, wanted = out / "config.json", json.loads(settings.model_dump_json())
    if path.is_file():
        try:
            found = json.loads(path.read_text())
            # what was not there yet when it began is as by default
            stored = json.loads(PretrainSettings(**found["settings"]).model_dump_json())
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path} is no configuration of a pretraining; give a new folder with --out") from None
        different = [
            f"{key}: {stored.get(key)!r} there, {value!r} asked for"
            for key, value in wanted.items()
            if key not in _MAY_CHANGE and stored.get(key) != value
        ]
        different += [
            f"{key}: {_difference(found[key], value)}"
            for key, value in made_of.items()
            if key in found and found[key] != value
        ]
        if different:
            raise UserError(
                f"{out} holds a training with other settings ({'; '.join(different[:3])}); give a new folder with "
                f"--out{_building_on(out)}"
            )
        if (out / "result.json").is_file():
            raise UserError(f"{out} holds a finished training; give a new folder with --out{_building_on(out)}")
    elif out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out} holds files, but no training; give a new folder with --out")
    place.wait()
    if place.first and not path.is_file():
        write_json(path, {"settings": wanted, **made_of})
    return out / "checkpoint" / "state.pt"


def _building_on(out: Path) -> str:
    return f", and --start {out / 'model'} to build on its weights" if (out / "model").is_dir() else ""


def _difference(found: Any, value: Any) -> str:
    """What is there and what is asked for, in few words."""
    if isinstance(found, dict) and isinstance(value, dict):
        keys = [key for key in {**found, **value} if found.get(key) != value.get(key)]
        return ", ".join(f"{key} {found.get(key)} there, {value.get(key)} now" for key in keys)
    return f"{str(found)[:12]} there, {str(value)[:12]} now"


def agree_on_the_end(
    out: Path, settings: PretrainSettings, step: int, place: DistributedContext, say: Callable[[str], None]
) -> None:
    """Let a training that stands at `step` end elsewhere than was said before; config.json keeps what was said."""
    if step > settings.steps:
        raise UserError(f"steps {settings.steps}, but the training in {out} is at step {step}; ask for more")
    path = out / "config.json"
    found = json.loads(path.read_text())
    before = found["settings"]["steps"]
    place.wait()
    if place.first and before != settings.steps:
        say(f"the rate falls towards step {settings.steps} from here; so far it fell towards {before}")
        found["settings"]["steps"] = settings.steps
        found["ends_before"] = [*found.get("ends_before", []), {"steps": before, "until_step": step}]
        write_json(path, found)


def codec_to_train(settings: PretrainSettings, start: SNAC | None) -> SNAC:
    """`start`, grown as the settings ask, or a new codec where there is none.

    Raises:
        UserError: for settings that do not fit together, or not to `start`.
    """
    if len(settings.widths) not in (0, 2):
        raise UserError(f"widths are two, encoder_dim and decoder_dim; got {list(settings.widths)}")
    if len(settings.rates) not in (0, 2):
        raise UserError(f"rates are two lists, of the encoder and of the decoder; got {len(settings.rates)}")
    _check_frozen(settings)
    if start is not None:
        if settings.rates:
            start = change_rates(start, *settings.rates)
        if settings.widths:
            start = widen(start, *settings.widths, seed=settings.seed)
        return add_levels(start, settings.levels, seed=settings.seed) if settings.levels else start
    if settings.levels or settings.widths or settings.rates:
        raise UserError("levels, widths and rates change those of `start`; without it give a `codec` that has them")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(settings.seed, "codec weights"))
        return SNAC.from_config(codec_config(settings.codec))


def _check_frozen(settings: PretrainSettings) -> None:
    frozen = set(settings.frozen)
    if frozen and settings.start is None:
        raise UserError(f"frozen {sorted(frozen)}, but there is no `start` whose weights could be kept")
    if len(frozen) == 3:
        raise UserError("all of the codec is frozen; something must be left to train")
    if "quantizer" in frozen and settings.levels:
        raise UserError(f"levels {list(settings.levels)} are added to a frozen quantizer, where they would stay silent")
    if frozen & {"encoder", "decoder"} and (settings.widths or settings.rates):
        raise UserError(f"widths and rates change encoder and decoder; frozen are {sorted(frozen)}")


def check_lengths(codec: SNAC, settings: PretrainSettings, ear: SpeakerEncoder | None) -> None:
    """Raise UserError unless crops are long enough for all that hears them, and discriminators' stretches lie within them."""
    block = codec.preprocess(torch.zeros(1, 1, 1)).shape[-1]
    spectra = (*windows(codec.sampling_rate), *(settings.adversary.n_ffts if settings.adversary else ()))
    least = max(block, max(spectra) // 2 + 1)  # a window reaches half its length past the ends, by reflection
    if settings.crop_seconds * codec.sampling_rate < least:
        raise UserError(
            f"crop_seconds {settings.crop_seconds:g} are {round(settings.crop_seconds * codec.sampling_rate)} samples; "
            f"this codec and its losses need {least}, {least / codec.sampling_rate:.3f} s"
        )
    if settings.adversary is not None:
        _check_stretch(codec, settings.adversary, settings.crop_seconds)
    if ear is not None and settings.crop_seconds < ear.min_seconds:
        raise UserError(f"crop_seconds {settings.crop_seconds:g}; {ear.name} needs {ear.min_seconds:g} s")


def _check_stretch(codec: SNAC, how: Adversary, crop_seconds: float) -> None:
    hearing = [n_fft // 2 + 1 for n_fft in how.n_ffts] + [4 * period for period in how.periods]  # samples
    if not hearing:
        raise UserError(
            "an adversary without discriminators; give adversary.periods or adversary.n_ffts, or adversary=none"
        )
    least = max(hearing) / codec.sampling_rate
    if how.seconds is not None and not least <= how.seconds <= crop_seconds:
        raise UserError(
            f"adversary.seconds {how.seconds:g}; these discriminators need {least:.3f} s, and a crop has "
            f"{crop_seconds:g} (crop_seconds)"
        )


Share = tuple[Corpus, float]
Say = Callable[[str], None]
Tell = Callable[[int, int, str], None]


def pretrain(settings: PretrainSettings, out: str | Path, *, say: Say = print, tell: Tell | None = None) -> Path | None:
    """Train a base codec, or continue the training that `out` holds.

    `out` receives config.json, metrics.jsonl, training.log, TensorBoard events, checkpoint/ (exact resume), result.json
    and model/: the averaged weights, for SNAC.from_pretrained.

    Args:
        settings: what to train, on what, how.
        out: the run folder.
        say: called with lines: files that are skipped, what was resumed.
        tell: called after every step with (steps done, of how many, a note).

    Returns:
        `out`/model; None if the training was stopped (Ctrl-C): calling again with the same arguments continues it.

    Raises:
        UserError: for settings that do not fit together, no usable speech, a folder that holds another or a finished
            training, or a loss that is no number any more: the last good checkpoint is kept, and named.
    """
    out = Path(out)
    with distributed_context(settings.device) as place:
        start = None if settings.start is None else SNAC.from_pretrained(settings.start)
        codec = codec_to_train(settings, start)
        ear = load_speaker_encoder(settings.speaker_encoder).to(place.device) if settings.weights.speaker else None
        check_lengths(codec, settings, ear)
        digests = {"start_digest": start and start.digest, "speaker_digest": ear and ear.digest}
        checkpoint = claim(out, settings, {"codec": codec.config, **digests}, place)
        corpora = _corpora(settings, out, place, say if place.first else _silent)
        trainer = Trainer(codec, settings, place, ear)
        trainer.speech = [f"{corpus.digest} {share:.6f}" for corpus, share in corpora]
        if checkpoint.is_file():
            _load(trainer, checkpoint)
            if place.first:
                say(f"continuing from step {trainer.step} of {settings.steps}")
        agree_on_the_end(out, settings, trainer.step, place, say)
        with _batches(trainer, corpora) as batches:
            finished = _train(trainer, batches, corpora, checkpoint, say, tell or (lambda *_: None))
        if place.first and finished:
            trainer.averaged().save_pretrained(out / "model")
            _conclude(out, trainer, corpora)
        place.wait()
    return out / "model" if finished else None


def _train(
    trainer: Trainer,
    batches: SpeechMix | PrefetchingLoader,
    corpora: list[Share],
    checkpoint: Path,
    say: Say,
    tell: Tell,
) -> bool:
    """All steps that are left; False if stopped before the last."""
    s, place, out = trainer.settings, trainer.place, checkpoint.parent.parent
    log = RunLog(out, batches.steps_per_epoch, trainer.step) if place.first else None
    listener = AudioValidation(out / "listening", corpora, trainer) if place.first and s.listen_every else None
    sums: dict[str, Tensor] = {}
    counted, note = 0, ""
    saved = started = time.monotonic()
    before = trainer.seconds
    try:
        with stoppable() as asked:
            while trainer.step < s.steps:
                terms = trainer.train_step(batches)
                sums = {name: value + sums.get(name, 0.0) for name, value in terms.items()}
                counted += 1
                trainer.seconds = before + time.monotonic() - started
                if log is not None and trainer.step % s.log_every == 0:
                    trainer.check()
                    means = {name: float(value) / counted for name, value in sums.items()}
                    use = trainer.use or trainer.usage.figures()
                    log.write({"step": trainer.step, "seconds": trainer.seconds, **means, **use})
                    note, sums, counted = f"loss {means['loss']:.2f}", {}, 0
                if log is not None and listener is not None and trainer.step % s.listen_every == 0:
                    log.write({"step": trainer.step, "dev": listener.hear(trainer)})
                tell(trainer.step, s.steps, note)
                stop = place.total(torch.tensor(float(asked.is_set()))) > 0
                if stop or trainer.step == s.steps or time.monotonic() - saved > s.checkpoint_seconds:
                    if log is not None:
                        log.flush()
                        trainer.save(checkpoint)
                    saved = time.monotonic()
                if stop and trainer.step < s.steps:
                    if place.first:
                        say(f"stopped after step {trainer.step} of {s.steps}; the same command continues from there")
                    return False
    except Diverged as error:
        kept = f"the last good checkpoint is {checkpoint}" if checkpoint.is_file() else "no checkpoint was written yet"
        raise UserError(f"{error}; {kept}; a lower lr or grad_clip, in a new folder with start, may help") from None
    finally:
        for opened in (log, listener):
            if opened is not None:
                opened.close()
    return True


def _corpora(settings: PretrainSettings, out: Path, place: DistributedContext, say: Say) -> list[Share]:
    """Corpora with their shares of a batch: recorded speech by its length, the synthetic one as asked for."""
    recorded = [open_corpus(path, seed=settings.seed, warn=say) for path in settings.data]
    for corpus in recorded:
        for note in corpus.notes:
            say(f"{corpus.name}: {note}")
    seconds = [sum(u.seconds for u in corpus.split("train")) for corpus in recorded]
    share = settings.synthetic_share if settings.synthetic else 0.0
    corpora = [(c, (1 - share) * s / sum(seconds)) for c, s in zip(recorded, seconds, strict=True)]
    if settings.synthetic and (share or not recorded):
        folder = out / "synthetic"
        if place.first:
            synthesize(folder, speakers=settings.synthetic, sentences=settings.synthetic_sentences, seed=settings.seed)
        place.wait()
        corpora.append((open_corpus(folder), share if recorded else 1.0))
    if not corpora:
        raise UserError("no speech to train on; give folders in `data`, or a number of `synthetic` speakers")
    return corpora


@contextmanager
def _batches(trainer: Trainer, corpora: list[Share]) -> Iterator[SpeechMix | PrefetchingLoader]:
    """Batches as the trainer asks for them, or, where an accelerator would wait, prepared ahead."""
    s, rate = trainer.settings, trainer.codec.sampling_rate
    seed = derive(s.seed, "speech", trainer.place.rank)
    mix = SpeechMix(corpora, rate, round(s.crop_seconds * rate), s.batch, s.augmentation, seed)
    if trainer.place.device.type == "cpu":
        yield mix
        return
    ahead = PrefetchingLoader(mix, s.steps, s.loaders)
    try:
        yield ahead
    finally:
        ahead.close()


def _conclude(out: Path, trainer: Trainer, corpora: list[Share]) -> None:
    result: dict[str, Any] = {
        "status": "success",
        "steps": trainer.step,
        "seconds": trainer.seconds,
        "device": trainer.place.describe(),
        "torch": torch.__version__,
        "data": {corpus.name: corpus.digest for corpus, _ in corpora},
        "digest": trainer.averaged().digest,
    }
    write_json(out / "result.json", result)


def _load(trainer: Trainer, checkpoint: Path) -> None:
    """Continue from a checkpoint of the same speech."""
    speech = trainer.speech
    try:
        trainer.load(checkpoint)
    except (OSError, EOFError, KeyError, RuntimeError, UnpicklingError) as error:
        # of a damaged file torch says how to have it executed, which nobody should
        reason = "it is damaged" if isinstance(error, UnpicklingError) else " ".join(str(error).split())[:200]
        raise UserError(f"{checkpoint} is no checkpoint of this training: {reason}; give a new folder") from error
    if trainer.speech != speech:
        raise UserError(f"{checkpoint} was trained on other speech than this; give that speech, or a new folder")


def _silent(_line: str) -> None:
    return None
