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
from hbp_spmv.classes import FEW_SEGMENTS, FEWEST_IN_SEGMENT
from hbp_spmv.config import SIGMAS, WINDOW_SPAN, BuildConfig
from hbp_spmv.hashing import (
    ORDER_CLASSES,
    ORDER_NONE,
    ORDER_PAPER,
    ORDER_SORT,
    HashParams,
    heavy_limit,
    length_classes,
    tune,
)
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
GROUP_COST = 4
"""Cost of a group beside its nonzeros, in nonzeros per lane; it only shapes the schedule."""
_METHODS = {
    "none": ORDER_NONE,
    "paper": ORDER_PAPER,
    "tuned": ORDER_PAPER,
    "lut": ORDER_CLASSES,
    "sort": ORDER_SORT,
}
UNUSED = 0xFFFFFFFF
"""Target of an unused lane."""


@dataclass(frozen=True, slots=True)
class _Parts:
    """Rows, or (row, strip) pairs when the matrix is cut into strips."""

    low: NDArray
    high: NDArray
    rows: NDArray[np.uint32] | None
    """Row of each part; None when parts are the rows."""
    windows: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Heavy:
    """The parts that are cut into segments."""

    part: NDArray[np.int64]
    row: NDArray[np.uint32]
    low: NDArray[np.int64]
    high: NDArray[np.int64]


