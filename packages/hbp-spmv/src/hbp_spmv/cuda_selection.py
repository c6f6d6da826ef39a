# SPDX-License-Identifier: Apache-2.0
"""Choose a layout on a CUDA device: a model of bytes and occupancy, then a stopwatch.

The model knows the device's copy bandwidth, the cost of a launch and of a random read of x
(`calibrate_device`). It predicts every candidate; those within a factor of the best are built and
timed, since a build takes about 30 products there. CSR is taken on ties.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from scipy.sparse import csr_array
from tenfold_core.run.timing import measure
from tenfold_core.sparse.gpu import Runtime, cuda_runtime

from hbp_spmv.config import BuildConfig, as_int
from hbp_spmv.device_layouts import CsrOnDevice, OnDevice, Source, store
from hbp_spmv.grouped import DeviceCSR
from hbp_spmv.selection import Features, Plan, describe, plain_features

__all__ = [
    "DeviceCalibration",
    "calibrate_device",
    "candidates",
    "choose",
    "predict",
    "select_on",
]

CLOSE = 2.0
"""Candidates predicted within this factor of the best are timed."""
TIE = 0.97
"""Share of CSR's time that another layout must reach to be chosen."""
TIMED_PRODUCTS = 200
BUILD_PRODUCTS = 30
"""Products that a build of the grouped layout takes, about."""
STRIP_BYTES = 128 << 10
"""Bytes of x that the strip kernel keeps in shared memory."""
STEPS_IN_FLIGHT = 4
NEAR = 0.5
"""Share of far steps between neighbouring columns below which groups fit 16-bit offsets, about."""
OCCUPANCY = 0.7
"""Bandwidth grows with this power of the share of warps."""
LATENCY_US = 0.8
"""Time of one dependent step of a row: an index, then an element of x."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceCalibration:
    """Measured facts of one device."""

    bandwidth: tuple[tuple[int, float], ...]
    """(working set in bytes, copy bandwidth in GB/s, read and write counted), ascending."""
    launch_us: float
    """Time of a product without work, as the host sees it."""
    sector_gbs: float
    """Bandwidth of random reads of 32-byte sectors beyond the second-level cache."""
    warps: int
    """Warps that keep all multiprocessors busy."""

    def bandwidth_at(self, size: int) -> float:
        """Return the copy bandwidth in GB/s for a working set of `size` bytes."""
        for limit, rate in self.bandwidth:
            if size <= limit:
                return rate
        return self.bandwidth[-1][1]


_CALIBRATED: dict[int, DeviceCalibration] = {}


def calibrate_device(runtime: Runtime) -> DeviceCalibration:
    """Measure a device, once in a process: about 50 ms."""
    index = getattr(runtime, "index", -1)
    if index not in _CALIBRATED:
        _CALIBRATED[index] = _measured(runtime)
    return _CALIBRATED[index]


def _measured(runtime: Runtime) -> DeviceCalibration:
    xp = runtime.xp
    rates = []
    for size in (runtime.l2_bytes // 2, max(1 << 26, 8 * runtime.l2_bytes)):
        source = xp.zeros(size // 16)
        target = xp.empty_like(source)
        seconds = _seconds(partial(xp.copyto, target, source), runtime)
        rates.append((size, 2 * source.nbytes / seconds / 1e9))
    few = xp.zeros(32)
    launch = _seconds(partial(xp.copyto, few, xp.ones(32)), runtime, host=True)
    far = xp.zeros(max(1 << 20, runtime.l2_bytes // 2))
    where = xp.asarray(np.random.default_rng(0).integers(0, far.shape[0], 1 << 18))
    gather = _seconds(partial(xp.take, far, where), runtime)
    return DeviceCalibration(
        bandwidth=tuple(rates),
        launch_us=1e6 * launch,
        sector_gbs=32 * where.shape[0] / gather / 1e9,
        warps=48 * runtime.processors,
    )


def _seconds(call: Callable[[], Any], runtime: Runtime, *, host: bool = False) -> float:
    """Return the median time of a call, by events of the device or by the host's clock."""
    cuda = getattr(runtime.xp, "cuda", None)
    if cuda is None or host:
        sync = None if cuda is None else cuda.runtime.deviceSynchronize
        return measure(call, min_time_s=0.002, repeats=5, sync=sync).median
    return measure(call, min_time_s=0.002, repeats=5, device="cuda").median


def candidates(a: csr_array, config: BuildConfig, runtime: Runtime) -> dict[str, BuildConfig]:
    """Return the settings of every layout worth a thought, by name."""
    found = {"csr": replace(config, layout="csr")}
    if _vendor_reason(runtime) is None and max(a.nnz, *a.shape) < 1 << 31:
        found["cusparse"] = replace(config, layout="csr")
    found["compact"] = replace(config, layout="compact")
    size = a.dtype.itemsize
    if not config.strips and a.shape[1] * size > runtime.l2_bytes // 2:
        width = min(STRIP_BYTES, runtime.shared_bytes) // size
        found["compact-strips"] = replace(config, layout="compact", strips=width)
    return found


def _vendor_reason(runtime: Runtime) -> str | None:
    """Return why cuSPARSE cannot multiply here, or None."""
    if not hasattr(runtime.xp, "cuda"):
        return "the arrays are not CuPy's"
    from hbp_spmv.cusparse import library_reason

    return library_reason()


