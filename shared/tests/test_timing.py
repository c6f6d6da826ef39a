# SPDX-License-Identifier: Apache-2.0
import gc
import sys
import types

import numpy as np
import pytest
from tenfold_core.errors import ConfigError, MissingExtraError
from tenfold_core.run import measure, measure_many, timing


@pytest.fixture
def clock(monkeypatch):
    """A clock that only moves when the measured function says so; the empty loop is free."""
    now = types.SimpleNamespace(s=0.0)
    monkeypatch.setattr(timing, "perf_counter", lambda: now.s)
    monkeypatch.setattr(timing, "_loop_overhead", lambda: 0.0)

    def spend(seconds):
        now.s += seconds

    return spend


def test_the_figures_are_the_quantiles_of_the_samples(clock):
    # The first call of measure and its warm-up take the first two; the calls last 1 to 5 s.
    durations = iter([9, 9, 9, 1, 2, 3, 4, 5])
    found = measure(lambda: clock(next(durations)), repeats=5, warmup=2, min_time_s=1)
    assert found.samples == (1, 2, 3, 4, 5)
    assert (found.median, found.q1, found.q3, found.min) == (3, 2, 4, 1)
    assert (found.p10, found.p90) == pytest.approx((1.4, 4.6))
    assert (found.repeats, found.loops, found.total, found.cold) == (5, 1, 15, False)


@pytest.mark.parametrize("cost", [1e-7, 1e-5, 3e-3])
def test_short_calls_are_repeated_until_the_time_is_long_enough(clock, cost):
    found = measure(lambda: clock(cost), min_time_s=0.2, repeats=20)
    assert found.total >= 0.2
    assert found.total < 2 * max(0.2, 20 * cost)
    assert found.loops * cost >= timing._SHORTEST_SAMPLE_S
    assert found.median == pytest.approx(cost)


def test_no_sample_is_shorter_than_the_clock_can_tell(clock):
    found = measure(lambda: clock(1e-6), min_time_s=0, repeats=2)
    assert found.loops * 1e-6 >= timing._SHORTEST_SAMPLE_S


def test_the_cost_of_the_empty_loop_is_subtracted_and_stated():
    found = measure(lambda: None, min_time_s=0.01, repeats=3)
    assert 0 < found.overhead < 1e-6
    assert 0 <= found.median < 1e-6


def test_cold_calls_are_flushed_outside_of_the_clock(clock):
    calls = []

    def flush():
        calls.append("flush")
        clock(100.0)

    def work():
        calls.append("work")
        clock(0.5)

    found = measure(work, repeats=3, warmup=1, flush=flush)
    assert calls == ["work", *["flush", "work"] * 3]
    assert (found.median, found.loops, found.cold) == (0.5, 1, True)


def test_a_number_of_bytes_makes_its_own_flush():
    assert measure(lambda: None, repeats=2, flush=1 << 16).cold


def test_candidates_take_turns_and_turn_around(clock):
    order = []
    work = {name: lambda name=name: (order.append(name), clock(1)) for name in "abc"}
    measure_many(work, repeats=2, warmup=1, min_time_s=0)
    assert "".join(order[-6:]) == "abccba"


def test_a_drift_of_the_machine_cancels_in_the_ratio(clock):
    speed = types.SimpleNamespace(factor=1.0)

    def work(cost):
        clock(cost * speed.factor)
        speed.factor *= 1.01

    both = {"slow": lambda: work(2.0), "fast": lambda: work(1.0)}
    found = measure_many(both, repeats=21, warmup=1)
    assert timing.ratio(found["slow"], found["fast"]) == pytest.approx(2, rel=0.02)


def test_a_time_limit_ends_the_rounds_but_not_before_three(clock):
    assert measure(lambda: clock(10.0), repeats=20, max_time_s=1).repeats == 3
    assert measure(lambda: clock(10.0), repeats=20, max_time_s=55).repeats == 6


def test_sync_runs_inside_the_clock(clock):
    found = measure(lambda: None, sync=lambda: clock(1.0), repeats=2, min_time_s=0)
    assert found.median == pytest.approx(1.0)


@pytest.mark.parametrize("wrong", [{"repeats": 0}, {"warmup": 0}, {"min_time_s": -1}])
def test_counts_must_be_positive(wrong):
    with pytest.raises(ConfigError, match="expected at least one repeat"):
        measure(lambda: None, **wrong)


class Dlpack:
    def __dlpack_device__(self):
        return (2, 0)


class Interface:
    __cuda_array_interface__ = None


@pytest.mark.parametrize("result", [Dlpack(), Interface()])
def test_a_call_nobody_waits_for_is_not_timed(result):
    with pytest.raises(ConfigError, match="fn: returned an array on a GPU, timed as 'cpu'"):
        measure(lambda: result)
    assert measure(lambda: result, sync=lambda: None, min_time_s=0.001, repeats=2).repeats == 2


def test_arrays_on_the_cpu_are_timed():
    assert measure(lambda: np.ones(3), min_time_s=0.001, repeats=2).device == "cpu"


def test_without_a_gpu_cuda_timing_names_what_is_missing(monkeypatch):
    monkeypatch.setattr("tenfold_core.device.cupy_or_none", lambda: None)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingExtraError, match="needs a CUDA device and PyTorch or CuPy"):
        measure(lambda: None, device="cuda")


class Event:
    now = 0.0

    def __init__(self, **_):
        self.time = None
        self.waited = False

    def record(self):
        self.time = Event.now

    def synchronize(self):
        self.waited = True

    def elapsed_time(self, other):
        assert other.waited
        return other.time - self.time


def advance(milliseconds):
    Event.now += milliseconds


def test_cuda_calls_are_timed_by_events_that_are_waited_for(monkeypatch):
    cuda = types.SimpleNamespace(
        Event=Event, get_elapsed_time=Event.elapsed_time, is_available=lambda: True
    )
    module = types.SimpleNamespace(cuda=cuda)
    monkeypatch.setattr("tenfold_core.device.cupy_or_none", lambda: module)
    found = measure(lambda: advance(4.0), device="cuda:0", repeats=3)
    assert found.median == pytest.approx(4e-3, rel=1e-3)
    assert found.device == "cuda:0"
    tensor = type("Tensor", (), {"__module__": "torch"})()
    monkeypatch.setitem(sys.modules, "torch", module)
    found = measure(lambda: (advance(2.0), tensor)[1], device="cuda", repeats=3)
    assert found.median == pytest.approx(2e-3, rel=1e-3)


@pytest.mark.parametrize("enabled", [True, False])
def test_the_garbage_collector_rests_and_is_left_as_it_was(enabled):
    was = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    seen = []
    measure(lambda: seen.append(gc.isenabled()), min_time_s=0, repeats=1)
    assert not any(seen)
    assert gc.isenabled() is enabled
    (gc.enable if was else gc.disable)()
