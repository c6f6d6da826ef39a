# SPDX-License-Identifier: Apache-2.0
"""What decides how fast a matrix can be multiplied, counted in one pass over its entries.

`describe_file` is the `info` command; `matrix_info` the same for a matrix in memory.
"""

from dataclasses import asdict, dataclass
from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from hbp_spmv.compiled import njit
from hbp_spmv.config import WINDOW_SPAN
from hbp_spmv.hashing import MAX_CLASSES, heavy_limit, length_classes, place_classes

__all__ = ["MatrixInfo", "describe_file", "matrix_info"]

STRIP_WIDTHS = (65536, 16384, 4096)
"""Strips for 16-bit offsets, and for keeping a part of x in a cache."""
EXACT_SYMMETRY = 1 << 20
"""Entries up to which symmetry is checked on all of them."""
SYMMETRY_SAMPLE = 1 << 17
LANES, SLICE, SIGMA = 16, 8, 512
"""Rows of a group, of a SELL slice and of a reordering window, as they are counted here."""
PAIR_BYTES = 20
"""Cost of a (row, strip) pair: row, length, and a partial sum written and read."""
_QUANTILES = (25, 50, 75, 90, 99)


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixInfo:
    """Features of a canonical CSR matrix."""

    shape: tuple[int, int]
    nnz: int
    dtype: str
    row_mean: float
    """Mean stored entries of a row."""
    row_max: int
    row_cv: float
    """Standard deviation of the row length over its mean."""
    empty_rows: int
    row_quantiles: dict[str, float]
    """Row length that this share of the rows does not exceed."""
    row_histogram: dict[str, int]
    """Rows by length, in powers of two."""
    bandwidth_mean: float | None
    """Mean of |row - column| over all entries; None unless square."""
    bandwidth_max: int | None
    pattern_symmetry: float | None
    """Share of off-diagonal entries (i, j) with (j, i) stored, too; None unless square."""
    numeric_symmetry: float | None
    """Share of those whose values are equal."""
    symmetry_exact: bool
    """Every entry was looked at, not a sample of about 131 000."""
    narrow_groups: float
    """Share of groups (16 rows after the lut hash) whose columns fit a 16-bit offset."""
    lane_efficiency: float
    """nnz of the groups over their slots, in windows of 512 rows; 1 is no waste."""
    heavy_rows: int
    """Rows above 16 times the mean (at least 128 entries), which groups leave out."""
    pairs_per_nonzero: dict[int, float]
    """S(width): non-empty (row, strip) pairs per stored entry."""
    uniform: bool
    """All values are equal, so one is enough."""
    explicit_zeros: int
    non_finite: int
    duplicates: int | None
    """Entries the reader added to an earlier one, if it told."""
    predicted_bytes: dict[str, int]
    """Bytes a product must move: everything stored, x and y, each once."""


def describe_file(path: str | PathLike[str], **reading: Any) -> dict[str, Any]:
    """Read a matrix and return its features and the choice of `auto`, for printing.

    Args:
        path: the file.
        reading: settings of `hbp_spmv.read`.

    Raises:
        ReadError: the file cannot be trusted.
    """
    from hbp_spmv.readers import read_with_info
    from hbp_spmv.selection import select

    a, source = read_with_info(path, **reading)
    facts: dict[str, Any] = {
        "file": str(path),
        "source": source.header,
        "declared_symmetry": source.symmetry,
        "stored_entries": source.stored_entries,
    }
    facts |= asdict(matrix_info(a, duplicates=source.duplicates))
    plan = select(a)
    return facts | {"advice": plan.format, "reasons": list(plan.reasons)}


