"""Train `ecapa_tiny`, the bundled speaker encoder, and compare speaker encoders.

    python recipes/speaker_encoder.py train --data speech/ --out runs/ecapa_tiny
    python recipes/speaker_encoder.py compare --data speech/ --encoder ge2e --encoder ecapa_tiny

`train` classifies speakers with an additive angular margin (ArcFace, Deng et al. 2019, arXiv 1801.07698). The classes
are the train speakers of the data and synthetic speakers, each at three speeds. Crops are perturbed, and some of them
have passed a codec. The checkpoint with the lowest equal error rate on dev speakers is kept.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter, process_time
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import save
from torch import Tensor, nn

from perturb import mask_features, perturb
from snac_core.codec import SNAC
from snac_core.errors import UserError
from snac_core.files import write_bytes, write_json, write_text
from snac_core.seeding import derive, generator
from snac_core.speakers.ecapa import SAMPLE_RATE, SpeakerNetwork
from snac_core.speakers.encoder import SpeakerEncoder, load_speaker_encoder
from snac_runner.data.audio import load_audio, resample
from snac_runner.data.corpus import Corpus
from snac_runner.data.open_corpus import open_corpus
from snac_runner.data.synth import synthesize
from snac_runner.evaluate.verification import Embed, Part, Verification, after_codec, embed_parts, pair_scores, parts_of
from snac_runner.schedule import learning_rate

LR = 2e-3  # peak; linear warm-up over a twentieth of the steps, then a cosine to 0
WEIGHT_DECAY = 5e-2  # of matrices
GRAD_CLIP = 5.0
MARGIN = 0.2  # radians; rises linearly from 0 over the first 40 % of the steps
MARGIN_WARMUP = 0.4
SCALE = 30.0  # of the cosines in the softmax
SPEEDS = (0.88, 1.0, 1.14)  # each speed of a speaker is a class; speed changes pitch and formants
SYNTHETIC_SHARE = 0.25  # of the crops, if there is recorded speech too
PERTURBED_SHARE = 0.8  # of the crops
CODED_SHARE = 0.4  # of the crops: those of speech that has passed the codec
CLASS_SECONDS = 40.0  # of speech kept per class
CODED_SECONDS = 8.0  # of them passed through the codec, the slowest part of the preparation
CODEC_CHUNK = 2.0  # s; the codec processes a batch of chunks
LOG_EVERY = 100  # steps
VALIDATIONS = 8  # over the training

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
Codec = Annotated[str, typer.Option(help="Codec for coded speech: a name or folder; none: no coded speech.")]


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="New folder for model.safetensors, training.jsonl and result.json.")],
    data: Annotated[list[Path], typer.Option(help="Folder of speech; its train speakers are used. May be repeated.")],
    synthetic: Annotated[int, typer.Option(help="Number of synthetic speakers to add (8 to 80), or 0.")] = 80,
    codec: Codec = "tiny",
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 2200,
    batch_size: Annotated[int, typer.Option(min=2, help="Crops per step.")] = 64,
    min_seconds: Annotated[float, typer.Option(help="Shortest crops, in s.")] = 1.0,
    max_seconds: Annotated[float, typer.Option(help="Longest crops, in s; a batch has one length.")] = 2.5,
    seed: Annotated[int, typer.Option(help="Seed of all random numbers.")] = 0,
) -> None:
    """Train ecapa_tiny.

    The first folder with a dev split selects the checkpoint, by the mean equal error rate on recorded and coded speech.
    """
    if (out / "model.safetensors").exists():
        raise UserError(f"{out} holds a trained encoder; give another folder with --out")
    settings = {"steps": steps, "batch_size": batch_size, "min_seconds": min_seconds, "max_seconds": max_seconds}

    # speech
    started = perf_counter()
    corpora = [open_corpus(path) for path in data]
    if synthetic:
        corpora.append(open_corpus(synthesize(out / "synthetic", speakers=synthetic, sentences=12)))
    validated = next((corpus for corpus in corpora if corpus.splits.get("dev")), None)
    if validated is None:
        raise UserError("no corpus has a dev split, which selects the checkpoint by its equal error rate")
    shares = [1.0] * len(corpora)
    if synthetic and len(corpora) > 1:
        shares = [(1 - SYNTHETIC_SHARE) / (len(corpora) - 1)] * (len(corpora) - 1) + [SYNTHETIC_SHARE]
    snac = load_codec(codec)
    trials = [trials_of(validated, ("dev",), SAMPLE_RATE, codec=snac)]
    classes = load_classes(list(zip(corpora, shares, strict=True)), SAMPLE_RATE, codec=snac)
    preparing_seconds = perf_counter() - started

    # network, classifier and optimizer
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "encoder weights"))
        network = SpeakerNetwork()
    classifier = AngularMargin(network.dim, len(classes.names), scale=SCALE, generator=generator(seed, "centres"))
    parameters = [*network.parameters(), *classifier.parameters()]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
    )

    # training
    started = perf_counter()
    warmup = max(1, steps // 20)
    losses: list[float] = []
    accuracies: list[float] = []
    log: list[dict[str, float]] = []
    best: dict[str, Any] = {"eer": 2.0}
    for step in range(1, steps + 1):
        audio, label = training_batch(classes, batch_size, (min_seconds, max_seconds), seed, step - 1)
        network.train()
        with torch.autocast("cpu", torch.bfloat16):
            features = mask_features(network.features(audio), generator(seed, step - 1, "mask"))
            embedding = network.embed_features(features)
        margin = MARGIN * min(1.0, (step - 1) / max(1, MARGIN_WARMUP * steps))
        loss, accuracy = classifier(embedding.float(), label, margin)
        lr = learning_rate(step, LR, warmup_steps=warmup, decay_start=warmup + 1, decay_end=steps + 1)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, GRAD_CLIP)
        optimizer.step()

        losses.append(loss.item())
        accuracies.append(accuracy.item())
        if step % LOG_EVERY == 0 or step == steps:
            seconds = perf_counter() - started
            means = {"loss": sum(losses) / len(losses), "accuracy": sum(accuracies) / len(accuracies)}
            log.append({"step": step, **means, "lr": lr, "seconds": seconds})
            left = seconds / step * (steps - step) / 60
            print(" ".join(f"{key} {value:.4g}" for key, value in log[-1].items()) + f"; {left:.0f} min left")
            losses, accuracies = [], []
        if step % max(1, steps // VALIDATIONS) == 0 or step == steps:
            network.eval()
            found = measure(lambda audio, rate: nn.functional.normalize(network(audio[:, 0]), dim=-1), trials)
            eer = sum(verification.eer for verification in found.values()) / len(found)
            print(f"step {step}: " + "; ".join(f"{name}: {verification}" for name, verification in found.items()))
            if eer <= best["eer"]:
                best = {"eer": eer, "step": step, "trials": {name: asdict(v) for name, v in found.items()}}
                weights = save({k: v.clone() for k, v in network.state_dict().items()})
                write_bytes(out / "best.safetensors", weights)

    write_text(out / "training.jsonl", "".join(json.dumps(record) + "\n" for record in log))
    result = {
        "settings": {**settings, "seed": seed},
        "best": best,
        "data": {corpus.name: corpus.digest for corpus in corpora},
        "classes": len(classes.names),
        "speakers": sum(len(corpus.speakers("train")) for corpus in corpora),
        "codec": None if snac is None else {"name": codec, "digest": snac.digest},
        "seconds": {"preparing": preparing_seconds, "training": log[-1]["seconds"]},
    }
    write_json(out / "result.json", result)
    (out / "best.safetensors").replace(out / "model.safetensors")  # its name says that the training has finished
    print(f"the weights of step {best['step']} are in {out / 'model.safetensors'}")


class AngularMargin(nn.Module):
    """Softmax cross-entropy over cosines to one centre per class; a margin is added to the angle of the true class."""

    def __init__(self, dim: int, classes: int, *, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        self.scale = scale
        self.centres = nn.Parameter(torch.randn(classes, dim, generator=generator) / dim**0.5)

    def forward(self, embedding: Tensor, label: Tensor, margin: float) -> tuple[Tensor, Tensor]:
        """Loss and accuracy, scalars.

        Args:
            embedding: (B, S), of any norm.
            label: (B,) class of each item.
            margin: in radians.
        """
        cosine = nn.functional.normalize(embedding) @ nn.functional.normalize(self.centres).T
        own = cosine.gather(1, label[:, None]).clamp(-1 + 1e-6, 1 - 1e-6)
        # beyond pi - margin the cosine would increase again; there the cosine itself is lowered
        penalized = torch.where(own > -torch.cos(torch.tensor(margin)), (own.acos() + margin).cos(), own - margin**2)
        logits = self.scale * cosine.scatter(1, label[:, None], penalized)
        accuracy = (cosine.argmax(1) == label).float().mean()
        return nn.functional.cross_entropy(logits, label), accuracy


@dataclass
class SpeakerClasses:
    """Training speech by class. A class is one speaker at one speed.

    Attributes:
        sample_rate: in Hz.
        names: of the classes, "<corpus>/<speaker>@<speed>".
        recorded: for each class its utterances, int16 (T,).
        coded: the first utterances of each class after the codec; empty without a codec.
        share: probability of each class, adding up to 1.
    """

    sample_rate: int
    names: list[str] = field(default_factory=list)
    recorded: list[list[Tensor]] = field(default_factory=list)
    coded: list[list[Tensor]] = field(default_factory=list)
    share: list[float] = field(default_factory=list)

    def crops(self, batch_size: int, samples: int, seed: int, step: int) -> tuple[Tensor, Tensor]:
        """Crops (B, samples) of random classes and their labels (B,). They depend on (seed, step) only.

        Shorter utterances are repeated.
        """
        draw = generator(seed, step, "encoder crops")
        label = torch.multinomial(torch.tensor(self.share), batch_size, replacement=True, generator=draw)
        chances = torch.rand(batch_size, 3, generator=draw).tolist()
        crops = []
        for index, (which, where, how) in zip(label.tolist(), chances, strict=True):
            utterances = (self.coded if how < CODED_SHARE and self.coded else self.recorded)[index]
            wave = utterances[int(which * len(utterances))]
            if len(wave) < samples:
                wave = wave.repeat(-(-samples // len(wave)))
            start = int(where * (len(wave) - samples + 1))
            crops.append(wave[start : start + samples])
        return torch.stack(crops).float() / 32768, label


def training_batch(
    classes: SpeakerClasses, batch_size: int, seconds: tuple[float, float], seed: int, step: int
) -> tuple[Tensor, Tensor]:
    """Perturbed crops (B, T) and labels (B,) of a step; `seconds` are the shortest and the longest length in s."""
    draw = generator(seed, step, "disturbance")
    length = seconds[0] + (seconds[1] - seconds[0]) * torch.rand((), generator=draw).item()
    samples = round(length * 10) * classes.sample_rate // 10  # tenths of a second: fast sizes for the FFT
    audio, label = classes.crops(batch_size, samples, seed, step)
    unchanged = torch.rand(batch_size, 1, generator=draw) >= PERTURBED_SHARE
    return torch.where(unchanged, audio, perturb(audio, classes.sample_rate, draw)), label


def load_classes(
    corpora: Sequence[tuple[Corpus, float]],
    sample_rate: int,
    *,
    speeds: Sequence[float] = SPEEDS,
    codec: SNAC | None = None,
    seed: int = 0,
) -> SpeakerClasses:
    """Load the train speakers of every corpus.

    Args:
        corpora: each with its share of the crops, relative to the others.
        sample_rate: of the result, in Hz.
        speeds: factors of the speed.
        codec: frozen; None: no coded speech.
        seed: of the codec's noise.
    """
    classes = SpeakerClasses(sample_rate)
    total = sum(weight for _, weight in corpora)
    count = sum(len(corpus.speakers("train")) for corpus, _ in corpora) * len(speeds)
    for corpus, weight in corpora:
        speakers = corpus.speakers("train")
        for speaker in speakers:
            utterances = [load_audio(u, sample_rate)[0] for u in corpus.of_speaker(speaker)]
            for speed in speeds:
                waves = [resample(wave, round(sample_rate * speed), sample_rate) for wave in utterances]
                waves = _first_seconds(waves, CLASS_SECONDS * sample_rate)
                classes.names.append(f"{corpus.name}/{speaker}@{speed:g}")
                classes.recorded.append([_int16(wave) for wave in waves])
                classes.share.append(weight / total / len(speakers) / len(speeds))
                if codec is not None:
                    some = _first_seconds(waves, CODED_SECONDS * sample_rate)
                    some[0] = some[0][: int(CODED_SECONDS * sample_rate)]
                    with torch.random.fork_rng(devices=[]):
                        torch.manual_seed(derive(seed, classes.names[-1], "codec noise"))
                        classes.coded.append([_int16(_reconstruct(codec, wave, sample_rate)) for wave in some])
                if len(classes.names) % 100 == 0 or len(classes.names) == count:
                    print(f"speech: {len(classes.names)} of {count} classes")
    return classes


def _first_seconds(waves: list[Tensor], samples: float) -> list[Tensor]:
    """The first waves with at most `samples` in all, but at least one."""
    kept: list[Tensor] = []
    for wave in waves:
        if kept and sum(map(len, kept)) + len(wave) > samples:
            break
        kept.append(wave)
    return kept


def _reconstruct(codec: SNAC, wave: Tensor, sample_rate: int) -> Tensor:
    """The codec's reconstruction (T,) of a wave (T,), chunk by chunk, both at `sample_rate` Hz."""
    resampled = resample(wave, sample_rate, codec.sampling_rate)
    samples = int(CODEC_CHUNK * codec.sampling_rate)
    padded = nn.functional.pad(resampled, (0, -len(resampled) % samples))
    with torch.no_grad():
        coded: Tensor = codec(padded.view(-1, 1, samples))[0]
    return resample(coded.flatten()[: len(resampled)], codec.sampling_rate, sample_rate)


