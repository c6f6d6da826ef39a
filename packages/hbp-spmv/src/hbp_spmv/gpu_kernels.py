# SPDX-License-Identifier: Apache-2.0
"""Known GPU formats with kernels of our own (`kernels/cuda/baselines.cu`): arrays and launches.

Each function that takes a matrix and a runtime prepares one `DeviceOperator`. What a kernel divides
(row bins, pieces of the merge path, slices) is divided here, once, and by the matrix alone, so the
bits of y depend on nothing else.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from tenfold_core.errors import InputError
from tenfold_core.sparse.gpu import Runtime

from hbp_spmv.config import SIGMAS

__all__ = [
    "NAMES",
    "PIECE",
    "SLICE",
    "SOURCE",
    "STAGED",
    "TILE",
    "DeviceOperator",
    "csr_adaptive",
    "csr_bytes",
    "csr_merge",
    "csr_scalar",
    "csr_scalar_8192",
    "csr_vector",
    "device_csr",
    "macros",
    "merge_rows",
    "row_bins",
    "sell",
    "sliced_rows",
    "window_order",
]

SOURCE = Path(__file__).parent / "kernels" / "cuda" / "baselines.cu"
NAMES = (
    "csr_scalar", "csr_vector_2", "csr_vector_4", "csr_vector_8", "csr_vector_16", "csr_vector_32",
    "csr_adaptive", "csr_merge", "add_parts", "sell",
)  # fmt: skip
THREADS, WARP = 256, 32
WARPS = THREADS // WARP
ITEMS = 7
"""Steps of the merge path that a thread takes."""
TILE = THREADS * ITEMS
"""Steps of the merge path in one piece."""
STAGED = 2048
"""Products that a bin of short rows keeps in shared memory: 16 KiB in float64."""
SHORT = STAGED // 2
"""Longest row of a bin; a bin begins at most that many nonzeros after its multiple of them."""
PIECE = 4096
"""Nonzeros of a piece of a long row; rows up to that are summed by one block."""
SLICE = 32
"""Rows of a slice: a warp."""
SIGMA_SLACK = 1.03
"""The smallest window is taken whose size is within this factor of the best."""
PADDED_SLACK, PADDED_FREE = 16, 1 << 22
"""Slices are refused from this many elements per nonzero, and altogether, on."""


@dataclass(frozen=True, slots=True)
class DeviceOperator:
    """A matrix on a device, ready to be multiplied by one stream at a time."""

    name: str
    nbytes: int
    """Bytes of the matrix as stored, every array once."""
    launch: Callable[[Any, Any], None]
    """`launch(x, y)` writes A x to y, contiguous device arrays of the matrix's type, and does not
    wait. It allocates nothing, save where `notes` say that the library does."""
    notes: str = ""
    """What a table must say beside the figure: library, algorithm, indices, workspace."""
    matvec: Callable[[Any], Any] | None = None
    """`matvec(x)` is what a user of the library calls, if it returns a new array."""


def csr_bytes(a: csr_array, index_bytes: int = 4) -> int:
    """Return the bytes of a CSR matrix with indices of that size."""
    return (a.shape[0] + 1 + a.nnz) * index_bytes + a.nnz * a.dtype.itemsize


def device_csr(a: csr_array, runtime: Runtime, index: type = np.int32) -> tuple[Any, Any, Any]:
    """Return row starts, columns and values on the device; indices of 32 bits by default."""
    move = runtime.xp.asarray
    return (
        move(np.ascontiguousarray(a.indptr, index)),
        move(np.ascontiguousarray(a.indices, index)),
        move(np.ascontiguousarray(a.data)),
    )


def macros(dtype: np.dtype) -> dict[str, str | int]:
    """Return the macros that `baselines.cu` is compiled with."""
    value = {"float32": "float", "float64": "double"}[dtype.name]
    return {"VALUE": value, "THREADS": THREADS, "ITEMS": ITEMS, "STAGED": STAGED}


def _load(a: csr_array, runtime: Runtime) -> dict[str, Any]:
    return runtime.kernels(SOURCE, NAMES, macros(a.dtype))


def _csr_operator(
    name: str, a: csr_array, runtime: Runtime, kernel: str, grid: int, threads: int, notes: str
) -> DeviceOperator:
    launch_kernel = _load(a, runtime)[kernel]
    rest = (np.uint32(a.shape[0]), *device_csr(a, runtime))

    def launch(x: Any, y: Any) -> None:
        if grid:
            launch_kernel((grid,), (threads,), (x, y, *rest))

    return DeviceOperator(name, csr_bytes(a), launch, notes)


def csr_scalar(a: csr_array, runtime: Runtime) -> DeviceOperator:
    """Prepare one thread a row."""
    grid = _blocks(a.shape[0])
    return _csr_operator("csr-scalar", a, runtime, "csr_scalar", grid, THREADS, "int32 indices")


def csr_scalar_8192(a: csr_array, runtime: Runtime) -> DeviceOperator:
    """Prepare one thread a row with the paper's 8192 threads, in 256 blocks of one warp."""
    notes = "int32 indices, 8192 threads whatever the matrix: the paper's own baseline"
    return _csr_operator("csr-scalar-8192", a, runtime, "csr_scalar", 256, WARP, notes)