def matrix_info(a: csr_array, *, duplicates: int | None = None) -> MatrixInfo:
    """Count the features of a canonical CSR matrix.

    Args:
        a: canonical CSR with floating-point or complex values.
        duplicates: what the reader counted.
    """
    rows, columns = a.shape
    square = rows == columns
    lengths = np.diff(a.indptr).astype(np.int64)
    mean = a.nnz / max(rows, 1)
    distance, furthest, zeros, non_finite, uniform, pairs = _scan(
        a.indptr, a.indices, a.data, np.array(STRIP_WIDTHS)
    )
    pattern, numeric, exact = _symmetry(a)
    heavy = heavy_limit(len(lengths), int(lengths.sum()))
    light = np.where(lengths > heavy, 0, lengths)
    groups, narrow, slots = _group(
        a.indptr, a.indices, light, length_classes(light), max(columns - WINDOW_SPAN, 0), LANES
    )
    _, _, padded = _group(a.indptr, a.indices, lengths, length_classes(lengths), 0, SLICE)
    facts = {
        "uniform": uniform and a.nnz > 1,
        "narrow": narrow == groups,
        "groups": groups,
        "padded": padded,
        "pairs": int(pairs[0]),
    }
    return MatrixInfo(
        shape=(int(rows), int(columns)),
        nnz=int(a.nnz),
        dtype=a.dtype.name,
        row_mean=mean,
        row_max=int(lengths.max(initial=0)),
        row_cv=float(lengths.std() / mean) if a.nnz else 0.0,
        empty_rows=int(np.count_nonzero(lengths == 0)),
        row_quantiles=_quantiles(lengths),
        row_histogram=_histogram(lengths),
        bandwidth_mean=distance / max(a.nnz, 1) if square else None,
        bandwidth_max=int(furthest) if square else None,
        pattern_symmetry=pattern,
        numeric_symmetry=numeric,
        symmetry_exact=exact,
        narrow_groups=narrow / groups if groups else 1.0,
        lane_efficiency=int(light.sum()) / slots if slots else 1.0,
        heavy_rows=int(np.count_nonzero(lengths > heavy)),
        pairs_per_nonzero={
            width: int(count) / max(a.nnz, 1)
            for width, count in zip(STRIP_WIDTHS, pairs, strict=True)
        },
        uniform=facts["uniform"],
        explicit_zeros=int(zeros),
        non_finite=int(non_finite),
        duplicates=duplicates,
        predicted_bytes=_predicted_bytes(a, **facts),
    )


def _symmetry(a: csr_array) -> tuple[float | None, float | None, bool]:
    """Return the shares of mirrored and of equal off-diagonal entries; whether all were seen."""
    exact = a.nnz <= EXACT_SYMMETRY
    if a.shape[0] != a.shape[1]:
        return None, None, exact
    stride = 1 if exact else a.nnz // SYMMETRY_SAMPLE
    seen, mirrored, equal = _mirror(a.indptr, a.indices, a.data, stride)
    return (mirrored / seen, equal / seen, exact) if seen else (1.0, 1.0, exact)


def _quantiles(lengths: NDArray[np.int64]) -> dict[str, float]:
    values = np.percentile(lengths, _QUANTILES) if len(lengths) else np.zeros(len(_QUANTILES))
    return {f"{q}%": float(value) for q, value in zip(_QUANTILES, values, strict=True)}


def _histogram(lengths: NDArray[np.int64]) -> dict[str, int]:
    """Count rows of length 0, 1, 2-3, 4-7, 8-15, ..."""
    classes = np.frexp(lengths.astype(np.float64))[1]
    counts = np.bincount(classes) if len(lengths) else np.zeros(0, int)
    names = ["0", "1", *(f"{1 << e}-{(2 << e) - 1}" for e in range(1, 64))]
    return {name: int(count) for name, count in zip(names, counts, strict=False) if count}


