"""Around a plugin's code: what it raises gets a name, and what it changes of torch for everyone is put back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from snac_core.errors import UserError


class PluginFault(UserError):
    """A plugin's own code failed, or changed what is not its own; the message names plugin and hook."""


class SettingChanged(PluginFault):
    """A plugin changed a setting of torch that all code in the process shares."""


def _set_default_device(device: torch.device) -> None:
    torch.set_default_device(None if device == torch.device("cpu") else device)


def _set_cudnn(name: str) -> Callable[[bool], None]:
    return lambda value: setattr(torch.backends.cudnn, name, value)


SWITCHES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "default device": (torch.get_default_device, _set_default_device),
    "number of threads": (torch.get_num_threads, torch.set_num_threads),
    "gradient mode": (torch.is_grad_enabled, torch.set_grad_enabled),
    "deterministic mode": (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    "matmul precision": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "cuDNN benchmark mode": (lambda: torch.backends.cudnn.benchmark, _set_cudnn("benchmark")),
    "cuDNN deterministic mode": (lambda: torch.backends.cudnn.deterministic, _set_cudnn("deterministic")),
    # A draw leaves the seed as it is; `torch.manual_seed` does not.
    "random seed": (torch.initial_seed, torch.manual_seed),
}
"""Name of each setting of torch that all code in a process shares, how to read it, and how to set it."""


def switches() -> dict[str, Any]:
    """Every shared setting of torch, as it is now; some microseconds."""
    return {name: read() for name, (read, _) in SWITCHES.items()}


def put_back(before: dict[str, Any]) -> list[str]:
    """Set what differs from `before` back to it; says of each: "default dtype from torch.float32 to torch.float64"."""
    now = switches()
    changed = [name for name in SWITCHES if now[name] != before[name]]
    for name in changed:
        SWITCHES[name][1](before[name])
    return [f"{name} from {before[name]} to {now[name]}" for name in changed]


@contextmanager
def settled(settings: dict[str, Any]) -> Iterator[None]:
    """Inside, torch is set as `settings` say, for work that is shared; random seed and gradient mode are left alone."""
    now = switches()
    put_back({**settings, **{name: now[name] for name in ("random seed", "gradient mode")}})
    try:
        yield
    finally:
        put_back({**now, "random seed": torch.initial_seed()})


@contextmanager
def contained(who: str) -> Iterator[None]:
    """Run a plugin's code.

    Args:
        who: the hook and the plugin, for the message, e.g. "loss of strategy 'gate'".

    Raises:
        PluginFault: naming `who`, for whatever the code raised (a UserError passes as it is).
        SettingChanged: for a setting of torch that is no longer what it was; it has its old value again.
    """
    before = switches()
    changed: list[str] = []
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # a plugin's own code may raise anything
        raise PluginFault(f"{who} raises {described(error)}") from error
    finally:
        changed = put_back(before)
    if changed:
        raise SettingChanged(f"{who} changes torch's {changed[0]}, which everything else here shares; leave it alone")


def described(error: BaseException) -> str:
    """Kind and text of an error, in one line; what a user can mend says by itself what it is."""
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}".removesuffix(": ")
