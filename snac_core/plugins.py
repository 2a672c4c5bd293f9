"""Discovery of plugins: names, the class of each, and the distribution or file that it comes from."""

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

DISTRIBUTION = "snac-conditioning"


@dataclass(frozen=True)
class Origin:
    """Where a plugin comes from: an entry point of an installed distribution, or a file."""

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
    """The known classes of one kind, e.g. strategies.

    Attributes:
        kind: for messages.
        classes, origins: name to class, and to its origin.
        refused: name to the reason why no class is registered under it.
    """

    kind: str
    classes: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, Origin] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def add(self, offered: Any, origin: Origin) -> None:
        """Register one class.

        Raises:
            UserError: for an invalid or used name, or another version of the hook API. A name that two plugins
                register is removed for both, unless one of them is this project.
        """
        if not isinstance(offered, type):
            raise UserError(f"{self.kind} {offered!r} of {origin} is not a class; register the class itself")
        name = getattr(offered, "name", "")
        if not (isinstance(name, str) and name.isidentifier()):
            raise UserError(f"{self.kind} {offered!r} of {origin}: its name must be an identifier; got {name!r}")
        if self.classes.get(name) is offered:
            raise UserError(f"{self.kind} {name!r} is registered twice by {origin}; once is enough")
        if name in self.origins:
            reason = f"{self.kind} {name!r} is offered twice: by {self.origins[name]} and by {origin}"
            if self.origins[name].distribution != DISTRIBUTION:
                self.refuse(name, f"{reason}; choose with --disable-plugin")
            raise UserError(reason)
        if name in self.refused:
            raise UserError(f"{self.refused[name]} (and by {origin})")
        api = getattr(offered, "api", API_VERSION)
        if api != API_VERSION:
            newer = isinstance(api, int) and api > API_VERSION
            remedy = "a newer snac-conditioning is needed" if newer else "the plugin needs an update"
            if api == 1:
                remedy += "; API 2 calls critic_loss discriminator_loss, and self.critic self.discriminator"
            reason = f"{self.kind} {name!r} of {origin} is for hook API {api!r}, this is {API_VERSION}: {remedy}"
            self.refuse(name, reason)
            raise UserError(reason)
        self.classes[name] = offered
        self.origins[name] = origin

    def refuse(self, name: str, reason: str) -> None:
        """Remove `name`; looking it up raises UserError with the reason."""
        self.refused[name] = reason
        self.classes.pop(name, None)
        self.origins.pop(name, None)

    def __getitem__(self, name: str) -> Any:
        if name in self.refused:
            raise UserError(self.refused[name])
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
    """Everything that plugins register.

    Attributes:
        failures: origin to reason, for plugins that do not load.
        notices: one sentence for each rejected name or setting.
    """

    strategies: Registry = field(default_factory=lambda: Registry("strategy"))
    speaker_encoders: Registry = field(default_factory=lambda: Registry("speaker encoder"))
    metrics: Registry = field(default_factory=lambda: Registry("metric"))
    failures: dict[str, str] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)

    @property
    def warnings(self) -> list[str]:
        """One line per problem, for the user."""
        left_out = [f"{origin} does not load and is left out: {reason}" for origin, reason in self.failures.items()]
        return [*left_out, *(f"set aside: {notice}" for notice in self.notices)]


def discover(files: Iterable[str | Path] = (), *, disable: Iterable[str] = ()) -> Catalogue:
    """Load the plugins of entry-point group `snac_core.plugins`, then the single `files`.

    A broken installed plugin does not affect the others: `Catalogue.warnings` names it. A broken file is an error.

    Args:
        files: Python files, each with one plugin.
        disable: names of installed plugins to skip; they are not imported.

    Raises:
        UserError: for a file that does not load or registers a used name, and a `disable` that is not installed.
    """
    from snac_core.plugin_guard import guarded, restore_settings, torch_settings

    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(ModuleHooks)
    catalogue = Catalogue()
    origins: dict[Any, Origin] = {}
    disable = set(disable)
    for name in sorted(disable - set(_entry_names())):
        raise UserError(f"no plugin {name!r} to disable{nearest(name, _entry_names())}")
    for entry in _entries():
        if entry.name in disable:
            continue
        origin = Origin(entry.name, entry.dist.name, entry.dist.version) if entry.dist else Origin(entry.name)
        before = torch_settings()
        try:
            module = entry.load()
            if module not in origins:
                _register(manager, module, entry.name)
                origins[module] = origin
        except (Exception, SystemExit) as error:  # an import may raise anything; other plugins must still load
            catalogue.failures[str(origin)] = f"{type(error).__name__}: {_one_line(error)}{_other_version(error)}"
        catalogue.notices += [
            f"importing {origin} changed torch's {change}; put back" for change in restore_settings(before)
        ]
    for file in files:
        with guarded(f"plugin file {file}"):
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
        UserError: if the file is missing, is not a Python file, or fails to import.
    """
    path = Path(path).resolve()
    if not path.exists():
        raise UserError(f"no plugin file {path}; expected the path of a .py file, after a move the new one")
    if not path.is_file() or path.suffix != ".py":
        raise UserError(f"plugin file {path} is not a Python file; expected the path of a .py file")
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
    alone = pluggy.PluginManager(PROJECT)  # a failed registration would leave an incomplete entry in `manager`
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
    from snac_core.plugin_guard import TorchSettingChanged, guarded

    def register(offered: Any) -> None:
        try:
            registry.add(offered, origin)
        except UserError as error:
            if origin.file:
                raise
            catalogue.notices.append(str(error))

    arguments: dict[str, Callable[[Any], None]] = {"register": register}
    try:
        with guarded(f"{implementation.function.__name__} of {origin}"):
            implementation.function(**{name: arguments[name] for name in implementation.argnames})
    except TorchSettingChanged as error:
        if origin.file:
            raise
        catalogue.notices.append(str(error))
    except (UserError, SystemExit) as error:
        if origin.file:
            raise UserError(str(error)) from error
        cause = error.__cause__ or error
        catalogue.failures[str(origin)] = f"{type(cause).__name__}: {_one_line(cause)}"


def _entries() -> list[importlib.metadata.EntryPoint]:
    """The installed plugins by name; this project's own come first, so that nobody else can register their names."""
    entries = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
    return sorted(entries, key=lambda e: (e.dist is None or e.dist.name != DISTRIBUTION, e.name))


def _entry_names() -> list[str]:
    return [entry.name for entry in _entries()]


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _other_version(error: BaseException) -> str:
    """The end of the message if a plugin imports a name that this package does not have."""
    if isinstance(error, ImportError) and (error.name or "").split(".")[0] == PROJECT:
        return f"; it was written for another version of the hook API, this is {API_VERSION}"
    return ""
