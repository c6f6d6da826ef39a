# SPDX-License-Identifier: Apache-2.0
"""What HBP is compared with on a CUDA device: vendor products, known kernels, the published layout.

Every entry of `GPU_BASELINES` turns a canonical CSR matrix into a `DeviceOperator`; all of them
compute `y = A x` in the matrix's own type, within one error bound. The import needs NumPy and SciPy
alone; CuPy, torch and numba are imported by what uses them.
"""

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import csr_array
from tenfold_core.device import cupy_or_none, cupy_reason
from tenfold_core.errors import InputError
from tenfold_core.sparse.gpu import Runtime

from hbp_spmv import gpu_kernels
from hbp_spmv.gpu_kernels import SLICE, DeviceOperator, csr_bytes, device_csr, sliced_rows

__all__ = ["GPU_BASELINES", "DeviceOperator", "GpuBaseline"]


@dataclass(frozen=True, slots=True)
class GpuBaseline:
    """One way to multiply on a device, by name."""

    name: str
    description: str
    probe: Callable[[], str | None]
    """Returns why it cannot run here, or None."""
    prepare: Callable[[csr_array, Runtime], DeviceOperator]

    def build(self, a: csr_array, runtime: Runtime) -> DeviceOperator:
        """Convert a canonical CSR matrix and move it to the runtime's device.

        Raises:
            InputError: the values are neither float32 nor float64, or 32-bit indices do not reach.
        """
        if a.dtype.name not in ("float32", "float64"):
            raise InputError(
                f"format {self.name!r}: expected values of float32, float64, got {a.dtype}"
            )
        if max(a.nnz, *a.shape) >= 1 << 31:
            raise InputError(
                f"format {self.name!r}: matrix of shape {a.shape} with {a.nnz} nonzeros, "
                "expected below 2**31 of each; leave it out for this matrix"
            )
        return self.prepare(a, runtime)


def _device() -> str | None:
    return None if cupy_or_none() is not None else f"no CUDA device through CuPy: {cupy_reason()}"


def _cusparse() -> str | None:
    from hbp_spmv.cusparse import library_reason

    return _device() or library_reason()


def _cusparse_sell() -> str | None:
    from hbp_spmv.cusparse import library_reason

    return _device() or library_reason("cusparseCreateSlicedEll")


def _torch() -> str | None:
    if (reason := _device()) is not None:
        return reason
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed: pip install 'hbp-spmv[torch]'"
    torch = importlib.import_module("torch")
    return None if torch.cuda.is_available() else f"torch {torch.__version__} has no CUDA device"


def _paper() -> str | None:
    from hbp_spmv.building import kernels_work

    return _device() or (None if kernels_work() else "numba, which builds it, does not work here")


# Libraries


def _zeros(name: str, nbytes: int) -> DeviceOperator:
    """Return the operator of a matrix without nonzeros, which no library is asked to multiply."""

    def launch(x: Any, y: Any) -> None:
        y[...] = 0

    return DeviceOperator(name, nbytes, launch, "no nonzeros, no call")


def _cupyx(a: csr_array, runtime: Runtime) -> DeviceOperator:
    if a.nnz == 0:
        return _zeros("cupyx", csr_bytes(a))
    sparse = importlib.import_module("cupyx.scipy.sparse")
    matrix = sparse.csr_matrix(device_csr(a, runtime)[::-1], shape=a.shape)
    matrix.has_canonical_format = True  # it is; else the first product would look

    def launch(x: Any, y: Any) -> None:
        y[...] = matrix @ x

    version = runtime.xp.__version__
    return DeviceOperator(
        "cupyx",
        csr_bytes(a),
        launch,
        f"CuPy {version}, int32 indices, descriptors made at every product; launch copies to y",
        lambda x: matrix @ x,
    )


def _torch_csr(name: str, index: type) -> Callable[[csr_array, Runtime], DeviceOperator]:
    def prepare(a: csr_array, runtime: Runtime) -> DeviceOperator:
        nbytes = csr_bytes(a, np.dtype(index).itemsize)
        if a.nnz == 0:
            return _zeros(name, nbytes)
        torch = importlib.import_module("torch")
        ptr, col, val = (torch.from_dlpack(part) for part in device_csr(a, runtime, index))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
            matrix = torch.sparse_csr_tensor(ptr, col, val, size=a.shape, check_invariants=False)
        seen: dict[int, tuple[Any, Any]] = {}

        def tensor(array: Any) -> Any:
            """Return an array as a tensor, kept for the next product with the same one."""
            known = seen.get(id(array))
            if known is None or known[0] is not array:
                if len(seen) > 8:
                    seen.clear()
                known = seen[id(array)] = array, torch.from_dlpack(array)
            return known[1]

        def launch(x: Any, y: Any) -> None:
            stream = runtime.stream()
            if stream == 0:  # the default stream of both libraries
                torch.mv(matrix, tensor(x), out=tensor(y))
                return
            with torch.cuda.stream(torch.cuda.ExternalStream(stream)):
                torch.mv(matrix, tensor(x), out=tensor(y))

        return DeviceOperator(
            name,
            nbytes,
            launch,
            f"torch {torch.__version__}, {np.dtype(index).name} indices",
            lambda x: torch.mv(matrix, tensor(x)),
        )

    return prepare


