# SPDX-License-Identifier: Apache-2.0
"""`CudaMatrix`: an `HBPMatrix` whose arrays and products live on a CUDA device.

It takes CuPy arrays, PyTorch tensors and NumPy arrays, and answers in kind: tensors and CuPy arrays
are read and written in place through DLPack, on the stream their library is working on; NumPy
arrays are copied there and back.
"""

import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any
from weakref import ref

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray
from scipy.sparse import coo_array, csr_array
from tenfold_core.device import resolve
from tenfold_core.errors import InputError
from tenfold_core.sparse.gpu import Runtime, cuda_runtime

from hbp_spmv.building import canonical
from hbp_spmv.classes import heavy_limit
from hbp_spmv.config import BuildConfig
from hbp_spmv.device_layouts import OnDevice, Source, store
from hbp_spmv.grouped import DeviceCSR, to_host
from hbp_spmv.matrix import HBPMatrix
from hbp_spmv.operands import as_factor, as_operand, as_values
from hbp_spmv.stats import Stats

__all__ = ["CudaMatrix", "build"]


def build(
    a: csr_array,
    config: BuildConfig,
    device: str,
    *,
    n_products: int = 1000,
    tune: bool = False,
    runtime: Runtime | None = None,
) -> "CudaMatrix":
    """Build a matrix on a device from canonical CSR on the host.

    Args:
        a: the matrix, float32 or float64.
        config: its layout and settings.
        device: cuda or cuda:N.
        n_products: products the matrix is built for.
        tune: time the candidates of `auto` whatever `n_products` says.
        runtime: what computes; by default that of `device`.

    Raises:
        ConfigError: no such device, or a layout that it does not have.
        InputError: the values are complex.
    """
    if a.dtype.kind == "c":
        raise InputError(f"matrix: a device multiplies float32 and float64, got {a.dtype}")
    runtime = runtime or cuda_runtime(device)
    started = time.perf_counter()
    reasons: tuple[str, ...] = ()
    with runtime.active():
        source = Source(a, DeviceCSR.from_host(a, runtime.xp))
        if config.layout == "auto":
            from hbp_spmv.cuda_selection import choose

            stored, plan = choose(source, config, runtime, n_products=n_products, tune=tune)
            reasons = plan.reasons
        else:
            stored = store(source, config, runtime)
    seconds = time.perf_counter() - started
    return CudaMatrix(stored, config, a.dtype, runtime, seconds, reasons)