def _stored(name: str, source: Source, config: BuildConfig, runtime: Runtime) -> OnDevice:
    if name != "cusparse":
        return store(source, config, runtime)
    from hbp_spmv.cusparse import CusparseProduct, cusparse_library

    a = source.device
    ptr = a.ptr.astype(np.int32)
    vendor = CusparseProduct.csr(
        cusparse_library(), runtime, a.shape, ptr, a.col, a.val, "CUSPARSE_SPMV_CSR_ALG2"
    )
    return CsrOnDevice(a, runtime, vendor)


def predict(
    f: Features,
    calibration: DeviceCalibration,
    names: Iterable[str],
    *,
    size: int = 8,
    l2_bytes: int = 50 << 20,
) -> dict[str, float]:
    """Return the predicted time of a product in microseconds for each candidate.

    Bytes: what is stored, x once, y once; x is read by random sectors instead where it exceeds the
    second-level cache and columns are scattered. Occupancy: fewer warps than the device holds draw
    less bandwidth, and no product is shorter than the dependent steps of its longest chain.

    Args:
        f: the matrix.
        calibration: the device.
        names: candidates.
        size: bytes of a value.
        l2_bytes: second-level cache of the device.
    """
    vectors = size * (f.rows + f.columns)
    index = 2 if not f.wide or f.scatter < NEAR else 4
    far = size * f.columns > l2_bytes
    misses = 32 * f.nnz * f.scatter if far else 0.0
    value = 0 if f.uniform else size
    parts = min(f.nnz, f.rows * max(1.0, f.columns * size / STRIP_BYTES))
    stored = {
        "csr": ((4 + size) * f.nnz + 8 * f.rows, misses, f.nnz / 32, f.mean / 32),
        "cusparse": ((4 + size) * f.nnz + 4 * f.rows, misses, f.nnz / 32, f.mean / 32),
        "compact": ((index + value) * f.nnz + 6 * f.rows, misses, f.rows / 32, f.mean),
        "compact-strips": ((2 + value) * f.nnz + 20 * parts, 0.0, parts / 32, f.mean),
    }
    result = {}
    for name in names:
        moved, random, warps, steps = stored[name]
        rate = calibration.bandwidth_at(int(moved + vectors))
        share = min(1.0, max(warps, 1.0) / calibration.warps)
        us = (moved + vectors) / (
            rate * share**OCCUPANCY
        ) / 1e3 + random / calibration.sector_gbs / 1e3
        us = max(us, LATENCY_US * steps / STEPS_IN_FLIGHT)
        result[name] = us + calibration.launch_us
    return result


def choose(
    source: Source, config: BuildConfig, runtime: Runtime, *, n_products: int, tune: bool
) -> tuple[OnDevice, Plan]:
    """Choose and build: the stored layout and the plan that explains it.

    Args:
        source: the matrix.
        config: settings; its layout is `auto`.
        runtime: what computes.
        n_products: products the matrix is built for.
        tune: time the candidates whatever `n_products` says.

    Raises:
        ConfigError: `n_products` is not positive.
    """
    as_int("n_products", n_products)
    a = source.host
    f = plain_features(a)
    options = candidates(a, config, runtime)
    calibration = calibrate_device(runtime)
    size = a.dtype.itemsize
    predicted = predict(f, calibration, options, size=size, l2_bytes=runtime.l2_bytes)
    built: dict[str, OnDevice] = {}
    build_ms: dict[str, float] = {}

    def stored(name: str) -> OnDevice:
        if name not in built:
            started = time.perf_counter()
            built[name] = _stored(name, source, options[name], runtime)
            build_ms[name] = 1e3 * (time.perf_counter() - started)
        return built[name]

    best = min(predicted, key=predicted.__getitem__)
    close = [name for name in options if predicted[name] <= CLOSE * predicted[best]]
    timed: dict[str, float] = {}
    if n_products <= TIMED_PRODUCTS and not tune:
        gain = predicted["csr"] - predicted[best]
        chosen = best if gain * n_products > BUILD_PRODUCTS * predicted["csr"] else "csr"
        reason = f"{n_products} products: {'pays' if chosen != 'csr' else 'no build pays'}"
    elif len(close) == 1:
        chosen, reason = best, f"predicted {predicted[best]:.1f} us, all others over {CLOSE} times"
    else:
        timed = {name: _time(stored(name), a, runtime) for name in dict.fromkeys([*close, "csr"])}
        fastest = min(timed, key=timed.__getitem__)
        chosen = fastest if timed[fastest] < TIE * timed["csr"] else "csr"
        reason = "timed: " + ", ".join(f"{name} {us:.1f} us" for name, us in timed.items())
    result = stored(chosen)
    plan = Plan(
        format=chosen,
        params={"detail": result.detail},
        predicted_us=predicted,
        timed_us=timed,
        build_ms=build_ms,
        reasons=(describe(f), reason, f"{result.layout}: {result.detail}"),
    )
    return result, plan


def _time(stored: OnDevice, a: csr_array, runtime: Runtime) -> float:
    """Return the time of a product in microseconds."""
    xp = runtime.xp
    x = xp.asarray(np.linspace(0.5, 1.5, a.shape[1]).astype(a.dtype))
    y = xp.empty(a.shape[0], a.dtype)
    return 1e6 * _seconds(partial(stored.product, x, y, 1.0, 0.0, 1), runtime)


def select_on(
    a: csr_array, config: BuildConfig, device: str, *, n_products: int, tune: bool
) -> Plan:
    """Say which layout `auto` would choose for a canonical matrix on a device, and why."""
    runtime = cuda_runtime(device)
    with runtime.active():
        source = Source(a, DeviceCSR.from_host(a, runtime.xp))
        return choose(source, config, runtime, n_products=n_products, tune=tune)[1]
