"""`runner bench`."""

from __future__ import annotations

from typing import Annotated

import typer

from snac_runner.cli.console import Disable, Plugin, catalogue_of


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog="Example: runner bench --rounds 5")(bench)


def bench(
    base: Annotated[str, typer.Option(help="Codec: tiny, a folder, or a hub id.")] = "tiny",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each measurement; the median is printed.")] = 7,
    strategies: Annotated[str, typer.Option(help="Arms, separated by commas; all adapters when empty.")] = "",
    speaker_encoder: Annotated[str, typer.Option(help="Speaker encoder for conditioning and losses.")] = "ecapa_tiny",
    device: Annotated[str, typer.Option(help="Device of the training steps: cpu, cuda or cuda:N.")] = "cpu",
    threads: Annotated[int, typer.Option(min=0, help="Threads of torch; 0: torch's default.")] = 0,
    plugin: Plugin = [],  # noqa: B006
    disable_plugin: Disable = [],  # noqa: B006
) -> None:
    """Print speed, memory and cost on this machine, against upstream where it is installed."""
    from pathlib import Path
    from tempfile import TemporaryDirectory

    import torch

    from snac_runner import bench as measure
    from snac_runner.bench import objective_costs
    from snac_runner.cli.train import adapters
    from snac_runner.config import ArmSettings, StudySettings
    from snac_runner.data.synth import synthesize

    if threads:
        torch.set_num_threads(threads)
    print(f"{torch.get_num_threads()} thread(s), torch {torch.__version__}")
    for line in measure.start_up() + measure.codec_table(base, rounds) + measure.streaming(base, rounds):
        print(line, flush=True)
    catalogue = catalogue_of(plugin, disable_plugin)
    names = strategies.split(",") if strategies else adapters(catalogue)
    arms = [ArmSettings(strategies=tuple(name.split("+"))) for name in names]
    with TemporaryDirectory() as folder:
        speech = synthesize(Path(folder) / "speech", 24, 6)
        study = StudySettings(data=str(speech), base=base, speaker_encoder=speaker_encoder, device=device)
        for line in measure.side_by_side(study, arms, catalogue, rounds):
            print(line, flush=True)
        for line in objective_costs(study, catalogue, rounds):
            print(line, flush=True)
