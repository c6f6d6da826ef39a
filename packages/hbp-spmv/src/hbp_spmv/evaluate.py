# SPDX-License-Identifier: Apache-2.0
"""Measure one matrix in several formats: build, product, error; one `Row` per format.

Products are timed the way a user asks for them (`y = A @ x`, the result allocated), interleaved so
that drift hits all formats alike, and every result is compared with an exactly rounded one under a
componentwise bound. x is standard normal.
"""

import sys
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
from scipy.sparse import csr_array
from tenfold_core.device import cpu_info, load_average
from tenfold_core.errors import ConfigError, MissingExtraError
from tenfold_core.run.rows import plain
from tenfold_core.run.seeds import generator
from tenfold_core.sparse import CSR, error_over_bound, reference_product

from hbp_spmv.baselines import BASELINES
from hbp_spmv.building import canonical, kernels_work
from hbp_spmv.calibration import Calibration
from hbp_spmv.errors import VerificationError
from hbp_spmv.matrix import HBPMatrix, from_csr
from hbp_spmv.parallel import speed_up
from hbp_spmv.summary import LEAST_SPEED_UP
from hbp_spmv.turns import Turns, time_in_turns

__all__ = [
    "COLUMNS",
    "HBP_FORMATS",
    "VENDORS",
    "Candidate",
    "Protocol",
    "Row",
    "Subject",
    "comparisons",
    "error_text",
    "figures",
    "pick_formats",
    "resolve_formats",
]

HBP_FORMATS: dict[str, dict[str, Any]] = {
    "auto": {"layout": "auto"},
    "hbp-compact": {"layout": "compact"},
    "hbp-csr": {"layout": "csr"},
    "hbp-paper": {"layout": "paper", "hash": "paper"},
}
"""Our formats by name, with the settings of their build."""
DEFAULT_FORMATS = (
    "auto", "csr-scipy", "csr-torch", "csr-merge", "sell", "hbp-compact", "hbp-csr", "hbp-paper",
)  # fmt: skip
VENDORS = ("csr-scipy", "csr-torch", "csr-mkl")
"""Libraries that a user would otherwise call."""
BASE = "csr-scipy"
"""What the break-even counts against; always measured."""
OPENMP = ("csr-torch", "csr-torch-int64", "csr-mkl")
"""Formats whose helper threads are OpenMP's, timed apart from ours; see `hbp_spmv.turns`."""

