# SPDX-License-Identifier: Apache-2.0
"""Products of plain CSR by the CUDA kernel of ``rows.cu``: a few threads a row, deterministic."""

from pathlib import Path
from typing import Any

import numpy as np

from tenfold_core.errors import InputError
from tenfold_core.sparse.csr import CSR
from tenfold_core.sparse.gpu.runtime import Runtime, cuda_runtime

__all__ = ["RowsProduct", "column_chunks", "multiply_rows"]

SOURCE = Path(__file__).with_name("rows.cu")
THREADS = 256
_WIDTHS = (8, 4, 2, 1)


def column_chunks(columns: int) -> list[tuple[int, int]]:
    """Cut the columns of an operand into launches: first column and number, 8, 4, 2 or 1."""
    chunks, done = [], 0
    for width in _WIDTHS:
        while columns - done >= width:
            chunks.append((done, width))
            done += width
    return chunks


class RowsProduct:
    """The product of one CSR matrix on a device; call it with arrays of the matrix's type.

    Args:
        shape: Rows and columns.
        ptr: Row starts, int64, (rows + 1,).
        col: Columns, int32, (nnz,).
        val: Values, float32 or float64, (nnz,).
        runtime: What compiles and launches.
    """

    def __init__(
        self, shape: tuple[int, int], ptr: Any, col: Any, val: Any, runtime: Runtime
    ) -> None:
        if ptr.shape[0] != shape[0] + 1 or col.shape != val.shape:
            raise InputError(
                f"rows: {ptr.shape[0]} row starts for {shape[0]} rows, "
                f"{col.shape[0]} columns for {val.shape[0]} values"
            )
        self.shape, self.ptr, self.col, self.val, self.runtime = shape, ptr, col, val, runtime
        self.dtype = np.dtype(val.dtype)
        mean = col.shape[0] / max(shape[0], 1)
        self.lanes = next((w for w in (2, 4, 8, 16) if mean <= 2 * w), 32)

    def __call__(
        self, x: Any, y: Any, alpha: float = 1.0, beta: float = 0.0, columns: int = 1
    ) -> None:
        """Launch ``y = alpha A x + beta y`` on the current stream; see ``GroupedProduct``."""
        rows, factors = self.shape[0], (self.dtype.type(alpha), self.dtype.type(beta))
        if not rows:
            return
        blocks = -(-rows * self.lanes // THREADS)
        for first, width in column_chunks(columns):
            macros = {
                "VALUE": {"float32": "float", "float64": "double"}[self.dtype.name],
                "LANES": self.lanes,
                "COLUMNS": width,
            }
            kernel = self.runtime.kernels(SOURCE, ("rows_product",), macros)["rows_product"]
            kernel(
                (blocks,), (THREADS,),
                (
                    x[first:], y[first:], *factors, np.uint32(columns), np.uint32(rows), self.ptr,
                    self.col, self.val,
                ),
            )  # fmt: skip


def multiply_rows(matrix: CSR, x: np.ndarray, runtime: Runtime | None = None) -> np.ndarray:
    """Return ``A @ x`` by way of a device: everything is copied there and back.

    Shapes: ``x`` (columns,) -> (rows,), or (columns, k) -> (rows, k).

    Raises:
        InputError: The values are not float32 or float64.
    """
    if matrix.dtype not in (np.float32, np.float64):
        raise InputError(f"a device multiplies float32 and float64, got {matrix.dtype}")
    runtime = runtime or cuda_runtime()
    with runtime.active():
        return _multiplied(matrix, x, runtime)


def _multiplied(matrix: CSR, x: np.ndarray, runtime: Runtime) -> np.ndarray:
    xp = runtime.xp
    product = RowsProduct(
        matrix.shape,
        xp.asarray(matrix.indptr.astype(np.int64)),
        xp.asarray(matrix.indices.astype(np.int32)),
        xp.asarray(matrix.data),
        runtime,
    )
    columns = x.shape[1] if x.ndim == 2 else 1
    y = xp.empty(matrix.shape[0] * columns, matrix.dtype)
    product(xp.asarray(np.ascontiguousarray(x)).reshape(-1), y, columns=columns)
    y = y.reshape(matrix.shape[0], *x.shape[1:])
    return y.get() if hasattr(y, "get") else y
