# SPDX-License-Identifier: Apache-2.0
"""DP2D (reimplemented from the abstract): blocks whose sorted rows are cut into groups optimally.

Regu2D (2D partition, regular arrangement and index compression, the first two by dynamic
programming) was visible to us as an abstract only. This is our reading of the part that reorders:
sort the rows of a block by length, then cut the sorted sequence into groups of at most `lanes` rows
so that `sum(lanes * longest of the group + ALPHA)` is smallest.

On sorted lengths this objective is won by full groups counted from the longest row, because leaving
a row out never costs more. The search is kept nevertheless: its cost is what is compared.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from tenfold_core.errors import InputError

from hbp_spmv.compiled import njit
from hbp_spmv.hashing import place_sorted
from hbp_spmv.kernels.dp2d import FIELDS
from hbp_spmv.method import SLOT_COST

__all__ = ["ALPHA", "GroupedLayout", "cut_groups"]

ALPHA = 32
"""Cost of a group beside its steps, in elements: about one step of a full group."""


@njit(nogil=True, cache=True)
def cut_groups(lengths, order, lanes, alpha, cost, begin, ends):
    """Cut rows sorted by ascending length into groups of least total cost, in O(rows * lanes).

    `cost[e] = min over b of cost[b] + lanes * lengths[order[e-1]] + alpha`, `e - lanes <= b < e`.

    Args:
        lengths: nonzeros of each row, (rows,).
        order: the rows by ascending length, (rows,).
        lanes: largest group.
        alpha: cost of a group beside its steps.
        cost: scratch, (rows + 1,), int64: least cost of the first slots.
        begin: scratch, (rows + 1,), int64: where the last group of those begins.
        ends: result, (rows,): slot after the last of each group.

    Returns:
        The number of groups.
    """
    rows = len(order)
    cost[0] = 0
    for end in range(1, rows + 1):
        cheapest = cost[end - 1]
        begin[end] = end - 1
        for first in range(end - 2, max(end - lanes, 0) - 1, -1):
            if cost[first] <= cheapest:
                cheapest = cost[first]
                begin[end] = first
        cost[end] = cheapest + lanes * np.int64(lengths[order[end - 1]]) + alpha
    groups = 0
    end = rows
    while end > 0:
        groups += 1
        end = begin[end]
    end = rows
    for group in range(groups - 1, -1, -1):
        ends[group] = end
        end = begin[end]
    return groups


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedLayout:
    """The six published arrays with a table of groups: `block_group`, `group_slot`."""

    shape: tuple[int, int]
    nnz: int
    height: int
    width: int
    lanes: int
    col: NDArray[np.int32]
    data: NDArray
    add_sign: NDArray[np.int32]
    zero_row: NDArray[np.int32]
    output_hash: NDArray[np.int32]
    begin_ptr: NDArray[np.int64]
    group_slot: NDArray[np.int32]
    block_group: NDArray[np.int64]

    @classmethod
    def from_csr(
        cls, a: csr_array, *, height: int = 512, width: int = 4096, lanes: int = 32
    ) -> "GroupedLayout":
        """Build the layout from canonical CSR.

        Raises:
            InputError: the dense slot arrays would hold 2**31 slots or more.
        """
        rows, columns = a.shape
        strips = -(-columns // width)
        if rows * strips >= 1 << 31 or columns >= 1 << 31:
            raise InputError(
                f"matrix of shape {a.shape}: DP2D would need {rows * strips} dense slots, "
                "its limit is 2**31; leave it out for this matrix"
            )
        blocks = -(-rows // height) * strips
        slots = np.empty((2, rows * strips), np.int32)
        elements = [np.empty(a.nnz, dtype) for dtype in (np.int32, a.dtype, np.int32)]
        group_slot = np.zeros(rows * strips + 1, np.int32)
        begin_ptr = np.zeros(rows * strips + 1, np.int64)
        block_group = np.zeros(blocks + 1, np.int64)
        groups = _build(
            a.indptr, a.indices, a.data, height, width, strips, lanes,
            *elements, *slots, begin_ptr, group_slot, block_group,
        )  # fmt: skip
        return cls(
            shape=a.shape,
            nnz=a.nnz,
            height=height,
            width=width,
            lanes=lanes,
            col=elements[0],
            data=elements[1],
            add_sign=elements[2],
            zero_row=slots[0],
            output_hash=slots[1],
            begin_ptr=begin_ptr[: groups + 1].copy(),
            group_slot=group_slot[: groups + 1].copy(),
            block_group=block_group,
        )

    @property
    def strips(self) -> int:
        """Number of column strips."""
        return -(-self.shape[1] // self.width)

    @property
    def partials(self) -> int:
        """Length of the dense buffer `mid`."""
        return len(self.output_hash)

    @property
    def nbytes(self) -> int:
        """Bytes of all stored arrays, as held in memory."""
        return sum(getattr(self, name).nbytes for name in FIELDS[4:])

    def fields(self) -> list[int]:
        """Return the layout part of a plan: counts, then addresses."""
        counts = {
            "rows": self.shape[0],
            "block_rows": -(-self.shape[0] // self.height),
            "strips": self.strips,
            "height": self.height,
        }
        return [
            counts[name] if name in counts else getattr(self, name).ctypes.data for name in FIELDS
        ]

    def work(self) -> list[NDArray]:
        """Return the cost of each block, strip by strip, and of each row's combination."""
        nonzeros = np.diff(self.begin_ptr[self.block_group])
        slots = np.diff(self.group_slot[self.block_group])
        blocks = (nonzeros + SLOT_COST * slots).reshape(-1, self.strips)
        return [blocks.T.ravel(), np.full(self.shape[0], self.strips)]


