# SPDX-License-Identifier: Apache-2.0
"""What HBP is compared with on a CPU: vendor and library products, and our own of known formats.

Every entry of `BASELINES` turns a canonical CSR matrix into an `Operator`. All of them compute
`y = A x` in the matrix's own type; the tests hold them to one error bound.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from tenfold_core.errors import InputError

from hbp_spmv.building import kernels_work

__all__ = ["BASELINES", "Baseline", "Operator"]

BLOCK_SIZES = (1, 2, 3, 4, 6, 8)
"""Square block sizes tried for BSR."""
_SAMPLE_ROWS = 24
"""Rows of a BSR sample: a multiple of every block size."""

Multiply = Callable[[NDArray, NDArray], None]


@dataclass(frozen=True, slots=True)
class Operator:
    """A matrix ready to be multiplied; its closures keep alive what they point into."""

    name: str
    nbytes: int
    """Bytes stored, every array once."""
    threads: int
    """Threads that a product uses: 1 for libraries that have no threads here."""
    multiply: Multiply
    """`multiply(x, y)` writes A x to y; both contiguous and of the matrix's type."""
    matvec: Callable[[NDArray], NDArray]
    """`matvec(x)` returns A x the way a user of that library would ask for it."""
    bind: Callable[[NDArray], Callable[[], Any]] | None = None
    """`bind(x)` returns the product of an x that is already the library's own array, if that is not
    a NumPy one; converting it at every product costs torch 2 us."""


@dataclass(frozen=True, slots=True)
class Baseline:
    """One way to multiply, by name."""

    name: str
    description: str
    probe: Callable[[], str | None]
    """Returns why it cannot run here, or None."""
    prepare: Callable[[csr_array, int], Operator]
    dtypes: tuple[str, ...] = ("float32", "float64")
    """Types of values it multiplies."""

    def build(self, a: csr_array, threads: int) -> Operator:
        """Convert a canonical CSR matrix.

        Raises:
            InputError: the values have a type that this format lacks, or it would not fit.
        """
        if a.dtype.name not in self.dtypes:
            names = ", ".join(self.dtypes)
            raise InputError(f"format {self.name!r}: expected values of {names}, got {a.dtype}")
        return self.prepare(a, threads)


def _always() -> None:
    return None


def _compiled() -> str | None:
    return None if kernels_work() else "numba does not work here"


def _needs(module: str, remedy: str) -> Callable[[], str | None]:
    def probe() -> str | None:
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed: {remedy}"
        return None

    return probe


def _mkl_probe() -> str | None:
    reason = _needs("sparse_dot_mkl", "pip install 'hbp-spmv[mkl]'")()
    if reason is None:
        try:
            importlib.import_module("sparse_dot_mkl")
        except (ImportError, OSError) as error:  # the package is there, the MKL library is not
            return f"sparse_dot_mkl cannot load MKL: {error}".splitlines()[0]
    return reason


def _csr_bytes(a: csr_array) -> int:
    return a.indptr.nbytes + a.indices.nbytes + a.data.nbytes


# Libraries


def _scipy_csr(a: csr_array, _: int) -> Operator:
    def multiply(x: NDArray, y: NDArray) -> None:
        y[...] = a @ x

    return Operator("csr-scipy", _csr_bytes(a), 1, multiply, lambda x: a @ x)


def _coo(a: csr_array, _: int) -> Operator:
    b = a.tocoo()
    nbytes = b.data.nbytes + sum(index.nbytes for index in b.coords)

    def multiply(x: NDArray, y: NDArray) -> None:
        y[...] = b @ x

    return Operator("coo", nbytes, 1, multiply, lambda x: b @ x)


def _bsr(a: csr_array, _: int) -> Operator:
    size = _block_size(a)
    rows, columns = a.shape
    extra = -columns % size
    grown = a.copy()
    grown.resize(rows + -rows % size, columns + extra)
    b = grown.tobsr((size, size))

    def matvec(x: NDArray) -> NDArray:
        return (b @ (np.append(x, np.zeros(extra, x.dtype)) if extra else x))[:rows]

    def multiply(x: NDArray, y: NDArray) -> None:
        y[...] = matvec(x)

    return Operator("bsr", _csr_bytes(b), 1, multiply, matvec)