def csr_vector(a: csr_array, runtime: Runtime) -> DeviceOperator:
    """Prepare W threads a row: the power of two from the mean length up, of 2 to 32."""
    rows = a.shape[0]
    mean = a.nnz / max(rows, 1)
    lanes = next(width for width in (2, 4, 8, 16, 32) if width >= mean or width == 32)
    grid = _blocks(rows * lanes)
    notes = f"int32 indices, {lanes} threads a row"
    return _csr_operator("csr-vector", a, runtime, f"csr_vector_{lanes}", grid, THREADS, notes)


def _blocks(threads: int, each: int = THREADS) -> int:
    return -(-threads // each)


# Row bins


def row_bins(ptr: NDArray) -> tuple[NDArray[np.uint32], NDArray[np.uint32], NDArray[np.uint32]]:
    """Cut rows into bins of one block each.

    Rows of up to SHORT nonzeros share a bin while they begin in the same SHORT nonzeros, and in the
    same THREADS rows; a longer row has its own bin, from PIECE nonzeros on one for each piece.

    Args:
        ptr: row starts.

    Returns:
        Bins as (target, rows, begin, end), rows being 0 and target a partial sum for a piece of a
        row; the rows in pieces; the first partial sum of each of them, and the end.
    """
    rows = len(ptr) - 1
    start = ptr[:-1].astype(np.int64)
    short = np.diff(ptr) <= SHORT
    first = np.ones(rows, np.bool_)
    first[1:] = ~short[1:] | ~short[:-1] | (np.diff(start // SHORT) > 0)
    first[::THREADS] = True
    tops = np.flatnonzero(first)
    tails = np.append(tops[1:], rows)[: len(tops)]
    begin, end = start[tops], ptr[tails].astype(np.int64)
    count = np.where(end - begin > PIECE, -(-(end - begin) // PIECE), 1)
    split = count > 1
    split_start = np.append(0, np.cumsum(count[split]))
    owner = np.repeat(np.arange(len(tops)), count)
    number = np.arange(len(owner)) - np.repeat(np.cumsum(count) - count, count)
    bins = np.empty((len(owner), 4), np.uint32)
    bins[:, 0], bins[:, 1] = tops[owner], (tails - tops)[owner]
    bins[:, 2] = begin[owner] + PIECE * number
    bins[:, 3] = np.where(split[owner], np.minimum(bins[:, 2] + PIECE, end[owner]), end[owner])
    bins[split[owner], 0] = np.arange(split_start[-1])
    bins[split[owner], 1] = 0
    return bins, tops[split].astype(np.uint32), split_start.astype(np.uint32)


def csr_adaptive(a: csr_array, runtime: Runtime) -> DeviceOperator:
    """Prepare row bins: packed short rows, a block a longer row, long rows in pieces."""
    xp, kernels = runtime.xp, _load(a, runtime)
    bins, split_rows, split_start = row_bins(a.indptr)
    count, split = len(bins), len(split_rows)
    partial = xp.empty(max(int(split_start[-1]), 1), a.dtype)
    rest = (partial, xp.asarray(bins.reshape(-1)), *device_csr(a, runtime))
    parts = (
        partial, np.uint32(split), np.uint32(0), xp.asarray(split_rows), xp.asarray(split_start)
    )  # fmt: skip

    def launch(x: Any, y: Any) -> None:
        if count:
            kernels["csr_adaptive"]((count,), (THREADS,), (x, y, *rest))
        if split:
            kernels["add_parts"]((_blocks(split, WARPS),), (THREADS,), (y, *parts))

    nbytes = csr_bytes(a) + bins.nbytes + split_rows.nbytes + split_start.nbytes
    notes = f"int32 indices, {count} bins, {split} rows in pieces"
    return DeviceOperator("csr-adaptive", nbytes, launch, notes)


# Merge path


def merge_rows(ptr: NDArray) -> NDArray[np.uint32]:
    """Return the rows finished where the merge path crosses every TILE-th diagonal, and its end."""
    rows, nnz = len(ptr) - 1, int(ptr[-1])
    diagonals = np.minimum(np.arange(0, rows + nnz + TILE, TILE), rows + nnz)
    # Row r ends after its own r + ptr[r + 1] steps and one; that ascends strictly.
    last_step = ptr[1:].astype(np.int64) + np.arange(rows)
    return np.searchsorted(last_step, diagonals, side="left").astype(np.uint32)


def csr_merge(a: csr_array, runtime: Runtime) -> DeviceOperator:
    """Prepare equal pieces of the merge path of row ends and nonzeros, after Merrill and Garland.

    The paper searches the piece's corners in every product; here that is done once, as the vendor's
    preprocessing does it.
    """
    xp, kernels = runtime.xp, _load(a, runtime)
    row_at = merge_rows(a.indptr)
    pieces = len(row_at) - 1
    carry = xp.empty(max(pieces, 1), a.dtype)
    # The carry of a piece belongs to the row that the next piece begins with.
    split_rows, first = np.unique(row_at[1:pieces], return_index=True)
    split_start = np.append(first, max(pieces - 1, 0)).astype(np.uint32)
    split = len(split_rows)
    counts = (np.uint32(a.shape[0]), np.uint32(a.nnz))
    rest = (carry, *counts, xp.asarray(row_at), *device_csr(a, runtime))
    parts = (
        carry, np.uint32(split), np.uint32(1), xp.asarray(split_rows), xp.asarray(split_start)
    )  # fmt: skip

    def launch(x: Any, y: Any) -> None:
        if pieces:
            kernels["csr_merge"]((pieces,), (THREADS,), (x, y, *rest))
        if split:
            kernels["add_parts"]((_blocks(split, WARPS),), (THREADS,), (y, *parts))

    nbytes = csr_bytes(a) + row_at.nbytes + split_rows.nbytes + split_start.nbytes
    return DeviceOperator("csr-merge", nbytes, launch, f"int32 indices, {pieces} pieces")


# Slices


def window_order(ptr: NDArray, sigma: int) -> NDArray[np.int64]:
    """Return the rows, each window of `sigma` longest first, equal lengths in row order."""
    lengths = np.diff(ptr).astype(np.int64)
    return np.lexsort((-lengths, np.arange(len(lengths)) // sigma))


def sliced_rows(
    name: str, a: csr_array, order: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray]:
    """Lay rows out in slices of 32, step by step, each padded to its longest row.

    Args:
        name: format, for the error.
        a: canonical CSR.
        order: row of each slot.

    Returns:
        First element of each slice, and the end; columns, -1 where padded; values, 0 where padded.

    Raises:
        InputError: the padding would be many times the matrix.
    """
    rows, slices = a.shape[0], _blocks(a.shape[0], SLICE)
    lengths = np.diff(a.indptr).astype(np.int64)
    start = _slice_starts(lengths[order])
    size = int(start[-1])
    if size > max(PADDED_SLACK * a.nnz, PADDED_FREE):
        raise InputError(
            f"format {name!r}: slices of {SLICE} rows would store {size} elements for {a.nnz} "
            "nonzeros; leave it out for this matrix"
        )
    slot = np.empty(rows, np.int64)
    slot[order] = np.arange(rows)
    corner = start[:slices][slot // SLICE] + slot % SLICE - SLICE * a.indptr[:-1].astype(np.int64)
    place = np.repeat(corner, lengths) + SLICE * np.arange(a.nnz)
    col, val = np.full(size, -1, np.int32), np.zeros(size, a.dtype)
    col[place], val[place] = a.indices, a.data
    return start, col, val


def _slice_starts(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    slices = _blocks(len(lengths), SLICE)
    longest = np.zeros(slices * SLICE, np.int64)
    longest[: len(lengths)] = lengths
    widths = longest.reshape(slices, SLICE).max(axis=1, initial=0)
    return np.append(0, SLICE * np.cumsum(widths))


def sell(a: csr_array, runtime: Runtime) -> DeviceOperator:
    """Prepare SELL-32-sigma with the smallest good window."""
    xp, rows = runtime.xp, a.shape[0]
    lengths = np.diff(a.indptr).astype(np.int64)
    orders = [(sigma, window_order(a.indptr, sigma)) for sigma in SIGMAS]
    sizes = [int(_slice_starts(lengths[order])[-1]) for _, order in orders]
    limit = SIGMA_SLACK * min(sizes)
    (sigma, order), size = next(
        (item, size) for item, size in zip(orders, sizes, strict=True) if size <= limit
    )
    arrays = sliced_rows("sell", a, order)
    start, col, val = (xp.asarray(array) for array in arrays)
    targets = xp.asarray(order.astype(np.uint32))
    slices = len(arrays[0]) - 1
    kernel = _load(a, runtime)["sell"]
    rest = (np.uint32(rows), np.uint32(slices), start, targets, col, val)

    def launch(x: Any, y: Any) -> None:
        if slices:
            kernel((_blocks(slices, WARPS),), (THREADS,), (x, y, *rest))

    nbytes = sum(int(array.nbytes) for array in (start, targets, col, val))
    notes = f"sigma {sigma}, {size} elements for {a.nnz} nonzeros"
    return DeviceOperator("sell", nbytes, launch, notes)
