# SPDX-License-Identifier: Apache-2.0
"""Integer layers in one Triton kernel each; importing this module needs triton.

``conv_layer`` is a convolution as a matrix product whose patches are gathered while it runs:
int8 operands, int32 sums, and the float operations of :mod:`.integer` at the end, so no sum is
written to memory. ``packed_linear`` is for few rows: it reads codes of 1 to 8 bits as
:mod:`.packing` stores them.

The sums are exact. The kernel fuses both products with the sums that follow them, as torch does on
most devices; where torch does not, a product is rounded once more. With ``u = 2**-24`` results then
differ by at most ``2 u (|offset inputs factor| + |value factor| + |result|)``, and else not at all.

Tile sizes are chosen by rule, not tuned: no figure here was measured on a device.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int, Int8, UInt8
from torch import Tensor

from tenfold_core.errors import InputError
from tenfold_core.quant.packing import row_nbytes

__all__ = ["INTERPRETED", "conv_layer", "packed_linear"]

MIN_TILE = 16
"""Least rows and columns of a tile that tensor cores multiply."""


@triton.jit
def _conv_kernel(
    codes, zero, scale, operand, row_sums, weight_scale, offset, bias, out,
    positions, num_out, channels, inner, height, width, out_height, out_width,
    batch_stride, channel_stride, row_stride, column_stride, positions_per_zero,
    positions_per_scale,
    TAPS_DOWN: tl.constexpr, TAPS_RIGHT: tl.constexpr, STRIDE_DOWN: tl.constexpr,
    STRIDE_RIGHT: tl.constexpr, PAD_DOWN: tl.constexpr, PAD_RIGHT: tl.constexpr,
    DILATION_DOWN: tl.constexpr, DILATION_RIGHT: tl.constexpr,
    OFFSET: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute BLOCK_M positions of BLOCK_N output channels; codes are shifted by 128 to int8."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row, column = m < positions, n < num_out
    sample = (m // (out_height * out_width)).to(tl.int64)
    top = m // out_width % out_height * STRIDE_DOWN - PAD_DOWN
    left = m % out_width * STRIDE_RIGHT - PAD_RIGHT
    centre = tl.load(zero + m // positions_per_zero, mask=row, other=128) - 128
    beside = centre.to(tl.int8)[:, None]  # what lies around the image
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    moved = tl.zeros((BLOCK_M, 16), tl.int32)  # one column, as often as a tile needs it
    blocks = tl.cdiv(channels, BLOCK_K)
    for step in range(0, TAPS_DOWN * TAPS_RIGHT * blocks):
        tap = step // blocks
        channel = step % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
        h = top + tap // TAPS_RIGHT * DILATION_DOWN
        w = left + tap % TAPS_RIGHT * DILATION_RIGHT
        inside = (row & (h >= 0) & (h < height) & (w >= 0) & (w < width))[:, None]
        used = channel < channels
        at = (sample * batch_stride + h * row_stride + w * column_stride)[:, None]
        at += channel[None, :] * channel_stride
        a = tl.load(codes + at, mask=inside & used[None, :], other=0)
        a = tl.where(inside, (a ^ 128).to(tl.int8, bitcast=True), beside)
        at = n[None, :].to(tl.int64) * inner + (tap * channels + channel)[:, None]
        b = tl.load(operand + at, mask=column[None, :] & used[:, None], other=0)
        sums = tl.dot(a, b, sums, out_dtype=tl.int32)
        if OFFSET:
            ones = tl.broadcast_to(used[:, None], (BLOCK_K, 16)).to(tl.int8)
            moved = tl.dot(a, ones, moved, out_dtype=tl.int32)
    sums -= centre[:, None] * tl.load(row_sums + n, mask=column, other=0)[None, :]
    value = sums.to(tl.float32)
    if OFFSET:
        inputs = tl.max(moved, axis=1) - TAPS_DOWN * TAPS_RIGHT * channels * centre
        left_over = tl.load(offset + n, mask=column, other=0.0)[None, :]
        value = tl.fma(-left_over, inputs.to(tl.float32)[:, None], value)
    factor = tl.load(scale + m // positions_per_scale, mask=row, other=0.0)[:, None]
    factor = factor * tl.load(weight_scale + n, mask=column, other=0.0)[None, :]
    if BIAS:
        value = tl.fma(value, factor, tl.load(bias + n, mask=column, other=0.0)[None, :])
    else:
        value = value * factor
    at = m[:, None].to(tl.int64) * num_out + n[None, :]
    tl.store(out + at, value, mask=row[:, None] & column[None, :])


@triton.jit
def _packed_kernel(
    x, data, scale, zero, bias, out, rows, num_out, channels, row_bytes,
    BITS: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute BLOCK_M rows of BLOCK_N outputs from the bit streams of the weight's rows.

    Codes are taken from the middle of their range, so that fewer digits cancel at the end.
    """
    MIDDLE: tl.constexpr = 1 << (BITS - 1)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row, column = m < rows, n < num_out
    stream = data + n[None, :].to(tl.int64) * row_bytes
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, channels, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        used = k < channels
        at = m[:, None].to(tl.int64) * channels + k[None, :]
        a = tl.load(x + at, mask=row[:, None] & used[None, :], other=0.0)
        byte = (k * BITS // 8)[:, None]
        there = column[None, :] & used[:, None]
        word = tl.load(stream + byte, mask=there, other=0).to(tl.int32)
        if 8 % BITS != 0:
            after = there & (byte + 1 < row_bytes)
            word |= tl.load(stream + byte + 1, mask=after, other=0).to(tl.int32) << 8
        code = (word >> (k * BITS % 8)[:, None]) & ((1 << BITS) - 1)
        sums = tl.dot(a, (code - MIDDLE).to(a.dtype), sums, input_precision="ieee")
        total += tl.sum(a.to(tl.float32), axis=1)
    shift = tl.load(zero + n, mask=column, other=0.0) - MIDDLE
    value = sums - shift[None, :] * total[:, None]
    value = value * tl.load(scale + n, mask=column, other=0.0)[None, :]
    if BIAS:
        value += tl.load(bias + n, mask=column, other=0.0)[None, :]
    at = m[:, None].to(tl.int64) * num_out + n[None, :]
    tl.store(out + at, value.to(out.dtype.element_ty), mask=row[:, None] & column[None, :])


INTERPRETED = not isinstance(_conv_kernel, triton.runtime.JITFunction)
"""Whether the kernels run on the CPU, one program after another, instead of being compiled."""


def conv_layer(
    codes: UInt8[Tensor, "batch channels height width"],
    zero: Int[Tensor, " zeros"],
    scale: Float[Tensor, " scales"],
    operand: Int8[Tensor, "1 padded_rows inner"],
    row_sums: Int[Tensor, " out"],
    weight_scale: Float[Tensor, " out"],
    offset: Float[Tensor, " out"] | None,
    bias: Float[Tensor, " out"] | None,
    *,
    shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    size: Sequence[int],
) -> Float[Tensor, "batch out new_height new_width"]:
    """Apply a convolution without groups to codes of any strides, channels last in memory.

    Args:
        codes: Activation codes.
        zero: Their zero points, int32: of all positions in equal parts (one, one of every sample,
            one of every position).
        scale: Their scales, float32, likewise.
        operand: Of :class:`~tenfold_core.quant.integer.IntWeight`, like all of the weight below.
        row_sums: Sums of the weight's codes.
        weight_scale: Scales of the weight.
        offset: What is left of its zero points.
        bias: Added at the end, float32.
        shape: ``(out, in, height, width)`` of the weight.
        stride: As in ``torch.nn.functional.conv2d``.
        padding: As there.
        dilation: As there.
        size: Height and width of the output.
    """
    batch, positions = codes.shape[0], codes.shape[0] * size[0] * size[1]
    out = torch.empty(batch, *size, shape[0], dtype=torch.float32, device=codes.device)
    if positions and shape[0]:
        block_m, block_n = _tile(positions, 128), _tile(shape[0], 128)
        grid = (triton.cdiv(positions, block_m), triton.cdiv(shape[0], block_n))
        _conv_kernel[grid](
            codes, zero, scale, operand, row_sums, weight_scale,
            row_sums if offset is None else offset, row_sums if bias is None else bias, out,
            positions, *shape[:2], operand.shape[2], *codes.shape[2:], *size, *codes.stride(),
            positions // zero.shape[0], positions // scale.shape[0],
            *shape[2:], *stride, *padding, *dilation,
            OFFSET=offset is not None, BIAS=bias is not None,
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=64,
            num_warps=8 if block_m * block_n >= 128 * 128 else 4, num_stages=3,
        )  # fmt: skip
    return out.permute(0, 3, 1, 2)


def packed_linear(
    x: Float[Tensor, "*batch channels"],
    data: UInt8[Tensor, "out row_bytes"],
    *,
    bits: int,
    scale: Float[Tensor, " out"],
    zero: Float[Tensor, " out"],
    bias: Float[Tensor, " out"] | None = None,
) -> Float[Tensor, "*batch out"]:
    """Return ``x w^T + bias`` for ``w = scale (code - zero)``, reading packed codes as they are.

    For few rows, where reading the weight is what takes the time: the codes are the only bytes of
    it that are read. A weight of several widths is one call for each group of rows.

    Args:
        x: Activations, float32, float16 or bfloat16; the result has their type, sums float32.
        data: Rows of :func:`~tenfold_core.quant.packing.pack_rows`.
        bits: Their width, 1 to 8.
        scale: Step of every row.
        zero: Zero point of every row.
        bias: Added at the end.

    Raises:
        InputError: The bytes are not those of rows of this width.
    """
    channels, num_out = x.shape[-1], data.shape[0]
    if bits not in range(1, 9) or data.shape[1:] != (row_nbytes(channels, bits),):
        raise InputError(
            f"packed rows: found {tuple(data.shape)} bytes, expected (rows, "
            f"{row_nbytes(channels, bits)}) for {channels} codes of {bits} bits, 1 to 8"
        )
    rows = x.reshape(-1, channels).contiguous()
    out = torch.empty(rows.shape[0], num_out, dtype=x.dtype, device=x.device)
    if out.numel():
        block_m = _tile(rows.shape[0], 64)
        grid = (triton.cdiv(rows.shape[0], block_m), triton.cdiv(num_out, 32))
        factors = [value.to(torch.float32).contiguous() for value in (scale, zero)]
        _packed_kernel[grid](
            rows, data.contiguous(), *factors, factors[0] if bias is None else bias.float(), out,
            rows.shape[0], num_out, channels, data.shape[1],
            BITS=bits, BIAS=bias is not None, BLOCK_M=block_m, BLOCK_N=32, BLOCK_K=128,
            num_warps=4, num_stages=3,
        )  # fmt: skip
    return out.view(*x.shape[:-1], num_out)


def _tile(count: int, most: int) -> int:
    return min(most, max(MIN_TILE, triton.next_power_of_2(count)))
