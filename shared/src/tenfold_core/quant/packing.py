# SPDX-License-Identifier: Apache-2.0
"""Codes of 1 to 8 bits as bytes: one bit stream a row, rows of one width stored together.

Row streams start on a byte; code ``k`` of ``b`` bits lies in bits ``k*b`` to ``k*b + b - 1``,
the least significant first. The last byte is filled up with zeros. A weight of mixed widths
stores its rows sorted by width, and ``row_order`` says which output channel each one is.

NumPy alone; whatever has ``detach`` (a torch tensor) is read through its ``numpy()``. Eight codes
make one 64-bit word, whose empty bits are squeezed out in three steps of pairs of lanes. One core
of a Xeon packs or unpacks over 10**9 codes a second.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from tenfold_core.errors import InputError

__all__ = [
    "Groups",
    "PackedWeight",
    "pack_rows",
    "packed_layout",
    "packed_nbytes",
    "row_nbytes",
    "unpack_rows",
]

Groups = tuple[tuple[int, int], ...]
"""Pairs of a width in bits and how many rows have it, in the order in which they are stored."""

_WORD = np.dtype("<u8")
_BLOCK_WORDS = 1 << 15  # 256 kB and as much scratch: both stay in a core's cache


def row_nbytes(columns: int, bits: int) -> int:
    """Return how many bytes a row of ``columns`` codes takes."""
    return (columns * bits + 7) // 8


def pack_rows(codes: Any, bits: int) -> np.ndarray:
    """Return the bit streams of a matrix of codes, one row each.

    Args:
        codes: Whole numbers from 0 to ``2**bits - 1``, an array or a tensor.
        bits: Width, 1 to 8.

    Shapes: ``codes`` (rows, columns) -> uint8 (rows, ceil(columns * bits / 8)).

    Raises:
        InputError: A code does not fit, or ``codes`` is not a matrix of whole numbers.

    Example:
        >>> pack_rows(np.array([[3, 0, 1, 2]]), 2)
        array([[147]], dtype=uint8)
    """
    _check_bits(bits)
    codes = _as_codes(codes, bits)
    rows, columns = codes.shape
    if bits == 8:
        return codes.copy()
    groups = -(-columns // 8)
    packed = np.empty((rows, groups * bits), np.uint8)
    for part, words, scratch in _blocks(rows, groups):
        lanes = words.view(np.uint8)
        lanes[:, columns:] = 0
        lanes[:, :columns] = codes[part]
        _squeeze(words, scratch, bits)
        for byte in range(bits):
            packed[part, byte::bits] = lanes[:, byte::8]
    return np.ascontiguousarray(packed[:, : row_nbytes(columns, bits)])


def unpack_rows(data: Any, bits: int, columns: int) -> np.ndarray:
    """Return the codes that :func:`pack_rows` packed.

    Shapes: ``data`` (rows, ceil(columns * bits / 8)) -> uint8 (rows, columns).

    Raises:
        InputError: ``data`` is not bytes, or its rows have another length.
    """
    _check_bits(bits)
    data = _as_array(data)
    if data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != row_nbytes(columns, bits):
        raise InputError(
            f"packed rows: expected uint8 of shape (rows, {row_nbytes(columns, bits)}) for "
            f"{columns} codes of {bits} bits, found {data.dtype} of shape {data.shape}"
        )
    if bits == 8:
        return data.copy()
    groups = -(-columns // 8)
    codes = np.empty((data.shape[0], columns), np.uint8)
    for part, words, scratch in _blocks(data.shape[0], groups):
        lanes = words.view(np.uint8)
        for byte in range(bits):  # bytes left as they were end in no code that is returned
            column = data[part, byte::bits]
            lanes[:, byte::8][:, : column.shape[1]] = column
        _spread(words, scratch, bits)
        codes[part] = lanes[:, :columns]
    return codes


def _blocks(rows: int, groups: int) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Yield slices of rows, each with words to work in and as much scratch."""
    step = max(1, _BLOCK_WORDS // max(1, groups))
    words = np.empty((min(step, rows), groups), _WORD)
    scratch = np.empty_like(words)
    for start in range(0, rows, step):
        count = min(step, rows - start)
        yield slice(start, start + count), words[:count], scratch[:count]


def _low_halves(lane: int) -> np.uint64:
    """Return the mask of the lower of every two lanes of a word."""
    return np.uint64(sum(((1 << lane) - 1) << shift for shift in range(0, 64, 2 * lane)))


def _squeeze(words: np.ndarray, scratch: np.ndarray, bits: int) -> None:
    """Move eight codes, a byte each, to the low ``8 * bits`` bits of their word."""
    for lane in (8, 16, 32):
        low = _low_halves(lane)
        np.bitwise_and(words, ~low, out=scratch)
        np.right_shift(scratch, np.uint64(lane - bits * lane // 8), out=scratch)
        np.bitwise_and(words, low, out=words)
        np.bitwise_or(words, scratch, out=words)


def _spread(words: np.ndarray, scratch: np.ndarray, bits: int) -> None:
    """Undo :func:`_squeeze`."""
    for lane in (32, 16, 8):
        filled = bits * lane // 8
        low = np.uint64(sum(((1 << filled) - 1) << shift for shift in range(0, 64, 2 * lane)))
        np.bitwise_and(words, low, out=scratch)
        np.right_shift(words, np.uint64(filled), out=words)
        np.bitwise_and(words, low, out=words)
        np.left_shift(words, np.uint64(lane), out=words)
        np.bitwise_or(words, scratch, out=words)


def packed_layout(
    shape: Sequence[int], groups: Groups, *, smooth: int = 0
) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """Return dtype and shape of every stored array, from what a config file says alone.

    Writer, reader and accounting all use this table. ``row_order`` is there only for more than
    one group, ``smooth`` (one scale for each input channel) only if it has a length.

    Raises:
        InputError: The groups do not add up to the rows of ``shape``, or a width is not 1 to 8.
    """
    rows, columns = _check_shape(shape, "weight")
    _check_groups(groups, rows, "weight")
    half = np.dtype("<f2")
    size = sum(count * row_nbytes(columns, bits) for bits, count in groups)
    layout: dict[str, tuple[np.dtype, tuple[int, ...]]] = {
        "qweight": (np.dtype(np.uint8), (size,)),
        "scale": (half, (rows,)),
        "zero": (half, (rows,)),
    }
    if len(groups) > 1:
        layout["row_order"] = (np.dtype("<i2" if rows <= 1 << 15 else "<i4"), (rows,))
    if smooth:
        layout["smooth"] = (half, (smooth,))
    return layout


def packed_nbytes(shape: Sequence[int], groups: Groups, *, smooth: int = 0) -> int:
    """Return the bytes a packed weight takes: codes, scales, zero points, order and smoothing."""
    layout = packed_layout(shape, groups, smooth=smooth)
    return sum(dtype.itemsize * prod(size) for dtype, size in layout.values())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedWeight:
    """A quantized weight as it is stored; the rows are its first axis.

    Attributes:
        qweight: The row streams one after another, uint8.
        groups: Widths and row counts in storage order.
        row_order: Output channel of each stored row; None if there is one group.
        scale: Step of each output channel, float16.
        zero: Zero point of each output channel, float16.
        shape: Shape of the weight; everything after the first axis is flattened into a row.
    """

    qweight: np.ndarray
    groups: Groups
    row_order: np.ndarray | None
    scale: np.ndarray
    zero: np.ndarray
    shape: tuple[int, ...]

    @classmethod
    def from_codes(cls, codes: Any, bits: Any, scale: Any, zero: Any) -> "PackedWeight":
        """Pack codes, sorting rows by width if there are several.

        Args:
            codes: Whole numbers (rows, ...), an array or a tensor.
            bits: Their width, or one for each row.
            scale: Step of each row, (rows,) or (rows, 1).
            zero: Zero point of each row, likewise.

        Raises:
            InputError: A code does not fit its row's width, a scale or zero point is not a
                float16 number (round both first and compute the codes with them), or a scale
                is not positive.
        """
        codes = _as_array(codes)
        shape = tuple(codes.shape)
        rows, columns = _check_shape(shape, "codes")
        codes = codes.reshape(rows, columns)
        widths = np.broadcast_to(_as_array(bits), (rows,))
        order = np.argsort(widths, kind="stable")
        streams, groups = [], []
        for width in np.unique(widths).tolist():
            members = order[widths[order] == width]
            chosen = codes if len(members) == rows else codes[members]
            streams.append(pack_rows(chosen, width).reshape(-1))
            groups.append((width, len(members)))
        layout = packed_layout(shape, tuple(groups))
        mixed = "row_order" in layout
        weight = cls(
            qweight=np.concatenate(streams) if mixed else streams[0],
            groups=tuple(groups),
            row_order=order.astype(layout["row_order"][0]) if mixed else None,
            scale=_as_half(scale, rows, "scale"),
            zero=_as_half(zero, rows, "zero"),
            shape=shape,
        )
        weight.check()
        return weight

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays; equal to :func:`packed_nbytes` without smoothing."""
        order = 0 if self.row_order is None else self.row_order.nbytes
        return self.qweight.nbytes + self.scale.nbytes + self.zero.nbytes + order

    def check(self, name: str = "weight") -> None:
        """Compare every array with what ``shape`` and ``groups`` require; allocates O(rows).

        Raises:
            InputError: With the key, what was expected and what was found.
        """
        rows, _ = _check_shape(self.shape, name)
        _check_groups(self.groups, rows, name)
        layout = packed_layout(self.shape, self.groups)
        if self.row_order is not None and "row_order" not in layout:
            raise InputError(f"{name}.row_order: expected none for one group, found one")
        for key, (dtype, size) in layout.items():
            array = getattr(self, key)
            if array is None or array.dtype != dtype or array.shape != size:
                found = "none" if array is None else f"{array.dtype} of shape {array.shape}"
                raise InputError(f"{name}.{key}: expected {dtype} of shape {size}, found {found}")
        self._check_values(name)

    def _check_values(self, name: str) -> None:
        for key, array in (("scale", self.scale), ("zero", self.zero)):
            good = np.isfinite(array) & ((array > 0) | (key == "zero"))
            if not good.all():
                row = int(np.flatnonzero(~good)[0])
                wanted = "a finite number" + (" > 0" if key == "scale" else "")
                raise InputError(
                    f"{name}.{key}: expected {wanted}, found {array[row]} in row {row}"
                )
        if self.row_order is not None:
            rows = len(self.row_order)
            if not np.array_equal(np.sort(self.row_order), np.arange(rows)):
                raise InputError(
                    f"{name}.row_order: expected each of 0..{rows - 1} once, found "
                    f"{len(np.unique(self.row_order))} different from {self.row_order.min()} "
                    f"to {self.row_order.max()}"
                )

    def codes(self) -> np.ndarray:
        """Return the codes in the order of the output channels, uint8 of :attr:`shape`."""
        rows, columns = self.shape[0], prod(self.shape[1:])
        codes = np.empty((rows, columns), np.uint8)
        row = byte = 0
        for bits, count in self.groups:
            size = row_nbytes(columns, bits)
            stored = self.qweight[byte : byte + count * size].reshape(count, size)
            unpacked = unpack_rows(stored, bits, columns)
            if self.row_order is None:
                return unpacked.reshape(self.shape)
            codes[self.row_order[row : row + count]] = unpacked
            row, byte = row + count, byte + count * size
        return codes.reshape(self.shape)

    def dequantize(self) -> np.ndarray:
        """Return the weight ``scale * (codes - zero)``, float32 of :attr:`shape`."""
        weight = self.codes().reshape(self.shape[0], -1).astype(np.float32)
        weight -= self.zero.astype(np.float32)[:, None]
        weight *= self.scale.astype(np.float32)[:, None]
        return weight.reshape(self.shape)


def _as_array(values: Any) -> np.ndarray:
    if hasattr(values, "detach"):
        values = values.detach().cpu().numpy()
    return np.asarray(values)


def _as_codes(values: Any, bits: int) -> np.ndarray:
    codes = _as_array(values)
    if codes.dtype.kind not in "iu" or codes.ndim != 2:
        raise InputError(
            f"codes: expected whole numbers of shape (rows, columns), found {codes.dtype} of "
            f"shape {codes.shape}"
        )
    if codes.size and not 0 <= codes.min() <= codes.max() < 2**bits:
        raise InputError(
            f"codes: expected 0..{2**bits - 1} for {bits} bits, found {codes.min()}..{codes.max()}"
        )
    return codes.astype(np.uint8, copy=False)


def _as_half(values: Any, rows: int, key: str) -> np.ndarray:
    values = _as_array(values)
    if values.size != rows or values.ndim > 2:
        raise InputError(
            f"{key}: expected one number for each of {rows} rows, found {values.shape}"
        )
    with np.errstate(over="ignore"):
        half = values.reshape(rows).astype("<f2")
    lost = half.astype(np.float64) != values.reshape(rows)
    if lost.any():
        row = int(np.flatnonzero(lost)[0])
        raise InputError(
            f"{key}: expected float16 numbers, found {values.reshape(rows)[row]!r} in row {row}; "
            "round scale and zero point first and compute the codes with them"
        )
    return half


def _check_bits(bits: int) -> None:
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8:
        raise InputError(f"bits: expected a whole number from 1 to 8, found {bits!r}")


def _check_shape(shape: Sequence[int], name: str) -> tuple[int, int]:
    """Return rows and columns of a shape from a file, which may hold anything."""
    counts = all(isinstance(size, int) and size > 0 for size in shape)
    if len(shape) < 2 or not counts:
        raise InputError(
            f"{name}.shape: expected two or more positive whole numbers, found {tuple(shape)}"
        )
    return shape[0], prod(shape[1:])


def _check_groups(groups: Groups, rows: int, name: str) -> None:
    pairs = [pair for pair in groups if len(pair) == 2]
    whole = all(type(number) is int for pair in pairs for number in pair)
    fits = len(pairs) == len(groups) and whole
    if not fits or not all(1 <= bits <= 8 and count > 0 for bits, count in groups):
        raise InputError(
            f"{name}.groups: expected pairs (bits 1 to 8, rows > 0), found {list(groups)}"
        )
    total = sum(count for _, count in groups)
    if total != rows:
        raise InputError(f"{name}.groups: expected {rows} rows in all, found {total}")
