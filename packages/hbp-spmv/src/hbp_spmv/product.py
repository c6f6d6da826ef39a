# SPDX-License-Identifier: Apache-2.0
"""Bind a layout to its compiled kernel and a thread count, once; then a product is one call."""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from tenfold_core.device import cpu_info

from hbp_spmv.fallback import ScipyLayout
from hbp_spmv.schedule import FIXED_SHARE, cut

__all__ = ["BoundProduct", "Layout", "bind", "bind_matrix", "task_of"]


class Layout(Protocol):
    """What a storage layout offers to be multiplied."""

    @property
    def partials(self) -> int:
        """Partial sums a product needs."""
        ...

    def fields(self) -> list[int]:
        """Return the layout part of a plan."""
        ...

    def work(self) -> list[NDArray]:
        """Return the cost of each unit of each phase."""
        ...


@dataclass(frozen=True, slots=True)
class BoundProduct:
    """A compiled product; call it with contiguous arrays of the matrix's type."""

    plan: NDArray[np.int64]
    workers: int
    partials: int
    pool: ModuleType
    keep: tuple
    """Whatever the plan's addresses point into."""

    def __call__(
        self, x: NDArray, y: NDArray, alpha: float = 1.0, beta: float = 0.0, columns: int = 1
    ) -> None:
        """Compute `y = alpha A x + beta y`; x and y are flat, row-major if `columns` > 1."""
        partial = np.empty(self.partials * columns, x.dtype) if self.partials else y
        if self.workers > 1:
            shared = self.pool.shared_pool()
            if shared.lock.acquire(blocking=False):
                try:
                    shared.start(self.workers)
                    self.pool.run(shared.job, self.plan, x, y, partial, alpha, beta, columns)
                finally:
                    shared.lock.release()
                return
        # One worker, or the pool is busy with another product.
        self.pool.run_alone(self.plan, x, y, partial, alpha, beta, columns)


def bind(
    layout: Layout, task: Any, workers: int, *, fixed_share: float = FIXED_SHARE
) -> BoundProduct:
    """Return the product of `layout` by the compiled `task` on `workers` threads."""
    from hbp_spmv.kernels import pool

    phases = [cut(work, workers, fixed_share=fixed_share) for work in layout.work()]
    fields = layout.fields()
    plan = np.zeros(pool.PLAN_LAYOUT + len(fields), np.int64)
    plan[pool.PLAN_TASK] = task.address
    plan[pool.PLAN_PHASES] = len(phases)
    plan[pool.PLAN_WORKERS] = workers
    for number, chunks in enumerate(phases):
        plan[pool.PLAN_BOUNDS + number] = chunks.bounds.ctypes.data
        plan[pool.PLAN_QUEUES + number] = chunks.queues.ctypes.data
    plan[pool.PLAN_LAYOUT :] = fields
    return BoundProduct(plan, workers, layout.partials, pool, (layout, task, phases))


def task_of(layout: Any, kind: str, size: int) -> Any:
    """Compile (or load from numba's cache) the kernel of a layout.

    Args:
        layout: a compact, paper or csr layout.
        kind: `vector`, or `columns` for several right-hand sides.
        size: bytes of a value.
    """
    from hbp_spmv.calibration import hardware_gather
    from hbp_spmv.kernels import columns, compact, csr, paper
    from hbp_spmv.kernels.complex import complex_task

    name = type(layout).__name__
    if name == "PaperLayout":
        return paper.paper_task(size)
    variant = (size, layout.col.dtype.itemsize, int(layout.uniform))
    if layout.val.dtype.kind == "c":
        return complex_task(size // 2, *variant[1:])
    if kind == "columns":
        if name == "RowLayout":
            return columns.csr_columns_task(*variant)
        return columns.compact_columns_task(layout.lanes, *variant)
    gather = int(hardware_gather())
    if name == "RowLayout":
        ahead = int(layout.nbytes > 2 * cpu_info().l2_bytes > 0)
        return csr.csr_task(layout.lanes, *variant, gather, ahead)
    return compact.compact_task(layout.lanes, *variant, gather)


def bind_matrix(
    stored: Any, kind: str, workers: int, dtype: np.dtype, fixed_share: float
) -> Callable:
    """Return `product(x, y, alpha=1, beta=0, columns=1)` for a stored matrix."""
    if isinstance(stored, ScipyLayout):

        def product(
            x: NDArray, y: NDArray, alpha: float = 1.0, beta: float = 0.0, columns: int = 1
        ) -> None:
            shape = (-1, columns) if kind == "columns" else (-1,)
            stored.multiply(x.reshape(shape), y.reshape(shape), alpha, beta)

        return product
    if 0 in stored.shape or stored.nnz == 0:
        return _empty_product
    return bind(stored, task_of(stored, kind, dtype.itemsize), workers, fixed_share=fixed_share)


def _empty_product(
    x: NDArray, y: NDArray, alpha: float = 1.0, beta: float = 0.0, columns: int = 1
) -> None:
    if beta == 0:
        y[...] = 0
    else:
        y *= beta
