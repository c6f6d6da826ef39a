# SPDX-License-Identifier: Apache-2.0
"""Time products of several libraries in turns, on a machine that others may be using as well.

Thread pools disturb each other: after a product the helpers of one library spin on the cores that
the next one needs (9 ms for OpenMP as PyTorch ships it, 1 ms for ours). Libraries with threads take
turns in groups, over several rounds so that drift hits all alike, with a pause until the process is
quiet. Another process on one of two cores makes a barrier wait for the scheduler, 8 ms a product
instead of 45 us: a turn during which others were running is repeated, and so is one around which
the cores were not all there (see `hbp_spmv.parallel`).
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tenfold_core.run.timing import measure_many

__all__ = ["Turns", "time_in_turns", "wait_until_quiet"]

_ROUNDS = 4  # turns of each group
_QUIET_STEP_S, _QUIET_LIMIT_S = 0.005, 0.5
_CORES_STEP_S, _CORES_LIMIT_S = 0.05, 2.0
_FOREIGN = 0.1  # cores that others may use while a turn counts
_STAT = Path("/proc/stat")

Calls = Mapping[str, Callable[[], Any]]


@dataclass(frozen=True, slots=True)
class Turns:
    """What was timed, and under what conditions."""

    samples: dict[str, list[float]]
    """Seconds per call, by name."""
    foreign_cores: float | None
    """Most cores that other processes used during a turn that counts, if the system tells."""
    speed_up: float | None
    """Least speed-up by several threads before or after a turn that counts."""


def time_in_turns(
    groups: Sequence[Calls],
    *,
    min_time_s: float,
    repeats: int,
    flush: int | None = None,
    retries: int = 0,
    speed_up: Callable[[], float] | None = None,
    least: float = 0.0,
) -> Turns:
    """Time all calls.

    Args:
        groups: calls by name that may be interleaved with each other; groups take turns.
        min_time_s: seconds of samples of a call, at least.
        repeats: samples of a call.
        flush: bytes to rewrite before each call, for cold timing.
        retries: turns that may be repeated because others were running.
        speed_up: says how much faster several threads are than one at this moment.
        least: speed-up below which a turn is repeated.
    """
    groups = [group for group in groups if group]
    rounds = _ROUNDS if len(groups) > 1 else 1
    samples: dict[str, list[float]] = {name: [] for group in groups for name in group}
    foreign: list[float] = []
    speed_ups: list[float] = []
    for turn in range(rounds):
        for group in groups if turn % 2 == 0 else groups[::-1]:
            while True:
                wait_until_quiet()
                found = _await(speed_up, least) if speed_up else least
                meter = _Meter()
                timings = measure_many(
                    group,
                    min_time_s=min_time_s / rounds,
                    repeats=max(3, -(-repeats // rounds)),
                    flush=flush,
                    max_time_s=max(20 * min_time_s, 1.0) * len(group) / rounds,
                )
                others = meter.foreign_cores()
                found = min(found, speed_up()) if speed_up else least
                good = (others is None or others <= _FOREIGN) and found >= least
                if good or not retries:
                    break
                retries -= 1
            for name, timing in timings.items():
                samples[name] += timing.samples
            foreign += [] if others is None else [others]
            speed_ups += [found] if speed_up else []
    return Turns(samples, max(foreign, default=None), min(speed_ups, default=None))


def _await(speed_up: Callable[[], float], least: float) -> float:
    """Wait for the cores, two seconds at most; return the speed-up found last."""
    deadline = time.perf_counter() + _CORES_LIMIT_S
    while (found := speed_up()) < least and time.perf_counter() < deadline:
        time.sleep(_CORES_STEP_S)
    return found


def wait_until_quiet() -> None:
    """Sleep until no helper thread of this process spins any more, half a second at most."""
    deadline = time.perf_counter() + _QUIET_LIMIT_S
    while time.perf_counter() < deadline:
        used = time.process_time()
        time.sleep(_QUIET_STEP_S)
        if time.process_time() - used < 0.1 * _QUIET_STEP_S:
            return


class _Meter:
    """Counts the processor time that others use from now on."""

    def __init__(self) -> None:
        self._started, self._own, self._busy = time.perf_counter(), time.process_time(), _busy_s()

    def foreign_cores(self) -> float | None:
        """Return the cores others used since, None where the system does not tell."""
        busy = _busy_s()
        elapsed = time.perf_counter() - self._started
        if busy is None or self._busy is None or elapsed < 0.1:  # the counters move by 10 ms
            return None
        own = time.process_time() - self._own
        return max(busy - self._busy - own, 0.0) / elapsed


def _busy_s() -> float | None:
    """Return the processor time that all processes and the host itself have used, in seconds."""
    try:
        words = _STAT.read_text(encoding="ascii").partition("\n")[0].split()
        # user, nice, system, (idle, iowait,) irq, softirq, steal
        ticks = [int(word) for word in words[1:9]]
        return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return None
