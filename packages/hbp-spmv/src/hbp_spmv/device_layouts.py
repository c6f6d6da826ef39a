# SPDX-License-Identifier: Apache-2.0
"""What a CUDA device can hold of a matrix: rows of CSR, grouped rows, the published six arrays.

Each class is one layout with its product; `CudaMatrix` asks nothing else of it. `product(x, y,
alpha, beta, columns)` launches on the current stream.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tenfold_core.errors import InputError
from tenfold_core.sparse.gpu import GroupedProduct, RowsProduct, Runtime

from hbp_spmv.config import BuildConfig
from hbp_spmv.grouped import DeviceCSR, GroupedMatrix, build_grouped, to_host

__all__ = ["CompactOnDevice", "CsrOnDevice", "OnDevice", "PaperOnDevice", "store"]

Triplets = tuple[NDArray, NDArray, NDArray]


class CsrOnDevice:
    """Rows as they are; products of one column may go to cuSPARSE.

    Args:
        a: the matrix on the device.
        runtime: what computes.
        vendor: `vendor(x, y)` launches `y = A x`, for the plain case; None for our kernel.
    """

    layout = "csr"

    def __init__(
        self, a: DeviceCSR, runtime: Runtime, vendor: Callable[[Any, Any], None] | None = None
    ) -> None:
        self.a, self.runtime, self.vendor = a, runtime, vendor
        self.shape, self.nnz, self.nbytes, self.col = a.shape, a.nnz, a.nbytes, a.col
        self.rows = RowsProduct(a.shape, a.ptr, a.col, a.val, runtime)
        self.detail = "cuSPARSE" if vendor else f"{self.rows.lanes} threads a row"
        self.groups = self.heavy_rows = 0
        self.strips, self.uniform = 1, False

    def product(
        self, x: Any, y: Any, alpha: float = 1.0, beta: float = 0.0, columns: int = 1
    ) -> None:
        """Launch `y = alpha A x + beta y`."""
        if self.vendor is not None and columns == 1 and alpha == 1 and beta == 0:
            self.vendor(x, y)
        else:
            self.rows(x, y, alpha, beta, columns)

    def bind(self, *arguments: Any) -> Callable[[], None]:
        """Return the product by our kernel, which needs no memory of its own."""
        return partial(self.rows, *arguments)

    def arrays(self) -> dict[str, Any]:
        """Return the stored arrays by name."""
        return {"ptr": self.a.ptr, "col": self.a.col, "val": self.a.val}

    def triplets(self) -> Triplets:
        """Return row, column and value of every element, on the host."""
        ptr, col, val = (to_host(array) for array in (self.a.ptr, self.a.col, self.a.val))
        return np.repeat(np.arange(self.shape[0]), np.diff(ptr)), col, val

    def with_values(self, values: Any) -> "CsrOnDevice":
        """Return the same pattern with other values."""
        return CsrOnDevice(replace(self.a, val=values), self.runtime)

    def quality(self) -> tuple[float, float]:
        """Return lane efficiency (1: there are no groups) and standard deviation (0)."""
        return 1.0, 0.0


class CompactOnDevice:
    """Grouped rows, the layout of the method; `fixed_share` of the work of strips is owned."""

    layout = "compact"

    def __init__(self, grouped: GroupedMatrix, runtime: Runtime, fixed_share: float) -> None:
        rows = grouped.rows
        self.grouped, self.runtime, self.fixed_share = grouped, runtime, fixed_share
        self.shape, self.nnz, self.nbytes, self.col = rows.shape, rows.nnz, rows.nbytes, rows.col
        self.product = GroupedProduct(rows, runtime, fixed_share=fixed_share)
        self.bind = self.product.bind
        self.groups, self.heavy_rows = int(rows.group_base.shape[0]), grouped.heavy_rows
        self.strips = len(rows.strip_groups) - 1 if rows.strip_width else 1
        self.uniform = rows.uniform
        strips = f", strips of {rows.strip_width}" if rows.strip_width else ""
        self.detail = f"packs of {rows.pack}, {8 * rows.col.dtype.itemsize}-bit columns{strips}"
        self.arrays, self.triplets = rows.arrays, grouped.triplets
        self.quality = grouped.quality

    def with_values(self, values: Any) -> "CompactOnDevice":
        """Return the same pattern with other values.

        Raises:
            InputError: the build did not keep its permutation.
        """
        if self.grouped.perm is None:
            raise InputError(
                "update_values: the permutation was not kept; build with keep_perm=True"
            )
        changed = self.grouped.with_values(values, self.runtime.xp)
        return CompactOnDevice(changed, self.runtime, self.fixed_share)


class PaperOnDevice:
    """The published layout and its own kernel; built on the host, several columns one by one."""

    layout = "paper"

    def __init__(self, stored: Any, runtime: Runtime, fixed_share: float) -> None:
        from hbp_spmv.gpu_paper import PaperProduct

        self.stored, self.runtime, self.fixed_share = stored, runtime, fixed_share
        self.shape, self.nnz, self.nbytes = stored.shape, stored.nnz, stored.nbytes
        self.col = stored.arrays()["col"]
        self._product = PaperProduct(stored, runtime, fixed_share=fixed_share)
        self.detail = self._product.notes
        self.groups = self.heavy_rows = 0
        self.strips, self.uniform = stored.strips, False
        self.arrays, self.quality = stored.arrays, stored.quality

    def product(
        self, x: Any, y: Any, alpha: float = 1.0, beta: float = 0.0, columns: int = 1
    ) -> None:
        """Launch `y = alpha A x + beta y`."""
        if columns == 1:
            self._product(x, y, alpha, beta)
            return
        xp = self.runtime.xp
        wide, result = x.reshape(-1, columns), y.reshape(-1, columns)
        for column in range(columns):
            part = xp.ascontiguousarray(result[:, column])
            self._product(xp.ascontiguousarray(wide[:, column]), part, alpha, beta)
            result[:, column] = part

    def bind(self, *arguments: Any) -> Callable[[], None]:
        """Return the product; it shares memory with all others of this matrix."""
        return partial(self.product, *arguments)

    def triplets(self) -> Triplets:
        """Return row, column and value of every element, on the host."""
        return *self.stored.coordinates(), self.stored.values()

    def with_values(self, values: Any) -> "PaperOnDevice":
        """Return the same pattern with other values.

        Raises:
            InputError: the build did not keep its permutation.
        """
        if self.stored.perm is None:
            raise InputError(
                "update_values: the permutation was not kept; build with keep_perm=True"
            )
        data = to_host(values)[self.stored.perm]
        return PaperOnDevice(replace(self.stored, data=data), self.runtime, self.fixed_share)


OnDevice = CsrOnDevice | CompactOnDevice | PaperOnDevice


@dataclass(frozen=True, slots=True)
class Source:
    """A matrix on its way to a layout: on the host, and on the device once it is needed."""

    host: Any
    device: DeviceCSR


def store(source: Source, config: BuildConfig, runtime: Runtime) -> OnDevice:
    """Build one layout on a device.

    Args:
        source: the matrix.
        config: layout `compact`, `csr` or `paper`, and its settings.
        runtime: what computes.

    Raises:
        MissingExtraError: layout `paper` without numba, which builds it on the host.
    """
    if config.layout == "csr":
        return CsrOnDevice(source.device, runtime)
    if config.layout == "paper":
        from hbp_spmv.building import require_kernels

        require_kernels("layout='paper'")
        from hbp_spmv.method import PaperLayout

        stored = PaperLayout.from_csr(source.host, config)
        return PaperOnDevice(stored, runtime, config.fixed_share)
    return CompactOnDevice(
        build_grouped(source.device, config, runtime), runtime, config.fixed_share
    )
