# SPDX-License-Identifier: Apache-2.0
"""`layout="csr"`: rows as they are, for the row-gather kernel; what `auto` takes on ties."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from tenfold_core.errors import ConfigError, InputError

from hbp_spmv.building import all_equal
from hbp_spmv.config import BuildConfig
from hbp_spmv.kernels.csr import FIELDS

__all__ = ["RowLayout"]

LANES = 4
ROW_COST = 4
"""Cost of a row beside its nonzeros, in nonzeros; it only shapes the schedule."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowLayout:
    """A matrix as CSR with unsigned indices (16-bit where the columns allow it)."""

    shape: tuple[int, int]
    nnz: int
    ptr: NDArray[np.int64]
    col: NDArray
    val: NDArray
    perm: None = None
    lanes: int = LANES

    @classmethod
    def from_csr(cls, a: csr_array, config: BuildConfig) -> "RowLayout":
        """Copy canonical CSR with float32 or float64 values.

        Raises:
            ConfigError: `index='u16'` on more than 65536 columns.
            InputError: more than 2**32 columns.
        """
        if a.shape[1] > 1 << 32:
            raise InputError(f"matrix of shape {a.shape}: no layout holds more than 2**32 columns")
        narrow = a.shape[1] <= 1 << 16 and config.index != "u32"
        if config.index == "u16" and not narrow:
            raise ConfigError(
                f"index='u16': {a.shape[1]} columns, layout 'csr' reaches 65536; use index='auto'"
            )
        uniform = all_equal(a.data)
        return cls(
            shape=a.shape,
            nnz=a.nnz,
            ptr=a.indptr.astype(np.int64),
            col=a.indices.astype(np.uint16 if narrow else np.uint32),
            val=a.data[:1].copy() if uniform else a.data.copy(),
        )

    @property
    def uniform(self) -> bool:
        """All values are equal, and only one is stored."""
        return self.val.size == 1 and self.col.size != 1

    @property
    def partials(self) -> int:
        """Partial sums a product needs: none."""
        return 0

    @property
    def nbytes(self) -> int:
        """Bytes of all stored arrays."""
        return self.ptr.nbytes + self.col.nbytes + self.val.nbytes

    def arrays(self) -> dict[str, NDArray]:
        """Return the stored arrays by name."""
        return {name: getattr(self, name) for name in FIELDS}

    def fields(self) -> list[int]:
        """Return the layout part of a plan."""
        return [getattr(self, name).ctypes.data for name in FIELDS]

    def work(self) -> list[NDArray]:
        """Return the cost of each row."""
        longest = np.int32 if self.shape[1] < 1 << 30 else np.int64
        work = np.subtract(self.ptr[1:], self.ptr[:-1], dtype=longest, casting="unsafe")
        work += ROW_COST
        return [work]

    def quality(self) -> tuple[float, float]:
        """Return lane efficiency (1: there are no groups) and standard deviation (0)."""
        return 1.0, 0.0

    def coordinates(self) -> tuple[NDArray, NDArray]:
        """Return row and column of every element."""
        rows = np.repeat(np.arange(self.shape[0]), np.diff(self.ptr))
        return rows, self.col.astype(np.int64)

    def values(self) -> NDArray:
        """Return the value of every element."""
        return np.full(self.nnz, self.val[0]) if self.uniform else self.val
