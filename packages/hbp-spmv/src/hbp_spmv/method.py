# SPDX-License-Identifier: Apache-2.0
"""HBP as published: partition, hash, group, multiply, combine (`layout="paper"`).

"A Nonlinear Hash-based Optimization Method for SpMV on GPUs", CCGrid 2025, arXiv 2504.08860.

A matrix is cut into blocks of `height` x `width`. Inside a block the rows are reordered by a hash
of their number of nonzeros and taken `lanes` at a time; a group's elements are stored step by step,
so that neighbouring lanes read neighbouring addresses, and `add_sign` leads a lane from one element
of its row to the next without padding. Every block writes its row sums to its place in the dense
buffer `mid`; a final pass adds the strips of each row in order.

The six arrays, with M = height, W = lanes, C strips, block (i, j) of e rows:

=============  ======  ==========================================================================
col            int32   global column of each nonzero, in HBP order
data           float   its value
add_sign       int32   distance to the next nonzero of the same row, -1 on the last one
zero_row       int32   per slot: -1 for an empty row, else the empty rows before it in its group
begin_ptr      int32   start of each group (int64 from 2**31 nonzeros on); one entry more
output_hash    int32   per slot: the local row placed there
=============  ======  ==========================================================================

Slots of block (i, j) start at i*M*C + j*e, its groups at i*ceil(M/W)*C + j*ceil(e/W).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from tenfold_core.errors import InputError

from hbp_spmv.compiled import njit
from hbp_spmv.config import BuildConfig
from hbp_spmv.hashing import (
    MAX_CLASSES,
    ORDER_CLASSES,
    ORDER_NONE,
    ORDER_PAPER,
    ORDER_SORT,
    HashParams,
    length_classes,
    place_rows,
    quality,
    tune,
)
from hbp_spmv.kernels.paper import FIELDS

__all__ = ["ARRAYS", "PaperLayout", "block_lengths", "check_paper"]

ARRAYS = ("col", "data", "add_sign", "zero_row", "begin_ptr", "output_hash")
_METHODS = {
    "none": ORDER_NONE,
    "paper": ORDER_PAPER,
    "tuned": ORDER_PAPER,
    "lut": ORDER_CLASSES,
    "sort": ORDER_SORT,
}
_SHORT = 64
"""Entries of a row up to which counting all is faster than two binary searches."""
SLOT_COST = 2
"""Cost of a slot in nonzeros; it only shapes the schedule."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperLayout:
    """A matrix in the six published arrays."""

    shape: tuple[int, int]
    nnz: int
    height: int
    width: int
    lanes: int
    col: NDArray[np.int32]
    data: NDArray
    add_sign: NDArray[np.int32]
    zero_row: NDArray[np.int32]
    begin_ptr: NDArray
    output_hash: NDArray[np.int32]
    perm: NDArray | None = None

    @classmethod
    def from_csr(cls, a: csr_array, config: BuildConfig) -> "PaperLayout":
        """Build the six arrays from canonical CSR.

        With s bytes a value and C strips the arrays take `nnz * (s + 8) + 8 * rows * C` bytes and 8
        a group; beside them a build needs a byte a block, and its schedule 8 bytes a row. That is
        within 2.5 times CSR from 0.6 (float64) or 1.04 (float32) nonzeros a (row, strip) pair on.

        Raises:
            InputError: the dense slot arrays would hold 2**31 slots or more.
        """
        rows, columns = a.shape
        strips = -(-columns // config.width)
        lanes = config.lanes or 32
        if rows * strips >= 1 << 31 or columns >= 1 << 31:
            raise InputError(
                f"matrix of shape {a.shape}: layout 'paper' needs {rows * strips} dense slots, "
                "its limit is 2**31; use layout='compact'"
            )
        params, classes = _hash_table(a, config, lanes)
        heights = _heights(rows, config.height)
        groups = int((-(-heights // lanes)).sum()) * strips
        slots = np.empty((2, rows * strips), np.int32)
        begin_ptr = np.zeros(groups + 1, np.int64)
        elements = [np.empty(a.nnz, dtype) for dtype in (np.int32, a.dtype, np.int32)]
        perm = np.empty(a.nnz if config.keep_perm else 0, np.int64)
        _build(
            a.indptr, a.indices, a.data, columns, config.height, config.width, lanes,
            _METHODS[config.hash], (params.k0, params.s, params.t, params.u), classes,
            *elements, *slots, begin_ptr, perm,
        )  # fmt: skip
        return cls(
            shape=a.shape,
            nnz=a.nnz,
            height=config.height,
            width=config.width,
            lanes=lanes,
            col=elements[0],
            data=elements[1],
            add_sign=elements[2],
            zero_row=slots[0],
            begin_ptr=begin_ptr,
            output_hash=slots[1],
            perm=perm if config.keep_perm else None,
        )

    @property
    def strips(self) -> int:
        """Number of column strips C."""
        return -(-self.shape[1] // self.width)

    @property
    def uniform(self) -> bool:
        """The published layout stores every value."""
        return False

    @property
    def partials(self) -> int:
        """Length of the dense buffer `mid`."""
        return len(self.output_hash)

    @property
    def nbytes(self) -> int:
        """Bytes of the six arrays."""
        return sum(array.nbytes for array in self.arrays().values())

    def arrays(self) -> dict[str, NDArray]:
        """Return the six arrays by their published names; `begin_ptr` is int32 if that suffices."""
        arrays = {name: getattr(self, name) for name in ARRAYS}
        if self.nnz < 1 << 31:
            arrays["begin_ptr"] = self.begin_ptr.astype(np.int32)
        return arrays

    def fields(self) -> list[int]:
        """Return the layout part of a plan: counts, then addresses (`kernels.paper.FIELDS`)."""
        counts = {
            "rows": self.shape[0],
            "block_rows": len(_heights(self.shape[0], self.height)),
            "strips": self.strips,
            "height": self.height,
            "lanes": self.lanes,
        }
        return [
            counts[name] if name in counts else getattr(self, name).ctypes.data for name in FIELDS
        ]

    def work(self) -> list[NDArray]:
        """Return the cost of each block, strip by strip, and of each row's combination."""
        heights = _heights(self.shape[0], self.height)
        groups = -(-heights // self.lanes)
        edges = np.concatenate([[0], np.cumsum(np.repeat(groups, self.strips))])
        nonzeros = np.diff(self.begin_ptr[edges]).reshape(-1, self.strips)
        blocks = nonzeros + SLOT_COST * heights[:, None]
        return [blocks.T.ravel(), np.broadcast_to(self.strips, self.shape[0])]

    def lengths(self) -> NDArray[np.int32]:
        """Return the nonzeros of every slot: -1 ends a row, zero_row says which slots have one."""
        lengths = np.zeros(len(self.zero_row), np.int32)
        heights = _heights(self.shape[0], self.height)
        _slot_lengths(
            heights, self.strips, self.lanes, self.begin_ptr, self.zero_row, self.add_sign, lengths
        )
        return lengths

    def quality(self) -> tuple[float, float]:
        """Return lane efficiency and the mean within-group deviation of the row lengths."""
        return self._quality(self.lengths())

    def unordered_quality(self) -> tuple[float, float]:
        """Return the same of the rows in their own order."""
        heights = np.repeat(_heights(self.shape[0], self.height), self.strips)
        tops = np.repeat(np.cumsum(heights) - heights, heights)
        lengths = np.empty(len(tops), np.int32)
        lengths[tops + self.output_hash] = self.lengths()
        return self._quality(lengths)

    def _quality(self, lengths: NDArray[np.int32]) -> tuple[float, float]:
        maxima, deviation, groups, start = 0, 0.0, 0, 0
        for height in np.repeat(_heights(self.shape[0], self.height), self.strips):
            block = lengths[start : start + height]
            m, d, g = quality(block, np.arange(height), self.lanes)
            maxima, deviation, groups = maxima + m, deviation + d, groups + g
            start += height
        slots = maxima * self.lanes
        return (self.nnz / slots if slots else 1.0), (deviation / groups if groups else 0.0)

    def coordinates(self) -> tuple[NDArray, NDArray]:
        """Return row and column of every element, in stored order."""
        row = np.empty(self.nnz, np.int32)
        heights = _heights(self.shape[0], self.height)
        _unpack(
            heights, self.height, self.strips, self.lanes, self.begin_ptr, self.zero_row,
            self.output_hash, self.add_sign, row,
        )  # fmt: skip
        return row, self.col

    def values(self) -> NDArray:
        """Return the value of every element, in stored order."""
        return self.data


def _heights(rows: int, height: int) -> NDArray[np.int64]:
    """Return the rows of each block row; the last one is not rows mod height but what is left."""
    tops = np.arange(0, rows, height)
    return np.minimum(height, rows - tops)


def _hash_table(a: csr_array, config: BuildConfig, lanes: int) -> tuple[HashParams, NDArray]:
    """Return the hash parameters and the lut table, from evenly spaced sample blocks."""
    params = HashParams(k0=config.k0, s=config.s, t=config.t, u=config.u)
    if config.hash == "tuned":
        return tune(_sample(a, config, 8), lanes), length_classes(np.zeros(1, np.int32))
    sample = _sample(a, config, 64) if config.hash == "lut" else []
    return params, length_classes(np.concatenate(sample or [np.zeros(1, np.int32)]))


def _sample(a: csr_array, config: BuildConfig, wanted: int) -> list[NDArray[np.int32]]:
    """Return the row lengths of up to `wanted` evenly spaced blocks that are not empty."""
    strips = -(-a.shape[1] // config.width)
    marks = np.zeros(len(_heights(a.shape[0], config.height)) * strips, np.bool_)
    _mark_filled(a.indptr, a.indices, config.height, config.width, strips, marks)
    filled = np.flatnonzero(marks)
    taken = np.linspace(0, max(len(filled) - 1, 0), min(wanted, len(filled)))
    sample = []
    column = a.indices.dtype.type
    for block in filled[np.unique(taken.astype(int))].tolist():
        top, left = block // strips * config.height, block % strips * config.width
        lengths = np.empty(min(config.height, a.shape[0] - top), np.int32)
        right = min(left + config.width, a.shape[1])
        _count_block(a.indptr, a.indices, top, column(left), column(right), lengths)
        sample.append(lengths)
    return sample


def block_lengths(a: csr_array, height: int, width: int) -> NDArray[np.int32]:
    """Return the nonzeros of every row of every block, block row by block row, strip by strip."""
    rows, columns = a.shape
    strips = -(-columns // width)
    lengths = np.zeros(rows * strips, np.int32)
    _count(a.indptr, a.indices, height, width, strips, lengths)
    return lengths


@njit(nogil=True, cache=True)
def _count(ptr, col, height, width, strips, lengths):
    rows = len(ptr) - 1
    for row in range(rows):
        top = row // height * height
        tall = min(height, rows - top)
        for p in range(ptr[row], ptr[row + 1]):
            lengths[top * strips + np.int64(col[p]) // width * tall + row - top] += 1


@njit(nogil=True, cache=True)
def _mark_filled(ptr, col, height, width, strips, marks):
    """Set marks[block] for every block that has a nonzero; columns ascend within a row."""
    rows = len(ptr) - 1
    for top in range(0, rows, height):
        first = top // height * strips
        empty = strips
        for row in range(top, min(top + height, rows)):
            if empty == 0:
                break
            p = ptr[row]
            while p < ptr[row + 1]:
                strip = np.int64(col[p]) // width
                empty -= not marks[first + strip]
                marks[first + strip] = True
                right = (strip + 1) * width
                while p < ptr[row + 1] and col[p] < right:
                    p += 1


@njit(nogil=True, cache=True)
def _count_block(ptr, col, top, left, right, lengths):
    """Count the nonzeros of one block's rows, columns left..right-1."""
    for r in range(len(lengths)):
        entries = col[ptr[top + r] : ptr[top + r + 1]]
        if len(entries) > _SHORT:
            lengths[r] = np.searchsorted(entries, right) - np.searchsorted(entries, left)
        else:
            count = np.int32(0)
            for c in entries:
                count += np.int32((c >= left) & (c < right))
            lengths[r] = count


@njit(nogil=True, cache=True)
def _build(
    ptr, col, val, columns, height, width, lanes, method, params, classes,
    out_col, out_data, add_sign, zero_row, output_hash, begin_ptr, perm,
):  # fmt: skip
    """Build block by block; `low` walks along each row from strip to strip."""
    rows = len(ptr) - 1
    low = np.empty(height, np.int64)
    lengths = np.empty(height, np.int64)
    above = np.empty(height + 1, np.int64)
    below = np.empty(height + 1, np.int64)
    placed = np.empty(height, np.int64)
    buckets = np.empty(MAX_CLASSES + 2, np.int64)
    left = np.empty(lanes, np.int64)
    members = np.empty(lanes, np.int64)
    position = np.int64(0)
    slot = np.int64(0)
    group = np.int64(0)
    for top in range(0, rows, height):
        tall = min(height, rows - top)
        for r in range(tall):
            low[r] = ptr[top + r]
        for strip in range((columns + width - 1) // width):
            right = (strip + 1) * width
            for r in range(tall):
                p = low[r]
                while p < ptr[top + r + 1] and col[p] < right:
                    p += 1
                lengths[r] = p - low[r]
            place_rows(
                lengths[:tall], method, params, classes, False, placed[:tall], above, below, buckets
            )
            for first in range(0, tall, lanes):
                size = min(lanes, tall - first)
                for lane in range(size):
                    members[lane] = placed[first + lane]
                active = _fill_slots(members, size, lengths, slot, left, zero_row, output_hash)
                for lane in range(size):
                    members[lane] = low[members[lane]]
                position = _emit(
                    members, size, left, active, position, col, val, out_col, out_data, add_sign,
                    perm,
                )  # fmt: skip
                slot += size
                group += 1
                begin_ptr[group] = position
            for r in range(tall):
                low[r] += lengths[r]


@njit(nogil=True, cache=True)
def _fill_slots(members, size, lengths, slot, left, zero_row, output_hash):
    """Write the slots of one group, to `left` its rows' lengths; return the rows not empty."""
    empty = 0
    for lane in range(size):
        left[lane] = lengths[members[lane]]
        output_hash[slot + lane] = members[lane]
        if left[lane] == 0:
            zero_row[slot + lane] = -1
            empty += 1
        else:
            zero_row[slot + lane] = empty
    return size - empty


@njit(nogil=True, cache=True)
def _emit(nexts, size, left, active, position, col, val, out_col, out_data, add_sign, perm):
    """Write the elements of one group step by step; return the position behind them.

    Args:
        nexts: CSR position of each lane's next element; advanced.
        size: lanes of the group.
        left: elements each lane still has; counted down to 0.
        active: lanes that have any.
        position: where the group begins.
        col: columns in CSR order.
        val: values in CSR order.
        out_col: result, columns in HBP order.
        out_data: result, values.
        add_sign: result.
        perm: result, CSR position of each element; may be empty.
    """
    while active > 0:
        for lane in range(size):
            if left[lane] == 0:
                continue
            j = nexts[lane]
            out_col[position] = col[j]
            out_data[position] = val[j]
            if len(perm):
                perm[position] = j
            nexts[lane] = j + 1
            left[lane] -= 1
            if left[lane] == 0:
                add_sign[position] = -1
                active -= 1
            else:
                add_sign[position] = active
            position += 1
    return position


@njit(nogil=True, cache=True)
def _slot_lengths(heights, strips, lanes, begin_ptr, zero_row, add_sign, lengths):
    slot = 0
    group = 0
    for tall in heights:
        for _ in range(strips):
            for first in range(0, tall, lanes):
                for lane in range(min(lanes, tall - first)):
                    if zero_row[slot + lane] >= 0:
                        j = begin_ptr[group] + lane - zero_row[slot + lane]
                        lengths[slot + lane] = 1
                        while add_sign[j] > 0:
                            j += add_sign[j]
                            lengths[slot + lane] += 1
                slot += min(lanes, tall - first)
                group += 1


@njit(nogil=True, cache=True)
def _unpack(heights, height, strips, lanes, begin_ptr, zero_row, output_hash, add_sign, row):
    slot = 0
    group = 0
    for block_row in range(len(heights)):
        tall = heights[block_row]
        for _ in range(strips):
            for first in range(0, tall, lanes):
                for lane in range(min(lanes, tall - first)):
                    if zero_row[slot + lane] >= 0:
                        j = begin_ptr[group] + lane - zero_row[slot + lane]
                        local = output_hash[slot + lane]
                        row[j] = block_row * height + local
                        while add_sign[j] > 0:
                            j += add_sign[j]
                            row[j] = block_row * height + local
                slot += min(lanes, tall - first)
                group += 1


@njit(nogil=True, cache=True)
def check_paper(rows, height, strips, lanes, begin_ptr, zero_row, output_hash, add_sign):
    """Check foreign arrays so that no walk leaves its group.

    Returns:
        0, or which array is wrong: 1 begin_ptr, 2 output_hash, 3 zero_row, 4 add_sign.
    """
    seen = np.empty(height, np.int64)
    seen[:] = -1
    visited = np.zeros(len(add_sign), np.bool_)
    slot = 0
    group = 0
    for top in range(0, rows, height):
        tall = min(height, rows - top)
        for _ in range(strips):
            block = slot
            for first in range(0, tall, lanes):
                if group + 1 >= len(begin_ptr):
                    return 1
                empty = 0
                count = 0
                for lane in range(min(lanes, tall - first)):
                    local = output_hash[slot + lane]
                    if local < 0 or local >= tall or seen[local] == block:
                        return 2
                    seen[local] = block
                    if zero_row[slot + lane] == -1:
                        empty += 1
                        continue
                    if zero_row[slot + lane] != empty:
                        return 3
                    j = begin_ptr[group] + lane - empty
                    while True:
                        if j >= begin_ptr[group + 1] or visited[j]:
                            return 4
                        visited[j] = True
                        count += 1
                        if add_sign[j] == -1:
                            break
                        if add_sign[j] < 1 or add_sign[j] > lanes:
                            return 4
                        j += add_sign[j]
                if count != begin_ptr[group + 1] - begin_ptr[group]:
                    return 4
                slot += min(lanes, tall - first)
                group += 1
    return 0 if group + 1 == len(begin_ptr) else 1
