# SPDX-License-Identifier: Apache-2.0
"""Sums of uint8 codes and int8 weights by oneDNN on CPUs, as float32.

With scales of one and a bias of whole numbers the result is the int32 sum, converted. The
operators are private ones of torch: :func:`onednn_is_exact` says whether they are there and
whether this CPU sums exactly.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["onednn_conv", "onednn_is_exact", "onednn_linear"]

_onednn_exact: bool | None = None


@dataclass(frozen=True)
class _Form:
    """A weight in oneDNN's order, and the constants that its operators want beside it."""

    weight: Tensor
    scale: Tensor
    zero: Tensor


_forms = WeakTensorKeyDictionary()  # from an operand to its forms: they go when the operand goes


def onednn_linear(codes: Tensor, operand: Tensor, num_out: int, bias: Tensor | None) -> Tensor:
    """Return ``sum qa qw + bias`` in float32, for a narrow weight."""

    def make() -> _Form:
        weight = operand[0, :num_out, : codes.shape[1]].contiguous()
        return _form(torch.ops.onednn.qlinear_prepack(weight, None), num_out)

    form = _remembered(operand, (num_out, codes.shape[1]), make)
    return torch.ops.onednn.qlinear_pointwise(
        codes.contiguous(), 1.0, 0, form.weight, form.scale, form.zero, bias,
        1.0, 0, torch.float32, "none", [], "",
    )  # fmt: skip


def onednn_conv(
    x: Tensor, operand: Tensor, shape: Sequence[int], stride: Sequence[int],
    dilation: Sequence[int], bias: Tensor | None, zero: int = 0,
) -> Tensor:  # fmt: skip
    """Return ``sum (qa - zero) qw + bias`` in float32; exact without bias, or if narrow."""
    num_out, channels, *kernel = shape
    if kernel == [1, 1] and tuple(stride) == (1, 1) and not zero:
        # The order of a 1x1 convolution's weight depends on the image: a product's does not.
        rows = x.permute(0, 2, 3, 1)
        value = onednn_linear(rows.reshape(-1, channels), operand, num_out, bias)
        return value.view(*rows.shape[:3], num_out).permute(0, 3, 1, 2)

    def make() -> _Form:
        rows = operand[0, :num_out, : prod(shape[1:])]
        weight = rows.reshape(num_out, *kernel, channels).permute(0, 3, 1, 2).contiguous()
        return _form(_ordered_conv(weight, x, stride, dilation, zero), num_out)

    key = (*shape, *stride, *dilation, zero > 0, x.shape if kernel == [1, 1] else None)
    return _convolved(x, _remembered(operand, key, make), stride, dilation, bias, zero)


def _remembered(operand: Tensor, key: tuple[object, ...], make: Callable[[], _Form]) -> _Form:
    version = None if operand.is_inference() else operand._version
    forms = _forms.setdefault(operand, {})
    if forms.get("version", version) != version:
        forms.clear()
    forms["version"] = version
    if key not in forms:
        forms[key] = make()
    return forms[key]


def _form(weight: Tensor, num_out: int) -> _Form:
    return _Form(weight, torch.ones(num_out), torch.zeros(num_out, dtype=torch.int64))


def _ordered_conv(
    weight: Tensor, x: Tensor, stride: Sequence[int], dilation: Sequence[int], zero: int
) -> Tensor:
    scale = torch.ones(len(weight))
    return torch.ops.onednn.qconv_prepack(
        weight, scale, 1.0, zero, stride, [0, 0], dilation, 1, x.shape
    )


def _convolved(
    x: Tensor, form: _Form, stride: Sequence[int], dilation: Sequence[int],
    bias: Tensor | None, zero: int,
) -> Tensor:  # fmt: skip
    return torch.ops.onednn.qconv2d_pointwise(
        x, 1.0, zero, form.weight, form.scale, form.zero, bias, stride, [0, 0], dilation, 1,
        1.0, 0, torch.float32, "none", [], "",
    )  # fmt: skip


def onednn_is_exact() -> bool:
    """Try the extremes once, with and without a zero point, by one tap and by nine."""
    global _onednn_exact
    if _onednn_exact is None:
        try:
            _onednn_exact = all(_onednn_agrees(size, zero) for size in (1, 3) for zero in (0, 255))
        except (AttributeError, NotImplementedError, RuntimeError):  # private: they may go
            _onednn_exact = False
    return _onednn_exact


def _onednn_agrees(size: int, zero: int) -> bool:
    signs = torch.tensor([-128, 127], dtype=torch.int8, device="cpu").repeat(16)
    operand = signs[:, None].repeat(1, 64 * size * size)[None]
    codes = torch.tensor([0, 255], dtype=torch.uint8, device="cpu").repeat(18).view(1, 6, 6, 1)
    codes = codes.expand(1, 6, 6, 64).contiguous().permute(0, 3, 1, 2)
    shape = (32, 64, size, size)
    found = onednn_conv(codes, operand, shape, (1, 1), (1, 1), None, zero)
    weight = operand.view(32, 64, size, size).double()
    return torch.equal(found.double(), F.conv2d(codes.double() - zero, weight))
