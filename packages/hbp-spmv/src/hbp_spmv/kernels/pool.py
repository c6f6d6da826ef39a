# SPDX-License-Identifier: Apache-2.0
"""Worker pool and the mixed execution allocation of the paper, for CPU threads.

A product is one or more *phases*; a phase is a list of chunks. Each worker owns a contiguous run of
chunks (the fixed part: its values stay in its own cache from product to product), the rest lies in
a shared queue from which idle workers draw by an atomic ticket (the competitive part). A worker
that is done with both helps the others. Which worker computes a chunk never changes a sum, so the
result has the same bits for any number of threads.

Workers are Python threads that stay in compiled code, without the GIL. They spin for a fraction of
a millisecond after a product, then sleep on a lock of the operating system; the caller never waits
for a sleeping worker, it does the work itself. Sleeping and waking are native too: a worker that
had to take the GIL to come back would compete for it with a caller in a tight loop of products,
which costs milliseconds (CPython hands the GIL over every 5 ms).
"""

import atexit
import ctypes
import os
import sys
import threading

import numpy as np
from numba import njit

from hbp_spmv.kernels.atomic import (
    atomic_add,
    atomic_exchange,
    atomic_load,
    atomic_store,
    call_native,
    call_task,
    spin_pause,
)
from hbp_spmv.kernels.simd import load_index

__all__ = ["MAX_WORKERS", "Pool", "chunk_at", "queue_at", "run", "run_alone", "shared_pool"]

MAX_WORKERS = 64
_SPINS = 8_000  # about 0.2 ms of `pause`: the time between two products of a solver

# The plan: one int64 array per matrix, thread count and operation. Layouts append their own fields.
PLAN_TASK, PLAN_PHASES, PLAN_WORKERS = 0, 1, 2
PLAN_BOUNDS, PLAN_QUEUES = 3, 5  # one entry per phase, at most two phases
PLAN_LAYOUT = 8

# The job: one int64 array per running product; counters lie on cache lines of their own.
JOB_EPOCH, JOB_ACTIVE, JOB_OPEN, JOB_TICKETS = 0, 8, 16, 64
JOB_PLAN, JOB_X, JOB_Y, JOB_PARTIAL, JOB_ALPHA, JOB_BETA = 24, 25, 26, 27, 28, 29
JOB_COLUMNS, JOB_PHASE, JOB_WORKERS = 30, 31, 32
JOB_ALPHA_IMAGINARY, JOB_BETA_IMAGINARY = 33, 34  # complex matrices only
JOB_ACQUIRE, JOB_RELEASE = 35, 36  # addresses of the two functions of a lock
JOB_CORE_OF, JOB_GET_CORES, JOB_SET_CORES = 37, 38, 39  # Linux: functions of the C library, or 0
JOB_PARKED = JOB_TICKETS + 8 * (MAX_WORKERS + 1)  # of each worker: asleep?, its lock, its thread
JOB_MASK = JOB_PARKED + 8 * MAX_WORKERS
MASK_WORDS = 16  # machines of up to 1024 cores
JOB_SIZE = JOB_MASK + MASK_WORDS


@njit(nogil=True)
def queue_at(worker, turn, workers):
    """Return the queue a worker turns to: its own, then the shared one, then the others'."""
    if turn == 0:
        return worker
    if turn == 1:
        return workers
    return (worker + turn - 1) % workers


@njit(nogil=True)
def chunk_at(job, queues, queue):
    """Draw the next chunk of a queue; -1 when it is empty."""
    first = load_index(queues, queue, 8)
    last = load_index(queues, queue + 1, 8)
    if first == last:
        return -1
    chunk = first + atomic_add(job, JOB_TICKETS + 8 * queue, 1)
    return chunk if chunk < last else -1