_RETRIES = 6  # turns of a case repeated because other processes were running
_BUILDS, _BUILD_BUDGET_S = 3, 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One matrix, type, thread count and format; the columns of every result file."""

    matrix: str
    rows: int
    columns: int
    nnz: int
    row_mean: float
    """Nonzeros a row."""
    row_cv: float
    """Standard deviation of the nonzeros a row over their mean."""
    dtype: str
    threads: int
    """Threads that were offered; a format may use fewer. 0 on a GPU."""
    cold: bool
    """Caches were overwritten before each product."""
    format: str
    layout: str | None = None
    """What `auto` chose, the layout of our other formats; on a GPU with details, and what must be
    said of a library: its version, algorithm and indices."""
    bytes: int | None = None
    """Stored arrays, each once."""
    build_ms: float | None = None
    """From CSR in memory, compilation excluded."""
    us: float | None = None
    """Median time of a product in microseconds."""
    us_p10: float | None = None
    us_p90: float | None = None
    us_min: float | None = None
    graph_us: float | None = None
    """On a GPU: median of a product in a CUDA graph of many, which no call by the host delays."""
    samples: int | None = None
    gflops: float | None = None
    """2 nnz / time."""
    gbs: float | None = None
    """Modelled bytes (stored arrays, x and y, each once) / time."""
    copy_gbs: float | None = None
    """Copy bandwidth of this machine at that working set: threads x one thread at its share."""
    copy_percent: float | None = None
    error_over_bound: float | None = None
    """Largest componentwise error over its bound; at most 1."""
    over_scipy: float | None = None
    """Times as fast as csr-scipy."""
    over_vendor: float | None = None
    """Times as fast as the fastest library."""
    vendor: str | None = None
    """Name of the fastest library."""
    breakeven: int | None = None
    """Products after which the build is repaid against csr-scipy, on a GPU against the fastest
    library; empty: never."""
    regret_percent: float | None = None
    """How much slower `auto` is than the fastest of our formats."""
    load: float | None = None
    """Load average of the last minute."""
    foreign_cores: float | None = None
    """Cores that other processes used while this case was timed, where the system tells."""
    speed_up: float | None = None
    """Least speed-up by the threads of a probe around the turns; empty with one thread."""
    device: str = "cpu"
    """cpu, or the name of the GPU."""
    error: str | None = None
    """Why there is no figure."""


COLUMNS = tuple(field.name for field in fields(Row))


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """How long and under what conditions products are timed."""

    min_time_s: float = 0.2
    repeats: int = 20
    cold: bool = False
    seed: int = 0
    n_products: int = 1000
    """Products that `auto` is told to expect."""

    def __post_init__(self) -> None:
        if self.repeats < 3:
            raise ConfigError(f"repeats is {self.repeats}, expected at least 3 for a spread")
        if not 0 <= self.min_time_s <= 600:
            raise ConfigError(f"min-time is {self.min_time_s}, expected 0 to 600 seconds")
        if self.n_products < 1:
            raise ConfigError(f"n-products is {self.n_products}, expected at least 1")
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}, expected a number that is not negative")


@dataclass(slots=True)
class Candidate:
    """One format of the matrix, ready to be multiplied."""

    nbytes: int
    call: Callable[[], Any]
    """The product as a user of the format asks for it."""
    layout: str | None
    build_s: float
    error_over_bound: float
    samples: list[float]


def resolve_formats(names: Sequence[str]) -> tuple[tuple[str, ...], list[str]]:
    """Return the formats to measure and why others of `all` are left out.

    Args:
        names: format names in any case, `all`, or nothing for the default selection.

    Raises:
        ConfigError: a name is unknown.
        MissingExtraError: a format that was named needs a library that is not installed.
    """

    def reason(name: str) -> str | None:
        return BASELINES[name].probe() if name in BASELINES else _fault(name)

    chosen, left_out = pick_formats(names, (*HBP_FORMATS, *BASELINES), DEFAULT_FORMATS, reason)
    return tuple(chosen if BASE in chosen else [*chosen, BASE]), left_out


def pick_formats(
    names: Sequence[str],
    known: Sequence[str],
    default: Sequence[str],
    reason: Callable[[str], str | None],
) -> tuple[list[str], list[str]]:
    """Return the formats that names stand for, each once, and why others are left out.

    Args:
        names: format names in any case, `all`, or nothing for the default selection.
        known: every format.
        default: the default selection.
        reason: says why a format cannot run here, or None.

    Raises:
        ConfigError: a name is unknown.
        MissingExtraError: a format that was named cannot run.
    """
    spelled = {name.casefold(): name for name in known}
    left_out: list[str] = []
    chosen: list[str] = []
    for name in names or default:
        if name.casefold() == "all":
            wanted, named = known, False
        elif name.casefold() in spelled:
            wanted, named = (spelled[name.casefold()],), bool(names)
        else:
            raise ConfigError(f"formats: {name!r} is not known, expected all, {', '.join(known)}")
        for format_ in wanted:
            fault = reason(format_)
            if fault and named:
                raise MissingExtraError(f"format {format_!r}: {fault}")
            if fault:
                left_out.append(f"{format_}: {fault}")
            elif format_ not in chosen:
                chosen.append(format_)
    return chosen, left_out


def _fault(name: str) -> str | None:
    """Return why one of our formats cannot run; `auto` takes SciPy where nothing can compile."""
    return None if name == "auto" or kernels_work() else "numba does not work here"


class Subject:
    """A matrix to be measured; for each type it keeps x and the exact product."""

    def __init__(self, name: str, a: Any, protocol: Protocol) -> None:
        """Take a matrix in its own type."""
        self.name, self.protocol, self.a = name, protocol, canonical(a)
        self._task: _Task | None = None

    def facts(self) -> dict[str, Any]:
        """Return the columns that describe the matrix."""
        rows, columns = self.a.shape
        lengths = np.diff(self.a.indptr)
        mean = float(lengths.mean()) if rows else 0.0
        spread = float(lengths.std()) / mean if mean else 0.0
        return {
            "matrix": self.name, "rows": rows, "columns": columns, "nnz": self.a.nnz,
            "row_mean": round(mean, 4), "row_cv": round(spread, 4),
        }  # fmt: skip

    def measure(
        self,
        formats: Sequence[str],
        dtype: str,
        threads: int,
        calibration: Any,
        *,
        cold: bool | None = None,
    ) -> list[dict[str, Any]]:
        """Build, check and time every format; one that fails gets a row with its error.

        Args:
            formats: format names, as `resolve_formats` returns them.
            dtype: float32 or float64; a complex matrix stays complex at that precision.
            threads: threads that each format may use.
            calibration: where the copy bandwidth comes from.
            cold: overwrite the caches before each product; by default what the protocol says.
        """
        protocol = self.protocol if cold is None else replace(self.protocol, cold=cold)
        if self._task is None or self._task.dtype != dtype:
            self._task = _Task(self.a, dtype, protocol)
        self._task.protocol = protocol
        candidates, errors, turns = self._task.run(formats, threads)
        foreign = turns.foreign_cores
        load = load_average()
        facts: dict[str, Any] = {
            **self.facts(), "dtype": self._task.a.dtype.name, "threads": threads,
            "cold": protocol.cold, "load": round(load[0], 2) if load else None,
            "foreign_cores": None if foreign is None else round(foreign, 3),
            "speed_up": None if turns.speed_up is None else round(turns.speed_up, 2),
        }  # fmt: skip
        rows = []
        for name in formats:
            if name in errors:
                row = Row(**facts, format=name, error=errors[name])
            else:
                found = _measured(self._task, name, threads, candidates, calibration)
                row = Row(**facts, format=name, **found)
            rows.append({column: plain(getattr(row, column)) for column in COLUMNS})
        return rows


def timed_build(
    build: Callable[[], Any], wait: Callable[[], Any] = lambda: None
) -> tuple[Any, float]:
    """Return what is built and the median seconds of a build; the first, which compiles, is none.

    Args:
        build: builds once.
        wait: returns when a device has finished.
    """
    seconds: list[float] = []
    built: Any = None
    while len(seconds) < 2 or (len(seconds) <= _BUILDS and sum(seconds[1:]) < _BUILD_BUDGET_S):
        built = None  # two of them at once may not fit
        started = time.perf_counter()
        built = build()
        wait()
        seconds.append(time.perf_counter() - started)
    return built, float(np.median(seconds[1:]))


class _Task:
    """One matrix in one type."""

    def __init__(self, a: csr_array, dtype: str, protocol: Protocol) -> None:
        kept = {"float32": "complex64", "float64": "complex128"}[dtype]
        self.dtype, self.protocol = dtype, protocol
        self.a: csr_array = canonical(a, kept if a.dtype.kind == "c" else dtype)
        x = generator(protocol.seed, "x").standard_normal(self.a.shape[1])
        self.x = x.astype(self.a.dtype)
        self.reference = CSR.from_scipy(self.a)
        self.exact = reference_product(self.reference, self.x)

    def run(
        self, formats: Sequence[str], threads: int
    ) -> tuple[dict[str, Candidate], dict[str, str], Turns]:
        """Return what was measured, why formats failed, and under what conditions."""
        candidates: dict[str, Candidate] = {}
        errors: dict[str, str] = {}
        if any(name.startswith("csr-torch") for name in formats):
            import_module("hbp_spmv.torch")
        with _torch_threads(threads):
            for name in formats:
                try:
                    candidates[name] = self._candidate(name, threads)
                except Exception as error:  # whatever a library raises must not end the run
                    errors[name] = error_text(error)
            turns = self._time(candidates, threads)
        return candidates, errors, turns

    def _candidate(self, name: str, threads: int) -> Candidate:
        operator, build_s = timed_build(self._builder(name, threads))
        call = self._call(operator)
        y = np.asarray(call())
        worst, row = error_over_bound(y, self.reference, self.x, exact=self.exact)
        if not worst <= 1:
            raise VerificationError(f"row {row}: the error is {worst:.3g} times its bound")
        return Candidate(
            nbytes=operator.nbytes,
            call=call,
            layout=operator.layout if name in HBP_FORMATS else None,
            build_s=build_s,
            error_over_bound=worst,
            samples=[],
        )

    def _call(self, operator: Any) -> Callable[[], Any]:
        """Return the product as a user of that format asks for it."""
        if isinstance(operator, HBPMatrix):
            return partial(operator.__matmul__, self.x)
        if operator.bind is not None:
            return operator.bind(self.x)
        return partial(operator.matvec, self.x)

    def _builder(self, name: str, threads: int) -> Callable[[], Any]:
        if name in HBP_FORMATS:
            products = self.protocol.n_products
            settings = HBP_FORMATS[name]
            return partial(from_csr, self.a, threads=threads, n_products=products, **settings)
        return partial(BASELINES[name].build, self.a, threads)

    def _time(self, candidates: Mapping[str, Candidate], threads: int) -> Turns:
        """Fill in the samples of all candidates."""
        calls = {name: candidate.call for name, candidate in candidates.items()}
        apart = {name: calls.pop(name) for name in OPENMP if name in calls and threads > 1}
        real = 1 < threads <= cpu_info().usable_cores and kernels_work()
        turns = time_in_turns(
            [apart, calls],
            min_time_s=self.protocol.min_time_s,
            repeats=self.protocol.repeats,
            flush=2 * (cpu_info().l3_bytes or 32 << 20) if self.protocol.cold else None,
            retries=_RETRIES if threads > 1 else 0,
            speed_up=partial(speed_up, threads) if real else None,
            least=LEAST_SPEED_UP,
        )
        for name, found in turns.samples.items():
            candidates[name].samples += found
        return turns


def _measured(
    task: _Task,
    name: str,
    threads: int,
    candidates: Mapping[str, Candidate],
    calibration: Calibration,
) -> dict[str, Any]:
    """Return the measured columns of a format."""
    a, found = task.a, candidates[name]
    medians = {other: float(np.median(c.samples)) for other, c in candidates.items()}
    moved = found.nbytes + a.dtype.itemsize * sum(a.shape)
    memory = calibration.bandwidth[-1][1]
    copy = threads * (memory if task.protocol.cold else calibration.bandwidth_at(moved // threads))
    return {**figures(a, found, copy), **comparisons(name, medians, found.build_s)}


def figures(a: csr_array, found: Candidate, copy: float) -> dict[str, Any]:
    """Return the columns of a format that depend on no other one.

    Args:
        a: the matrix.
        found: the format and its samples.
        copy: bandwidth in GB/s that a copy of that working set reaches.
    """
    seconds = max(float(np.median(found.samples)), 1e-9)
    p10, p90 = np.percentile(found.samples, [10, 90])
    moved = found.nbytes + a.dtype.itemsize * sum(a.shape)
    return {
        "layout": found.layout,
        "bytes": found.nbytes,
        "build_ms": _short(1e3 * found.build_s),
        "us": _short(1e6 * seconds),
        "us_p10": _short(1e6 * p10),
        "us_p90": _short(1e6 * p90),
        "us_min": _short(1e6 * min(found.samples)),
        "samples": len(found.samples),
        "gflops": _short(2e-9 * a.nnz / seconds),
        "gbs": _short(1e-9 * moved / seconds),
        "copy_gbs": _short(copy),
        "copy_percent": _short(1e-7 * moved / seconds / copy),
        "error_over_bound": _short(found.error_over_bound),
    }


def comparisons(
    name: str,
    medians: Mapping[str, float],
    build_s: float,
    *,
    base: str | None = BASE,
    vendors: Sequence[str] = VENDORS,
    ours: Container[str] = HBP_FORMATS,
) -> dict[str, Any]:
    """Compare a format with SciPy, the fastest library and, for `auto`, our other formats.

    Args:
        name: the format.
        medians: seconds of a product, by format.
        build_s: seconds of the format's build.
        base: what the break-even counts against; None for the fastest library.
        vendors: the libraries.
        ours: our formats.
    """
    medians = {other: max(value, 1e-9) for other, value in medians.items()}
    seconds = medians[name]
    result: dict[str, Any] = {}
    best = min((v for v in vendors if v in medians), key=medians.__getitem__, default=None)
    if BASE in medians:
        result["over_scipy"] = _short(medians[BASE] / seconds)
    against = best if base is None else base
    if against in medians:
        gain = medians[against] - seconds
        if name == against:
            result["breakeven"] = 0
        elif gain > 0:
            result["breakeven"] = int(np.ceil(build_s / gain))
    if best is not None:
        result |= {"vendor": best, "over_vendor": _short(medians[best] / seconds)}
    own = [medians[other] for other in medians if other in ours]
    if name == "auto" and len(own) > 1:
        result["regret_percent"] = _short(100 * (seconds / min(own) - 1))
    return result


def error_text(error: Exception) -> str:
    """Write an error as one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _short(value: float) -> float:
    """Round to five significant digits, more than any of these figures has."""
    return float(f"{value:.5g}")


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    """Set torch's process-wide thread count, if it is loaded, once instead of at every product."""
    torch = sys.modules.get("torch")
    before = torch.get_num_threads() if torch else threads
    if torch:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        if torch:
            torch.set_num_threads(before)
