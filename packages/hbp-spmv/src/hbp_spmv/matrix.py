# SPDX-License-Identifier: Apache-2.0
"""`HBPMatrix`: a sparse matrix bound to the fastest product this machine has for it."""

import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from weakref import ref

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray
from scipy.sparse import coo_array, csr_array
from scipy.sparse.linalg import LinearOperator
from tenfold_core.device import resolve
from tenfold_core.errors import InputError

from hbp_spmv.building import build_layout, canonical, kernels_work, workers_for
from hbp_spmv.config import PAPER, BuildConfig, as_int, configured
from hbp_spmv.fallback import ScipyLayout
from hbp_spmv.operands import accepts, as_factor, as_operand, as_values

if TYPE_CHECKING:
    from hbp_spmv.stats import Stats

__all__ = ["HBPMatrix", "from_csr"]


def from_csr(
    a: Any, *, layout: str | None = None, hash: str | None = None,
    hash_params: Mapping[str, int] | None = None, block: tuple[int, int] | None = None,
    dtype: DTypeLike | None = None, threads: int | None = None, device: str = "cpu",
    n_products: int = 1000, tune: bool = False, config: BuildConfig | None = None, **settings: Any,
) -> "HBPMatrix":  # fmt: skip
    """Build an `HBPMatrix` from any sparse matrix.

    Args:
        a: SciPy sparse matrix or array, or whatever `read` takes.
        layout: auto, compact, paper or csr.
        hash: lut, paper, tuned, sort or none.
        hash_params: `k0`, `s`, `t`, `u` of the published family.
        block: (height, width) of the published blocks.
        dtype: type of the values and the product; by default the matrix's own.
        threads: most threads a product may use; by default the cores of this process (affinity,
            CPU quota of a container), or as many as OMP_NUM_THREADS says if those are fewer.
        device: cpu, cuda, cuda:N, or auto for a CUDA device if there is one.
        n_products: products the matrix is built for; few of them do not pay for a reordering.
        tune: time the candidates of `auto` whatever `n_products` says.
        config: all settings at once; the other arguments override it.
        settings: further fields of `BuildConfig`.

    Raises:
        ConfigError: a setting is unknown or out of range.
        InputError: the matrix cannot be stored.

    Example:
        >>> import numpy as np, scipy.sparse as sp
        >>> H = from_csr(sp.eye_array(3, format="csr"), layout="compact")
        >>> H @ np.array([1.0, 2.0, 3.0])
        array([1., 2., 3.])
    """
    given = {"layout": layout, "hash": hash, **settings}
    chosen = configured(config, given, block=block, hash_params=hash_params)
    place = resolve(device)
    matrix = canonical(a, dtype)
    if place.kind == "cuda":
        from hbp_spmv.cuda import build

        return build(matrix, chosen, str(place), n_products=n_products, tune=tune)
    workers = workers_for(threads, matrix.nnz)
    started = time.perf_counter()
    stored, reasons = _build(matrix, chosen, workers, n_products, tune=tune)
    seconds = time.perf_counter() - started
    return HBPMatrix(stored, chosen, matrix.dtype, workers, seconds, reasons)


def _build(
    matrix: csr_array, config: BuildConfig, workers: int, n_products: int, *, tune: bool
) -> tuple[Any, tuple[str, ...]]:
    """Return the stored layout and, if `auto` chose it, why."""
    if config.layout != "auto" or matrix.dtype.kind != "f" or not kernels_work():
        return build_layout(matrix, config), ()
    from hbp_spmv.selection import choose

    stored, _, plan = choose(matrix, config, threads=workers, n_products=n_products, tune=tune)
    return stored, plan.reasons


