# SPDX-License-Identifier: Apache-2.0
"""Compile every kernel once: small matrices of each kind go through every layout and baseline."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from scipy.sparse import csr_array
from tenfold_core.errors import TenfoldError

from hbp_spmv.baselines import BASELINES
from hbp_spmv.building import require_kernels
from hbp_spmv.calibration import load_calibration
from hbp_spmv.generate import powerlaw
from hbp_spmv.matrix import from_csr

__all__ = ["compile_all"]

_COLUMNS = (1_000, 70_000)  # 16-bit and 32-bit offsets
_USUAL, _ALL = (16,), (4, 8, 16, 32)


def compile_all(
    *, full: bool = False, say: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Compile into numba's cache what a later process may need; return what was done.

    Args:
        full: every number of lanes, not the usual one alone.
        say: called with progress texts.

    Raises:
        MissingExtraError: numba does not work here, so there is nothing to compile.
    """
    require_kernels("warmup")
    from hbp_spmv.preprocessing import reorder_times

    started = time.perf_counter()
    kernels = 0
    for name, a in _samples():
        say(f"{name} ({time.perf_counter() - started:.0f} s)")
        for settings in _settings(_ALL if full else _USUAL):
            h = from_csr(a, threads=2, **settings)
            h @ np.ones(a.shape[1], a.dtype)
            h @ np.ones((a.shape[1], 2), a.dtype)
            kernels += 1
        for baseline in BASELINES.values():
            if baseline.probe() is None:
                try:
                    baseline.build(a, 2).matvec(np.ones(a.shape[1], a.dtype))
                except TenfoldError:  # a format that does not fit the sample, such as ELL
                    continue
    reorder_times(next(_samples())[1], repeats=1)
    return {
        "variants": kernels,
        "seconds": round(time.perf_counter() - started, 1),
        "gather": load_calibration().gather,
    }


def _samples() -> Iterator[tuple[str, csr_array]]:
    """Yield a matrix of each type, index width and kind of values, with a long and an empty row."""
    for columns in _COLUMNS:
        base = powerlaw(600)
        wide = base.indices.astype(np.int64) * (columns // 600)
        for dtype in ("float64", "float32"):
            for uniform in (False, True):
                data = np.ones(base.nnz) if uniform else base.data
                parts = (data.astype(dtype), wide.astype(np.int32), base.indptr)
                kind = "equal values" if uniform else "values"
                a = csr_array(parts, shape=(600, columns))
                yield f"{dtype}, {kind}, {columns} columns", a


def _settings(lanes: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    yield {"layout": "csr"}
    for count in lanes:
        yield {"layout": "compact", "lanes": count}
        yield {"layout": "compact", "lanes": count, "index": "u32"}
    for hash_ in ("lut", "paper", "tuned", "sort", "none"):
        yield {"layout": "paper", "hash": hash_}
