# SPDX-License-Identifier: Apache-2.0
"""The ablation on a GPU: row order x allocation x strips x index width, one row each.

Every combination is built from CSR that lies on the device, checked against the componentwise bound
and timed as a launch, alone and in a CUDA graph. One that does not exist has a row that says why.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import numpy as np
from scipy.sparse import csr_array
from tenfold_core.errors import ConfigError, TenfoldError
from tenfold_core.run.rows import plain
from tenfold_core.run.seeds import generator
from tenfold_core.run.timing import measure_many
from tenfold_core.sparse.gpu import Runtime

from hbp_spmv.building import canonical, kernels_work
from hbp_spmv.config import BuildConfig
from hbp_spmv.device_layouts import CompactOnDevice, OnDevice, Source, store
from hbp_spmv.evaluate import Protocol, error_text
from hbp_spmv.gpu_evaluate import Judge
from hbp_spmv.gpu_timing import graph_seconds, synchronizer
from hbp_spmv.grouped import DeviceCSR, to_host
from hbp_spmv.summary import LEFT_OUT

__all__ = ["HASHES", "INDICES", "SCHEDULES", "STRIPS", "Combination", "ablate", "combinations"]

HASHES = ("none", "paper", "tuned", "lut", "sort")
SCHEDULES = ("fixed", "mixed")
"""Fixed runs only, or fixed runs and then a ticket."""
STRIPS = (0, 65536, 16384, 4096)
"""Columns of a strip; 0: none."""
INDICES = ("u16", "u32")
LONG_BUILD_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Combination:
    """One way to build layout compact."""

    hash: str
    schedule: str
    strips: int
    index: str


def combinations() -> list[Combination]:
    """Return all combinations; without strips there is nothing to allocate, so one schedule."""
    return [
        Combination(hash=order, schedule=schedule, strips=strips, index=index)
        for strips, schedule, index, order in product(STRIPS, SCHEDULES, INDICES, HASHES)
        if strips or schedule == "mixed"
    ]


def ablate(
    name: str,
    a: csr_array,
    runtime: Runtime,
    protocol: Protocol,
    *,
    dtype: str = "float64",
    go_on: Callable[[], bool] = lambda: True,
) -> Iterator[dict[str, Any]]:
    """Measure every combination on one matrix.

    Args:
        name: the matrix, for the rows.
        a: the matrix.
        runtime: where it runs.
        protocol: samples and time of each combination, and the seed of x.
        dtype: float32 or float64.
        go_on: asked before each combination; False ends the ablation.
    """
    a = canonical(a, dtype)
    x = generator(protocol.seed, "x").standard_normal(a.shape[1]).astype(a.dtype)
    judge = Judge(a, x)
    lengths = np.diff(a.indptr)
    mean = float(lengths.mean()) if a.shape[0] else 0.0
    facts = {
        "matrix": name, "rows": a.shape[0], "columns": a.shape[1], "nnz": a.nnz, "dtype": dtype,
        "row_cv": round(float(lengths.std()) / mean, 4) if mean else 0.0,
    }  # fmt: skip
    with runtime.active():
        source = Source(a, DeviceCSR.from_host(a, runtime.xp))
        device_x = runtime.xp.asarray(x)
        for chosen in combinations():
            if not go_on():
                return
            row = _row(chosen, source, device_x, judge, runtime, protocol)
            yield plain(facts | row)


def _row(
    chosen: Combination, source: Source, x: Any, judge: Judge, runtime: Runtime, protocol: Protocol
) -> dict[str, Any]:
    """Return the measured columns of a combination, or why there are none."""
    row: dict[str, Any] = {
        "hash": chosen.hash, "schedule": chosen.schedule, "strips": chosen.strips,
        "index": chosen.index, "detail": None, "lane_efficiency": None, "bytes": None,
        "build_ms": None, "us": None, "graph_us": None, "gflops": None,
        "error_over_bound": None, "error": None,
    }  # fmt: skip
    if reason := _missing(chosen, source.host.shape[1]):
        return row | {"error": f"{LEFT_OUT}{reason}"}
    config = BuildConfig(
        layout="compact", hash=chosen.hash, schedule=chosen.schedule, index=chosen.index,
        strips=chosen.strips or None,
    )  # fmt: skip
    try:
        stored, build_s = _built(source, config, runtime)
        return row | _timed(stored, build_s, x, judge, runtime, protocol)
    except ConfigError as error:  # the combination does not exist for this matrix
        return row | {"error": f"{LEFT_OUT}{error}"}
    except TenfoldError as error:
        return row | {"error": error_text(error)}


def _missing(chosen: Combination, columns: int) -> str | None:
    if chosen.hash in ("paper", "tuned") and not kernels_work():
        return f"hash {chosen.hash!r} is computed on the host by numba, which does not work here"
    if chosen.strips >= columns:
        return f"{columns} columns are one strip of {chosen.strips}, which is none"
    return None


def _built(source: Source, config: BuildConfig, runtime: Runtime) -> tuple[OnDevice, float]:
    """Build once or, where that is short, a second time, which compiles nothing any more."""
    wait = synchronizer(runtime)
    for _ in range(2):
        started = time.perf_counter()
        stored = store(source, config, runtime)
        wait()
        seconds = time.perf_counter() - started
        if seconds > LONG_BUILD_S:
            break
    return stored, seconds


def _timed(
    stored: OnDevice, build_s: float, x: Any, judge: Judge, runtime: Runtime, protocol: Protocol
) -> dict[str, Any]:
    assert isinstance(stored, CompactOnDevice)
    xp, (rows, _) = runtime.xp, stored.shape
    y = xp.full(rows, np.nan, x.dtype)
    launch = stored.bind(x, y)
    launch()
    worst = judge(to_host(y))
    settings = {"min_time_s": protocol.min_time_s, "repeats": protocol.repeats}
    timing = measure_many({"": partial(launch)}, sync=synchronizer(runtime), **settings)[""]
    graphs, faults = graph_seconds({"": launch}, runtime, **settings)
    efficiency, _ = stored.quality()
    us, graph_us = 1e6 * timing.median, 1e6 * graphs.get("", float("nan"))
    detail = f"{stored.detail}; in no graph: {faults['']}" if faults else stored.detail
    return {
        "detail": detail, "lane_efficiency": round(efficiency, 4), "bytes": stored.nbytes,
        "build_ms": 1e3 * build_s, "us": us, "graph_us": graph_us,
        "gflops": 2e-3 * stored.nnz / max(us, 1e-3), "error_over_bound": worst,
    }  # fmt: skip
