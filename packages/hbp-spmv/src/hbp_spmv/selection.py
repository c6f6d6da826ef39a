# SPDX-License-Identifier: Apache-2.0
"""`auto`: predict every candidate from the machine's measured costs, time the close ones, say why.

Candidates are the row-gather CSR product and the compact layout. The prediction charges bytes at
the measured bandwidth and, where that is larger, the kernels' own costs: nonzeros, rows, and for
CSR every change of row length, which the branch predictor cannot foresee. CSR is chosen on ties and
when too few products are planned to pay for a reordering.
"""

import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.sparse import csr_array
from tenfold_core.device import cpu_info, resolve

from hbp_spmv.calibration import PREDICTED_ROWS, Calibration, load_calibration
from hbp_spmv.config import WINDOW_SPAN, BuildConfig, as_int

__all__ = [
    "Features",
    "Plan",
    "choose",
    "describe",
    "features",
    "plain_features",
    "predict",
    "select",
]

BUILD_PRODUCTS = 30
"""A compact build costs about this many of its products on one thread (16 to 32 measured). The
build itself is not timed for the decision: a process's first one also loads its kernels."""
CLOSE = 1.6
"""Candidates predicted within this factor of the best are timed."""
FAR = 512
"""Columns between neighbours in a row from which x is read from another place."""
TIMED_PRODUCTS = 200
"""Planned products from which timing pays."""
TIMING_BUDGET_S = 0.05
TIMING_ROUNDS = 12
TIE = 0.97
"""A reordered layout must beat CSR by this factor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """What the prediction looks at; one pass over the row pointers, a sample of the columns."""

    rows: int
    columns: int
    nnz: int
    mean: float
    cv: float
    """Standard deviation of the row length over its mean."""
    switches: float
    """Share of rows whose length differs from the row before."""
    slots: float
    """Lanes stepped through by the compact layout, estimated on sample windows."""
    scatter: float
    """Share of nonzeros whose column is far from its row's neighbour."""
    wide: bool
    """Column offsets need 32 bits."""
    uniform: bool
    """All values are equal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The choice for one matrix."""

    format: str
    """csr or compact."""
    params: dict[str, Any]
    predicted_us: dict[str, float]
    timed_us: dict[str, float]
    """Measured candidates; empty if none was timed."""
    build_ms: dict[str, float]
    reasons: tuple[str, ...]


def plain_features(a: csr_array) -> Features:
    """Describe a canonical CSR matrix by array operations alone: a GPU host may lack numba.

    `slots` is the number of nonzeros, as if groups were perfect.
    """
    rows, columns = a.shape
    lengths = np.diff(a.indptr)
    mean = a.nnz / max(rows, 1)
    steps = np.diff(a.indices[: 1 << 18])
    far = np.abs(steps, out=steps) > FAR if steps.size else np.zeros(1)
    return Features(
        rows=rows,
        columns=columns,
        nnz=a.nnz,
        mean=mean,
        cv=float(lengths.std() / mean) if a.nnz else 0.0,
        switches=float((lengths[1:] != lengths[:-1]).mean()) if rows > 1 else 0.0,
        slots=float(a.nnz),
        scatter=float(far.mean()),
        wide=columns > WINDOW_SPAN,
        uniform=a.nnz > 1 and bool((a.data == a.data[0]).all()),
    )


def features(a: csr_array, lanes: int = 16) -> Features:
    """Describe a canonical CSR matrix, its groups after reordering included."""
    from hbp_spmv.hashing import heavy_limit, length_classes, place_classes, quality

    sample = _sample_rows(np.diff(a.indptr))
    slots = 1.0
    light = np.where(sample > heavy_limit(a.shape[0], a.nnz), 0, sample).astype(np.int64)
    if light.any():
        order = np.empty(len(light), np.int64)
        place_classes(light, length_classes(light), True, order, np.empty(40, np.int64))
        maxima, _, _ = quality(light, order, lanes)
        slots = (maxima * lanes + int((sample - light).sum())) / max(int(sample.sum()), 1)
    return replace(plain_features(a), slots=slots * a.nnz)


