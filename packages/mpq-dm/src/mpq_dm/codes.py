# SPDX-License-Identifier: Apache-2.0
"""Codes of weights as tensors on any device, and values of each sample of an input."""

from jaxtyping import Float, UInt8
from tenfold_core.errors import InputError
from torch import Tensor

__all__ = ["per_sample", "unpack_bits"]


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
