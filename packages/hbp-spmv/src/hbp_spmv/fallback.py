# SPDX-License-Identifier: Apache-2.0
"""What remains on a host without compiled kernels: CSR multiplied by SciPy."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

__all__ = ["ScipyLayout"]


@dataclass(frozen=True, slots=True)
class ScipyLayout:
    """A matrix as SciPy's CSR, in any floating-point or complex type SciPy multiplies."""

    csr: csr_array
    perm: None = None
    lanes: int = 1
    uniform: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.csr.shape

    @property
    def nnz(self) -> int:
        """Stored entries."""
        return self.csr.nnz

    @property
    def nbytes(self) -> int:
        """Bytes of the three CSR arrays."""
        return sum(array.nbytes for array in self.arrays().values())

    def arrays(self) -> dict[str, NDArray]:
        """Return the three CSR arrays."""
        return {"ptr": self.csr.indptr, "col": self.csr.indices, "val": self.csr.data}

    def quality(self) -> tuple[float, float]:
        """Return lane efficiency (1: there are no groups) and standard deviation (0)."""
        return 1.0, 0.0

    def coordinates(self) -> tuple[NDArray, NDArray]:
        """Return row and column of every element."""
        rows = np.repeat(np.arange(self.shape[0]), np.diff(self.csr.indptr))
        return rows, self.csr.indices

    def values(self) -> NDArray:
        """Return the value of every element."""
        return self.csr.data

    def multiply(self, x: NDArray, y: NDArray, alpha: float, beta: float) -> None:
        """Compute `y = alpha A x + beta y`."""
        product = self.csr @ x
        if alpha != 1:
            product *= alpha
        y[...] = product if beta == 0 else product + beta * y
