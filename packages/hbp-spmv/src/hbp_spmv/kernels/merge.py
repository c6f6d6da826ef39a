# SPDX-License-Identifier: Apache-2.0
"""Merge-path CSR product after Merrill and Garland (SC 2016): equal pieces for any row lengths.

The product is seen as a merge of two lists, the row ends `ptr[1:]` and the nonzeros `0..nnz-1`.
The merge takes rows + nnz steps; it is cut into pieces of `PIECE` steps, and a binary search along
each piece's diagonal, done once per matrix, finds the row and the nonzero at which it begins. A
piece sums its share of every row it meets: rows that end inside it go to y, the unfinished last one
becomes the piece's carry. The carries are added afterwards in piece order.

The pieces depend on the matrix alone, so the bits of y do not depend on the number of threads.
"""

from functools import cache

import numpy as np
from numba import cfunc, literally, njit

from hbp_spmv.kernels.pool import (
    JOB_PARTIAL,
    JOB_PHASE,
    JOB_PLAN,
    JOB_WORKERS,
    JOB_X,
    JOB_Y,
    PLAN_BOUNDS,
    PLAN_LAYOUT,
    PLAN_QUEUES,
    chunk_at,
    queue_at,
)
from hbp_spmv.kernels.simd import (
    float_of_size,
    fma,
    load_float,
    load_index,
    sources_stamp,
    store_float,
    vector_extract,
    vector_fma,
    vector_gather,
    vector_load,
    vector_zero,
)

__all__ = ["FIELDS", "PIECE", "merge_task", "split_path"]

PIECE = 4096
"""Steps of the merge in one piece."""

FIELDS = ("rows", "pieces", "total", "row_at", "ptr", "col", "val")
(F_ROWS, F_PIECES, F_TOTAL, F_ROW_AT, F_PTR, F_COL, F_VAL) = range(
    PLAN_LAYOUT, PLAN_LAYOUT + len(FIELDS)
)


@njit(nogil=True, cache=True)
def split_path(ptr, piece, row_at):
    """Find where the merge path crosses every `piece`-th diagonal.

    Args:
        ptr: row starts, (rows + 1,).
        piece: steps between diagonals.
        row_at: result, (pieces + 1,): rows finished at each diagonal; the other
            steps consumed nonzeros.
    """
    rows = len(ptr) - 1
    nnz = np.int64(ptr[rows])
    for number in range(len(row_at)):
        diagonal = min(number * piece, rows + nnz)
        low = max(diagonal - nnz, 0)
        high = min(diagonal, rows)
        while low < high:
            middle = (low + high) // 2
            if np.int64(ptr[middle + 1]) <= diagonal - middle - 1:
                low = middle + 1
            else:
                high = middle
        row_at[number] = low


@njit(nogil=True)
def _sum(x, col, val, p, end, lanes, size, index_size, hardware):
    """Return the sum over nonzeros p..end-1: `lanes` interleaved sums, then the remainder."""
    literally(lanes)
    literally(size)
    literally(index_size)
    literally(hardware)
    total = float_of_size(0.0, size)
    if p + lanes <= end:
        sums = vector_zero(lanes, size)
        while p + lanes <= end:
            value = vector_load(val, p, lanes, size)
            gathered = vector_gather(x, col, p, lanes, size, index_size, hardware)
            sums = vector_fma(value, gathered, sums)
            p += lanes
        for lane in range(lanes):
            total += vector_extract(sums, lane)
    while p < end:
        value = load_float(val, p, size)
        total = fma(value, load_float(x, load_index(col, p, index_size), size), total)
        p += 1
    return total


@njit(nogil=True)
def _piece(plan, x, y, carries, piece, lanes, size, index_size, ptr_size, hardware):
    """Sum one piece of the merge path."""
    literally(lanes)
    literally(size)
    literally(index_size)
    literally(ptr_size)
    literally(hardware)
    row_at = load_index(plan, F_ROW_AT, 8)
    ptr = load_index(plan, F_PTR, 8)
    col = load_index(plan, F_COL, 8)
    val = load_index(plan, F_VAL, 8)
    row = load_index(row_at, piece, 8)
    last = load_index(row_at, piece + 1, 8)
    p = piece * PIECE - row
    stop = min((piece + 1) * PIECE, load_index(plan, F_TOTAL, 8)) - last
    while row < last:
        end = load_index(ptr, row + 1, ptr_size)
        total = _sum(x, col, val, p, end, lanes, size, index_size, hardware)
        store_float(y, row, total, size)
        p = end
        row += 1
    carry = _sum(x, col, val, p, stop, lanes, size, index_size, hardware)
    store_float(carries, piece, carry, size)


@njit(nogil=True)
def _fix_up(plan, y, carries, size):
    """Add the carries to their rows, in piece order."""
    literally(size)
    rows = load_index(plan, F_ROWS, 8)
    row_at = load_index(plan, F_ROW_AT, 8)
    for piece in range(load_index(plan, F_PIECES, 8)):
        row = load_index(row_at, piece + 1, 8)
        if row < rows:
            total = load_float(y, row, size) + load_float(carries, piece, size)
            store_float(y, row, total, size)


@cache
def merge_task(lanes: int, size: int, index_size: int, ptr_size: int, hardware: int):
    """Compile y = A x along the merge path.

    Args:
        lanes: interleaved sums per row.
        size: bytes of a value, 4 or 8.
        index_size: bytes of a column.
        ptr_size: bytes of a row start.
        hardware: 1 to use the gather instruction.

    Returns:
        A numba C callback `void task(job, worker)`; phase 0 runs over pieces, phase 1 is one unit.
    """
    stamp = sources_stamp()

    @cfunc("void(int64, int64)", cache=True)
    def task(job, worker):
        if stamp < 0:  # never; see sources_stamp
            return
        plan = load_index(job, JOB_PLAN, 8)
        x = load_index(job, JOB_X, 8)
        y = load_index(job, JOB_Y, 8)
        carries = load_index(job, JOB_PARTIAL, 8)
        phase = load_index(job, JOB_PHASE, 8)
        workers = load_index(job, JOB_WORKERS, 8)
        bounds = load_index(plan, PLAN_BOUNDS + phase, 8)
        queues = load_index(plan, PLAN_QUEUES + phase, 8)
        for turn in range(workers + 1):
            queue = queue_at(worker, turn, workers)
            chunk = chunk_at(job, queues, queue)
            while chunk >= 0:
                for unit in range(load_index(bounds, chunk, 8), load_index(bounds, chunk + 1, 8)):
                    if phase == 0:
                        _piece(
                            plan, x, y, carries, unit, lanes, size, index_size, ptr_size, hardware
                        )
                    else:
                        _fix_up(plan, y, carries, size)
                chunk = chunk_at(job, queues, queue)

    return task
