"""Training a base codec from speech, and measuring it.

Names are imported on first use, so that importing this package does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runner.pretrain.averaging import average as average
    from runner.pretrain.comparing import compare as compare
    from runner.pretrain.growing import add_levels as add_levels
    from runner.pretrain.growing import first_levels as first_levels
    from runner.pretrain.growing import widen as widen
    from runner.pretrain.loop import pretrain as pretrain
    from runner.pretrain.presets import PRESETS as PRESETS
    from runner.pretrain.presets import recipe as recipe
    from runner.pretrain.settings import PretrainSettings as PretrainSettings

_HOMES = {
    "PRESETS": "presets",
    "PretrainSettings": "settings",
    "add_levels": "growing",
    "average": "averaging",
    "compare": "comparing",
    "first_levels": "growing",
    "pretrain": "loop",
    "recipe": "presets",
    "widen": "growing",
}
__all__ = [
    "PRESETS",
    "PretrainSettings",
    "add_levels",
    "average",
    "compare",
    "first_levels",
    "pretrain",
    "recipe",
    "widen",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
