# SPDX-License-Identifier: Apache-2.0
"""NVIDIA's cuSPARSE through its generic C API: y = A x for CSR and sliced ELL, set up once.

CuPy's own `A @ x` makes descriptors at every product and does not preprocess; this is the library
as its documentation recommends it for many products with one matrix. Signatures and numbers are
those of `cusparse.h` 12.5 and 12.9 (CUDA 12 and 13).
"""

import ctypes
import importlib
import importlib.util
import os
import sys
import weakref
from collections.abc import Iterator
from ctypes import POINTER, c_int, c_int64, c_size_t, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from tenfold_core.errors import MissingExtraError, TenfoldError
from tenfold_core.sparse.gpu import Runtime

__all__ = [
    "ALGORITHMS",
    "CusparseError",
    "CusparseProduct",
    "Library",
    "cusparse_library",
    "library_reason",
]

SONAMES = ("libcusparse.so.12", "libcusparse.so.13", "libcusparse.so.11")
"""Versions of the interface, which are not those of CUDA: CUDA 13 still brings 12."""
ALGORITHMS = {
    "CUSPARSE_SPMV_CSR_ALG1": 2,
    "CUSPARSE_SPMV_CSR_ALG2": 3,
    "CUSPARSE_SPMV_SELL_ALG1": 5,
}
_NON_TRANSPOSE = 0  # CUSPARSE_OPERATION_NON_TRANSPOSE
_INDEX_32I = 2  # CUSPARSE_INDEX_32I
_BASE_ZERO = 0  # CUSPARSE_INDEX_BASE_ZERO
_VALUE_TYPES = {"float32": 0, "float64": 1}  # CUDA_R_32F, CUDA_R_64F
_FACTORS = {"float32": ctypes.c_float, "float64": ctypes.c_double}
_STATUS = (
    "SUCCESS", "NOT_INITIALIZED", "ALLOC_FAILED", "INVALID_VALUE", "ARCH_MISMATCH",
    "MAPPING_ERROR", "EXECUTION_FAILED", "INTERNAL_ERROR", "MATRIX_TYPE_NOT_SUPPORTED",
    "ZERO_PIVOT", "NOT_SUPPORTED", "INSUFFICIENT_RESOURCES",
)  # fmt: skip
_SPMV = [
    c_void_p, c_int, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_int, c_int,
]  # fmt: skip
"""handle, operation, alpha, matrix, x, beta, y, type, algorithm; then the buffer or its size."""
_SIGNATURES = {
    "cusparseCreate": [POINTER(c_void_p)],
    "cusparseDestroy": [c_void_p],
    "cusparseSetStream": [c_void_p, c_void_p],
    "cusparseGetVersion": [c_void_p, POINTER(c_int)],
    "cusparseCreateCsr": [POINTER(c_void_p), *[c_int64] * 3, *[c_void_p] * 3, *[c_int] * 4],
    "cusparseCreateSlicedEll": [POINTER(c_void_p), *[c_int64] * 5, *[c_void_p] * 3, *[c_int] * 4],
    "cusparseDestroySpMat": [c_void_p],
    "cusparseCreateDnVec": [POINTER(c_void_p), c_int64, c_void_p, c_int],
    "cusparseDnVecSetValues": [c_void_p, c_void_p],
    "cusparseDestroyDnVec": [c_void_p],
    "cusparseSpMV_bufferSize": [*_SPMV, POINTER(c_size_t)],
    "cusparseSpMV_preprocess": [*_SPMV, c_void_p],
    "cusparseSpMV": [*_SPMV, c_void_p],
}
_OPTIONAL = ("cusparseSpMV_preprocess", "cusparseCreateSlicedEll")
"""Functions that older libraries lack."""


class CusparseError(TenfoldError):
    """A call of the library failed."""


