# SPDX-License-Identifier: Apache-2.0
"""A product correct to the last bit, and the bound that every other product must keep.

The bound is Higham's for an inner product of ``k`` terms in any order (Accuracy and Stability of
Numerical Algorithms, 2nd ed., section 3.1), with two units to spare for alpha and beta.
"""

import math

import numpy as np

from tenfold_core.errors import InputError
from tenfold_core.sparse.csr import CSR

__all__ = ["componentwise_bound", "error_over_bound", "reference_product"]


def reference_product(matrix: CSR, x: np.ndarray) -> np.ndarray:
    """Return ``A @ x`` with each row summed exactly and rounded once, in float64 or complex128.

    Products are split into their float64 value and its rounding error (Veltkamp and Dekker), and
    :func:`math.fsum` adds the pieces without error. Rows that meet NaN or infinity follow IEEE.

    Shapes: ``x`` (columns,) -> (rows,).

    Raises:
        InputError: ``x`` has another length.
    """
    x = np.asarray(x)
    if x.shape != matrix.shape[1:]:
        raise InputError(f"x has shape {x.shape}, expected ({matrix.shape[1]},)")
    if "c" in (matrix.dtype.kind, x.dtype.kind):
        a, b = matrix.data.astype(np.complex128), x.astype(np.complex128)[matrix.indices]
        real = _row_sums(matrix, (a.real, b.real), (-a.imag, b.imag))
        return real + 1j * _row_sums(matrix, (a.real, b.imag), (a.imag, b.real))
    a, b = matrix.data.astype(np.float64), x.astype(np.float64)[matrix.indices]
    return _row_sums(matrix, (a, b))


def componentwise_bound(matrix: CSR, x: np.ndarray, *, unit: float | None = None) -> np.ndarray:
    """Return ``(k+2)u / (1-(k+2)u) * sum_j |a_ij| |x_j|`` for each row ``i`` of ``k`` entries.

    ``k`` times the smallest subnormal is added, which is what underflow can cost.

    Args:
        matrix: The matrix of the product.
        x: Its right-hand side.
        unit: Unit roundoff ``u`` of the arithmetic; by default that of the result's dtype.
    """
    x = np.asarray(x)
    dtype = np.result_type(matrix.dtype, x.dtype, np.float32)
    limits = np.finfo(dtype)
    u = float(limits.eps) / 2 if unit is None else unit
    terms = matrix.row_lengths() + 2.0
    if dtype.kind == "c":
        terms += 2  # a complex product is two real ones and an addition
    magnitude = np.zeros(matrix.shape[0])
    with np.errstate(invalid="ignore", over="ignore"):
        pieces = (
            np.abs(matrix.data).astype(np.float64) * np.abs(x).astype(np.float64)[matrix.indices]
        )
        filled = np.flatnonzero(matrix.row_lengths())
        if filled.size:
            magnitude[filled] = np.add.reduceat(pieces, matrix.indptr[filled])
        gamma = terms * u / (1 - terms * u)
        return gamma * magnitude + terms * float(limits.smallest_subnormal)


def error_over_bound(
    y: np.ndarray,
    matrix: CSR,
    x: np.ndarray,
    *,
    exact: np.ndarray | None = None,
    bound: np.ndarray | None = None,
) -> tuple[float, int]:
    """Return the largest error as a multiple of its bound, and the row where it occurs.

    At most 1 is a pass. Rows whose exact value is NaN or infinite must match it and count as 0
    or infinity. An empty result gives ``(0.0, -1)``.

    Args:
        y: The result to judge.
        matrix: The matrix of the product.
        x: Its right-hand side.
        exact: The product rounded once, if it is known already.
        bound: The bound of each row for the type of ``y``, if it is known already.
    """
    exact = reference_product(matrix, x) if exact is None else exact
    y = np.asarray(y)
    if y.shape != exact.shape:
        raise InputError(f"y has shape {y.shape}, expected {exact.shape}")
    if not y.size:
        return 0.0, -1
    if bound is None:
        bound = componentwise_bound(matrix, x, unit=float(np.finfo(y.dtype).eps) / 2)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        error = np.abs(y - exact)
        ratio = np.where(error == 0, 0.0, error / bound)
    same = (y == exact) | (np.isnan(y) & np.isnan(exact))
    special = ~np.isfinite(exact)
    ratio = np.where(special, np.where(same, 0.0, np.inf), np.where(np.isnan(ratio), np.inf, ratio))
    row = int(np.argmax(ratio))
    return float(ratio[row]), row


def _row_sums(matrix: CSR, *factors: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Sum ``a * b`` over each row, all pairs of factors together, rounding once."""
    pieces = [piece for a, b in factors for piece in _exact_products(a, b)]
    starts = matrix.indptr.tolist()
    result = np.zeros(matrix.shape[0])
    for row in range(matrix.shape[0]):
        begin, end = starts[row], starts[row + 1]
        terms = [value for piece in pieces for value in piece[begin:end].tolist()]
        try:
            result[row] = math.fsum(terms)
        except (OverflowError, ValueError):  # inf - inf, or finite terms beyond the range
            result[row] = sum(terms)
    return result


def _exact_products(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return ``h = fl(a * b)`` and ``a * b - h``, zero where splitting would overflow."""
    with np.errstate(all="ignore"):
        high = a * b
        a_high, b_high = _upper_half(a), _upper_half(b)
        a_low, b_low = a - a_high, b - b_high
        low = ((a_high * b_high - high) + a_high * b_low + a_low * b_high) + a_low * b_low
    return high, np.where(np.isfinite(low), low, 0.0)


def _upper_half(values: np.ndarray) -> np.ndarray:
    scaled = values * 134217729.0  # 2**27 + 1
    return scaled - (scaled - values)
