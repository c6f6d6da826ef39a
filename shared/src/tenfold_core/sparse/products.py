# SPDX-License-Identifier: Apache-2.0
"""``y = A @ x`` by whichever library is there: a small registry and its four entries."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from tenfold_core.errors import ConfigError, InputError, MissingExtraError, TenfoldWarning
from tenfold_core.sparse.bounds import reference_product
from tenfold_core.sparse.csr import CSR

__all__ = ["Backend", "backends", "register", "select_backend", "spmv"]


@dataclass(frozen=True, slots=True)
class Backend:
    """One way to multiply.

    ``function(matrix, x, threads)`` gets an ``x`` of shape (columns,) or (columns, k) that has
    been checked, both of the result's dtype.
    """

    name: str
    probe: Callable[[], bool]
    function: Callable[[CSR, np.ndarray, int], np.ndarray]
    needs: str = ""
    """What to install, for the error if the probe is false."""
    automatic: bool = True
    """Whether ``auto`` may take it."""


_BACKENDS: dict[str, Backend] = {}


def register(backend: Backend) -> None:
    """Add a backend behind those that exist; ``auto`` asks them in this order.

    Raises:
        ConfigError: The name is taken.
    """
    if backend.name in _BACKENDS or backend.name == "auto":
        raise ConfigError(f"backend {backend.name!r} is registered already")
    _BACKENDS[backend.name] = backend


def backends() -> dict[str, bool]:
    """Return the registered names, in order, and whether each can run here."""
    return {name: backend.probe() for name, backend in _BACKENDS.items()}


def select_backend(name: str = "auto") -> Backend:
    """Return the backend of that name, or for ``auto`` the first that can run.

    Raises:
        ConfigError: The name is not registered.
        MissingExtraError: It cannot run here; the text names the extra.
    """
    if name == "auto":
        return next(b for b in _BACKENDS.values() if b.automatic and b.probe())
    if name not in _BACKENDS:
        raise ConfigError(f"backend is {name!r}, expected auto, {', '.join(_BACKENDS)}")
    backend = _BACKENDS[name]
    if not backend.probe():
        raise MissingExtraError(f"backend {name!r} cannot run here: {backend.needs}")
    return backend


def spmv(matrix: CSR, x: np.ndarray, *, backend: str = "auto", threads: int = 1) -> np.ndarray:
    """Multiply a sparse matrix by a vector or by the columns of a matrix.

    The result has the common type of both, at least float32. Only ``numba`` uses ``threads``; its
    result does not depend on them, since each row is summed by one thread in one order.

    Shapes: ``x`` (columns,) -> (rows,), or (columns, k) -> (rows, k).

    Raises:
        InputError: ``x`` does not fit the matrix.
        ConfigError: The backend is not known.
        MissingExtraError: The backend cannot run here.

    Example:
        >>> spmv(CSR((2, 2), [0, 1, 2], [1, 0], [3.0, 4.0]), np.array([1.0, 2.0]))
        array([6., 4.])
    """
    x = np.asarray(x)
    if x.ndim not in (1, 2) or x.shape[0] != matrix.shape[1]:
        raise InputError(
            f"x has shape {x.shape}, expected ({matrix.shape[1]},) or ({matrix.shape[1]}, k) "
            f"for a matrix of {matrix.shape[0]} x {matrix.shape[1]}"
        )
    if x.dtype.kind not in "biufc":
        raise InputError(f"x has dtype {x.dtype}, expected numbers")
    chosen = select_backend(backend)
    dtype = np.result_type(matrix.dtype, x.dtype, np.float32)
    if matrix.dtype != dtype:
        matrix = CSR(matrix.shape, matrix.indptr, matrix.indices, matrix.data.astype(dtype))
    return chosen.function(matrix, x.astype(dtype, copy=False), threads)


def _always() -> bool:
    return True


def _numpy(matrix: CSR, x: np.ndarray, _: int) -> np.ndarray:
    y = np.zeros((matrix.shape[0], *x.shape[1:]), dtype=x.dtype)
    # reduceat gives an empty row its neighbour's value, so only filled rows are reduced.
    filled = np.flatnonzero(matrix.row_lengths())
    if filled.size:
        values = matrix.data if x.ndim == 1 else matrix.data[:, None]
        y[filled] = np.add.reduceat(values * x[matrix.indices], matrix.indptr[filled], axis=0)
    return y


@cache
def _has_scipy() -> bool:
    try:
        import scipy.sparse  # noqa: F401
    except ImportError:
        return False
    return True


def _scipy(matrix: CSR, x: np.ndarray, _: int) -> np.ndarray:
    return matrix.to_scipy() @ x


@cache
def _numba_kernels() -> Any | None:
    try:
        from tenfold_core.sparse import _numba_csr
    except ImportError:
        return None
    except RuntimeError as error:  # numba found no folder it may write its cache to
        warnings.warn(f"numba cannot be used: {error}", TenfoldWarning, stacklevel=2)
        return None
    return _numba_csr


def _numba(matrix: CSR, x: np.ndarray, threads: int) -> np.ndarray:
    kernels = _numba_kernels()
    assert kernels is not None  # the probe was asked first
    columns = x[:, None] if x.ndim == 1 else x
    y = np.empty((columns.shape[1], matrix.shape[0]), dtype=x.dtype)
    for column in range(columns.shape[1]):
        vector = np.ascontiguousarray(columns[:, column])
        kernels.multiply(matrix.indptr, matrix.indices, matrix.data, vector, y[column], threads)
    return y[0] if x.ndim == 1 else np.ascontiguousarray(y.T)


def _reference(matrix: CSR, x: np.ndarray, _: int) -> np.ndarray:
    if x.ndim == 1:
        return reference_product(matrix, x).astype(x.dtype)
    columns = [reference_product(matrix, column) for column in x.T]
    return np.array(columns, dtype=x.dtype).reshape(x.shape[1], matrix.shape[0]).T.copy()


def _has_cupy() -> bool:
    from tenfold_core.device import cupy_or_none

    return cupy_or_none() is not None


def _cupy(matrix: CSR, x: np.ndarray, _: int) -> np.ndarray:
    from tenfold_core.sparse.gpu import multiply_rows

    return multiply_rows(matrix, x)


_SPARSE = "pip install 'tenfold-core[sparse]'"
register(Backend("scipy", _has_scipy, _scipy, f"SciPy is missing, {_SPARSE}"))
register(
    Backend("numba", lambda: _numba_kernels() is not None, _numba, f"Numba is missing, {_SPARSE}")
)
register(Backend("numpy", _always, _numpy))
register(
    Backend(
        "cupy",
        _has_cupy,
        _cupy,
        "no CUDA device, or CuPy is missing: pip install 'tenfold-core[cuda13]'",
        automatic=False,  # it copies the matrix to the device at every call
    )
)
register(Backend("reference", _always, _reference, automatic=False))
