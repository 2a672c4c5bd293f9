"""`runner index build` and `runner index show`."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from snac_runner.cli.console import Disable, Plugin
from snac_runner.cli.launch import ClusterAddress

if TYPE_CHECKING:
    from snac_core.speakers.bank import Bank
    from snac_core.speakers.index import SpeakerIndex


app = typer.Typer(help="Embedding bank and FAISS index of a data folder.", no_args_is_help=True)

Data = Annotated[Path, typer.Option(help="Folder of speech, or a manifest.")]
Encoder = Annotated[str, typer.Option(help="Speaker encoder.")]
Out = Annotated[Path | None, typer.Option(help="Folder of the bank. Default: in the cache folder.", show_default=False)]
Weights = Annotated[Path | None, typer.Option(help="Weights of the encoder, instead of its own.", show_default=False)]


@app.command(epilog="Example: runner index build --data speech/ --encoder ge2e")
def build(
    data: Data,
    encoder: Encoder = "ecapa_tiny",
    out: Out = None,
    weights: Weights = None,
    workers: Annotated[int, typer.Option(min=0, help="Number of processes; 0: one per core.")] = 0,
    cluster: ClusterAddress = None,
    plugin: Plugin = [],  # noqa: B006
    disable_plugin: Disable = [],  # noqa: B006
) -> None:
    """Embed all utterances and speakers of a data folder, and index them.

    An interrupted build continues where it stopped. A second build embeds only new files.
    """
    from snac_core.errors import UserError
    from snac_core.speakers.index import build_index, open_index
    from snac_runner.bank_build import EncoderSpec, build_bank
    from snac_runner.cli.console import say, terminal
    from snac_runner.cli.train import stopping
    from snac_runner.cluster import connected
    from snac_runner.data.open_corpus import open_corpus
    from snac_runner.embeddings import bank_folder

    if cluster and workers:
        raise UserError("--workers with --cluster: the cluster has its own processes; leave one of them out")
    spec = EncoderSpec(encoder, str(weights) if weights else None, tuple(plugin), tuple(disable_plugin))
    with terminal() as console, ExitStack() as stack:
        machines = stack.enter_context(connected(cluster, console, gpus=0, cpus=1)) if cluster else None
        corpus = open_corpus(data, warn=console.warning, progress=console.progress("reading the audio files"))
        folder = out or bank_folder(corpus, spec.load())
        progress = console.progress(f"{encoder} on {corpus.name}")
        with stopping(f"give the same command again to continue from {folder}"):
            result = build_bank(corpus, folder, spec, workers=machines or workers, progress=progress)
        try:
            index, duration = open_index(result.bank), ""
        except UserError:
            console.line(f"indexing {len(result.bank)} embeddings")
            index, seconds = build_index(result.bank)
            duration = f", built in {seconds:.1f} s"
    say(f"embedded: {result.embedded}; reused: {result.reused}")
    say(_description(result.bank, index) + duration)


@app.command(epilog="Example: runner index show --data speech/ --encoder ge2e")
def show(
    data: Data,
    encoder: Encoder = "ecapa_tiny",
    out: Out = None,
    weights: Weights = None,
    plugin: Plugin = [],  # noqa: B006
    disable_plugin: Disable = [],  # noqa: B006
) -> None:
    """Check that a bank and its index are complete and match the encoder and the data folder; and describe them."""
    from snac_core.speakers.bank import open_bank
    from snac_core.speakers.index import open_index
    from snac_runner.bank_build import EncoderSpec, check_is_of
    from snac_runner.cli.console import say, terminal
    from snac_runner.data.open_corpus import open_corpus
    from snac_runner.embeddings import bank_folder

    spec = EncoderSpec(encoder, str(weights) if weights else None, tuple(plugin), tuple(disable_plugin))
    with terminal() as console:
        corpus = open_corpus(data, warn=console.warning)
        loaded = spec.load()
        bank = open_bank(out or bank_folder(corpus, loaded), encoder=loaded)
        check_is_of(bank, corpus)
        bank.verify()
        index = open_index(bank)
    say(_description(bank, index))


def _description(bank: Bank, index: SpeakerIndex) -> str:
    header = index.header
    return (
        f"bank: {bank.folder}\n"
        f"{len(bank)} utterances, {len(bank.names)} speakers, {bank.header.dim} dimensions by {bank.header.encoder}, "
        f"{bank.bytes / 1e6:.1f} MB\n"
        f"index: {header.kind}, {header.bytes / 1e6:.1f} MB, recall@100 {header.recall:.3f}"
    )
