# SPDX-License-Identifier: Apache-2.0
"""Products with several right-hand sides (SpMM): x and y are row-major, (rows, columns).

A row is walked once for every 32, 16, 8 or 1 columns, whose sums stay in registers. The elements of
a row are added in the same order as for one column, so a group's result has the same bits.
"""

from functools import cache

from numba import cfunc, literally, njit

from hbp_spmv.kernels import compact, csr
from hbp_spmv.kernels.pool import (
    JOB_ALPHA,
    JOB_BETA,
    JOB_COLUMNS,
    JOB_PARTIAL,
    JOB_PHASE,
    JOB_PLAN,
    JOB_WORKERS,
    JOB_X,
    JOB_Y,
    PLAN_BOUNDS,
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
    vector_fma,
    vector_load,
    vector_splat,
    vector_store,
    vector_zero,
)

__all__ = ["compact_columns_task", "csr_columns_task"]

BLOCKS = (32, 16, 8, 1)
"""Columns summed in registers in one walk."""


@njit(nogil=True)
def _walk(x, col, val, p, k, lengths, lanes, columns, block, size, index_size, uniform):
    """Sum one row times `block` columns; with `lengths` 0 the row's elements are neighbours."""
    literally(block)
    literally(size)
    literally(index_size)
    literally(uniform)
    sums = vector_zero(block, size)
    shared = load_float(val, 0, size)
    width = lanes
    for step in range(k):
        value = shared if uniform else load_float(val, p, size)
        source = load_index(col, p, index_size) * columns
        sums = vector_fma(vector_splat(value, block), vector_load(x, source, block, size), sums)
        if lengths == 0:
            p += 1
        else:
            while load_index(lengths, width - 1, 4) <= step:
                width -= 1
            p += width
    return sums


@njit(nogil=True)
def _put(y, at, sums, alpha, beta, plain, block, size):
    """Write `block` neighbouring results; `plain` skips alpha and beta."""
    literally(block)
    literally(size)
    if not plain:
        zero = vector_zero(block, size)
        factor = vector_splat(alpha, block)
        if beta == 0:
            sums = vector_fma(factor, sums, zero)
        else:
            scale = vector_splat(beta, block)
            old = vector_fma(scale, vector_load(y, at, block, size), zero)
            sums = vector_fma(factor, sums, old)
    vector_store(y, at, sums, size)


@njit(nogil=True)
def _row(
    x, y, partial, rows, target, col, val, p, k, lengths, lanes, columns, alpha, beta,
    size, index_size, uniform,
):  # fmt: skip
    """Compute all columns of one row, or of one part of a split row."""
    literally(size)
    literally(index_size)
    literally(uniform)
    whole = target < rows
    plain = not whole or (alpha == 1 and beta == 0)
    out = y if whole else partial
    at = (target if whole else target - rows) * columns
    c = 0
    while c + 32 <= columns:
        sums = _walk(
            x + c * size, col, val, p, k, lengths, lanes, columns, 32, size, index_size, uniform
        )
        _put(out, at + c, sums, alpha, beta, plain, 32, size)
        c += 32
    if c + 16 <= columns:
        sums16 = _walk(
            x + c * size, col, val, p, k, lengths, lanes, columns, 16, size, index_size, uniform
        )
        _put(out, at + c, sums16, alpha, beta, plain, 16, size)
        c += 16
    if c + 8 <= columns:
        sums8 = _walk(
            x + c * size, col, val, p, k, lengths, lanes, columns, 8, size, index_size, uniform
        )
        _put(out, at + c, sums8, alpha, beta, plain, 8, size)
        c += 8
    while c < columns:
        sums1 = _walk(
            x + c * size, col, val, p, k, lengths, lanes, columns, 1, size, index_size, uniform
        )
        _put(out, at + c, sums1, alpha, beta, plain, 1, size)
        c += 1


@njit(nogil=True)
def _combine(plan, y, partial, row, columns, alpha, beta, size):
    """Add the partial sums of one split row in order, column by column."""
    literally(size)
    starts = load_index(plan, compact.F_SPLIT_START, 8)
    target = load_index(load_index(plan, compact.F_SPLIT_ROWS, 8), row, 4) * columns
    for c in range(columns):
        total = float_of_size(0.0, size)
        for part in range(load_index(starts, row, 8), load_index(starts, row + 1, 8)):
            total += load_float(partial, part * columns + c, size)
        if beta == 0:
            store_float(y, target + c, alpha * total, size)
        else:
            old = beta * load_float(y, target + c, size)
            store_float(y, target + c, fma(alpha, total, old), size)


