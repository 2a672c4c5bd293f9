"""Training the phone recogniser: connectionist temporal classification (Graves et al. 2006) of disturbed speech.

What a content judge can tell apart: its errors on speech, on a codec's output of it, and on other words.

From folders of speech to a trained phone recogniser, and to a table of what content judges can tell apart.

`python recipes/phone_recogniser.py`: train the phone recogniser, and measure what content judges can tell apart."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from time import perf_counter, process_time
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from disturb import disturb, mask_features
from phone_data import UNKNOWN, Material
from snac_core.codec import SNAC
from snac_core.errors import UserError
from snac_core.files import write_bytes, write_json, write_text, writing
from snac_core.seeding import derive, generator
from snac_runner.data.audio import load_audio, resample
from snac_runner.data.corpus import Corpus
from snac_runner.evaluate.content import RATE, Recogniser, error_rate
from snac_runner.evaluate.phone_recogniser import BLANK, SAMPLE_RATE, PhoneNetwork, PhoneRecogniser, phones_of


@dataclass(frozen=True)
class Settings:
    """How the recogniser is trained.

    Attributes:
        steps: of the optimizer.
        seconds: of speech a step, in s.
        lr: peak learning rate, reached after `warm` steps and left again for zero in the last 0.3 of the steps.
        warm: steps with a rising learning rate.
        alone: steps on the first kind of material only: clean speech teaches what a phone is, the rest comes after.
        framewise: weight of the cross entropy of frames, where espeak-ng says when it speaks which phone: an alignment
            that CTC would take many steps to find.
        weight_decay: of AdamW, on matrices only.
        disturbed: share of the items that are disturbed; all are warped and masked.
        warp: largest change of the mel axis, up or down: vocal tracts of other lengths (Jaitly and Hinton 2013).
        seed: of everything random.
    """

    steps: int = 2000
    seconds: float = 64.0
    lr: float = 1.5e-3
    warm: int = 60
    alone: int = 300
    framewise: float = 0.5
    weight_decay: float = 1e-2
    disturbed: float = 0.6
    warp: float = 0.12
    seed: int = 0


def train_phones(
    first_kind: Material,
    material: Material,
    settings: Settings,
    *,
    state: Path | None = None,
    report: Callable[[dict[str, float]], None] | None = None,
    every: int = 50,
    checkpoint: Callable[[int, PhoneNetwork], None] | None = None,
    checkpoint_every: int = 400,
) -> PhoneNetwork:
    """Train a network from nothing, or go on from `state`.

    Args:
        first_kind: what to learn in the first `settings.alone` steps.
        material: what to learn in all others.
        settings: how.
        state: file of weights and optimizer, written at every report, read when it is there: training goes on exactly.
        report: called every `every` steps with step, loss, lr and seconds.
        checkpoint: called with the step and the network, in eval mode, every `checkpoint_every` steps and at the end.

    Returns:
        The network in eval mode.

    Raises:
        UserError: if `state` was made with other settings.
    """
    s = settings
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(s.seed, "phone weights"))
        network = PhoneNetwork()
    parameters = list(network.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": s.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=s.lr,
        betas=(0.9, 0.98),
    )
    first, losses, seconds = _resume(state, network, optimizer, s)
    network.train()
    for step in range(first, s.steps):
        begun = perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = s.lr * _schedule(step, s)
        loss = _loss(network, first_kind if step < s.alone else material, s, step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 2.0)
        optimizer.step()
        losses.append(loss.item())
        seconds += perf_counter() - begun
        done = step + 1
        if done % every == 0:
            line = {"step": done, "loss": sum(losses) / len(losses), "lr": s.lr * _schedule(step, s)}
            losses = []
            if report is not None:
                report(line | {"seconds": seconds})
            if state is not None:
                _keep(state, network, optimizer, s, done, seconds)
        if checkpoint is not None and (done % checkpoint_every == 0 or done == s.steps):
            network.eval()
            checkpoint(done, network)
            network.train()
    return network.eval()


def _loss(network: PhoneNetwork, material: Material, s: Settings, step: int) -> Tensor:
    """CTC loss per phone on the batch of a step; a function of the weights and (seed, step)."""
    batch = material.batch(s.seconds, s.seed, step)
    draw = generator(s.seed, step, "phone disturbance")
    untouched = torch.rand(len(batch.audio), 1, generator=draw) >= s.disturbed
    audio = torch.where(untouched, batch.audio, disturb(batch.audio, SAMPLE_RATE, draw))
    features = warp_bands(network.features(audio), s.warp, draw)
    for _ in range(2):
        features = mask_features(features, draw, bands=12, frames=15)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(s.seed, step, "phone dropout"))
        with torch.autocast("cpu", torch.bfloat16):
            logits = network.read(features)
    log_probabilities = logits.float().log_softmax(-1)
    length = torch.full((len(audio),), logits.shape[1])
    ctc = nn.functional.ctc_loss(
        log_probabilities.transpose(0, 1), batch.phones, length, batch.counts, blank=BLANK,
        reduction="none", zero_infinity=True,
    )  # fmt: skip
    loss = ctc.sum() / batch.counts.sum()
    if (batch.frames != UNKNOWN).any():
        loss = loss + s.framewise * nn.functional.nll_loss(log_probabilities.transpose(1, 2), batch.frames)
    return loss


def warp_bands(features: Tensor, most: float, draw: torch.Generator) -> Tensor:
    """Stretch or squeeze the mel axis of each item (B, M, F) by a factor in 1 - most .. 1 + most."""
    items, bands, frames = features.shape
    factor = 1 + most * (2 * torch.rand(items, 1, generator=draw) - 1)
    place = (torch.arange(bands) * factor).clamp(max=bands - 1)
    below = place.floor().long().clamp(max=bands - 2)
    part = (place - below).unsqueeze(-1)
    low, high = (features.gather(1, i.unsqueeze(-1).expand(-1, -1, frames)) for i in (below, below + 1))
    return low + part * (high - low)


def _schedule(step: int, s: Settings) -> float:
    """Up, level, and down along a cosine: how long it stays level can be decided while it is."""
    if step < s.warm:
        return (step + 1) / s.warm
    left = (s.steps - step) / (0.3 * s.steps)
    return 1.0 if left >= 1 else 0.5 * (1 - math.cos(math.pi * left))


def _keep(
    path: Path, network: PhoneNetwork, optimizer: torch.optim.Optimizer, s: Settings, step: int, seconds: float
) -> None:
    with writing(path) as working:
        torch.save(
            {
                "settings": asdict(s),
                "step": step,
                "seconds": seconds,
                "network": network.state_dict(),
                "optimizer": optimizer.state_dict(),
            },
            working,
        )


def _resume(
    path: Path | None, network: PhoneNetwork, optimizer: torch.optim.Optimizer, s: Settings
) -> tuple[int, list[float], float]:
    """First step to do, losses since the last report (none), seconds spent."""
    if path is None or not path.is_file():
        return 0, [], 0.0
    kept: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    same = asdict(s) | {"steps": kept["settings"]["steps"]}  # more or fewer steps in all are no other training
    if kept["settings"] != same:
        raise UserError(f"{path} was made with {kept['settings']}; the settings are now {asdict(s)}; give a new folder")
    network.load_state_dict(kept["network"])
    optimizer.load_state_dict(kept["optimizer"])
    return kept["step"], [], kept["seconds"]


Units = tuple[str, ...]


@dataclass(frozen=True)
class Judge:
    """Something that reads: from a text, and from audio (1, T) at a rate, to phones or words."""

    name: str
    spell: Callable[[str], Units]
    read: Callable[[Tensor, int], Units]


@dataclass(frozen=True)
class Range:
    """Mean error rates per utterance, 0 to 1.

    Attributes:
        utterances: how many.
        known: whether errors are against texts; else against the judge's own reading of the original.
        original: of the speech itself; 0 where no text is known.
        bare: of the codec's output.
        mismatched: of the codec's output against what another utterance says.
        above_half: share of utterances of which the codec's output has more than half wrong.
        real_time: CPU seconds per second of speech that reading takes.
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
        return self.mismatched - self.bare


