"""Guards around a plugin's code: its errors name the plugin, and changes to torch's global settings are undone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from snac_core.errors import UserError


class PluginError(UserError):
    """A plugin's code failed, or changed global state; the message names the plugin and the hook."""


class TorchSettingChanged(PluginError):
    """A plugin changed a global setting of torch, which all code in the process shares."""


def _set_default_device(device: torch.device) -> None:
    torch.set_default_device(None if device == torch.device("cpu") else device)


def _set_cudnn(name: str) -> Callable[[bool], None]:
    return lambda value: setattr(torch.backends.cudnn, name, value)


SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "default device": (torch.get_default_device, _set_default_device),
    "number of threads": (torch.get_num_threads, torch.set_num_threads),
    "gradient mode": (torch.is_grad_enabled, torch.set_grad_enabled),
    "deterministic mode": (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    "matmul precision": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "cuDNN benchmark mode": (lambda: torch.backends.cudnn.benchmark, _set_cudnn("benchmark")),
    "cuDNN deterministic mode": (lambda: torch.backends.cudnn.deterministic, _set_cudnn("deterministic")),
    # Drawing random numbers does not change the seed; `torch.manual_seed` does.
    "random seed": (torch.initial_seed, torch.manual_seed),
}
"""Global settings of torch: name, getter and setter."""


def torch_settings() -> dict[str, Any]:
    """The current value of every global setting of torch, by name; takes a few microseconds."""
    return {name: read() for name, (read, _) in SETTINGS.items()}


def restore_settings(before: dict[str, Any]) -> list[str]:
    """Set every setting that differs from `before` back to it.

    Returns:
        one line per changed setting, e.g. "default dtype from torch.float32 to torch.float64".
    """
    now = torch_settings()
    changed = [name for name in SETTINGS if now[name] != before[name]]
    for name in changed:
        SETTINGS[name][1](before[name])
    return [f"{name} from {before[name]} to {now[name]}" for name in changed]


@contextmanager
def with_settings(settings: dict[str, Any]) -> Iterator[None]:
    """Apply global settings of torch inside the block, except random seed and gradient mode.

    Args:
        settings: from `torch_settings`.
    """
    now = torch_settings()
    restore_settings({**settings, **{name: now[name] for name in ("random seed", "gradient mode")}})
    try:
        yield
    finally:
        restore_settings({**now, "random seed": torch.initial_seed()})


@contextmanager
def guarded(source: str) -> Iterator[None]:
    """Run a plugin's code.

    Args:
        source: the hook and the plugin, for the message, e.g. "loss of strategy 'gate'".

    Raises:
        PluginError: names `source`, for any exception of the code. A UserError passes unchanged.
        TorchSettingChanged: if the code changed a global setting of torch; the old value is restored.
    """
    before = torch_settings()
    changed: list[str] = []
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # a plugin's code may raise anything
        raise PluginError(f"{source} raises {describe_error(error)}") from error
    finally:
        changed = restore_settings(before)
    if changed:
        raise TorchSettingChanged(f"{source} changes torch's {changed[0]}, which is a global setting; do not change it")


def describe_error(error: BaseException) -> str:
    """Type and message of an error in one line; a UserError without its type."""
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}".removesuffix(": ")
