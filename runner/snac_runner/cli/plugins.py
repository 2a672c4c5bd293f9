"""`runner plugins`, `plugins show`, `check`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from snac_core.errors import UserError, nearest
from snac_runner.cli.console import Disable, Plugin, catalogue_of

if TYPE_CHECKING:
    from snac_core.plugins import Catalogue, Registry


def add_to(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(help="What the installed plugins offer.", invoke_without_command=True)
    group.callback(epilog="Example: runner plugins --plugin ./my_strategy.py")(table)
    group.command("show", epilog="Example: runner plugins show NAME")(show)
    app.command(epilog="Example: runner settings")(settings)
    app.add_typer(group, name="plugins")
    app.command(epilog="Example: runner check ./my_strategy.py")(check)


def table(context: typer.Context, plugin: Plugin = [], disable_plugin: Disable = []) -> None:  # noqa: B006
    """List every strategy, speaker encoder and metric: kind, hooks, taps, origin."""
    if context.invoked_subcommand:
        context.obj = (plugin, disable_plugin)
        return
    from rich.console import Console
    from rich.table import Table

    catalogue = catalogue_of(plugin, disable_plugin)
    rows = Table("name", "kind", "hooks", "taps", "origin", box=None, pad_edge=False)
    for registry in (catalogue.strategies, catalogue.speaker_encoders, catalogue.metrics):
        for name in registry:
            rows.add_row(name, *_row(registry, name), str(registry.origins[name]))
    Console(highlight=False, width=None if Console().is_terminal else 160).print(rows)


def show(
    context: typer.Context,
    name: str,
    plugin: Plugin = [],  # noqa: B006
    disable_plugin: Disable = [],  # noqa: B006
) -> None:
    """Describe one strategy, encoder or metric, with its settings, their defaults, ranges and meaning."""
    from snac_core.settings import stated

    files, disabled = context.obj or ([], [])
    catalogue = catalogue_of([*files, *plugin], [*disabled, *disable_plugin])
    registry = _home(catalogue, name)
    cls = registry[name]
    kind, hooks, taps = _row(registry, name)
    print(f"{name}: {kind}, from {registry.origins[name]}")
    if documentation := (cls.__doc__ or "").strip():
        print("\n".join(line.strip() for line in documentation.splitlines()))
    print(f"hooks: {hooks or 'none'}; taps: {taps or 'none'}")
    for term, weight in getattr(cls, "default_weights", {}).items():
        print(f"loss term {name}/{term}: default weight {weight:g}")
    for key, field in getattr(getattr(cls, "Config", None), "model_fields", {}).items():
        print(f"  {stated(key, field)}")


def settings() -> None:
    """List the settings of a study and of an arm, with defaults and meaning; --set and study files take them."""
    from snac_core.settings import stated
    from snac_runner.config import ArmSettings, StudySettings

    for title, model in (
        ("[study], shared by all arms", StudySettings),
        ("[[arm]], what an arm may differ in", ArmSettings),
    ):
        print(title)
        for key, field in model.model_fields.items():
            print(f"  {stated(key, field)}")


def check(
    name: Annotated[str, typer.Argument(help="Name of a strategy, encoder or metric, or a plugin file.")],
    compile_: Annotated[bool, typer.Option("--compile/--no-compile", help="Also under torch.compile; 10 s.")] = True,
    plugin: Plugin = [],  # noqa: B006
    disable_plugin: Disable = [],  # noqa: B006
) -> None:
    """Run the conformance kit on one plugin, a line per rule; exit code 2 when a rule fails."""
    from snac_core import testing

    is_file = name.endswith(".py") or Path(name).is_file()
    catalogue = catalogue_of([*plugin, name] if is_file else plugin, disable_plugin)
    kinds: tuple[tuple[Registry, Any], ...] = (
        (catalogue.strategies, testing.strategy_results),
        (catalogue.speaker_encoders, testing.check_speaker_encoder),
        (catalogue.metrics, testing.check_metric),
    )
    if is_file:
        file = str(Path(name))
        targets = [
            (r, c, n) for r, c in kinds for n in r if r.origins[n].file and Path(str(r.origins[n].file)) == Path(file)
        ]
    else:
        home = _home(catalogue, name)
        targets = [(r, c, name) for r, c in kinds if r is home]
    if not targets:
        raise UserError(f"{name} registers no strategy, speaker encoder or metric; expected register(MyStrategy)")
    failed = 0
    for registry, checker, target in targets:
        options = {"catalogue": catalogue, "compiled": compile_} if registry is catalogue.strategies else {}
        for result in checker(registry[target], **options):
            mark = "ok  " if result.passed else "FAIL"
            advice = "" if result.passed else f" -> {result.advice}"
            print(f"{mark} {target}: {result.rule}: {result.measured}{advice}", flush=True)
            failed += not result.passed
    if failed:
        raise UserError(f"{name}: {failed} rule(s) failed")


def _home(catalogue: Catalogue, name: str) -> Registry:
    registries = (catalogue.strategies, catalogue.speaker_encoders, catalogue.metrics)
    for registry in registries:
        if name in registry:
            return registry
    known = [n for registry in registries for n in registry]
    raise UserError(f"no plugin offers {name!r}{nearest(name, known)}")


def _row(registry: Registry, name: str) -> tuple[str, str, str]:
    cls = registry[name]
    if registry.kind != "strategy":
        about = getattr(cls, "family", "") or " ".join(filter(None, [cls.unit, f"({cls.direction})"]))
        return registry.kind, about, ""
    from snac_core.hooks import HOOKS

    hooks = [hook for hook in HOOKS if hasattr(cls, hook)]
    taps = [*(cls.before_taps if "before_vq" in hooks else ()), *(cls.after_taps if "after_vq" in hooks else ())]
    kind = "adapter" if {"before_vq", "after_vq"} & set(hooks) else "objective"
    return kind, ", ".join(hooks), ", ".join(taps)
