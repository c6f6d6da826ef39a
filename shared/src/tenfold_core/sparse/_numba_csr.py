# SPDX-License-Identifier: Apache-2.0
"""CSR products compiled by Numba, one thread or several.

Indices are cast to ``uint64``: with signed ones Numba adds the wrap-around of negative indices and
the loop does not vectorise. Four partial sums in a fixed order let it, without ``fastmath``,
whose reordering differs between builds.
"""

import numpy as np
from numba import get_num_threads, njit, prange, set_num_threads

__all__ = ["multiply"]


def multiply(
    indptr: np.ndarray,
    indices: np.ndarray,
    data: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    threads: int,
) -> None:
    """Write ``A @ x`` into ``y``."""
    if threads <= 1:
        _serial(indptr, indices, data, x, y)
        return
    before = get_num_threads()
    set_num_threads(min(threads, before))
    try:
        _parallel(indptr, indices, data, x, y)
    finally:
        set_num_threads(before)


@njit(cache=True, nogil=True, inline="always")
def _row(begin, end, indices, data, x):
    zero = data.dtype.type(0)
    s0, s1, s2, s3 = zero, zero, zero, zero
    p = begin
    while p + np.uint64(4) <= end:
        s0 += data[p] * x[np.uint64(indices[p])]
        s1 += data[p + np.uint64(1)] * x[np.uint64(indices[p + np.uint64(1)])]
        s2 += data[p + np.uint64(2)] * x[np.uint64(indices[p + np.uint64(2)])]
        s3 += data[p + np.uint64(3)] * x[np.uint64(indices[p + np.uint64(3)])]
        p += np.uint64(4)
    while p < end:
        s0 += data[p] * x[np.uint64(indices[p])]
        p += np.uint64(1)
    return (s0 + s1) + (s2 + s3)


@njit(cache=True, nogil=True)
def _serial(indptr, indices, data, x, y):
    for row in range(y.size):
        y[row] = _row(np.uint64(indptr[row]), np.uint64(indptr[row + 1]), indices, data, x)


@njit(cache=True, nogil=True, parallel=True)
def _parallel(indptr, indices, data, x, y):
    for row in prange(y.size):
        y[row] = _row(np.uint64(indptr[row]), np.uint64(indptr[row + 1]), indices, data, x)
