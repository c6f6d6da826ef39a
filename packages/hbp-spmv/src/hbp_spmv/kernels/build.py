# SPDX-License-Identifier: Apache-2.0
"""Compiled passes of the compact builder; each is linear in rows and nonzeros."""

import numpy as np
from numba import njit

from hbp_spmv.hashing import MAX_CLASSES, ORDER_PAPER, place_rows

__all__ = [
    "arrange_windows",
    "assign_targets",
    "check_groups",
    "count_parts",
    "count_steps",
    "count_sums",
    "fill_groups",
    "fill_segments",
    "list_empty",
    "pad_groups",
    "split_parts",
    "unpack_groups",
    "unpack_segments",
    "widest_offset",
]


@njit(nogil=True, cache=True)
def list_empty(lengths, empty_rows):
    """Write the rows without nonzeros, in order."""
    at = 0
    for row in range(len(lengths)):
        if lengths[row] == 0:
            empty_rows[at] = row
            at += 1


@njit(nogil=True, cache=True)
def count_parts(ptr, col, width, counts):
    """Count the (row, strip) pairs of each strip: counts[strip]."""
    for row in range(len(ptr) - 1):
        p = ptr[row]
        while p < ptr[row + 1]:
            strip = np.int64(col[p]) // width
            counts[strip] += 1
            right = (strip + 1) * width
            while p < ptr[row + 1] and np.int64(col[p]) < right:
                p += 1


@njit(nogil=True, cache=True)
def split_parts(ptr, col, width, place, low, high, rows):
    """List the (row, strip) pairs strip by strip; `place[strip]` is advanced to the strip's end."""
    for row in range(len(ptr) - 1):
        p = ptr[row]
        while p < ptr[row + 1]:
            strip = np.int64(col[p]) // width
            slot = place[strip]
            place[strip] += 1
            low[slot] = p
            rows[slot] = row
            right = (strip + 1) * width
            while p < ptr[row + 1] and np.int64(col[p]) < right:
                p += 1
            high[slot] = p


@njit(nogil=True, cache=True)
def _widest(windows):
    """Return the parts of the largest window; np.diff would take two seconds to compile."""
    widest = 0
    for window in range(len(windows) - 1):
        widest = max(widest, windows[window + 1] - windows[window])
    return widest


@njit(nogil=True, cache=True)
def count_steps(lengths, windows, lanes, heavy, method, params, classes, descending):
    """Return the sum of the longest rows of all groups; here they run on over a window's end.

    The arguments are those of `arrange_windows`, with `lengths` of all rows.
    """
    widest = _widest(windows)
    light = np.empty(widest, np.int32)
    placed = np.empty(widest, np.int32)
    free = np.empty((2, widest + 1 if method == ORDER_PAPER else 0), np.int32)
    buckets = np.empty(MAX_CLASSES + 2, np.int64)
    steps = 0
    lane = 0
    longest = np.int64(0)
    for window in range(len(windows) - 1):
        begin = windows[window]
        size = windows[window + 1] - begin
        for part in range(size):
            k = np.int64(lengths[begin + part])
            light[part] = 0 if k > heavy else k
        place_rows(
            light[:size], method, params, classes, descending, placed[:size], free[0], free[1],
            buckets,
        )  # fmt: skip
        for part in placed[:size]:
            if light[part] > 0:
                longest = max(longest, np.int64(light[part]))
                lane += 1
                if lane == lanes:
                    steps += longest
                    lane, longest = 0, np.int64(0)
    return steps + longest


