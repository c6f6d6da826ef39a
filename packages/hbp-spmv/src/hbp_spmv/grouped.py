# SPDX-License-Identifier: Apache-2.0
"""Layout compact on a CUDA device: the same method in groups of 32 rows, built where it is used.

Ranks, sizes and targets are array operations; ordering a window, spanning a group and filling are
kernels (`kernels/cuda/build.cu`). The result is what `tenfold_core.sparse.gpu` multiplies. It
differs from the layout of the CPU in three ways: lengths are 16-bit, elements of a row lie in
packs, and 16-bit segments of long rows begin at multiples of 65536 columns.
"""

from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from tenfold_core.errors import ConfigError, InputError
from tenfold_core.sparse.gpu import GroupedRows, Runtime

from hbp_spmv.classes import (
    CAP,
    FEW_SEGMENTS,
    FEWEST_IN_SEGMENT,
    heavy_limit,
    histogram_classes,
)
from hbp_spmv.config import BuildConfig

__all__ = ["DeviceCSR", "GroupedMatrix", "build_grouped", "choose_pack", "to_host"]

SOURCE = Path(__file__).parent / "kernels" / "cuda" / "build.cu"
WARP, THREADS = 32, 256
LONGEST = 0xFFFF
"""Longest row of a group; lengths are 16-bit."""
SIGMA = 2048
"""Rows of a reordering window by default: its keys take 8 KiB of shared memory."""
LARGEST_SIGMA = 8192
SEGMENT = 2048
"""Elements of a segment of a long row."""
SPAN = 1 << 16
"""Columns that a 16-bit offset reaches."""
PADDING = 1.05
"""Stored elements over elements up to which wider packs are taken."""
NO_RANK = 0xFFFF


