# SPDX-License-Identifier: Apache-2.0
"""Worker pool and the mixed execution allocation of section 2.6 of the method, for CPU threads.

A product is one or more *phases*; a phase is a list of chunks. Each worker owns a contiguous run of
chunks (the fixed part: its values stay in its own cache from product to product), the rest lies in
a shared queue from which idle workers draw by an atomic ticket (the competitive part). A worker
that is done with both helps the others. Which worker computes a chunk never changes a sum, so the
result has the same bits for any number of threads.

Workers are Python threads inside compiled code without the GIL. They spin for a fraction of a
millisecond after a product, then sleep; the caller never waits for a sleeping worker, it does the
work itself.
"""

import atexit
import os
import threading

import numpy as np
from numba import njit

from hbp_spmv.kernels.simd import (
    atomic_add,
    atomic_load,
    atomic_store,
    call_task,
    load_index,
    spin_pause,
)

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
JOB_PARKED = JOB_TICKETS + 8 * (MAX_WORKERS + 1)
JOB_SIZE = JOB_PARKED + 8 * MAX_WORKERS


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
def _run_phases(job, plan, workers):
    # Sequentially consistent stores: a worker that enters late sees the job closed (see _serve).
    for phase in range(load_index(plan, PLAN_PHASES, 8)):
        for queue in range(workers + 1):
            atomic_store(job, JOB_TICKETS + 8 * queue, 0)
        atomic_store(job, JOB_PHASE, phase)
        atomic_store(job, JOB_OPEN, 1)
        atomic_add(job, JOB_EPOCH, 1)
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
    """Help with jobs until none came for `spins` turns; return the last epoch seen, -1 to stop."""
    idle = 0
    while idle < spins:
        epoch = atomic_load(job, JOB_EPOCH)
        if epoch < 0:
            return -1
        if epoch == seen:
            idle += 1
            spin_pause()
            continue
        seen = epoch
        idle = 0
        atomic_add(job, JOB_ACTIVE, 1)
        if atomic_load(job, JOB_OPEN) == 1 and worker < load_index(job, JOB_WORKERS, 8):
            plan = load_index(job, JOB_PLAN, 8)
            call_task(load_index(plan, PLAN_TASK, 8), job, worker)
        atomic_add(job, JOB_ACTIVE, -1)
    atomic_store(job, JOB_PARKED + 8 * worker, 1)
    return seen


class Pool:
    """Helper threads that share one job array; whoever fails to get its `lock` runs alone."""

    def __init__(self) -> None:
        storage = np.zeros(JOB_SIZE + 8, np.int64)
        skip = (-storage.ctypes.data % 64) // 8
        self.job = storage[skip : skip + JOB_SIZE]
        self.lock = threading.Lock()
        self._wake: list[threading.Semaphore] = []

    def _start(self, workers: int) -> None:
        while len(self._wake) < workers - 1:
            semaphore = threading.Semaphore(0)
            worker = len(self._wake) + 1
            thread = threading.Thread(
                target=self._main, args=(worker, semaphore), name=f"hbp-{worker}", daemon=True
            )
            try:
                thread.start()
            except RuntimeError:  # no more threads: those that run share the work
                return
            self._wake.append(semaphore)

    def wake(self, workers: int) -> None:
        """Start missing helpers and wake those that sleep; call it with the lock held."""
        if len(self._wake) < workers - 1:
            self._start(workers)
        for worker in range(1, min(workers, len(self._wake) + 1)):
            if self.job[JOB_PARKED + 8 * worker]:
                self.job[JOB_PARKED + 8 * worker] = 0
                self._wake[worker - 1].release()

    def close(self) -> None:
        """Tell the helpers to end."""
        with self.lock:
            self.job[JOB_EPOCH] = -1 << 62
            for semaphore in self._wake:
                semaphore.release()

    def _main(self, worker: int, semaphore: threading.Semaphore) -> None:
        address = self.job.ctypes.data
        seen = int(self.job[JOB_EPOCH])
        while (seen := _serve(address, worker, seen, _SPINS)) >= 0:
            semaphore.acquire()


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