@njit(nogil=True, cache=True)
def arrange_windows(
    low, high, rows, windows, lanes, heavy, method, params, classes, descending,
    first, length, row, counts,
):  # fmt: skip
    """Order the parts of each window by the hash, groups longest first; drop empty and heavy parts.

    A window is read before it is written: the results may be `low`, `high` and `rows` themselves.

    Args:
        low: first nonzero of each part.
        high: one past its last nonzero.
        rows: row of each part; empty if the parts are the rows.
        windows: first part of each window, (windows + 1,).
        lanes: parts per group.
        heavy: parts longer than this are left out.
        method: as for `place_rows`, like the next three.
        params: (k0, s, t, u).
        classes: table of the lut hash.
        descending: longest first.
        first: result, first nonzero of each kept part.
        length: result, its nonzeros.
        row: result, its row.
        counts: result, kept parts of each window.

    Returns:
        The number of kept parts.
    """
    widest = _widest(windows)
    lengths = np.empty(widest, np.int32)
    placed = np.empty(widest, np.int32)
    free = np.empty((2, widest + 1 if method == ORDER_PAPER else 0), np.int32)
    buckets = np.empty(MAX_CLASSES + 2, np.int64)
    lows = np.empty(widest, low.dtype)
    owners = np.empty(widest, row.dtype)
    kept = 0
    for window in range(len(windows) - 1):
        begin = windows[window]
        size = windows[window + 1] - begin
        _read_window(low, high, rows, begin, size, heavy, lows, lengths, owners)
        place_rows(
            lengths[:size], method, params, classes, descending, placed[:size], free[0], free[1],
            buckets,
        )  # fmt: skip
        before = kept
        kept = _write_window(placed[:size], lows, lengths, owners, kept, first, length, row)
        counts[window] = kept - before
        for slot in range(before, kept, lanes):
            _sort_group(first, length, row, slot, min(slot + lanes, kept))
    return kept


@njit(nogil=True, cache=True)
def _read_window(low, high, rows, begin, size, heavy, lows, lengths, owners):
    """Copy one window; heavy parts get length 0 there."""
    for part in range(size):
        k = np.int64(high[begin + part]) - np.int64(low[begin + part])
        lows[part] = low[begin + part]
        lengths[part] = 0 if k > heavy else k
        owners[part] = rows[begin + part] if len(rows) else begin + part


@njit(nogil=True, cache=True)
def _write_window(placed, lows, lengths, owners, kept, first, length, row):
    """Append the parts of one window that are not empty, in their new order."""
    for part in placed:
        if lengths[part] > 0:
            first[kept] = lows[part]
            length[kept] = lengths[part]
            row[kept] = owners[part]
            kept += 1
    return kept


@njit(nogil=True, cache=True)
def _sort_group(first, length, row, begin, end):
    """Sort parts begin..end-1 by descending length, equal ones in their order."""
    for part in range(begin + 1, end):
        if length[part - 1] >= length[part]:
            continue
        held = first[part], length[part], row[part]
        at = part
        while at > begin and length[at - 1] < held[1]:
            first[at], length[at], row[at] = first[at - 1], length[at - 1], row[at - 1]
            at -= 1
        first[at], length[at], row[at] = held


@njit(nogil=True, cache=True)
def count_sums(row, heavy_rows, pieces, sums):
    """Count the sums of each row: one for an arranged part, one for each segment of a heavy one."""
    for owner in row:
        sums[owner] += 1
    for heavy in range(len(heavy_rows)):
        sums[heavy_rows[heavy]] += pieces[heavy]


@njit(nogil=True, cache=True)
def assign_targets(row, counts, windows, heavy_parts, heavy_rows, pieces, place, heavy_targets):
    """Replace the row of every arranged part by the target of its sum, strip by strip.

    Args:
        row: row of each arranged part; result: its target.
        counts: arranged parts of each window.
        windows: first part of each window before the arrangement, (windows + 1,).
        heavy_parts: heavy parts, numbered as in `windows`.
        heavy_rows: their rows.
        pieces: segments of each.
        place: first target of each row; advanced to the row's next.
        heavy_targets: result, target of each heavy part's first segment.
    """
    slot = 0
    heavy = 0
    for window in range(len(counts)):
        while heavy < len(heavy_parts) and heavy_parts[heavy] < windows[window + 1]:
            owner = heavy_rows[heavy]
            heavy_targets[heavy] = place[owner]
            place[owner] += pieces[heavy]
            heavy += 1
        for _ in range(counts[window]):
            owner = row[slot]
            row[slot] = place[owner]
            place[owner] += 1
            slot += 1


@njit(nogil=True, cache=True)
def pad_groups(parts, counts, lanes, unused, padded):
    """Copy one number per part to its lane: windows begin a group, unused lanes hold `unused`."""
    slot = 0
    lane = 0
    for count in counts:
        for _ in range(count):
            padded[lane] = parts[slot]
            slot += 1
            lane += 1
        for _ in range(-count % lanes):
            padded[lane] = unused
            lane += 1