@njit(nogil=True)
def _compact_unit(
    plan, x, y, partial, unit, columns, alpha, beta, lanes, size, index_size, uniform
):
    """Compute one unit of the compact layout: a group, a segment, or a run of empty rows."""
    literally(size)
    literally(index_size)
    literally(uniform)
    rows = load_index(plan, compact.F_ROWS, 8)
    groups = load_index(plan, compact.F_GROUPS, 8)
    segments = load_index(plan, compact.F_SEGMENTS, 8)
    col = load_index(plan, compact.F_COL, 8)
    val = load_index(plan, compact.F_VAL, 8)
    if unit < groups:
        lengths = load_index(plan, compact.F_LENGTHS, 8) + unit * lanes * 4
        base = load_index(load_index(plan, compact.F_GROUP_BASE, 8), unit, 4)
        start = load_index(load_index(plan, compact.F_START, 8), unit, 8)
        for lane in range(lanes):
            k = load_index(lengths, lane, 4)
            if k == 0:
                break
            target = load_index(load_index(plan, compact.F_TARGETS, 8), unit * lanes + lane, 4)
            _row(
                x + base * columns * size, y, partial, rows, target, col, val, start + lane, k,
                lengths, lanes, columns, alpha, beta, size, index_size, uniform,
            )  # fmt: skip
    elif unit < groups + segments:
        segment = unit - groups
        starts = load_index(plan, compact.F_SEGMENT_START, 8)
        first = load_index(starts, segment, 8)
        base = load_index(load_index(plan, compact.F_SEGMENT_BASE, 8), segment, 4)
        target = load_index(load_index(plan, compact.F_SEGMENT_TARGET, 8), segment, 4)
        _row(
            x + base * columns * size, y, partial, rows, target, col, val, first,
            load_index(starts, segment + 1, 8) - first, 0, lanes, columns, alpha, beta,
            size, index_size, uniform,
        )  # fmt: skip
    else:
        first = (unit - groups - segments) * compact.EMPTIES_PER_UNIT
        last = min(first + compact.EMPTIES_PER_UNIT, load_index(plan, compact.F_EMPTIES, 8))
        for position in range(first, last):
            row = load_index(load_index(plan, compact.F_EMPTY_ROWS, 8), position, 4)
            _row(
                x, y, partial, rows, row, col, val, 0, 0, 0, lanes, columns, alpha, beta,
                size, index_size, uniform,
            )  # fmt: skip


@cache
def compact_columns_task(lanes: int, size: int, index_size: int, uniform: int):
    """Compile Y = alpha A X + beta Y for the compact layout; arguments as for `compact_task`."""
    stamp = sources_stamp()

    @cfunc("void(int64, int64)", cache=True)
    def task(job, worker):
        if stamp < 0:  # never; see sources_stamp
            return
        plan = load_index(job, JOB_PLAN, 8)
        x = load_index(job, JOB_X, 8)
        y = load_index(job, JOB_Y, 8)
        partial = load_index(job, JOB_PARTIAL, 8)
        columns = load_index(job, JOB_COLUMNS, 8)
        alpha = float_of_size(float_from_bits(load_index(job, JOB_ALPHA, 8)), size)
        beta = float_of_size(float_from_bits(load_index(job, JOB_BETA, 8)), size)
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
                        _compact_unit(
                            plan, x, y, partial, unit, columns, alpha, beta, lanes, size,
                            index_size, uniform,
                        )  # fmt: skip
                    else:
                        _combine(plan, y, partial, unit, columns, alpha, beta, size)
                chunk = chunk_at(job, queues, queue)

    return task


@cache
def csr_columns_task(size: int, index_size: int, uniform: int):
    """Compile Y = alpha A X + beta Y for CSR; arguments as for `compact_task`."""
    stamp = sources_stamp()

    @cfunc("void(int64, int64)", cache=True)
    def task(job, worker):
        if stamp < 0:  # never; see sources_stamp
            return
        plan = load_index(job, JOB_PLAN, 8)
        columns = load_index(job, JOB_COLUMNS, 8)
        alpha = float_of_size(float_from_bits(load_index(job, JOB_ALPHA, 8)), size)
        beta = float_of_size(float_from_bits(load_index(job, JOB_BETA, 8)), size)
        workers = load_index(job, JOB_WORKERS, 8)
        bounds = load_index(plan, PLAN_BOUNDS, 8)
        queues = load_index(plan, PLAN_QUEUES, 8)
        ptr = load_index(plan, csr.F_PTR, 8)
        for turn in range(workers + 1):
            queue = queue_at(worker, turn, workers)
            chunk = chunk_at(job, queues, queue)
            while chunk >= 0:
                for row in range(load_index(bounds, chunk, 8), load_index(bounds, chunk + 1, 8)):
                    first = load_index(ptr, row, 8)
                    _row(
                        load_index(job, JOB_X, 8), load_index(job, JOB_Y, 8), 0, row + 1, row,
                        load_index(plan, csr.F_COL, 8), load_index(plan, csr.F_VAL, 8), first,
                        load_index(ptr, row + 1, 8) - first, 0, 1, columns, alpha, beta,
                        size, index_size, uniform,
                    )  # fmt: skip
                chunk = chunk_at(job, queues, queue)

    return task
