# SPDX-License-Identifier: Apache-2.0
"""A sparse matrix in groups of 32 rows, as GPU kernels read it: one warp a group, one row a lane.

Rows of a group lie side by side, longest first, so that in each step the active lanes are the first
ones and their elements are neighbours in memory; nothing is padded but the last pack of a row. Long
rows are segments instead, and a sum that several of them share goes through partial sums.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from tenfold_core.errors import InputError

__all__ = ["NOWHERE", "WARP", "GroupedRows", "reference_grouped_product"]

WARP = 32
"""Rows of a group."""
NOWHERE = 0xFFFFFFFF
"""Target of a lane without a row."""

_TYPES = {
    "start": np.int64,
    "lengths": np.uint16,
    "targets": np.uint32,
    "group_base": np.uint32,
    "segment_start": np.int64,
    "segment_target": np.uint32,
    "segment_base": np.uint32,
    "empty_rows": np.uint32,
    "split_rows": np.uint32,
    "split_start": np.int64,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedRows:
    """The arrays of a matrix, of NumPy, CuPy or PyTorch.

    Shapes, for G groups, S segments, E empty and R split rows: ``start`` (G + 1), ``lengths`` and
    ``targets`` (32 G), ``group_base`` (G), ``segment_start`` (S + 1), ``segment_target`` and
    ``segment_base`` (S), ``empty_rows`` (E), ``split_rows`` (R), ``split_start`` (R + 1).
    """

    shape: tuple[int, int]
    nnz: int
    """Elements of the matrix, padding aside."""
    pack: int
    """Neighbouring elements of a row that lie together in a group: 1, 2 or 4."""
    start: Any
    """First element of each group in ``col`` and ``val``, a multiple of ``pack``."""
    lengths: Any
    """Elements of each row of a group, descending; 0 where a lane has no row."""
    targets: Any
    """Where each sum goes: a row of y, or ``rows`` + a partial sum, or NOWHERE."""
    group_base: Any
    """Column that the offsets of a group count from."""
    segment_start: Any
    """First element of each segment, the groups' elements being before all of them."""
    segment_target: Any
    """Where the sum of each segment goes, as ``targets``."""
    segment_base: Any
    """Column that the offsets of a segment count from."""
    empty_rows: Any
    """Rows without elements."""
    split_rows: Any
    """Rows that have several partial sums."""
    split_start: Any
    """First partial sum of each split row."""
    col: Any
    """Column offsets, uint16 or uint32, of groups and then of segments."""
    val: Any
    """Values, float32 or float64; a single one if all are equal."""
    strip_width: int = 0
    """Columns of a strip if groups are cut by strips, else 0."""
    strip_groups: Any = None
    """First group of each strip, and the end; None without strips."""

    @property
    def uniform(self) -> bool:
        """All values are equal and only one is stored."""
        return self.val.shape[0] == 1 and self.col.shape[0] != 1

    @property
    def num_partials(self) -> int:
        """Partial sums of a product with one column."""
        return int(self.split_start[-1])

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        names = (*_TYPES, "col", "val", "strip_groups")
        arrays = [getattr(self, name) for name in names]
        return sum(int(array.nbytes) for array in arrays if array is not None)

    def arrays(self) -> dict[str, Any]:
        """Return the arrays by name."""
        return {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.name in _TYPES or f.name in ("col", "val")
        }

    def moved(self, convert: Any) -> "GroupedRows":
        """Return the same matrix with every array replaced by ``convert(array)``."""
        names = (*_TYPES, "col", "val", "strip_groups")
        changes: dict[str, Any] = {
            name: None if getattr(self, name) is None else convert(getattr(self, name))
            for name in names
        }
        return replace(self, **changes)

    def check(self) -> None:
        """Refuse arrays whose types or lengths contradict each other, before a kernel reads them.

        Raises:
            InputError: They do.
        """
        groups, rows = self.group_base.shape[0], self.shape[0]
        expected = {
            "start": groups + 1,
            "lengths": WARP * groups,
            "targets": WARP * groups,
            "segment_base": self.segment_target.shape[0],
            "segment_start": self.segment_target.shape[0] + 1,
            "split_start": self.split_rows.shape[0] + 1,
        }
        for name, size in expected.items():
            found = getattr(self, name).shape[0]
            if found != size:
                raise InputError(f"grouped rows: {name} has length {found}, expected {size}")
        for name, dtype in _TYPES.items():
            found, wanted = getattr(self, name).dtype, np.dtype(dtype).name
            # torch has few operations on unsigned numbers, so tensors may hold their bits as signed
            if str(found) not in (wanted, f"torch.{wanted}", f"torch.{wanted.removeprefix('u')}"):
                raise InputError(f"grouped rows: {name} has type {found}, expected {dtype}")
        if self.pack not in (1, 2, 4):
            raise InputError(f"grouped rows: pack is {self.pack}, expected 1, 2 or 4")
        if rows + self.num_partials >= NOWHERE:
            raise InputError(
                f"grouped rows: {rows} rows and {self.num_partials} partial sums exceed 32 bits"
            )


def reference_grouped_product(
    a: GroupedRows,
    x: np.ndarray,
    y: np.ndarray | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 0.0,
) -> np.ndarray:
    """Return ``alpha A x + beta y`` by the definition of the arrays, one element at a time.

    The sums are those of exact arithmetic rounded to float64 at each step, in the order of the
    elements; it is the CPU twin of all GPU kernels, for NumPy arrays.

    Shapes: ``x`` (columns,) -> (rows,).
    """
    rows = a.shape[0]
    parts = np.zeros(rows + a.num_partials)
    offsets, values = a.col.astype(np.int64), a.val.astype(np.float64)

    def element(place: int, base: int) -> float:
        return float(values[0 if a.uniform else place]) * float(x[base + offsets[place]])

    for group in range(len(a.group_base)):
        lengths = a.lengths[WARP * group : WARP * (group + 1)].astype(int)
        targets = a.targets[WARP * group : WARP * (group + 1)].astype(int)
        place = int(a.start[group])
        for step in range(0, max(lengths, default=0), a.pack):
            for lane in np.flatnonzero(lengths > step):
                for k in range(a.pack):
                    if step + k < lengths[lane]:
                        parts[targets[lane]] += element(place + k, int(a.group_base[group]))
                place += a.pack
    for segment, target in enumerate(a.segment_target):
        for place in range(int(a.segment_start[segment]), int(a.segment_start[segment + 1])):
            parts[target] += element(place, int(a.segment_base[segment]))
    for place, row in enumerate(a.split_rows):
        parts[row] = parts[
            rows + int(a.split_start[place]) : rows + int(a.split_start[place + 1])
        ].sum()
    result = alpha * parts[:rows]
    return result if beta == 0 or y is None else result + beta * y
