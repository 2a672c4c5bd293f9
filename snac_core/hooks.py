"""Attaching strategies: pluggy validates and orders their hooks once; what remains are plain tables of callables."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pluggy
import torch
from torch import Tensor, nn

from snac_core.conditioning import Conditioning
from snac_core.errors import UserError, nearest
from snac_core.hookspecs import PROJECT, StrategyHooks
from snac_core.plugin_guard import guarded
from snac_core.strategy import DISCRIMINATOR, Strategy
from snac_core.taps import Tap, Taps, is_before_vq

HOOKS = tuple(name for name in vars(StrategyHooks) if not name.startswith("_"))
_RENAMED_HOOKS = {"critic_loss": "discriminator_loss"}  # of API 1
_RENAMED_ATTRIBUTES = {"critic": DISCRIMINATOR}


@dataclass(frozen=True)
class Edit:
    """One strategy's edit at one tap.

    Attributes:
        strategy: name of the strategy.
        tap: where it acts.
        hook: "before_vq" or "after_vq".
        function: its bound implementation.
        arguments: which of (x, cond, tap, scale) it takes.
    """

    strategy: str
    tap: Tap
    hook: str
    function: Callable[..., Any]
    arguments: tuple[str, ...]

    def __call__(self, x: Tensor, cond: Conditioning, scale: float = 1.0) -> Tensor:
        """Edit one activation.

        Args:
            x: (B, C, F).
            cond: of B rows.
            scale: factor of the edit; a strategy that takes no scale is scaled linearly.

        Returns:
            (B, C, F); `x` itself at a scale of 0.

        Raises:
            UserError: unless the strategy returns a tensor of the shape and dtype of `x`.
        """
        if scale == 0:
            return x
        values = {"x": x, "cond": cond, "tap": self.tap, "scale": scale}
        arguments = {name: values[name] for name in self.arguments}
        if torch.compiler.is_compiling():  # torch's global settings cannot be read in a graph
            edited = self.function(**arguments)
        else:
            with guarded(f"{self.hook} of strategy {self.strategy!r} at tap {self.tap.name!r}"):
                edited = self.function(**arguments)
        if isinstance(edited, Tensor) and torch.is_autocast_enabled(x.device.type):
            edited = edited.to(x.dtype)
        if not isinstance(edited, Tensor) or edited.shape != x.shape or edited.dtype != x.dtype:
            if isinstance(edited, Tensor):
                got = f"{tuple(edited.shape)} {edited.dtype}"
            else:
                got = "None" if edited is None else type(edited).__name__
            raise UserError(
                f"strategy {self.strategy!r} returned {got} at tap {self.tap.name!r}; "
                f"expected a tensor {tuple(x.shape)} {x.dtype}, like its input"
            )
        return edited if scale == 1 or "scale" in self.arguments else x.lerp(edited, scale)


@dataclass(frozen=True)
class HookCall:
    """One strategy's implementation of `loss`, `discriminator_loss` or `training_start`.

    Attributes:
        strategy: name of the strategy.
        hook: name of the hook.
        function: its bound implementation.
        arguments: which of the hook's arguments it takes.
    """

    strategy: str
    hook: str
    function: Callable[..., Any]
    arguments: tuple[str, ...]

    def __call__(self, **arguments: Any) -> Any:
        """Call it with all arguments of the hook by name; it is given those that it takes."""
        with guarded(f"{self.hook} of strategy {self.strategy!r}"):
            return self.function(**{name: arguments[name] for name in self.arguments})


@dataclass(frozen=True)
class HookTables:
    """All hooks of the attached strategies, in the order in which they are called.

    Attributes:
        edits: tap name to the edits made there, in listed order; only taps that are edited, in signal order.
        calls: hook name to its implementations, in listed order, for the hooks that are not edits.
    """

    edits: Mapping[str, tuple[Edit, ...]]
    calls: Mapping[str, tuple[HookCall, ...]]


_EDITS = {"before_vq": ("before_taps", True), "after_vq": ("after_taps", False)}


def hook_tables(strategies: Sequence[Strategy], taps: Taps) -> HookTables:
    """Validate and order the hooks of `strategies`.

    Raises:
        UserError: for a hook that does not fit its specification, a pattern that matches no tap, a tap on the wrong
            side of the quantizer, or a strategy without any hook.
    """
    manager = hook_manager(strategies)
    calls = {
        hook: tuple(
            HookCall(implementation.plugin.name, hook, implementation.function, tuple(implementation.argnames))
            for implementation in _ordered(manager, hook)
        )
        for hook in HOOKS
        if hook not in _EDITS
    }
    return HookTables(_edits(manager, taps), calls)


def _edits(manager: pluggy.PluginManager, taps: Taps) -> dict[str, tuple[Edit, ...]]:
    table: dict[str, list[Edit]] = {tap.name: [] for tap in taps.all}
    for hook, (patterns, before) in _EDITS.items():
        for implementation in _ordered(manager, hook):
            strategy = implementation.plugin
            for tap in taps.match(getattr(strategy, patterns)):
                if is_before_vq(tap.name) != before:
                    side = "before" if before else "after"
                    raise UserError(
                        f"strategy {strategy.name!r}: {patterns} names {tap.name!r}, which is not {side} VQ"
                    )
                edit = Edit(strategy.name, tap, hook, implementation.function, tuple(implementation.argnames))
                table[tap.name].append(edit)
    return {tap: tuple(edits) for tap, edits in table.items() if edits}


def hook_manager(strategies: Sequence[Strategy]) -> pluggy.PluginManager:
    """A plugin manager over these strategies alone, validated.

    Raises:
        UserError: for a hook that does not fit its specification, a name of API 1, or a strategy without any hook.
    """
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(StrategyHooks)
    for strategy in reversed(strategies):  # pluggy calls the newest first, so this makes the listed order its order
        _check_names(strategy)
        try:
            manager.register(strategy, name=strategy.name)
            manager.check_pending()
        except pluggy.PluginValidationError as error:
            detail = " ".join(str(error).split())
            raise UserError(f"strategy {strategy.name!r}: {detail}; hooks: {', '.join(HOOKS)}") from error
        if not manager.get_hookcallers(strategy):
            raise UserError(f"strategy {strategy.name!r} implements no hook; expected one of {', '.join(HOOKS)}")
    return manager


def _ordered(manager: pluggy.PluginManager, hook: str) -> list[Any]:
    implementations: list[Any] = list(reversed(getattr(manager.hook, hook).get_hookimpls()))
    for implementation in implementations:
        if implementation.wrapper or implementation.hookwrapper:
            raise UserError(
                f"strategy {implementation.plugin_name!r}: {hook} cannot be a wrapper; return the result itself"
            )
    return implementations


def _check_names(strategy: Strategy) -> None:
    """Refuse what pluggy would silently ignore: unmarked hooks, marked methods of another name, and names of API 1."""
    for name, member in inspect.getmembers(type(strategy), inspect.isfunction):
        marked = hasattr(member, f"{PROJECT}_impl")
        if name in _RENAMED_HOOKS:
            raise UserError(f"strategy {strategy.name!r}: the hook {name!r} is called {_RENAMED_HOOKS[name]!r}")
        if name in HOOKS and not marked:
            raise UserError(f"strategy {strategy.name!r}: {name} lacks the @hookimpl mark, so it would never be called")
        if marked and name not in HOOKS:
            raise UserError(f"strategy {strategy.name!r}: unknown hook {name!r}{nearest(name, HOOKS)}")
    for old, new in _RENAMED_ATTRIBUTES.items():
        if isinstance(getattr(strategy, old, None), nn.Module | nn.Parameter):
            raise UserError(f"strategy {strategy.name!r}: the attribute self.{old} is called self.{new}")
