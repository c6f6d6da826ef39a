# SPDX-License-Identifier: Apache-2.0
"""Codes as tensors, on any device: of inputs, rounded; of weights, unpacked."""

import torch
from jaxtyping import Float, UInt8
from tenfold_core.errors import InputError
from torch import Tensor

__all__ = ["activation_codes", "per_sample", "unpack_bits"]


def activation_codes(
    x: Float[Tensor, "..."],
    multiplier: Float[Tensor, "samples channels"],
    zero: Float[Tensor, " samples"],
    qmax: int,
    axis: int,
) -> UInt8[Tensor, "..."]:
    """Return `clamp(round(x * multiplier + zero), 0, qmax)`.

    Args:
        x: values of any float type.
        multiplier: for one sample or all, for one channel or all.
        zero: whole numbers, for one sample or all.
        qmax: the largest code.
        axis: where `x` has its channels: 1, or -1.
    """
    samples, channels = multiplier.shape
    if x.dim() == 1:
        shape = (channels,)
    elif axis == 1:
        shape = (samples, channels, *[1] * (x.dim() - 2))
    else:
        shape = (samples, *[1] * (x.dim() - 2), channels)
    value = x.float() * multiplier.reshape(shape) + zero.reshape(-1, *[1] * (x.dim() - 1))
    return value.round_().clamp_(0, qmax).to(torch.uint8)


def per_sample(value: Float[Tensor, " steps"], x: Float[Tensor, "..."]) -> Float[Tensor, " items"]:
    """Repeat the values of a batch for an input with several items of each sample, in order.

    Raises:
        InputError: the items do not divide by the samples.
    """
    count = value.shape[0]
    if x.shape[0] % count:
        raise InputError(
            f"input: first axis of {tuple(x.shape)} is no multiple of the {count} timesteps of "
            "this call"
        )
    return value if x.shape[0] == count else value.repeat_interleave(x.shape[0] // count)


def unpack_bits(
    data: UInt8[Tensor, "rows size"], bits: int, columns: int
) -> UInt8[Tensor, "rows columns"]:
    """Return the codes of row streams, `columns` of each.

    Code k begins at bit k * bits. Eight codes take `bits` whole bytes, so each of the eight is a
    strided slice of the bytes.
    """
    codes = data.new_empty(data.shape[0], columns)
    for lane in range(min(8, columns)):
        byte, shift = divmod(lane * bits, 8)
        target = codes[:, lane::8]
        count = target.shape[1]
        value = data[:, byte::bits][:, :count] >> shift
        if shift + bits > 8:
            value = value | (data[:, byte + 1 :: bits][:, :count] << (8 - shift))
        target.copy_(value & (2**bits - 1))
    return codes
