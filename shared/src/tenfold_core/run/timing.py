# SPDX-License-Identifier: Apache-2.0
"""Timing that states its own spread: warm-up, repeats, quartiles, hot or cold, CPU or GPU.

Each sample repeats the call until it is long enough for the clock, and the cost of the empty loop
is subtracted. Candidates to be compared are interleaved, so that a machine that slows down slows
all of them.
"""

import gc
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import repeat
from time import perf_counter
from typing import TYPE_CHECKING, Any

from tenfold_core.errors import ConfigError, MissingExtraError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Timing", "measure", "measure_many", "ratio"]

_SHORTEST_SAMPLE_S = 50e-6  # 500 times the cost of reading the clock
_MOST_LOOPS = 1 << 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Seconds per call over all samples; ``samples`` keeps their order in time."""

    median: float
    q1: float
    q3: float
    p10: float
    p90: float
    min: float
    repeats: int
    """Samples taken."""
    loops: int
    """Calls in one sample."""
    total: float
    """Seconds spent inside the samples."""
    overhead: float
    """Seconds of empty loop already subtracted from each call."""
    cold: bool
    """Whether the caches were flushed before each call."""
    device: str
    samples: tuple[float, ...]


def measure(
    fn: Callable[[], Any],
    *,
    min_time_s: float = 0.2,
    repeats: int = 20,
    warmup: int = 3,
    flush: Callable[[], Any] | int | None = None,
    sync: Callable[[], Any] | None = None,
    device: str = "cpu",
    max_time_s: float | None = None,
) -> Timing:
    """Time one call; see :func:`measure_many`.

    Example:
        >>> measure(lambda: sum(range(100)), min_time_s=0.01).repeats
        20
    """
    return measure_many(
        {"fn": fn},
        min_time_s=min_time_s,
        repeats=repeats,
        warmup=warmup,
        flush=flush,
        sync=sync,
        device=device,
        max_time_s=max_time_s,
    )["fn"]


def measure_many(
    candidates: Mapping[str, Callable[[], Any]],
    *,
    min_time_s: float = 0.2,
    repeats: int = 20,
    warmup: int = 3,
    flush: Callable[[], Any] | int | None = None,
    sync: Callable[[], Any] | None = None,
    device: str = "cpu",
    max_time_s: float | None = None,
) -> dict[str, Timing]:
    """Time several calls in turn, one sample of each per round.

    Args:
        candidates: What to call, by name.
        min_time_s: Seconds that the samples of one candidate last together, at least.
        repeats: Samples of each candidate.
        warmup: Calls before the first sample.
        flush: Cold timing: run before every call, outside the clock; a number is the bytes of a
            buffer to rewrite, about twice the last-level cache.
        sync: Waits until the device is done; runs inside the clock at the end of a sample.
        device: ``cpu``, or ``cuda[:n]`` to time by events on the current stream of PyTorch or
            CuPy, whichever returned the result of the first call.
        max_time_s: Stop after this many seconds, but not before three rounds.

    Raises:
        ConfigError: A count is not positive, or a call returned a CUDA array while nothing would
            wait for it.
        MissingExtraError: ``device`` is ``cuda`` and neither PyTorch nor CuPy can time it.
    """
    if repeats < 1 or warmup < 1 or min_time_s < 0:
        raise ConfigError(
            f"repeats={repeats}, warmup={warmup}, min_time_s={min_time_s}: "
            "expected at least one repeat, one warm-up and no negative time"
        )
    clear = _rewriter(flush) if isinstance(flush, int) else flush
    runs: dict[str, _Run] = {}
    with _no_collection():
        for name, fn in candidates.items():
            runs[name] = _Run(name, fn, clear, sync, device, warmup)
            runs[name].calibrate(1.1 * min_time_s / repeats)  # a tenth to spare for drift
        order = list(runs.values())
        started = perf_counter()
        for count in range(repeats):
            if max_time_s is not None and count >= 3 and perf_counter() - started > max_time_s:
                break
            for run in order:
                run.sample()
            order.reverse()  # no candidate always runs right after the same other one
    return {name: run.summary() for name, run in runs.items()}


def ratio(numerator: Timing, denominator: Timing) -> float:
    """Return the median over rounds of one interleaved timing divided by another."""
    from statistics import median

    pairs = zip(numerator.samples, denominator.samples, strict=True)
    return median(above / below for above, below in pairs)


class _Run:
    """One candidate: its calls, how many make a sample, and the samples so far."""

    def __init__(
        self,
        name: str,
        fn: Callable[[], Any],
        clear: Callable[[], Any] | None,
        sync: Callable[[], Any] | None,
        device: str,
        warmup: int,
    ) -> None:
        self.fn, self.clear, self.device = fn, clear, device
        self.loops = 1
        self.samples: list[float] = []
        self.total = 0.0
        result = fn()
        if device.startswith("cuda"):
            self._elapsed = _cuda_timer(result)
        else:
            if sync is None and _on_gpu(result):
                raise ConfigError(
                    f"{name}: returned an array on a GPU, timed as 'cpu' without sync; "
                    "pass device='cuda' or a sync function"
                )
            self._elapsed = _host_timer(sync)
        for _ in range(warmup - 1):
            fn()

    def calibrate(self, target_s: float) -> None:
        """Choose the loop count for samples of ``target_s``; a cold sample is always one call."""
        if self.clear is not None:
            return
        target_s = max(target_s, _SHORTEST_SAMPLE_S)
        while self.loops < _MOST_LOOPS:
            elapsed = self._elapsed(self.fn, self.loops)
            if elapsed >= target_s:
                break
            growth = 1.2 * target_s / elapsed if elapsed > target_s / 100 else 10.0
            self.loops = min(_MOST_LOOPS, max(self.loops + 1, int(self.loops * growth)))

    def sample(self) -> None:
        if self.clear is not None:
            self.clear()
        elapsed = self._elapsed(self.fn, self.loops)
        self.total += elapsed
        self.samples.append(max(elapsed / self.loops - _loop_overhead(), 0.0))

    def summary(self) -> Timing:
        import numpy as np

        points = np.percentile(self.samples, [50, 25, 75, 10, 90]).tolist()
        return Timing(
            median=points[0],
            q1=points[1],
            q3=points[2],
            p10=points[3],
            p90=points[4],
            min=min(self.samples),
            repeats=len(self.samples),
            loops=self.loops,
            total=self.total,
            overhead=_loop_overhead(),
            cold=self.clear is not None,
            device=self.device,
            samples=tuple(self.samples),
        )


def _host_timer(sync: Callable[[], Any] | None) -> Callable[[Callable[[], Any], int], float]:
    def elapsed(fn: Callable[[], Any], loops: int) -> float:
        if sync is not None:
            sync()
        start = perf_counter()
        for _ in repeat(None, loops):
            fn()
        if sync is not None:
            sync()
        return perf_counter() - start

    return elapsed


def _cuda_timer(result: Any) -> Callable[[Callable[[], Any], int], float]:
    """Time by a pair of events; the second is waited for, so nothing is left running."""
    start, stop, milliseconds = _cuda_events(type(result).__module__.partition(".")[0])

    def elapsed(fn: Callable[[], Any], loops: int) -> float:
        start.record()
        for _ in repeat(None, loops):
            fn()
        stop.record()
        stop.synchronize()
        return milliseconds(start, stop) / 1e3

    return elapsed


def _cuda_events(library: str) -> tuple[Any, Any, Callable[[Any, Any], float]]:
    if library != "torch":
        from tenfold_core.device import cupy_or_none

        cupy = cupy_or_none()
        if cupy is not None:
            return cupy.cuda.Event(), cupy.cuda.Event(), cupy.cuda.get_elapsed_time
    try:
        import torch
    except ImportError:
        torch = None
    if torch is None or not torch.cuda.is_available():
        raise MissingExtraError(
            "timing on 'cuda' needs a CUDA device and PyTorch or CuPy: "
            "pip install 'tenfold-core[torch]' or 'tenfold-core[cuda13]'"
        )
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    return start, stop, lambda begin, end: begin.elapsed_time(end)


def _on_gpu(result: Any) -> bool:
    try:
        return result.__dlpack_device__()[0] in (2, 3, 13)  # CUDA, pinned host, managed
    except Exception:  # not an array, or one that is not exported
        return hasattr(result, "__cuda_array_interface__")


def _rewriter(size: int) -> Callable[[], None]:
    import numpy as np

    buffer = np.zeros(max(size // 8, 1))

    def rewrite() -> None:
        np.add(buffer, 1.0, out=buffer)

    return rewrite


@cache
def _loop_overhead() -> float:
    """Return the seconds of one turn of the empty loop, the least of many measurements."""
    loops = 10_000
    best = float("inf")
    for _ in range(20):
        start = perf_counter()
        for _ in repeat(None, loops):
            pass
        best = min(best, perf_counter() - start)
    return best / loops


@contextmanager
def _no_collection() -> "Iterator[None]":
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
