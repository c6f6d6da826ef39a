# SPDX-License-Identifier: Apache-2.0
"""Linear layers and convolutions on integer codes, exact up to the last float operations.

For activations ``d_a (qa - z_a)`` and weight rows ``d_c (qw - z_c)`` of K codes each,

    y = d_a d_c (sum qa qw - z_a sum qw - z_c (sum qa - K z_a)) + bias

``z_a`` is an integer, ``z_c`` may be any real number. The formula holds for codes and zero points
shifted by the same amount, so unsigned 8-bit codes become int8 operands: activations shift by
128, every weight row by the integer next to ``z_c`` that fits. What is left of ``z_c`` is then
small, or zero, and the sum of ``qa`` is one more row of ones in the matrix product. Products
accumulate in int32.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int8, UInt8
from torch import Tensor

from tenfold_core.errors import InputError

__all__ = ["IntWeight", "int8_product", "int_conv1d", "int_conv2d", "int_linear"]

_MULTIPLE = 8  # of both inner and outer sizes, and more than 16 rows: torch._int_mm on CUDA
_MIN_ROWS = 24
_MAX_INNER = 65_793  # (2**31 - 1) // (255 * 128): the largest sum int32 surely holds
_FLOAT_INNER = 1024  # 2**24 / 128**2: float32 sums of so many int8 products are exact
_COLUMN_BYTES = 1 << 26  # unfolded patches are made in blocks of this size
_int_mm_exact: bool | None = None


@dataclass(frozen=True)
class IntWeight:
    """Weight codes made ready for the integer product; build it with :meth:`from_codes`."""

    operand: Int8[Tensor, "groups rows inner"]
    """Shifted codes, taps before channels, then a row of ones if ``offset``; zero padding."""
    scale: Float[Tensor, " out"]
    offset: Float[Tensor, " out"] | None
    """What the shift leaves of the zero points; None if nothing is."""
    sums: Int[Tensor, " out"]
    """Sum of every row of shifted codes."""
    shape: tuple[int, ...]
    """``(out, in / groups, *kernel)`` of the layer's weight."""
    groups: int = 1

    @classmethod
    def from_codes(
        cls,
        codes: UInt8[Tensor, "out ..."],
        *,
        scale: Float[Tensor, " scales"],
        zero: Float[Tensor, " zeros"],
        groups: int = 1,
    ) -> "IntWeight":
        """Prepare the unpacked codes of a weight with one scale and zero point per row.

        Raises:
            InputError: Sizes contradict each other, the rows are too long for int32 sums, or a
                scale or zero point is not finite.
        """
        num_out, num_in, inner = codes.shape[0], codes.shape[1], prod(codes.shape[1:])
        if len(scale) != num_out or len(zero) != num_out or num_out % groups:
            raise InputError(
                f"weight codes: {num_out} rows in {groups} groups, with {len(scale)} scales and "
                f"{len(zero)} zero points; expected one of each per row, groups of one size"
            )
        if not 0 < inner <= _MAX_INNER or not num_in:
            raise InputError(
                f"weight codes: rows of {inner} codes, expected 1 to {_MAX_INNER} "
                "for sums in 32 bits"
            )
        if not bool((scale.isfinite() & zero.isfinite()).all()):
            raise InputError("weight codes: a scale or zero point is not finite")
        _int_mm_is_exact()  # measured here, once, so that compiled calls find the answer
        rows = codes.movedim(1, -1).reshape(num_out, inner).to(torch.int32)
        low, high = rows.amax(1) - 127, rows.amin(1) + 128
        shift = zero.float().round().clamp(low.float(), high.float()).to(torch.int32)
        shifted = rows - shift[:, None]
        offset = zero.float() - shift
        blocks = shifted.unflatten(0, (groups, -1))
        if bool(offset.any()):
            blocks = torch.cat((blocks, torch.ones_like(blocks[:, :1])), dim=1)
        pad = (0, -inner % _MULTIPLE, 0, -blocks.shape[1] % _MULTIPLE)
        return cls(
            operand=F.pad(blocks.to(torch.int8), pad),
            scale=scale.float(),
            offset=offset if bool(offset.any()) else None,
            sums=shifted.sum(1, dtype=torch.int32),
            shape=tuple(codes.shape),
            groups=groups,
        )

    def to(self, device: torch.device | str) -> "IntWeight":
        """Return the weight on another device."""
        offset = None if self.offset is None else self.offset.to(device)
        return replace(
            self,
            operand=self.operand.to(device),
            scale=self.scale.to(device),
            offset=offset,
            sums=self.sums.to(device),
        )

    @property
    def nbytes(self) -> int:
        """Return the bytes this form keeps in memory."""
        extra = 0 if self.offset is None else self.offset.nbytes
        return self.operand.nbytes + self.scale.nbytes + self.sums.nbytes + extra


