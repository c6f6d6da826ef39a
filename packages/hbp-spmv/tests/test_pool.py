# SPDX-License-Identifier: Apache-2.0
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from hbp_spmv import from_csr
from hbp_spmv.kernels import pool
from hbp_spmv.kernels.atomic import atomic_load, atomic_store, spin_pause
from hbp_spmv.kernels.simd import load_index
from numba import cfunc, njit
from tenfold_core.testing.sparse import csr_from_lengths


@pytest.fixture(scope="module")
def a():
    lengths = np.minimum(np.random.default_rng(0).zipf(1.5, 2000), 300)
    return csr_from_lengths(lengths, 1500, np.random.default_rng(1)).to_scipy()


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(2).standard_normal(1500)


def run_python(code, **environment):
    """Run a script with the package's kernels in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PREAMBLE + code],
        capture_output=True,
        text=True,
        timeout=100,
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


PREAMBLE = """
import os, sys
import numpy as np
from hbp_spmv import building, from_csr
from tenfold_core.testing.sparse import csr_from_lengths
building.WORKER_NNZ = 1
a = csr_from_lengths(np.arange(500) % 9, 400, np.random.default_rng(0)).to_scipy()
x = np.random.default_rng(1).standard_normal(400)
one = (from_csr(a, layout="compact", threads=1) @ x).tobytes()
several = from_csr(a, layout="compact", threads=3)
assert (several @ x).tobytes() == one
"""


def together(count, work):
    """Run `work(number)` in several Python threads that start at the same time."""
    barrier, results, errors = threading.Barrier(count), [None] * count, []

    def main(number):
        try:
            barrier.wait()
            results[number] = work(number)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=main, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    return results


@pytest.mark.parametrize("layout", ["compact", "paper", "csr"])
def test_concurrent_products_of_one_matrix_have_the_same_bits(a, x, layout, several_workers):
    matrix = from_csr(a, layout=layout, threads=2)
    block = np.stack([x, -x], axis=1)
    expected = (matrix @ x).tobytes()
    columns = (matrix @ block).tobytes()
    found = together(
        4, lambda _: {((matrix @ x).tobytes(), (matrix @ block).tobytes()) for _ in range(25)}
    )
    assert found == [{(expected, columns)}] * 4


def test_concurrent_products_of_several_matrices_have_the_same_bits(a, x, several_workers):
    matrices = [
        from_csr(a * scale, layout=layout, threads=threads)
        for scale, layout, threads in [
            (1, "compact", 3),
            (2, "csr", 2),
            (3, "paper", 3),
            (4, "csr", 1),
        ]
    ]
    expected = [(matrix @ x).tobytes() for matrix in matrices]
    found = together(4, lambda n: {(matrices[n] @ x).tobytes() for _ in range(50)})
    assert found == [{bits} for bits in expected]


def test_concurrent_first_uses_build_what_they_need(a, x, several_workers):
    matrix = from_csr(a, layout="csr", threads=2)
    y = np.random.default_rng(3).standard_normal(2000)
    found = together(
        4, lambda _: (matrix.rmatvec(y).tobytes(), (matrix @ np.stack([x] * 3, 1)).tobytes())
    )
    assert len(set(found)) == 1


def test_a_busy_pool_leaves_the_work_to_the_caller(a, x, several_workers):
    matrix = from_csr(a, layout="compact", threads=3)
    expected = (matrix @ x).tobytes()
    with pool.shared_pool().lock:
        assert (matrix @ x).tobytes() == expected


def test_helpers_start_once_and_as_many_as_needed(a, x, several_workers):
    def helpers():
        return sum(thread.name.startswith("hbp-") for thread in threading.enumerate())

    several = from_csr(a, layout="csr", threads=5)
    several @ x
    before = helpers()
    assert before >= 4
    for threads in (2, 3, 5):
        several.with_threads(threads) @ x
    assert helpers() == before


def test_one_thread_needs_no_pool(a, x, monkeypatch):
    monkeypatch.setattr(pool, "_POOL", [])
    from_csr(a, layout="csr", threads=1) @ x
    assert pool._POOL == []


def test_sleeping_helpers_wake_up(a, x, several_workers):
    matrix = from_csr(a, layout="compact", threads=3)
    expected = (matrix @ x).tobytes()
    shared = pool.shared_pool()
    wait_for_sleep(shared, 2)
    assert (matrix @ x).tobytes() == expected


def wait_for_sleep(shared, helpers):
    parked = [pool.JOB_PARKED + 8 * (1 + number) for number in range(helpers)]
    deadline = time.monotonic() + 20
    while not all(shared.job[at] for at in parked):  # after a fraction of a millisecond
        assert time.monotonic() < deadline


def test_a_sleeping_helper_comes_back_without_the_gil():
    # A caller in a tight loop of products holds the GIL most of the time. Here it holds it all the
    # time: `_run_phases` is called from code that does not release it, and the task of the caller
    # ends only when a helper has entered, or after some seconds.
    shared = pool.Pool()
    with shared.lock:
        shared.start(2)
        wait_for_sleep(shared, 1)
        waited = np.zeros(2, np.int64)
        plan = np.zeros(pool.PLAN_LAYOUT, np.int64)
        plan[pool.PLAN_TASK], plan[pool.PLAN_PHASES], plan[pool.PLAN_WORKERS] = meet().address, 1, 2
        shared.job[pool.JOB_PLAN], shared.job[pool.JOB_WORKERS] = plan.ctypes.data, 2
        shared.job[pool.JOB_X] = waited.ctypes.data
        hold_gil_and_run(shared.job.ctypes.data, plan.ctypes.data)
    shared.close()
    assert waited[0] == 1


@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="only Linux places threads, and only on several cores",
)
def test_a_helper_wakes_on_another_core_than_its_caller(a, x, several_workers):
    matrix = from_csr(a, layout="compact", threads=2)
    allowed = os.sched_getaffinity(0)
    here = min(allowed)
    matrix @ x
    shared = pool.shared_pool()
    helper = int(shared.job[pool.JOB_PARKED + 8 + 2])
    try:
        os.sched_setaffinity(0, {here, max(allowed)})
        wait_for_sleep(shared, 1)
        matrix @ x
        assert len(os.sched_getaffinity(helper)) == 1
        os.sched_setaffinity(0, {here})  # nowhere else to go: it stays where it may be
        wait_for_sleep(shared, 1)
        matrix @ x
    finally:
        os.sched_setaffinity(0, allowed)
    wait_for_sleep(shared, 1)
    matrix @ x
    assert os.sched_getaffinity(helper) < allowed


def meet():
    @cfunc("void(int64, int64)")
    def task(job, worker):
        met = load_index(job, pool.JOB_X, 8)
        if worker:
            atomic_store(met, 0, 1)
            return
        spins = 0
        while atomic_load(met, 0) == 0 and spins < 50_000_000:
            spins += 1
            spin_pause()

    return task


@njit
def hold_gil_and_run(job, plan):
    pool._run_phases(job, plan, 2)


def test_a_product_after_the_pool_was_closed_still_works(a, x, several_workers, monkeypatch):
    monkeypatch.setattr(pool, "_POOL", [pool.Pool()])
    matrix = from_csr(a, layout="compact", threads=3)
    expected = (matrix @ x).tobytes()
    pool.shared_pool().close()
    assert (matrix @ x).tobytes() == expected


def test_more_threads_than_cores(a, x, several_workers):
    expected = (from_csr(a, layout="compact", threads=1) @ x).tobytes()
    many = from_csr(a, layout="compact", threads=os.cpu_count() + 6)
    assert many.threads == min(os.cpu_count() + 6, 64)
    assert (many @ x).tobytes() == expected


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_forked_children_multiply_with_threads_of_their_own():
    code = """
import threading, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 on forks with threads
def forked():
    child = os.fork()
    if child == 0:
        good = all((several @ x).tobytes() == one for _ in range(20))
        good = good and (several.with_threads(2) @ x).tobytes() == one
        os._exit(0 if good else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(forked())
stop = threading.Event()
def work():
    while not stop.is_set():
        several @ x
thread = threading.Thread(target=work)
thread.start()
print([forked() for _ in range(5)])  # now in the middle of products
stop.set()
thread.join()
print((several @ x).tobytes() == one)
"""
    assert run_python(code).splitlines() == ["0", "[0, 0, 0, 0, 0]", "True"]


def test_limits_of_other_libraries_and_the_end_of_the_interpreter_do_not_matter():
    limits = dict.fromkeys(["OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"], "1")
    code = """
import atexit
atexit.register(lambda: print("at exit", (several @ x).tobytes() == one))
print(several.threads, (several @ x).tobytes() == one)
"""
    assert run_python(code, **limits).splitlines() == ["3 True", "at exit True"]


def test_spawned_processes_get_the_matrix_by_pickle():
    code = """
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as executor:
        y = executor.submit(several.matvec, x).result()
    print(y.tobytes() == one)
"""
    assert run_python(code) == "True"
