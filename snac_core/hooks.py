"""Attaching: pluggy discovers, validates and orders the hooks once; what remains is a plain table of callables."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pluggy
import torch
from torch import Tensor

from snac_core.conditioning import Conditioning
from snac_core.errors import UserError, nearest
from snac_core.hookspecs import PROJECT, StrategyHooks
from snac_core.plugin_guard import contained
from snac_core.strategy import Strategy
from snac_core.taps import Tap, Taps, is_before_vq

HOOKS = tuple(name for name in vars(StrategyHooks) if not name.startswith("_"))


@dataclass(frozen=True)
class Edit:
    """One strategy's edit at one tap.

    Attributes:
        strategy: name of the strategy.
        tap: where it acts.
        hook: "before_vq" or "after_vq".
        function: its bound implementation.
        arguments: which of (x, cond, tap) it takes.
    """

    strategy: str
    tap: Tap
    hook: str
    function: Callable[..., Any]
    arguments: tuple[str, ...]

    def __call__(self, x: Tensor, cond: Conditioning) -> Tensor:
        """Edit `x` (B, C, F); raises UserError unless a tensor of the same shape and type comes back."""
        values = {"x": x, "cond": cond, "tap": self.tap}
        given = {name: values[name] for name in self.arguments}
        if torch.compiler.is_compiling():  # torch's settings cannot be read in a graph
            edited = self.function(**given)
        else:
            with contained(f"{self.hook} of strategy {self.strategy!r} at tap {self.tap.name!r}"):
                edited = self.function(**given)
        if not isinstance(edited, Tensor) or edited.shape != x.shape or edited.dtype != x.dtype:
            if isinstance(edited, Tensor):
                got = f"{tuple(edited.shape)} {edited.dtype}"
            else:
                got = "None" if edited is None else type(edited).__name__
            raise UserError(
                f"strategy {self.strategy!r} returned {got} at tap {self.tap.name!r}; "
                f"expected a tensor {tuple(x.shape)} {x.dtype}, like its input"
            )
        return edited


def edits_at_taps(strategies: Sequence[Strategy], taps: Taps) -> dict[str, tuple[Edit, ...]]:
    """Tap name to its edits, in listed order; only taps that are edited, in signal order.

    Raises:
        UserError: for a hook that does not fit its specification, a pattern that matches no tap, a hook asked for on
            the wrong side of the quantiser, or a strategy without any hook.
    """
    manager = hook_manager(strategies)
    table: dict[str, list[Edit]] = {tap.name: [] for tap in taps.all}
    for hook, patterns_of, before in (("before_vq", "before_taps", True), ("after_vq", "after_taps", False)):
        for implementation in _ordered(manager, hook):
            strategy = implementation.plugin
            for tap in taps.match(getattr(strategy, patterns_of)):
                if is_before_vq(tap.name) != before:
                    side = "before" if before else "after"
                    raise UserError(
                        f"strategy {strategy.name!r}: {patterns_of} names {tap.name!r}, which does not lie {side} VQ"
                    )
                table[tap.name].append(
                    Edit(strategy.name, tap, hook, implementation.function, tuple(implementation.argnames))
                )
    return {tap: tuple(edits) for tap, edits in table.items() if edits}


def hook_callers(strategies: Sequence[Strategy], hook: str) -> list[tuple[str, Callable[..., Any]]]:
    """(strategy name, implementation) of a hook, in listed order; call it with the hook's arguments by name."""
    return [
        (impl.plugin.name, _accepting(impl.function, impl.argnames, f"{hook} of strategy {impl.plugin.name!r}"))
        for impl in _ordered(hook_manager(strategies), hook)
    ]


def _accepting(function: Callable[..., Any], names: Sequence[str], who: str) -> Callable[..., Any]:
    """`function`, called with all arguments of its hook by name, given those that it takes; its faults name `who`."""

    def call(**given: Any) -> Any:
        with contained(who):
            return function(**{name: given[name] for name in names})

    return call


def hook_manager(strategies: Sequence[Strategy]) -> pluggy.PluginManager:
    """A plugin manager over these strategies alone, validated."""
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(StrategyHooks)
    for strategy in reversed(strategies):  # pluggy calls the newest first, so that the listed order is its call order
        _check_marks(type(strategy))
        try:
            manager.register(strategy, name=strategy.name)
            manager.check_pending()
        except pluggy.PluginValidationError as error:
            detail = " ".join(str(error).split())
            raise UserError(f"strategy {strategy.name!r}: {detail}; hooks: {', '.join(HOOKS)}") from error
        callers = manager.get_hookcallers(strategy)
        if not callers:
            raise UserError(f"strategy {strategy.name!r} implements no hook; expected one of {', '.join(HOOKS)}")
    return manager


def _ordered(manager: pluggy.PluginManager, hook: str) -> list[Any]:
    implementations: list[Any] = list(reversed(getattr(manager.hook, hook).get_hookimpls()))
    for implementation in implementations:
        if implementation.wrapper or implementation.hookwrapper:
            raise UserError(
                f"strategy {implementation.plugin_name!r}: {hook} cannot be a wrapper; return the edit itself"
            )
    return implementations


def _check_marks(cls: type[Strategy]) -> None:
    """A hook without its mark would silently never run, and so would a marked one with a misspelt name."""
    for name, member in inspect.getmembers(cls, inspect.isfunction):
        marked = hasattr(member, f"{PROJECT}_impl")
        if name in HOOKS and not marked:
            raise UserError(f"strategy {cls.name!r}: {name} lacks the @hookimpl mark, so it would never be called")
        if marked and name not in HOOKS:
            raise UserError(f"strategy {cls.name!r}: unknown hook {name!r}{nearest(name, HOOKS)}")
