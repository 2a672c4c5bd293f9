"""Training a small speaker encoder of one's own, and measuring how well encoders tell speakers apart.

Additive angular margin softmax (Deng et al. 2019, arXiv 1801.07698), the loss of speaker classification.

The voices an encoder is trained on: every speaker at several speeds, as recorded and through a codec.

Training `ecapa_tiny`: classify speakers under an angular margin, while their speech is disturbed in many ways.

From folders of speech to a trained `ecapa_tiny` with its model card, and to a table of encoders.

`python recipes/speaker_encoder.py`: train `ecapa_tiny`, and measure how well encoders tell speakers apart."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter, process_time
from typing import TYPE_CHECKING, Annotated, Any, cast

import torch
import typer
from torch import Tensor, nn

from disturb import disturb, mask_features
from snac_core.errors import UserError
from snac_core.files import write_bytes, write_json, write_text
from snac_core.seeding import derive, generator
from snac_core.speakers.ecapa import SpeakerNetwork
from snac_runner.data.audio import load_audio, resample
from snac_runner.data.corpus import Corpus

if TYPE_CHECKING:
    from snac_core.speakers.encoder import SpeakerEncoder
    from snac_runner.evaluate.verification import Embed, Trials, Verification


class AngularMargin(nn.Module):
    """Cross-entropy over cosines to one centre per class, the own class's angle enlarged by a margin."""

    def __init__(self, dim: int, classes: int, *, scale: float = 30.0, generator: torch.Generator) -> None:
        super().__init__()
        self.scale = scale
        self.centres = nn.Parameter(torch.randn(classes, dim, generator=generator) / dim**0.5)

    def forward(self, embedding: Tensor, label: Tensor, margin: float) -> tuple[Tensor, Tensor]:
        """Loss, and share of items whose nearest centre is their own.

        Args:
            embedding: (B, S), any norm.
            label: (B,) class of each item.
            margin: in radians, added to the angle between an item and its own centre.
        """
        cosine = nn.functional.normalize(embedding) @ nn.functional.normalize(self.centres).T
        own = cosine.gather(1, label[:, None]).clamp(-1 + 1e-6, 1 - 1e-6)
        # Past pi - margin the cosine would rise again; there the angle is left and the cosine lowered instead.
        harder = torch.where(own > -torch.cos(torch.tensor(margin)), (own.acos() + margin).cos(), own - margin**2)
        logits = self.scale * cosine.scatter(1, label[:, None], harder)
        accuracy = (cosine.argmax(1) == label).float().mean()
        return nn.functional.cross_entropy(logits, label), accuracy


CHUNK = 2.0  # s; what goes through the codec is cut into pieces of this length, which makes a batch


