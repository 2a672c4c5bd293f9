"""Keys of configuration files that were written for another program, and the settings that they stand for.

A strategy that such files configure declares its own keys with `Strategy.legacy_keys`; `snac_runner.legacy_config`
reads the files. The built-in strategies read the JSON files of the original phases 3, 4 and 6 in this way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class LegacyKeys:
    """The keys of one strategy.

    A *place* is where the value of a key goes: a setting of the strategy ("margin", or "strata.ratio_easy" for a nested
    one), the weight of one of its loss terms ("weights.<term>"), or a setting of the arm ("arm.discriminator_lr").

    Attributes:
        places: key to its place, or to several places that get the same value.
        switch: key that adds the strategy to the arm's objectives unless its value is 0 or false.
        known_by: keys that only files of this strategy have: a file with one of them is read as an arm with this
            strategy. An empty tuple: files that have no such key of any strategy. None: no file.
        defaults: key to the value that applies where a file of this strategy does not have the key.
        computed_from: further keys that `compute` reads.
        ignored: key to the reason why it has no meaning.
        compute: what no table can express. Takes all keys of the file, defaults included, and whether the file is of
            this strategy (else it is an objective); returns place to value. Raises ValueError for a value that cannot
            be what the key means.
        remark: takes all keys of the file; returns a sentence on keys without effect in this file, or None.
    """

    places: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    switch: str | None = None
    known_by: tuple[str, ...] | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    computed_from: tuple[str, ...] = ()
    ignored: Mapping[str, str] = field(default_factory=dict)
    compute: Callable[[Mapping[str, Any], bool], Mapping[str, Any]] | None = None
    remark: Callable[[Mapping[str, Any]], str | None] | None = None

    @property
    def keys(self) -> set[str]:
        """Every key that this strategy knows."""
        own = {*self.places, *self.computed_from, *self.ignored, *self.defaults, *(self.known_by or ())}
        return own | ({self.switch} if self.switch else set())

    @property
    def owned(self) -> set[str]:
        """The keys that set something of this strategy, and so have no effect without it."""
        return {*self.places, *self.computed_from}

    def places_of(self, key: str) -> tuple[str, ...]:
        """Where the value of `key` goes; nowhere for other keys."""
        places = self.places.get(key, ())
        return (places,) if isinstance(places, str) else places


def number(values: Mapping[str, Any], key: str, default: float) -> float:
    """The number, or the switch, that `values` has at `key`.

    Raises:
        ValueError: if it is something else.
    """
    value = values.get(key, default)
    if not isinstance(value, int | float):
        raise ValueError(f"{key} = {value!r}; expected a number, or true or false")
    return value
