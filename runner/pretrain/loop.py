"""`pretrain`: from folders of speech to a base codec, in one run folder that can be stopped and continued."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from runner.data import Corpus, open_corpus, synthesize
from runner.logs import RunLog
from runner.pretrain.beginning import check_lengths, codec_to_train
from runner.pretrain.claiming import agree_on_the_end, claim
from runner.pretrain.devices import Place, placed
from runner.pretrain.listening import Listener
from runner.pretrain.settings import PretrainSettings
from runner.pretrain.speech import Ahead, SpeechMix
from runner.pretrain.trainer import Diverged, Trainer
from runner.stopping import stoppable
from snac_core import atomic
from snac_core.codec import SNAC
from snac_core.errors import UserError
from snac_core.seeding import derive
from snac_core.speakers import load_speaker_encoder

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
    with placed(settings.device) as place:
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
    trainer: Trainer, batches: SpeechMix | Ahead, corpora: list[Share], checkpoint: Path, say: Say, tell: Tell
) -> bool:
    """All steps that are left; False if stopped before the last."""
    s, place, out = trainer.settings, trainer.place, checkpoint.parent.parent
    log = RunLog(out, batches.steps_per_epoch, trainer.step) if place.first else None
    listener = Listener(out / "listening", corpora, trainer) if place.first and s.listen_every else None
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


def _corpora(settings: PretrainSettings, out: Path, place: Place, say: Say) -> list[Share]:
    """Corpora with their shares of a batch: recorded speech by its length, the synthetic one as asked for."""
    recorded = [open_corpus(path, seed=settings.seed, console=say) for path in settings.data]
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
def _batches(trainer: Trainer, corpora: list[Share]) -> Iterator[SpeechMix | Ahead]:
    """Batches as the trainer asks for them, or, where an accelerator would wait, prepared ahead."""
    s, rate = trainer.settings, trainer.codec.sampling_rate
    seed = derive(s.seed, "speech", trainer.place.rank)
    mix = SpeechMix(corpora, rate, round(s.crop_seconds * rate), s.batch, s.augmentation, seed)
    if trainer.place.device.type == "cpu":
        yield mix
        return
    ahead = Ahead(mix, s.steps, s.loaders)
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
    atomic.write_json(out / "result.json", result)


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
