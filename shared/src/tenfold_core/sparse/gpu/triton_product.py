# SPDX-License-Identifier: Apache-2.0
"""Products of grouped rows by Triton kernels, for hosts with torch and triton but without CuPy.

The twin of :mod:`tenfold_core.sparse.gpu.product`; the import needs neither torch nor triton.
"""

import struct
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from tenfold_core.errors import InputError, MissingExtraError
from tenfold_core.sparse.gpu.layout import WARP, GroupedRows
from tenfold_core.sparse.gpu.rows import column_chunks

__all__ = ["TritonProduct", "to_torch"]

TILE = 4
"""Groups of a program, which has as many warps."""
OPTIONS = {"num_warps": TILE, "enable_fp_fusion": False}  # what is to be fused is written so


class TritonProduct:
    """The product of one matrix; call it with contiguous tensors of the matrix's type.

    A product allocates nothing once it has run on a stream, reads no result on the host and
    launches one kernel, or two if rows are split. Partial sums belong to a stream, or to the CUDA
    graph being captured, so one matrix may be multiplied on several at once. The first call with so
    many columns compiles and loads the kernels: it has to come before a capture, or :meth:`bind`.

    Args:
        matrix: The matrix as tensors of one device, see :func:`to_torch`.

    Raises:
        InputError: The arrays contradict each other, or lie where no kernel can read them.
        MissingExtraError: torch or triton is not installed.
    """

    def __init__(self, matrix: GroupedRows) -> None:
        matrix.check()
        self._kernels = _kernels(matrix.val.device)
        self.matrix = matrix
        self.device = matrix.val.device
        self._num_partials = matrix.num_partials
        self._workspace: dict[tuple[int, int], Any] = {}
        self._split = int(matrix.split_rows.shape[0])
        mean = self._num_partials / max(self._split, 1)
        self._combine_lanes = 1 if mean <= 4 else 4 if mean <= 32 else WARP
        a = matrix
        self._counts = [int(b.shape[0]) for b in (a.group_base, a.segment_target, a.empty_rows)]
        groups, segments, empties = self._counts
        self._programs = -(-groups // TILE) - (-segments // TILE) - (-empties // (TILE * WARP))

    def __call__(
        self, x: Any, y: Any, alpha: float = 1.0, beta: float = 0.0, columns: int = 1
    ) -> None:
        """Launch ``y = alpha A x + beta y`` on the current stream.

        Shapes: ``x`` (columns of A,) -> ``y`` (rows,), or flat and row-major if ``columns`` > 1.
        """
        with self._on_device():
            self._run(self._memory(columns), x, y, alpha, beta, columns)

    def bind(
        self, x: Any, y: Any, alpha: float = 1.0, beta: float = 0.0, columns: int = 1
    ) -> Callable[[], None]:
        """Return the product with memory of its own, ready to be captured in a CUDA graph.

        It runs once into a copy of ``y``, so that all kernels are compiled and loaded.
        """
        with self._on_device():
            sums = self._allocated(columns)
            self._run(sums, x, y.clone(), alpha, beta, columns)

        def run() -> None:
            with self._on_device():
                self._run(sums, x, y, alpha, beta, columns)

        return run

    def _run(self, sums: Any, x: Any, y: Any, alpha: float, beta: float, columns: int) -> None:
        factors = _bits(alpha), _bits(beta)
        for first, width in column_chunks(columns):
            part = y if sums is None else sums[first:]  # something to point to
            self._launch(x[first:], y[first:], part, factors, columns, width)

    def _launch(
        self, x: Any, y: Any, sums: Any, factors: tuple[int, int], stride: int, width: int
    ) -> None:
        a = self.matrix
        if self._programs:
            self._kernels.grouped_product[(self._programs,)](
                x, y, sums, *factors, stride, a.shape[0], *self._counts,
                a.start, a.lengths, a.targets, a.group_base, a.segment_start, a.segment_target,
                a.segment_base, a.empty_rows, a.col, a.val,
                PACK=a.pack, UNIFORM=a.uniform, COLUMNS=width, TILE=TILE, **OPTIONS,
            )  # fmt: skip
        if self._split:
            tile = TILE * WARP // self._combine_lanes
            self._kernels.combine_parts[(-(-self._split // tile),)](
                y, sums, *factors, stride, self._split, a.split_rows, a.split_start,
                LANES=self._combine_lanes, COLUMNS=width, TILE=tile, **OPTIONS,
            )  # fmt: skip

    def _on_device(self) -> AbstractContextManager[Any]:
        """Make the matrix's device the current one, which is where triton launches."""
        if self.device.type != "cuda":
            return nullcontext()
        import torch

        return torch.cuda.device(self.device)

    def _memory(self, columns: int) -> Any:
        """Return partial sums of the current stream, or of the graph that is being captured."""
        stream = 0
        if self.device.type == "cuda":
            import torch

            if torch.cuda.is_current_stream_capturing():
                return self._allocated(columns)
            stream = torch.cuda.current_stream().cuda_stream
        if (stream, columns) not in self._workspace:
            self._workspace[stream, columns] = self._allocated(columns)
        return self._workspace[stream, columns]

    def _allocated(self, columns: int) -> Any:
        if not self._num_partials:
            return None
        return self.matrix.val.new_empty(self._num_partials * columns)


def to_torch(matrix: GroupedRows, device: str = "cuda") -> GroupedRows:
    """Return a matrix of NumPy arrays as tensors of a device, unsigned numbers as signed bits."""
    import torch

    def convert(array: np.ndarray) -> Any:
        signed = array.view(f"i{array.itemsize}") if array.dtype.kind == "u" else array
        return torch.tensor(signed, device=device)

    return matrix.moved(convert)


def _kernels(device: Any) -> Any:
    try:
        from tenfold_core.sparse.gpu import triton_kernels
    except ImportError as error:
        raise MissingExtraError(
            f"products on {device} without CuPy need torch and triton: pip install torch triton"
        ) from error
    if device.type == "cpu" and not triton_kernels.INTERPRETED:
        raise InputError(
            "grouped rows: the arrays lie on cpu, expected a CUDA device; on a CPU the kernels run "
            "in triton's interpreter alone, with TRITON_INTERPRET=1 set before its import"
        )
    return triton_kernels


def _bits(factor: float) -> int:
    """Return the bits of a float64 number as a signed integer."""
    return struct.unpack("q", struct.pack("d", factor))[0]
