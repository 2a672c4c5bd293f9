"""From folders of speech to a trained phone recogniser, and to a table of what content judges can tell apart."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snac_core import atomic
from snac_core.errors import UserError

if TYPE_CHECKING:
    from runner.phones.material import Material
    from runner.phones.train import Settings

Say = Callable[[str], None]
JUDGES = ("phones", "words", "spelt")

SENTENCES = 4896  # 72 for each of the voices that may be trained on
SHARES = {"synthetic": 0.25, "synthetic-coded": 0.2, "real": 0.3, "real-coded": 0.25}  # of what is heard
CODED = {"synthetic": 0.14, "real": 0.33}  # share of the pieces that go through the codec, which takes longest


def train(
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

    from runner.phones.train import train_phones

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
        atomic.write_text(log, "".join(json.dumps(entry) + "\n" for entry in (*before, line)))

    network = train_phones(first, everything, settings, state=out / "state.pt", report=report)
    atomic.write_json(out / "result.json", {"settings": vars(settings), "hours": everything.hours, "codec": codec})
    halved = {k: v.half() if v.is_floating_point() else v for k, v in network.state_dict().items()}
    atomic.write_bytes(out / "model.safetensors", save(halved))
    say(f"the weights are in {out / 'model.safetensors'}")
    return out / "model.safetensors"


def gather(
    out: Path, data: Iterable[str | Path], codec: str, *, seed: int = 0, sentences: int = SENTENCES, say: Say = print
) -> tuple[Material, Material]:
    """Clean synthetic speech, and everything; what `out`/material holds already is not made again."""
    from runner.data import open_corpus
    from runner.data.voices import TRAIN
    from runner.phones.material import Material, Piece, restore, store
    from runner.phones.readings import read_all
    from runner.phones.speech import cut_all, say_all, through_codec
    from runner.phones.texts import Writer
    from snac_core.codec import SNAC

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


def compare(
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
    from runner.data import open_corpus
    from runner.phones.figures import measure, phone_judge, spelt_judge, word_judge
    from snac_core.codec import SNAC
    from snac_core.errors import nearest

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
