# SPDX-License-Identifier: Apache-2.0
"""Exact integer sums of products, the part of :mod:`.integer` below its float operations.

Two operators, opaque to ``torch.compile``, take codes ``qa`` and shifted weight codes ``qw``:

    value[c] = sum (qa - z) qw[c]        inputs = sum (qa - z)

summed exactly and rounded once to float32; convolutions count nothing where they pad. On CPUs
whose oneDNN sums uint8 x int8 exactly (it is tried once) that is its convolution with scales of
one, 3 to 4 times faster than unfolding patches. Elsewhere patches are unfolded and multiplied by
``torch._int_mm`` where that is exact, else by float32 products of few enough terms.
"""

from collections.abc import Iterator, Sequence
from math import prod

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int8, UInt8
from torch import Tensor

from tenfold_core.errors import InputError
from tenfold_core.quant.integer_onednn import onednn_conv, onednn_is_exact, onednn_linear

__all__ = ["conv_sums", "int8_product", "is_narrow", "linear_sums", "output_size"]

MULTIPLE = 8
"""Of both inner and outer sizes of an operand: ``torch._int_mm`` on CUDA wants it."""
_MIN_ROWS = 24  # it also wants more than 16 rows
_FLOAT_INNER = 1024  # 2**24 / 128**2: float32 sums of so many int8 products are exact
_COLUMN_BYTES = 1 << 26  # unfolded patches are made in blocks of this size
_int_mm_exact: bool | None = None


def is_narrow(shifted: Int[Tensor, "out inner"]) -> bool:
    """Whether float32 holds every sum of these weight codes with uint8 codes exactly."""
    return 255 * int(shifted.abs().sum(1).max()) < 1 << 24


def linear_sums(
    codes: UInt8[Tensor, "rows channels"],
    zero: Int[Tensor, "#rows 1"],
    operand: Int8[Tensor, "1 padded_rows inner"],
    row_sums: Int[Tensor, " out"],
    *,
    narrow: bool,
    inputs: bool,
    passing: bool = False,
) -> tuple[Float[Tensor, "rows out"], Float[Tensor, "rows 1"]]:
    """Return ``value`` and ``inputs`` of a linear layer.

    Args:
        codes: Activation codes.
        zero: Their zero point, one or one for each row; int32.
        operand: Shifted weight codes, then a row of ones if ``inputs`` are wanted; padded.
        row_sums: Sum of each row of shifted codes.
        narrow: What :func:`is_narrow` says.
        inputs: Whether ``inputs`` are wanted; an empty tensor stands for them if not.
        passing: Whether the operand was made for this call alone.
    """
    few = passing and _is_few(codes, codes.shape[0], row_sums)
    run = _linear_by_product if few else torch.ops.tenfold_core.linear_sums
    return run(codes, zero, operand, row_sums, narrow, inputs)


def conv_sums(
    codes: UInt8[Tensor, "batch channels height width"],
    zero: Int[Tensor, " #batch"],
    operand: Int8[Tensor, "groups padded_rows inner"],
    row_sums: Int[Tensor, " out"],
    *,
    shape: tuple[int, ...],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    narrow: bool,
    inputs: bool,
    passing: bool = False,
) -> tuple[
    Float[Tensor, "batch out new_height new_width"],
    Float[Tensor, "batch groups new_height new_width"],
]:
    """Return ``value`` and ``inputs`` of a convolution, channels last in memory.

    Args:
        codes: Activation codes.
        zero: Their zero point, one or one for each sample; int32.
        operand: Shifted weight codes, taps before channels, as for :func:`linear_sums`.
        row_sums: Sum of each row of shifted codes.
        shape: ``(out, in / groups, height, width)`` of the weight.
        stride: As in ``torch.nn.functional.conv2d``.
        padding: As there.
        dilation: As there.
        narrow: What :func:`is_narrow` says.
        inputs: Whether ``inputs`` are wanted; an empty tensor stands for them if not.
        passing: Whether the operand was made for this call alone.
    """
    size = output_size(codes.shape[2:], shape[2:], stride, padding, dilation)
    few = passing and _is_few(codes, codes.shape[0] * prod(size), row_sums)
    run = _conv_by_columns if few else torch.ops.tenfold_core.conv_sums
    return run(codes, zero, operand, row_sums, shape, stride, padding, dilation, narrow, inputs)