@njit(nogil=True, cache=True)
def _build(
    ptr, col, val, height, width, strips, lanes,
    out_col, out_data, add_sign, zero_row, output_hash, begin_ptr, group_slot, block_group,
):  # fmt: skip
    """Build block by block: count, sort, cut, emit; return the number of groups."""
    rows = len(ptr) - 1
    low = np.empty(height, np.int64)
    lengths = np.empty(height, np.int64)
    placed = np.empty(height, np.int64)
    ends = np.empty(height, np.int64)
    scratch = np.empty((2, height + 1), np.int64)
    slot = np.int64(0)
    group = np.int64(0)
    block = 0
    for top in range(0, rows, height):
        tall = min(height, rows - top)
        for r in range(tall):
            low[r] = ptr[top + r]
        for strip in range(strips):
            right = (strip + 1) * width
            for r in range(tall):
                p = low[r]
                while p < ptr[top + r + 1] and col[p] < right:
                    p += 1
                lengths[r] = p - low[r]
            place_sorted(lengths[:tall], False, placed[:tall])
            count = cut_groups(
                lengths[:tall], placed[:tall], lanes, ALPHA, scratch[0], scratch[1], ends
            )
            first = 0
            for number in range(count):
                begin_ptr[group + 1] = _emit(
                    placed[first : ends[number]], low, lengths, begin_ptr[group], col, val,
                    slot, out_col, out_data, add_sign, zero_row, output_hash,
                )  # fmt: skip
                slot += ends[number] - first
                first = ends[number]
                group += 1
                group_slot[group] = slot
            block += 1
            block_group[block] = group
            for r in range(tall):
                low[r] += lengths[r]
    return group


@njit(nogil=True, cache=True)
def _emit(
    members, low, lengths, position, col, val,
    slot, out_col, out_data, add_sign, zero_row, output_hash,
):  # fmt: skip
    """Write one group, its rows in ascending length, step by step; return the next position."""
    size = len(members)
    first = 0  # rows from here on still have elements
    for lane in range(size):
        output_hash[slot + lane] = members[lane]
        if lengths[members[lane]] == 0:
            zero_row[slot + lane] = -1
            first += 1
        else:
            zero_row[slot + lane] = first
    for step in range(lengths[members[size - 1]]):
        active = size - first
        for lane in range(first, size):
            row = members[lane]
            j = low[row] + step
            out_col[position] = col[j]
            out_data[position] = val[j]
            if step + 1 == lengths[row]:
                add_sign[position] = -1
                active -= 1
                first += 1
            else:
                add_sign[position] = active
            position += 1
    return position