def int_linear(
    codes: UInt8[Tensor, "*batch channels"],
    weight: IntWeight,
    *,
    scale: Float[Tensor, "*#scales"],
    zero: Tensor,
    bias: Float[Tensor, " out"] | None = None,
) -> Float[Tensor, "*batch out"]:
    """Apply a linear layer to activation codes.

    Args:
        codes: Codes of up to 8 bits.
        weight: Prepared weight of shape ``(out, in)``.
        scale: Scale of the activation: one, or broadcasting against ``codes`` with a last axis
            of 1 (per sample, per token).
        zero: Its integer zero point, 0 to 255, of the same form.
        bias: Added at the end.

    Raises:
        InputError: The weight is not that of a linear layer of this width, or a scale or zero
            point varies along the input channels.
    """
    if len(weight.shape) != 2 or weight.groups != 1 or codes.shape[-1] != weight.shape[1]:
        raise InputError(
            f"int_linear: codes {tuple(codes.shape)} do not fit a weight {weight.shape} "
            f"in {weight.groups} groups"
        )
    for name, value in (("scale", scale), ("zero point", zero)):
        if value.dim() and value.shape[-1] != 1:
            raise InputError(
                f"int_linear: {name} of shape {tuple(value.shape)}, its last axis must be 1"
            )
    num_out, num_in = weight.shape
    operand = weight.operand[0]
    rows = _signed(codes).reshape(-1, num_in)
    if operand.shape[1] > num_in:
        rows = F.pad(rows, (0, operand.shape[1] - num_in))
    sums = int8_product(rows, operand).reshape(*codes.shape[:-1], len(operand))
    centre = zero.to(torch.int32) - 128
    value = (sums[..., :num_out] - centre * weight.sums).to(torch.float32)
    if weight.offset is not None:
        moved = (sums[..., num_out : num_out + 1] - num_in * centre).to(torch.float32)
        value = torch.addcmul(value, weight.offset, moved, value=-1)
    factor = scale.to(torch.float32) * weight.scale
    return value * factor if bias is None else torch.addcmul(bias.to(torch.float32), value, factor)


def int_conv2d(
    codes: UInt8[Tensor, "batch channels height width"],
    weight: IntWeight,
    *,
    scale: Float[Tensor, "*#scales"],
    zero: Tensor,
    bias: Float[Tensor, " out"] | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
) -> Float[Tensor, "batch out new_height new_width"]:
    """Apply a convolution to activation codes; padding is with code ``zero``, which means 0.

    Args:
        codes: Codes of up to 8 bits.
        weight: Prepared weight of shape ``(out, in / groups, height, width)``.
        scale: Scale of the activation, one value or one per sample.
        zero: Its integer zero point, 0 to 255, one value or one per sample.
        bias: Added at the end.
        stride: As in ``torch.nn.functional.conv2d``.
        padding: As there; numbers only.
        dilation: As there.

    Raises:
        InputError: Channels, kernel, scales or zero points do not fit the codes.
    """
    if len(weight.shape) != 4:
        raise InputError(f"int_conv2d: expected a weight of 4 axes, got {weight.shape}")
    pairs = _pair(stride), _pair(padding), _pair(dilation)
    return _convolve(codes, weight, scale, zero, bias, *pairs)


def int_conv1d(
    codes: UInt8[Tensor, "batch channels length"],
    weight: IntWeight,
    *,
    scale: Float[Tensor, "*#scales"],
    zero: Tensor,
    bias: Float[Tensor, " out"] | None = None,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
) -> Float[Tensor, "batch out new_length"]:
    """Apply a convolution over one axis, as :func:`int_conv2d` does over two.

    Raises:
        InputError: Channels, kernel, scales or zero points do not fit the codes.
    """
    if len(weight.shape) != 3:
        raise InputError(f"int_conv1d: expected a weight of 3 axes, got {weight.shape}")
    flat = replace(weight, shape=(*weight.shape[:2], 1, weight.shape[2]))
    pairs = (1, stride), (0, padding), (1, dilation)
    return _convolve(codes[:, :, None], flat, scale, zero, bias, *pairs).squeeze(2)


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
    if a.device.type == "cpu" and _int_mm_is_exact():
        return torch._int_mm(a, b.t())
    return _float_product(a[None], b[None])[0]


