# SPDX-License-Identifier: Apache-2.0
"""`layout="compact"`: the method without its dense arrays (our layout, same principle).

Per group of `lanes` rows: a start, a base column, the rows and their lengths, longest first. The
elements lie step by step without padding; `add_sign` is not stored, since the distance to a row's
next element is the number of lanes still active. Columns are 16-bit offsets from the group's base
wherever they fit. Rows far above the mean ("heavy") leave the groups and are cut into segments;
rows cut by segments or by column strips are summed from partial sums in a fixed order.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from tenfold_core.errors import ConfigError, InputError

from hbp_spmv.building import all_equal
from hbp_spmv.config import SIGMAS, WINDOW_SPAN, BuildConfig
from hbp_spmv.hashing import HashParams, heavy_limit, length_classes, quality, tune
from hbp_spmv.kernels import build
from hbp_spmv.kernels.compact import EMPTIES_PER_UNIT, FIELDS

__all__ = ["ARRAYS", "CompactLayout"]

ARRAYS = {
    "start": np.int64,
    "lengths": np.int32,
    "targets": np.uint32,
    "group_base": np.uint32,
    "segment_start": np.int64,
    "segment_target": np.uint32,
    "segment_base": np.uint32,
    "empty_rows": np.uint32,
    "split_rows": np.uint32,
    "split_start": np.int64,
}
"""Index arrays of the layout and their types; `col`, `val` and `perm` follow the matrix."""

SEGMENT = 2048
"""Nonzeros of a heavy row's segment."""
FEW_SEGMENTS = 64
FEWEST_IN_SEGMENT = 512
"""Mean nonzeros of a segment below which 16-bit offsets cost more than they save."""
GROUP_COST = 4
"""Cost of a group beside its nonzeros, in nonzeros per lane; it only shapes the schedule."""
_METHODS = {
    "none": build.ORDER_NONE,
    "paper": build.ORDER_PAPER,
    "tuned": build.ORDER_PAPER,
    "lut": build.ORDER_CLASSES,
    "sort": build.ORDER_SORT,
}


