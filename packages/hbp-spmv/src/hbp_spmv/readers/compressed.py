# SPDX-License-Identifier: Apache-2.0
"""Compressed arrays of other origin: checked in full before SciPy converts them."""

from typing import Any

import numpy as np
from scipy.sparse import bsr_array, csc_array, csr_array
from tenfold_core.errors import InputError
from tenfold_core.sparse import CSR

from hbp_spmv.errors import ReadError
from hbp_spmv.readers.finish import Raw

__all__ = ["compressed_raw"]


def compressed_raw(matrix: Any, **known: Any) -> Raw:
    """Turn a SciPy matrix of any format into raw entries, its own arrays checked beforehand.

    SciPy's conversions trust their indices: a wrong one crashes the interpreter. Its own full
    check (1.17) does not look at the pointers of a matrix without entries, so ours runs.

    Raises:
        ReadError: The arrays of the matrix do not fit together.
    """
    kind = matrix.format
    if kind == "coo":
        return Raw(rows=matrix.row, columns=matrix.col, values=matrix.data, **known)
    if kind == "csr":
        parts = {"indptr": matrix.indptr, "columns": matrix.indices, "values": matrix.data}
        return Raw(**parts, **known)
    if kind in ("csc", "bsr"):
        try:
            matrix = _checked(matrix)
        except (InputError, ValueError, TypeError, IndexError) as error:
            reason = " ".join(str(error).split())
            raise ReadError(
                f"{known['where']}: {reason}; the arrays do not fit together"
            ) from error
    rows = csr_array(matrix)
    return Raw(indptr=rows.indptr, columns=rows.indices, values=rows.data, **known)


def _checked(matrix: Any) -> csc_array | bsr_array:
    """Build a new matrix from the arrays of a CSC or BSR one, whose indices are all in range."""
    rows, columns = matrix.shape
    if matrix.format == "csc":
        by_columns = CSR((columns, rows), matrix.indptr, matrix.indices, matrix.data).check()
        parts = (by_columns.data, by_columns.indices, by_columns.indptr)
        return csc_array(parts, shape=matrix.shape)
    count, height, width = matrix.data.shape
    if not height or not width or rows % height or columns % width:
        raise ReadError(f"blocks of {height} x {width} in a matrix of {rows} x {columns}")
    blocks = CSR(
        (rows // height, columns // width), matrix.indptr, matrix.indices, np.empty(count)
    ).check()
    parts = (matrix.data[: blocks.nnz], blocks.indices, blocks.indptr)
    return bsr_array(parts, shape=matrix.shape)
