"""`runner quickstart`, `train`, `ablate`, `report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from runner.cli.plugin_options import Disable, Plugin

Strategy = Annotated[list[str], typer.Option("--strategy", help="Strategy; give it again to add another.")]
Strategies = Annotated[str, typer.Option(help="Arms, separated by commas; a+b is one arm with two strategies.")]
Out = Annotated[Path | None, typer.Option(help="Folder to write.", show_default=False)]
Data = Annotated[str | None, typer.Option(help="Folder of speech, or a manifest.", show_default=False)]
Base = Annotated[str | None, typer.Option(help="Codec: tiny, a folder, or a hub id.", show_default=False)]
Teacher = Annotated[str | None, typer.Option(help="Speaker encoder of conditioning and loss.", show_default=False)]
Judge = Annotated[str | None, typer.Option(help="Speaker encoder of the scores.", show_default=False)]
Steps = Annotated[int | None, typer.Option(min=1, help="Training steps.", show_default=False)]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, or cuda:N.", show_default=False)]
SaveEvery = Annotated[int | None, typer.Option(min=1, help="Steps between checkpoints.", show_default=False)]
Set = Annotated[
    list[str], typer.Option("--set", help="key=value of any setting, e.g. --set lr=3e-4 --set NAME.key=value.")
]


def add_to(app: typer.Typer) -> None:
    """Add the commands."""
    app.command(epilog="Example: runner quickstart")(quickstart)
    app.command(epilog="Example: runner train --strategy NAME --data speech/ (runner plugins lists the names)")(train)
    app.command(epilog="Example: runner ablate --strategies NAME1,NAME2,NAME1+NAME2 --data speech/ --seeds 2")(ablate)
    app.command(epilog="Example: runner report runs/quickstart")(report)


def quickstart(
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("runs/quickstart"),
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each arm.")] = 20,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each arm.")] = 2,
    plugin: Plugin = [],  # noqa: B006
    disable_plugin: Disable = [],  # noqa: B006
) -> None:
    """Train every placement that is installed side by side on synthetic speech, and write the comparative report."""
    from runner.cli.ablating import quick

    quick(out, steps, seeds, plugin, disable_plugin)


def train(
    strategy: Strategy = [],  # noqa: B006
    config: Annotated[Path | None, typer.Option(help="Settings as TOML, or JSON.", show_default=False)] = None,
    out: Out = None,
    data: Data = None,
    base: Base = None,
    teacher: Teacher = None,
    judge: Judge = None,
    steps: Steps = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the run.", show_default=False)] = None,
    device: Device = None,
    save_every: SaveEvery = None,
    resume: Annotated[Path | None, typer.Option(help="Run folder to go on with.", show_default=False)] = None,
    set_: Set = [],  # noqa: B006
    plugin: Plugin = [],  # noqa: B006
    disable_plugin: Disable = [],  # noqa: B006
) -> None:
    """Train one arm, judge it on test speakers, and write its run folder."""
    from runner.cli.ablating import train_one

    options = _given(data=data, base=base, teacher=teacher, judge=judge, steps=steps, device=device,
                     save_every=save_every, seeds=None if seed is None else [seed])  # fmt: skip
    train_one(strategy, config, out, resume, options, set_, plugin, disable_plugin)


def ablate(
    study: Annotated[Path | None, typer.Argument(help="Study file (TOML).", show_default=False)] = None,
    strategies: Strategies = "",
    seeds: Annotated[int | None, typer.Option(min=1, help="Runs of each arm.", show_default=False)] = None,
    out: Out = None,
    data: Data = None,
    base: Base = None,
    teacher: Teacher = None,
    judge: Judge = None,
    steps: Steps = None,
    device: Device = None,
    save_every: SaveEvery = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done and what it costs.")] = False,
    set_: Set = [],  # noqa: B006
    plugin: Plugin = [],  # noqa: B006
    disable_plugin: Disable = [],  # noqa: B006
) -> None:
    """Train arms side by side for every seed, and write the comparative report. Goes on with what is unfinished."""
    from runner.cli.ablating import ablate_study

    options = _given(data=data, base=base, teacher=teacher, judge=judge, steps=steps, device=device,
                     save_every=save_every, seeds=None if seeds is None else list(range(seeds)))  # fmt: skip
    ablate_study(study, strategies, out, dry_run, options, set_, plugin, disable_plugin)


def report(
    folders: Annotated[list[Path], typer.Argument(help="Study folder, or a run's; several make a leaderboard.")],
    votes: Annotated[
        list[Path], typer.Option(help="Votes that abx.html exported; may be repeated.", show_default=False)
    ] = [],  # noqa: B006
    out: Annotated[Path, typer.Option(help="Folder of a leaderboard.")] = Path("leaderboard"),
) -> None:
    """Write report.html, .md, .json and tables from result files: of a study, or of several that can be compared."""
    from runner.report import add_votes, build, build_leaderboard, summary
    from snac_core.errors import UserError

    if len(folders) > 1:
        if votes:
            raise UserError("--votes belong to one study; give its folder alone")
        page, text, refused = build_leaderboard(folders, out)
        print("\n".join([*refused, text, str(page)]))
        return
    for file in votes:
        add_votes(folders[0], file)
    page = build(folders[0])
    print(summary(folders[0]))
    print(page)


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}
