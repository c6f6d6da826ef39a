# SPDX-License-Identifier: Apache-2.0
"""Sparse products on a CUDA device: the grouped layout, its kernels, and what launches them.

The import needs NumPy alone; CuPy or PyTorch with Triton are imported by what uses them.
"""

from tenfold_core.sparse.gpu.layout import GroupedRows, reference_grouped_product
from tenfold_core.sparse.gpu.product import GroupedProduct
from tenfold_core.sparse.gpu.rows import RowsProduct, multiply_rows
from tenfold_core.sparse.gpu.runtime import Runtime, cuda_runtime
from tenfold_core.sparse.gpu.triton_product import TritonProduct, to_torch

__all__ = [
    "GroupedProduct",
    "GroupedRows",
    "RowsProduct",
    "Runtime",
    "TritonProduct",
    "cuda_runtime",
    "multiply_rows",
    "reference_grouped_product",
    "to_torch",
]
