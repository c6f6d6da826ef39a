# SPDX-License-Identifier: Apache-2.0
"""`H.stats`: what a build produced."""

from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Stats", "describe"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """What a build produced."""

    layout: str
    nnz: int
    bytes: int
    bytes_per_nnz: float
    lane_efficiency: float
    """Nonzeros / (lanes x longest row, summed over groups); 1 is perfect."""
    std_before: float
    """Mean standard deviation of the row lengths in groups of neighbours, heavy rows aside."""
    std_after: float
    """The same after reordering."""
    groups: int
    heavy_rows: int
    strips: int
    """Number of column strips; 1 if the columns are not cut."""
    index_bits: int
    uniform: bool
    """All values are equal and only one is stored."""
    threads: int
    build_seconds: float


def describe(stored: Any, layout: str, *, threads: int, build_seconds: float) -> Stats:
    """Describe a stored layout, `layout` being its name."""
    efficiency, after = stored.quality()
    return Stats(
        layout=layout,
        nnz=stored.nnz,
        bytes=stored.nbytes,
        bytes_per_nnz=stored.nbytes / max(stored.nnz, 1),
        lane_efficiency=efficiency,
        std_before=_std_before(stored, layout),
        std_after=after,
        groups=_num_groups(stored, layout),
        heavy_rows=getattr(stored, "heavy_rows", 0),
        strips=_num_strips(stored, layout),
        index_bits=8 * stored.arrays()["col"].dtype.itemsize,
        uniform=stored.uniform,
        threads=threads,
        build_seconds=build_seconds,
    )


def _num_groups(stored: Any, layout: str) -> int:
    if layout == "paper":
        return len(stored.arrays()["begin_ptr"]) - 1
    return len(getattr(stored, "group_base", ()))


def _num_strips(stored: Any, layout: str) -> int:
    if layout == "paper":
        return stored.strips
    width = getattr(stored, "strips", 0)
    return -(-stored.shape[1] // width) if width else 1


def _std_before(stored: Any, layout: str) -> float:
    if layout == "paper":
        return stored.unordered_quality()[1]
    if layout != "compact" or not stored.nnz:
        return 0.0
    from hbp_spmv.hashing import heavy_limit, quality

    rows = stored.shape[0]
    lengths = np.bincount(stored.coordinates()[0], minlength=rows)
    kept = (lengths > 0) & (lengths <= heavy_limit(rows, stored.nnz))
    _, total, groups = quality(lengths, np.flatnonzero(kept), stored.lanes)
    return total / max(groups, 1)
