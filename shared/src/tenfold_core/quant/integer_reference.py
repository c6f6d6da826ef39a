# SPDX-License-Identifier: Apache-2.0
"""The integer layers of :mod:`.integer` by their definition: int64 sums, float64, one loop.

Slow and independent of the fast versions: no shifts, no unfolding, no matrix product.
"""

from math import prod

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

__all__ = ["int_conv2d_reference", "int_linear_reference"]


def int_linear_reference(
    codes: UInt8[Tensor, "*batch channels"],
    weight_codes: UInt8[Tensor, "out channels"],
    *,
    scale: Tensor,
    zero: Tensor,
    weight_scale: Float[Tensor, " out"],
    weight_zero: Float[Tensor, " out"],
    bias: Float[Tensor, " out"] | None = None,
) -> Float[Tensor, "*batch out"]:
    """Evaluate the correction formula for a linear layer in int64 and float64."""
    qa, qw, za = codes.long(), weight_codes.long(), zero.long()
    products = (qa[..., None, :] * qw).sum(-1)
    exact = products - za * qw.sum(1)
    inputs = qa.sum(-1, keepdim=True) - qa.shape[-1] * za
    y = scale.double() * weight_scale.double() * (exact - weight_zero.double() * inputs)
    return y if bias is None else y + bias.double()


def int_conv2d_reference(
    codes: UInt8[Tensor, "batch channels height width"],
    weight_codes: UInt8[Tensor, "out in_per_group kernel_height kernel_width"],
    *,
    scale: Tensor,
    zero: Tensor,
    weight_scale: Float[Tensor, " out"],
    weight_zero: Float[Tensor, " out"],
    bias: Float[Tensor, " out"] | None = None,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> Float[Tensor, "batch out new_height new_width"]:
    """Evaluate the correction formula for a convolution, one output position after the other."""
    batch, _, height, width = codes.shape
    (down, right), kernel = padding, weight_codes.shape[2:]
    za = zero.reshape(-1).long().expand(batch)
    qa = za[:, None, None, None].repeat(1, codes.shape[1], height + 2 * down, width + 2 * right)
    qa[:, :, down : down + height, right : right + width] = codes.long()
    qw = weight_codes.long().unflatten(0, (groups, -1))
    reach = [dilation[axis] * (kernel[axis] - 1) + 1 for axis in (0, 1)]
    size = [(qa.shape[2 + axis] - reach[axis]) // stride[axis] + 1 for axis in (0, 1)]
    y = torch.empty(batch, len(weight_scale), *size, dtype=torch.float64)
    for row in range(size[0]):
        for column in range(size[1]):
            top, left = row * stride[0], column * stride[1]
            patch = qa[:, :, top : top + reach[0], left : left + reach[1]]
            patch = patch[:, :, :: dilation[0], :: dilation[1]].unflatten(1, (groups, -1))
            products = torch.einsum("bgihw,goihw->bgo", patch, qw)
            exact = products - za[:, None, None] * qw.sum((2, 3, 4))
            inputs = patch.sum((2, 3, 4)) - prod(weight_codes.shape[1:]) * za[:, None]
            inputs = inputs.repeat_interleave(qw.shape[1], dim=1)
            y[:, :, row, column] = exact.flatten(1) - weight_zero.double() * inputs
    y *= scale.reshape(-1).double().expand(batch)[:, None, None, None]
    y *= weight_scale.double()[:, None, None]
    return y if bias is None else y + bias.double()[:, None, None]
