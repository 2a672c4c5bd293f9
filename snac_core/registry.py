"""Names of plugins, the class behind each, and where it came from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from snac_core.errors import UserError, nearest
from snac_core.hookspecs import API_VERSION

DISTRIBUTION = "snac-conditioning"


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
    """The known classes of one kind, e.g. strategies.

    Attributes:
        kind: for messages.
        classes, origins: name to class, and to where it came from.
        refused: name to the reason why nobody's offer of it is taken.
    """

    kind: str
    classes: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, Origin] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def add(self, offered: Any, origin: Origin) -> None:
        """Take one class.

        Raises:
            UserError: for a bad or taken name, or an interface version that is not ours. A name that two plugins claim
                belongs to neither from then on, unless this project holds it.
        """
        if not isinstance(offered, type):
            raise UserError(f"{self.kind} {offered!r} of {origin} is no class; register the class itself")
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
            reason = f"{self.kind} {name!r} of {origin} is for hook API {api!r}, this is {API_VERSION}: {remedy}"
            self.refuse(name, reason)
            raise UserError(reason)
        self.classes[name] = offered
        self.origins[name] = origin

    def refuse(self, name: str, reason: str) -> None:
        """Offer `name` no more; who asks for it gets the reason."""
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