class Library:
    """The functions of one loaded library, every status checked.

    Args:
        handle: The library, as `ctypes.CDLL` returns it.
        source: Where it was found, for tables.

    Raises:
        MissingExtraError: It lacks a function that every version since CUDA 11 has.
    """

    def __init__(self, handle: Any, source: str) -> None:
        self.source = source
        self._functions: dict[str, Any] = {}
        for name, arguments in _SIGNATURES.items():
            function = getattr(handle, name, None)
            if function is None:
                if name in _OPTIONAL:
                    continue
                raise MissingExtraError(
                    f"{source}: it has no {name}; cuSPARSE 11 or newer is needed"
                )
            function.argtypes, function.restype = arguments, c_int
            self._functions[name] = function

    def has(self, name: str) -> bool:
        """Say whether the library has a function."""
        return name in self._functions

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function.

        Raises:
            CusparseError: It is missing, or its status is not success.
        """
        function = self._functions.get(name)
        if function is None:
            raise CusparseError(f"{name}: {self.source} has no such function; it is too old")
        if status := function(*arguments):
            known = _STATUS[status] if 0 <= status < len(_STATUS) else "unknown"
            raise CusparseError(f"{name}: CUSPARSE_STATUS_{known} ({status}), from {self.source}")


@cache
def cusparse_library() -> Library:
    """Load the library: CuPy's, else one that is loaded already, a wheel's, or the system's.

    Raises:
        MissingExtraError: None can be loaded; the text says what was tried.
    """
    if sys.platform != "linux":
        raise MissingExtraError(
            f"cuSPARSE: libraries are looked up on Linux only, not {sys.platform}"
        )
    failures = []
    try:  # the attribute, not the submodule: it looks for the library in wheels and loads it
        _ = importlib.import_module("cupy").cuda.cusparse
        origin = "CuPy's"
    except Exception as error:  # a library that does not load raises many things
        failures.append(f"CuPy: {_line(error)}")
        origin = "already loaded"
    for name in SONAMES:
        try:
            return Library(ctypes.CDLL(name, mode=os.RTLD_NOLOAD), f"{name} ({origin})")
        except OSError:
            continue
    for path, origin in _candidates():
        try:
            return Library(ctypes.CDLL(path), f"{Path(path).name} ({origin})")
        except OSError as error:
            failures.append(_line(error))
    raise MissingExtraError(
        f"cuSPARSE: no library could be loaded ({'; '.join(failures)}); install the one of your "
        "CUDA version: pip install nvidia-cusparse (CUDA 13) or nvidia-cusparse-cu12"
    )


def _candidates() -> Iterator[tuple[str, str]]:
    """Yield the files that wheels bring, then names that the system may know."""
    for package, pattern, origin in (
        ("nvidia", "*/lib/libcusparse.so.*", "NVIDIA's wheel"),
        ("torch", "lib/libcusparse.so.*", "torch's"),
    ):
        found = importlib.util.find_spec(package)
        for folder in (found.submodule_search_locations or ()) if found else ():
            yield from ((str(path), origin) for path in sorted(Path(folder).glob(pattern)))
    yield from ((name, "the system's") for name in SONAMES)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]


def library_reason(function: str | None = None) -> str | None:
    """Say why cuSPARSE, or one function of it, cannot be used here, or return None."""
    try:
        library = cusparse_library()
    except MissingExtraError as error:
        return str(error)
    if function is not None and not library.has(function):
        return f"cuSPARSE: {library.source} has no {function}; it is too old"
    return None


class CusparseProduct:
    """The product of one matrix; call it with contiguous device arrays of the matrix's type.

    It has its own handle and workspace, so it may be used by one stream at a time.

    Args:
        library: The library.
        runtime: Array module and current stream.
        shape: Rows and columns.
        dtype: Type of values.
        algorithm: One of `ALGORITHMS`.
        create: Function that makes the matrix, and its arguments after the descriptor.
        arrays: What those arguments point into, kept alive.

    Raises:
        CusparseError: A call failed.
    """

    def __init__(
        self,
        library: Library,
        runtime: Runtime,
        *,
        shape: tuple[int, int],
        dtype: np.dtype,
        algorithm: str,
        create: tuple[Any, ...],
        arrays: tuple[Any, ...],
    ) -> None:
        self._library, self._runtime, self._arrays = library, runtime, arrays
        self._rows = shape[0]
        self._trivial = 0 in shape or int(arrays[-1].shape[0]) == 0
        self.notes = f"cuSPARSE, {library.source}, int32 indices"
        if self._trivial:  # the library refuses null pointers, which empty arrays are
            return
        kind = _VALUE_TYPES[dtype.name]
        factor = _FACTORS[dtype.name]
        self._factors = factor(1), factor(0)
        self._opened: list[tuple[str, c_void_p]] = []
        closing = weakref.finalize(self, _close, library, self._opened)
        closing.atexit = False  # type: ignore[missing-attribute]  # by then the device is gone
        self._handle = self._open("cusparseCreate", "cusparseDestroy")
        self._matrix = self._open(create[0], "cusparseDestroySpMat", *create[1:])
        x, y = (runtime.xp.zeros(size, dtype) for size in reversed(shape))
        self._x, self._y = (
            self._open("cusparseCreateDnVec", "cusparseDestroyDnVec", len(v), _address(v), kind)
            for v in (x, y)
        )
        self._at: tuple[int | None, int | None, int] = (None, None, 0)
        one, zero = (ctypes.byref(value) for value in self._factors)
        self._spmv = (
            self._handle, _NON_TRANSPOSE, one, self._matrix, self._x, zero, self._y, kind,
            ALGORITHMS[algorithm],
        )  # fmt: skip
        self._prepare(algorithm)

    @classmethod
    def csr(
        cls, library: Library, runtime: Runtime, shape: tuple[int, int],
        ptr: Any, col: Any, val: Any, algorithm: str,
    ) -> "CusparseProduct":  # fmt: skip
        """Bind a CSR matrix with int32 row starts and columns."""
        dtype = np.dtype(val.dtype)
        create = (
            "cusparseCreateCsr", *shape, int(val.shape[0]), _address(ptr), _address(col),
            _address(val), _INDEX_32I, _INDEX_32I, _BASE_ZERO, _VALUE_TYPES[dtype.name],
        )  # fmt: skip
        return cls(
            library, runtime, shape=shape, dtype=dtype, algorithm=algorithm, create=create,
            arrays=(ptr, col, val),
        )  # fmt: skip

    @classmethod
    def sell(
        cls, library: Library, runtime: Runtime, shape: tuple[int, int], nnz: int,
        start: Any, col: Any, val: Any, *, slice_size: int,
    ) -> "CusparseProduct":  # fmt: skip
        """Bind a sliced ELL matrix with int32 slice starts and columns, -1 where padded."""
        dtype = np.dtype(val.dtype)
        create = (
            "cusparseCreateSlicedEll", *shape, nnz, int(val.shape[0]), slice_size, _address(start),
            _address(col), _address(val), _INDEX_32I, _INDEX_32I, _BASE_ZERO,
            _VALUE_TYPES[dtype.name],
        )  # fmt: skip
        return cls(
            library, runtime, shape=shape, dtype=dtype, algorithm="CUSPARSE_SPMV_SELL_ALG1",
            create=create, arrays=(start, col, val),
        )  # fmt: skip

    def __call__(self, x: Any, y: Any) -> None:
        """Launch `y = A x` on the current stream; nothing is allocated.

        Raises:
            CusparseError: A call failed.
        """
        if self._trivial:
            y[...] = 0
            return
        stream = self._runtime.stream()
        at = _address(x), _address(y), stream
        if at != self._at:
            self._library.call("cusparseSetStream", self._handle, stream)
            self._library.call("cusparseDnVecSetValues", self._x, at[0])
            self._library.call("cusparseDnVecSetValues", self._y, at[1])
            self._at = at
        self._library.call("cusparseSpMV", *self._spmv, self._buffer_at)

    def _open(self, create: str, destroy: str, *arguments: Any) -> c_void_p:
        made = c_void_p()
        self._library.call(create, ctypes.byref(made), *arguments)
        self._opened.append((destroy, made))
        return made

    def _prepare(self, algorithm: str) -> None:
        """Allocate the workspace, preprocess a CSR matrix if the library can, and fill the notes.

        All products of a matrix must be given the same workspace.
        """
        library, size, version = self._library, c_size_t(), c_int()
        library.call("cusparseSetStream", self._handle, self._runtime.stream())
        library.call("cusparseGetVersion", self._handle, ctypes.byref(version))
        library.call("cusparseSpMV_bufferSize", *self._spmv, ctypes.byref(size))
        self._buffer = self._runtime.xp.empty(max(size.value, 8), np.uint8)
        self._buffer_at = _address(self._buffer)
        preprocess = algorithm != "CUSPARSE_SPMV_SELL_ALG1"
        if preprocess and library.has("cusparseSpMV_preprocess"):
            library.call("cusparseSpMV_preprocess", *self._spmv, self._buffer_at)
            state = "preprocessed, "
        else:
            state = "not preprocessed: the library cannot, " if preprocess else ""
        self.notes = (
            f"cuSPARSE {version.value}, {library.source}, {algorithm}, int32 indices, {state}"
            f"workspace of {size.value} bytes"
        )


def _close(library: Library, opened: list[tuple[str, c_void_p]]) -> None:
    """Destroy descriptors and handle, the last one first."""
    while opened:
        name, made = opened.pop()
        library.call(name, made)


def _address(array: Any) -> int:
    """Return the address of a device array, or of NumPy's where a test has those."""
    return array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr
