# SPDX-License-Identifier: Apache-2.0
"""From any sparse matrix to a stored layout: canonical CSR, available kernels, threads, build."""

import os
import warnings
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray
from scipy.sparse import csr_array, issparse
from tenfold_core.device import cpu_info
from tenfold_core.errors import ConfigError, InputError, MissingExtraError, TenfoldWarning

from hbp_spmv.config import BuildConfig, as_int
from hbp_spmv.fallback import ScipyLayout

__all__ = [
    "WORKER_NNZ",
    "all_equal",
    "build_layout",
    "canonical",
    "default_threads",
    "kernels_work",
    "parse_dtype",
    "require_kernels",
    "workers_for",
]

WORKER_NNZ = 8_000
"""Nonzeros below which another thread costs more than it brings."""
_DTYPES = {"f32": "float32", "f64": "float64", "c64": "complex64", "c128": "complex128"}
"""Types of values, by their short names."""


def parse_dtype(dtype: DTypeLike) -> np.dtype:
    """Return the type of values that a name, short name or type stands for, in native byte order.

    Raises:
        ConfigError: it is not float32, float64, complex64 or complex128.
    """
    try:
        found = np.dtype(_DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype)
    except TypeError:
        found = None
    if dtype is None or found is None or found.name not in _DTYPES.values():
        name = repr(dtype) if found is None else found.name
        expected = ", ".join(f"{full} ({short})" for short, full in _DTYPES.items())
        raise ConfigError(f"dtype is {name}, expected one of {expected}")
    return found.newbyteorder("=")


def canonical(a: Any, dtype: DTypeLike | None = None) -> csr_array:
    """Return `a` as canonical CSR in float32, float64, complex64 or complex128.

    Half precision is stored as float32; integers and booleans as float64, if they are exact there.
    The caller's arrays are never changed.

    Raises:
        ConfigError: `dtype` is not a type that the package computes with.
        InputError: `a` is not a sparse matrix, its row starts or columns leave its shape, or an
            integer exceeds 2**53.
    """
    if dtype is not None:
        dtype = parse_dtype(dtype)
    if not issparse(a):
        from hbp_spmv.readers import read

        a = read(a)
    if a.ndim != 2:
        raise InputError(f"matrix: expected 2 dimensions, got shape {a.shape}")
    a = csr_array(a)
    _check_structure(a)
    target = np.dtype(dtype) if dtype is not None else _working_type(a.dtype)
    if target.name not in _DTYPES.values():
        raise InputError(f"matrix: expected values of float32, float64 or complex, got {a.dtype}")
    if a.dtype.kind in "iu" and a.nnz and max(int(a.data.max()), -int(a.data.min())) > 1 << 53:
        raise InputError("matrix: an integer exceeds 2**53 and would be rounded; scale it first")
    if a.dtype.kind == "c" and target.kind != "c":
        raise InputError(f"dtype: {a.dtype.name} values do not fit {target.name}")
    a = a.astype(target, copy=False)
    if not a.has_canonical_format:
        a = a.copy()
        a.sum_duplicates()
    return a


def _check_structure(a: csr_array) -> None:
    """Refuse arrays that would lead a kernel out of them; SciPy looks only at their lengths."""
    ptr, rows = a.indptr, a.shape[0]
    stored = min(len(a.indices), len(a.data))
    if len(ptr) != rows + 1 or ptr[0] != 0 or ptr[-1] > stored or (ptr[1:] < ptr[:-1]).any():
        raise InputError(
            f"matrix: its row starts (indptr) do not ascend from 0 to at most {stored} entries"
        )
    a.prune()
    low, high = (int(a.indices.min()), int(a.indices.max())) if a.nnz else (0, -1)
    if low < 0 or high >= a.shape[1]:
        outside = low if low < 0 else high
        raise InputError(f"matrix: an entry has column {outside}, expected 0..{a.shape[1] - 1}")


def _working_type(dtype: np.dtype) -> np.dtype:
    if dtype.kind in "biu":
        return np.dtype(np.float64)
    return np.result_type(dtype, np.float32)


def all_equal(values: NDArray) -> bool:
    """Tell whether one stored value can stand for all: their bits are compared, so 0 is not -0."""
    if values.size < 2:
        return False
    bits = values.view(f"u{values.real.itemsize}").reshape(values.size, -1)
    return bool((bits == bits[0]).all())


def build_layout(matrix: csr_array, config: BuildConfig) -> Any:
    """Build one layout from canonical CSR; complex values are stored by rows.

    Raises:
        ConfigError: a grouped layout was asked for complex values.
        MissingExtraError: a layout was asked for by name that needs compiled kernels.
    """
    if matrix.dtype.kind == "c" and config.layout in ("paper", "compact"):
        raise ConfigError(
            f"layout={config.layout!r}: expected real values, got {matrix.dtype}; use layout='auto'"
        )
    if not kernels_work():
        if config.layout != "auto":
            raise MissingExtraError(
                f"layout={config.layout!r} needs compiled kernels, and numba does not work here; "
                "use layout='auto'"
            )
        return ScipyLayout(matrix)
    if config.layout == "paper":
        from hbp_spmv.method import PaperLayout

        return PaperLayout.from_csr(matrix, config)
    if config.layout == "csr" or matrix.dtype.kind == "c":
        from hbp_spmv.rowgather import RowLayout

        return RowLayout.from_csr(matrix, config)
    from hbp_spmv.compact import CompactLayout

    return CompactLayout.from_csr(matrix, config)


_KERNELS: list[bool] = []


@cache
def _fault() -> str | None:
    try:
        import hbp_spmv.kernels.pool  # noqa: F401
    except Exception as error:  # numba missing, its cache read-only, or an LLVM it cannot use
        return f"{type(error).__name__}: {error}"
    return None


def kernels_work() -> bool:
    """Tell whether numba can compile here; if not, warn once that SciPy multiplies."""
    if not _KERNELS:
        if fault := _fault():
            warnings.warn(
                f"compiled kernels are not available ({fault}); products run in SciPy",
                TenfoldWarning,
                stacklevel=3,
            )
        _KERNELS.append(fault is None)
    return _KERNELS[0]


def require_kernels(what: str) -> None:
    """Refuse `what` where numba cannot compile.

    Raises:
        MissingExtraError: compiled kernels are not available.
    """
    works = _KERNELS[0] if _KERNELS else _fault() is None
    if not works:
        raise MissingExtraError(
            f"{what} needs compiled kernels, and numba does not work here ({_fault()}); "
            "install it again: pip install numba"
        )


def workers_for(threads: int | None, nnz: int) -> int:
    """Return how many threads a product of `nnz` nonzeros uses, given the most it may use.

    Raises:
        ConfigError: `threads` is not a positive integer.
    """
    limit = default_threads() if threads is None else as_int("threads", threads, 1)
    return max(1, min(limit, 64, nnz // WORKER_NNZ))


def default_threads() -> int:
    """Return the cores this process may keep busy, or fewer where OMP_NUM_THREADS asks for fewer.

    Affinity and a container's CPU quota count. A variable that is not a positive integer does not;
    of a list, which is by depth of nesting, the first does.
    """
    cores = cpu_info().usable_cores
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return min(cores, int(asked)) if asked.isdecimal() and int(asked) else cores
