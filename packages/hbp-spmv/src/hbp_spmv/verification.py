# SPDX-License-Identifier: Apache-2.0
"""Check a product row by row against an exactly rounded one."""

from dataclasses import dataclass
from typing import Any

from tenfold_core.errors import ConfigError, InputError
from tenfold_core.run.seeds import generator
from tenfold_core.sparse import CSR, componentwise_bound, error_over_bound, reference_product

from hbp_spmv.building import canonical
from hbp_spmv.errors import VerificationError
from hbp_spmv.matrix import HBPMatrix

__all__ = ["Verification", "verify"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What the trials found."""

    trials: int
    worst: float
    """Largest error as a multiple of its componentwise bound; at most 1."""
    row: int
    """Row of the largest error, -1 if there are no rows."""


def verify(matrix: HBPMatrix, a: Any, *, trials: int = 3, seed: int = 0) -> Verification:
    """Multiply random vectors and compare every component with its error bound.

    x is standard normal, never constant: a wrong permutation or column must show.

    Args:
        matrix: the matrix to check.
        a: the matrix it was built from.
        trials: number of random vectors.
        seed: seed of the vectors.

    Raises:
        VerificationError: a component leaves its bound; names row, got, want and bound.
        InputError: the shapes differ.
        ConfigError: there are no trials.
    """
    if trials < 1:
        raise ConfigError(f"trials: expected at least 1, got {trials}")
    a = canonical(a, matrix.dtype)
    if a.shape != matrix.shape:
        raise InputError(f"matrix has shape {matrix.shape}, the one to compare with {a.shape}")
    reference = CSR.from_scipy(a)
    rng = generator(seed, "verify")
    worst, worst_row = 0.0, -1
    for _ in range(trials):
        x = rng.standard_normal(matrix.shape[1]).astype(matrix.dtype)
        y = matrix @ x
        exact = reference_product(reference, x)
        ratio, row = error_over_bound(y, reference, x, exact=exact)
        if not ratio <= 1:
            bound = componentwise_bound(reference, x)[row]
            raise VerificationError(
                f"row {row}: got {y[row]!s}, want {exact[row]!s} within {bound:.3g} "
                f"(error is {ratio:.3g} times the bound); the stored matrix differs from its source"
            )
        if ratio >= worst:
            worst, worst_row = ratio, row
    return Verification(trials=trials, worst=worst, row=worst_row)
