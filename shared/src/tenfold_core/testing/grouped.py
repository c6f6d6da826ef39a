# SPDX-License-Identifier: Apache-2.0
"""Build grouped rows element by element: slow, obvious, what fast builders are held equal to."""

import numpy as np

from tenfold_core.sparse.csr import CSR
from tenfold_core.sparse.gpu.layout import NOWHERE, WARP, GroupedRows

__all__ = ["literal_grouped_rows"]


def literal_grouped_rows(
    a: CSR,
    *,
    pack: int = 1,
    heavy: int = 128,
    segment: int = 64,
    strip_width: int = 0,
    narrow: bool = True,
    uniform: bool = False,
) -> GroupedRows:
    """Lay out a matrix with rows of each window sorted by length, longest first.

    Args:
        a: The matrix.
        pack: Elements of a row that lie together.
        heavy: Longest row, or part of a row in a strip, that stays in a group.
        segment: Elements of a segment.
        strip_width: Columns of a strip; 0 cuts no strips.
        narrow: Store columns in 16 bits, from the smallest of a group or segment.
        uniform: Store the first value only.
    """
    rows, columns = a.shape
    width = strip_width or max(columns, 1)
    parts = []  # (strip, row, positions)
    for strip in range(-(-columns // width) if columns else 0):
        for row in range(rows):
            places = np.arange(a.indptr[row], a.indptr[row + 1])
            inside = places[a.indices[places] // width == strip]
            if len(inside):
                parts.append((strip, row, inside))
    light = [part for part in parts if len(part[2]) <= heavy]
    cuts = [
        (row, places[at : at + segment])
        for _, row, places in parts
        if len(places) > heavy
        for at in range(0, len(places), segment)
    ]
    sums = np.zeros(rows, int)
    for _, row, _ in light:
        sums[row] += 1
    for row, _ in cuts:
        sums[row] += 1
    split_rows = np.flatnonzero(sums > 1)
    split_start = np.append(0, np.cumsum(sums[split_rows]))
    next_part = dict(zip(split_rows.tolist(), split_start[:-1].tolist(), strict=True))

    def target(row: int) -> int:
        if row not in next_part:
            return row
        next_part[row] += 1
        return rows + next_part[row] - 1

    out: dict[str, list] = {name: [] for name in (
        "start", "lengths", "targets", "group_base", "segment_start", "segment_target",
        "segment_base", "col", "val", "strip_groups",
    )}  # fmt: skip
    for strip in range(max((part[0] for part in parts), default=-1) + 1):
        out["strip_groups"].append(len(out["group_base"]))
        mine = sorted((p for p in light if p[0] == strip), key=lambda p: -len(p[2]))
        for top in range(0, len(mine), WARP):
            _add_group(a, mine[top : top + WARP], out, target, pack, narrow)
    out["strip_groups"].append(len(out["group_base"]))
    out["start"].append(len(out["col"]))
    for row, places in cuts:
        base = int(a.indices[places].min()) if narrow else 0
        out["segment_start"].append(len(out["col"]))
        out["segment_target"].append(target(row))
        out["segment_base"].append(base)
        out["col"] += [int(c) - base for c in a.indices[places]]
        out["val"] += list(a.data[places])
    out["segment_start"].append(len(out["col"]))
    unsigned = np.uint32
    return GroupedRows(
        shape=a.shape,
        nnz=len(a.indices),
        pack=pack,
        start=np.array(out["start"], np.int64),
        lengths=np.array(out["lengths"], np.uint16),
        targets=np.array(out["targets"], unsigned),
        group_base=np.array(out["group_base"], unsigned),
        segment_start=np.array(out["segment_start"], np.int64),
        segment_target=np.array(out["segment_target"], unsigned),
        segment_base=np.array(out["segment_base"], unsigned),
        empty_rows=np.flatnonzero(np.diff(a.indptr) == 0).astype(unsigned),
        split_rows=split_rows.astype(unsigned),
        split_start=split_start.astype(np.int64),
        col=np.array(out["col"], np.uint16 if narrow else unsigned),
        val=a.data[:1].copy() if uniform else np.array(out["val"], a.data.dtype),
        strip_width=strip_width,
        strip_groups=np.array(out["strip_groups"], unsigned) if strip_width else None,
    )


def _add_group(a: CSR, parts: list, out: dict, target, pack: int, narrow: bool) -> None:
    base = min(int(a.indices[places].min()) for _, _, places in parts) if narrow else 0
    out["start"].append(len(out["col"]))
    out["group_base"].append(base)
    for lane in range(WARP):
        used = lane < len(parts)
        out["lengths"].append(len(parts[lane][2]) if used else 0)
        out["targets"].append(target(parts[lane][1]) if used else NOWHERE)
    for step in range(0, len(parts[0][2]), pack):
        for _, _, places in parts:
            if len(places) <= step:
                continue
            for k in range(pack):
                there = step + k < len(places)
                # Padding: a column that must not be followed, a value that must not be added.
                out["col"].append(int(a.indices[places[step + k]]) - base if there else 0xFFFF)
                out["val"].append(a.data[places[step + k]] if there else np.nan)
