# SPDX-License-Identifier: Apache-2.0
"""Deterministic CSR matrices of every awkward kind, hypothesis strategies, and one assertion."""

import numpy as np
from hypothesis import strategies as st

from tenfold_core.sparse import CSR, componentwise_bound, error_over_bound, reference_product

__all__ = [
    "assert_close_to_reference",
    "awkward_matrices",
    "banded",
    "csr_from_lengths",
    "csr_matrices",
    "random_csr",
]


def csr_from_lengths(
    lengths: np.ndarray, columns: int, rng: np.random.Generator, *, dtype: str = "float64"
) -> CSR:
    """Build a canonical matrix with the given row lengths, random columns and normal values."""
    lengths = np.asarray(lengths, dtype=np.int64)
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    parts = [np.sort(rng.choice(columns, size=k, replace=False)) for k in lengths]
    indices = np.concatenate([np.zeros(0, np.int32), *parts]).astype(np.int32)
    values = rng.standard_normal(int(indptr[-1])).astype(dtype)
    return CSR((len(lengths), columns), indptr, indices, values)


def random_csr(
    rows: int,
    columns: int,
    *,
    density: float = 0.05,
    seed: int = 0,
    dtype: str = "float64",
    dense_row: int | None = None,
    dense_column: int | None = None,
    empty_every: int | None = None,
) -> CSR:
    """Build a random canonical matrix, on request with a full row, a full column or empty rows."""
    rng = np.random.default_rng(seed)
    mask = rng.random((rows, columns)) < density
    if dense_column is not None:
        mask[:, dense_column] = True
    if empty_every is not None:
        mask[::empty_every] = False
    if dense_row is not None:
        mask[dense_row] = True
    indptr = np.concatenate([[0], np.cumsum(mask.sum(axis=1))])
    indices = np.nonzero(mask)[1].astype(np.int32)
    return CSR((rows, columns), indptr, indices, rng.standard_normal(indices.size).astype(dtype))


def banded(size: int, *, half_width: int = 2, dtype: str = "float64") -> CSR:
    """Build a square band matrix with the value ``10 * row + column``, easy to check by hand."""
    rows, offsets = np.divmod(np.arange(size * (2 * half_width + 1)), 2 * half_width + 1)
    columns = rows + offsets - half_width
    inside = (columns >= 0) & (columns < size)
    rows, columns = rows[inside], columns[inside]
    indptr = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=size))])
    return CSR((size, size), indptr, columns.astype(np.int32), (10 * rows + columns).astype(dtype))


def awkward_matrices(dtype: str = "float64") -> dict[str, CSR]:
    """Return one small matrix for each structure that has broken an SpMV before."""
    return {
        "no_rows": CSR((0, 5), [0], [], np.zeros(0, dtype)),
        "no_columns": CSR((5, 0), [0] * 6, [], np.zeros(0, dtype)),
        "no_entries": CSR((4, 4), [0] * 5, [], np.zeros(0, dtype)),
        "one_row": random_csr(1, 300, density=0.5, dtype=dtype),
        "one_column": random_csr(300, 1, density=0.5, dtype=dtype),
        "wide": random_csr(40, 900, dtype=dtype),
        "tall": random_csr(900, 40, dtype=dtype),
        "empty_rows": random_csr(600, 600, empty_every=3, dtype=dtype),
        "dense_row": random_csr(520, 520, dense_row=17, dtype=dtype),
        "only_one_dense_row": random_csr(520, 520, density=0.0, dense_row=519, dtype=dtype),
        "dense_column": random_csr(520, 520, dense_column=0, dtype=dtype),
        "block_511": random_csr(511, 511, dtype=dtype),
        "block_512": random_csr(512, 512, dtype=dtype),
        "block_513": random_csr(513, 513, dtype=dtype),
        "banded": banded(200, dtype=dtype),
    }


def _sizes(largest: int) -> st.SearchStrategy[int]:
    borders = [size for size in (0, 1, 2, 31, 32, 33, 511, 512, 513) if size <= largest]
    return st.sampled_from(borders) | st.integers(0, largest)


@st.composite
def csr_matrices(
    draw: st.DrawFn, *, max_rows: int = 700, max_columns: int = 700, dtype: str = "float64"
) -> CSR:
    """Draw canonical matrices: any shape, empty rows, a dense row, sizes around block borders."""
    rows, columns = draw(_sizes(max_rows)), draw(_sizes(max_columns))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    longest = draw(st.integers(0, min(columns, 40)))
    lengths = rng.integers(0, longest + 1, size=rows)
    if rows and draw(st.booleans()):
        lengths[rng.integers(rows)] = columns
    return csr_from_lengths(lengths, columns, rng, dtype=dtype)


def assert_close_to_reference(y: np.ndarray, matrix: CSR, x: np.ndarray) -> None:
    """Fail unless each ``y[i]`` keeps the componentwise bound of its own row.

    The error names the worst row, the value, the exact value and the bound.
    """
    exact = reference_product(matrix, x)
    worst, row = error_over_bound(y, matrix, x, exact=exact)
    if worst > 1:
        bound = componentwise_bound(matrix, x, unit=float(np.finfo(np.asarray(y).dtype).eps) / 2)
        raise AssertionError(
            f"row {row} of {matrix!r}: got {y[row]!r}, exact {exact[row]!r}, "
            f"bound {bound[row]:.3g}, error {worst:.3g} times the bound"
        )