def _predicted_bytes(
    a: csr_array, *, uniform: bool, narrow: bool, groups: int, padded: int, pairs: int
) -> dict[str, int]:
    """Model the traffic of a product, format by format.

    `compact` counts what the layout stores: 8 bytes a lane, 12 a group, and 2 or 4 an offset.
    `sell` counts 10 bytes a row and the padding of slices of 8 rows in windows of 512.
    `compact-strips` is its variant with strips of 65536 columns, 20 bytes a (row, strip) pair.
    `paper` has two int32 per slot of its dense arrays and writes and reads `mid`.
    """
    size, (rows, columns) = a.dtype.itemsize, a.shape
    vectors = size * (rows + columns)
    moved = {
        "csr-int32": a.nnz * (size + 4) + 4 * (rows + 1),
        "csr-int64": a.nnz * (size + 8) + 8 * (rows + 1),
    }
    if a.dtype.kind == "f":
        value = 0 if uniform else size
        strips = -(-columns // 4096)
        begins = -(-rows // 32) * strips + 1
        moved |= {
            "sell": padded * (size + 4) + 10 * rows,
            "compact": a.nnz * (value + (2 if narrow else 4)) + groups * (8 * LANES + 12),
            "compact-strips": a.nnz * (value + 2) + PAIR_BYTES * pairs,
            "paper": a.nnz * (size + 8) + rows * strips * (8 + 2 * size) + 4 * begins,
        }
    return {name: int(count + vectors) for name, count in moved.items()}


@njit(nogil=True, cache=True)
def _scan(ptr, col, val, widths):
    """Visit every entry once.

    Returns:
        Sum and maximum of |row - column|, zeros, values not finite, whether all values are equal,
        and the non-empty (row, strip) pairs for each width.
    """
    total = 0.0
    furthest = 0
    zeros = 0
    non_finite = 0
    uniform = True
    pairs = np.zeros(len(widths), np.int64)
    ends = np.empty(len(widths), np.int64)
    for row in range(len(ptr) - 1):
        ends[:] = 0
        for p in range(ptr[row], ptr[row + 1]):
            column = np.int64(col[p])
            distance = abs(row - column)
            total += distance
            furthest = max(furthest, distance)
            value = val[p]
            if value == 0:
                zeros += 1
            if not np.isfinite(value):
                non_finite += 1
            if value != val[0]:
                uniform = False
            for w in range(len(widths)):
                if column >= ends[w]:
                    pairs[w] += 1
                    ends[w] = (column // widths[w] + 1) * widths[w]
    return total, furthest, zeros, non_finite, uniform, pairs


@njit(nogil=True, cache=True)
def _mirror(ptr, col, val, stride):
    """Return off-diagonal entries seen, mirrored, mirrored with equal value; every `stride`-th."""
    seen = 0
    mirrored = 0
    equal = 0
    for row in range(len(ptr) - 1):
        first = (np.int64(ptr[row]) + stride - 1) // stride * stride
        for p in range(first, ptr[row + 1], stride):
            other = col[p]
            if other == row:
                continue
            seen += 1
            low = ptr[other]
            end = ptr[other + 1]
            high = end
            while low < high:
                middle = (low + high) // 2
                if col[middle] < row:
                    low = middle + 1
                else:
                    high = middle
            if low < end and col[low] == row:
                mirrored += 1
                if val[low] == val[p]:
                    equal += 1
    return seen, mirrored, equal


@njit(nogil=True, cache=True)
def _group(ptr, col, lengths, classes, limit, lanes):
    """Group the rows as the compact layout does, without moving an entry.

    Args:
        ptr: row starts.
        col: columns.
        lengths: row lengths, 0 for rows that groups leave out.
        classes: table of the lut hash.
        limit: largest base column.
        lanes: rows of a group.

    Returns:
        Groups, those whose columns fit 16 bits, and slots stepped through.
    """
    placed = np.empty(SIGMA, np.int64)
    counts = np.empty(MAX_CLASSES + 2, np.int64)
    groups = 0
    narrow = 0
    slots = 0
    for top in range(0, len(lengths), SIGMA):
        window = lengths[top : top + SIGMA]
        place_classes(window, classes, True, placed[: len(window)], counts)
        for first in range(0, len(window), lanes):
            smallest = limit
            largest = np.int64(0)
            longest = np.int64(0)
            for slot in range(first, min(first + lanes, len(window))):
                k = window[placed[slot]]
                if k > 0:
                    p = ptr[top + placed[slot]]
                    smallest = min(smallest, np.int64(col[p]))
                    largest = max(largest, np.int64(col[p + k - 1]))
                    longest = max(longest, k)
            if longest > 0:
                groups += 1
                slots += longest * lanes
                if largest - smallest < WINDOW_SPAN:
                    narrow += 1
    return groups, narrow, slots
