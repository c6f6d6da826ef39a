# SPDX-License-Identifier: Apache-2.0
"""Linear layers and convolutions as operators: applied with another weight, read as rows.

A weight has one row per output channel; a transposed convolution, whose weight begins with its
inputs, is turned for that and back.
"""

from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["apply_weight", "channel_axis", "from_rows", "is_transposed", "to_rows"]

LINEAR = (nn.Linear,)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_TRANSPOSED_FUNCTION = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def is_transposed(module: nn.Module) -> bool:
    """Tell whether the weight's first axis counts inputs instead of outputs."""
    return isinstance(module, TRANSPOSED)


def channel_axis(module: nn.Module) -> int:
    """Return the axis of an input that holds its channels: the last of a linear layer, else 1."""
    return -1 if isinstance(module, LINEAR) else 1


def to_rows(module: nn.Module, weight: Float[Tensor, "..."]) -> Float[Tensor, "out in *kernel"]:
    """Bring a weight of the module's shape to `(out, in / groups, *kernel)`."""
    if not is_transposed(module):
        return weight
    # (in, out / groups, taps): output channel g * out/groups + o takes the inputs of group g
    groups: int = module.groups  # type: ignore[assignment]
    parts = weight.unflatten(0, (groups, -1))
    return parts.transpose(1, 2).flatten(0, 1)


def from_rows(module: nn.Module, rows: Float[Tensor, "out in *kernel"]) -> Float[Tensor, "..."]:
    """Undo `to_rows`."""
    if not is_transposed(module):
        return rows
    groups: int = module.groups  # type: ignore[assignment]
    return rows.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


def apply_weight(
    module: nn.Module,
    x: Float[Tensor, "..."],
    rows: Float[Tensor, "out in *kernel"],
    bias: Float[Tensor, " out"] | None = None,
) -> Float[Tensor, "..."]:
    """Return what the module would with these weights: its stride, padding, groups and all.

    Args:
        module: a linear layer or convolution; its own weight is not read.
        x: its input.
        rows: weight in the layout of `to_rows`.
        bias: added at the end.
    """
    operator: Any = module
    if isinstance(module, LINEAR):
        return F.linear(x, rows, bias)
    if not is_transposed(module):
        return operator._conv_forward(x, rows, bias)
    function = _TRANSPOSED_FUNCTION[rows.dim() - 2]
    return function(
        x, from_rows(module, rows), bias, operator.stride, operator.padding,
        operator.output_padding, operator.groups, operator.dilation,
    )  # fmt: skip