def _sample_rows(lengths: np.ndarray, window: int = 2048, count: int = 16) -> np.ndarray:
    """Return up to `count` evenly spaced windows of rows."""
    if len(lengths) <= window * count:
        return lengths
    tops = np.linspace(0, len(lengths) - window, count).astype(np.int64)
    return np.concatenate([lengths[top : top + window] for top in tops])


def predict(
    f: Features, calibration: Calibration, *, threads: int = 1, size: int = 8
) -> dict[str, float]:
    """Return the predicted time of a product in microseconds for each candidate.

    Args:
        f: the matrix.
        calibration: the machine.
        threads: threads of the product.
        size: bytes of a value.
    """
    index = 4 if f.wide else 2
    entry = index + (0 if f.uniform else size)
    vectors = size * (f.rows + f.columns)
    x_far = size * f.columns > cpu_info().l2_bytes
    miss = calibration.miss_ns * f.nnz * f.scatter if x_far else 0.0
    switches = f.rows * f.switches
    learned = switches <= PREDICTED_ROWS
    switch_ns = calibration.csr_switch_ns if learned else calibration.csr_mispredict_ns
    csr_ns = (
        calibration.csr_nonzero_ns * f.nnz
        + calibration.csr_row_ns * f.rows
        + switch_ns * switches
        + miss
    )
    compact_ns = calibration.compact_slot_ns * f.slots + calibration.compact_row_ns * f.rows + miss
    traffic = {"csr": entry * f.nnz + 8 * f.rows, "compact": entry * f.nnz + 9 * f.rows}
    work = {"csr": csr_ns, "compact": compact_ns}
    result = {}
    for name, stored in traffic.items():
        moved = stored + vectors
        rate = calibration.bandwidth_at(moved // threads)
        ns = max(work[name], moved / rate) / threads
        result[name] = (
            ns / 1e3 + calibration.call_us + (calibration.join_us if threads > 1 else 0.0)
        )
    return result


def choose(
    a: csr_array, config: BuildConfig, *, threads: int, n_products: int, tune: bool
) -> tuple[Any, BuildConfig, "Plan"]:
    """Choose and build: the stored layout, its settings and the plan that explains them.

    Raises:
        ConfigError: `n_products` is not a positive integer.
    """
    n_products = as_int("n_products", n_products)
    f = features(a, config.lanes or 16)
    size = a.dtype.itemsize
    predicted = predict(f, load_calibration(), threads=threads, size=size)
    build_us = BUILD_PRODUCTS * predict(f, load_calibration(), size=size)["compact"]
    builds = _Builds(a, config)
    timed: dict[str, float] = {}
    best = min(predicted, key=predicted.__getitem__)
    close = [name for name in predicted if predicted[name] <= CLOSE * predicted[best]]
    if config.index == "u16" and f.wide:
        format_ = "compact"
        reason = "index='u16': only the compact layout stores columns as offsets"
    elif n_products <= TIMED_PRODUCTS and not tune:
        pays = (predicted["csr"] - predicted["compact"]) * n_products > build_us
        format_ = "compact" if best == "compact" and pays else "csr"
        verdict = "pays" if format_ == "compact" else "does not pay for its build"
        reason = f"{n_products} products: the reordering {verdict}"
    elif len(close) == 1 or a.nnz == 0:
        format_ = best
        reason = f"predicted {predicted[best]:.1f} us, the other over {CLOSE} times that"
    else:
        timed = _time({name: builds.product(name, threads) for name in predicted}, a)
        format_, reason = _decide(timed, n_products, build_us)
    stored = builds.layout(format_)
    plan = Plan(
        format=format_,
        params={"hash": config.hash, "lanes": config.lanes or 16} if format_ == "compact" else {},
        predicted_us=predicted,
        timed_us=timed,
        build_ms=builds.ms,
        reasons=(describe(f), reason),
    )
    return stored, replace(config, layout=format_), plan


class _Builds:
    """The candidates that were built, each once, and how long that took."""

    def __init__(self, a: csr_array, config: BuildConfig) -> None:
        self._a, self._config = a, config
        self._stored: dict[str, Any] = {}
        self.ms: dict[str, float] = {}

    def layout(self, name: str) -> Any:
        from hbp_spmv.building import build_layout

        if name not in self._stored:
            started = time.perf_counter()
            self._stored[name] = build_layout(self._a, replace(self._config, layout=name))
            self.ms[name] = 1e3 * (time.perf_counter() - started)
        return self._stored[name]

    def product(self, name: str, threads: int) -> Any:
        from hbp_spmv.product import bind_matrix

        share = self._config.fixed_share
        return bind_matrix(self.layout(name), "vector", threads, self._a.dtype, share)


def _decide(timed: dict[str, float], n_products: int, build_us: float) -> tuple[str, str]:
    """Return the format that the measured times speak for, and the reason in words."""
    compact, csr = timed["compact"], timed["csr"]
    wins = compact < TIE * csr
    pays = (csr - compact) * n_products > build_us
    reason = f"timed: compact {compact:.1f} us, csr {csr:.1f} us"
    if wins and not pays:
        reason += f"; {n_products} products do not pay for the build"
    return "compact" if wins and pays else "csr", reason


def select(
    a: Any,
    *,
    device: str = "cpu",
    threads: int | None = None,
    n_products: int = 1000,
    tune: bool = False,
    config: BuildConfig | None = None,
) -> Plan:
    """Say which layout `auto` would choose for a matrix, and why.

    Args:
        a: any sparse matrix.
        device: cpu, cuda, cuda:N, or auto for a CUDA device if there is one.
        threads: threads of the product; by default as in `from_csr`.
        n_products: products the matrix would be built for.
        tune: time the candidates whatever `n_products` says.
        config: settings of the candidates.
    """
    from hbp_spmv.building import canonical, kernels_work, workers_for

    place = resolve(device)
    matrix = canonical(a)
    if place.kind == "cuda":
        from hbp_spmv.cuda_selection import select_on

        return select_on(
            matrix, config or BuildConfig(), str(place), n_products=n_products, tune=tune
        )
    if matrix.dtype.kind == "c" or not kernels_work():
        compiled = kernels_work()
        reason = "complex values: by rows" if compiled else "numba does not work here: SciPy"
        return Plan(
            format="csr" if compiled else "scipy", params={}, predicted_us={}, timed_us={},
            build_ms={}, reasons=(reason,),
        )  # fmt: skip
    workers = workers_for(threads, matrix.nnz)
    chosen = config or BuildConfig()
    return choose(matrix, chosen, threads=workers, n_products=n_products, tune=tune)[2]


def _time(products: dict[str, Any], a: csr_array) -> dict[str, float]:
    """Return the best time of each product in microseconds, in turn, within the budget."""
    x = np.ones(a.shape[1], a.dtype)
    y = np.empty(a.shape[0], a.dtype)
    best = dict.fromkeys(products, float("inf"))
    for product in products.values():
        product(x, y)
    deadline = time.perf_counter() + TIMING_BUDGET_S
    rounds = 0
    while rounds < 3 or (time.perf_counter() < deadline and rounds < TIMING_ROUNDS):
        for name, product in products.items():
            started = time.perf_counter()
            product(x, y)
            best[name] = min(best[name], 1e6 * (time.perf_counter() - started))
        rounds += 1
    return best


def describe(f: Features) -> str:
    """Say in one line what a matrix is like."""
    return (
        f"{f.rows} x {f.columns}, {f.mean:.1f} nonzeros a row, cv {f.cv:.2f}, "
        f"{100 * f.switches:.0f} % of the rows change length, "
        f"{'32' if f.wide else '16'}-bit columns{', all values equal' if f.uniform else ''}"
    )
