# SPDX-License-Identifier: Apache-2.0
"""Product for blocks whose groups differ in size: the published walk, driven by a group table.

Phase 0 runs over blocks in strip-major order and writes the dense buffer `mid`; phase 1 adds the
strips of each row in order.
"""

from functools import cache

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
)

__all__ = ["FIELDS", "grouped_task"]

FIELDS = (
    "rows",
    "block_rows",
    "strips",
    "height",
    "block_group",  # addresses from here on: first group of each block,
    "group_slot",  # first slot of each group
    "begin_ptr",
    "zero_row",
    "output_hash",
    "col",
    "data",
    "add_sign",
)
(
    F_ROWS,
    F_BLOCK_ROWS,
    F_STRIPS,
    F_HEIGHT,
    F_BLOCK_GROUP,
    F_GROUP_SLOT,
    F_BEGIN_PTR,
    F_ZERO_ROW,
    F_OUTPUT_HASH,
    F_COL,
    F_DATA,
    F_ADD_SIGN,
) = range(PLAN_LAYOUT, PLAN_LAYOUT + len(FIELDS))
_NONE = 0xFFFFFFFF
"""-1 of the stored int32, read without sign."""


@njit(nogil=True)
def _walk(plan, x, j, size):
    """Return the sum of the row whose first element is j."""
    literally(size)
    col = load_index(plan, F_COL, 8)
    data = load_index(plan, F_DATA, 8)
    add_sign = load_index(plan, F_ADD_SIGN, 8)
    total = float_of_size(0.0, size)
    step = 0
    while step != _NONE:
        j += step
        value = load_float(data, j, size)
        total = fma(value, load_float(x, load_index(col, j, 4), size), total)
        step = load_index(add_sign, j, 4)
    return total


@njit(nogil=True)
def _block(plan, x, mid, block_row, strip, size):
    """Compute the row sums of one block, group by group."""
    literally(size)
    height = load_index(plan, F_HEIGHT, 8)
    strips = load_index(plan, F_STRIPS, 8)
    top = block_row * height
    rows = min(height, load_index(plan, F_ROWS, 8) - top)
    base = top * strips + strip * rows
    block = block_row * strips + strip
    groups = load_index(plan, F_BLOCK_GROUP, 8)
    slots = load_index(plan, F_GROUP_SLOT, 8)
    for group in range(load_index(groups, block, 8), load_index(groups, block + 1, 8)):
        first = load_index(slots, group, 4)
        start = load_index(load_index(plan, F_BEGIN_PTR, 8), group, 8)
        for slot in range(first, load_index(slots, group + 1, 4)):
            empty = load_index(load_index(plan, F_ZERO_ROW, 8), slot, 4)
            total = float_of_size(0.0, size)
            if empty != _NONE:
                total = _walk(plan, x, start + slot - first - empty, size)
            row = load_index(load_index(plan, F_OUTPUT_HASH, 8), slot, 4)
            store_float(mid, base + row, total, size)


@njit(nogil=True)
def _combine(plan, y, mid, row, size):
    """Add the strips of one row in order."""
    literally(size)
    height = load_index(plan, F_HEIGHT, 8)
    strips = load_index(plan, F_STRIPS, 8)
    top = row // height * height
    rows = min(height, load_index(plan, F_ROWS, 8) - top)
    total = float_of_size(0.0, size)
    for strip in range(strips):
        total += load_float(mid, top * strips + strip * rows + row - top, size)
    store_float(y, row, total, size)


@cache
def grouped_task(size: int):
    """Compile y = A x for values of `size` bytes; a unit is a block, then a row."""
    stamp = sources_stamp()

    @cfunc("void(int64, int64)", cache=True)
    def task(job, worker):
        if stamp < 0:  # never; see sources_stamp
            return
        plan = load_index(job, JOB_PLAN, 8)
        x = load_index(job, JOB_X, 8)
        y = load_index(job, JOB_Y, 8)
        mid = load_index(job, JOB_PARTIAL, 8)
        phase = load_index(job, JOB_PHASE, 8)
        workers = load_index(job, JOB_WORKERS, 8)
        bounds = load_index(plan, PLAN_BOUNDS + phase, 8)
        queues = load_index(plan, PLAN_QUEUES + phase, 8)
        block_rows = load_index(plan, F_BLOCK_ROWS, 8)
        for turn in range(workers + 1):
            queue = queue_at(worker, turn, workers)
            chunk = chunk_at(job, queues, queue)
            while chunk >= 0:
                for unit in range(load_index(bounds, chunk, 8), load_index(bounds, chunk + 1, 8)):
                    if phase == 0:
                        _block(plan, x, mid, unit % block_rows, unit // block_rows, size)
                    else:
                        _combine(plan, y, mid, unit, size)
                chunk = chunk_at(job, queues, queue)

    return task