@njit(nogil=True)
def _move_away(job, worker):
    """Keep a sleeping helper off the caller's core, where Linux may wake it.

    It does so on small virtual machines: an idle virtual core counts as taken. The helper then
    shares the caller's core, spins in vain, sleeps and wakes there again, product after product.
    """
    if load_index(job, JOB_CORE_OF, 8) == 0:
        return
    core = call_native(load_index(job, JOB_CORE_OF, 8), 0, 0, 0)
    mask = job + 8 * JOB_MASK
    size = 8 * MASK_WORDS
    if core < 0 or core >= 8 * size:
        return
    if call_native(load_index(job, JOB_GET_CORES, 8), 0, size, mask) != 0:
        return
    word = load_index(mask, core // 64, 8)
    atomic_store(mask, core // 64, word & ~(1 << (core % 64)))
    for place in range(MASK_WORDS):
        if load_index(mask, place, 8) != 0:
            thread = load_index(job, JOB_PARKED + 8 * worker + 2, 8)
            call_native(load_index(job, JOB_SET_CORES, 8), thread, size, mask)
            return


@njit(nogil=True)
def _wake(job, worker):
    # Whoever takes the mark back decides whether the lock is used: the caller here, or the worker
    # that saw the new epoch after it had set the mark (see _sleep). No wake-up is lost.
    at = JOB_PARKED + 8 * worker
    if atomic_load(job, at) == 1 and atomic_exchange(job, at, 0) == 1:
        _move_away(job, worker)
        call_native(load_index(job, JOB_RELEASE, 8), load_index(job, at + 1, 8), 0, 0)


@njit(nogil=True)
def _sleep(job, worker, seen):
    at = JOB_PARKED + 8 * worker
    atomic_store(job, at, 1)
    if atomic_load(job, JOB_EPOCH) != seen and atomic_exchange(job, at, 0) == 1:
        return
    call_native(load_index(job, JOB_ACQUIRE, 8), load_index(job, at + 1, 8), 1, 0)


@njit(nogil=True)
def _run_phases(job, plan, workers):
    # Sequentially consistent stores: a worker that enters late sees the job closed (see _serve).
    for phase in range(load_index(plan, PLAN_PHASES, 8)):
        for queue in range(workers + 1):
            atomic_store(job, JOB_TICKETS + 8 * queue, 0)
        atomic_store(job, JOB_PHASE, phase)
        atomic_store(job, JOB_OPEN, 1)
        atomic_add(job, JOB_EPOCH, 1)
        for worker in range(1, workers):
            _wake(job, worker)
        call_task(load_index(plan, PLAN_TASK, 8), job, 0)
        atomic_store(job, JOB_OPEN, 0)
        while atomic_load(job, JOB_ACTIVE) != 0:
            spin_pause()


@njit(nogil=True)
def _describe(job, plan, x, y, partial, alpha, beta, columns):
    scalars = np.array([alpha.real, beta.real, alpha.imag, beta.imag])
    bits = scalars.view(np.int64)
    job[JOB_PLAN] = plan.ctypes.data
    job[JOB_X] = x.ctypes.data
    job[JOB_Y] = y.ctypes.data
    job[JOB_PARTIAL] = partial.ctypes.data
    job[JOB_ALPHA] = bits[0]
    job[JOB_BETA] = bits[1]
    job[JOB_ALPHA_IMAGINARY] = bits[2]
    job[JOB_BETA_IMAGINARY] = bits[3]
    job[JOB_COLUMNS] = columns
    job[JOB_WORKERS] = plan[PLAN_WORKERS]


@njit(nogil=True, cache=True)
def run(job, plan, x, y, partial, alpha, beta, columns):
    """Run one product to its end with the pool's workers; the caller holds the pool's lock.

    Args:
        job: int64 job array.
        plan: int64 plan array.
        x: operand, contiguous.
        y: result, contiguous, of the same type.
        partial: buffer for partial sums, of the same type.
        alpha: factor of the product.
        beta: factor of the old `y`; 0 means that `y` is not read.
        columns: number of columns of `x`.
    """
    _describe(job, plan, x, y, partial, alpha, beta, columns)
    _run_phases(job.ctypes.data, plan.ctypes.data, plan[PLAN_WORKERS])


@njit(nogil=True, cache=True)
def run_alone(plan, x, y, partial, alpha, beta, columns):
    """Run one product in the calling thread; arguments as for `run`."""
    job = np.empty(JOB_PARKED, np.int64)
    _describe(job, plan, x, y, partial, alpha, beta, columns)
    workers = plan[PLAN_WORKERS]
    job[JOB_WORKERS] = workers
    for phase in range(plan[PLAN_PHASES]):
        for queue in range(workers + 1):
            job[JOB_TICKETS + 8 * queue] = 0
        job[JOB_PHASE] = phase
        call_task(plan[PLAN_TASK], job.ctypes.data, 0)


@njit(nogil=True, cache=True)
def _serve(job, worker, seen, spins):
    """Help with jobs, asleep when none came for `spins` turns, until the epoch is negative."""
    idle = 0
    while True:
        epoch = atomic_load(job, JOB_EPOCH)
        if epoch < 0:
            return
        if epoch == seen:
            idle += 1
            if idle < spins:
                spin_pause()
            else:
                _sleep(job, worker, seen)
                idle = 0
            continue
        seen = epoch
        idle = 0
        atomic_add(job, JOB_ACTIVE, 1)
        if atomic_load(job, JOB_OPEN) == 1 and worker < load_index(job, JOB_WORKERS, 8):
            plan = load_index(job, JOB_PLAN, 8)
            call_task(load_index(plan, PLAN_TASK, 8), job, worker)
        atomic_add(job, JOB_ACTIVE, -1)


class Pool:
    """Helper threads that share one job array; whoever fails to get its `lock` runs alone."""

    def __init__(self) -> None:
        storage = np.zeros(JOB_SIZE + 8, np.int64)
        skip = (-storage.ctypes.data % 64) // 8
        self.job = storage[skip : skip + JOB_SIZE]
        self.job[JOB_ACQUIRE] = _address("PyThread_acquire_lock")
        self.job[JOB_RELEASE] = _address("PyThread_release_lock")
        if sys.platform == "linux":
            for at, name in _CORE_FUNCTIONS.items():
                self.job[at] = _address(name)
        self.lock = threading.Lock()
        self._helpers = 0

    def start(self, workers: int) -> None:
        """Start the helpers that `workers` workers lack; call it with the lock held."""
        while self._helpers < workers - 1:
            worker = self._helpers + 1
            self.job[JOB_PARKED + 8 * worker + 1] = _taken_lock()
            thread = threading.Thread(
                target=self._main,
                args=(worker, int(self.job[JOB_EPOCH])),
                name=f"hbp-{worker}",
                daemon=True,
            )
            try:
                thread.start()
            except RuntimeError:  # no more threads: those that run share the work
                return
            self._helpers = worker

    def _main(self, worker: int, epoch: int) -> None:
        self.job[JOB_PARKED + 8 * worker + 2] = threading.get_native_id()
        _serve(self.job.ctypes.data, worker, epoch, _SPINS)

    def close(self) -> None:
        """Tell the helpers to end."""
        with self.lock:
            self.job[JOB_EPOCH] = -1 << 62
            for worker in range(1, self._helpers + 1):
                _wake(self.job.ctypes.data, worker)


_CORE_FUNCTIONS = {
    JOB_CORE_OF: "sched_getcpu",
    JOB_GET_CORES: "sched_getaffinity",
    JOB_SET_CORES: "sched_setaffinity",
}


def _address(function: str) -> int:
    """Return the address of a function of Python or the C library, to be called without the GIL."""
    return ctypes.cast(getattr(ctypes.pythonapi, function), ctypes.c_void_p).value or 0


def _taken_lock() -> int:
    """Return a lock of the operating system that is held, never freed: helpers sleep on it."""
    allocate = ctypes.pythonapi.PyThread_allocate_lock
    allocate.restype = ctypes.c_void_p
    lock = allocate()
    acquire = ctypes.pythonapi.PyThread_acquire_lock
    acquire.argtypes = (ctypes.c_void_p, ctypes.c_int)
    if lock is None or not acquire(lock, 0):
        raise MemoryError("no lock for another thread")
    return lock


_POOL: list[Pool] = []


def shared_pool() -> Pool:
    """Return this process's pool; a forked child gets a new one."""
    if not _POOL:
        _POOL.append(Pool())
    return _POOL[0]


def _close() -> None:
    if _POOL:
        _POOL[0].close()


atexit.register(_close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_POOL.clear)
