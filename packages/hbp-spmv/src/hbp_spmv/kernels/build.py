# SPDX-License-Identifier: Apache-2.0
"""Compiled passes of the compact builder; each is linear in rows and nonzeros."""

import numpy as np
from numba import njit

from hbp_spmv.hashing import MAX_CLASSES, place_classes, place_paper, place_sorted

__all__ = [
    "ORDER_CLASSES",
    "ORDER_NONE",
    "ORDER_PAPER",
    "ORDER_SORT",
    "check_groups",
    "count_parts",
    "fill_groups",
    "fill_segments",
    "order_windows",
    "split_parts",
    "unpack_groups",
    "unpack_segments",
    "widest_offset",
]

ORDER_NONE, ORDER_PAPER, ORDER_CLASSES, ORDER_SORT = range(4)


@njit(nogil=True, cache=True)
def count_parts(ptr, col, width, counts):
    """Count the (row, strip) pairs of each strip: counts[strip]."""
    for row in range(len(ptr) - 1):
        p = ptr[row]
        while p < ptr[row + 1]:
            strip = np.int64(col[p]) // width
            counts[strip] += 1
            while p < ptr[row + 1] and np.int64(col[p]) // width == strip:
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
            while p < ptr[row + 1] and np.int64(col[p]) // width == strip:
                p += 1
            high[slot] = p


@njit(nogil=True, cache=True)
def order_windows(low, high, windows, heavy, method, params, classes, descending, order, counts):
    """Order the parts of each window by the hash; drop empty and heavy parts.

    Args:
        low: first nonzero of each part.
        high: one past its last nonzero.
        windows: first part of each window, (windows + 1,).
        heavy: parts longer than this are left out.
        method: one of the ORDER_ constants.
        params: (k0, s, t, u).
        classes: table of the lut hash.
        descending: longest first (lut and sort).
        order: result, the parts in their new order.
        counts: result, kept parts of each window.

    Returns:
        The number of kept parts.
    """
    widest = 0
    for window in range(len(windows) - 1):
        widest = max(widest, windows[window + 1] - windows[window])
    lengths = np.empty(widest, np.int64)
    placed = np.empty(widest, np.int64)
    above = np.empty(widest + 1, np.int64)
    below = np.empty(widest + 1, np.int64)
    buckets = np.empty(MAX_CLASSES + 2, np.int64)
    kept = 0
    for window in range(len(windows) - 1):
        first = windows[window]
        size = windows[window + 1] - first
        for part in range(size):
            k = np.int64(high[first + part]) - np.int64(low[first + part])
            lengths[part] = 0 if k > heavy else k
        if method == ORDER_CLASSES:
            place_classes(lengths[:size], classes, descending, placed[:size], buckets)
        elif method == ORDER_PAPER:
            k0, s, t, u = params
            place_paper(lengths[:size], k0, s, t, u, placed[:size], above, below)
        elif method == ORDER_SORT:
            place_sorted(lengths[:size], descending, placed[:size])
        else:
            for part in range(size):
                placed[part] = part
        before = kept
        for slot in range(size):
            if lengths[placed[slot]] > 0:
                order[kept] = first + placed[slot]
                kept += 1
        counts[window] = kept - before
    return kept


@njit(nogil=True, cache=True)
def fill_groups(
    low, high, targets, order, counts, lanes, source_col, source_val, floor_base, limit_base,
    start, lengths, group_targets, bases, col, val, perm,
):  # fmt: skip
    """Write every group's lengths, targets, base and elements.

    Args:
        low: first nonzero of each part.
        high: one past its last nonzero.
        targets: where each part's sum goes: a row, or rows + a partial slot.
        order: parts in slot order.
        counts: kept parts of each window.
        lanes: rows per group.
        source_col: columns in CSR order.
        source_val: values in CSR order; empty if only one value is stored.
        floor_base: use the group's smallest column as its base.
        limit_base: largest base allowed, so that any 16-bit offset stays inside x.
        start: result, (groups + 1,).
        lengths: result, (groups * lanes,), zero where a lane is unused.
        group_targets: result, (groups * lanes,), all ones where a lane is unused.
        bases: result, (groups,).
        col: result, column offsets.
        val: result, values; empty if only one value is stored.
        perm: result, CSR position of each element; may be empty.
    """
    sorted_parts = np.empty(lanes, np.int64)
    group = 0
    slot = 0
    p = np.int64(0)
    for window in range(len(counts)):
        end = slot + counts[window]
        while slot < end:
            size = min(lanes, end - slot)
            smallest = limit_base
            for lane in range(size):
                part = np.int64(order[slot + lane])
                k = high[part] - low[part]
                at = lane
                while at > 0:
                    other = sorted_parts[at - 1]
                    if high[other] - low[other] >= k:
                        break
                    sorted_parts[at] = other
                    at -= 1
                sorted_parts[at] = part
                smallest = min(smallest, np.int64(source_col[low[part]]))
            base = smallest if floor_base else 0
            bases[group] = base
            start[group] = p
            for lane in range(lanes):
                at = group * lanes + lane
                lengths[at] = 0
                group_targets[at] = 0xFFFFFFFF
                if lane < size:
                    part = sorted_parts[lane]
                    lengths[at] = high[part] - low[part]
                    group_targets[at] = targets[part]
            width = size
            step = 0
            while width > 0:
                for lane in range(width):
                    j = np.int64(low[sorted_parts[lane]]) + step
                    col[p] = np.int64(source_col[j]) - base
                    if len(val):
                        val[p] = source_val[j]
                    if len(perm):
                        perm[p] = j
                    p += 1
                step += 1
                while width > 0 and lengths[group * lanes + width - 1] <= step:
                    width -= 1
            group += 1
            slot += size
    start[group] = p
    return p


@njit(nogil=True, cache=True)
def widest_offset(low, high, order, counts, lanes, source_col, limit_base):
    """Return the largest column offset that any group would store relative to its base."""
    widest = np.int64(0)
    slot = 0
    for window in range(len(counts)):
        end = slot + counts[window]
        while slot < end:
            smallest = limit_base
            largest = np.int64(0)
            for _ in range(min(lanes, end - slot)):
                part = np.int64(order[slot])
                smallest = min(smallest, np.int64(source_col[low[part]]))
                largest = max(largest, np.int64(source_col[high[part] - 1]))
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