def phone_judge(weights: str | None = None) -> Judge:
    """The recogniser of this project."""
    return Judge("phones", phones_of, PhoneRecogniser(weights))


def word_judge() -> Judge:
    """pocketsphinx, by its words."""
    recognise = Recogniser()

    def words(text: str) -> Units:
        return tuple(re.findall(r"[a-z']+", text.lower()))

    return Judge("pocketsphinx, words", words, lambda audio, rate: words(recognise(audio, rate)))


def spelt_judge() -> Judge:
    """pocketsphinx, by the phones of its words: the same units as ours."""
    recognise = Recogniser()

    def read(audio: Tensor, rate: int) -> Units:
        words = recognise(audio, rate)
        return phones_of(words) if words else ()

    return Judge("pocketsphinx, phones", phones_of, read)


def measure(judge: Judge, corpus: Corpus, split: str, codec: SNAC | None, *, most: int = 64) -> Range:
    """The errors of a judge on the utterances of a split, evenly chosen, and its range on a codec's output of them.

    Without a codec the speech itself stands for its output.

    Raises:
        UserError: if the split has fewer than two utterances that the judge reads anything in.
    """
    utterances = corpus.splits.get(split, ())
    chosen = utterances[:: max(1, -(-len(utterances) // most))]
    said: list[Units] = []
    originals, heard = [], []
    seconds = spent = 0.0
    for u in chosen:
        audio = load_audio(u, RATE)
        begun = process_time()
        original = judge.read(audio, RATE)
        spent, seconds = spent + process_time() - begun, seconds + audio.shape[-1] / RATE
        truth = judge.spell(u.text) if u.text else original
        if truth:
            said.append(truth)
            originals.append(error_rate(truth, original))
            heard.append(judge.read(_bare(codec, audio), RATE))
    if len(set(said)) < 2:
        raise UserError(f"{corpus.name} has no two utterances in {split} that the judge {judge.name} can tell apart")
    bare = [error_rate(truth, h) for truth, h in zip(said, heard, strict=True)]
    other = [error_rate(_another(said, index), h) for index, h in enumerate(heard)]
    return Range(
        len(said),
        all(u.text for u in chosen),
        fmean(originals),
        fmean(bare),
        fmean(other),
        fmean(rate > 0.5 for rate in bare),
        spent / seconds,
    )


def _another(said: Sequence[Units], index: int) -> Units:
    """What the next utterance says that says something else."""
    return next(t for t in (*said[index + 1 :], *said[:index]) if t != said[index])


def _bare(codec: SNAC | None, audio: Tensor) -> Tensor:
    """The codec's output (1, T) of audio (1, T), both at RATE, its noise fixed."""
    if codec is None:
        return audio
    given = resample(audio, RATE, codec.sampling_rate)[None]
    with torch.inference_mode(), codec.fixed_noise(0):
        coded = codec(given)[0][0]
    return resample(coded.clone(), codec.sampling_rate, RATE)


Say = Callable[[str], None]
JUDGES = ("phones", "words", "spelt")

SENTENCES = 4896  # 72 for each of the voices that may be trained on
SHARES = {"synthetic": 0.25, "synthetic-coded": 0.2, "real": 0.3, "real-coded": 0.25}  # of what is heard
CODED = {"synthetic": 0.14, "real": 0.33}  # share of the pieces that go through the codec, which takes longest


def train_recogniser(
    out: str | Path, data: Iterable[str | Path], settings: Settings, *, codec: str = "tiny", say: Say = print
) -> Path:
    """Train on synthetic sentences and on the train speakers of `data`, as recorded and as a codec gives them back.

    What is made on the way stays in `out`: called again after a stop, this goes on where it was.

    Args:
        out: folder for model.safetensors, training.jsonl, result.json and the material.
        data: folders of speech; where no text is known, pocketsphinx reads it.
        settings: of the training.
        codec: name or folder of the codec whose output the recogniser shall know.
        say: called with lines of progress.

    Raises:
        UserError: if `out` holds a finished model, or pocketsphinx is not installed.
    """
    from safetensors.torch import save

    out = Path(out)
    if (out / "model.safetensors").exists():
        raise UserError(f"{out} holds a trained recogniser; give another folder with --out")
    first, everything = gather(out, data, codec, seed=settings.seed, say=say)
    log = out / "training.jsonl"

    def report(line: dict[str, float]) -> None:
        left = line["seconds"] / line["step"] * (settings.steps - line["step"])
        say(" ".join(f"{key} {value:.4g}" for key, value in line.items()) + f"; {left / 60:.0f} min left")
        before = (
            [e for e in map(json.loads, log.read_text().splitlines()) if e["step"] < line["step"]]
            if log.is_file()
            else []
        )
        write_text(log, "".join(json.dumps(entry) + "\n" for entry in (*before, line)))

    network = train_phones(first, everything, settings, state=out / "state.pt", report=report)
    write_json(out / "result.json", {"settings": vars(settings), "hours": everything.hours, "codec": codec})
    halved = {k: v.half() if v.is_floating_point() else v for k, v in network.state_dict().items()}
    write_bytes(out / "model.safetensors", save(halved))
    say(f"the weights are in {out / 'model.safetensors'}")
    return out / "model.safetensors"


def gather(
    out: Path, data: Iterable[str | Path], codec: str, *, seed: int = 0, sentences: int = SENTENCES, say: Say = print
) -> tuple[Material, Material]:
    """Clean synthetic speech, and everything; what `out`/material holds already is not made again."""
    from phone_data import Material, Piece, Writer, cut_all, read_all, restore, say_all, store, through_codec
    from snac_core.codec import SNAC
    from snac_runner.data.open_corpus import open_corpus
    from snac_runner.data.synth import TRAIN

    folder = out / "material"
    kinds: dict[str, list[Piece]] = {}

    def made(kind: str, make: Callable[[], list[Piece]]) -> None:
        place = folder / f"{kind}.safetensors"
        if not place.is_file():
            say(f"making {kind} speech")
            store(place, make())
        kinds[kind] = restore(place)

    def real() -> list[Piece]:
        pieces = []
        for corpus in map(open_corpus, data):
            utterances = corpus.splits["train"]
            untold = [u for u in utterances if u.text is None]
            readings = read_all(untold, folder / f"readings-{corpus.name}.jsonl", progress=_counted(say, "read"))
            pieces += cut_all(utterances, readings, seed)
        return pieces

    data = list(data)
    made("synthetic", lambda: say_all(Writer().write(sentences, seed), TRAIN, seed))
    if data:
        made("real", real)
    frozen = SNAC.from_pretrained(codec).freeze()
    for kind in tuple(kinds):
        made(f"{kind}-coded", lambda kind=kind: through_codec(frozen, kinds[kind], CODED[kind], seed))  # type: ignore[misc]
    everything = Material([(SHARES[kind], pieces) for kind, pieces in kinds.items()])
    say(f"{everything.hours:.1f} hours of speech: " + ", ".join(f"{len(p)} {kind}" for kind, p in kinds.items()))
    return Material([(1.0, kinds["synthetic"])]), everything


def _counted(say: Say, what: str) -> Callable[[int, int], None]:
    return lambda done, of: say(f"{what}: {done} of {of}") if done % 10 == 0 or done == of else None


def compare_recognisers(
    data: Iterable[str | Path],
    *,
    splits: Iterable[str] = ("dev", "test"),
    codecs: Iterable[str] = ("tiny",),
    judges: Sequence[str] = ("phones",),
    weights: str | None = None,
    most: int = 64,
    say: Say = print,
) -> list[dict[str, Any]]:
    """A row per judge, codec and split, printed as a Markdown table; error rates in %.

    Args:
        data: folders of speech.
        splits: whose speakers are heard.
        codecs: names or folders.
        judges: "phones" (ours), "words" (pocketsphinx), "spelt" (phones of pocketsphinx's words).
        weights: of our recogniser, instead of the bundled ones.
        most: utterances of each split.
        say: called with lines.

    Raises:
        UserError: for a judge or codec that is not known, or too little speech.
    """
    from snac_core.codec import SNAC
    from snac_core.errors import nearest
    from snac_runner.data.open_corpus import open_corpus

    made = {"phones": lambda: phone_judge(weights), "words": word_judge, "spelt": spelt_judge}
    for name in judges:
        if name not in made:
            raise UserError(f"unknown content judge {name!r}{nearest(name, made)}")
    corpora = [open_corpus(path) for path in data]
    bases = {name: SNAC.from_pretrained(name).freeze() for name in codecs}
    say("| judge | codec | speech | against | original | bare | mismatched | range | over half wrong | s per s |")
    say("|---|---|---|---|---|---|---|---|---|---|")
    rows: list[dict[str, Any]] = []
    for judge in (made[name]() for name in judges):
        for base, codec in bases.items():
            for corpus, split in ((c, s) for c in corpora for s in splits):
                found = measure(judge, corpus, split, codec, most=most)
                where = f"{corpus.name}/{split}"
                rows.append({"judge": judge.name, "codec": base, "data": where, **vars(found), "range": found.range})
                rates = (found.original, found.bare, found.mismatched, found.range)
                cells = [judge.name, base, f"{where} ({found.utterances})", "text" if found.known else "own reading"]
                cells += [f"{100 * rate:.1f}" for rate in rates]
                say(f"| {' | '.join(cells)} | {found.above_half:.0%} | {found.real_time:.3f} |")
    return rows


app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Folder for model.safetensors and all that is made on the way.")],
    data: Annotated[
        list[Path], typer.Option(help="Folder of speech; its train speakers are used. May be repeated.")
    ] = [],  # noqa: B006
    codec: Annotated[str, typer.Option(help="Codec whose output is heard too: a name or folder.")] = "tiny",
    steps: Annotated[int, typer.Option(min=1, help="Steps of the optimizer.")] = 2000,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
) -> None:
    """Train the recogniser; called again after a stop it goes on.

    Example: python recipes/phone_recogniser.py train --data speech/ --out runs/phones_tiny
    """

    train_recogniser(out, data, Settings(steps=steps, seed=seed), codec=codec)


@app.command()
def compare(
    data: Annotated[list[Path], typer.Option(help="Folder of speech. May be repeated.")],
    split: Annotated[list[str], typer.Option(help="Whose speakers are heard. May be repeated.")] = ["dev", "test"],  # noqa: B006
    codec: Annotated[list[str], typer.Option(help="Name or folder of a codec. May be repeated.")] = ["tiny"],  # noqa: B006
    judge: Annotated[list[str], typer.Option(help="phones, words or spelt. May be repeated.")] = ["phones"],  # noqa: B006
    weights: Annotated[Path | None, typer.Option(help="Weights of the recogniser instead of the bundled ones.")] = None,
    most: Annotated[int, typer.Option(min=2, help="Utterances of each split.")] = 64,
) -> None:
    """Print error rates of content judges on speech, on a codec's output of it, and on other words than were said.

    Example: python recipes/phone_recogniser.py compare --data speech/ --judge phones --judge words
    """

    weights_of = None if weights is None else str(weights)
    compare_recognisers(data, splits=split, codecs=codec, judges=judge, weights=weights_of, most=most)


if __name__ == "__main__":
    from snac_core.errors import UserError

    try:
        app()
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(2) from None
