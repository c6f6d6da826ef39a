# SPDX-License-Identifier: Apache-2.0
"""Row-gather CSR product of complex matrices.

Real and imaginary part share a register of two lanes: with `p = sum v.real * x` and
`q = sum v.imag * x`, a row has the sum `(p[0] - q[1]) + i (p[1] + q[0])`. Two elements go side
by side, for four independent chains.
"""

from functools import cache

from numba import cfunc, literally, njit

from hbp_spmv.kernels.csr import F_COL, F_PTR, F_VAL
from hbp_spmv.kernels.pool import (
    JOB_ALPHA,
    JOB_ALPHA_IMAGINARY,
    JOB_BETA,
    JOB_BETA_IMAGINARY,
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
    load_float,
    load_index,
    sources_stamp,
    store_float,
    vector_extract,
    vector_fma,
    vector_load,
    vector_splat,
    vector_zero,
)

__all__ = ["complex_task"]


@njit(nogil=True)
def _multiply_part(x, col, val, p, part, sums, size, index_size, uniform):
    """Return `sums + part(val[p]) * x[col[p]]`, part 0 the real and 1 the imaginary one."""
    literally(size)
    literally(index_size)
    literally(uniform)
    at = 0 if uniform else 2 * p
    factor = vector_splat(load_float(val, at + part, size), 2)
    return vector_fma(factor, vector_load(x, 2 * load_index(col, p, index_size), 2, size), sums)


@njit(nogil=True)
def _factor(job, real, imaginary, size):
    """Return a complex factor of the job as (real, imaginary)."""
    literally(size)
    return (
        float_of_size(float_from_bits(load_index(job, real, 8)), size),
        float_of_size(float_from_bits(load_index(job, imaginary, 8)), size),
    )


@njit(nogil=True)
def _put(y, row, real, imaginary, alpha, beta, size):
    """Write `alpha * sum + beta * y[row]`; y is not read when beta is 0."""
    literally(size)
    out = alpha[0] * real
    out_imaginary = alpha[0] * imaginary
    if alpha[1] != 0:  # else 0 * inf would reach the other part
        out -= alpha[1] * imaginary
        out_imaginary += alpha[1] * real
    if beta[0] != 0 or beta[1] != 0:
        old = load_float(y, 2 * row, size)
        old_imaginary = load_float(y, 2 * row + 1, size)
        out += beta[0] * old
        out_imaginary += beta[0] * old_imaginary
        if beta[1] != 0:
            out -= beta[1] * old_imaginary
            out_imaginary += beta[1] * old
    store_float(y, 2 * row, out, size)
    store_float(y, 2 * row + 1, out_imaginary, size)


@njit(nogil=True)
def _row(x, y, row, col, val, p, end, alpha, beta, size, index_size, uniform):
    literally(size)
    literally(index_size)
    literally(uniform)
    real = vector_zero(2, size)
    imaginary = vector_zero(2, size)
    real_odd = vector_zero(2, size)
    imaginary_odd = vector_zero(2, size)
    while p + 2 <= end:
        real = _multiply_part(x, col, val, p, 0, real, size, index_size, uniform)
        imaginary = _multiply_part(x, col, val, p, 1, imaginary, size, index_size, uniform)
        real_odd = _multiply_part(x, col, val, p + 1, 0, real_odd, size, index_size, uniform)
        imaginary_odd = _multiply_part(
            x, col, val, p + 1, 1, imaginary_odd, size, index_size, uniform
        )
        p += 2
    if p < end:
        real = _multiply_part(x, col, val, p, 0, real, size, index_size, uniform)
        imaginary = _multiply_part(x, col, val, p, 1, imaginary, size, index_size, uniform)
    one = vector_splat(float_of_size(1.0, size), 2)
    real = vector_fma(one, real, real_odd)
    imaginary = vector_fma(one, imaginary, imaginary_odd)
    total = vector_extract(real, 0) - vector_extract(imaginary, 1)
    total_imaginary = vector_extract(real, 1) + vector_extract(imaginary, 0)
    _put(y, row, total, total_imaginary, alpha, beta, size)


@cache
def complex_task(size: int, index_size: int, uniform: int):
    """Compile y = alpha A x + beta y for complex CSR.

    Args:
        size: bytes of a real part, 4 or 8.
        index_size: bytes of a column, 2 or 4.
        uniform: 1 when all values are equal and only one is stored.

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
        alpha = _factor(job, JOB_ALPHA, JOB_ALPHA_IMAGINARY, size)
        beta = _factor(job, JOB_BETA, JOB_BETA_IMAGINARY, size)
        workers = load_index(job, JOB_WORKERS, 8)
        bounds = load_index(plan, PLAN_BOUNDS, 8)
        queues = load_index(plan, PLAN_QUEUES, 8)
        ptr = load_index(plan, F_PTR, 8)
        col = load_index(plan, F_COL, 8)
        val = load_index(plan, F_VAL, 8)
        for turn in range(workers + 1):
            queue = queue_at(worker, turn, workers)
            chunk = chunk_at(job, queues, queue)
            while chunk >= 0:
                for row in range(load_index(bounds, chunk, 8), load_index(bounds, chunk + 1, 8)):
                    first = load_index(ptr, row, 8)
                    end = load_index(ptr, row + 1, 8)
                    _row(x, y, row, col, val, first, end, alpha, beta, size, index_size, uniform)
                chunk = chunk_at(job, queues, queue)

    return task
