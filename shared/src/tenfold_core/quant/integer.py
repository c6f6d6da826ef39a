# SPDX-License-Identifier: Apache-2.0
"""Linear layers and convolutions on integer codes, exact up to the last float operations.

For activations ``d_a (qa - z_a)`` and weight rows ``d_c (qw - z_c)`` of K codes each,

    y = d_a d_c (sum qa qw - z_a sum qw - z_c (sum qa - K z_a)) + bias

``z_a`` is an integer, ``z_c`` may be any real number. The formula holds for codes and zero points
shifted by the same amount, so unsigned 8-bit codes become int8 operands: activations shift by
128, every weight row by the integer next to ``z_c`` that fits. What is left of ``z_c`` is then
small, or zero. Sums are exact (:mod:`.integer_sums`) and rounded once to float32.
"""

from dataclasses import dataclass, replace
from math import prod

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int8, UInt8
from torch import Tensor

from tenfold_core.errors import InputError
from tenfold_core.quant.integer_fused import fused_layer, runs_fused
from tenfold_core.quant.integer_sums import (
    MULTIPLE,
    conv_sums,
    int8_product,
    is_narrow,
    linear_sums,
    output_size,
)

__all__ = [
    "IntWeight",
    "activation_codes",
    "int8_product",
    "int_conv1d",
    "int_conv2d",
    "int_linear",
]

_MAX_INNER = 65_793  # (2**31 - 1) // (255 * 128): the largest sum int32 surely holds
_ROUNDING = float(1 << 23)  # from here to 2**24 float32 holds the whole numbers and nothing else


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
    narrow: bool = False
    """Whether float32 holds every sum with codes of 8 bits, so that it may be summed in parts."""
    passing: bool = False
    """Whether the operand is made anew in every call, see :meth:`with_codes`."""

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
        rows = _taps_first(codes)
        low, high = rows.amax(1).float() - 127, rows.amin(1).float() + 128
        shift = zero.float().round().clamp(low, high)
        shifted, offset = _shifted(rows, shift), zero.float() - shift
        sums = _row_sums(shifted)
        magnitudes = sums - 2 * _row_sums(shifted.clamp(max=0))
        left = bool(offset.any())
        return cls(
            operand=_operand(shifted, groups, ones=left),
            scale=scale.float(),
            offset=offset if left else None,
            sums=sums,
            shape=tuple(codes.shape),
            groups=groups,
            narrow=is_narrow(magnitudes[:, None]),
        )

    def with_codes(
        self, codes: UInt8[Tensor, "out ..."], zero: Float[Tensor, " zeros"]
    ) -> "IntWeight":
        """Return this weight with its operand made anew from the codes it was built from.

        For callers who keep codes packed between two calls. Nothing is checked or waited for, so
        it compiles.
        """
        shift = zero.float() if self.offset is None else zero.float() - self.offset
        shifted = _shifted(_taps_first(codes), shift)
        operand = _operand(shifted, self.groups, ones=self.offset is not None)
        return replace(self, operand=operand, passing=True)

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
        """Return the bytes of the tensors; a CPU keeps the operand in a second order as well."""
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
    rows = codes.reshape(-1, weight.shape[1])
    if zero.numel() > 1:
        zero = zero.expand(*codes.shape[:-1], 1)
    zero = zero.reshape(-1, 1).to(torch.int32)
    if runs_fused(codes, 1, scale, bias, product=True):
        image = rows.t()[None, :, :, None]
        scales = scale.expand(*codes.shape[:-1], 1) if scale.numel() > 1 else scale
        value = _fused(image, weight, scales, zero, bias, shape=(*weight.shape, 1, 1))
        return value.permute(0, 2, 3, 1).reshape(*codes.shape[:-1], weight.shape[0])
    value, inputs = linear_sums(
        rows,
        zero,
        weight.operand,
        weight.sums,
        narrow=weight.narrow,
        inputs=weight.offset is not None,
        passing=weight.passing,
    )
    if weight.offset is not None:
        value = torch.addcmul(value, weight.offset, inputs, value=-1)
    value = value.reshape(*codes.shape[:-1], weight.shape[0])
    return _scaled(value, scale.to(torch.float32) * weight.scale, bias)


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

    The result lies in memory with channels last, like that of a channels-last convolution.

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


def activation_codes(
    x: Float[Tensor, "*shape"],
    multiplier: Float[Tensor, "..."],
    zero: Tensor,
    qmax: int,
    *,
    channel_axis: int,
) -> UInt8[Tensor, "*shape"]:
    """Return ``clamp(round(x * multiplier + zero), 0, qmax)``, halves rounded to even.

    Every operation rounds to float32 as written, whatever the type of ``x``; nothing is fused.
    The strides of ``x`` are kept, so channels-last activations give channels-last codes, which
    convolutions on CPUs want.

    Args:
        x: Activations, without NaN.
        multiplier: One over the scale: one value, one of every channel, (channels,) or
            (1 or batch, channels) with the first axis of ``x`` as batch, or anything of as many
            axes as ``x`` that broadcasts against it.
        zero: Zero point: one value, one of every sample, (batch,), or anything of as many axes as
            ``x`` that broadcasts against it.
        qmax: Largest code, 1 to 255.
        channel_axis: Axis of the channels: 1 for convolutions, -1 for linear layers.

    Raises:
        InputError: ``multiplier`` or ``zero`` has another shape.

    Example:
        >>> x, multiplier = torch.tensor([[-0.3, 0.5, 9.0]]), torch.tensor([[10.0, 5.0, 10.0]])
        >>> activation_codes(x, multiplier, torch.tensor(4), 15, channel_axis=1)
        tensor([[ 1,  6, 15]], dtype=torch.uint8)
    """
    multiplier, zero = _against(x, multiplier, channel_axis), _against(x, zero, 0)
    value = x.to(torch.float32) * multiplier.to(torch.float32)
    if torch.compiler.is_compiling():
        return (value + zero.to(torch.float32)).round().clamp(0, qmax).to(torch.uint8)
    # In place, and with the whole number in the low bits, since the conversion from float32 to
    # uint8 is not vectorized: 0.10 instead of 0.25 ms for 4x128x32x32 on two cores of an EPYC.
    value.add_(zero.to(torch.float32)).clamp_(0, qmax).add_(_ROUNDING)
    return value.view(torch.int32).to(torch.uint8)


