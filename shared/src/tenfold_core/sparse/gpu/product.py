# SPDX-License-Identifier: Apache-2.0
"""Products of grouped rows by the CUDA kernels of ``grouped.cu``: bound once, then only launched.

A product allocates nothing once it has run on a stream, reads no result on the host and launches
one kernel, or two if rows are split; it can be captured in a CUDA graph. Partial sums and the
ticket of the strip kernel belong to a stream, so one matrix may be multiplied on several at once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from tenfold_core.errors import InputError
from tenfold_core.sparse.gpu.layout import WARP, GroupedRows
from tenfold_core.sparse.gpu.rows import column_chunks
from tenfold_core.sparse.gpu.runtime import Runtime

__all__ = ["GroupedProduct"]

SOURCE = Path(__file__).with_name("grouped.cu")
THREADS = 256
STRIP_THREADS = 512
UNIT = 64
"""Groups of a unit of the strip kernel: four for each warp of a block."""
FIXED_SHARE = 0.8
"""Part of the work that strip blocks own by default; the rest is drawn by ticket."""


@dataclass(frozen=True, slots=True)
class _Strips:
    """What the strip kernel needs beside the matrix."""

    units: int
    blocks: int
    shared: int
    runs: Any
    unit_group: Any
    unit_strip: Any


class GroupedProduct:
    """The product of one matrix; call it with contiguous arrays of the matrix's type.

    Args:
        matrix: The matrix, its arrays on the device of ``runtime``.
        runtime: What compiles and launches.
        local_x: With strips, whether blocks keep their strip of x in shared memory; by default if
            it fits.
        fixed_share: With strips, part of the work that blocks own; the rest is drawn by ticket.

    Raises:
        InputError: The arrays contradict each other.
    """

    def __init__(
        self,
        matrix: GroupedRows,
        runtime: Runtime,
        *,
        local_x: bool | None = None,
        fixed_share: float = FIXED_SHARE,
    ) -> None:
        matrix.check()
        self.matrix, self.runtime = matrix, runtime
        self.dtype = np.dtype(matrix.val.dtype)
        self._num_partials = matrix.num_partials
        self._workspace: dict[tuple[int, int], tuple[Any, Any]] = {}
        self._kernels: dict[int, Any] = {}
        fits = matrix.strip_width * self.dtype.itemsize <= runtime.shared_bytes
        self._local_x = fits if local_x is None else local_x and fits
        self._strips = (
            _strips(matrix, runtime, local=self._local_x, fixed_share=fixed_share)
            if matrix.strip_width
            else None
        )
        self._split = int(matrix.split_rows.shape[0])
        mean = self._num_partials / max(self._split, 1)
        self._combine_lanes = 1 if mean <= 4 else 4 if mean <= 32 else WARP
        self._blocks, self._counts = self._grid()
        self._load(1)

    def __call__(
        self, x: Any, y: Any, alpha: float = 1.0, beta: float = 0.0, columns: int = 1
    ) -> None:
        """Launch ``y = alpha A x + beta y`` on the current stream.

        Shapes: ``x`` (columns of A,) -> ``y`` (rows,), or flat and row-major if ``columns`` > 1.
        """
        self._run(self._memory(columns), x, y, alpha, beta, columns)

    def bind(
        self, x: Any, y: Any, alpha: float = 1.0, beta: float = 0.0, columns: int = 1
    ) -> Callable[[], None]:
        """Return the product with memory of its own, ready to be captured in a CUDA graph.

        It runs once into a copy of ``y``, so that all kernels are compiled and loaded.
        """
        memory = self._allocated(columns)
        self._run(memory, x, y.copy(), alpha, beta, columns)
        return partial(self._run, memory, x, y, alpha, beta, columns)

    def _run(
        self, memory: tuple[Any, Any], x: Any, y: Any, alpha: float, beta: float, columns: int
    ) -> None:
        sums, ticket = memory
        one, two = self.dtype.type(alpha), self.dtype.type(beta)
        if columns == 1:
            self._launch(x, y, sums, ticket, one, two, 1, 1)
            return
        for first, width in column_chunks(columns):
            part = None if sums is None else sums[first:]
            self._launch(x[first:], y[first:], part, ticket, one, two, columns, width)

    def _launch(
        self, x: Any, y: Any, sums: Any, ticket: Any, alpha: Any, beta: Any, stride: int,
        width: int,
    ) -> None:  # fmt: skip
        a, kernels = self.matrix, self._load(width)
        if self._strips is not None and stride == 1:
            self._launch_strips(kernels, x, y, sums, ticket, alpha, beta)
            first_groups = 0
        else:
            first_groups = self._blocks[0]
        blocks = first_groups + self._blocks[1] + self._blocks[2]
        if blocks:
            groups, segments, empties = self._counts
            kernels["grouped_product"](
                (blocks,), (THREADS,),
                (
                    x, y, sums, alpha, beta, np.uint32(stride), np.uint32(a.shape[0]), groups,
                    segments, empties, np.uint32(first_groups), np.uint32(self._blocks[1]),
                    a.start, a.lengths, a.targets, a.group_base, a.segment_start,
                    a.segment_target, a.segment_base, a.empty_rows, a.col, a.val,
                ),
            )  # fmt: skip
        if self._split or (self._strips is not None and stride == 1):
            threads = self._split * self._combine_lanes
            kernels["combine_parts"](
                (max(1, -(-threads // THREADS)),), (THREADS,),
                (
                    y, sums, alpha, beta, np.uint32(stride), np.uint32(self._split),
                    np.uint32(self._combine_lanes), a.split_rows, a.split_start, ticket,
                ),
            )  # fmt: skip

    def _launch_strips(
        self, kernels: Any, x: Any, y: Any, sums: Any, ticket: Any, alpha: Any, beta: Any
    ) -> None:
        a, strips = self.matrix, self._strips
        assert strips is not None
        kernels["strip_product"](
            (strips.blocks,), (STRIP_THREADS,),
            (
                x, y, sums, alpha, beta, np.uint32(a.shape[0]), np.uint32(a.shape[1]),
                np.uint32(a.strip_width), np.uint32(strips.units), strips.runs, strips.unit_group,
                strips.unit_strip, ticket, a.start, a.lengths, a.targets, a.group_base, a.col,
                a.val,
            ),
            shared_mem=strips.shared,
        )  # fmt: skip

    def _grid(self) -> tuple[tuple[int, int, int], tuple[Any, Any, Any]]:
        a, warps = self.matrix, THREADS // WARP
        sizes = [len_(a.group_base), len_(a.segment_target), len_(a.empty_rows)]
        per_block = [warps, warps, THREADS]
        blocks = tuple(-(-size // each) for size, each in zip(sizes, per_block, strict=True))
        return blocks, tuple(np.uint32(size) for size in sizes)  # type: ignore[return-value]

    def _memory(self, columns: int) -> tuple[Any, Any]:
        """Return partial sums and ticket of the current stream, allocated on first use."""
        stream = self.runtime.stream()
        found = self._workspace.get((stream, columns))
        if found is None:
            found = self._workspace[stream, columns] = self._allocated(columns)
        return found

    def _allocated(self, columns: int) -> tuple[Any, Any]:
        if not self._num_partials and self._strips is None:
            return None, None
        xp = self.runtime.xp
        return xp.empty(max(self._num_partials * columns, 1), self.dtype), xp.zeros(1, np.uint32)

    def _load(self, columns: int) -> Any:
        if columns not in self._kernels:
            a = self.matrix
            macros = {
                "VALUE": {"float32": "float", "float64": "double"}[self.dtype.name],
                "INDEX": {"uint16": "u16", "uint32": "unsigned"}[np.dtype(a.col.dtype).name],
                "PACK": a.pack,
                "UNIFORM": int(a.uniform),
                "COLUMNS": columns,
                "LOCAL_X": int(self._local_x),
            }
            names = ["grouped_product", "combine_parts"]
            if a.strip_width and columns == 1:
                names.append("strip_product")
            found = self.runtime.kernels(SOURCE, names, macros)
            if "strip_product" in found and self._strips is not None:
                _allow_shared(found["strip_product"], self._strips.shared)
            self._kernels[columns] = found
        return self._kernels[columns]


def len_(array: Any) -> int:
    """Return the length of an array of any library."""
    return int(array.shape[0])


def _allow_shared(kernel: Any, size: int) -> None:
    """Let a kernel use more shared memory than the 48 KiB that need no permission."""
    if size > 48 << 10 and hasattr(kernel, "max_dynamic_shared_size_bytes"):
        kernel.max_dynamic_shared_size_bytes = size


def _strips(matrix: GroupedRows, runtime: Runtime, *, local: bool, fixed_share: float) -> _Strips:
    """Cut the groups of all strips into units and the units into runs of equal work."""
    xp = runtime.xp
    if matrix.strip_groups is None:
        raise InputError("grouped rows: strip_width is set and strip_groups is missing")
    edges = _host(matrix.strip_groups)
    start = _host(matrix.start)
    first, owner = [], []
    for strip, (begin, end) in enumerate(pairwise(edges)):
        tops = np.arange(begin, end, UNIT)
        first.append(tops)
        owner.append(np.full(len(tops), strip))
    unit_group = np.append(np.concatenate(first or [[]]), edges[-1]).astype(np.uint32)
    units = len(unit_group) - 1
    blocks = max(1, min(runtime.processors, units))
    done = np.append(0, np.cumsum(np.diff(start[unit_group.astype(np.int64)]) + 4 * WARP))
    goals = fixed_share * done[-1] * np.arange(blocks + 1) / blocks
    runs = np.searchsorted(done, goals, side="left").astype(np.uint32)
    shared = matrix.strip_width * np.dtype(matrix.val.dtype).itemsize if local else 0
    return _Strips(
        units=units,
        blocks=blocks,
        shared=shared,
        runs=xp.asarray(np.minimum(runs, units).astype(np.uint32)),
        unit_group=xp.asarray(unit_group),
        unit_strip=xp.asarray(np.concatenate(owner or [[]]).astype(np.uint32)),
    )


def _host(array: Any) -> np.ndarray:
    return np.asarray(array.get() if hasattr(array, "get") else array)