@dataclass(slots=True)
class _Lanes:
    """The other parts in their order, one entry each; padded to full groups one by one."""

    first: NDArray
    length: NDArray[np.int32]
    target: NDArray[np.uint32]
    """Their rows until `_targets` has run."""
    counts: NDArray[np.int64]
    """Parts of each window."""

    def pad(self, lanes: int) -> int:
        """Fill up the last group of every window; return the number of groups."""
        groups = int((-(-self.counts // lanes)).sum())
        for name, unused in (("first", 0), ("length", 0), ("target", UNUSED)):
            array = getattr(self, name)
            padded = np.empty(groups * lanes, array.dtype)
            build.pad_groups(array, self.counts, lanes, unused, padded)
            setattr(self, name, padded)
        return groups


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
        if not len(self.split_rows):
            return [first]
        begin, end = self.split_start[:-1], self.split_start[1:]
        return [first, np.subtract(end, begin, dtype=np.int32, casting="unsafe")]

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
            partial = (result >= rows) & (result != UNUSED)
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
    """One build, step by step: parts, order, index width, heavy rows, targets, elements.

    At its peak a build holds the layout and, for each lane, where its part begins in the CSR (4
    bytes); before it writes elements, up to 16 bytes a part, and with strips 16 bytes a row.
    """

    def __init__(self, a: csr_array, config: BuildConfig) -> None:
        self.a = a
        self.config = config
        self.lanes = config.lanes or 16
        position = np.int32 if a.nnz < 1 << 31 else np.int64
        self.ptr = a.indptr.astype(position, copy=False)
        # Columns are not negative: the same bits serve as unsigned ones.
        narrow = a.indices.dtype == np.int32
        self.col = a.indices.view(np.uint32) if narrow else a.indices.astype(np.uint32, copy=False)
        self.strips = config.strips if config.strips and config.strips < a.shape[1] else 0
        self.uniform = all_equal(a.data)
        self.heavy = heavy_limit(a.shape[0], a.nnz)
        lengths = np.diff(self.ptr)
        self.empty_rows = np.empty(np.count_nonzero(lengths == 0), np.uint32)
        build.list_empty(lengths, self.empty_rows)
        light = lengths.max(initial=0) <= self.heavy
        self.classes = length_classes(lengths if light else lengths[lengths <= self.heavy])
        self.sigma = config.sigma or self._sigma(lengths)

    def build(self) -> CompactLayout:
        parts = self._parts()
        heavy = self._heavy_parts(parts)
        lanes = self._arrange(parts)
        windows = parts.windows
        del parts  # the arrays of strips live on in `lanes`, until they are padded
        index, floor, limit = self._index(lanes)
        cuts = self._cut(heavy, narrow=floor)
        if floor and sum(map(len, cuts)) > max(FEW_SEGMENTS, self.a.nnz // FEWEST_IN_SEGMENT):
            index, floor, limit = self._wide_index()
            cuts = self._cut(heavy, narrow=False)
        segment_target, split_rows, split_start = self._targets(lanes, windows, heavy, cuts)
        groups = lanes.pad(self.lanes)

        segment_ptr = np.concatenate([np.empty(0, np.int64), *cuts])
        segment_start = self._segment_starts(segment_ptr, heavy, cuts)
        layout = CompactLayout(
            shape=self.a.shape,
            nnz=self.a.nnz,
            lanes=self.lanes,
            sigma=self.sigma,
            strips=self.strips,
            heavy_rows=len(cuts),
            start=np.empty(groups + 1, np.int64),
            lengths=lanes.length,
            targets=lanes.target,
            group_base=np.empty(groups, np.uint32),
            segment_start=segment_start,
            segment_target=segment_target,
            segment_base=self._segment_bases(segment_ptr, floor, limit),
            empty_rows=self.empty_rows,
            split_rows=split_rows,
            split_start=split_start,
            col=_padded(self.a.nnz, self.lanes, index),
            val=self.a.data[:1].copy()
            if self.uniform
            else _padded(self.a.nnz, self.lanes, self.a.dtype),
            perm=np.empty(self.a.nnz, np.int64) if self.config.keep_perm else None,
        )
        self._fill(layout, lanes.first, segment_ptr, floor, limit)
        return layout

    def _fill(
        self, layout: CompactLayout, first: NDArray, segments: NDArray, floor: bool, limit: int
    ) -> None:
        """Write the elements of the groups, then those of the segments."""
        source = self.a.data[:0] if self.uniform else self.a.data
        val = source if self.uniform else layout.val
        perm = np.empty(0, np.int64) if layout.perm is None else layout.perm
        p = build.fill_groups(
            first, layout.lengths, self.lanes, self.col, source, floor, limit, layout.start,
            layout.group_base, layout.col, val, perm,
        )  # fmt: skip
        build.fill_segments(
            segments, layout.segment_start, layout.segment_base, self.col, source, p, layout.col,
            val, perm,
        )  # fmt: skip

    def _sigma(self, lengths: NDArray) -> int:
        """Return the smallest window within 3 % of the best lane efficiency on sample windows."""
        rows = len(lengths)
        span = SIGMAS[-1]
        tops = range(0, rows, span * max(1, rows // (8 * span)))
        cost = {}
        for sigma in SIGMAS:
            cost[sigma] = 0
            for top in tops:
                sample = lengths[top : top + span]
                parts = _whole_rows(np.append(0, np.cumsum(sample)), sigma)
                cost[sigma] += build.count_steps(
                    sample, parts.windows, self.lanes, self.heavy, *self._hash(parts)
                )
        return next(s for s in SIGMAS if cost[s] <= 1.03 * min(cost.values()))

    def _parts(self) -> _Parts:
        """Return the rows, or the (row, strip) pairs in strip-major order."""
        if not self.strips:
            return _whole_rows(self.ptr, self.sigma)
        counts = np.zeros(-(-self.a.shape[1] // self.strips), np.int64)
        build.count_parts(self.ptr, self.col, self.strips, counts)
        ends = np.cumsum(counts)
        low = np.empty(int(ends[-1]), self.ptr.dtype)
        high, rows = np.empty_like(low), np.empty(len(low), np.uint32)
        build.split_parts(self.ptr, self.col, self.strips, ends - counts, low, high, rows)
        tops = [np.arange(e - c, e, self.sigma) for e, c in zip(ends, counts, strict=True)]
        return _Parts(low, high, rows, np.append(np.concatenate(tops), ends[-1]))

    def _heavy_parts(self, parts: _Parts) -> _Heavy:
        found = np.flatnonzero(parts.high - parts.low > self.heavy)
        rows = found.astype(np.uint32) if parts.rows is None else parts.rows[found]
        low, high = parts.low[found].astype(np.int64), parts.high[found].astype(np.int64)
        return _Heavy(found, rows, low, high)

    def _arrange(self, parts: _Parts) -> _Lanes:
        """Return the light parts in hash order; those of strips are arranged where they lie."""
        counts = np.empty(len(parts.windows) - 1, np.int64)
        rows = np.empty(0, np.uint32) if parts.rows is None else parts.rows
        if parts.rows is None:
            filled = np.count_nonzero(parts.low != parts.high)
            first, row = np.empty(filled, parts.low.dtype), np.empty(filled, np.uint32)
        else:
            first, row = parts.low, rows
        apart = parts.rows is None or parts.high.dtype != np.int32
        length = np.empty(len(first), np.int32) if apart else parts.high
        kept = build.arrange_windows(
            parts.low, parts.high, rows, parts.windows, self.lanes, self.heavy,
            *self._hash(parts), first, length, row, counts,
        )  # fmt: skip
        return _Lanes(first[:kept], length[:kept], row[:kept], counts)

    def _cut(self, heavy: _Heavy, *, narrow: bool) -> list[NDArray[np.int64]]:
        """Return for each heavy part the CSR positions at which its segments begin.

        Segments hold at most SEGMENT nonzeros and, if `narrow`, span what 16 bits reach.
        """
        cuts = []
        for low, high in zip(heavy.low.tolist(), heavy.high.tolist(), strict=True):
            if not narrow:
                cuts.append(np.arange(low, high, SEGMENT))
                continue
            starts = [low]
            while high - starts[-1] > SEGMENT or (
                int(self.col[high - 1]) - int(self.col[starts[-1]]) >= WINDOW_SPAN
            ):
                reach = int(self.col[starts[-1]]) + WINDOW_SPAN
                longest = self.col[starts[-1] : min(high, starts[-1] + SEGMENT)]
                starts.append(starts[-1] + int(np.searchsorted(longest, reach)))
            cuts.append(np.array(starts, np.int64))
        return cuts

    def _targets(
        self, lanes: _Lanes, windows: NDArray, heavy: _Heavy, cuts: list[NDArray]
    ) -> tuple[NDArray, ...]:
        """Say where each sum goes: its row, or a partial slot of a row that has several sums.

        Returns:
            Targets of the segments; the rows of several sums, and where their partial slots begin.
        """
        rows = self.a.shape[0]
        pieces = np.array([len(starts) for starts in cuts], np.int64)
        if self.strips:
            sums = np.zeros(rows, np.uint32)
            build.count_sums(lanes.target, heavy.row, pieces, sums)
            split_rows = np.flatnonzero(sums > 1).astype(np.uint32)
            split_sums = sums[split_rows]
            del sums
        else:
            split_rows, split_sums = heavy.row[pieces > 1], pieces[pieces > 1]
        split_start = np.zeros(len(split_rows) + 1, np.int64)
        np.cumsum(split_sums, out=split_start[1:])
        if rows + int(split_start[-1]) >= UNUSED:
            raise InputError(
                f"strips={self.config.strips}: {int(split_start[-1])} partial sums exceed 32-bit "
                "targets; use wider strips"
            )
        targets = heavy.row.copy()
        if self.strips:
            place = np.arange(rows, dtype=np.uint32)
            np.add(split_start[:-1], rows, out=split_sums, casting="unsafe")
            place[split_rows] = split_sums
            build.assign_targets(
                lanes.target, lanes.counts, windows, heavy.part, heavy.row, pieces, place, targets
            )
        else:
            targets[pieces > 1] = rows + split_start[:-1]
        first = np.repeat(np.cumsum(pieces) - pieces, pieces)
        behind = (np.arange(len(first)) - first).astype(np.uint32)
        return np.repeat(targets, pieces) + behind, split_rows, split_start

    def _hash(self, parts: _Parts) -> tuple:
        """Return what the kernels know of the hash: method, parameters, table, longest first."""
        config = self.config
        chosen = HashParams(k0=config.k0, s=config.s, t=config.t, u=config.u)
        if config.hash == "tuned":
            windows = len(parts.windows) - 1
            blocks = []
            for window in np.unique(np.linspace(0, windows - 1, min(windows, 8)).astype(int)):
                span = slice(parts.windows[window], parts.windows[window + 1])
                block = parts.high[span] - parts.low[span]
                blocks.append(block[block <= self.heavy])
            chosen = tune([block for block in blocks if block.any()], self.lanes)
        params = (chosen.k0, chosen.s, chosen.t, chosen.u)
        return _METHODS[config.hash], params, self.classes, True

    def _index(self, lanes: _Lanes) -> tuple[type, bool, int]:
        """Return the type of the column offsets, whether groups have a base, and its bound."""
        columns = self.a.shape[1]
        if self.config.index == "u32":
            return self._wide_index()
        if columns <= WINDOW_SPAN:
            return np.uint16, False, 0
        limit = columns - WINDOW_SPAN
        widest = build.widest_offset(
            lanes.first, lanes.length, lanes.counts, self.lanes, self.col, limit
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

    def _segment_starts(self, first: NDArray, heavy: _Heavy, cuts: list) -> NDArray[np.int64]:
        """Return the element position of each segment, behind the groups; one entry more."""
        ends = np.append(first[1:], 0)[: len(first)]
        ends[np.cumsum([len(starts) for starts in cuts], dtype=np.int64) - 1] = heavy.high
        sizes = ends - first
        return np.cumsum(np.append(self.a.nnz - sizes.sum(), sizes))

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