class HBPMatrix:
    """An immutable sparse matrix with a fast product; safe to use from several threads.

    Made by `from_csr` or `load`. It works as a SciPy `LinearOperator` (`matvec`, `rmatvec`,
    `shape`, `dtype`) and multiplies NumPy arrays and torch tensors.
    """

    __array_priority__ = 1000
    """`ndarray @ HBPMatrix` comes here instead of looping over elements."""

    def __init__(
        self,
        stored: Any,
        config: BuildConfig,
        dtype: np.dtype,
        threads: int,
        build_seconds: float = 0.0,
        reasons: tuple[str, ...] = (),
    ) -> None:
        self._stored = stored
        self.config = config
        self.dtype = np.dtype(dtype)
        self.shape: tuple[int, int] = (int(stored.shape[0]), int(stored.shape[1]))
        self.threads = threads
        self.reasons = reasons
        self._build_seconds = build_seconds
        self._transposed: HBPMatrix | None = None
        self._origin: ref[HBPMatrix] | None = None  # weak, or a matrix and its T form a cycle
        self._bound: dict[str, Any] = {}
        self._single = self._bind("vector")

    # Facts

    @property
    def nnz(self) -> int:
        """Stored entries, explicit zeros included."""
        return self._stored.nnz

    @property
    def ndim(self) -> int:
        """Number of dimensions, 2."""
        return 2

    @property
    def nbytes(self) -> int:
        """Bytes of the stored arrays."""
        return self._stored.nbytes

    @property
    def device(self) -> str:
        """Where the product runs."""
        return "cpu"

    @property
    def layout(self) -> str:
        """Name of the stored layout."""
        return _LAYOUT_NAMES[type(self._stored).__name__]

    @property
    def stats(self) -> "Stats":
        """What the build produced; computed on each access."""
        from hbp_spmv.stats import describe

        return describe(
            self._stored, self.layout, threads=self.threads, build_seconds=self._build_seconds
        )

    def arrays(self) -> dict[str, NDArray]:
        """Return the stored arrays, read-only; for layout 'paper' the six published ones."""
        views = {name: array.view() for name, array in self._stored.arrays().items()}
        for view in views.values():
            view.flags.writeable = False
        return views

    def __repr__(self) -> str:
        rows, columns = self.shape
        return (
            f"<HBPMatrix {rows} x {columns}, {self.nnz} stored, {self.dtype.name}, "
            f"layout {self.layout!r}, {self.threads} thread(s)>"
        )

    # Products

    def __matmul__(self, x: Any) -> Any:
        if self._plain(x, self.shape[1]):
            y = np.empty(self.shape[0], self.dtype)
            self._single(x, y)
            return y
        return self._multiply(x)

    def _plain(self, array: Any, size: int) -> bool:
        """Tell whether an array is a vector the kernel takes as it is."""
        return (
            type(array) is np.ndarray
            and array.dtype == self.dtype
            and array.shape == (size,)
            and array.flags.carray
        )

    def __rmatmul__(self, x: Any) -> Any:
        return self.T @ x if np.ndim(x) == 1 else (self.T @ np.asarray(x).T).T

    def matvec(
        self, x: ArrayLike, out: NDArray | None = None, *, alpha: float = 1.0, beta: float = 0.0
    ) -> Any:
        """Return `alpha * A @ x`, or write `alpha * A @ x + beta * out` to `out`.

        Args:
            x: operand, (columns,) or (columns, k), of the matrix's type, one that it holds exactly
                (integers, shorter floats), or complex.
            out: result, (rows,) or (rows, k); it may be `x` itself.
            alpha: factor of the product.
            beta: factor of the old `out`, which is not read when 0.

        Raises:
            InputError: a shape or a type does not fit.
        """
        if out is None and beta != 0:
            raise InputError(f"beta={beta}: expected an out array to scale")
        if out is None and alpha == 1:
            return self @ x
        alpha, beta = self._factor("alpha", alpha), self._factor("beta", beta)
        direct = self._plain(x, self.shape[1]) and self._plain(out, self.shape[0])
        direct = direct and type(alpha) is float and type(beta) is float
        if direct and out is not None and out.flags.writeable and not np.may_share_memory(out, x):
            self._single(x, out, alpha, beta)
            return out
        return self._multiply(x, out, alpha, beta)

    matmat = matvec

    def rmatvec(self, x: ArrayLike) -> Any:
        """Return `A.conj().T @ x`; the first call builds the transposed matrix and keeps it."""
        if self.dtype.kind == "c":
            return np.conj(self.T @ np.conj(x))
        return self.T @ x

    rmatmat = rmatvec

    def _multiply(
        self, x: Any, out: NDArray | None = None, alpha: float = 1.0, beta: float = 0.0
    ) -> Any:
        """Multiply whatever is not the plain case: check, convert, choose the columns."""
        if type(x).__module__.partition(".")[0] == "torch":
            return self._multiply_torch(x, out, alpha, beta)
        x = as_operand(x, self.shape[1], self.dtype)
        shape = (self.shape[0], *x.shape[1:])
        direct = accepts(out, shape, x.dtype) and not np.may_share_memory(out, x)
        if x.dtype.kind == "c" and self.dtype.kind != "c":
            return self._add_to(out, self._multiply_complex(x, alpha), beta)
        if out is not None and out.dtype.kind != self.dtype.kind:
            return self._add_to(out, self._multiply(x, None, alpha), beta)
        if out is not None and direct:
            y = out
        elif out is not None and beta != 0:
            y = np.ascontiguousarray(out, self.dtype).copy()
        else:
            y = np.empty(shape, self.dtype)
        if x.ndim == 1:
            self._single(x, y, alpha, beta)
        else:
            self._matrix_product(x, y, alpha, beta)
        if out is None or direct:
            return y
        out[...] = y
        return out

    def _factor(self, name: str, value: Any) -> Any:
        return value if type(value) is float else as_factor(name, value, self.dtype)

    def _multiply_complex(self, x: NDArray, alpha: float) -> NDArray:
        """Multiply a complex operand by a real matrix: real and imaginary part are two columns."""
        columns = 2 * (x.shape[1] if x.ndim == 2 else 1)
        y = np.empty((self.shape[0], columns), self.dtype)
        self._matrix_product(x.view(self.dtype).reshape(self.shape[1], columns), y, alpha, 0.0)
        return y.view(x.dtype).reshape(self.shape[0], *x.shape[1:])

    @staticmethod
    def _add_to(out: NDArray | None, result: NDArray, beta: float) -> NDArray:
        """Return `result`, or write `result + beta * out` to a complex `out`."""
        if out is None:
            return result
        out[...] = result if beta == 0 else result + beta * out
        return out

    def _multiply_torch(self, x: Any, out: Any, alpha: float, beta: float) -> Any:
        from hbp_spmv import torch

        if x.requires_grad:
            if out is not None:
                raise InputError("out: not available for a tensor that requires grad")
            return alpha * torch.spmv(self, x)
        if out is not None and not hasattr(out, "numpy"):
            raise InputError(f"out is a {type(out).__name__}, expected a tensor as x is one")
        array = torch.as_array(x)
        result = self._multiply(array, None if out is None else out.numpy(), alpha, beta)
        return sys.modules["torch"].from_numpy(result) if out is None else out

    def _matrix_product(self, x: NDArray, y: NDArray, alpha: float, beta: float) -> None:
        columns = x.shape[1]
        if columns == 0:
            return
        if self.layout == "paper" or self.dtype.kind == "c":
            for column in range(columns):
                part = np.ascontiguousarray(y[:, column])
                self._single(np.ascontiguousarray(x[:, column]), part, alpha, beta)
                y[:, column] = part
            return
        self._bind("columns")(x.reshape(-1), y.reshape(-1), alpha, beta, columns)

    def _bind(self, kind: str) -> Any:
        if kind not in self._bound:
            from hbp_spmv.product import bind_matrix

            self._bound[kind] = bind_matrix(
                self._stored, kind, self.threads, self.dtype, self.config.fixed_share
            )
        return self._bound[kind]

    # Other forms

    @property
    def T(self) -> "HBPMatrix":
        """The transposed matrix, built on first use and kept."""
        origin = None if self._origin is None else self._origin()
        if origin is not None:
            return origin
        if self._transposed is None:
            # Columns become rows: 16-bit indices may no longer reach.
            index = "auto" if self.config.index == "u16" else self.config.index
            config = replace(self.config, keep_perm=False, index=index)
            built = from_csr(self.to_csr().T.tocsr(), config=config, threads=self.threads)
            built._origin = ref(self)
            self._transposed = built
        return self._transposed

    def to_csr(self) -> csr_array:
        """Return the matrix as canonical SciPy CSR, explicit zeros kept."""
        row, col = self._stored.coordinates()
        a = csr_array(coo_array((self._stored.values(), (row, col)), shape=self.shape))
        a.sort_indices()
        return a

    def diagonal(self) -> NDArray:
        """Return the main diagonal, (min(rows, columns),)."""
        row, col = self._stored.coordinates()
        on = row == col
        result = np.zeros(min(self.shape), self.dtype)
        result[row[on]] = self._stored.values()[on]
        return result

    def astype(self, dtype: DTypeLike) -> "HBPMatrix":
        """Return the matrix in another type, rebuilt as it was; complex ones by rows."""
        settings = {"layout": "auto"} if np.dtype(dtype).kind == "c" else {}
        return self._rebuilt(self.to_csr(), dtype=dtype, **settings)

    def to_paper(self, **settings: Any) -> "HBPMatrix":
        """Return the matrix in the published layout."""
        settings = {"hash": "paper", **settings}
        return from_csr(self.to_csr(), layout="paper", threads=self.threads, **settings)

    @classmethod
    def from_paper(
        cls,
        arrays: Mapping[str, NDArray],
        shape: tuple[int, int],
        *,
        height: int = 512,
        width: int = 4096,
        lanes: int = 32,
        threads: int | None = None,
    ) -> "HBPMatrix":
        """Return a matrix made of the six published arrays, which are checked and not copied.

        Args:
            arrays: the arrays by their published names (see `method`).
            shape: rows and columns.
            height: rows of a block.
            width: columns of a block.
            lanes: rows of a group.
            threads: as for `from_csr`.

        Raises:
            InputError: an array is missing or not consistent with the others.
        """
        from hbp_spmv.storage import paper_layout

        height, width = as_int("height", height, 0), as_int("width", width, 0)
        lanes = as_int("lanes", lanes, 0)
        stored = paper_layout(arrays, shape, height=height, width=width, lanes=lanes)
        config = replace(PAPER, height=height, width=width, lanes=lanes)
        return cls(stored, config, stored.data.dtype, workers_for(threads, stored.nnz))

    def to_compact(self, **settings: Any) -> "HBPMatrix":
        """Return the matrix in the compact layout."""
        return from_csr(self.to_csr(), layout="compact", threads=self.threads, **settings)

    def to(self, device: str) -> "HBPMatrix":
        """Return the matrix on `device` (cpu, cuda, cuda:N or auto), itself if it is there."""
        place = resolve(device)
        if place.kind == "cpu":
            return self
        return self._rebuilt(self.to_csr(), device=str(place))

    def with_threads(self, threads: int) -> "HBPMatrix":
        """Return the same stored matrix bound to another number of threads."""
        return HBPMatrix(
            self._stored,
            self.config,
            self.dtype,
            workers_for(threads, self.nnz),
            self._build_seconds,
            self.reasons,
        )

    def update_values(self, values: ArrayLike) -> "HBPMatrix":
        """Return a matrix of the same pattern with other values, without reordering anything.

        Args:
            values: new values in the order of `to_csr().data`, (nnz,), of the matrix's type or one
                that it holds exactly.

        Raises:
            InputError: the length is wrong, the type would lose digits, or the build did not keep
                its permutation.
        """
        values = as_values(values, self.nnz, self.dtype)
        if isinstance(self._stored, ScipyLayout):
            old = self._stored.csr
            stored = ScipyLayout(csr_array((values, old.indices, old.indptr), shape=self.shape))
        elif self.layout == "csr":
            stored = replace(self._stored, val=values)
        elif self._stored.perm is None:
            raise InputError(
                "update_values: the permutation was not kept; build with keep_perm=True"
            )
        elif self.layout == "paper":
            stored = replace(self._stored, data=values[self._stored.perm])
        else:
            padded = np.zeros(self.nnz + self._stored.lanes, self.dtype)
            np.take(values, self._stored.perm, out=padded[: self.nnz])
            stored = replace(self._stored, val=padded)
        return HBPMatrix(stored, self.config, self.dtype, self.threads, 0.0, self.reasons)

    def save(self, path: Any) -> None:
        """Write the matrix as `.hbp.safetensors`, atomically."""
        from hbp_spmv.storage import save

        save(self, path)

    def aslinearoperator(self) -> LinearOperator:
        """Return a SciPy `LinearOperator` for cg, gmres, eigsh and the like."""
        return LinearOperator(
            self.shape,
            matvec=lambda x: self @ np.ravel(x),
            rmatvec=lambda x: self.rmatvec(np.ravel(x)),
            matmat=self.__matmul__,
            rmatmat=self.rmatvec,
            dtype=self.dtype,
        )

    def _rebuilt(self, a: csr_array, **settings: Any) -> "HBPMatrix":
        return from_csr(a, config=self.config, threads=self.threads, **settings)

    def __reduce__(self) -> tuple:
        arguments = (self._stored, self.config, self.dtype, self.threads, self._build_seconds)
        return HBPMatrix, (*arguments, self.reasons)


_LAYOUT_NAMES = {
    "CompactLayout": "compact",
    "PaperLayout": "paper",
    "RowLayout": "csr",
    "ScipyLayout": "scipy",
}
