"""Train `phones_tiny`, the bundled phone recogniser, and compare content judges.

    python recipes/phone_recogniser.py train --data speech/ --out runs/phones_tiny
    python recipes/phone_recogniser.py compare --data speech/ --judge phones --judge words

`train` uses connectionist temporal classification (CTC, Graves et al. 2006) on synthetic sentences and recorded speech,
both as they are and after a codec, with perturbations. Where espeak-ng reports the times of its phones, a cross entropy
of frames is added: CTC alone needs many steps to find an alignment.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from time import perf_counter, process_time
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import save
from torch import Tensor, nn

from perturb import mask_features, perturb
from phone_data import (
    UNKNOWN,
    Batch,
    Clip,
    ClipSampler,
    SentenceGenerator,
    coded_clips,
    load_clips,
    recorded_clips,
    save_clips,
    synthesize_clips,
    transcribe,
)
from snac_core.codec import SNAC
from snac_core.errors import UserError, nearest
from snac_core.files import parse_json, write_bytes, write_json, write_text, writing
from snac_core.seeding import derive, generator
from snac_runner.data.audio import load_audio, resample
from snac_runner.data.corpus import Corpus
from snac_runner.data.open_corpus import open_corpus
from snac_runner.data.synth import TRAIN
from snac_runner.evaluate.content import error_rate
from snac_runner.evaluate.phone_recogniser import BLANK, SAMPLE_RATE, PhoneNetwork, PhoneRecogniser, phones_of
from snac_runner.evaluate.whisper import Whisper
from snac_runner.schedule import learning_rate

LR = 1.5e-3  # peak; linear warm-up, constant, and a cosine to 0 over the last 30 % of the steps
DECAY = 0.3
WEIGHT_DECAY = 1e-2  # of matrices
GRAD_CLIP = 2.0
FRAME_WEIGHT = 0.5  # of the cross entropy of frames
PERTURBED_SHARE = 0.6  # of the items; all are warped and masked
WARP = 0.12  # largest relative change of the mel axis (vocal tract length perturbation, Jaitly and Hinton 2013)
SENTENCES = 4896  # 72 for each voice that may be trained on
SHARES = {"synthetic": 0.25, "synthetic-coded": 0.2, "real": 0.3, "real-coded": 0.25}  # of the training clips
CODED = {"synthetic": 0.14, "real": 0.33}  # share of the clips that pass the codec, the slowest part of the preparation

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Folder for model.safetensors, training.jsonl, result.json and the clips.")],
    data: Annotated[
        list[Path], typer.Option(help="Folder of speech; its train speakers are used. May be repeated.")
    ] = [],  # noqa: B006
    codec: Annotated[str, typer.Option(help="Codec for coded speech: a name or folder.")] = "tiny",
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 2000,
    stop_at: Annotated[int | None, typer.Option(help="Stop after this step; run again without it to resume.")] = None,
    batch_seconds: Annotated[float, typer.Option(min=1, help="Speech per step, in s.")] = 64.0,
    warmup_steps: Annotated[int, typer.Option(min=0, help="Steps of linear warm-up of the learning rate.")] = 60,
    clean_steps: Annotated[int, typer.Option(min=0, help="First steps, on synthetic speech without codec only.")] = 300,
    log_every: Annotated[int, typer.Option(min=1, help="Steps between log lines and checkpoints.")] = 50,
    seed: Annotated[int, typer.Option(help="Seed of all random numbers.")] = 0,
) -> None:
    """Train phones_tiny. Run the same command again to resume a stopped training."""
    if (out / "model.safetensors").exists():
        raise UserError(f"{out} holds a trained recogniser; give another folder with --out")
    settings = {"batch_seconds": batch_seconds, "warmup_steps": warmup_steps, "clean_steps": clean_steps, "seed": seed}

    # speech, network and optimizer
    clean, everything = prepare_clips(out / "material", data, codec, seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "phone weights"))
        network = PhoneNetwork()
    parameters = list(network.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.98),
    )
    checkpoint, log = out / "state.pt", out / "training.jsonl"
    done, seconds = 0, 0.0
    records: list[dict[str, float]] = []
    if checkpoint.is_file():
        state: dict[str, Any] = torch.load(checkpoint, map_location="cpu", weights_only=True)
        if state["settings"] != settings:  # `steps` may change
            raise UserError(f"{checkpoint} has the settings {state['settings']}, not {settings}; give a new folder")
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        done, seconds = state["step"], state["seconds"]
        records = [record for record in map(json.loads, log.read_text().splitlines()) if record["step"] <= done]

    # training
    network.train()
    losses: list[float] = []
    last = steps if stop_at is None else min(steps, stop_at)
    for step in range(done + 1, last + 1):
        started = perf_counter()
        batch = (clean if step <= clean_steps else everything).batch(batch_seconds, seed, step - 1)
        draw = generator(seed, step - 1, "phone disturbance")
        unchanged = torch.rand(len(batch.audio), 1, generator=draw) >= PERTURBED_SHARE
        audio = torch.where(unchanged, batch.audio, perturb(batch.audio, SAMPLE_RATE, draw))
        features = warp_bands(network.features(audio), WARP, draw)
        for _ in range(2):
            features = mask_features(features, draw, bands=12, frames=15)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(seed, step - 1, "phone dropout"))
            with torch.autocast("cpu", torch.bfloat16):
                logits = network.read(features)
        loss = phone_loss(logits.float(), batch)
        decay_start = steps + 1 - DECAY * steps
        lr = learning_rate(step, LR, warmup_steps=warmup_steps, decay_start=decay_start, decay_end=steps + 1)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, GRAD_CLIP)
        optimizer.step()
        losses.append(loss.item())
        seconds += perf_counter() - started
        if step % log_every == 0 or step == last:
            records.append({"step": step, "loss": sum(losses) / len(losses), "lr": lr, "seconds": seconds})
            losses = []
            left = seconds / step * (steps - step) / 60
            print(" ".join(f"{key} {value:.4g}" for key, value in records[-1].items()) + f"; {left:.0f} min left")
            write_text(log, "".join(json.dumps(record) + "\n" for record in records))
            with writing(checkpoint) as temporary:
                state = {"settings": settings, "step": step, "seconds": seconds}
                state |= {"network": network.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save(state, temporary)
    if last < steps:
        print(f"stopped at step {last} of {steps}")
        return

    write_json(
        out / "result.json", {"settings": {**settings, "steps": steps}, "hours": everything.hours, "codec": codec}
    )
    halved = {k: v.half() if v.is_floating_point() else v for k, v in network.state_dict().items()}
    write_bytes(out / "model.safetensors", save(halved))
    print(f"the weights are in {out / 'model.safetensors'}")


def phone_loss(logits: Tensor, batch: Batch) -> Tensor:
    """CTC loss per phone, plus the weighted cross entropy of frames with known phones; logits (B, F, classes)."""
    log_probabilities = logits.log_softmax(-1)
    length = torch.full((len(logits),), logits.shape[1])
    ctc = nn.functional.ctc_loss(
        log_probabilities.transpose(0, 1), batch.phones, length, batch.counts, blank=BLANK,
        reduction="none", zero_infinity=True,
    )  # fmt: skip
    loss = ctc.sum() / batch.counts.sum()
    if (batch.frames != UNKNOWN).any():
        loss = loss + FRAME_WEIGHT * nn.functional.nll_loss(log_probabilities.transpose(1, 2), batch.frames)
    return loss


def warp_bands(features: Tensor, most: float, draw: torch.Generator) -> Tensor:
    """Stretch the mel axis of each item of (B, M, F) by a random factor from 1 - most to 1 + most."""
    items, bands, frames = features.shape
    factor = 1 + most * (2 * torch.rand(items, 1, generator=draw) - 1)
    position = (torch.arange(bands) * factor).clamp(max=bands - 1)
    below = position.floor().long().clamp(max=bands - 2)
    fraction = (position - below).unsqueeze(-1)
    low, high = (features.gather(1, i.unsqueeze(-1).expand(-1, -1, frames)) for i in (below, below + 1))
    return low + fraction * (high - low)


def prepare_clips(
    folder: Path, data: Sequence[Path], codec: str, *, sentences: int = SENTENCES, seed: int = 0
) -> tuple[ClipSampler, ClipSampler]:
    """Clean synthetic clips, and all clips. Each kind is saved in `folder` and not made again.

    Raises:
        UserError: if `folder` has clips of other speech, of another codec or of another seed.
    """
    snac, corpora = SNAC.from_pretrained(codec).freeze(), [open_corpus(path) for path in data]
    made_from = {
        "data": [corpus.digest for corpus in corpora], "codec": snac.digest, "sentences": sentences, "seed": seed,
    }  # fmt: skip
    about = folder / "material.json"
    if about.is_file() and (found := parse_json(about.read_text())) != made_from:
        changed = [name for name in made_from if found.get(name) != made_from[name]]
        raise UserError(f"the clips in {folder} are of other {', '.join(changed)}; expected the same, or a new folder")
    if not about.is_file() and list(folder.glob("*-coded.safetensors")):
        raise UserError(f"{folder} has clips, and no {about.name} that says what they are of; give a new folder")
    write_json(about, made_from)

    def cached(kind: str, make: Callable[[], list[Clip]]) -> list[Clip]:
        path = folder / f"{kind}.safetensors"
        if not path.is_file():
            print(f"preparing {kind} speech")
            save_clips(path, make())
        return load_clips(path)

    def synthesize() -> list[Clip]:
        return synthesize_clips(SentenceGenerator().sentences(sentences, seed), TRAIN, seed)

    def record() -> list[Clip]:
        clips = []
        for corpus in corpora:
            utterances = corpus.splits["train"]
            unlabelled = [u for u in utterances if u.text is None]
            clips += recorded_clips(utterances, transcribe(unlabelled, folder / f"readings-{corpus.name}.jsonl"), seed)
        return clips

    kinds = {"synthetic": cached("synthetic", synthesize)}
    if data:
        kinds["real"] = cached("real", record)
    for kind, clips in list(kinds.items()):
        share = CODED[kind]
        kinds[f"{kind}-coded"] = cached(f"{kind}-coded", lambda c=clips, s=share: coded_clips(snac, c, s, seed))  # type: ignore[misc]
    everything = ClipSampler([(SHARES[kind], clips) for kind, clips in kinds.items()])
    print(f"{everything.hours:.1f} hours of speech: " + ", ".join(f"{len(c)} {kind}" for kind, c in kinds.items()))
    return ClipSampler([(1.0, kinds["synthetic"])]), everything


@app.command()
def compare(
    data: Annotated[list[Path], typer.Option(help="Folder of speech. May be repeated.")],
    split: Annotated[list[str], typer.Option(help="Split to use. May be repeated.")] = ["dev", "test"],  # noqa: B006
    codec: Annotated[list[str], typer.Option(help="Name or folder of a codec. May be repeated.")] = ["tiny"],  # noqa: B006
    judge: Annotated[list[str], typer.Option(help="phones (phones_tiny) or words (Whisper).")] = ["phones"],  # noqa: B006
    whisper: Annotated[str, typer.Option(help="Whisper of the judge `words`: a folder or a name.")] = "base.en",
    weights: Annotated[Path | None, typer.Option(help="Weights for `phones`; default: the bundled ones.")] = None,
    most: Annotated[int, typer.Option(min=2, help="Largest number of utterances per split.")] = 64,
) -> None:
    """Print error rates of content judges in %: on speech, after a codec, and against the words of other utterances."""
    judges = {"phones": lambda: phone_judge(weights), "words": lambda: word_judge(whisper)}
    for name in judge:
        if name not in judges:
            raise UserError(f"unknown content judge {name!r}{nearest(name, judges)}")
    corpora = [open_corpus(path) for path in data]
    codecs = {name: SNAC.from_pretrained(name).freeze() for name in codec}
    print("| judge | codec | speech | against | original | bare | mismatched | range | over half wrong | s per s |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for reader in (judges[name]() for name in judge):
        for base, snac in codecs.items():
            for corpus, part in ((c, s) for c in corpora for s in split):
                found = measure(reader, corpus, part, snac, most=most)
                cells = [reader.name, base, f"{corpus.name}/{part} ({found.utterances})"]
                cells += ["text" if found.known else "own reading"]
                rates = (found.original, found.bare, found.mismatched, found.range)
                cells += [f"{100 * rate:.1f}" for rate in rates]
                print(f"| {' | '.join(cells)} | {found.above_half:.0%} | {found.real_time:.3f} |")


Units = tuple[str, ...]


@dataclass(frozen=True)
class Judge:
    """A recogniser with its units: `spell` a text, and `read` audio (1, T) at a sample rate, to phones or words."""

    name: str
    spell: Callable[[str], Units]
    read: Callable[[Tensor, int], Units]


@dataclass(frozen=True)
class Range:
    """Error rates, 0 to 1, means over utterances.

    Attributes:
        utterances: how many.
        known: whether references are texts; else they are the judge's own reading of the original.
        original: of the original; 0 if no text is known.
        bare: of the codec's output.
        mismatched: of the codec's output, against another utterance.
        above_half: share of utterances for which the codec's output has an error rate above 0.5.
        real_time: CPU seconds per second of speech.
    """

    utterances: int
    known: bool
    original: float
    bare: float
    mismatched: float
    above_half: float
    real_time: float

    @property
    def range(self) -> float:
        """How far the judge separates the right content from another one."""
        return self.mismatched - self.bare


def phone_judge(weights: Path | None = None) -> Judge:
    """phones_tiny."""
    return Judge("phones", phones_of, PhoneRecogniser(weights))


def word_judge(source: str) -> Judge:
    """Whisper, from a folder or by name."""
    whisper = Whisper(source, download=True)

    def words(text: str) -> Units:
        return tuple(whisper.words(text))

    return Judge(f"Whisper {Path(source).name}", words, lambda audio, _: words(whisper.read([audio[0]])[0]))


def measure(judge: Judge, corpus: Corpus, split: str, codec: SNAC | None, *, most: int = 64) -> Range:
    """Error rates of a judge on evenly selected utterances of a split; without a codec its output is the original.

    Raises:
        UserError: if the judge reads fewer than two different utterances.
    """
    utterances = corpus.splits.get(split, ())
    chosen = utterances[:: max(1, -(-len(utterances) // most))]
    references: list[Units] = []
    originals, outputs = [], []
    seconds = spent = 0.0
    for u in chosen:
        audio = load_audio(u, SAMPLE_RATE)
        started = process_time()
        original = judge.read(audio, SAMPLE_RATE)
        spent, seconds = spent + process_time() - started, seconds + audio.shape[-1] / SAMPLE_RATE
        reference = judge.spell(u.text) if u.text else original
        if reference:
            references.append(reference)
            originals.append(error_rate(reference, original))
            outputs.append(judge.read(_reconstruct(codec, audio), SAMPLE_RATE))
    if len(set(references)) < 2:
        raise UserError(f"{corpus.name}/{split}: {judge.name} does not read two different utterances")
    bare = [error_rate(reference, output) for reference, output in zip(references, outputs, strict=True)]
    other = [error_rate(_another(references, index), output) for index, output in enumerate(outputs)]
    return Range(
        utterances=len(references),
        known=all(u.text for u in chosen),
        original=fmean(originals),
        bare=fmean(bare),
        mismatched=fmean(other),
        above_half=fmean(rate > 0.5 for rate in bare),
        real_time=spent / seconds,
    )


def _another(references: Sequence[Units], index: int) -> Units:
    """The next reference that differs from the one at `index`."""
    return next(r for r in (*references[index + 1 :], *references[:index]) if r != references[index])


def _reconstruct(codec: SNAC | None, audio: Tensor) -> Tensor:
    """The codec's output (1, T) for audio (1, T), both at SAMPLE_RATE, with fixed noise."""
    if codec is None:
        return audio
    resampled = resample(audio, SAMPLE_RATE, codec.sampling_rate)[None]
    with torch.inference_mode(), codec.fixed_noise(0):
        output = codec(resampled)[0][0]
    return resample(output.clone(), codec.sampling_rate, SAMPLE_RATE)


if __name__ == "__main__":
    try:
        app()
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(2) from None