@dataclass(frozen=True, slots=True)
class _Parts:
    """Rows, or (row, strip) pairs when the matrix is cut into strips."""

    low: NDArray
    high: NDArray
    rows: NDArray | None
    """Row of each part; None when parts are the rows."""
    windows: NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class CompactLayout:
    """A matrix in compact layout; its elements are padded by `lanes` zeros that no sum includes."""

    shape: tuple[int, int]
    nnz: int
    lanes: int
    sigma: int
    strips: int
    heavy_rows: int
    start: NDArray[np.int64]
    lengths: NDArray[np.int32]
    targets: NDArray[np.uint32]
    group_base: NDArray[np.uint32]
    segment_start: NDArray[np.int64]
    segment_target: NDArray[np.uint32]
    segment_base: NDArray[np.uint32]
    empty_rows: NDArray[np.uint32]
    split_rows: NDArray[np.uint32]
    split_start: NDArray[np.int64]
    col: NDArray
    val: NDArray
    perm: NDArray | None

    @classmethod
    def from_csr(cls, a: csr_array, config: BuildConfig) -> "CompactLayout":
        """Build the layout from canonical CSR with float32 or float64 values.

        Raises:
            InputError: more than 2**31 rows, or `index='u16'` on columns too far apart.
        """
        if a.shape[0] >= 1 << 31 or a.shape[1] >= 1 << 32:
            raise InputError(
                f"matrix of shape {a.shape}: layout 'compact' holds below 2**31 rows and 2**32 "
                "columns; use layout='csr'"
            )
        return _Builder(a, config).build()

    @property
    def uniform(self) -> bool:
        """All values are equal, and only one is stored."""
        return self.val.size == 1 and self.col.size != 1

    @property
    def partials(self) -> int:
        """Partial sums a product needs."""
        return int(self.split_start[-1])

    @property
    def nbytes(self) -> int:
        """Bytes of all stored arrays, the permutation aside."""
        arrays = [getattr(self, name) for name in (*ARRAYS, "col", "val")]
        return sum(array.nbytes for array in arrays)

    def arrays(self) -> dict[str, NDArray]:
        """Return the stored arrays by name."""
        return {name: getattr(self, name) for name in (*ARRAYS, "col", "val")}

    def fields(self) -> list[int]:
        """Return the layout part of a plan: counts, then addresses (`kernels.compact.FIELDS`)."""
        counts = {
            "rows": self.shape[0],
            "groups": len(self.group_base),
            "segments": len(self.segment_base),
            "empties": len(self.empty_rows),
            "strips": self.strips,
        }
        return [
            counts[name] if name in counts else getattr(self, name).ctypes.data for name in FIELDS
        ]

    def work(self) -> list[NDArray]:
        """Return the cost of each unit: groups, segments, runs of empty rows; then split rows."""
        units = -(-len(self.empty_rows) // EMPTIES_PER_UNIT)
        first = np.concatenate(
            [
                np.diff(self.start) + GROUP_COST * self.lanes,
                np.diff(self.segment_start) + GROUP_COST,
                np.full(units, EMPTIES_PER_UNIT // 4),
            ]
        )
        return [first, np.diff(self.split_start)] if len(self.split_rows) else [first]

    def quality(self) -> tuple[float, float]:
        """Return lane efficiency and the mean within-group deviation of the row lengths."""
        lengths = self.lengths.reshape(-1, self.lanes)
        slots = self.lanes * int(lengths[:, 0].sum())
        efficiency = int(lengths.sum()) / slots if slots else 1.0
        used = lengths > 0
        count = np.maximum(used.sum(axis=1), 1)
        mean = lengths.sum(axis=1) / count
        variance = (np.where(used, lengths - mean[:, None], 0.0) ** 2).sum(axis=1) / count
        return efficiency, float(np.sqrt(variance).mean()) if len(lengths) else 0.0

    def owners(self) -> tuple[NDArray, NDArray]:
        """Return the row of every lane (rows where unused) and of every segment."""
        rows = self.shape[0]
        table = np.repeat(self.split_rows, np.diff(self.split_start)).astype(np.int64)

        def row_of(targets: NDArray) -> NDArray:
            result = targets.astype(np.int64)
            partial = (result >= rows) & (result != 0xFFFFFFFF)
            result[partial] = table[result[partial] - rows]
            return result

        return row_of(self.targets), row_of(self.segment_target)

    def coordinates(self) -> tuple[NDArray, NDArray]:
        """Return row and column of every element, in stored order."""
        index = np.int64 if max(self.shape) >= 1 << 31 else np.int32
        row, col = np.empty(self.nnz, index), np.empty(self.nnz, index)
        lanes, segments = self.owners()
        build.unpack_groups(
            self.start, self.lengths, self.lanes, self.group_base, self.col, lanes, row, col
        )
        build.unpack_segments(self.segment_start, self.segment_base, self.col, segments, row, col)
        return row, col

    def values(self) -> NDArray:
        """Return the value of every element, in stored order."""
        if self.uniform:
            return np.full(self.nnz, self.val[0])
        return self.val[: self.nnz]


class _Builder:
    """One build, step by step: parts, heavy rows, order, index width, elements."""

    def __init__(self, a: csr_array, config: BuildConfig) -> None:
        self.a = a
        self.config = config
        self.lanes = config.lanes or 16
        self.col = a.indices.astype(np.uint32, copy=False)
        self.uniform = all_equal(a.data)
        self.heavy = heavy_limit(a.shape[0], a.nnz)
        self.lengths = np.diff(a.indptr)
        self.classes = length_classes(self.lengths[self.lengths <= self.heavy])

    def build(self) -> CompactLayout:
        sigma = self.config.sigma or self._sigma()
        parts = self._parts(sigma)
        order, counts = self._order(parts)
        index, floor, limit = self._index(parts, order, counts)
        cuts = self._cut_heavy(parts, narrow=floor)
        segments = sum(len(low) for _, low in cuts)
        if floor and segments > max(FEW_SEGMENTS, self.a.nnz // FEWEST_IN_SEGMENT):
            index, floor, limit = self._wide_index()
            cuts = self._cut_heavy(parts, narrow=False)
        targets, segment_target, split_rows, split_start = self._targets(parts, cuts)

        groups = int((-(-counts // self.lanes)).sum())
        segment_ptr = np.concatenate([low for _, low in cuts]) if cuts else np.empty(0, np.int64)
        ends = np.concatenate([np.append(low[1:], parts.high[part]) for part, low in cuts] or [[]])
        segment_sizes = (ends - segment_ptr).astype(np.int64)
        grouped = self.a.nnz - int(segment_sizes.sum())
        segment_start = np.concatenate([[grouped], grouped + np.cumsum(segment_sizes)])
        source = self.a.data[:0] if self.uniform else self.a.data
        layout = CompactLayout(
            shape=self.a.shape,
            nnz=self.a.nnz,
            lanes=self.lanes,
            sigma=sigma,
            strips=0 if parts.rows is None else self.config.strips or 0,
            heavy_rows=len(cuts),
            start=np.zeros(groups + 1, np.int64),
            lengths=np.empty(groups * self.lanes, np.int32),
            targets=np.empty(groups * self.lanes, np.uint32),
            group_base=np.empty(groups, np.uint32),
            segment_start=segment_start.astype(np.int64),
            segment_target=segment_target,
            segment_base=self._segment_bases(segment_ptr, floor, limit),
            empty_rows=np.flatnonzero(self.lengths == 0).astype(np.uint32),
            split_rows=split_rows,
            split_start=split_start,
            col=_padded(self.a.nnz, self.lanes, index),
            val=self.a.data[:1].copy()
            if self.uniform
            else _padded(self.a.nnz, self.lanes, self.a.dtype),
            perm=np.empty(self.a.nnz, np.int64) if self.config.keep_perm else None,
        )
        val = source if self.uniform else layout.val
        perm = np.empty(0, np.int64) if layout.perm is None else layout.perm
        p = build.fill_groups(
            parts.low, parts.high, targets, order, counts, self.lanes, self.col, source, floor,
            limit, layout.start, layout.lengths, layout.targets, layout.group_base, layout.col,
            val, perm,
        )  # fmt: skip
        build.fill_segments(
            segment_ptr, segment_start, layout.segment_base, self.col, source, p, layout.col, val,
            perm,
        )  # fmt: skip
        return layout

    def _sigma(self) -> int:
        """Return the smallest window within 3 % of the best lane efficiency on sample windows."""
        rows = len(self.lengths)
        span = SIGMAS[-1]
        tops = range(0, rows, span * max(1, rows // (8 * span)))
        cost = {}
        for sigma in SIGMAS:
            cost[sigma] = 0
            for top in tops:
                sample = self.lengths[top : top + span]
                order, _ = self._order(_whole_rows(np.append(0, np.cumsum(sample)), sigma))
                cost[sigma] += quality(sample, order, self.lanes)[0]
        return next(s for s in SIGMAS if cost[s] <= 1.03 * min(cost.values()))

    def _parts(self, sigma: int) -> _Parts:
        """Return the rows, or the (row, strip) pairs in strip-major order."""
        width = self.config.strips
        if not width or width >= self.a.shape[1]:
            return _whole_rows(self.a.indptr, sigma)
        counts = np.zeros(-(-self.a.shape[1] // width), np.int64)
        build.count_parts(self.a.indptr, self.col, width, counts)
        ends = np.cumsum(counts)
        low = np.empty(int(ends[-1]), np.int64)
        high, rows = np.empty_like(low), np.empty_like(low)
        build.split_parts(self.a.indptr, self.col, width, ends - counts, low, high, rows)
        tops = [np.arange(e - c, e, sigma) for e, c in zip(ends, counts, strict=True)]
        return _Parts(low, high, rows, np.append(np.concatenate(tops), ends[-1]))

    def _cut_heavy(self, parts: _Parts, *, narrow: bool) -> list[tuple[int, NDArray[np.int64]]]:
        """Return each heavy part with the CSR position at which each of its segments begins.

        Segments hold at most SEGMENT nonzeros and, if `narrow`, span what 16 bits reach.
        """
        cuts = []
        for part in np.flatnonzero(parts.high - parts.low > self.heavy):
            low, high = int(parts.low[part]), int(parts.high[part])
            if not narrow:
                cuts.append((int(part), np.arange(low, high, SEGMENT)))
                continue
            starts = [low]
            while high - starts[-1] > SEGMENT or (
                int(self.col[high - 1]) - int(self.col[starts[-1]]) >= WINDOW_SPAN
            ):
                reach = int(self.col[starts[-1]]) + WINDOW_SPAN
                longest = self.col[starts[-1] : min(high, starts[-1] + SEGMENT)]
                starts.append(starts[-1] + int(np.searchsorted(longest, reach)))
            cuts.append((int(part), np.array(starts, np.int64)))
        return cuts

    def _targets(self, parts: _Parts, cuts: list) -> tuple[NDArray, ...]:
        """Say where each sum goes: its row, or a partial slot of a row that has several sums."""
        rows = self.a.shape[0]
        none = np.empty(0, np.uint32)
        if parts.rows is None and all(len(starts) == 1 for _, starts in cuts):
            heavy = np.array([part for part, _ in cuts], np.uint32)
            return np.arange(rows, dtype=np.uint32), heavy, none, np.zeros(1, np.int64)
        sums = np.ones(len(parts.low), np.int64)
        sums[parts.high == parts.low] = 0
        for part, starts in cuts:
            sums[part] = len(starts)
        owner = np.arange(rows) if parts.rows is None else parts.rows
        per_row = np.bincount(owner, sums, minlength=rows).astype(np.int64)
        split_rows = np.flatnonzero(per_row > 1)
        split_start = np.concatenate([[0], np.cumsum(per_row[split_rows])])
        if rows + int(split_start[-1]) >= 0xFFFFFFFF:
            raise InputError(
                f"strips={self.config.strips}: {int(split_start[-1])} partial sums exceed 32-bit "
                "targets; use wider strips"
            )
        targets = owner.astype(np.uint32)
        split = np.flatnonzero(per_row[owner] > 1)
        by_row = split[np.argsort(owner[split], kind="stable")]
        targets[by_row] = rows + np.cumsum(sums[by_row]) - sums[by_row]
        segment_target = [
            targets[part] + np.arange(len(starts), dtype=np.uint32) for part, starts in cuts
        ]
        return (
            targets,
            np.concatenate(segment_target) if cuts else none,
            split_rows.astype(np.uint32),
            split_start.astype(np.int64),
        )

    def _order(self, parts: _Parts) -> tuple[NDArray, NDArray]:
        """Return the kept parts in hash order and their number per window."""
        params = self._params(parts)
        order = np.empty(len(parts.low), np.int64 if len(parts.low) >= 1 << 31 else np.int32)
        counts = np.empty(len(parts.windows) - 1, np.int64)
        kept = build.order_windows(
            parts.low, parts.high, parts.windows, self.heavy, _METHODS[self.config.hash],
            (params.k0, params.s, params.t, params.u), self.classes, True, order, counts,
        )  # fmt: skip
        return order[:kept], counts

    def _params(self, parts: _Parts) -> HashParams:
        config = self.config
        if config.hash != "tuned":
            return HashParams(k0=config.k0, s=config.s, t=config.t, u=config.u)
        windows = len(parts.windows) - 1
        blocks = []
        for window in np.unique(np.linspace(0, windows - 1, min(windows, 8)).astype(int)):
            span = slice(parts.windows[window], parts.windows[window + 1])
            block = parts.high[span] - parts.low[span]
            blocks.append(block[block <= self.heavy])
        return tune([block for block in blocks if block.any()], self.lanes)

    def _index(self, parts: _Parts, order: NDArray, counts: NDArray) -> tuple[type, bool, int]:
        """Return the type of the column offsets, whether groups have a base, and its bound."""
        columns = self.a.shape[1]
        if self.config.index == "u32":
            return self._wide_index()
        if columns <= WINDOW_SPAN:
            return np.uint16, False, 0
        limit = columns - WINDOW_SPAN
        widest = build.widest_offset(
            parts.low, parts.high, order, counts, self.lanes, self.col, limit
        )
        if widest < WINDOW_SPAN:
            return np.uint16, True, limit
        if self.config.index == "u16":
            raise ConfigError(
                f"index='u16': a group spans {widest + 1} columns, 16 bits reach {WINDOW_SPAN}; "
                f"use index='auto' or strips={WINDOW_SPAN}"
            )
        return self._wide_index()

    def _wide_index(self) -> tuple[type, bool, int]:
        return np.uint32, False, 0

    def _segment_bases(self, first: NDArray, floor: bool, limit: int) -> NDArray[np.uint32]:
        if not floor:
            return np.zeros(len(first), np.uint32)
        return np.minimum(self.col[first], limit).astype(np.uint32)


def _whole_rows(ptr: NDArray, sigma: int) -> _Parts:
    windows = np.append(np.arange(0, len(ptr) - 1, sigma), len(ptr) - 1)
    return _Parts(ptr[:-1], ptr[1:], None, windows)


def _padded(size: int, lanes: int, dtype: type) -> NDArray:
    array = np.empty(size + lanes, dtype)
    array[size:] = 0
    return array