def _against(x: Tensor, value: Tensor, axis: int) -> Tensor:
    """View one value, or one of every channel or sample, so that it broadcasts against ``x``."""
    if value.numel() == 1:
        return value.reshape(())
    if value.dim() == x.dim():
        return value
    axis %= x.dim()
    shape = [1] * x.dim()
    shape[axis] = x.shape[axis]
    if value.dim() == 2 and axis and value.shape[0] in (1, x.shape[0]):
        shape[0] = value.shape[0]
    if value.numel() != prod(shape) or value.dim() > 2:
        raise InputError(
            f"activation codes: a multiplier or zero point of shape {tuple(value.shape)} does not "
            f"fit activations {tuple(x.shape)} with channels on axis {axis}"
        )
    return value.reshape(shape)


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
    batch = codes.shape[0]
    if codes.shape[1] != weight.shape[1] * weight.groups:
        raise InputError(
            f"convolution: codes {tuple(codes.shape)} do not fit a weight {weight.shape} "
            f"in {weight.groups} groups"
        )
    if scale.numel() not in (1, batch) or zero.numel() not in (1, batch):
        raise InputError(
            f"convolution: {scale.numel()} scales and {zero.numel()} zero points for a batch of "
            f"{batch}; expected one, or one per sample"
        )
    output_size(codes.shape[2:], weight.shape[2:], stride, padding, dilation)
    if runs_fused(codes, weight.groups, scale, bias):
        where = {"stride": stride, "padding": padding, "dilation": dilation}
        return _fused(codes, weight, scale, zero, bias, shape=weight.shape, **where)
    value, inputs = conv_sums(
        codes,
        zero.reshape(-1).to(torch.int32),
        weight.operand,
        weight.sums,
        shape=weight.shape,
        stride=stride,
        padding=padding,
        dilation=dilation,
        narrow=weight.narrow,
        inputs=weight.offset is not None,
        passing=weight.passing,
    )
    column = (slice(None), None, None)
    if weight.offset is not None:
        if weight.groups > 1:
            inputs = inputs.repeat_interleave(weight.shape[0] // weight.groups, dim=1)
        value = torch.addcmul(value, weight.offset[column], inputs, value=-1)
    factor = scale.reshape(-1, 1, 1, 1).to(torch.float32) * weight.scale[column]
    return _scaled(value, factor, None if bias is None else bias[column])


def _scaled(value: Tensor, factor: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``value * factor + bias``, in the memory of ``value`` where nobody notices."""
    needed = torch.is_grad_enabled() or torch.compiler.is_compiling()
    out = None if needed or factor.dim() > value.dim() else value
    if bias is None:
        return torch.mul(value, factor, out=out)
    return torch.addcmul(bias.to(torch.float32), value, factor, out=out)


def _fused(
    codes: Tensor,
    weight: IntWeight,
    scale: Tensor,
    zero: Tensor,
    bias: Tensor | None,
    **where: tuple[int, ...],
) -> Tensor:
    return fused_layer(
        codes,
        zero.reshape(-1).to(torch.int32),
        scale.reshape(-1).to(torch.float32),
        weight.operand,
        weight.sums,
        weight.scale,
        weight.offset,
        None if bias is None else bias.to(torch.float32),
        **where,
    )


def _taps_first(codes: Tensor) -> Tensor:
    """Return the rows of a weight with the kernel's taps before the channels."""
    rows = codes.flatten(2).transpose(1, 2) if codes.dim() > 2 else codes
    return rows.reshape(codes.shape[0], -1)


def _shifted(rows: Tensor, shift: Tensor) -> Tensor:
    """Subtract from every row its shift, as bytes: what wraps around comes out right."""
    return (rows - shift.to(torch.int32).to(torch.uint8)[:, None]).view(torch.int8)


def _row_sums(rows: Tensor) -> Tensor:
    # a product with ones: 0.13 ns a weight instead of the 3.6 of sum(dtype=int32) on one core
    ones = torch.ones(MULTIPLE, rows.shape[1], dtype=torch.int8, device=rows.device)
    return int8_product(rows, ones)[:, 0].contiguous()


def _operand(shifted: Tensor, groups: int, *, ones: bool) -> Tensor:
    blocks = shifted.unflatten(0, (groups, -1))
    rows, inner = blocks.shape[1:]
    pad = (0, -inner % MULTIPLE, 0, -(rows + ones) % MULTIPLE + ones)
    operand = F.pad(blocks, pad)
    if ones:
        operand[:, rows, :inner] = 1
    return operand


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value
