# SPDX-License-Identifier: Apache-2.0
"""The published product on a CUDA device: 256 warps, strips of x in shared memory, then a ticket.

"A Nonlinear Hash-based Optimization Method for SpMV on GPUs", CCGrid 2025, arXiv 2504.08860. The
kernels are in `kernels/cuda/paper.cu`; they read the six arrays of `method.PaperLayout`, whose
building needs numba, unlike this module.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tenfold_core.errors import InputError
from tenfold_core.sparse.gpu import Runtime

from hbp_spmv.schedule import FIXED_SHARE, cut

if TYPE_CHECKING:
    from hbp_spmv.method import PaperLayout

__all__ = ["LOCAL_WIDTH", "NAMES", "SOURCE", "WARPS", "PaperProduct", "macros"]

SOURCE = Path(__file__).parent / "kernels" / "cuda" / "paper.cu"
NAMES = ("paper_product", "paper_combine")
WARPS = 256
"""Blocks of one warp each: the published 8192 threads."""
LOCAL_WIDTH = 4096
"""Widest strip of x that a warp keeps in shared memory: 32 KiB in float64."""
LANES, THREADS = 32, 256


def macros(data: np.dtype, begin_ptr: np.dtype, width: int) -> dict[str, str | int]:
    """Return the macros that `paper.cu` is compiled with."""
    return {
        "VALUE": {"float32": "float", "float64": "double"}[data.name],
        "POINTER": {"int32": "int", "int64": "i64"}[begin_ptr.name],
        "LOCAL_X": int(width <= LOCAL_WIDTH),
    }


class PaperProduct:
    """The product of one matrix in the published layout, for one stream at a time.

    Args:
        layout: The six arrays, on the host; its groups have the 32 rows of a warp.
        runtime: What compiles and launches.
        fixed_share: Share of the work in fixed runs: 1 leaves nothing to the ticket, 0 everything.

    Raises:
        InputError: The groups are no warps.
    """

    def __init__(
        self, layout: "PaperLayout", runtime: Runtime, *, fixed_share: float = FIXED_SHARE
    ) -> None:
        if layout.lanes != LANES:
            raise InputError(
                f"layout paper: groups of {layout.lanes} rows, expected {LANES}, a warp; build it "
                f"with lanes={LANES}"
            )
        xp, arrays = runtime.xp, layout.arrays()
        self.dtype = arrays["data"].dtype
        self._kernels = runtime.kernels(
            SOURCE, NAMES, macros(self.dtype, arrays["begin_ptr"].dtype, layout.width)
        )
        tasks, runs = _allocate(layout, fixed_share)
        self.tasks = len(tasks)
        rows, columns = layout.shape
        self._rows = rows
        # Zeros: no task writes the part of a block without nonzeros.
        self._mid = xp.zeros(max(rows * layout.strips, 1), self.dtype)
        self._ticket = xp.zeros(1, np.uint32)
        block_rows = -(-rows // layout.height)
        sizes = (rows, columns, layout.height, layout.width, layout.strips, block_rows, len(tasks))
        names = ("begin_ptr", "zero_row", "output_hash", "col", "data", "add_sign")
        self._product = (
            *map(np.uint32, sizes), xp.asarray(runs), xp.asarray(tasks), self._ticket,
            *(xp.asarray(np.ascontiguousarray(arrays[name])) for name in names),
        )  # fmt: skip
        self._combine = (*map(np.uint32, (rows, layout.height, layout.strips)), self._ticket)
        local = layout.width <= LOCAL_WIDTH
        self._shared = layout.width * self.dtype.itemsize if local else 0
        self.notes = (
            f"{WARPS} warps, {len(tasks)} of {block_rows * layout.strips} blocks, "
            f"x in {'shared' if local else 'global'} memory, mid of {self._mid.nbytes} bytes beside"
        )

    def __call__(self, x: Any, y: Any, alpha: float = 1.0, beta: float = 0.0) -> None:
        """Launch `y = alpha A x + beta y` on the current stream; it allocates nothing.

        Shapes: ``x`` (columns,) -> ``y`` (rows,), contiguous, of the matrix's type.
        """
        if self._rows == 0:
            return
        if self.tasks:
            self._kernels["paper_product"](
                (WARPS,), (LANES,), (x, self._mid, *self._product), shared_mem=self._shared
            )
        factors = (self.dtype.type(alpha), self.dtype.type(beta))
        self._kernels["paper_combine"](
            (-(-self._rows // THREADS),), (THREADS,), (y, self._mid, *factors, *self._combine)
        )


def _allocate(
    layout: "PaperLayout", fixed_share: float
) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Return the blocks with nonzeros in strip-major order, and the first of each warp's run.

    One entry more: the first block that is drawn by ticket.
    """
    if layout.nnz == 0:
        return np.empty(0, np.uint32), np.zeros(WARPS + 1, np.uint32)
    begin_ptr = layout.arrays()["begin_ptr"]
    rows = layout.shape[0]
    tops = np.arange(0, rows, layout.height)
    groups = -(-np.minimum(layout.height, rows - tops) // layout.lanes)
    edges = np.concatenate([[0], np.cumsum(np.repeat(groups, layout.strips))])
    nonzeros = np.diff(begin_ptr[edges].astype(np.int64)).reshape(-1, layout.strips).T.ravel()
    tasks = np.flatnonzero(nonzeros)
    chunks = cut(layout.work()[0][tasks], WARPS, fixed_share=fixed_share)
    return tasks.astype(np.uint32), chunks.bounds[chunks.queues[: WARPS + 1]].astype(np.uint32)
