# SPDX-License-Identifier: Apache-2.0
"""The only module that imports torch: the differentiable product, and torch's own as a baseline."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array
from tenfold_core.errors import InputError

from hbp_spmv.matrix import HBPMatrix

__all__ = ["as_array", "csr_product", "spmv"]


def spmv(matrix: HBPMatrix, x: torch.Tensor, values: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply with gradients: `A.conj().T @ g` for x, `g[row] * conj(x[col])` for values.

    Second derivatives work as well.

    Args:
        matrix: the matrix A.
        x: operand, (columns,) or (columns, k), on the matrix's device and of its type.
        values: values instead of the matrix's, in the order of `matrix.to_csr().data`, (nnz,);
            the matrix must be built with `keep_perm=True` (layout csr needs no permutation).

    Returns:
        `A @ x`, (rows,) or (rows, k).

    Raises:
        InputError: a shape, type or device does not fit.
    """
    if matrix.device == "cpu":
        as_array(x)
    if values is not None and values.shape != (matrix.nnz,):
        raise InputError(f"values have shape {tuple(values.shape)}, expected ({matrix.nnz},)")
    return _SpMV.apply(x, values, matrix)


def as_array(x: torch.Tensor, name: str = "x") -> NDArray:
    """Return a tensor's values as a NumPy array, shared where that is possible.

    Raises:
        InputError: the tensor lies on a GPU, or NumPy has no such type or layout.
    """
    if x.device.type != "cpu":
        raise InputError(f"{name} lies on {x.device}, the matrix on the CPU; use {name}.cpu()")
    try:
        return x.detach().resolve_conj().resolve_neg().numpy()
    except (TypeError, RuntimeError):
        raise InputError(
            f"{name} is a tensor of {x.dtype} ({x.layout}), which NumPy does not know; convert it"
        ) from None


class _SpMV(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, values: torch.Tensor | None, matrix: HBPMatrix
    ) -> torch.Tensor:
        if values is not None:
            on_cpu = matrix.device == "cpu"
            new = as_array(values, "values") if on_cpu else values.detach()
            matrix = matrix.update_values(new)
            ctx.save_for_backward(x, values)
        ctx.matrix = matrix
        ctx.x_is_complex = x.is_complex()
        if matrix.device == "cpu":
            return torch.from_numpy(np.asarray(matrix @ as_array(x)))
        return matrix @ x.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = gradients
        saved: Any = ctx.saved_tensors or (None, None)
        x, values = saved
        twice = torch.is_grad_enabled()  # the gradient is itself to be differentiated
        grad_x: Any = None
        grad_values: Any = None
        rows: Any = None
        cols: Any = None
        if values is not None and (twice or ctx.needs_input_grad[1]):
            rows, cols = (part.to(gradient.device) for part in _coordinates(ctx.matrix))
        if ctx.needs_input_grad[0]:
            if values is not None and twice:
                factors = values.conj() if gradient.ndim == 1 else values.conj()[:, None]
                zeros = gradient.new_zeros(ctx.matrix.shape[1], *gradient.shape[1:])
                grad_x = zeros.index_add(0, cols, factors * gradient[rows])
            else:  # A.conj().T @ g
                grad_x = _SpMV.apply(gradient.conj(), None, ctx.matrix.T).conj().resolve_conj()
            grad_x = grad_x if ctx.x_is_complex else grad_x.real
        if ctx.needs_input_grad[1]:
            grad_values = gradient[rows] * x[cols].conj()
            grad_values = grad_values if grad_values.ndim == 1 else grad_values.sum(dim=1)
            grad_values = grad_values if values.is_complex() else grad_values.real
        return grad_x, grad_values, None


def _coordinates(matrix: HBPMatrix) -> tuple[torch.Tensor, torch.Tensor]:
    """Return row and column of each entry in the order of `to_csr()`."""
    pattern = matrix.to_csr()
    rows = np.repeat(np.arange(pattern.shape[0]), np.diff(pattern.indptr))
    return torch.from_numpy(rows), torch.from_numpy(pattern.indices.astype(np.int64))


def csr_product(
    a: csr_array, *, index: type, threads: int
) -> tuple[Callable[[NDArray, NDArray], None], Callable[[NDArray], Callable[[], Any]], int]:
    """Return torch's `multiply(x, y)` for a CSR matrix, its `bind(x)`, and the bytes it stores.

    torch's thread count is process-wide; `multiply` sets it for the call only where it differs. A
    bound product is what a user of torch calls, tensors in and out, and leaves the count alone.

    Args:
        a: canonical CSR with float32 or float64 values; values are shared, not copied.
        index: np.int32, which MKL takes directly, or np.int64, torch's default.
        threads: threads of a product.

    Raises:
        InputError: the matrix is too large for int32 indices.
    """
    if index is np.int32 and max(a.nnz, *a.shape) >= 1 << 31:
        raise InputError(
            f"matrix of shape {a.shape} with {a.nnz} nonzeros: int32 indices end at 2**31"
        )
    parts = [
        torch.from_numpy(_writable(array))
        for array in (
            a.indptr.astype(index, copy=False),
            a.indices.astype(index, copy=False),
            a.data,
        )
    ]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
        matrix = torch.sparse_csr_tensor(*parts, size=a.shape, check_invariants=False)

    def multiply(x: NDArray, y: NDArray) -> None:
        before = torch.get_num_threads()
        if before != threads:
            torch.set_num_threads(threads)
        try:
            torch.mv(matrix, torch.from_numpy(_writable(x)), out=torch.from_numpy(y))
        finally:
            if before != threads:
                torch.set_num_threads(before)

    def bind(x: NDArray) -> Callable[[], Any]:
        return partial(torch.mv, matrix, torch.from_numpy(_writable(x)))

    return multiply, bind, sum(part.nbytes for part in parts)


def _writable(array: NDArray) -> NDArray:
    """Return the array, or a copy if it is read-only, which torch would warn about."""
    return array if array.flags.writeable else array.copy()
