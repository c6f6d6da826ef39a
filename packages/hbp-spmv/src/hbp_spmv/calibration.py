# SPDX-License-Identifier: Apache-2.0
"""What this machine does: copy bandwidth by working set, cost constants of the kernels.

`calibrate` measures for a few seconds and keeps the result per host in the user's cache folder;
`load_calibration` returns it, or `DEFAULT`. Only predictions and the choice of the gather
instruction depend on it, never a result.
"""

import hashlib
import json
import math
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import csr_array
from tenfold_core.device import cpu_info
from tenfold_core.errors import TenfoldWarning
from tenfold_core.run.checkpoint import atomic_path
from tenfold_core.run.seeds import generator

from hbp_spmv.building import require_kernels

__all__ = ["DEFAULT", "Calibration", "calibrate", "hardware_gather", "load_calibration"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Measured facts of one host, one thread."""

    cpu: str
    """Processor model, `default` if nothing was measured."""
    bandwidth: tuple[tuple[int, float], ...]
    """(working set in bytes, copy bandwidth in GB/s, read and write counted), ascending."""
    gather: bool
    """The gather instruction beats scalar loads."""
    csr_nonzero_ns: float
    """Row gather: cost of a nonzero."""
    csr_row_ns: float
    """Row gather: cost of a row."""
    csr_switch_ns: float
    """Row gather: cost of a row whose length differs from the one before, while there are so few
    that the branch predictor learns them from product to product."""
    csr_mispredict_ns: float
    """The same once there are too many to learn."""
    compact_slot_ns: float
    """Compact: cost of a lane in a step, used or not."""
    compact_row_ns: float
    """Compact: cost of a row."""
    miss_ns: float
    """Cost of fetching an element of x from beyond the second-level cache."""
    call_us: float
    """Cost of a call."""
    join_us: float
    """Cost of a second thread."""

    def bandwidth_at(self, size: int) -> float:
        """Return the copy bandwidth in GB/s for a working set of `size` bytes."""
        for limit, rate in self.bandwidth:
            if size <= limit:
                return rate
        return self.bandwidth[-1][1]


PREDICTED_ROWS = 20_000
"""Changes of row length that a branch predictor learns, about."""

DEFAULT = Calibration(
    cpu="default",
    bandwidth=((1 << 20, 60.0), (16 << 20, 30.0), (1 << 30, 10.0)),
    gather=False,
    csr_nonzero_ns=0.27,
    csr_row_ns=1.2,
    csr_switch_ns=0.5,
    csr_mispredict_ns=7.0,
    compact_slot_ns=0.27,
    compact_row_ns=0.5,
    miss_ns=0.4,
    call_us=1.5,
    join_us=1.0,
)


def _path() -> Path:
    cpu = cpu_info()
    host = hashlib.sha256(f"{cpu.model}/{cpu.usable_cores}/1".encode()).hexdigest()[:12]
    base = os.environ.get("HBP_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "tenfold" / "hbp-spmv" / f"calibration-{host}.json"


_LOADED: list[Calibration] = []
_WARNED: list[bool] = []
# RuntimeError: the user has no home, or the file nests without end
_UNUSABLE = (
    OSError,
    ArithmeticError,
    LookupError,
    RuntimeError,
    AttributeError,
    TypeError,
    ValueError,
)


def load_calibration() -> Calibration:
    """Return this host's calibration, or `DEFAULT` if there is none that can be read."""
    if not _LOADED:
        try:
            _LOADED.append(_calibration(json.loads(_path().read_text(encoding="utf-8"))))
        except _UNUSABLE:
            _LOADED.append(DEFAULT)
    return _LOADED[0]


def _calibration(values: dict[str, Any]) -> Calibration:
    """Return a calibration made of a file's values; what could not be measured is refused."""
    pairs = tuple((size, rate) for size, rate in values.pop("bandwidth"))
    found = Calibration(bandwidth=pairs, **values)
    costs = [getattr(found, f.name) for f in fields(found) if f.name.endswith(("_ns", "_us"))]
    sizes, rates = [size for size, _ in pairs], [rate for _, rate in pairs]
    good = bool(pairs) and all(type(size) is int and size > 0 for size in sizes)
    good = good and all(low < high for low, high in pairwise(sizes))
    good = good and all(_measured(rate) and rate > 0 for rate in rates)
    good = good and all(_measured(cost) and cost >= 0 for cost in costs)
    if not good or not isinstance(found.gather, bool) or not isinstance(found.cpu, str):
        raise ValueError("a cost or a rate is out of range")
    return found


def _measured(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def hardware_gather() -> bool:
    """Tell whether kernels should use the gather instruction on this host."""
    return load_calibration().gather


def _seconds(fn: Callable[[], object], budget: float = 0.03) -> float:
    """Return the best time of a call within a small budget."""
    fn()
    best, spent, rounds = float("inf"), 0.0, 0
    while spent < budget or rounds < 5:
        started = time.perf_counter()
        fn()
        elapsed = time.perf_counter() - started
        best, spent, rounds = min(best, elapsed), spent + elapsed, rounds + 1
    return best


def _bandwidth() -> tuple[tuple[int, float], ...]:
    """Measure copies that fill half of each shared or large cache, then four times the last one."""
    cpu = cpu_info()
    l2, l3 = cpu.l2_bytes or 1 << 20, cpu.l3_bytes or 16 << 20
    levels = [(l2, 0.5), (l3, 0.5), (max(4 * l3, 64 << 20), 1.0)]
    rates = []
    for size, share in levels:
        source = np.ones(min(int(size * share) // 2, 128 << 20) // 8)
        target = np.empty_like(source)
        seconds = _seconds(lambda s=source, t=target: np.copyto(t, s))
        rates.append((size, round(2 * source.nbytes / seconds / 1e9, 2)))
    return tuple(rates)


def _sample(lengths: np.ndarray, columns: int) -> csr_array:
    """Return a matrix with the given row lengths and neighbouring or scattered columns."""
    rng = generator(0, "calibrate")
    ptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    rows = np.repeat(np.arange(len(lengths)), lengths)
    step = np.arange(ptr[-1]) - ptr[rows]
    first = rng.integers(0, columns - int(lengths.max()), len(lengths))
    col = (first[rows] + step).astype(np.int32)
    return csr_array((rng.standard_normal(len(col)), col, ptr), shape=(len(lengths), columns))


def _product_ns(a: csr_array, layout: str, gather: bool) -> tuple[float, int]:
    """Return the time of one product in ns and the number of slots the layout steps through."""
    from hbp_spmv.building import build_layout
    from hbp_spmv.config import BuildConfig
    from hbp_spmv.kernels import compact, csr
    from hbp_spmv.product import bind

    stored = build_layout(a, BuildConfig(layout=layout))
    make = csr.csr_task if layout == "csr" else compact.compact_task
    width = stored.col.dtype.itemsize
    product = bind(stored, make(stored.lanes, 8, width, int(stored.uniform), int(gather)), 1)
    x, y = np.ones(a.shape[1]), np.empty(a.shape[0])
    efficiency = stored.quality()[0]
    return 1e9 * _seconds(lambda: product(x, y)), int(a.nnz / efficiency)


def calibrate(*, save: bool = True) -> Calibration:
    """Measure this host in a few seconds (longer when kernels must be compiled first).

    Args:
        save: keep the result in the user's cache folder for later processes.

    Raises:
        MissingExtraError: numba does not work here, so there are no kernels to measure.
    """
    require_kernels("calibrate")
    rng = generator(0, "lengths")
    long = _sample(np.full(1000, 64), 4096)
    short = _sample(np.full(16_000, 4), 4096)
    mixed = _sample(rng.integers(1, 8, 16_000), 4096)
    many = _sample(rng.integers(1, 8, 200_000), 4096)
    far = _sample(np.full(50_000, 4), 1 << 20)
    wins = {}
    for gather in (False, True):
        wins[gather] = _product_ns(long, "compact", gather)[0]
    gather = wins[True] < wins[False]

    time_long, time_short = (_product_ns(a, "csr", gather)[0] for a in (long, short))
    row = max(
        (time_short - time_long * short.nnz / long.nnz) / (short.shape[0] - long.shape[0]), 0.0
    )
    nonzero = max((time_long - row * long.shape[0]) / long.nnz, 0.05)
    switch, mispredict = (
        _product_ns(a, "csr", gather)[0] - a.nnz * nonzero - a.shape[0] * row for a in (mixed, many)
    )
    time_long, slots_long = _product_ns(long, "compact", gather)
    time_short, slots_short = _product_ns(short, "compact", gather)
    compact_row = max(
        (time_short - time_long * slots_short / slots_long) / (short.shape[0] - long.shape[0]), 0.0
    )
    slot = max((time_long - compact_row * long.shape[0]) / slots_long, 0.05)
    time_far, slots_far = _product_ns(far, "compact", gather)
    miss = (time_far - slots_far * slot - far.shape[0] * compact_row) / far.nnz
    found = replace(
        DEFAULT,
        cpu=cpu_info().model,
        bandwidth=_bandwidth(),
        gather=gather,
        csr_nonzero_ns=round(nonzero, 4),
        csr_row_ns=round(row, 4),
        csr_switch_ns=round(max(switch / mixed.shape[0], 0.0), 4),
        csr_mispredict_ns=round(max(mispredict / many.shape[0], 0.0), 4),
        compact_slot_ns=round(slot, 4),
        compact_row_ns=round(compact_row, 4),
        miss_ns=round(max(miss, 0.0), 4),
    )
    _LOADED[:] = [found]
    if save:
        _keep(found)
    return found


def _keep(found: Calibration) -> None:
    try:
        path = _path()
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(asdict(found), indent=2) + "\n", encoding="utf-8")
    except (OSError, RuntimeError) as error:
        if not _WARNED:
            warnings.warn(
                f"calibration not kept ({error}); it is measured again next time",
                TenfoldWarning,
                stacklevel=3,
            )
        _WARNED[:] = [True]
