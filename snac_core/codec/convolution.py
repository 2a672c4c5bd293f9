"""Weight-normed convolutions whose weight can be kept, for inference, without a change of the state dict."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class WeightNorm(nn.Module):
    """Holder of a normed weight's length g (`original0`) and direction v (`original1`): w = g v / |v|.

    Salimans and Kingma 2016, eq. 2, the norm over all but the first dimension. It is a small class of its own because
    torch's parametrization makes one class per module object, which deep copies then share.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.original0 = nn.Parameter(torch.norm_except_dim(weight, 2, 0))
        self.original1 = nn.Parameter(weight)

    def forward(self) -> Tensor:
        """The weight, computed anew."""
        return torch._weight_norm(self.original1, self.original0, 0)


class WeightNormed:
    """Put before a convolution class: `weight` is computed from `parametrizations.weight`, or, once folded, kept.

    Call `norm_weight()` at the end of the constructor. The kept weight is a buffer outside the state dict; it follows
    what changes all parameters (loading, moving to a device or dtype), and is not used while they are being trained.
    """

    parametrizations: nn.ModuleDict
    _folded: Tensor | None

    def norm_weight(self) -> None:
        """Replace the parameter `weight` by its length and direction."""
        weight = self._parameters.pop("weight").detach()  # type: ignore[attr-defined]
        self.parametrizations = nn.ModuleDict({"weight": WeightNorm(weight)})
        self.register_buffer("_folded", None, persistent=False)  # type: ignore[attr-defined]
        self.register_load_state_dict_post_hook(_refold)  # type: ignore[attr-defined]

    @property
    def weight(self) -> Tensor:
        """The effective weight."""
        normed = self.parametrizations["weight"]  # not there yet while the constructor still fills `weight` itself
        if self._folded is not None and not (normed.original0.requires_grad or normed.original1.requires_grad):
            return self._folded
        weight: Tensor = normed()
        return weight

    def fold(self) -> None:
        """Keep the weight as it is now; parameters and state dict stay as they are."""
        with torch.inference_mode(False), torch.no_grad():  # an inference tensor could not be used in training later
            self._folded = self.parametrizations["weight"]()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[misc]
        _refold(self)  # from the moved parameters: folded and unfolded agree on every device and dtype
        return self


def _refold(layer: Any, _incompatible: Any = None) -> None:
    if layer._folded is not None:
        layer.fold()


class WNConv1d(WeightNormed, nn.Conv1d):  # type: ignore[override]
    """`nn.Conv1d` with weight norm; arguments of `nn.Conv1d`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.norm_weight()


class WNConvTranspose1d(WeightNormed, nn.ConvTranspose1d):  # type: ignore[override]
    """`nn.ConvTranspose1d` with weight norm; arguments of `nn.ConvTranspose1d`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.norm_weight()
