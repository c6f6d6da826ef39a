# SPDX-License-Identifier: Apache-2.0
"""The validated CSR container that every sparse function of the packages takes."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from tenfold_core.errors import InputError, MissingExtraError

__all__ = ["CSR"]


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class CSR:
    """A matrix in compressed sparse row form; row ``i`` owns ``indptr[i]:indptr[i + 1]``.

    Building one checks in O(1) that the arrays fit together; :meth:`check` scans them. The arrays
    are shared with the caller where they have a usable type and layout, and are never written to.

    Shapes: ``indptr`` (rows + 1,), ``indices`` (nnz,), ``data`` (nnz,).

    Raises:
        InputError: The arrays do not fit together; the text names the array.

    Example:
        >>> CSR((2, 3), [0, 1, 3], [0, 1, 2], [5.0, 6.0, 7.0])
        <CSR 2 x 3, 3 entries, float64, int64 indices>
    """

    shape: tuple[int, int]
    indptr: np.ndarray
    indices: np.ndarray
    data: np.ndarray

    def __init__(
        self, shape: tuple[int, int], indptr: ArrayLike, indices: ArrayLike, data: ArrayLike
    ) -> None:
        rows, columns = _shape(shape)
        starts = _index_array("indptr", indptr)
        if len(starts) != rows + 1:
            raise InputError(f"indptr has {len(starts)} entries, expected rows + 1 = {rows + 1}")
        if starts[0] != 0:
            raise InputError(f"indptr starts with {starts[0]}, expected 0")
        nnz = int(starts[-1])
        values = np.asarray(data)
        if values.ndim != 1 or values.dtype.kind not in "biufc":
            raise InputError(
                f"data is {values.ndim}-D of dtype {values.dtype}, expected 1-D numbers"
            )
        where = _index_array("indices", indices)
        for name, array in (("indices", where), ("data", values)):
            if not 0 <= nnz <= len(array):
                raise InputError(
                    f"indptr ends with {nnz}, but {name} has {len(array)} entries; "
                    "the arrays belong to different matrices or were cut"
                )
        object.__setattr__(self, "shape", (rows, columns))
        object.__setattr__(self, "indptr", starts)
        object.__setattr__(self, "indices", where[:nnz])
        object.__setattr__(self, "data", np.ascontiguousarray(values[:nnz]))

    @property
    def nnz(self) -> int:
        """Number of stored entries, explicit zeros included."""
        return len(self.data)

    @property
    def dtype(self) -> np.dtype:
        """Type of the values."""
        return self.data.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the three arrays."""
        return self.indptr.nbytes + self.indices.nbytes + self.data.nbytes

    def __repr__(self) -> str:
        rows, columns = self.shape
        return (
            f"<CSR {rows} x {columns}, {self.nnz} entries, {self.dtype}, "
            f"{self.indices.dtype} indices>"
        )

    def check(self) -> "CSR":
        """Scan the whole structure and return the matrix itself.

        Raises:
            InputError: ``indptr`` decreases or a column is outside the matrix.
        """
        falls = np.flatnonzero(self.indptr[1:] < self.indptr[:-1])
        if falls.size:
            row = int(falls[0])
            raise InputError(
                f"indptr falls from {self.indptr[row]} to {self.indptr[row + 1]} at row {row}, "
                "expected it never to decrease"
            )
        outside = np.flatnonzero((self.indices < 0) | (self.indices >= self.shape[1]))
        if outside.size:
            entry = int(outside[0])
            row = int(np.searchsorted(self.indptr, entry, side="right")) - 1
            raise InputError(
                f"indices[{entry}] = {self.indices[entry]} in row {row}, "
                f"expected 0 <= column < {self.shape[1]}"
            )
        return self

    def row_lengths(self) -> np.ndarray:
        """Return the number of stored entries of each row."""
        return np.diff(self.indptr)

    def rows(self) -> np.ndarray:
        """Return the row number of each stored entry."""
        count = np.arange(self.shape[0], dtype=self.indices.dtype)
        return np.repeat(count, self.row_lengths())

    def is_canonical(self) -> bool:
        """Tell whether the columns of each row ascend strictly: sorted, without duplicates."""
        if self.nnz < 2:
            return True
        ascends = self.indices[1:] > self.indices[:-1]
        starts = self.indptr[1:-1]
        ascends[starts[(starts > 0) & (starts < self.nnz)] - 1] = True
        return bool(ascends.all())

    def canonical(self) -> tuple["CSR", int]:
        """Return the matrix with sorted rows and summed duplicates, and how many were merged.

        A matrix that is canonical already is returned as it is, without a copy.
        """
        if self.is_canonical():
            return self, 0
        rows = self.rows()
        order = np.lexsort((self.indices, rows))
        rows, columns, values = rows[order], self.indices[order], self.data[order]
        first = np.ones(self.nnz, dtype=bool)
        first[1:] = (rows[1:] != rows[:-1]) | (columns[1:] != columns[:-1])
        merged = self.nnz - int(np.count_nonzero(first))
        if not merged:
            return CSR(self.shape, self.indptr, columns, values), 0
        starts = np.flatnonzero(first)
        summed = np.add.reduceat(values, starts, dtype=values.dtype)
        counts = np.bincount(rows[starts], minlength=self.shape[0])
        indptr = np.zeros(self.shape[0] + 1, dtype=self.indptr.dtype)
        np.cumsum(counts, out=indptr[1:])
        return CSR(self.shape, indptr, columns[starts], summed), merged

    @classmethod
    def from_scipy(cls, matrix: Any) -> "CSR":
        """Take any SciPy sparse matrix or array; a CSR one shares its arrays.

        Raises:
            InputError: Not a two-dimensional SciPy sparse matrix.
        """
        if not hasattr(matrix, "tocsr") or len(getattr(matrix, "shape", ())) != 2:
            kind = type(matrix).__name__
            raise InputError(f"got {kind}, expected a two-dimensional scipy.sparse matrix")
        rows = matrix.tocsr()
        return cls(rows.shape, rows.indptr, rows.indices, rows.data)

    def to_scipy(self) -> Any:
        """Return a ``scipy.sparse.csr_array`` that shares the arrays.

        Raises:
            MissingExtraError: SciPy is not installed.
        """
        try:
            from scipy.sparse import csr_array
        except ImportError as error:
            raise MissingExtraError(
                "to_scipy needs SciPy: pip install 'tenfold-core[sparse]'"
            ) from error
        return csr_array((self.data, self.indices, self.indptr), shape=self.shape, copy=False)

    def to_dense(self) -> np.ndarray:
        """Return the matrix as a dense array, duplicates summed."""
        dense = np.zeros(self.shape, dtype=self.dtype)
        np.add.at(dense, (self.rows(), self.indices), self.data)
        return dense


def _shape(shape: tuple[int, int]) -> tuple[int, int]:
    try:
        rows, columns = (int(size.__index__()) for size in shape)
    except (TypeError, ValueError, AttributeError):
        raise InputError(f"shape is {shape!r}, expected two counts (rows, columns)") from None
    if rows < 0 or columns < 0:
        raise InputError(f"shape is {shape!r}, expected two counts that are not negative")
    return rows, columns


def _index_array(name: str, values: ArrayLike) -> np.ndarray:
    """Return a contiguous int32 or int64 array, the caller's own if it is one already."""
    array = np.asarray(values)
    if array.size == 0 and array.dtype.kind == "f":  # np.asarray([]) is float64
        array = array.astype(np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise InputError(f"{name} is {array.ndim}-D of dtype {array.dtype}, expected 1-D integers")
    if array.dtype not in (np.int32, np.int64) or not array.dtype.isnative:
        if array.dtype == np.uint64 and array.size and int(array.max()) >= 2**63:
            raise InputError(f"{name} has the entry {array.max()}, expected less than 2**63")
        array = array.astype(np.int64)
    return np.ascontiguousarray(array)
