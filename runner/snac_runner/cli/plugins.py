"""`runner plugins`, `runner plugins show`, `runner settings` and `runner check`."""

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
    group = typer.Typer(help="List and describe what the installed plugins register.", invoke_without_command=True)
    group.callback(epilog="Example: runner plugins --plugin ./my_strategy.py")(table)
    group.command("show", epilog="Example: runner plugins show NAME")(show)
    app.command(epilog="Example: runner settings")(settings)
    app.add_typer(group, name="plugins")
    app.command(epilog="Example: runner check ./my_strategy.py")(check)


def table(context: typer.Context, plugin: Plugin = [], disable_plugin: Disable = []) -> None:  # noqa: B006
    """List all strategies, speaker encoders and metrics with their kind, hooks, taps and origin."""
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
    name: Annotated[str, typer.Argument(help="Name of a strategy, speaker encoder or metric.")],
    plugin: Plugin = [],  # noqa: B006
    disable_plugin: Disable = [],  # noqa: B006
) -> None:
    """Describe one strategy, speaker encoder or metric, with the default, range and meaning of its settings."""
    from snac_core.settings import stated

    files, disabled = context.obj or ([], [])
    catalogue = catalogue_of([*files, *plugin], [*disabled, *disable_plugin])
    registry = _registry_of(catalogue, name)
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
    """List the settings of a study and of an arm, for --set and for study files, with defaults and meaning."""
    from snac_core.settings import stated
    from snac_runner.config import ArmSettings, StudySettings

    for title, model in (
        ("[study], shared by all arms", StudySettings),
        ("[[arm]], for one arm", ArmSettings),
    ):
        print(title)
        for key, field in model.model_fields.items():
            print(f"  {stated(key, field)}")


def check(
    name: Annotated[str, typer.Argument(help="Name of a strategy, speaker encoder or metric, or a plugin file.")],
    compile_: Annotated[bool, typer.Option("--compile/--no-compile", help="Test torch.compile too (10 s).")] = True,
    plugin: Plugin = [],  # noqa: B006
    disable_plugin: Disable = [],  # noqa: B006
) -> None:
    """Check that a plugin follows the rules of the API: one line per rule; exit code 2 if a rule fails."""
    from snac_core import testing

    is_file = name.endswith(".py") or Path(name).is_file()
    catalogue = catalogue_of([*plugin, name] if is_file else plugin, disable_plugin)
    kinds: tuple[tuple[Registry, Any], ...] = (
        (catalogue.strategies, testing.strategy_results),
        (catalogue.speaker_encoders, testing.check_speaker_encoder),
        (catalogue.metrics, testing.check_metric),
    )
    if is_file:
        named = [(r, c, n) for r, c in kinds for n in r if (file := r.origins[n].file) and Path(file) == Path(name)]
    else:
        registry_of_name = _registry_of(catalogue, name)
        named = [(r, c, name) for r, c in kinds if r is registry_of_name]
    if not named:
        raise UserError(f"{name} registers no strategy, speaker encoder or metric; expected register(MyStrategy)")
    failed = 0
    for registry, checker, registered in named:
        options = {"catalogue": catalogue, "compiled": compile_} if registry is catalogue.strategies else {}
        for result in checker(registry[registered], **options):
            mark = "ok  " if result.passed else "FAIL"
            advice = "" if result.passed else f" -> {result.advice}"
            print(f"{mark} {registered}: {result.rule}: {result.measured}{advice}", flush=True)
            failed += not result.passed
    if failed:
        raise UserError(f"{name}: {failed} rule(s) failed")


def _registry_of(catalogue: Catalogue, name: str) -> Registry:
    registries = (catalogue.strategies, catalogue.speaker_encoders, catalogue.metrics)
    for registry in registries:
        if name in registry:
            return registry
    known = [n for registry in registries for n in registry]
    raise UserError(f"no plugin registers {name!r}{nearest(name, known)}")


def _row(registry: Registry, name: str) -> tuple[str, str, str]:
    """Kind, hooks (of others than strategies: family, or unit and direction) and taps."""
    cls = registry[name]
    if registry.kind != "strategy":
        details = getattr(cls, "family", "") or " ".join(filter(None, [cls.unit, f"({cls.direction})"]))
        return registry.kind, details, ""
    from snac_core.hooks import HOOKS

    hooks = [hook for hook in HOOKS if hasattr(cls, hook)]
    taps = [*(cls.before_taps if "before_vq" in hooks else ()), *(cls.after_taps if "after_vq" in hooks else ())]
    kind = "adapter" if {"before_vq", "after_vq"} & set(hooks) else "objective"
    return kind, ", ".join(hooks), ", ".join(taps)