class CudaMatrix(HBPMatrix):
    """An immutable sparse matrix on a CUDA device.

    Made by `from_csr(..., device="cuda")` or `H.to("cuda")`.
    """

    def __init__(
        self,
        stored: OnDevice,
        config: BuildConfig,
        dtype: np.dtype,
        runtime: Runtime,
        build_seconds: float = 0.0,
        reasons: tuple[str, ...] = (),
    ) -> None:
        self._stored: OnDevice = stored
        self.config = config
        self.dtype = np.dtype(dtype)
        self.shape = stored.shape
        self.threads = 0
        self.reasons = reasons
        self.runtime = runtime
        self._build_seconds = build_seconds
        self._transposed = None
        self._origin = None

    @property
    def device(self) -> str:
        """Where the product runs, such as `cuda:0`."""
        return f"cuda:{getattr(self.runtime, 'index', 0)}"

    @property
    def layout(self) -> str:
        """Name of the stored layout."""
        return self._stored.layout

    @property
    def stats(self) -> Stats:
        """What the build produced; computed on each access."""
        stored = self._stored
        efficiency, after = stored.quality()
        return Stats(
            layout=self.layout,
            nnz=self.nnz,
            bytes=self.nbytes,
            bytes_per_nnz=self.nbytes / max(self.nnz, 1),
            lane_efficiency=efficiency,
            std_before=0.0 if self.layout == "csr" else self._std_before(),
            std_after=after,
            groups=stored.groups,
            heavy_rows=stored.heavy_rows,
            strips=stored.strips,
            index_bits=8 * stored.col.dtype.itemsize,
            uniform=stored.uniform,
            threads=0,
            build_seconds=self._build_seconds,
        )

    def _std_before(self) -> float:
        """Return the mean deviation in groups of 32 rows as they come, long and empty ones aside.

        Written with NumPy: a host with a GPU may lack numba.
        """
        lengths = np.diff(self.to_csr().indptr).astype(np.float64)
        kept = (lengths > 0) & (lengths <= heavy_limit(self.shape[0], self.nnz))
        padded = np.full(-(-int(kept.sum()) // 32) * 32, np.nan)
        padded[: kept.sum()] = lengths[kept]
        return float(np.nanstd(padded.reshape(-1, 32), axis=1).mean()) if len(padded) else 0.0

    def arrays(self) -> dict[str, Any]:
        """Return the stored arrays, on the device; do not write to them."""
        return self._stored.arrays()

    def __repr__(self) -> str:
        rows, columns = self.shape
        return (
            f"<CudaMatrix {rows} x {columns}, {self.nnz} stored, {self.dtype.name}, "
            f"layout {self.layout!r}, {self.device}>"
        )

    # Products

    def __matmul__(self, x: Any) -> Any:
        return self._multiply(x)

    def __rmatmul__(self, x: Any) -> Any:
        return self.T @ x if x.ndim == 1 else (self.T @ x.T).T

    def matvec(self, x: Any, out: Any = None, *, alpha: float = 1.0, beta: float = 0.0) -> Any:
        """Return `alpha * A @ x`, or write `alpha * A @ x + beta * out` to `out`.

        Args:
            x: operand, (columns,) or (columns, k): CuPy, PyTorch or NumPy.
            out: result of the same library and place, (rows,) or (rows, k).
            alpha: factor of the product.
            beta: factor of the old `out`, which is not read when 0.

        Raises:
            InputError: a shape, a type or a device does not fit.
        """
        if out is None and beta != 0:
            raise InputError(f"beta={beta}: expected an out array to scale")
        factors = [as_factor(name, v, self.dtype) for name, v in (("alpha", alpha), ("beta", beta))]
        return self._multiply(x, out, *map(float, np.real(factors)))

    matmat = matvec

    def rmatvec(self, x: Any) -> Any:
        """Return `A.T @ x`; the first call builds the transposed matrix and keeps it."""
        return self.T @ x

    rmatmat = rmatvec

    def bind(
        self, x: Any, out: Any, *, alpha: float = 1.0, beta: float = 0.0
    ) -> Callable[[], None]:
        """Return a product of fixed arrays that allocates nothing and may be captured in a graph.

        Args:
            x: contiguous array or tensor on this device, of the matrix's type.
            out: the same, for the result.
            alpha: factor of the product.
            beta: factor of the old `out`.
        """
        with self.runtime.active(), self._stream(x):
            operand, result = self._shared(x, "x"), self._shared(out, "out")
            self._check_shapes(operand, result)
            columns = operand.shape[1] if operand.ndim == 2 else 1
            flat = (operand.reshape(-1), result.reshape(-1), alpha, beta, columns)
            launch = self._stored.bind(*flat)
        if isinstance(x, self.runtime.xp.ndarray):
            return launch

        def on_stream_of_x() -> None:
            with self._stream(x):
                launch()

        return on_stream_of_x

    def _multiply(self, x: Any, out: Any = None, alpha: float = 1.0, beta: float = 0.0) -> Any:
        with self.runtime.active():
            return self._by_library(x, out, alpha, beta)

    def _by_library(self, x: Any, out: Any, alpha: float, beta: float) -> Any:
        library = type(x).__module__.partition(".")[0]
        if library == "torch":
            return self._multiply_torch(x, out, alpha, beta)
        xp = self.runtime.xp
        if isinstance(x, xp.ndarray):
            return self._on_device(x, out, alpha, beta)
        host = as_operand(x, self.shape[1], self.dtype)
        result = self._on_device(
            xp.asarray(host), None if out is None else xp.asarray(out), alpha, beta
        )
        if out is None:
            return to_host(result)
        out[...] = to_host(result)
        return out

    def _on_device(self, x: Any, out: Any, alpha: float, beta: float) -> Any:
        """Multiply an array of the runtime's own library."""
        xp = self.runtime.xp
        x = self._operand(x)
        y: Any
        if x.dtype.kind == "c":
            return self._complex(x, out, alpha, beta)
        shape = (self.shape[0], *x.shape[1:])
        if out is not None and (not isinstance(out, xp.ndarray) or out.shape != shape):
            raise InputError(f"out: expected an array of shape {shape} on {self.device}")
        direct = (
            out is not None
            and out.dtype == self.dtype
            and out.flags.c_contiguous
            and not xp.may_share_memory(out, x)
        )
        if direct:
            y = out
        elif out is not None and beta != 0:
            y = xp.ascontiguousarray(out, self.dtype).copy()
        else:
            y = xp.empty(shape, self.dtype)
        columns = x.shape[1] if x.ndim == 2 else 1
        if columns:
            self._stored.product(x.reshape(-1), y.reshape(-1), alpha, beta, columns)
        if out is None or direct:
            return y
        out[...] = y
        return out

    def _operand(self, x: Any) -> Any:
        xp, columns = self.runtime.xp, self.shape[1]
        if x.ndim not in (1, 2) or x.shape[0] != columns:
            raise InputError(f"x has shape {x.shape}, expected ({columns},) or ({columns}, k)")
        if x.dtype.kind not in "biufc":
            raise InputError(f"x has dtype {x.dtype}, expected numbers")
        target: Any = self.dtype
        if x.dtype.kind == "c":
            target = np.dtype(np.complex64 if target == np.float32 else np.complex128)
        if x.dtype.kind in "fc" and np.finfo(x.dtype).eps < np.finfo(target).eps:
            raise InputError(
                f"x has dtype {x.dtype}, the matrix {self.dtype}: digits would be lost; convert x"
            )
        return xp.ascontiguousarray(x, dtype=target)

    def _complex(self, x: Any, out: Any, alpha: float, beta: float) -> Any:
        """Multiply a complex operand: real and imaginary part are two columns."""
        xp = self.runtime.xp
        columns = 2 * (x.shape[1] if x.ndim == 2 else 1)
        y = xp.empty((self.shape[0], columns), self.dtype)
        parts = x.view(self.dtype).reshape(-1)
        if columns:
            self._stored.product(parts, y.reshape(-1), alpha, 0.0, columns)
        result = y.view(x.dtype).reshape(self.shape[0], *x.shape[1:])
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
        if out is not None and not hasattr(out, "data_ptr"):
            raise InputError(f"out is a {type(out).__name__}, expected a tensor as x is one")
        if not x.is_cuda:
            host = self._multiply(torch.as_array(x), None, alpha, 0.0)
            result = sys.modules["torch"].from_numpy(host)
            return (
                result if out is None else out.copy_(result if beta == 0 else result + beta * out)
            )
        with self._stream(x):
            result = self._on_device(
                self._shared(x, "x"),
                None if out is None else self._shared(out, "out"),
                alpha,
                beta,
            )
            return sys.modules["torch"].from_dlpack(result) if out is None else out

    def _shared(self, array: Any, name: str) -> Any:
        """Return an array or tensor of this device as one of the runtime, without a copy."""
        xp = self.runtime.xp
        if isinstance(array, xp.ndarray):
            return array
        device = getattr(array, "device", None)
        if str(device) not in (self.device, "cuda" if self.device == "cuda:0" else ""):
            raise InputError(f"{name} lies on {device or 'the CPU'}, the matrix on {self.device}")
        return xp.from_dlpack(array.detach())

    def _stream(self, x: Any) -> Any:
        """Return a context in which launches go to the stream that a tensor's library works on."""
        if type(x).__module__.partition(".")[0] != "torch" or not x.is_cuda:
            return nullcontext()
        pointer = sys.modules["torch"].cuda.current_stream(x.device).cuda_stream
        return self.runtime.xp.cuda.ExternalStream(pointer)

    def _check_shapes(self, x: Any, y: Any) -> None:
        wanted = (self.shape[0], *x.shape[1:])
        for name, array, shape in (("x", x, (self.shape[1], *x.shape[1:])), ("out", y, wanted)):
            if array.dtype != self.dtype or not array.flags.c_contiguous or array.shape != shape:
                raise InputError(
                    f"{name} has shape {array.shape} and type {array.dtype}, expected contiguous "
                    f"{shape} of {self.dtype}"
                )

    # Other forms

    @property
    def T(self) -> HBPMatrix:
        """The transposed matrix, built on first use and kept."""
        origin = None if self._origin is None else self._origin()
        if isinstance(origin, CudaMatrix):
            return origin
        if self._transposed is None:
            index = "auto" if self.config.index == "u16" else self.config.index
            config = replace(self.config, keep_perm=False, index=index)
            built = build(self.to_csr().T.tocsr(), config, self.device, runtime=self.runtime)
            built._origin = ref(self)
            self._transposed = built
        return self._transposed

    def to_csr(self) -> csr_array:
        """Return the matrix as canonical SciPy CSR on the host, explicit zeros kept."""
        row, col, val = self._stored.triplets()
        a = csr_array(coo_array((val, (row, col)), shape=self.shape))
        a.sort_indices()
        return a

    def diagonal(self) -> NDArray:
        """Return the main diagonal on the host, (min(rows, columns),)."""
        return self.to_csr().diagonal()

    def astype(self, dtype: DTypeLike) -> "CudaMatrix":
        """Return the matrix in another type on the same device."""
        return self._rebuilt(canonical(self.to_csr(), dtype))

    def to_paper(self, **settings: Any) -> HBPMatrix:
        """Return the matrix in the published layout, on the CPU."""
        return self.to("cpu").to_paper(**settings)

    def to_compact(self, **settings: Any) -> "CudaMatrix":
        """Return the matrix in the compact layout on the same device."""
        return self._rebuilt(self.to_csr(), layout="compact", **settings)

    def to(self, device: str) -> HBPMatrix:
        """Return the matrix on `device`, itself if it is there already."""
        found = resolve(device)
        if str(found) == self.device:
            return self
        from hbp_spmv.matrix import from_csr

        return from_csr(self.to_csr(), config=self.config, device=str(found))

    def with_threads(self, threads: int) -> HBPMatrix:
        """Refuse: a device has no number of threads to choose."""
        raise InputError(f"threads={threads}: the matrix lies on {self.device}; use to('cpu')")

    def update_values(self, values: ArrayLike) -> "CudaMatrix":
        """Return a matrix of the same pattern with other values, without leaving the device.

        Args:
            values: new values in the order of `to_csr().data`, (nnz,), on host or device.

        Raises:
            InputError: the length is wrong, the type would lose digits, or the build did not keep
                its permutation.
        """
        with self.runtime.active():
            stored = self._stored.with_values(self._new_values(values))
        return CudaMatrix(stored, self.config, self.dtype, self.runtime, 0.0, self.reasons)

    def _new_values(self, values: Any) -> Any:
        xp = self.runtime.xp
        if type(values).__module__.partition(".")[0] == "torch":
            values = self._shared(values, "values") if values.is_cuda else values.detach().numpy()
        if not isinstance(values, xp.ndarray):
            return xp.asarray(as_values(values, self.nnz, self.dtype))
        if values.shape != (self.nnz,) or values.dtype != self.dtype:
            raise InputError(
                f"values have shape {values.shape} and type {values.dtype}, expected "
                f"({self.nnz},) of {self.dtype}"
            )
        return values.copy()

    def save(self, path: Any) -> None:
        """Write the matrix as `.hbp.safetensors`, as the CPU would store it."""
        self.to("cpu").save(path)

    def _rebuilt(self, a: csr_array, **settings: Any) -> "CudaMatrix":
        config = replace(self.config, **settings)
        return build(a, config, self.device, runtime=self.runtime)

    def __reduce__(self) -> tuple:
        return _restored, (self.to_csr(), self.config, self.device, self.layout)


def _restored(a: csr_array, config: BuildConfig, device: str, layout: str) -> CudaMatrix:
    return build(a, replace(config, layout=layout), device)
