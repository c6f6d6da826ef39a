# SPDX-License-Identifier: Apache-2.0
"""Sparse matrices: a validated container, Matrix Market files, products and their error bound.

The import needs NumPy alone; SciPy and Numba are imported by the function that uses them.
"""

from tenfold_core.sparse.bounds import componentwise_bound, error_over_bound, reference_product
from tenfold_core.sparse.csr import CSR
from tenfold_core.sparse.market import (
    MatrixMarketInfo,
    read_matrix_market,
    write_matrix_market,
)
from tenfold_core.sparse.products import Backend, backends, register, select_backend, spmv

__all__ = [
    "CSR",
    "Backend",
    "MatrixMarketInfo",
    "backends",
    "componentwise_bound",
    "error_over_bound",
    "read_matrix_market",
    "reference_product",
    "register",
    "select_backend",
    "spmv",
    "write_matrix_market",
]