@dataclass
class Voices:
    """Classes of the training, one per speaker and speed: played faster or slower a speaker is another one.

    Attributes:
        sample_rate: in Hz.
        names: of each class.
        clean: for each class its utterances, int16 (T,).
        coded: the same utterances through the codec; empty where none was given.
        share: how often each class is drawn, adding up to 1.
    """

    sample_rate: int
    names: list[str] = field(default_factory=list)
    clean: list[list[Tensor]] = field(default_factory=list)
    coded: list[list[Tensor]] = field(default_factory=list)
    share: list[float] = field(default_factory=list)

    def batch(self, size: int, samples: int, seed: int, step: int, *, coded: float = 0.4) -> tuple[Tensor, Tensor]:
        """Crops (B, samples) of random classes and their labels (B,): a pure function of (seed, step).

        Utterances shorter than the crop are repeated. A share `coded` of the items is heard through the codec.
        """
        draw = generator(seed, step, "encoder crops")
        label = torch.multinomial(torch.tensor(self.share), size, replacement=True, generator=draw)
        place = torch.rand(size, 3, generator=draw).tolist()
        crops = []
        for index, (which, where, how) in zip(label.tolist(), place, strict=True):
            source = self.coded if how < coded and self.coded else self.clean
            utterances = source[index]
            wave = utterances[int(which * len(utterances))]
            if len(wave) < samples:
                wave = wave.repeat(-(-samples // len(wave)))
            start = int(where * (len(wave) - samples + 1))
            crops.append(wave[start : start + samples])
        return torch.stack(crops).float() / 32768, label


def gather_voices(
    corpora: Sequence[tuple[Corpus, float]],
    sample_rate: int,
    *,
    speeds: Iterable[float] = (0.88, 1.0, 1.14),
    codec: nn.Module | None = None,
    codec_rate: int | None = None,
    most_seconds: float = 40.0,
    coded_seconds: float = 8.0,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Voices:
    """Load the train speakers of every corpus.

    Args:
        corpora: each with how often it is drawn, relative to the others.
        sample_rate: wanted, in Hz.
        speeds: factors of speed (and with it of pitch and formants).
        codec: a frozen codec that gives (audio_hat, codes) for audio (B, 1, T); None: no resynthesis.
        codec_rate: the codec's sample rate in Hz, where it has none itself.
        most_seconds: of speech kept per class, in s; what comes after is left out.
        coded_seconds: of each class that go through the codec, in s; it is the slowest part of this.
        seed: of the codec's noise.
        progress: called with (classes done, of how many).
    """
    voices = Voices(sample_rate)
    total = sum(weight for _, weight in corpora)
    speeds = tuple(speeds)
    todo = sum(len(corpus.speakers("train")) for corpus, _ in corpora) * len(speeds)
    for corpus, weight in corpora:
        speakers = corpus.speakers("train")
        for speaker in speakers:
            spoken = [load_audio(u, sample_rate)[0] for u in corpus.of_speaker(speaker)]
            for speed in speeds:
                waves = _within(
                    [resample(w, round(sample_rate * speed), sample_rate) for w in spoken], most_seconds * sample_rate
                )
                voices.names.append(f"{corpus.name}/{speaker}@{speed:g}")
                voices.clean.append([_int16(w) for w in waves])
                voices.share.append(weight / total / len(speakers) / len(speeds))
                if codec is not None:
                    rate = codec_rate or cast(int, codec.sampling_rate)
                    with torch.random.fork_rng(devices=[]):
                        torch.manual_seed(derive(seed, voices.names[-1], "codec noise"))
                        some = _within(waves, coded_seconds * sample_rate)
                        some[0] = some[0][: int(coded_seconds * sample_rate)]
                        voices.coded.append([_int16(_through(codec, w, sample_rate, rate)) for w in some])
                if progress is not None:
                    progress(len(voices.names), todo)
    return voices


def _within(waves: list[Tensor], samples: float) -> list[Tensor]:
    kept: list[Tensor] = []
    for wave in waves:
        if kept and sum(map(len, kept)) + len(wave) > samples:
            break
        kept.append(wave)
    return kept


def _through(codec: nn.Module, wave: Tensor, sample_rate: int, codec_rate: int) -> Tensor:
    """A wave (T,) at `sample_rate` after the codec, in pieces of `CHUNK` seconds, (T',)."""
    resampled = resample(wave, sample_rate, codec_rate)
    samples = int(CHUNK * codec_rate)
    padded = nn.functional.pad(resampled, (0, -len(resampled) % samples))
    with torch.no_grad():
        coded: Tensor = codec(padded.view(-1, 1, samples))[0]
    return resample(coded.flatten()[: len(resampled)], codec_rate, sample_rate)


def _int16(wave: Tensor) -> Tensor:
    return (wave.clamp(-1, 1) * 32767).round().to(torch.int16)


@dataclass(frozen=True)
class Settings:
    """How the encoder is trained.

    Attributes:
        steps: of the optimizer.
        batch: crops a step.
        shortest, longest: of the crops, in s; each batch has one length.
        lr: peak learning rate, reached after a twentieth of the steps; a cosine leads to zero.
        weight_decay: of AdamW, on matrices only.
        margin: in radians, reached after `ramp` of the steps, from 0.
        scale: of the cosines in the softmax.
        disturbed: share of the batches' items that are disturbed; all are masked.
        seed: of everything random.
    """

    steps: int = 2200
    batch: int = 64
    shortest: float = 1.0
    longest: float = 2.5
    lr: float = 2e-3
    weight_decay: float = 5e-2
    margin: float = 0.2
    ramp: float = 0.4
    scale: float = 30.0
    disturbed: float = 0.8
    seed: int = 0


def train_speaker_encoder(
    voices: Voices,
    settings: Settings,
    *,
    report: Callable[[dict[str, float]], None] | None = None,
    every: int = 100,
    checkpoint: Callable[[int, SpeakerNetwork], None] | None = None,
    checkpoint_every: int = 500,
) -> SpeakerNetwork:
    """Train a network from nothing.

    Args:
        voices: the classes to tell apart.
        settings: how.
        report: called every `every` steps with step, loss, accuracy, lr and seconds.
        checkpoint: called with the step and the network, in eval mode, every `checkpoint_every` steps and at the end.

    Returns:
        The network in eval mode.
    """
    s = settings
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(s.seed, "encoder weights"))
        network = SpeakerNetwork()
    head = AngularMargin(network.dim, len(voices.names), scale=s.scale, generator=generator(s.seed, "centres"))
    parameters = [*network.parameters(), *head.parameters()]
    matrices = [p for p in parameters if p.ndim > 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": s.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=s.lr,
    )
    begun = perf_counter()
    losses: list[float] = []
    accuracies: list[float] = []
    network.train()
    for step in range(s.steps):
        for group in optimizer.param_groups:
            group["lr"] = s.lr * _schedule(step, s.steps)
        audio, label = crops(voices, s, step)
        draw = generator(s.seed, step, "mask")
        with torch.autocast("cpu", torch.bfloat16):
            embedding = network.embed_features(mask_features(network.features(audio), draw))
        loss, accuracy = head(embedding.float(), label, s.margin * min(1.0, step / max(1, s.ramp * s.steps)))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()
        losses.append(loss.item())
        accuracies.append(accuracy.item())
        done = step + 1
        if report is not None and done % every == 0:
            report(
                {
                    "step": done,
                    "loss": sum(losses) / len(losses),
                    "accuracy": sum(accuracies) / len(accuracies),
                    "lr": optimizer.param_groups[0]["lr"],
                    "seconds": perf_counter() - begun,
                }
            )
            losses, accuracies = [], []
        if checkpoint is not None and (done % checkpoint_every == 0 or done == s.steps):
            network.eval()
            checkpoint(done, network)
            network.train()
    return network.eval()


def crops(voices: Voices, settings: Settings, step: int) -> tuple[Tensor, Tensor]:
    """The batch of a step: disturbed crops (B, T) and labels (B,), a pure function of (seed, step)."""
    s = settings
    draw = generator(s.seed, step, "disturbance")
    seconds = s.shortest + (s.longest - s.shortest) * torch.rand((), generator=draw).item()
    samples = round(seconds * 10) * voices.sample_rate // 10  # whole tenths: sizes that Fourier transforms are quick at
    audio, label = voices.batch(s.batch, samples, s.seed, step)
    untouched = torch.rand(s.batch, 1, generator=draw) >= s.disturbed
    return torch.where(untouched, audio, disturb(audio, voices.sample_rate, draw)), label


def _schedule(step: int, steps: int) -> float:
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


Say = Callable[[str], None]
SYNTHETIC_SHARE = 0.25  # of the crops, where there is recorded speech too


def train_and_save(
    out: str | Path,
    data: Iterable[str | Path],
    settings: Settings,
    *,
    synthetic: int = 80,
    codec: str | None = "tiny",
    say: Say = print,
) -> Path:
    """Train on the train speakers of `data` and of synthetic ones; keep the checkpoint of the lowest dev EER.

    Args:
        out: folder for model.safetensors, training.jsonl and result.json; must not hold a model.
        data: folders of speech; the first one with a dev split chooses the checkpoint.
        settings: of the training.
        synthetic: espeak-ng speakers to add, held-out ones included (those are only measured on); 0: none.
        codec: name or folder of the codec whose output the encoder shall know; None: none.
        say: called with lines of progress.

    Raises:
        UserError: if `out` holds a model, there is no train speech, or no dev split to choose by.
    """
    from safetensors.torch import save

    from snac_core.speakers.ecapa import SAMPLE_RATE
    from snac_runner.data.open_corpus import open_corpus
    from snac_runner.data.synth import synthesize
    from snac_runner.evaluate.verification import trials_of

    out = Path(out)
    if (out / "model.safetensors").exists():
        raise UserError(f"{out} holds a trained encoder; give another folder with --out")
    corpora = [open_corpus(path) for path in data]
    if synthetic:
        corpora.append(open_corpus(synthesize(out / "synthetic", speakers=synthetic, sentences=12)))
    if not corpora:
        raise UserError("no speech to train on; give --data DIR, or --synthetic N")
    measured = [corpus for corpus in corpora if corpus.splits.get("dev")]
    if not measured:
        raise UserError("no corpus has a dev split; the checkpoint is chosen by its equal error rate on dev")
    frozen = _codec(codec)
    begun = perf_counter()
    trials = [trials_of(measured[0], ("dev",), SAMPLE_RATE, codec=frozen)]
    shares = [1.0] * len(corpora)
    if synthetic and len(corpora) > 1:
        shares = [(1 - SYNTHETIC_SHARE) / (len(corpora) - 1)] * (len(corpora) - 1) + [SYNTHETIC_SHARE]
    voices = gather_voices(
        list(zip(corpora, shares, strict=True)),
        SAMPLE_RATE,
        codec=frozen,
        progress=lambda done, of: say(f"speech: {done} of {of} classes") if done % 100 == 0 or done == of else None,
    )
    prepared = perf_counter() - begun
    log: list[dict[str, float]] = []
    best: dict[str, Any] = {"eer": 2.0}

    def report(line: dict[str, float]) -> None:
        log.append(line)
        left = line["seconds"] / line["step"] * (settings.steps - line["step"])
        say(" ".join(f"{key} {value:.4g}" for key, value in line.items()) + f"; {left / 60:.0f} min left")

    def checkpoint(step: int, network: nn.Module) -> None:
        from torch.nn.functional import normalize

        found = measure(lambda audio, rate: normalize(network(audio[:, 0]), dim=-1), trials)
        eer = sum(v.eer for v in found.values()) / len(found)  # as recorded, and against the codec's output
        say(f"step {step}: " + "; ".join(f"{name}: {v}" for name, v in found.items()))
        if eer <= best["eer"]:
            best.update(eer=eer, step=step, trials={name: vars(v) for name, v in found.items()})
            write_bytes(out / "model.safetensors", save({k: v.clone() for k, v in network.state_dict().items()}))

    train_speaker_encoder(
        voices, settings, report=report, checkpoint=checkpoint, checkpoint_every=max(1, settings.steps // 8)
    )
    write_text(out / "training.jsonl", "".join(json.dumps(line) + "\n" for line in log))
    result = {
        "settings": vars(settings),
        "best": best,
        "data": {corpus.name: corpus.digest for corpus in corpora},
        "classes": len(voices.names),
        "speakers": sum(len(corpus.speakers("train")) for corpus in corpora),
        "codec": None if frozen is None else {"name": codec, "digest": frozen.digest},
        "seconds": {"preparing": prepared, "training": log[-1]["seconds"] if log else None},
    }
    write_json(out / "result.json", result)
    say(f"the weights of step {best['step']} are in {out / 'model.safetensors'}")
    return out / "model.safetensors"


def measure(embed: Embed, trials: Iterable[Trials]) -> dict[str, Verification]:
    """Verification between parts of each corpus, by the corpus's name.

    Where there are parts after a codec also between those ("<name>, codec"), and between speech as recorded and the
    codec's output ("<name> x codec").
    """
    from snac_runner.evaluate.verification import embed_parts, verify

    found = {}
    for t in trials:
        recorded = embed_parts(t.parts, embed, t.sample_rate)
        found[t.name] = verify(t.parts, recorded)
        if t.coded:
            coded = embed_parts(t.coded, embed, t.sample_rate)
            found[f"{t.name}, codec"] = verify(t.parts, coded)
            found[f"{t.name} x codec"] = verify(t.parts, recorded, coded)
    return found


def compare_encoders(
    names: Iterable[str],
    data: Iterable[str | Path],
    *,
    splits: Iterable[str] = ("dev",),
    codec: str | None = "tiny",
    say: Say = print,
) -> list[dict[str, Any]]:
    """A row per encoder and kind of trial: size, speed, equal error rate, cosines; printed as a Markdown table.

    Speed is in seconds of speech per CPU second, on one thread.

    Args:
        names: of speaker encoders.
        data: folders of speech.
        splits: whose speakers are told apart.
        codec: name or folder of the codec whose output is measured too; None: none.
        say: called with lines.
    """
    from snac_core.speakers.encoder import load_speaker_encoder
    from snac_runner.data.open_corpus import open_corpus
    from snac_runner.evaluate.verification import trials_of

    frozen = _codec(codec)
    sets = [trials_of(open_corpus(path), tuple(splits), 16000, codec=frozen) for path in data]
    rows = []
    say("| encoder | dimension | parameters | × real time | trials | EER % | same | different | genuine | impostor |")
    say("|---|---|---|---|---|---|---|---|---|---|")
    for name in names:
        encoder = load_speaker_encoder(name)
        size, speed = sum(p.numel() for p in encoder.parameters()), _speed(encoder, sets[0]) if sets else 0.0
        for which, v in measure(encoder, sets).items():
            about = {"dim": encoder.dim, "parameters": size, "speed": speed}
            rows.append({"encoder": name, "digest": encoder.digest, **about, "on": which, **vars(v)})
            genuine, impostor = v.trials
            say(
                f"| {name} | {encoder.dim} | {size:,} | {speed:.0f} | {which} | {100 * v.eer:.1f} | {v.same:.3f} | "
                f"{v.different:.3f} | {genuine} | {impostor} |"
            )
    return rows


def _speed(encoder: SpeakerEncoder, trials: Trials, *, items: int = 40) -> float:
    """Seconds of speech embedded per CPU second on one thread, each part by itself."""
    import torch

    waves = [part.audio.unsqueeze(0) for part in trials.parts[:items]]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            encoder(waves[0], trials.sample_rate)
            begun = process_time()
            for wave in waves:
                encoder(wave, trials.sample_rate)
    finally:
        torch.set_num_threads(threads)
    return sum(wave.shape[-1] for wave in waves) / trials.sample_rate / (process_time() - begun)


def _codec(name: str | None) -> nn.Module | None:
    if name is None:
        return None
    from snac_core.codec import SNAC

    return SNAC.from_pretrained(name).freeze()


app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

Codec = Annotated[str, typer.Option(help="Codec whose output is heard too: a name or folder; 'none' for none.")]


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="New folder for model.safetensors, training.jsonl and result.json.")],
    data: Annotated[list[Path], typer.Option(help="Folder of speech; its train speakers are used. May be repeated.")],
    synthetic: Annotated[int, typer.Option(help="Synthetic speakers to add (8 to 80), or 0.")] = 80,
    codec: Codec = "tiny",
    steps: Annotated[int, typer.Option(min=1, help="Steps of the optimizer.")] = 2200,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
) -> None:
    """Train ecapa_tiny; the checkpoint of the lowest equal error rate on dev is kept.

    Example: python recipes/speaker_encoder.py train --data speech/ --out runs/ecapa_tiny
    """

    train_and_save(out, data, Settings(steps=steps, seed=seed), synthetic=synthetic, codec=_given(codec))


@app.command()
def compare(
    data: Annotated[list[Path], typer.Option(help="Folder of speech. May be repeated.")],
    encoder: Annotated[list[str], typer.Option(help="Name of a speaker encoder. May be repeated.")],
    split: Annotated[list[str], typer.Option(help="Whose speakers are told apart. May be repeated.")] = ["dev"],  # noqa: B006
    codec: Codec = "tiny",
) -> None:
    """Print size, speed and equal error rate of encoders on speech, and on the same speech after a codec.

    Example: python recipes/speaker_encoder.py compare --data speech/ --encoder ge2e --encoder ecapa_tiny
    """

    compare_encoders(encoder, data, splits=split, codec=_given(codec))


def _given(codec: str) -> str | None:
    return None if codec == "none" else codec


if __name__ == "__main__":
    from snac_core.errors import UserError

    try:
        app()
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(2) from None
