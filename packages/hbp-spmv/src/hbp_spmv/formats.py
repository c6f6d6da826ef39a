# SPDX-License-Identifier: Apache-2.0
"""Layouts of the baselines that have a kernel of ours: merge-path CSR, SELL-C-sigma, ELL."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from tenfold_core.errors import InputError

from hbp_spmv.calibration import hardware_gather
from hbp_spmv.config import SIGMAS
from hbp_spmv.kernels import merge, sell

__all__ = ["StoredArrays", "ell", "merge_path", "sell_c_sigma"]

MERGE_LANES = 4
"""Interleaved sums per row."""
SLICE_LANES = 8
"""Rows of a slice: 8 was faster than 16 and 32 on matrices with short or uneven rows."""
SIGMA_SLACK = 1.03
"""The smallest window is taken whose size is within this factor of the best."""
ELL_SLACK = 16
"""ELL is refused when it would store more than this many elements per nonzero..."""
ELL_FREE = 1 << 20
"""...and more than this many altogether."""


@dataclass(frozen=True, slots=True)
class StoredArrays:
    """A layout that is nothing but arrays, counts and the cost of its units, phase by phase."""

    arrays: dict[str, NDArray]
    counts: dict[str, int]
    names: tuple[str, ...]
    """Plan fields of the kernel, in order; a name in neither dict is 0."""
    units: list[NDArray]
    partials: int = 0
    """Partial sums a product needs."""

    @property
    def nbytes(self) -> int:
        """Bytes of all stored arrays."""
        return sum(array.nbytes for array in self.arrays.values())

    def fields(self) -> list[int]:
        """Return the layout part of a plan."""
        found = self.counts | {name: array.ctypes.data for name, array in self.arrays.items()}
        return [found.get(name, 0) for name in self.names]

    def work(self) -> list[NDArray]:
        """Return the cost of each unit of each phase."""
        return self.units


def merge_path(a: csr_array) -> tuple[StoredArrays, Any]:
    """Return CSR as it is, cut into equal pieces of the merge path, and the kernel."""
    ptr, col = _unsigned(a.indptr), _unsigned(a.indices)
    total = a.shape[0] + a.nnz
    row_at = np.empty(-(-total // merge.PIECE) + 1, np.int64)
    merge.split_path(a.indptr, merge.PIECE, row_at)
    pieces = len(row_at) - 1
    layout = StoredArrays(
        {"row_at": row_at, "ptr": ptr, "col": col, "val": np.ascontiguousarray(a.data)},
        {"rows": a.shape[0], "pieces": pieces, "total": total},
        merge.FIELDS,
        [np.ones(pieces, np.int64), np.ones(1, np.int64)],
        partials=pieces,
    )
    task = merge.merge_task(
        MERGE_LANES, a.dtype.itemsize, col.itemsize, ptr.itemsize, int(hardware_gather())
    )
    return layout, task


def sell_c_sigma(a: csr_array) -> tuple[StoredArrays, Any]:
    """Return SELL-C-sigma with the smallest good window, and the kernel."""
    _check_32_bit("sell", a)
    rows, lanes = a.shape[0], SLICE_LANES
    orders = []
    for sigma in SIGMAS:
        order = np.empty(rows, np.int32)
        sell.sort_windows(a.indptr, sigma, order)
        orders.append((order, sell.padded_size(a.indptr, order, lanes)))
    limit = SIGMA_SLACK * min(size for _, size in orders)
    order, size = next(item for item in orders if item[1] <= limit)
    slices = -(-rows // lanes)
    lengths = np.zeros(slices * lanes, np.int32)
    lengths[:rows] = np.diff(a.indptr)[order]
    by_slice = lengths.reshape(slices, lanes)
    widths = np.stack([by_slice.min(axis=1), by_slice.max(axis=1)], axis=1)
    start = np.concatenate([[0], lanes * np.cumsum(widths[:, 1], dtype=np.int64)])
    col, val = np.zeros(size, np.uint32), np.zeros(size, a.dtype)
    sell.fill_slices(a.indptr, a.indices, a.data, order, start, lanes, lanes, col, val)
    arrays = {
        "start": start, "widths": widths, "targets": order, "lengths": lengths, "col": col,
        "val": val,
    }  # fmt: skip
    layout = StoredArrays(arrays, {"rows": rows}, sell.FIELDS, [np.diff(start) + lanes])
    return layout, sell.sell_task(lanes, a.dtype.itemsize, 0, int(hardware_gather()))


def ell(a: csr_array) -> tuple[StoredArrays, Any]:
    """Return ELLPACK, every row padded to the longest, and the kernel.

    Raises:
        InputError: the padding would be many times the matrix.
    """
    _check_32_bit("ell", a)
    rows, lanes = a.shape[0], SLICE_LANES
    widest = int(np.diff(a.indptr).max(initial=0))
    stride = -(-rows // lanes) * lanes
    size = stride * widest
    if size > max(ELL_SLACK * a.nnz, ELL_FREE):
        raise InputError(
            f"format 'ell': rows padded to {widest} would store {size} elements for {a.nnz} "
            "nonzeros; leave it out for this matrix"
        )
    lengths = np.zeros(stride, np.int32)
    lengths[:rows] = np.diff(a.indptr)
    col, val = np.zeros(size, np.uint32), np.zeros(size, a.dtype)
    order, start = np.arange(rows, dtype=np.int32), np.arange(0, stride, lanes)
    sell.fill_slices(a.indptr, a.indices, a.data, order, start, stride, lanes, col, val)
    layout = StoredArrays(
        {"lengths": lengths, "col": col, "val": val},
        {"rows": rows, "stride": stride, "widest": widest},
        sell.FIELDS,
        [np.ones(-(-rows // sell.TILE), np.int64)],
    )
    return layout, sell.sell_task(lanes, a.dtype.itemsize, 1, int(hardware_gather()))


def _unsigned(index: NDArray) -> NDArray:
    """Return the same non-negative indices as an unsigned type, without a copy."""
    array = np.ascontiguousarray(index)
    return array.view(np.uint32 if array.itemsize == 4 else np.uint64)


def _check_32_bit(name: str, a: csr_array) -> None:
    if a.shape[0] >= 1 << 31 or a.shape[1] >= 1 << 32:
        raise InputError(
            f"format {name!r}: matrix of shape {a.shape}, expected below 2**31 rows and 2**32 "
            "columns; leave it out for this matrix"
        )