def _block_size(a: csr_array, samples: int = 64) -> int:
    """Return the block size that stores fewest bytes on evenly spaced samples of 24 rows."""
    tops = np.arange(0, a.shape[0], _SAMPLE_ROWS)
    tops = tops[
        np.unique(np.linspace(0, max(len(tops) - 1, 0), min(len(tops), samples)).astype(int))
    ]
    row, column = [], []
    for top in tops:
        ptr = a.indptr[top : top + _SAMPLE_ROWS + 1]
        row.append(np.repeat(top + np.arange(len(ptr) - 1), np.diff(ptr)))
        column.append(a.indices[ptr[0] : ptr[-1]])
    rows = np.concatenate([np.empty(0, np.int64), *row]).astype(np.int64)
    columns = np.concatenate([np.empty(0, np.int64), *column]).astype(np.int64)

    def stored(size: int) -> int:
        blocks = len(np.unique(rows // size * (a.shape[1] + 1) + columns // size))
        return blocks * (size * size * a.dtype.itemsize + 4)

    return min(BLOCK_SIZES, key=stored)


def _mkl(a: csr_array, threads: int) -> Operator:
    import sparse_dot_mkl as mkl

    def call(x: NDArray, y: NDArray | None) -> NDArray:
        before = mkl.mkl_set_num_threads_local(threads)
        try:
            return mkl.dot_product_mkl(a, x, out=y, out_scalar=0.0)
        finally:
            mkl.mkl_set_num_threads_local(before)

    def multiply(x: NDArray, y: NDArray) -> None:
        call(x, y)

    return Operator("csr-mkl", _csr_bytes(a), threads, multiply, lambda x: call(x, None))


def _torch(name: str, index: type) -> Callable[[csr_array, int], Operator]:
    def prepare(a: csr_array, threads: int) -> Operator:
        from hbp_spmv.torch import csr_product

        multiply, bind, nbytes = csr_product(a, index=index, threads=threads)
        return replace(_operator(name, nbytes, threads, multiply, a), bind=bind)

    return prepare


# Our kernels


def _operator(name: str, nbytes: int, threads: int, multiply: Multiply, a: csr_array) -> Operator:
    def matvec(x: NDArray) -> NDArray:
        y = np.empty(a.shape[0], a.dtype)
        multiply(x, y)
        return y

    return Operator(name, nbytes, threads, multiply, matvec)


def _bound(name: str, a: csr_array, threads: int, layout: Any, task: Any) -> Operator:
    from hbp_spmv.product import bind

    def clear(x: NDArray, y: NDArray) -> None:
        y[...] = 0

    multiply = bind(layout, task, threads) if a.nnz else clear
    return _operator(name, layout.nbytes, threads, multiply, a)


def _stored(name: str, converter: str) -> Callable[[csr_array, int], Operator]:
    def prepare(a: csr_array, threads: int) -> Operator:
        from hbp_spmv import formats

        return _bound(name, a, threads, *getattr(formats, converter)(a))

    return prepare


def _blocks(name: str, order: str) -> Callable[[csr_array, int], Operator]:
    def prepare(a: csr_array, threads: int) -> Operator:
        from hbp_spmv.config import BuildConfig
        from hbp_spmv.kernels.paper import paper_task
        from hbp_spmv.method import PaperLayout

        layout = PaperLayout.from_csr(a, BuildConfig(layout="paper", hash=order))
        return _bound(name, a, threads, layout, paper_task(a.dtype.itemsize))

    return prepare


def _dp2d(a: csr_array, threads: int) -> Operator:
    from hbp_spmv.dp2d import GroupedLayout
    from hbp_spmv.kernels.dp2d import grouped_task

    layout = GroupedLayout.from_csr(a)
    return _bound("DP2D", a, threads, layout, grouped_task(a.dtype.itemsize))


_ALL_TYPES = ("float32", "float64", "complex64", "complex128")
_TORCH = _needs("torch", "pip install 'hbp-spmv[torch]'")
BASELINES: dict[str, Baseline] = {
    baseline.name: baseline
    for baseline in (
        Baseline("csr-scipy", "SciPy's A @ x, single-threaded", _always, _scipy_csr, _ALL_TYPES),
        Baseline(
            "csr-torch",
            "torch sparse CSR, int32 indices",
            _TORCH,
            _torch("csr-torch", np.int32),
            _ALL_TYPES,
        ),
        Baseline(
            "csr-torch-int64",
            "torch sparse CSR, int64 indices, torch's default",
            _TORCH,
            _torch("csr-torch-int64", np.int64),
            _ALL_TYPES,
        ),
        Baseline(
            "csr-mkl",
            "MKL through sparse-dot-mkl, one handle per product",
            _mkl_probe,
            _mkl,
            _ALL_TYPES,
        ),
        Baseline(
            "csr-merge",
            "merge path of Merrill and Garland",
            _compiled,
            _stored("csr-merge", "merge_path"),
        ),
        Baseline(
            "sell",
            "SELL-C-sigma, C = 8, padding masked",
            _compiled,
            _stored("sell", "sell_c_sigma"),
        ),
        Baseline("ell", "ELLPACK, padding masked", _compiled, _stored("ell", "ell")),
        Baseline("coo", "SciPy's coordinate product, single-threaded", _always, _coo, _ALL_TYPES),
        Baseline(
            "bsr",
            "SciPy's block CSR, block size by sampled fill, single-threaded",
            _always,
            _bsr,
            _ALL_TYPES,
        ),
        Baseline("2d", "published blocks, rows as they are", _compiled, _blocks("2d", "none")),
        Baseline(
            "sort2D",
            "published blocks, rows merge-sorted by length",
            _compiled,
            _blocks("sort2D", "sort"),
        ),
        Baseline("DP2D", "DP2D (reimplemented from the abstract)", _compiled, _dp2d),
    )
}
"""Every CPU baseline by name, in the order in which tables show them."""
