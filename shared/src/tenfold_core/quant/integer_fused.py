# SPDX-License-Identifier: Apache-2.0
"""Which integer layers on CUDA run as one kernel, and the operator that runs them.

The operator is opaque to ``torch.compile`` and has no gradients. Triton is imported by its first
call, which is on a CUDA device or not at all.
"""

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from tenfold_core.quant.integer_sums import output_size

__all__ = ["fused_layer", "runs_fused"]

_PRODUCT_ROWS = 1024
_FUSED = "tenfold_core::fused_layer"
torch.library.define(
    _FUSED,
    "(Tensor codes, Tensor zero, Tensor scale, Tensor operand, Tensor row_sums, "
    "Tensor weight_scale, Tensor? offset, Tensor? bias, int[] shape, int[] stride, "
    "int[] padding, int[] dilation) -> Tensor",
)


def runs_fused(codes: Tensor, groups: int, *floats: Tensor | None, product: bool = False) -> bool:
    """Whether a layer runs as one kernel: on CUDA with Triton, without groups and gradients.

    Products of many rows go to ``torch._int_mm`` instead: a library's matrix product gains more
    there than the fused end of ours. The border of 1024 rows is a guess, not a measurement.
    """
    if codes.device.type != "cuda" or groups > 1 or not codes.numel() or not _has_triton():
        return False
    if product and codes.numel() >= _PRODUCT_ROWS * codes.shape[-1]:
        return False
    return not (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in floats))


def fused_layer(
    codes: Tensor,
    zero: Tensor,
    scale: Tensor,
    operand: Tensor,
    row_sums: Tensor,
    weight_scale: Tensor,
    offset: Tensor | None,
    bias: Tensor | None,
    *,
    shape: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
) -> Tensor:
    """Return the output of a convolution; see :func:`.triton_integer.conv_layer`."""
    return torch.ops.tenfold_core.fused_layer(
        codes, zero, scale, operand, row_sums, weight_scale, offset, bias,
        shape, stride, padding, dilation,
    )  # fmt: skip


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


@torch.library.register_fake(_FUSED)
def _shape(
    codes: Tensor, zero: Tensor, scale: Tensor, operand: Tensor, row_sums: Tensor,
    weight_scale: Tensor, offset: Tensor | None, bias: Tensor | None, shape: Sequence[int],
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
) -> Tensor:  # fmt: skip
    size = output_size(codes.shape[2:], shape[2:], stride, padding, dilation)
    out = codes.new_empty((codes.shape[0], *size, shape[0]), dtype=torch.float32)
    return out.permute(0, 3, 1, 2)


def _run(
    codes: Tensor, zero: Tensor, scale: Tensor, operand: Tensor, row_sums: Tensor,
    weight_scale: Tensor, offset: Tensor | None, bias: Tensor | None, shape: Sequence[int],
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
) -> Tensor:  # fmt: skip
    from tenfold_core.quant.triton_integer import conv_layer

    return conv_layer(
        codes, zero, scale, operand, row_sums, weight_scale, offset, bias, shape=shape,
        stride=stride, padding=padding, dilation=dilation,
        size=output_size(codes.shape[2:], shape[2:], stride, padding, dilation),
    )  # fmt: skip


torch.library.impl(_FUSED, "CompositeExplicitAutograd", _run)
