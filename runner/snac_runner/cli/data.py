"""`runner data synth / scan / fetch`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Make, check and download speech.", no_args_is_help=True)


@app.command(epilog="Example: runner data synth speech/ --speakers 40")
def synth(
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    speakers: Annotated[int, typer.Option(min=8, max=80, help="How many voices.")] = 24,
    sentences: Annotated[int, typer.Option(min=1, max=48, help="Sentences, spoken by every voice.")] = 18,
    held_out: Annotated[int, typer.Option(min=0, help="Of them, spoken by voices of dev and test alone.")] = 0,
    seed: Annotated[int, typer.Option(help="Of the choice of voices and sentences.")] = 0,
) -> None:
    """Speak a parallel corpus of synthetic speakers with known text, split by speaker."""
    from snac_runner.cli.console import say, terminal
    from snac_runner.data.open_corpus import open_corpus
    from snac_runner.data.synth import synthesize

    with terminal() as console:
        root = synthesize(
            out, speakers, sentences, seed, held_out=held_out,
            progress=console.progress("speaking"),
        )  # fmt: skip
        corpus = open_corpus(root, warn=console.line)
    say(_described(corpus))


@app.command(epilog="Example: runner data scan speech/")
def scan(
    data: Annotated[Path, typer.Argument(help="Folder of speech, or a manifest.")],
    out: Annotated[Path | None, typer.Option(help="Manifest to write.", show_default=False)] = None,
    seed: Annotated[int, typer.Option(help="Of the split by speaker, where the data has none.")] = 0,
) -> None:
    """Check a folder of speech, name what cannot be used, and write its manifest and speaker-disjoint split."""
    from snac_runner.cli.console import say, terminal
    from snac_runner.data.formats import NAME
    from snac_runner.data.open_corpus import open_corpus
    from snac_runner.data.open_corpus import scan as write_manifest

    with terminal() as console:
        progress = console.progress("reading the audio files")
        if out is None and (data / NAME).is_file():
            console.line(f"{data / NAME} is there already and fixes the split; nothing is written")
            corpus = open_corpus(data, seed=seed, warn=console.warning, progress=progress)
        else:
            corpus = write_manifest(data, out, seed=seed, warn=console.warning, progress=progress)
    say(_described(corpus))


@app.command(epilog="Example: runner data fetch librispeech speech/ --part dev-clean")
def fetch(
    name: Annotated[str, typer.Argument(help="librispeech, libritts or vctk.")],
    out: Annotated[Path, typer.Argument(help="Folder to download into.")],
    part: Annotated[list[str] | None, typer.Option(help="Part of the corpus; may be repeated.")] = None,
) -> None:
    """Download a corpus; goes on where a download broke off."""
    from snac_runner.cli.console import say, terminal
    from snac_runner.data.download import fetch as download

    with terminal() as console:
        root = download(name, out, parts=part, progress=console.show_progress)
    say(str(root))


def _described(corpus: object) -> str:
    from snac_runner.data.corpus import Corpus

    assert isinstance(corpus, Corpus)
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
