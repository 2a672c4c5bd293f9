"""`runner data synth`, `runner data scan` and `runner data fetch`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from snac_runner.data.corpus import Corpus

app = typer.Typer(help="Synthesize, check and download speech.", no_args_is_help=True)


@app.command(epilog="Example: runner data synth speech/ --speakers 40")
def synth(
    out: Annotated[Path, typer.Argument(help="Folder to create.")],
    speakers: Annotated[int, typer.Option(min=8, max=80, help="Number of voices.")] = 24,
    sentences: Annotated[int, typer.Option(min=1, max=48, help="Number of sentences per voice.")] = 18,
    held_out: Annotated[int, typer.Option(min=0, help="How many of the sentences are in dev and test only.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the choice of voices and sentences.")] = 0,
) -> None:
    """Synthesize a parallel corpus of synthetic speakers with known text, split by speaker."""
    from snac_runner.cli.console import say, terminal
    from snac_runner.data.open_corpus import open_corpus
    from snac_runner.data.synth import synthesize

    with terminal() as console:
        progress = console.progress("synthesizing speech")
        root = synthesize(out, speakers, sentences, seed, held_out=held_out, progress=progress)
        corpus = open_corpus(root, warn=console.warning)
    say(_description(corpus))


@app.command(epilog="Example: runner data scan speech/")
def scan(
    data: Annotated[Path, typer.Argument(help="Folder of speech, or a manifest.")],
    out: Annotated[
        Path | None, typer.Option(help="Manifest to write. Default: manifest.jsonl in the folder.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the split by speaker, if the data is not split.")] = 0,
) -> None:
    """Check a folder of speech, report unusable files, and write a manifest with a speaker-disjoint split."""
    from snac_runner.cli.console import say, terminal
    from snac_runner.data.formats import MANIFEST_NAME
    from snac_runner.data.open_corpus import open_corpus
    from snac_runner.data.open_corpus import scan as write_manifest

    with terminal() as console:
        progress = console.progress("reading the audio files")
        if out is None and (data / MANIFEST_NAME).is_file():
            console.line(f"{data / MANIFEST_NAME} exists already and fixes the split; nothing is written")
            corpus = open_corpus(data, seed=seed, warn=console.warning, progress=progress)
        else:
            corpus = write_manifest(data, out, seed=seed, warn=console.warning, progress=progress)
            console.line(f"{out or data / MANIFEST_NAME} is written: it fixes the split from now on")
    say(_description(corpus))


@app.command(epilog="Example: runner data fetch librispeech speech/ --part dev-clean")
def fetch(
    name: Annotated[str, typer.Argument(help="librispeech, libritts or vctk.")],
    out: Annotated[Path, typer.Argument(help="Folder to download into.")],
    part: Annotated[list[str] | None, typer.Option(help="Part of the corpus; may be repeated.")] = None,
) -> None:
    """Download a public corpus; an interrupted download is resumed."""
    from snac_runner.cli.console import say, terminal
    from snac_runner.data.download import fetch as download

    with terminal() as console:
        root = download(name, out, parts=part, progress=console.show_progress)
    say(str(root))


def _description(corpus: Corpus) -> str:
    lines = [f"{corpus.root}"]
    for split, utterances in corpus.splits.items():
        minutes = sum(u.seconds for u in utterances) / 60
        lines.append(
            f"{split}: {len(corpus.speakers(split))} speakers, {len(utterances)} utterances, {minutes:.1f} min"
        )
    lines += [f"note: {note}" for note in corpus.notes]
    if corpus.skipped:
        lines.append(f"skipped: {len(corpus.skipped)} file(s)")
    return "\n".join(lines)
