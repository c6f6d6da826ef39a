# SPDX-License-Identifier: Apache-2.0
"""Row-gather CSR product: what `auto` falls back to where rows are long and regular, or very short.

Four interleaved sums per row (one register), added in lane order, then the remainder of the row.
"""

from functools import cache

from numba import cfunc, literally, njit

from hbp_spmv.kernels.pool import (
    JOB_ALPHA,
    JOB_BETA,
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
    vector_load,
    vector_splat,
    vector_zero,
)

__all__ = ["FIELDS", "csr_task"]

FIELDS = ("ptr", "col", "val")
F_PTR, F_COL, F_VAL = range(PLAN_LAYOUT, PLAN_LAYOUT + len(FIELDS))


@njit(nogil=True)
def _rows(plan, x, y, first, last, alpha, beta, lanes, size, index_size, uniform, hardware, ahead):
    """Compute rows first..last-1."""
    literally(lanes)
    literally(size)
    literally(index_size)
    literally(uniform)
    literally(hardware)
    literally(ahead)
    ptr = load_index(plan, F_PTR, 8)
    col = load_index(plan, F_COL, 8)
    val = load_index(plan, F_VAL, 8)
    shared = float_of_size(0.0, size)
    if uniform:
        shared = load_float(val, 0, size)
    spread = vector_splat(shared, lanes)
    p = load_index(ptr, first, 8)
    for row in range(first, last):
        end = load_index(ptr, row + 1, 8)
        total = float_of_size(0.0, size)
        if p + lanes <= end:
            sums = vector_zero(lanes, size)
            while p + lanes <= end:
                if ahead:
                    if not uniform:
                        prefetch(val, p + AHEAD // size, size)
                    prefetch(col, p + AHEAD // size, index_size)
                value = spread if uniform else vector_load(val, p, lanes, size)
                gathered = vector_gather(x, col, p, lanes, size, index_size, hardware)
                sums = vector_fma(value, gathered, sums)
                p += lanes
            for lane in range(lanes):
                total += vector_extract(sums, lane)
        while p < end:
            value = shared if uniform else load_float(val, p, size)
            total = fma(value, load_float(x, load_index(col, p, index_size), size), total)
            p += 1
        if beta == 0:
            store_float(y, row, alpha * total, size)
        else:
            store_float(y, row, fma(alpha, total, beta * load_float(y, row, size)), size)


@cache
def csr_task(lanes: int, size: int, index_size: int, uniform: int, hardware: int, ahead: int = 0):
    """Compile y = alpha A x + beta y for CSR; arguments as for `compact_task`.

    `ahead` (0 or 1) prefetches: 1.4 times faster on matrices larger than the second-level cache,
    1.1 times slower on smaller ones (one Zen 4 core).
    """
    stamp = sources_stamp()

    @cfunc("void(int64, int64)", cache=True)
    def task(job, worker):
        if stamp < 0:  # never; see sources_stamp
            return
        plan = load_index(job, JOB_PLAN, 8)
        x = load_index(job, JOB_X, 8)
        y = load_index(job, JOB_Y, 8)
        alpha = float_of_size(float_from_bits(load_index(job, JOB_ALPHA, 8)), size)
        beta = float_of_size(float_from_bits(load_index(job, JOB_BETA, 8)), size)
        workers = load_index(job, JOB_WORKERS, 8)
        bounds = load_index(plan, PLAN_BOUNDS, 8)
        queues = load_index(plan, PLAN_QUEUES, 8)
        for turn in range(workers + 1):
            queue = queue_at(worker, turn, workers)
            chunk = chunk_at(job, queues, queue)
            while chunk >= 0:
                first = load_index(bounds, chunk, 8)
                last = load_index(bounds, chunk + 1, 8)
                _rows(
                    plan, x, y, first, last, alpha, beta,
                    lanes, size, index_size, uniform, hardware, ahead,
                )  # fmt: skip
                chunk = chunk_at(job, queues, queue)

    return task
