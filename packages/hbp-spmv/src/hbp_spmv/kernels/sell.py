# SPDX-License-Identifier: Apache-2.0
"""Padded slices: the product for SELL-C-sigma and, as one slice of all rows, for ELLPACK.

A slice holds `lanes` rows; element s of its row q lies at `start + s * stride + q`. For SELL the
stride is `lanes`, rows are sorted by length in windows of sigma, and a slice is padded to its
longest row; for ELL the stride is the padded number of rows and every row is padded to the longest.

Padding holds value 0 and column 0. It is loaded like any element, but the lane's mask (length >
step) discards what it computes, so `0 * inf` cannot enter a sum. SELL skips the mask for the steps
in which no lane is padded.
"""

from functools import cache

import numpy as np
from numba import cfunc, literally, njit

from hbp_spmv.hashing import place_sorted
from hbp_spmv.kernels.pool import (
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
    load_index,
    sources_stamp,
    store_float,
    vector_extract,
    vector_fma,
    vector_gather,
    vector_greater,
    vector_load,
    vector_load_lengths,
    vector_select,
    vector_store,
    vector_zero,
)

__all__ = ["FIELDS", "TILE", "fill_slices", "padded_size", "sell_task", "sort_windows"]

TILE = 512
"""Rows of a unit of ELL, a multiple of any register."""

FIELDS = (
    "rows",
    "stride",  # elements from step to step, ELL
    "widest",  # steps of every slice, ELL
    "start",  # addresses from here on; start, widths and targets for SELL only
    "widths",
    "targets",
    "lengths",
    "col",
    "val",
)
(
    F_ROWS,
    F_STRIDE,
    F_WIDEST,
    F_START,
    F_WIDTHS,
    F_TARGETS,
    F_LENGTHS,
    F_COL,
    F_VAL,
) = range(PLAN_LAYOUT, PLAN_LAYOUT + len(FIELDS))


@njit(nogil=True, cache=True)
def sort_windows(ptr, sigma, order):
    """Write the rows, each window of `sigma` sorted longest first, equal lengths in row order."""
    rows = len(ptr) - 1
    lengths = np.empty(min(sigma, rows), np.int64)
    placed = np.empty(min(sigma, rows), np.int64)
    for top in range(0, rows, sigma):
        tall = min(sigma, rows - top)
        for r in range(tall):
            lengths[r] = ptr[top + r + 1] - ptr[top + r]
        place_sorted(lengths[:tall], True, placed[:tall])
        for slot in range(tall):
            order[top + slot] = top + placed[slot]


@njit(nogil=True, cache=True)
def padded_size(ptr, order, lanes):
    """Return the elements that slices of `lanes` rows in this order would store."""
    size = 0
    for first in range(0, len(order), lanes):
        longest = 0
        for slot in range(first, min(first + lanes, len(order))):
            row = order[slot]
            longest = max(longest, np.int64(ptr[row + 1] - ptr[row]))
        size += lanes * longest
    return size


