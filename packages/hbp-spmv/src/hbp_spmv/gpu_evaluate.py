# SPDX-License-Identifier: Apache-2.0
"""Measure one matrix in several formats on a GPU: what `evaluate` does there, with its clock.

`us` is a product as its user calls it, timed by the host, which waits for the device at the end of
each sample; `graph_us` is a product in a CUDA graph of many, timed by events. Cold, a
buffer of twice the second-level cache is rewritten before each product; in a graph that is captured
too, and the time of a graph of rewriting alone is subtracted. A build begins with CSR on the host.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from tenfold_core.device import load_average
from tenfold_core.errors import InputError
from tenfold_core.run.rows import plain
from tenfold_core.run.seeds import generator
from tenfold_core.run.timing import measure_many
from tenfold_core.sparse import CSR, componentwise_bound, error_over_bound, reference_product
from tenfold_core.sparse.gpu import Runtime, cuda_runtime

from hbp_spmv.building import canonical, kernels_work
from hbp_spmv.config import BuildConfig
from hbp_spmv.cuda import CudaMatrix, build
from hbp_spmv.cuda_selection import STRIP_BYTES, DeviceCalibration, calibrate_device
from hbp_spmv.errors import VerificationError
from hbp_spmv.evaluate import (
    COLUMNS,
    Candidate,
    Protocol,
    Row,
    Subject,
    comparisons,
    error_text,
    figures,
    pick_formats,
    timed_build,
)
from hbp_spmv.gpu_baselines import GPU_BASELINES
from hbp_spmv.gpu_timing import flusher, graph_seconds, synchronizer
from hbp_spmv.grouped import to_host
from hbp_spmv.summary import LEFT_OUT

__all__ = [
    "GPU_FORMATS",
    "LIBRARIES",
    "CudaPlace",
    "DeviceSubject",
    "Judge",
    "device_facts",
    "resolve_formats",
]

GPU_FORMATS = ("auto", "hbp-compact", "hbp-compact-strips", "hbp-csr")
"""Our formats on a GPU; `hbp-paper` is among the baselines."""
LIBRARIES = (
    "cusparse-csr-alg1", "cusparse-csr-alg2", "cusparse-sell", "cupyx", "csr-torch",
    "csr-torch-int64",
)  # fmt: skip
"""What a user would otherwise call."""
UNCAPTURED = ("cupyx", "csr-torch", "csr-torch-int64")
"""Libraries whose products allocate, or go to streams of their own."""
PUBLISHED = ("2d", "sort2D", "hbp-paper")
MOST_SLOTS = 1 << 28
"""Dense (row, strip) slots from which the published formats are left out: 8 GiB in all."""
LONGEST_CAPTURED_S = 0.005
"""A product above that is not captured: a launch is below 0.2 % of it."""
EXACT_NNZ = 4_000_000
"""Nonzeros up to which the product to compare with is rounded exactly."""

Call = Callable[[], Any]


class CudaPlace:
    """A GPU, as a place to measure on.

    Args:
        device: cuda or cuda:N.
        runtime: What computes; by default that of the device.

    Raises:
        ConfigError: There is no such device.
        MissingExtraError: CuPy is not installed.
    """

    def __init__(self, device: str, runtime: Runtime | None = None) -> None:
        self.runtime: Runtime = runtime or cuda_runtime(device)
        self._facts = device_facts(self.runtime)
        self.name: str = self._facts["name"]

    def facts(self) -> dict[str, Any]:
        """Return what the record says of the GPU."""
        return {"gpu": self._facts}

    def formats(self, names: Sequence[str]) -> tuple[tuple[str, ...], list[str]]:
        """Return the formats to measure and why others are left out."""
        return resolve_formats(names, self.runtime)

    def calibration(self, say: Callable[[str], None]) -> DeviceCalibration:
        """Return the calibration of the GPU, measured once in a process."""
        with self.runtime.active():
            return calibrate_device(self.runtime)

    def subject(self, name: str, a: Any, protocol: Protocol) -> "DeviceSubject":
        """Return a matrix to be measured."""
        return DeviceSubject(name, a, protocol, self.runtime)


def device_facts(runtime: Runtime) -> dict[str, Any]:
    """Describe a GPU and its libraries by name."""
    facts: dict[str, Any] = {
        "name": "emulated",
        "processors": runtime.processors,
        "l2_bytes": runtime.l2_bytes,
        "shared_bytes": runtime.shared_bytes,
    }
    cuda = getattr(runtime.xp, "cuda", None)
    if cuda is None:
        return facts
    found = cuda.runtime.getDeviceProperties(getattr(runtime, "index", 0))
    name = found["name"]
    return facts | {
        "name": name.decode() if isinstance(name, bytes) else str(name),
        "memory_bytes": int(found["totalGlobalMem"]),
        "driver": int(cuda.runtime.driverGetVersion()),
        "cuda": int(cuda.runtime.runtimeGetVersion()),
        "cupy": str(runtime.xp.__version__),
    }


def resolve_formats(names: Sequence[str], runtime: Runtime) -> tuple[tuple[str, ...], list[str]]:
    """Return the formats to measure on a GPU and why others are left out; see `evaluate`."""
    known = (*GPU_FORMATS, *GPU_BASELINES)
    chosen, left_out = pick_formats(names, known, known, partial(_reason, runtime))
    return tuple(chosen), left_out


def _reason(runtime: Runtime, name: str) -> str | None:
    if name in GPU_FORMATS:
        return None
    if hasattr(runtime.xp, "cuda"):
        return GPU_BASELINES[name].probe()
    if name in LIBRARIES:
        return "the arrays are not on a GPU"
    return "numba does not work here" if name in PUBLISHED and not kernels_work() else None


class DeviceSubject(Subject):
    """A matrix to be measured on a GPU; it keeps the formats of one type, built and checked."""

    def __init__(self, name: str, a: Any, protocol: Protocol, runtime: Runtime) -> None:
        """Take a matrix in its own type."""
        super().__init__(name, a, protocol)
        self.runtime = runtime
        self._built: _DeviceTask | None = None

    def measure(
        self,
        formats: Sequence[str],
        dtype: str,
        threads: int,
        calibration: Any,
        *,
        cold: bool | None = None,
    ) -> list[dict[str, Any]]:
        """Build, check and time every format; see `Subject.measure`."""
        protocol = self.protocol if cold is None else replace(self.protocol, cold=cold)
        with self.runtime.active():
            if self._built is None or (self._built.dtype, self._built.formats) != (dtype, formats):
                self._built = None
                _free(self.runtime)
                self._built = _DeviceTask(self.a, dtype, formats, self.runtime, protocol)
            task = self._built
            graphs = task.time(protocol)
        load = load_average()
        facts: dict[str, Any] = {
            **self.facts(), "dtype": task.a.dtype.name, "threads": 0, "cold": protocol.cold,
            "load": round(load[0], 2) if load else None,
            "device": device_facts(self.runtime)["name"],
        }  # fmt: skip
        rows = []
        for name in formats:
            if name in task.errors:
                row = Row(**facts, format=name, error=task.errors[name])
            else:
                found = task.row(name, calibration, graphs, cold=protocol.cold)
                row = Row(**facts, format=name, **found)
            rows.append({column: plain(getattr(row, column)) for column in COLUMNS})
        return rows


class _DeviceTask:
    """One matrix in one type, in several formats on a device."""

    def __init__(
        self, a: csr_array, dtype: str, formats: Sequence[str], runtime: Runtime, protocol: Protocol
    ) -> None:
        self.dtype, self.formats, self.runtime, self.protocol = dtype, formats, runtime, protocol
        kept = {"float32": "complex64", "float64": "complex128"}[dtype]
        self.a: csr_array = canonical(a, kept if a.dtype.kind == "c" else dtype)
        x = generator(protocol.seed, "x").standard_normal(self.a.shape[1]).astype(self.a.dtype)
        self.judge = Judge(self.a, x)
        self.x = runtime.xp.asarray(x)
        self.candidates: dict[str, Candidate] = {}
        self.launches: dict[str, Call] = {}
        self.errors: dict[str, str] = {}
        for name in formats:
            try:
                self._add(name)
            except _LeftOutError as error:
                self.errors[name] = f"{LEFT_OUT}{error}"
            except Exception as error:  # whatever a library raises must not end the run
                self.errors[name] = error_text(error)
                self.launches.pop(name, None)
                _free(runtime)

    def _add(self, name: str) -> None:
        wait = synchronizer(self.runtime)
        operator, build_s = timed_build(self._builder(name), wait)
        xp = self.runtime.xp
        y = xp.full(self.a.shape[0], np.nan, self.a.dtype)  # a row that nobody writes must show
        if isinstance(operator, CudaMatrix):
            call, layout = partial(operator.__matmul__, self.x), _described(operator)
            launch = operator.bind(self.x, y)
        else:
            launch = partial(operator.launch, self.x, y)
            call = partial(operator.matvec, self.x) if operator.matvec else launch
            layout = operator.notes
        results = [y] if call is launch else [y, to_array(call())]
        launch()
        worst = max(self.judge(to_host(result)) for result in results)
        self.launches[name] = launch
        self.candidates[name] = Candidate(
            nbytes=operator.nbytes, call=call, layout=layout,
            build_s=build_s, error_over_bound=worst, samples=[],
        )  # fmt: skip

    def _builder(self, name: str) -> Callable[[], Any]:
        a, runtime = self.a, self.runtime
        rows, columns = a.shape
        if name in GPU_BASELINES:
            slots = rows * -(-columns // BuildConfig().width)
            if name in PUBLISHED and slots > MOST_SLOTS:
                raise _LeftOutError(f"{slots} dense slots, more than {MOST_SLOTS}")
            return partial(GPU_BASELINES[name].build, a, runtime)
        settings: dict[str, Any] = {"layout": "auto" if name == "auto" else name.split("-")[1]}
        if name == "hbp-compact-strips":
            width = min(STRIP_BYTES, runtime.shared_bytes) // a.dtype.itemsize
            if width >= columns:
                raise _LeftOutError(f"x of {columns} elements is one strip of {width}")
            settings["strips"] = width
        products = self.protocol.n_products
        config = BuildConfig(**settings)
        return partial(build, a, config, "cuda", n_products=products, runtime=runtime)

    def time(self, protocol: Protocol) -> dict[str, float]:
        """Fill in the samples of all candidates and return seconds in a graph, by name."""
        flush = flusher(self.runtime) if protocol.cold else None
        calls = {name: candidate.call for name, candidate in self.candidates.items()}
        timings = measure_many(
            calls,
            min_time_s=protocol.min_time_s,
            repeats=protocol.repeats,
            flush=flush,
            sync=synchronizer(self.runtime),
            max_time_s=max(20 * protocol.min_time_s, 1.0) * max(len(calls), 1),
        )
        for name, timing in timings.items():
            self.candidates[name].samples = list(timing.samples)
        short = {
            name: self.launches[name]
            for name, timing in timings.items()
            if name not in UNCAPTURED and timing.median <= LONGEST_CAPTURED_S
        }
        seconds, faults = graph_seconds(
            short, self.runtime, min_time_s=protocol.min_time_s, repeats=protocol.repeats,
            flush=flush,
        )  # fmt: skip
        for name, fault in faults.items():
            self.candidates[name].layout = f"{self.candidates[name].layout}; in no graph: {fault}"
            del self.launches[name]
        return seconds

    def row(
        self, name: str, calibration: DeviceCalibration, graphs: Mapping[str, float], *, cold: bool
    ) -> dict[str, Any]:
        """Return the measured columns of a format."""
        found = self.candidates[name]
        moved = found.nbytes + self.a.dtype.itemsize * sum(self.a.shape)
        memory = calibration.bandwidth[-1][1]
        medians = {other: float(np.median(c.samples)) for other, c in self.candidates.items()}
        ours = (*GPU_FORMATS, "hbp-paper")
        return {
            **figures(self.a, found, memory if cold else calibration.bandwidth_at(moved)),
            **comparisons(name, medians, found.build_s, base=None, vendors=LIBRARIES, ours=ours),
            "graph_us": float(f"{1e6 * graphs[name]:.5g}") if name in graphs else None,
        }


class _LeftOutError(InputError):
    """A format is not meant for the matrix."""


def to_array(result: Any) -> Any:
    """Return what a library answers as an array of NumPy if it is a tensor, else as it is."""
    return result.cpu().numpy() if hasattr(result, "cpu") else result


def _described(matrix: CudaMatrix) -> str:
    return f"{matrix.layout}: {matrix._stored.detail}"


class Judge:
    """Holds products of one matrix and one x against the componentwise bound.

    Up to `EXACT_NNZ` nonzeros the product to compare with is rounded once; above, it is summed in
    float64 for float32 and in extended precision for float64: 1/2000 of the bound, and a rounding.
    """

    def __init__(self, a: csr_array, x: NDArray) -> None:
        self._matrix, self._x = CSR.from_scipy(a), x
        self._exact = (
            reference_product(self._matrix, x)
            if a.nnz <= EXACT_NNZ or a.dtype.kind == "c"
            else _summed(self._matrix, x)
        )
        self._bound = componentwise_bound(self._matrix, x)

    def __call__(self, y: NDArray) -> float:
        """Return the largest error as a multiple of its bound.

        Raises:
            VerificationError: It is above 1.
        """
        worst, row = error_over_bound(
            y, self._matrix, self._x, exact=self._exact, bound=self._bound
        )
        if not worst <= 1:
            raise VerificationError(f"row {row}: the error is {worst:.3g} times its bound")
        return worst


def _summed(matrix: CSR, x: NDArray, *, chunk: int = 1 << 22) -> NDArray[np.float64]:
    """Return A x in a longer type than that of A, rounded to float64."""
    wide = np.float64 if matrix.dtype == np.float32 else np.longdouble
    if np.finfo(wide).eps > np.finfo(matrix.dtype).eps / 1000:  # a host without extended precision
        return reference_product(matrix, x)
    result = np.zeros(matrix.shape[0])
    rows = np.flatnonzero(matrix.row_lengths())
    edges = np.searchsorted(matrix.indptr[rows], np.arange(0, matrix.nnz, chunk))
    for first, last in zip(edges, [*edges[1:], len(rows)], strict=True):
        if first == last:
            continue
        starts = matrix.indptr[rows[first:last]]
        part = slice(int(starts[0]), int(matrix.indptr[rows[last - 1] + 1]))
        products = matrix.data[part].astype(wide) * x[matrix.indices[part]]
        with np.errstate(over="ignore", invalid="ignore"):
            result[rows[first:last]] = np.add.reduceat(products, starts - starts[0])
    return result


def _free(runtime: Runtime) -> None:
    """Give memory that no array uses any more back to the device."""
    if hasattr(runtime.xp, "get_default_memory_pool"):
        runtime.xp.get_default_memory_pool().free_all_blocks()
