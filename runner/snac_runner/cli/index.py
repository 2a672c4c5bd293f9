"""`runner index build / show`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from snac_runner.cli.console import Disable, Plugin

if TYPE_CHECKING:
    from snac_core.speakers.bank import Bank
    from snac_core.speakers.index import SpeakerIndex


app = typer.Typer(help="Embedding bank and FAISS index of a data folder.", no_args_is_help=True)

Data = Annotated[Path, typer.Option(help="Folder of speech, or a manifest.")]
Encoder = Annotated[str, typer.Option(help="Speaker encoder.")]
Out = Annotated[Path | None, typer.Option(help="Folder of the bank; in the cache folder when empty.")]
Weights = Annotated[Path | None, typer.Option(help="Weights of the encoder, instead of its own.", show_default=False)]


@app.command(epilog="Example: runner index build --data speech/ --encoder ge2e")
def build(
    data: Data,
    encoder: Encoder = "ecapa_tiny",
    out: Out = None,
    weights: Weights = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0: one for each core.")] = 0,
    plugin: Plugin = [],  # noqa: B006
    disable_plugin: Disable = [],  # noqa: B006
) -> None:
    """Embed every utterance and speaker, and index them; goes on where it was stopped, and embeds new files only."""
    from snac_core.errors import UserError
    from snac_core.speakers.index import build_index, open_index
    from snac_runner.cli.console import Stopped, say, terminal
    from snac_runner.data.open_corpus import open_corpus
    from snac_runner.embeddings import EncoderSource, bank_folder, build_bank

    source = EncoderSource(encoder, str(weights) if weights else None, tuple(plugin), tuple(disable_plugin))
    with terminal() as console:
        corpus = open_corpus(
            data,
            warn=console.warning,
            progress=console.progress("reading the audio files"),
        )
        folder = out or bank_folder(corpus, source.load())
        try:
            built = build_bank(
                corpus, folder, source, workers=workers,
                progress=console.progress(f"{encoder} on {corpus.name}"),
            )  # fmt: skip
        except KeyboardInterrupt:
            raise Stopped(f"stopped; the same command goes on from what stands in {folder}") from None
        bank = built.bank
        try:
            index, taken = open_index(bank), ""
        except UserError:
            console.line(f"indexing {len(bank)} embeddings")
            index, seconds = build_index(bank)
            taken = f", built in {seconds:.1f} s"
    say(f"embedded: {built.embedded}; there already: {built.reused}")
    say(_described(bank, index) + taken)


@app.command(epilog="Example: runner index show --data speech/ --encoder ge2e")
def show(
    data: Data,
    encoder: Encoder = "ecapa_tiny",
    out: Out = None,
    weights: Weights = None,
    plugin: Plugin = [],  # noqa: B006
    disable_plugin: Disable = [],  # noqa: B006
) -> None:
    """Check that a bank and its index are whole, of this encoder, and of the folder as it is now; and describe them."""
    from snac_core.speakers.bank import audio_digest, open_bank
    from snac_core.speakers.index import open_index
    from snac_runner.cli.console import say, terminal
    from snac_runner.data.open_corpus import open_corpus
    from snac_runner.embeddings import EncoderSource, Wanted, bank_folder

    with terminal() as console:
        corpus = open_corpus(data, warn=console.warning)
        loaded = EncoderSource(encoder, str(weights) if weights else None, tuple(plugin), tuple(disable_plugin)).load()
        wanted = Wanted.of(corpus)
        bank = open_bank(
            out or bank_folder(corpus, loaded), encoder=loaded, audio=audio_digest(wanted.keys, wanted.labels)
        )
        bank.verify()
        index = open_index(bank)
    say(_described(bank, index))


def _described(bank: Bank, index: SpeakerIndex) -> str:
    header = index.header
    return (
        f"bank: {bank.folder}\n"
        f"{len(bank)} utterances, {len(bank.names)} speakers, {bank.header.dim} dimensions by {bank.header.encoder}, "
        f"{bank.bytes / 1e6:.1f} MB\n"
        f"index: {header.kind}, {header.bytes / 1e6:.1f} MB, recall@100 {header.recall:.3f}"
    )