def _int16(wave: Tensor) -> Tensor:
    return (wave.clamp(-1, 1) * 32767).round().to(torch.int16)


def load_codec(name: str) -> SNAC | None:
    """A frozen codec by name or folder; None for "none"."""
    return None if name == "none" else SNAC.from_pretrained(name).freeze()


@app.command()
def compare(
    data: Annotated[list[Path], typer.Option(help="Folder of speech. May be repeated.")],
    encoder: Annotated[list[str], typer.Option(help="Name of a speaker encoder. May be repeated.")],
    split: Annotated[list[str], typer.Option(help="Split with the speakers to verify. May be repeated.")] = ["dev"],  # noqa: B006
    codec: Codec = "tiny",
) -> None:
    """Print size, speed and equal error rate of speaker encoders, on recorded and on coded speech.

    Speed is in seconds of speech per CPU second, on one thread.
    """
    snac = load_codec(codec)
    trials = [trials_of(open_corpus(path), tuple(split), 16000, codec=snac) for path in data]
    print("| encoder | dimension | parameters | × real time | trials | EER % | same | different | genuine | impostor |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name in encoder:
        network = load_speaker_encoder(name)
        size, speed = sum(p.numel() for p in network.parameters()), _speed(network, trials[0])
        for which, v in measure(network, trials).items():
            genuine, impostor = v.trials
            print(
                f"| {name} | {network.dim} | {size:,} | {speed:.0f} | {which} | {100 * v.eer:.1f} | {v.same:.3f} | "
                f"{v.different:.3f} | {genuine} | {impostor} |"
            )


@dataclass(frozen=True)
class Trials:
    """Parts of a corpus at `sample_rate` (Hz), and the same parts after a codec, if a codec was given."""

    name: str
    sample_rate: int
    parts: list[Part]
    coded: list[Part]


def trials_of(corpus: Corpus, splits: Sequence[str], sample_rate: int, *, codec: nn.Module | None = None) -> Trials:
    """The parts of the utterances of `splits`; all pairs of them are trials.

    Raises:
        UserError: if there are no parts.
    """
    parts = parts_of(corpus, splits, sample_rate)
    if not parts:
        raise UserError(f"{corpus.root} has no speech of 2 s or more in {' and '.join(splits)} to compare speakers by")
    return Trials(corpus.name, sample_rate, parts, after_codec(parts, codec, sample_rate) if codec else [])


def measure(embed: Embed, trials: Iterable[Trials]) -> dict[str, Verification]:
    """Verification results of an encoder by the name of the trials.

    With coded speech there are also "<name>, codec", between coded utterances, and "<name> x codec", between recorded
    and coded ones.
    """
    found = {}
    for t in trials:
        recorded = embed_parts(t.parts, embed, t.sample_rate)
        found[t.name] = Verification.of(*pair_scores(t.parts, recorded))
        if t.coded:
            coded = embed_parts(t.coded, embed, t.sample_rate)
            found[f"{t.name}, codec"] = Verification.of(*pair_scores(t.parts, coded))
            found[f"{t.name} x codec"] = Verification.of(*pair_scores(t.parts, recorded, coded))
    return found


def _speed(encoder: SpeakerEncoder, trials: Trials, *, items: int = 40) -> float:
    """Seconds of speech per CPU second on one thread, one part at a time."""
    waves = [part.audio.unsqueeze(0) for part in trials.parts[:items]]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            encoder(waves[0], trials.sample_rate)
            started = process_time()
            for wave in waves:
                encoder(wave, trials.sample_rate)
    finally:
        torch.set_num_threads(threads)
    return sum(wave.shape[-1] for wave in waves) / trials.sample_rate / (process_time() - started)


if __name__ == "__main__":
    try:
        app()
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(2) from None
