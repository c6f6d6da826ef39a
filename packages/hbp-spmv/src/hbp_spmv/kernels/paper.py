# SPDX-License-Identifier: Apache-2.0
"""Product with the published layout: walk add_sign lane by lane, then combine the strips.

Phase 0 runs over blocks in strip-major order and writes the dense buffer `mid`; phase 1 adds the
strips of each row in order.
"""

from functools import cache

from numba import cfunc, literally, njit

from hbp_spmv.kernels.pool import (
    JOB_ALPHA,
    JOB_BETA,
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
    float_from_bits,
    float_of_size,
    fma,
    load_float,
    load_index,
    sources_stamp,
    store_float,
)

__all__ = ["FIELDS", "paper_task"]

NONE = 0xFFFFFFFF  # -1 in the published int32 arrays
FIELDS = (
    "rows",
    "block_rows",
    "strips",
    "height",
    "lanes",
    "begin_ptr",  # addresses from here on
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
    F_LANES,
    F_BEGIN_PTR,
    F_ZERO_ROW,
    F_OUTPUT_HASH,
    F_COL,
    F_DATA,
    F_ADD_SIGN,
) = range(PLAN_LAYOUT, PLAN_LAYOUT + len(FIELDS))


@njit(nogil=True)
def _block(plan, x, mid, block_row, strip, size):
    """Compute the row sums of one block, as the published kernel does."""
    literally(size)
    height = load_index(plan, F_HEIGHT, 8)
    lanes = load_index(plan, F_LANES, 8)
    strips = load_index(plan, F_STRIPS, 8)
    top = block_row * height
    rows = min(height, load_index(plan, F_ROWS, 8) - top)
    begin_ptr = load_index(plan, F_BEGIN_PTR, 8)
    col = load_index(plan, F_COL, 8)
    data = load_index(plan, F_DATA, 8)
    add_sign = load_index(plan, F_ADD_SIGN, 8)
    slots = top * strips + strip * rows
    groups = (rows + lanes - 1) // lanes
    # Deviation: groups of a full block row are ceil(height / lanes), not height / lanes.
    first_group = block_row * ((height + lanes - 1) // lanes) * strips + strip * groups
    for slot in range(rows):
        row = load_index(load_index(plan, F_OUTPUT_HASH, 8), slots + slot, 4)
        empty = load_index(load_index(plan, F_ZERO_ROW, 8), slots + slot, 4)
        total = float_of_size(0.0, size)
        if empty != NONE:
            group = first_group + slot // lanes
            j = load_index(begin_ptr, group, 8) + slot % lanes - empty
            step = 0
            while step != NONE:
                j += step
                value = load_float(data, j, size)
                total = fma(value, load_float(x, load_index(col, j, 4), size), total)
                step = load_index(add_sign, j, 4)
        store_float(mid, slots + row, total, size)


@njit(nogil=True)
def _combine(plan, y, mid, row, alpha, beta, size):
    """Add the strips of one row in order: y[row] = sum over j of mid."""
    literally(size)
    height = load_index(plan, F_HEIGHT, 8)
    strips = load_index(plan, F_STRIPS, 8)
    top = row // height * height
    rows = min(height, load_index(plan, F_ROWS, 8) - top)
    total = float_of_size(0.0, size)
    for strip in range(strips):
        total += load_float(mid, top * strips + strip * rows + row - top, size)
    if beta == 0:
        store_float(y, row, alpha * total, size)
    else:
        store_float(y, row, fma(alpha, total, beta * load_float(y, row, size)), size)


@cache
def paper_task(size: int):
    """Compile the published product for values of `size` bytes; `begin_ptr` is int64 in memory."""
    stamp = sources_stamp()

    @cfunc("void(int64, int64)", cache=True)
    def task(job, worker):
        if stamp < 0:  # never; see sources_stamp
            return
        plan = load_index(job, JOB_PLAN, 8)
        x = load_index(job, JOB_X, 8)
        y = load_index(job, JOB_Y, 8)
        mid = load_index(job, JOB_PARTIAL, 8)
        alpha = float_of_size(float_from_bits(load_index(job, JOB_ALPHA, 8)), size)
        beta = float_of_size(float_from_bits(load_index(job, JOB_BETA, 8)), size)
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
                        _combine(plan, y, mid, unit, alpha, beta, size)
                chunk = chunk_at(job, queues, queue)

    return task