def _is_few(codes: Tensor, count: int, row_sums: Tensor) -> bool:
    """Whether so few products of a row do not repay ordering the weight for oneDNN first.

    On two cores of an EPYC a 3x3 convolution of 256 channels, its weight ordered in each call:
    1.8 instead of 1.1 ms for 64 positions, 3.5 and 3.4 ms for 1024; of 128 channels 2.8 instead
    of 4.2 ms for 4096.
    """
    eager = codes.device.type == "cpu" and not torch.compiler.is_compiling()
    return eager and 0 < count < 4 * row_sums.shape[0]


def output_size(
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int]:
    """Return height and width of a convolution's output.

    Raises:
        InputError: The kernel reaches over more than the padded size.
    """
    out = []
    for axis in (0, 1):
        reach = dilation[axis] * (kernel[axis] - 1) + 1
        padded = size[axis] + 2 * padding[axis]
        if reach > padded:
            raise InputError(
                f"convolution: a kernel reaching over {reach} does not fit into the padded "
                f"size {padded}"
            )
        out.append((padded - reach) // stride[axis] + 1)
    return out[0], out[1]


def int8_product(
    a: Int8[Tensor, "rows inner"], b: Int8[Tensor, "columns inner"]
) -> Int[Tensor, "rows columns"]:
    """Return ``a b^T`` in int32, exactly.

    ``torch._int_mm`` where it is exact, with the padding it wants on CUDA; else float32 products
    of at most 1024 terms, which are exact as well.
    """
    if 0 in (*a.shape, *b.shape):
        return a.new_zeros(a.shape[0], b.shape[0], dtype=torch.int32)
    if a.device.type == "cuda":
        return _padded_product(a, b)
    if a.device.type == "cpu" and a.shape[1] > 1 and int_mm_is_exact():  # garbage for one term
        return torch._int_mm(a, b.t())
    return _float_product(a[None], b[None])[0]


# Two operators: their schemas, their shapes for the compiler, a kernel for every device and a
# faster one for CPUs.

_LINEAR = "tenfold_core::linear_sums"
_CONV = "tenfold_core::conv_sums"
torch.library.define(
    _LINEAR,
    "(Tensor codes, Tensor zero, Tensor operand, Tensor row_sums, bool narrow, bool inputs) "
    "-> (Tensor, Tensor)",
)
torch.library.define(
    _CONV,
    "(Tensor codes, Tensor zero, Tensor operand, Tensor row_sums, int[] shape, int[] stride, "
    "int[] padding, int[] dilation, bool narrow, bool inputs) -> (Tensor, Tensor)",
)
_Sums = tuple[Tensor, Tensor]


@torch.library.register_fake(_LINEAR)
def _linear_shapes(
    codes: Tensor, zero: Tensor, operand: Tensor, row_sums: Tensor, narrow: bool, inputs: bool
) -> _Sums:
    rows = codes.shape[0]
    value = codes.new_empty((rows, row_sums.shape[0]), dtype=torch.float32)
    return value, codes.new_empty((rows, 1) if inputs else (0,), dtype=torch.float32)


@torch.library.register_fake(_CONV)
def _conv_shapes(
    codes: Tensor, zero: Tensor, operand: Tensor, row_sums: Tensor, shape: Sequence[int],
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    narrow: bool, inputs: bool,
) -> _Sums:  # fmt: skip
    batch, size = codes.shape[0], output_size(codes.shape[2:], shape[2:], stride, padding, dilation)
    value = codes.new_empty((batch, *size, shape[0]), dtype=torch.float32).permute(0, 3, 1, 2)
    if not inputs:
        return value, codes.new_empty(0, dtype=torch.float32)
    moved = codes.new_empty((batch, *size, operand.shape[0]), dtype=torch.float32)
    return value, moved.permute(0, 3, 1, 2)


def _linear_by_product(
    codes: Tensor, zero: Tensor, operand: Tensor, row_sums: Tensor, narrow: bool, inputs: bool
) -> _Sums:
    num_out, num_in = row_sums.shape[0], codes.shape[1]
    rows = F.pad(_signed(codes), (0, operand.shape[2] - num_in))
    sums, centre = int8_product(rows, operand[0]), zero - 128
    value = (sums[:, :num_out] - centre * row_sums).to(torch.float32)
    if not inputs:
        return value, value.new_empty(0)
    moved = sums[:, num_out : num_out + 1] - num_in * centre
    return value, moved.to(torch.float32)


def _conv_by_columns(
    codes: Tensor, zero: Tensor, operand: Tensor, row_sums: Tensor, shape: Sequence[int],
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    narrow: bool, inputs: bool,
) -> _Sums:  # fmt: skip
    groups, per_group = operand.shape[0], shape[0] // operand.shape[0]
    size = output_size(codes.shape[2:], shape[2:], stride, padding, dilation)
    centre = zero[:, None] - 128  # against (..., batch, positions)
    x = _surrounded(_signed(codes), centre, padding).permute(0, 2, 3, 1)
    patches = _patches(x, shape[2:], stride, dilation)
    sums = torch.cat([_products(part, operand) for part in _blocks(patches)], dim=-2)
    sums = sums.flatten(-2)  # (groups, rows, batch, positions)
    value = sums[:, :per_group] - centre * row_sums.view(groups, per_group, 1, 1)
    value = _channels_last(value.to(torch.float32).flatten(0, 1), size)
    if not inputs:
        return value, value.new_empty(0)
    moved = sums[:, per_group] - prod(shape[1:]) * centre
    return value, _channels_last(moved.to(torch.float32), size)


def _linear_on_cpu(
    codes: Tensor, zero: Tensor, operand: Tensor, row_sums: Tensor, narrow: bool, inputs: bool
) -> _Sums:
    channels, num_out = codes.shape[1], row_sums.shape[0]
    if not (codes.numel() and num_out and narrow and onednn_is_exact()):
        return _linear_by_product(codes, zero, operand, row_sums, narrow, inputs)
    if zero.shape[0] == 1:
        value = onednn_linear(codes, operand, num_out, row_sums * -float(zero))
    else:
        value = onednn_linear(codes, operand, num_out, None)
        value -= zero.to(torch.float32) * row_sums
    if not inputs:
        return value, value.new_empty(0)
    moved = codes.sum(1, keepdim=True, dtype=torch.int32) - channels * zero
    return value, moved.to(torch.float32)


def _conv_on_cpu(
    codes: Tensor, zero: Tensor, operand: Tensor, row_sums: Tensor, shape: Sequence[int],
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    narrow: bool, inputs: bool,
) -> _Sums:  # fmt: skip
    fits = operand.shape[0] == 1 and (narrow or zero.shape[0] == 1)
    if not (codes.numel() and fits and onednn_is_exact()):
        return _conv_by_columns(
            codes, zero, operand, row_sums, shape, stride, padding, dilation, narrow, inputs
        )
    layer = (operand, shape, stride, dilation)
    if zero.shape[0] > 1:
        x = _surrounded(codes, zero, padding)
        value = onednn_conv(x, *layer, None)
        value -= (zero.to(torch.float32)[:, None] * row_sums)[:, :, None, None]
    else:
        one, (down, right) = int(zero), padding
        x = codes.contiguous(memory_format=torch.channels_last)
        if down or right:
            x = F.pad(x, (right, right, down, down), value=one)
        if narrow:
            value = onednn_conv(x, *layer, row_sums * -float(one))
        else:
            value = onednn_conv(x, *layer, None, one)
    if not inputs:
        return value, value.new_empty(0)
    moved = x.sum(1, keepdim=True, dtype=torch.int32)
    for axis in (0, 1):
        moved = _window_sums(moved, 2 + axis, shape[2 + axis], stride[axis], dilation[axis])
    moved = moved - prod(shape[1:]) * zero[:, None, None, None]
    return value, moved.to(torch.float32)


torch.library.impl(_LINEAR, "CompositeExplicitAutograd", _linear_by_product)
torch.library.impl(_CONV, "CompositeExplicitAutograd", _conv_by_columns)
torch.library.impl(_LINEAR, "CPU", _linear_on_cpu)
torch.library.impl(_CONV, "CPU", _conv_on_cpu)


# Parts of both ways


def _signed(codes: Tensor) -> Tensor:
    # 0..255 to -128..127: flipping the top bit subtracts 128
    return (codes ^ 128).view(torch.int8)


def _surrounded(x: Tensor, zero: Tensor, padding: Sequence[int]) -> Tensor:
    """Return ``x`` with channels last in memory, and ``zero`` around it."""
    batch, channels, height, width = x.shape
    down, right = padding
    if not (down or right):
        return x.contiguous(memory_format=torch.channels_last)
    shape = (batch, height + 2 * down, width + 2 * right, channels)
    out = zero.to(x.dtype).view(-1, 1, 1, 1).expand(shape)
    out = out.clone(memory_format=torch.contiguous_format)
    out[:, down : down + height, right : right + width] = x.permute(0, 2, 3, 1)
    return out.permute(0, 3, 1, 2)


def _window_sums(x: Tensor, axis: int, taps: int, stride: int, dilation: int) -> Tensor:
    """Add the taps of a window along one axis."""
    if taps == stride == 1:
        return x
    return x.unfold(axis, dilation * (taps - 1) + 1, stride)[..., ::dilation].sum(-1)


def _channels_last(rows: Tensor, size: tuple[int, int]) -> Tensor:
    """Return ``(channels, batch, positions)`` as an image, channels last in memory."""
    return rows.permute(1, 2, 0).contiguous().unflatten(1, size).permute(0, 3, 1, 2)


def _patches(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """View ``(batch, height, width, in)`` as ``(batch, new_height, new_width, in, *kernel)``."""
    for axis in (0, 1):
        reach = dilation[axis] * (kernel[axis] - 1) + 1
        x = x.unfold(1 + axis, reach, stride[axis])
    return x[..., :: dilation[0], :: dilation[1]]


def _blocks(patches: Tensor) -> Iterator[Tensor]:
    """Split the output rows so that the copied patches stay within ``_COLUMN_BYTES``."""
    per_row = max(1, patches.numel() // max(1, patches.shape[1]))
    yield from patches.split(max(1, _COLUMN_BYTES // per_row), dim=1)


def _products(patches: Tensor, operand: Tensor) -> Tensor:
    """Return the int32 sums ``(groups, rows, batch, new_height, new_width)``."""
    batch, height, width = patches.shape[:3]
    groups = len(operand)
    split = patches.unflatten(3, (groups, -1)).permute(3, 0, 1, 2, 5, 6, 4)
    columns = split.reshape(groups, batch * height * width, prod(split.shape[4:]))
    spare = operand.shape[2] - columns.shape[2]
    if spare:
        columns = F.pad(columns, (0, spare))
    if groups == 1:
        sums = int8_product(operand[0], columns[0])[None]
    else:
        sums = _float_product(operand, columns)
    return sums.reshape(groups, -1, batch, height, width)


def _padded_product(a: Tensor, b: Tensor) -> Tensor:
    inner = -a.shape[1] % MULTIPLE
    if spare := max(0, _MIN_ROWS - a.shape[0]):
        rows = F.pad(a, (0, inner, 0, spare))
    else:
        rows = F.pad(a, (0, inner)) if inner else a.contiguous()
    columns = F.pad(b, (0, inner, 0, -b.shape[0] % MULTIPLE))
    return torch._int_mm(rows, columns.contiguous().t())[: a.shape[0], : b.shape[0]]


def _float_product(a: Tensor, b: Tensor) -> Tensor:
    sums = a.new_zeros(a.shape[0], a.shape[1], b.shape[1], dtype=torch.int32)
    with torch.autocast(a.device.type, enabled=False):  # bfloat16 would round the sums
        for start in range(0, a.shape[2], _FLOAT_INNER):
            part = slice(start, start + _FLOAT_INNER)
            sums += torch.bmm(a[..., part].float(), b[..., part].float().mT).to(torch.int32)
    return sums


def int_mm_is_exact() -> bool:
    """Try the extremes once: CPUs without VNNI may saturate pairs of products at 16 bits."""
    global _int_mm_exact
    if _int_mm_exact is None:
        signs = torch.tensor([-128, 127], dtype=torch.int8, device="cpu")
        a, b = signs.repeat_interleave(16)[:, None].expand(32, 64), signs.repeat(16)[:, None]
        a, b = a.contiguous(), b.expand(32, 64).contiguous()
        try:
            found = torch._int_mm(a, b.t())
        except (AttributeError, RuntimeError):  # a private function: it may go
            _int_mm_exact = False
        else:
            _int_mm_exact = torch.equal(found, _float_product(a[None], b[None])[0])
    return _int_mm_exact
