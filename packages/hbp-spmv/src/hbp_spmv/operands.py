# SPDX-License-Identifier: Apache-2.0
"""What a matrix accepts as x, out and values: checked shapes, exact conversions, clear refusals."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import issparse
from tenfold_core.errors import InputError

__all__ = ["accepts", "as_factor", "as_operand", "as_values"]


def as_operand(x: Any, columns: int, dtype: np.dtype) -> NDArray:
    """Return x as a contiguous array of the matrix's type, or of the complex type beside it.

    Args:
        x: operand, (columns,) or (columns, k).
        columns: columns of the matrix.
        dtype: type of the matrix.

    Raises:
        InputError: x has another shape, is not numeric, lies on a GPU, or would lose digits.
    """
    if hasattr(x, "__cuda_array_interface__"):
        raise InputError("x lies on a CUDA device, the matrix on the CPU; copy x to the host")
    if issparse(x) or hasattr(x, "to_csr"):
        raise InputError("x is a sparse matrix, expected a dense array; multiply H.to_csr() by it")
    x = np.asarray(x)
    if x.ndim not in (1, 2) or x.shape[0] != columns:
        raise InputError(f"x has shape {x.shape}, expected ({columns},) or ({columns}, k)")
    if x.dtype.kind not in "biufc":
        raise InputError(f"x has dtype {x.dtype}, expected numbers")
    target: Any = dtype
    if x.dtype.kind == "c" and dtype.kind != "c":
        target = np.dtype(np.complex64 if dtype == np.float32 else np.complex128)
    if loss := _loss("x", x, target):
        raise InputError(f"x has dtype {x.dtype}, the matrix {dtype}: {loss}")
    return np.require(x, target, ["C", "ALIGNED", "WRITEABLE"])  # else a copy


def as_values(values: Any, nnz: int, dtype: np.dtype) -> NDArray:
    """Return a copy of new values of a matrix in the matrix's type.

    Raises:
        InputError: they have another shape, are not numeric, or would lose digits.
    """
    values = np.asarray(values)
    if values.shape != (nnz,):
        raise InputError(f"values have shape {values.shape}, expected ({nnz},)")
    if values.dtype.kind not in ("biufc" if dtype.kind == "c" else "biuf"):
        raise InputError(f"values have dtype {values.dtype}, expected {dtype}")
    if loss := _loss("values", values, dtype):
        raise InputError(f"values have dtype {values.dtype}, expected {dtype}: {loss}")
    return values.astype(dtype)


def _loss(name: str, array: NDArray, dtype: np.dtype) -> str:
    """Say what a conversion to `dtype` would round, and what to do; empty if it is exact."""
    kind, target = array.dtype.kind, np.finfo(dtype)
    if kind in "fc" and np.finfo(array.dtype).eps < target.eps:
        finer = np.finfo(array.dtype).dtype.name
        remedy = f", or build with dtype={finer!r}" if finer == "float64" else ""
        return f"digits would be lost; convert {name}{remedy}"
    exact = 2 << target.nmant
    if kind in "iu" and array.size and max(int(array.max()), -int(array.min())) > exact:
        return f"an integer exceeds {exact} and would be rounded; scale or convert {name}"
    return ""


def as_factor(name: str, value: Any, dtype: np.dtype) -> complex:
    """Return alpha or beta as a Python number, a float unless its imaginary part needs more.

    Raises:
        InputError: a complex factor for a real matrix.
    """
    if not np.iscomplexobj(value):
        return float(value)
    if dtype.kind != "c":
        raise InputError(f"{name} is {value}, expected a real number for a matrix of {dtype}")
    return complex(value) if value.imag else float(value.real)


def accepts(out: NDArray | None, shape: tuple[int, ...], dtype: np.dtype) -> bool:
    """Tell whether a kernel can write straight into `out`.

    Raises:
        InputError: `out` is not a writable array of that shape that holds the type.
    """
    if out is None:
        return False
    if not isinstance(out, np.ndarray):
        raise InputError(f"out is a {type(out).__name__}, expected a NumPy array of shape {shape}")
    if out.shape != shape:
        raise InputError(f"out has shape {out.shape}, expected {shape}")
    if not out.flags.writeable:
        raise InputError("out is read-only; pass a writable array")
    if not np.can_cast(dtype, out.dtype, "same_kind"):
        raise InputError(f"out has dtype {out.dtype}, expected {dtype}")
    return out.dtype == dtype and out.flags.c_contiguous
