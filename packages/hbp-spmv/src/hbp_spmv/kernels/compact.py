# SPDX-License-Identifier: Apache-2.0
"""Product with the compact layout: groups of rows, one row per lane, no padding, no add_sign.

The elements of a group lie step by step: step s holds element s of every row longer than s. Rows
are sorted by length inside the group, so the active lanes of a step are a prefix, whose width is
the number of lengths above s. A register load may run past that prefix into the next step; what it
reads there is a value and a column of the same matrix, and the mask discards the lane's result, so
a padded product `0 * inf` cannot arise.
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
    AHEAD,
    float_from_bits,
    float_of_size,
    fma,
    load_float,
    load_index,
    prefetch,
    sources_stamp,
    store_float,
    vector_extract,
    vector_fma,
    vector_gather,
    vector_greater,
    vector_load,
    vector_load_lengths,
    vector_popcount,
    vector_select,
    vector_splat,
    vector_zero,
)

__all__ = ["FIELDS", "compact_task"]

# Layout part of the plan, in order.
FIELDS = (
    "rows",  # number of rows m: targets from here on are partial sums
    "groups",  # number of groups
    "segments",  # number of segments of heavy rows
    "empties",  # number of empty rows
    "strips",  # 0 if every lane's sum is a whole row
    "start",  # addresses from here on
    "lengths",
    "targets",
    "group_base",
    "segment_start",
    "segment_target",
    "segment_base",
    "empty_rows",
    "split_rows",
    "split_start",
    "col",
    "val",
)
EMPTIES_PER_UNIT = 1024

(
    F_ROWS,
    F_GROUPS,
    F_SEGMENTS,
    F_EMPTIES,
    F_STRIPS,
    F_START,
    F_LENGTHS,
    F_TARGETS,
    F_GROUP_BASE,
    F_SEGMENT_START,
    F_SEGMENT_TARGET,
    F_SEGMENT_BASE,
    F_EMPTY_ROWS,
    F_SPLIT_ROWS,
    F_SPLIT_START,
    F_COL,
    F_VAL,
) = range(PLAN_LAYOUT, PLAN_LAYOUT + len(FIELDS))


@njit(nogil=True)
def _store_result(y, partial, rows, target, value, alpha, beta, size):
    """Write a finished row to y, or one part of a split row to the partial sums."""
    literally(size)
    if target >= rows:
        store_float(partial, target - rows, value, size)
    elif beta == 0:
        store_float(y, target, alpha * value, size)
    else:
        store_float(y, target, fma(alpha, value, beta * load_float(y, target, size)), size)


@njit(nogil=True)
def _group(x, col, val, p, lengths, lanes, size, index_size, uniform, hardware):
    """Return the row sums of one group."""
    literally(lanes)
    literally(size)
    literally(index_size)
    literally(uniform)
    literally(hardware)
    shared = vector_splat(load_float(val, 0, size), lanes)
    sums = vector_zero(lanes, size)
    length = vector_load_lengths(lengths, 0, lanes)
    full = load_index(lengths, lanes - 1, 4)
    for _ in range(full):
        if not uniform:
            prefetch(val, p + AHEAD // size, size)
            if lanes * size > 64:
                prefetch(val, p + (AHEAD + 64) // size, size)
        prefetch(col, p + AHEAD // size, index_size)
        value = shared if uniform else vector_load(val, p, lanes, size)
        sums = vector_fma(value, vector_gather(x, col, p, lanes, size, index_size, hardware), sums)
        p += lanes
    for step in range(full, load_index(lengths, 0, 4)):
        active = vector_greater(length, step)
        value = shared if uniform else vector_load(val, p, lanes, size)
        more = vector_fma(value, vector_gather(x, col, p, lanes, size, index_size, hardware), sums)
        sums = vector_select(active, more, sums)
        p += vector_popcount(active)
    return sums


@njit(nogil=True)
def _segment(x, col, val, p, end, lanes, size, index_size, uniform, hardware):
    """Return the sum of one segment of a heavy row: interleaved sums, added in lane order."""
    literally(lanes)
    literally(size)
    literally(index_size)
    literally(uniform)
    literally(hardware)
    shared = load_float(val, 0, size)
    sums = vector_zero(lanes, size)
    spread = vector_splat(shared, lanes)
    while p + lanes <= end:
        value = spread if uniform else vector_load(val, p, lanes, size)
        sums = vector_fma(value, vector_gather(x, col, p, lanes, size, index_size, hardware), sums)
        p += lanes
    total = vector_extract(sums, 0)
    for lane in range(1, lanes):
        total += vector_extract(sums, lane)
    while p < end:
        value = shared if uniform else load_float(val, p, size)
        total = fma(value, load_float(x, load_index(col, p, index_size), size), total)
        p += 1
    return total


@njit(nogil=True)
def _combine(plan, y, partial, row, alpha, beta, size):
    """Add the partial sums of one split row in order."""
    literally(size)
    starts = load_index(plan, F_SPLIT_START, 8)
    first = load_index(starts, row, 8)
    total = load_float(partial, first, size)
    for part in range(first + 1, load_index(starts, row + 1, 8)):
        total += load_float(partial, part, size)
    target = load_index(load_index(plan, F_SPLIT_ROWS, 8), row, 4)
    _store_result(y, partial, target + 1, target, total, alpha, beta, size)


@njit(nogil=True)
def _clear(plan, y, unit, beta, size):
    """Write the rows without nonzeros: 0, or beta * y."""
    literally(size)
    rows = load_index(plan, F_EMPTY_ROWS, 8)
    zero = float_of_size(0.0, size)
    end = min((unit + 1) * EMPTIES_PER_UNIT, load_index(plan, F_EMPTIES, 8))
    for position in range(unit * EMPTIES_PER_UNIT, end):
        row = load_index(rows, position, 4)
        if beta == 0:
            store_float(y, row, zero, size)
        else:
            store_float(y, row, beta * load_float(y, row, size), size)


@njit(nogil=True)
def _groups(
    plan, x, y, partial, first, last, alpha, beta, lanes, size, index_size, uniform, hardware
):
    """Compute groups first..last-1."""
    literally(lanes)
    literally(size)
    literally(index_size)
    literally(uniform)
    literally(hardware)
    rows = load_index(plan, F_ROWS, 8)
    starts = load_index(plan, F_START, 8)
    bases = load_index(plan, F_GROUP_BASE, 8)
    col = load_index(plan, F_COL, 8)
    val = load_index(plan, F_VAL, 8)
    plain = alpha == 1 and beta == 0 and load_index(plan, F_STRIPS, 8) == 0
    for group in range(first, last):
        lengths = load_index(plan, F_LENGTHS, 8) + group * lanes * 4
        targets = load_index(plan, F_TARGETS, 8) + group * lanes * 4
        shifted = x + size * load_index(bases, group, 4)
        p = load_index(starts, group, 8)
        sums = _group(shifted, col, val, p, lengths, lanes, size, index_size, uniform, hardware)
        if plain and load_index(lengths, lanes - 1, 4) != 0:
            for lane in range(lanes):
                store_float(y, load_index(targets, lane, 4), vector_extract(sums, lane), size)
        else:
            for lane in range(lanes):
                if load_index(lengths, lane, 4) != 0:
                    target = load_index(targets, lane, 4)
                    total = vector_extract(sums, lane)
                    _store_result(y, partial, rows, target, total, alpha, beta, size)


@njit(nogil=True)
def _segments(
    plan, x, y, partial, first, last, alpha, beta, lanes, size, index_size, uniform, hardware
):
    """Compute segments first..last-1 of the heavy rows."""
    literally(lanes)
    literally(size)
    literally(index_size)
    literally(uniform)
    literally(hardware)
    rows = load_index(plan, F_ROWS, 8)
    starts = load_index(plan, F_SEGMENT_START, 8)
    for segment in range(first, last):
        base = load_index(load_index(plan, F_SEGMENT_BASE, 8), segment, 4)
        total = _segment(
            x + size * base,
            load_index(plan, F_COL, 8),
            load_index(plan, F_VAL, 8),
            load_index(starts, segment, 8),
            load_index(starts, segment + 1, 8),
            lanes,
            size,
            index_size,
            uniform,
            hardware,
        )
        target = load_index(load_index(plan, F_SEGMENT_TARGET, 8), segment, 4)
        _store_result(y, partial, rows, target, total, alpha, beta, size)


@cache
def compact_task(lanes: int, size: int, index_size: int, uniform: int, hardware: int):
    """Compile the product y = alpha A x + beta y for one matrix type.

    Args:
        lanes: rows per group.
        size: bytes of a value, 4 or 8.
        index_size: bytes of a column offset, 2 or 4.
        uniform: 1 when all values are equal and only one is stored.
        hardware: 1 to use the gather instruction.

    Returns:
        A numba C callback `void task(job, worker)`.
    """
    stamp = sources_stamp()

    @cfunc("void(int64, int64)", cache=True)
    def task(job, worker):
        if stamp < 0:  # never; see sources_stamp
            return
        plan = load_index(job, JOB_PLAN, 8)
        x = load_index(job, JOB_X, 8)
        y = load_index(job, JOB_Y, 8)
        partial = load_index(job, JOB_PARTIAL, 8)
        alpha = float_of_size(float_from_bits(load_index(job, JOB_ALPHA, 8)), size)
        beta = float_of_size(float_from_bits(load_index(job, JOB_BETA, 8)), size)
        phase = load_index(job, JOB_PHASE, 8)
        workers = load_index(job, JOB_WORKERS, 8)
        bounds = load_index(plan, PLAN_BOUNDS + phase, 8)
        queues = load_index(plan, PLAN_QUEUES + phase, 8)
        groups = load_index(plan, F_GROUPS, 8)
        segments = load_index(plan, F_SEGMENTS, 8)
        for turn in range(workers + 1):
            queue = queue_at(worker, turn, workers)
            chunk = chunk_at(job, queues, queue)
            while chunk >= 0:
                first = load_index(bounds, chunk, 8)
                last = load_index(bounds, chunk + 1, 8)
                if phase == 1:
                    for row in range(first, last):
                        _combine(plan, y, partial, row, alpha, beta, size)
                else:
                    _groups(
                        plan, x, y, partial, first, min(last, groups), alpha, beta,
                        lanes, size, index_size, uniform, hardware,
                    )  # fmt: skip
                    _segments(
                        plan, x, y, partial, max(first - groups, 0), min(last - groups, segments),
                        alpha, beta, lanes, size, index_size, uniform, hardware,
                    )  # fmt: skip
                    for unit in range(max(first - groups - segments, 0), last - groups - segments):
                        _clear(plan, y, unit, beta, size)
                chunk = chunk_at(job, queues, queue)

    return task
