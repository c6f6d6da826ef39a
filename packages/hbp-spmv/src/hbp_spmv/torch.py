# SPDX-License-Identifier: Apache-2.0
"""The product as a differentiable torch operator; the only module that imports torch."""

from typing import Any

import numpy as np
import torch
from tenfold_core.errors import InputError

from hbp_spmv.matrix import HBPMatrix

__all__ = ["spmv"]


def spmv(matrix: HBPMatrix, x: torch.Tensor, values: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply with gradients: `grad_x = A.T @ g` and, if given, `grad_values = g[row] * x[col]`.

    Args:
        matrix: the matrix A.
        x: operand, (columns,) or (columns, k), on the CPU, of the matrix's type.
        values: values to use instead of the matrix's, in the order of `matrix.to_csr().data`, (nnz,);
            the matrix must be built with `keep_perm=True` (layout csr needs no permutation).

    Returns:
        `A @ x`, (rows,) or (rows, k).

    Raises:
        InputError: a shape, type or device does not fit.
    """
    if x.device.type != "cpu":
        raise InputError(f"x lies on {x.device}, the matrix on the CPU; use x.cpu()")
    if values is not None and values.shape != (matrix.nnz,):
        raise InputError(f"values have shape {tuple(values.shape)}, expected ({matrix.nnz},)")
    return _SpMV.apply(x, values, matrix)


class _SpMV(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, values: torch.Tensor | None, matrix: HBPMatrix
    ) -> torch.Tensor:
        if values is not None:
            matrix = matrix.update_values(values.detach().numpy())
        ctx.matrix = matrix
        ctx.save_for_backward(x)
        return torch.from_numpy(np.asarray(matrix @ x.detach().numpy()))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        grad_x = grad_values = None
        g = gradient.detach().contiguous()
        if ctx.needs_input_grad[0]:
            grad_x = torch.from_numpy(np.asarray(ctx.matrix.rmatvec(g.numpy())))
        if ctx.needs_input_grad[1]:
            pattern = ctx.matrix.to_csr()
            rows = np.repeat(np.arange(pattern.shape[0]), np.diff(pattern.indptr))
            products = g[torch.from_numpy(rows)] * x.detach()[torch.from_numpy(pattern.indices)]
            grad_values = products if products.ndim == 1 else products.sum(dim=1)
        return grad_x, grad_values, None