@njit(nogil=True, cache=True)
def fill_groups(
    first, length, lanes, source_col, source_val, floor_base, limit_base,
    start, bases, col, val, perm,
):  # fmt: skip
    """Write every group's start, base and elements; return the number of elements.

    Args:
        first: first nonzero of each lane's part, (groups * lanes,).
        length: its nonzeros, descending in a group, zero where a lane is unused.
        lanes: rows per group.
        source_col: columns in CSR order.
        source_val: values in CSR order; empty if only one value is stored.
        floor_base: use the group's smallest column as its base.
        limit_base: largest base allowed, so that any 16-bit offset stays inside x.
        start: result, (groups + 1,).
        bases: result, (groups,).
        col: result, column offsets.
        val: result, values; empty if only one value is stored.
        perm: result, CSR position of each element; may be empty.
    """
    p = np.int64(0)
    for group in range(len(bases)):
        lane = group * lanes
        width = 0
        base = limit_base if floor_base else 0
        while width < lanes and length[lane + width] > 0:
            if floor_base:
                base = min(base, np.int64(source_col[first[lane + width]]))
            width += 1
        bases[group] = base
        start[group] = p
        step = 0
        while width > 0:
            for at in range(lane, lane + width):
                j = np.int64(first[at]) + step
                col[p] = np.int64(source_col[j]) - base
                if len(val):
                    val[p] = source_val[j]
                if len(perm):
                    perm[p] = j
                p += 1
            step += 1
            while width > 0 and length[lane + width - 1] <= step:
                width -= 1
    start[len(bases)] = p
    return p


@njit(nogil=True, cache=True)
def widest_offset(first, length, counts, lanes, source_col, limit_base):
    """Return the largest column offset that any group would store relative to its base."""
    widest = np.int64(0)
    slot = 0
    for count in counts:
        end = slot + count
        while slot < end:
            smallest = limit_base
            largest = np.int64(0)
            for _ in range(min(lanes, end - slot)):
                p = np.int64(first[slot])
                smallest = min(smallest, np.int64(source_col[p]))
                largest = max(largest, np.int64(source_col[p + length[slot] - 1]))
                slot += 1
            widest = max(widest, largest - smallest)
    return widest


@njit(nogil=True, cache=True)
def fill_segments(first, starts, bases, source_col, source_val, p, col, val, perm):
    """Copy the segments of the heavy rows behind the groups.

    Args:
        first: CSR position of each segment's first nonzero.
        starts: element position of each segment, (segments + 1,).
        bases: base column of each segment.
        source_col: columns in CSR order.
        source_val: values in CSR order; empty if only one value is stored.
        p: element position of the first segment.
        col: result, column offsets.
        val: result, values.
        perm: result, CSR position of each element; may be empty.
    """
    for segment in range(len(first)):
        j = np.int64(first[segment])
        for _ in range(starts[segment], starts[segment + 1]):
            col[p] = np.int64(source_col[j]) - np.int64(bases[segment])
            if len(val):
                val[p] = source_val[j]
            if len(perm):
                perm[p] = j
            p += 1
            j += 1


@njit(nogil=True, cache=True)
def unpack_groups(start, lengths, lanes, bases, col, owners, out_row, out_col):
    """Write the row and column of every element of the groups; `owners` has each lane's row."""
    for group in range(len(start) - 1):
        p = start[group]
        width = lanes
        step = 0
        while width > 0:
            while width > 0 and lengths[group * lanes + width - 1] <= step:
                width -= 1
            for lane in range(width):
                out_row[p] = owners[group * lanes + lane]
                out_col[p] = np.int64(col[p]) + np.int64(bases[group])
                p += 1
            step += 1


@njit(nogil=True, cache=True)
def unpack_segments(starts, bases, col, owners, out_row, out_col):
    """Write the row and column of every element of the segments."""
    for segment in range(len(bases)):
        for p in range(starts[segment], starts[segment + 1]):
            out_row[p] = owners[segment]
            out_col[p] = np.int64(col[p]) + np.int64(bases[segment])


@njit(nogil=True, cache=True)
def check_groups(start, lanes, bases, segment_start, segment_bases, col):
    """Return the largest column any load may touch: stored offsets, and those read past a group.

    A register load may run up to `lanes` elements past a group's end under that group's base.
    """
    worst = np.int64(-1)
    for group in range(len(bases)):
        for p in range(start[group], start[group + 1] + lanes):
            worst = max(worst, np.int64(col[p]) + np.int64(bases[group]))
    for segment in range(len(segment_bases)):
        for p in range(segment_start[segment], segment_start[segment + 1]):
            worst = max(worst, np.int64(col[p]) + np.int64(segment_bases[segment]))
    return worst