@dataclass(frozen=True, slots=True)
class DeviceCSR:
    """Canonical CSR on a device: int64 row starts, int32 columns, float32 or float64 values."""

    shape: tuple[int, int]
    ptr: Any
    col: Any
    val: Any

    @property
    def nnz(self) -> int:
        """Stored entries."""
        return int(self.col.shape[0])

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return int(self.ptr.nbytes + self.col.nbytes + self.val.nbytes)

    @classmethod
    def from_host(cls, a: Any, xp: Any) -> "DeviceCSR":
        """Copy a canonical SciPy matrix to the device of `xp`.

        Raises:
            InputError: more than 2**31 - 1 rows or columns.
        """
        if max(a.shape) >= 1 << 31:
            raise InputError(f"matrix of shape {a.shape}: a device holds below 2**31 rows, columns")
        return cls(
            (int(a.shape[0]), int(a.shape[1])),
            xp.asarray(a.indptr.astype(np.int64)),
            xp.asarray(a.indices.astype(np.int32)),
            xp.asarray(a.data),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedMatrix:
    """A built matrix and what its rows came from."""

    rows: GroupedRows
    perm: Any
    """CSR position of each stored element, -1 for padding; None if it was not asked for."""
    heavy_rows: int
    sigma: int

    def with_values(self, values: Any, xp: Any) -> "GroupedMatrix":
        """Return the same pattern with other values, in the order of CSR."""
        padded = xp.where(self.perm >= 0, values[xp.maximum(self.perm, 0)], values.dtype.type(0))
        return replace(self, rows=replace(self.rows, val=padded))

    def triplets(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return row, column and value of every element, on the host, in stored order."""
        a = self.rows.moved(to_host)
        place, lane = _element_places(a.start, a.lengths, a.pack)
        base, target = a.group_base[lane // WARP], a.targets[lane]
        sizes = np.diff(a.segment_start)
        segment = np.repeat(np.arange(len(sizes)), sizes)
        place = np.append(place, np.arange(a.segment_start[0], a.segment_start[-1]))
        base = np.append(base, a.segment_base[segment]).astype(np.int64)
        target = np.append(target, a.segment_target[segment]).astype(np.int64)
        owner = np.repeat(a.split_rows, np.diff(a.split_start)).astype(np.int64)
        split = target >= a.shape[0]
        target[split] = owner[target[split] - a.shape[0]]
        values = np.full(len(place), a.val[0]) if a.uniform else a.val[place]
        return target, base + a.col[place], values

    def quality(self) -> tuple[float, float]:
        """Return lane efficiency and the mean within-group deviation of the row lengths."""
        lengths = to_host(self.rows.lengths).reshape(-1, WARP).astype(np.int64)
        slots = WARP * int(lengths[:, 0].sum())
        used = lengths > 0
        count = np.maximum(used.sum(axis=1), 1)
        mean = lengths.sum(axis=1) / count
        variance = (np.where(used, lengths - mean[:, None], 0.0) ** 2).sum(axis=1) / count
        deviation = float(np.sqrt(variance).mean()) if len(lengths) else 0.0
        return (int(lengths.sum()) / slots if slots else 1.0), deviation


@dataclass(frozen=True, slots=True)
class _Parts:
    """Rows, or pieces of rows in strips, in strip-major order."""

    low: Any
    length: Any
    row: Any
    """Row of each part; None if parts are the rows."""
    windows: Any
    """First part of each window, and the end; a window lies in one strip."""
    strip_windows: Any
    """First window of each strip, and the end, on the host."""


def build_grouped(
    a: DeviceCSR, config: BuildConfig, runtime: Runtime, *, pack: int | None = None
) -> GroupedMatrix:
    """Lay out a matrix on the device.

    Args:
        a: the matrix.
        config: hash, sigma, strips, index and keep_perm of layout compact.
        runtime: what computes.
        pack: neighbouring elements of a row that lie together; by default the most that pads
            little.

    Raises:
        ConfigError: `index='u16'` on columns too far apart, or a window that is too large.
        InputError: too many partial sums.
    """
    return _Builder(a, config, runtime, pack).build()


def choose_pack(lengths: Any, size: int) -> int:
    """Return how many elements a lane loads at once: 16 bytes of values if padding stays small.

    Args:
        lengths: elements of each row in the groups.
        size: bytes of a value.
    """
    total = max(int(lengths.sum()), 1)
    for pack in (4, 2):
        padded = int((-(-lengths // pack) * pack).sum())
        if pack * size <= 16 and padded <= PADDING * total:
            return pack
    return 1


class _Builder:
    def __init__(
        self, a: DeviceCSR, config: BuildConfig, runtime: Runtime, pack: int | None
    ) -> None:
        self.a, self.config, self.runtime, self.xp = a, config, runtime, runtime.xp
        self.pack = pack
        self.sigma = config.sigma or SIGMA
        if self.sigma > LARGEST_SIGMA:
            raise ConfigError(
                f"sigma is {self.sigma}, expected at most {LARGEST_SIGMA} on a device"
            )
        self.heavy = min(heavy_limit(a.shape[0], a.nnz), LONGEST)
        self.dtype = np.dtype(a.val.dtype)

    def build(self) -> GroupedMatrix:
        a, xp = self.a, self.xp
        lengths = xp.diff(a.ptr).astype(np.int32)
        uniform = _all_equal(a.val, xp)
        parts = self._parts(lengths)
        order, first_group = self._order(parts)
        groups = int(first_group[-1])
        group_lengths = self._lengths_of(order, parts)
        pack = self.pack or choose_pack(group_lengths, self.dtype.itemsize)
        narrow, base = self._index(order, first_group, parts)
        owner, segment_from, segment_size = self._cut_heavy(parts, narrow)
        if narrow and self._too_many(len(owner)):
            narrow = False
            base = xp.zeros(groups, np.uint32) if parts.row is None else base
            owner, segment_from, segment_size = self._cut_heavy(parts, narrow)
        targets, segment_target, split_rows, split_start = self._targets(parts, owner)
        sizes = (-(-group_lengths.reshape(-1, WARP).astype(np.int64) // pack) * pack).sum(axis=1)
        start = _starts(sizes, xp)
        segment_start = _starts(segment_size, xp) + start[-1]
        stored = int(segment_start[-1])
        reach = a.col[segment_from] if narrow and a.shape[1] > SPAN else None
        rows = GroupedRows(
            shape=a.shape,
            nnz=a.nnz,
            pack=pack,
            start=start,
            lengths=xp.empty(groups * WARP, np.uint16),
            targets=xp.empty(groups * WARP, np.uint32),
            group_base=base,
            segment_start=segment_start,
            segment_target=segment_target,
            segment_base=(
                xp.zeros(len(owner), np.uint32)
                if reach is None
                else (reach // SPAN * SPAN).astype(np.uint32)
            ),
            empty_rows=xp.flatnonzero(lengths == 0).astype(np.uint32),
            split_rows=split_rows,
            split_start=split_start,
            col=xp.empty(stored, np.uint16 if narrow else np.uint32),
            val=a.val[:1].copy() if uniform else xp.empty(stored, self.dtype),
            strip_width=0 if parts.row is None else self.config.strips or 0,
            strip_groups=(
                None
                if parts.row is None
                else first_group[xp.asarray(parts.strip_windows)].astype(np.uint32)
            ),
        )
        perm = xp.empty(stored, np.int64) if self.config.keep_perm else None
        self._fill(rows, order, parts, targets, segment_from, perm, uniform=uniform)
        heavy = int((parts.length > self.heavy).sum())
        return GroupedMatrix(rows=rows, perm=perm, heavy_rows=heavy, sigma=self.sigma)

    def _too_many(self, segments: int) -> bool:
        """Tell whether 16-bit offsets cut the long rows into more pieces than they save."""
        return segments > max(FEW_SEGMENTS, self.a.nnz // FEWEST_IN_SEGMENT)

    def _parts(self, lengths: Any) -> _Parts:
        a, xp, width = self.a, self.xp, self.config.strips
        rows = a.shape[0]
        if not width or width >= a.shape[1]:
            windows = np.append(np.arange(0, rows, self.sigma), rows)
            edges = np.array([0, len(windows) - 1])
            return _Parts(a.ptr[:-1], lengths, None, xp.asarray(windows), edges)
        strip = a.col // width
        begins = xp.ones(a.nnz, bool)
        begins[1:] = strip[1:] != strip[:-1]
        begins[a.ptr[:-1][lengths > 0]] = True
        low = xp.flatnonzero(begins)
        row = xp.searchsorted(a.ptr, low, side="right") - 1
        high = xp.append(low[1:], xp.asarray([a.nnz]))
        order = xp.argsort(strip[low], kind="stable")
        per_strip = to_host(xp.bincount(strip[low], minlength=-(-a.shape[1] // width)))
        ends = np.cumsum(per_strip)
        tops = [
            np.arange(end - count, end, self.sigma)
            for end, count in zip(ends, per_strip, strict=True)
        ]
        windows = np.append(np.concatenate(tops), ends[-1])
        edges = np.append(0, np.cumsum([len(part) for part in tops]))
        return _Parts(
            low[order],
            (high - low)[order].astype(np.int32),
            row[order],
            xp.asarray(windows.astype(np.int64)),
            edges,
        )

    def _order(self, parts: _Parts) -> tuple[Any, Any]:
        """Return the parts of each group, longest first, and the first group of each window."""
        xp = self.xp
        rank = self._rank(parts)
        kept = _starts((rank != NO_RANK).astype(np.int64), xp)[parts.windows]
        first_group = _starts(-(-xp.diff(kept) // WARP), xp)
        order = xp.empty(int(first_group[-1]) * WARP, np.uint32)
        windows = int(parts.windows.shape[0]) - 1
        if windows and order.shape[0]:
            size = 1 << max(int(xp.diff(parts.windows).max()) - 1, 1).bit_length()
            kernel = self._kernel("order_windows", {})
            args = (parts.windows, rank, parts.length, first_group, np.uint32(size), order)
            kernel((windows,), (THREADS,), args, shared_mem=4 * size)
        return order, first_group

    def _rank(self, parts: _Parts) -> Any:
        """Return the place that the hash asks for inside the window, NO_RANK for parts left out."""
        xp, length, method = self.xp, parts.length, self.config.hash
        left_out = (length == 0) | (length > self.heavy)
        if method == "none":
            rank = xp.zeros(length.shape[0], np.uint16)
        elif method == "sort":
            rank = (LONGEST - xp.minimum(length, LONGEST)).astype(np.uint16)
        elif method == "lut":
            capped = xp.minimum(xp.where(left_out, 0, length), CAP)
            counts = to_host(xp.bincount(capped, minlength=CAP + 1))
            classes = histogram_classes(counts)
            table = (int(classes[-1]) - classes.astype(np.int64)).astype(np.uint16)
            rank = xp.asarray(table)[capped]
        else:
            rank = xp.asarray(self._published_rank(parts, to_host(left_out)))
        rank = xp.where(left_out, xp.asarray(NO_RANK, np.uint16), rank)
        return rank.astype(np.uint16)

    def _published_rank(self, parts: _Parts, left_out: np.ndarray) -> np.ndarray:
        """Compute the published hash on the host, window by window; it is sequential."""
        from hbp_spmv.hashing import HashParams, place_paper, tune

        config, windows = self.config, to_host(parts.windows)
        lengths = np.where(left_out, 0, to_host(parts.length)).astype(np.int64)
        blocks = [lengths[a:b] for a, b in pairwise(windows)]
        params = HashParams(k0=config.k0, s=config.s, t=config.t, u=config.u)
        if config.hash == "tuned":
            sample = np.unique(np.linspace(0, len(blocks) - 1, min(len(blocks), 8)).astype(int))
            params = tune([blocks[i] for i in sample if blocks[i].any()], WARP)
        rank = np.empty(len(lengths), np.uint16)
        scratch = np.empty((2, LARGEST_SIGMA + 1), np.int64)
        for top, block in zip(windows[:-1], blocks, strict=True):
            order = np.empty(len(block), np.int64)
            place_paper(block, params.k0, params.s, params.t, params.u, order, *scratch)
            rank[top + order] = np.arange(len(block))
        return rank

    def _lengths_of(self, order: Any, parts: _Parts) -> Any:
        """Return the length of every lane, 0 where it has no row."""
        xp = self.xp
        used = order < parts.length.shape[0]
        if not parts.length.shape[0]:
            return xp.zeros(order.shape[0], np.int32)
        return xp.where(used, parts.length[xp.where(used, order, 0)], 0)

    def _index(self, order: Any, first_group: Any, parts: _Parts) -> tuple[bool, Any]:
        """Return whether offsets are 16-bit, and the base of each group."""
        a, xp, wanted = self.a, self.xp, self.config.index
        groups = int(first_group[-1])
        if parts.row is not None:
            width = self.config.strips or 0
            if wanted == "u16" and width > SPAN:
                raise ConfigError(f"index='u16': strips of {width} columns, expected up to {SPAN}")
            edges = first_group[xp.asarray(parts.strip_windows)]
            strip = xp.searchsorted(edges, xp.arange(groups), side="right") - 1
            return width <= SPAN and wanted != "u32", (strip * width).astype(np.uint32)
        zeros = xp.zeros(groups, np.uint32)
        if wanted == "u32":
            return False, zeros
        if a.shape[1] <= SPAN or not groups:
            return True, zeros
        smallest, largest = xp.empty(groups, np.uint32), xp.empty(groups, np.uint32)
        self._kernel("span_groups", {})(
            (-(-groups // (THREADS // WARP)),), (THREADS,),
            (order, np.uint32(groups), parts.low, parts.length, a.col, smallest, largest),
        )  # fmt: skip
        widest = int((largest - smallest).max())
        if widest < SPAN:
            return True, smallest
        if wanted == "u16":
            raise ConfigError(
                f"index='u16': a group spans {widest + 1} columns, 16 bits reach {SPAN}; "
                f"use index='auto' or strips={SPAN}"
            )
        return False, zeros

    def _cut_heavy(self, parts: _Parts, narrow: bool) -> tuple[Any, Any, Any]:
        """Return part, first CSR position and size of each segment of the long parts."""
        a, xp = self.a, self.xp
        heavy = xp.flatnonzero(parts.length > self.heavy)
        lengths = parts.length[heavy].astype(np.int64)
        ends = xp.cumsum(lengths)
        total = int(ends[-1]) if heavy.shape[0] else 0
        if not total:
            none = xp.zeros(0, np.int64)
            return none, none, none
        place = xp.arange(total)
        owner = xp.searchsorted(ends, place, side="right")
        inside = place - (ends - lengths)[owner]
        position = parts.low[heavy][owner] + inside
        begins = inside % SEGMENT == 0
        if narrow and a.shape[1] > SPAN:
            block = a.col[position] // SPAN
            begins[1:] |= block[1:] != block[:-1]
        first = xp.flatnonzero(begins)
        size = xp.diff(xp.append(first, xp.asarray([total])))
        return heavy[owner[first]], position[first], size

    def _targets(self, parts: _Parts, owner: Any) -> tuple[Any, Any, Any, Any]:
        """Say where each sum goes: its row, or a partial slot of a row that has several sums."""
        xp, rows = self.xp, self.a.shape[0]
        count = int(parts.length.shape[0])
        sums = ((parts.length > 0) & (parts.length <= self.heavy)).astype(np.int64)
        sums += xp.bincount(owner, minlength=count)[:count].astype(np.int64)
        row = xp.arange(rows) if parts.row is None else parts.row
        if not count:
            none = xp.zeros(0, np.uint32)
            return none, none, none, xp.zeros(1, np.int64)
        per_row = xp.bincount(row, weights=sums, minlength=rows)[:rows].astype(np.int64)
        split_rows = xp.flatnonzero(per_row > 1)
        split_start = _starts(per_row[split_rows], xp)
        if rows + int(split_start[-1]) >= 0xFFFFFFFF:
            raise InputError(
                f"strips={self.config.strips}: {int(split_start[-1])} partial sums exceed 32-bit "
                "targets; use wider strips"
            )
        target = row.astype(np.int64)
        split = xp.flatnonzero(per_row[row] > 1)
        by_row = split[xp.argsort(row[split], kind="stable")]
        target[by_row] = rows + _starts(sums[by_row], xp)[:-1]
        first = xp.searchsorted(owner, owner, side="left")
        segment_target = target[owner] + xp.arange(owner.shape[0]) - first
        return (
            target.astype(np.uint32),
            segment_target.astype(np.uint32),
            split_rows.astype(np.uint32),
            split_start,
        )

    def _fill(
        self, rows: GroupedRows, order: Any, parts: _Parts, targets: Any, segment_from: Any,
        perm: Any, *, uniform: bool,
    ) -> None:  # fmt: skip
        a, groups, segments = self.a, rows.group_base.shape[0], rows.segment_base.shape[0]
        index = "u16" if rows.col.dtype == np.uint16 else "unsigned"
        macros = {"INDEX": index, "PACK": rows.pack, "UNIFORM": int(uniform)}
        per_block = THREADS // WARP
        if groups:
            self._kernel("fill_groups", macros)(
                (-(-groups // per_block),), (THREADS,),
                (
                    order, np.uint32(groups), parts.low, parts.length, targets, a.col, a.val,
                    rows.start, rows.group_base, rows.lengths, rows.targets, rows.col, rows.val,
                    perm,
                ),
            )  # fmt: skip
        if segments:
            self._kernel("fill_segments", macros)(
                (-(-segments // per_block),), (THREADS,),
                (
                    np.uint32(segments), segment_from, rows.segment_start, rows.segment_base,
                    a.col, a.val, rows.col, rows.val, perm,
                ),
            )  # fmt: skip

    def _kernel(self, name: str, macros: dict[str, Any]) -> Any:
        defaults = {"INDEX": "u16", "PACK": 1, "UNIFORM": 0}
        known = {
            "VALUE": {"float32": "float", "float64": "double"}[self.dtype.name],
            "KEEP": int(self.config.keep_perm),
        }
        names = ("order_windows", "span_groups", "fill_groups", "fill_segments")
        return self.runtime.kernels(SOURCE, names, {**defaults, **known, **macros})[name]


def _element_places(
    start: np.ndarray, lengths: np.ndarray, pack: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return where each element of the groups is stored, and its lane."""
    long = lengths.astype(np.int64)
    lane = np.repeat(np.arange(len(long)), long)
    step = np.arange(len(lane)) - np.repeat(np.cumsum(long) - long, long)
    packs = -(-long.reshape(-1, WARP) // pack)  # of each lane, descending
    most = packs[:, 0] if len(packs) else np.zeros(0, np.int64)
    first = np.append(0, np.cumsum(most))
    group = np.repeat(np.arange(len(packs)), most)
    turn = np.arange(first[-1]) - first[group]
    active = (packs[group] > turn[:, None]).sum(axis=1)
    before = np.cumsum(active) - active  # packs stored before this turn, of all groups
    before -= before[first[group]] if len(group) else 0
    at = first[lane // WARP] + step // pack
    place = start[lane // WARP] + pack * (before[at] + lane % WARP) + step % pack
    return place, lane


def _starts(sizes: Any, xp: Any) -> Any:
    """Return the int64 prefix sums of sizes, from 0 to the total."""
    starts = xp.zeros(sizes.shape[0] + 1, np.int64)
    if sizes.shape[0]:
        xp.cumsum(sizes, out=starts[1:])
    return starts


def _all_equal(values: Any, xp: Any) -> bool:
    """Tell whether one stored value can stand for all: their bits are compared, so 0 is not -0."""
    if values.shape[0] < 2:
        return False
    bits = values.view(f"u{values.dtype.itemsize}")
    return bool((bits == bits[0]).all())


def to_host(array: Any) -> np.ndarray:
    """Return an array of the host, copied from the device if it lies there."""
    return np.asarray(array.get() if hasattr(array, "get") else array)