def _cusparse_csr(name: str, algorithm: str) -> Callable[[csr_array, Runtime], DeviceOperator]:
    def prepare(a: csr_array, runtime: Runtime) -> DeviceOperator:
        from hbp_spmv.cusparse import CusparseProduct, cusparse_library

        parts = device_csr(a, runtime)
        product = CusparseProduct.csr(cusparse_library(), runtime, a.shape, *parts, algorithm)
        return DeviceOperator(name, csr_bytes(a), product, product.notes)

    return prepare


def _cusparse_sliced(a: csr_array, runtime: Runtime) -> DeviceOperator:
    from hbp_spmv.cusparse import CusparseProduct, cusparse_library

    start, col, val = sliced_rows("cusparse-sell", a, np.arange(a.shape[0]))
    if start[-1] >= 1 << 31:
        raise InputError(
            f"format 'cusparse-sell': {start[-1]} padded elements, expected below 2**31; "
            "leave it out for this matrix"
        )
    parts = [runtime.xp.asarray(part) for part in (start.astype(np.int32), col, val)]
    product = CusparseProduct.sell(
        cusparse_library(), runtime, a.shape, a.nnz, *parts, slice_size=SLICE
    )
    nbytes = sum(int(part.nbytes) for part in parts)
    return DeviceOperator("cusparse-sell", nbytes, product, product.notes)


# Our kernels


def _published(name: str, order: str) -> Callable[[csr_array, Runtime], DeviceOperator]:
    def prepare(a: csr_array, runtime: Runtime) -> DeviceOperator:
        from hbp_spmv.config import BuildConfig
        from hbp_spmv.gpu_paper import PaperProduct
        from hbp_spmv.method import PaperLayout

        layout = PaperLayout.from_csr(a, BuildConfig(layout="paper", hash=order))
        product = PaperProduct(layout, runtime)
        return DeviceOperator(name, layout.nbytes, product, product.notes)

    return prepare


GPU_BASELINES: dict[str, GpuBaseline] = {
    baseline.name: baseline
    for baseline in (
        GpuBaseline(
            "cusparse-csr-alg1",
            "cuSPARSE CSR, algorithm 1, int32 indices, preprocessed",
            _cusparse,
            _cusparse_csr("cusparse-csr-alg1", "CUSPARSE_SPMV_CSR_ALG1"),
        ),
        GpuBaseline(
            "cusparse-csr-alg2",
            "cuSPARSE CSR, algorithm 2 (deterministic), int32 indices, preprocessed",
            _cusparse,
            _cusparse_csr("cusparse-csr-alg2", "CUSPARSE_SPMV_CSR_ALG2"),
        ),
        GpuBaseline(
            "cusparse-sell",
            "cuSPARSE sliced ELL, slices of 32 rows in their own order",
            _cusparse_sell,
            _cusparse_sliced,
        ),
        GpuBaseline("cupyx", "CuPy's A @ x", _device, _cupyx),
        GpuBaseline(
            "csr-torch",
            "torch sparse CSR, int32 indices",
            _torch,
            _torch_csr("csr-torch", np.int32),
        ),
        GpuBaseline(
            "csr-torch-int64",
            "torch sparse CSR, int64 indices, torch's default",
            _torch,
            _torch_csr("csr-torch-int64", np.int64),
        ),
        GpuBaseline(
            "csr-scalar-8192",
            "one thread a row, 8192 threads in all: the paper's own baseline",
            _device,
            gpu_kernels.csr_scalar_8192,
        ),
        GpuBaseline("csr-scalar", "one thread a row", _device, gpu_kernels.csr_scalar),
        GpuBaseline(
            "csr-vector",
            "2 to 32 threads a row, by the mean length",
            _device,
            gpu_kernels.csr_vector,
        ),
        GpuBaseline(
            "csr-adaptive",
            "row bins: packed short rows, a block a row, long rows in pieces",
            _device,
            gpu_kernels.csr_adaptive,
        ),
        GpuBaseline(
            "csr-merge", "merge path of Merrill and Garland", _device, gpu_kernels.csr_merge
        ),
        GpuBaseline("sell", "SELL-32-sigma, padding masked", _device, gpu_kernels.sell),
        GpuBaseline(
            "2d",
            "published blocks, rows as they are",
            _paper,
            _published("2d", "none"),
        ),
        GpuBaseline(
            "sort2D",
            "published blocks, rows merge-sorted by length",
            _paper,
            _published("sort2D", "sort"),
        ),
        GpuBaseline(
            "hbp-paper",
            "published blocks, hash, and mixed allocation",
            _paper,
            _published("hbp-paper", "paper"),
        ),
    )
}
"""Every baseline on a device by name, in the order in which tables show them."""
