"""Discovery: what the installed plugins and single files offer, by name and with its origin."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pluggy

from snac_core.errors import UserError, nearest
from snac_core.hookspecs import API_VERSION, ENTRY_POINT_GROUP, PROJECT, ModuleHooks


@dataclass(frozen=True)
class Origin:
    """Where a name came from: an entry point of an installed distribution, or a file."""

    plugin: str
    distribution: str | None = None
    version: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        if self.file:
            return f"file {self.file}"
        return f"plugin {self.plugin!r} of {self.distribution} {self.version}"


@dataclass
class Registry:
    """The known classes of one kind, e.g. strategies."""

    kind: str
    classes: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, Origin] = field(default_factory=dict)

    def add(self, offered: Any, origin: Origin) -> None:
        """Take one class; raises UserError for a bad or taken name, or an interface version that is not ours."""
        if not isinstance(offered, type):
            raise UserError(f"{self.kind} {offered!r} of {origin} is no class; register the class itself")
        name = getattr(offered, "name", "")
        if not (isinstance(name, str) and name.isidentifier()):
            raise UserError(f"{self.kind} {offered!r} of {origin}: its name must be an identifier; got {name!r}")
        if name in self.origins:
            raise UserError(f"{self.kind} {name!r} is offered twice: by {self.origins[name]} and by {origin}")
        api = getattr(offered, "api", API_VERSION)
        if api != API_VERSION:
            remedy = "a newer snac-conditioning is needed" if api > API_VERSION else "the plugin needs an update"
            raise UserError(f"{self.kind} {name!r} of {origin} is for hook API {api}, this is {API_VERSION}: {remedy}")
        self.classes[name] = offered
        self.origins[name] = origin

    def __getitem__(self, name: str) -> Any:
        if name not in self.classes:
            raise UserError(f"unknown {self.kind} {name!r}{nearest(name, self.classes)}")
        return self.classes[name]

    def __contains__(self, name: object) -> bool:
        return name in self.classes

    def __iter__(self) -> Any:
        return iter(sorted(self.classes))

    def __len__(self) -> int:
        return len(self.classes)


@dataclass
class Catalogue:
    """Everything the plugins offer, and what failed to load."""

    strategies: Registry = field(default_factory=lambda: Registry("strategy"))
    speaker_encoders: Registry = field(default_factory=lambda: Registry("speaker encoder"))
    metrics: Registry = field(default_factory=lambda: Registry("metric"))
    failures: dict[str, str] = field(default_factory=dict)


def discover(files: Iterable[str | Path] = (), *, disable: Iterable[str] = ()) -> Catalogue:
    """Load the plugins of entry-point group `snac_core.plugins`, then the single `files`.

    A plugin whose import fails is named in `failures` and the rest still works; a file given by hand must load.

    Raises:
        UserError: for a file that does not load, a name offered twice, a name that is no identifier.
    """
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(ModuleHooks)
    catalogue = Catalogue()
    origins: dict[Any, Origin] = {}
    disable = set(disable)
    for entry in sorted(importlib.metadata.entry_points(group=ENTRY_POINT_GROUP), key=lambda e: e.name):
        name = entry.name
        if name in disable:
            disable.discard(name)
            continue
        origin = Origin(name, entry.dist.name, entry.dist.version) if entry.dist else Origin(name)
        try:
            module = entry.load()
            if module not in origins:
                _register(manager, module, name)
                origins[module] = origin
        except (Exception, SystemExit) as error:  # whatever a plugin's import raises must not break the others
            catalogue.failures[str(origin)] = f"{type(error).__name__}: {error}"
    if disable:
        raise UserError(f"no plugin {sorted(disable)[0]!r} to disable{nearest(sorted(disable)[0], _entry_names())}")
    for file in files:
        module = load_file(file)
        if module not in origins:
            _register(manager, module, str(file))
            origins[module] = Origin(Path(file).stem, file=str(file))
    for hook, registry in (
        ("register_strategies", catalogue.strategies),
        ("register_speaker_encoders", catalogue.speaker_encoders),
        ("register_metrics", catalogue.metrics),
    ):
        # pluggy lists implementations in registration order (it calls them from the end); each is called by itself so
        # that what it registers, and what it raises, has an origin.
        for implementation in getattr(manager.hook, hook).get_hookimpls():
            _offer(implementation, registry, origins[implementation.plugin], catalogue)
    return catalogue


def load_file(path: str | Path) -> ModuleType:
    """Import a single Python file as a plugin module; the same file is imported once.

    Raises:
        UserError: if the file is missing, is no Python file, or fails to import.
    """
    path = Path(path).resolve()
    if not path.is_file() or path.suffix != ".py":
        raise UserError(f"plugin file {path} is no Python file; expected the path of a .py file")
    source = path.read_bytes()
    name = f"snac_plugin_{path.stem}_{hashlib.blake2b(str(path).encode() + source, digest_size=6).hexdigest()}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # pydantic and dataclasses look their module up while the class body runs
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise UserError(f"plugin file {path} does not import: {type(error).__name__}: {error}") from error
    return module


def _register(manager: pluggy.PluginManager, module: ModuleType, name: str) -> None:
    alone = pluggy.PluginManager(PROJECT)  # a registration that fails half-way would leave traces in `manager`
    alone.add_hookspecs(ModuleHooks)
    try:
        alone.register(module, name=name)
        alone.check_pending()
    except pluggy.PluginValidationError as error:
        known = [hook for hook in vars(ModuleHooks) if not hook.startswith("_")]
        raise UserError(f"plugin {name}: {_one_line(error)}; hooks of a plugin module: {', '.join(known)}") from error
    if not alone.get_hookcallers(module):
        raise UserError(
            f"plugin {name} registers nothing; expected a module-level function such as "
            f"`@hookimpl def register_strategies(register): register(MyStrategy)`"
        )
    manager.register(module, name=name)


def _offer(implementation: pluggy.HookImpl, registry: Registry, origin: Origin, catalogue: Catalogue) -> None:
    def register(offered: Any) -> None:
        registry.add(offered, origin)

    arguments: dict[str, Callable[[Any], None]] = {"register": register}
    try:
        implementation.function(**{name: arguments[name] for name in implementation.argnames})
    except UserError:
        raise
    except Exception as error:  # a plugin's own code: contained and named
        if origin.file:
            raise UserError(f"{origin} fails to register: {type(error).__name__}: {error}") from error
        catalogue.failures[str(origin)] = f"{type(error).__name__}: {error}"


def _entry_names() -> list[str]:
    return [entry.name for entry in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