@njit(nogil=True, cache=True)
def fill_slices(ptr, col, val, order, start, stride, lanes, out_col, out_val):
    """Copy each row to its lane.

    Args:
        ptr: row starts.
        col: columns in CSR order.
        val: values in CSR order.
        order: row of each lane.
        start: first element of each slice.
        stride: elements from step to step.
        lanes: rows per slice.
        out_col: result, columns, zero-initialised.
        out_val: result, values, zero-initialised.
    """
    for slot in range(len(order)):
        row = order[slot]
        at = start[slot // lanes] + slot % lanes
        for p in range(ptr[row], ptr[row + 1]):
            out_col[at] = col[p]
            out_val[at] = val[p]
            at += stride


@njit(nogil=True)
def _slice(x, col, val, p, stride, full, widest, lengths, lanes, size, hardware):
    """Return the row sums of one slice; the first `full` steps have no padding."""
    literally(lanes)
    literally(size)
    literally(hardware)
    sums = vector_zero(lanes, size)
    for _ in range(full):
        value = vector_load(val, p, lanes, size)
        sums = vector_fma(value, vector_gather(x, col, p, lanes, size, 4, hardware), sums)
        p += stride
    length = vector_load_lengths(lengths, 0, lanes)
    for step in range(full, widest):
        value = vector_load(val, p, lanes, size)
        more = vector_fma(value, vector_gather(x, col, p, lanes, size, 4, hardware), sums)
        sums = vector_select(vector_greater(length, step), more, sums)
        p += stride
    return sums


@njit(nogil=True)
def _sell(plan, x, y, number, lanes, size, hardware):
    """Compute one SELL slice and scatter its sums to their rows."""
    literally(lanes)
    literally(size)
    literally(hardware)
    widths = load_index(plan, F_WIDTHS, 8)
    targets = load_index(plan, F_TARGETS, 8) + number * lanes * 4
    sums = _slice(
        x, load_index(plan, F_COL, 8), load_index(plan, F_VAL, 8),
        load_index(load_index(plan, F_START, 8), number, 8), lanes,
        load_index(widths, 2 * number, 4), load_index(widths, 2 * number + 1, 4),
        load_index(plan, F_LENGTHS, 8) + number * lanes * 4, lanes, size, hardware,
    )  # fmt: skip
    for lane in range(min(lanes, load_index(plan, F_ROWS, 8) - number * lanes)):
        store_float(y, load_index(targets, lane, 4), vector_extract(sums, lane), size)


@njit(nogil=True)
def _ell(plan, x, y, number, lanes, size, hardware):
    """Compute one tile of ELL rows, step by step through the tile so that memory is read in runs.

    The sums stay in y between steps; rows that do not fill a register are done one slice at a time.
    """
    literally(lanes)
    literally(size)
    literally(hardware)
    rows = load_index(plan, F_ROWS, 8)
    stride = load_index(plan, F_STRIDE, 8)
    widest = load_index(plan, F_WIDEST, 8)
    lengths = load_index(plan, F_LENGTHS, 8)
    col = load_index(plan, F_COL, 8)
    val = load_index(plan, F_VAL, 8)
    first = number * TILE
    last = min(first + TILE, rows // lanes * lanes)
    for row in range(first, last, lanes):
        vector_store(y, row, vector_zero(lanes, size), size)
    for step in range(widest):
        for row in range(first, last, lanes):
            sums = vector_load(y, row, lanes, size)
            p = step * stride + row
            value = vector_load(val, p, lanes, size)
            more = vector_fma(value, vector_gather(x, col, p, lanes, size, 4, hardware), sums)
            active = vector_greater(vector_load_lengths(lengths, row, lanes), step)
            vector_store(y, row, vector_select(active, more, sums), size)
    if last < min(first + TILE, rows):
        tail = _slice(
            x, col, val, last, stride, 0, widest, lengths + last * 4, lanes, size, hardware
        )
        for lane in range(rows - last):
            store_float(y, last + lane, vector_extract(tail, lane), size)


@cache
def sell_task(lanes: int, size: int, ell: int, hardware: int):
    """Compile y = A x for padded slices.

    Args:
        lanes: rows per slice.
        size: bytes of a value, 4 or 8.
        ell: 1 for ELL, 0 for SELL.
        hardware: 1 to use the gather instruction.

    Returns:
        A numba C callback `void task(job, worker)`; a unit is a slice (SELL) or a tile (ELL).
    """
    stamp = sources_stamp()

    @cfunc("void(int64, int64)", cache=True)
    def task(job, worker):
        if stamp < 0:  # never; see sources_stamp
            return
        plan = load_index(job, JOB_PLAN, 8)
        x = load_index(job, JOB_X, 8)
        y = load_index(job, JOB_Y, 8)
        workers = load_index(job, JOB_WORKERS, 8)
        bounds = load_index(plan, PLAN_BOUNDS, 8)
        queues = load_index(plan, PLAN_QUEUES, 8)
        for turn in range(workers + 1):
            queue = queue_at(worker, turn, workers)
            chunk = chunk_at(job, queues, queue)
            while chunk >= 0:
                for unit in range(load_index(bounds, chunk, 8), load_index(bounds, chunk + 1, 8)):
                    if ell:
                        _ell(plan, x, y, unit, lanes, size, hardware)
                    else:
                        _sell(plan, x, y, unit, lanes, size, hardware)
                chunk = chunk_at(job, queues, queue)

    return task
