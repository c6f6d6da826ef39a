# SPDX-License-Identifier: Apache-2.0
"""Time launches on a GPU in CUDA graphs, by events; without CUDA, loops under the host's clock."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
from tenfold_core.sparse.gpu import Runtime

from hbp_spmv.evaluate import error_text

__all__ = ["GRAPH_LAUNCHES", "Replay", "flusher", "graph_seconds", "synchronizer"]

GRAPH_LAUNCHES = 50
"""Launches of a product in one graph."""

Call = Callable[[], Any]


def synchronizer(runtime: Runtime) -> Callable[[], None]:
    """Return a function that waits for the device; there is nothing to wait for without CUDA."""
    cuda = getattr(runtime.xp, "cuda", None)
    return (lambda: None) if cuda is None else cuda.runtime.deviceSynchronize


def flusher(runtime: Runtime) -> Call:
    """Return a function that rewrites a buffer of twice the second-level cache."""
    xp = runtime.xp
    buffer = xp.zeros(max(2 * runtime.l2_bytes // 8, 1))
    return partial(xp.add, buffer, 1.0, out=buffer)


class Replay:
    """Launches captured in one CUDA graph; without CUDA, a loop under the host's clock.

    Args:
        runtime: Where the launches go.
        calls: What to capture, in order; they allocate nothing and do not wait.
        count: How often all of them are captured.
    """

    def __init__(self, runtime: Runtime, calls: Sequence[Call], count: int) -> None:
        self._calls, self._count = tuple(calls), count
        self._cuda: Any = getattr(runtime.xp, "cuda", None)
        self._stream: Any = None
        self._graph: Any = None
        if self._cuda is not None:
            self._capture()

    def _capture(self) -> None:
        self._cuda.runtime.deviceSynchronize()
        self._stream = self._cuda.Stream(non_blocking=True)
        with self._stream:
            self._once()  # what is allocated per stream is allocated now
            self._stream.synchronize()
            self._stream.begin_capture()
            try:
                for _ in range(self._count):
                    self._once()
            except Exception:
                with suppress(Exception):
                    self._stream.end_capture()
                raise
            self._graph = self._stream.end_capture()

    def _once(self) -> None:
        for call in self._calls:
            call()

    def seconds(self, times: int) -> float:
        """Return the time of one round of the calls, over `times` replays."""
        if self._cuda is None:
            started = time.perf_counter()
            for _ in range(times * self._count):
                self._once()
            return (time.perf_counter() - started) / (times * self._count)
        start, stop = self._cuda.Event(), self._cuda.Event()
        start.record(self._stream)
        for _ in range(times):
            self._graph.launch(self._stream)
        stop.record(self._stream)
        stop.synchronize()
        return self._cuda.get_elapsed_time(start, stop) / 1e3 / (times * self._count)


def graph_seconds(
    launches: Mapping[str, Call],
    runtime: Runtime,
    *,
    min_time_s: float,
    repeats: int,
    flush: Call | None = None,
) -> tuple[dict[str, float], dict[str, str]]:
    """Time launches inside CUDA graphs, in turns.

    Args:
        launches: what to capture, by name.
        runtime: where it runs.
        min_time_s: seconds of samples of a launch, at least.
        repeats: samples of a launch.
        flush: rewrites a buffer before each launch; its own time is subtracted.

    Returns:
        The median seconds of a launch, and why others could not be captured.
    """
    replays: dict[str | None, Replay] = {}
    faults: dict[str, str] = {}
    before = [] if flush is None else [flush]
    for name, launch in launches.items():
        try:
            replays[name] = Replay(runtime, [*before, launch], GRAPH_LAUNCHES)
        except Exception as error:  # what cannot be captured is a finding, not a failure
            faults[name] = error_text(error)
    if flush is not None and replays:
        replays[None] = Replay(runtime, before, GRAPH_LAUNCHES)
    share = min_time_s / repeats / GRAPH_LAUNCHES
    times = {
        name: max(1, math.ceil(share / max(replay.seconds(1), 1e-9)))
        for name, replay in replays.items()
    }
    samples: dict[str | None, list[float]] = {name: [] for name in replays}
    deadline = time.perf_counter() + max(20 * min_time_s, 1.0) * max(len(replays), 1)
    for count in range(repeats):
        if count >= 3 and time.perf_counter() > deadline:
            break
        for name, replay in replays.items():
            samples[name].append(replay.seconds(times[name]))
    medians = {name: float(np.median(found)) for name, found in samples.items()}
    flushing = medians.pop(None, 0.0)
    return {str(name): max(s - flushing, 0.0) for name, s in medians.items()}, faults