def _convolve(
    codes: Tensor,
    weight: IntWeight,
    scale: Tensor,
    zero: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> Tensor:
    batch, groups = codes.shape[0], weight.groups
    num_out, per_group = weight.shape[0], weight.shape[0] // groups
    if codes.shape[1] != weight.shape[1] * groups:
        raise InputError(
            f"convolution: codes {tuple(codes.shape)} do not fit a weight {weight.shape} "
            f"in {groups} groups"
        )
    if scale.numel() not in (1, batch) or zero.numel() not in (1, batch):
        raise InputError(
            f"convolution: {scale.numel()} scales and {zero.numel()} zero points for a batch of "
            f"{batch}; expected one, or one per sample"
        )
    centre = zero.reshape(-1, 1).to(torch.int32) - 128  # (batch or 1, 1), against (..., batch, at)
    patches = _patches(_padded(_signed(codes), centre, padding), weight.shape[2:], stride, dilation)
    height, width = patches.shape[1:3]
    sums = torch.cat([_products(part, weight) for part in _blocks(patches)], dim=-2)
    sums = sums.flatten(-2)  # (groups, rows, batch, positions)
    value = sums[:, :per_group] - centre * weight.sums.reshape(groups, per_group, 1, 1)
    value = value.to(torch.float32)
    if weight.offset is not None:
        moved = sums[:, per_group : per_group + 1] - prod(weight.shape[1:]) * centre
        left = weight.offset.reshape(groups, per_group, 1, 1)
        value = torch.addcmul(value, left, moved.to(torch.float32), value=-1)
    value = value.reshape(num_out, batch, -1)
    factor = scale.reshape(-1, 1).to(torch.float32) * weight.scale[:, None, None]
    if bias is not None:
        value = torch.addcmul(bias.to(torch.float32)[:, None, None], value, factor)
    else:
        value = value * factor
    return value.transpose(0, 1).contiguous().view(batch, num_out, height, width)


def _signed(codes: Tensor) -> Tensor:
    # 0..255 to -128..127: flipping the top bit subtracts 128
    return (codes ^ 128).view(torch.int8)


def _padded(x: Tensor, centre: Tensor, padding: tuple[int, int]) -> Tensor:
    """Return ``x`` with channels last, and ``centre`` around it."""
    batch, channels, height, width = x.shape
    down, right = padding
    if not (down or right):
        return x.permute(0, 2, 3, 1).contiguous()
    shape = (batch, height + 2 * down, width + 2 * right, channels)
    out = (
        centre.to(torch.int8)[:, :, None, None]
        .expand(shape)
        .clone(memory_format=torch.contiguous_format)
    )
    out[:, down : down + height, right : right + width] = x.permute(0, 2, 3, 1)
    return out


def _patches(
    x: Tensor, kernel: tuple[int, ...], stride: tuple[int, int], dilation: tuple[int, int]
) -> Tensor:
    """View ``(batch, height, width, in)`` as ``(batch, new_height, new_width, in, *kernel)``."""
    for axis in (0, 1):
        reach = dilation[axis] * (kernel[axis] - 1) + 1
        if reach > x.shape[1 + axis]:
            raise InputError(
                f"convolution: a kernel reaching over {reach} does not fit into the padded "
                f"size {x.shape[1 + axis]}"
            )
        x = x.unfold(1 + axis, reach, stride[axis])
    return x[..., :: dilation[0], :: dilation[1]]


def _blocks(patches: Tensor) -> Iterator[Tensor]:
    """Split the output rows so that the copied patches stay within ``_COLUMN_BYTES``."""
    per_row = max(1, patches.numel() // max(1, patches.shape[1]))
    yield from patches.split(max(1, _COLUMN_BYTES // per_row), dim=1)


def _products(patches: Tensor, weight: IntWeight) -> Tensor:
    """Return the int32 sums ``(groups, rows, batch, new_height, new_width)``."""
    batch, height, width = patches.shape[:3]
    split = patches.unflatten(3, (weight.groups, -1)).permute(3, 0, 1, 2, 5, 6, 4)
    columns = split.reshape(weight.groups, batch * height * width, -1)
    spare = weight.operand.shape[2] - columns.shape[2]
    if spare:
        columns = F.pad(columns, (0, spare))
    if weight.groups == 1:
        sums = int8_product(weight.operand[0], columns[0])[None]
    else:
        sums = _float_product(weight.operand, columns)
    return sums.reshape(weight.groups, -1, batch, height, width)


def _padded_product(a: Tensor, b: Tensor) -> Tensor:
    inner = -a.shape[1] % _MULTIPLE
    if spare := max(0, _MIN_ROWS - a.shape[0]):
        rows = F.pad(a, (0, inner, 0, spare))
    else:
        rows = F.pad(a, (0, inner)) if inner else a.contiguous()
    columns = F.pad(b, (0, inner, 0, -b.shape[0] % _MULTIPLE))
    return torch._int_mm(rows, columns.contiguous().t())[: a.shape[0], : b.shape[0]]


def _float_product(a: Tensor, b: Tensor) -> Tensor:
    sums = a.new_zeros(a.shape[0], a.shape[1], b.shape[1], dtype=torch.int32)
    with torch.autocast(a.device.type, enabled=False):  # bfloat16 would round the sums
        for start in range(0, a.shape[2], _FLOAT_INNER):
            part = slice(start, start + _FLOAT_INNER)
            sums += torch.bmm(a[..., part].float(), b[..., part].float().mT).to(torch.int32)
    return sums


def _int_mm_is_exact() -> bool:
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


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value
