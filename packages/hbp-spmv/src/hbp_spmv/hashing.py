# SPDX-License-Identifier: Apache-2.0
"""The nonlinear hash: reorder the rows of a block by their number of nonzeros in O(1) a row.

Two hashes are implemented beside plain sorting:

* `paper`: home slot `a(k) = ((b >> s) << t) + u*b` with `b = max(k - k0, 0)`, collisions resolved
  by an outward search. The published search is quadratic when rows share a home; here two
  union-find arrays ("next free slot above", "next free slot below") give the same placement in
  near-linear time.
* `lut`: a monotone table of at most 32 length classes, built once per matrix from its histogram; a
  row goes to its class's range at its rank in row order. It has sorting's quality without
  comparisons.

A placement is the array `output_hash`: `output_hash[slot]` is the local row placed in that slot.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from tenfold_core.errors import ConfigError, InputError

from hbp_spmv.classes import CAP, MAX_CLASSES, heavy_limit, histogram_classes
from hbp_spmv.compiled import njit
from hbp_spmv.config import PAPER_HASH, HashParams

__all__ = [
    "CAP",
    "HASHES",
    "MAX_CLASSES",
    "ORDER_CLASSES",
    "ORDER_NONE",
    "ORDER_PAPER",
    "ORDER_SORT",
    "PAPER_HASH",
    "HashParams",
    "heavy_limit",
    "length_classes",
    "place_classes",
    "place_paper",
    "place_rows",
    "place_sorted",
    "quality",
    "reorder",
    "tune",
]

HASHES = ("lut", "paper", "tuned", "sort", "none")
ORDER_NONE, ORDER_PAPER, ORDER_CLASSES, ORDER_SORT = range(4)

_histogram_classes = njit(nogil=True, cache=True)(histogram_classes)


@njit(nogil=True, cache=True)
def _find(parent, slot):
    """Return the root of `slot`, halving the path on the way."""
    while parent[slot] != slot:
        parent[slot] = parent[parent[slot]]
        slot = parent[slot]
    return slot


@njit(nogil=True, cache=True)
def _home(k, k0, s, t, u, rows):
    """Return the home slot of a row of k nonzeros, `rows` for any beyond the block."""
    b = max(k - k0, 0)
    # A home this far up is beyond the block; computing it could leave 64 bits.
    if (b >> s) >= rows or (u > 0 and b >= rows):
        return rows
    return ((b >> s) << t) + u * b


@njit(nogil=True, cache=True)
def place_paper(lengths, k0, s, t, u, output_hash, above, below):
    """Place the rows of one block by the published hash and collision rule.

    Args:
        lengths: nonzeros of each row, (rows,).
        k0: lengths up to k0 share home 0.
        s: right shift of the hash.
        t: left shift of the hash.
        u: linear term of the hash.
        output_hash: result, (rows,): the row in each slot.
        above: scratch, (rows + 1,): next free slot upwards, `rows` if there is none.
        below: scratch, (rows + 1,): next free slot downwards plus one, 0 if there is none.
    """
    rows = len(lengths)
    longest = 0
    for k in lengths:
        longest = max(longest, np.int64(k))
    # The hash is monotone: if the longest row's home is 0, every row's is.
    if rows == 0 or _home(longest, k0, s, t, u, rows) == 0:
        for row in range(rows):
            output_hash[row] = row
        return
    for slot in range(rows + 1):
        above[slot] = slot
        below[slot] = slot
    lowest = 0  # no slot below it is free
    for row in range(rows):
        home = _home(np.int64(lengths[row]), k0, s, t, u, rows)
        if home == 0:
            slot = _find(above, lowest)
            lowest = slot + 1
        elif home >= rows:
            slot = _find(below, rows) - 1
        else:
            slot = _find(above, home)
            if slot != home:
                down = _find(below, home + 1) - 1
                if slot == rows or (down >= 0 and home - down < slot - home):
                    slot = down
        output_hash[slot] = row
        above[slot] = slot + 1
        below[slot + 1] = slot


@njit(nogil=True, cache=True)
def place_classes(lengths, classes, descending, output_hash, counts):
    """Place rows by class, equal classes in row order: a counting sort on `classes[min(k, CAP)]`.

    Args:
        lengths: nonzeros of each row, (rows,).
        classes: class of each length, (CAP + 1,), non-decreasing.
        descending: put the longest class first.
        output_hash: result, (rows,).
        counts: scratch, (largest class + 2,) or more.
    """
    last = np.int64(classes[CAP])
    counts[: last + 2] = 0
    # Empty rows, most of a sparse block, are counted in a register.
    empties = 0
    apart = classes[1] > classes[0]
    for k in lengths:
        if k == 0 and apart:
            empties += 1
        else:
            c = np.int64(classes[min(np.int64(k), CAP)])
            counts[(last - c if descending else c) + 1] += 1
    rows = len(lengths)
    empty_slot = rows - empties if descending else 0
    counts[0] = 0 if descending else empties
    for c in range(last + 1):
        counts[c + 1] += counts[c]
    for row in range(rows):
        if lengths[row] == 0 and apart:
            output_hash[empty_slot] = row
            empty_slot += 1
        else:
            c = np.int64(classes[min(np.int64(lengths[row]), CAP)])
            c = last - c if descending else c
            output_hash[counts[c]] = row
            counts[c] += 1


@njit(nogil=True, cache=True)
def place_sorted(lengths, descending, output_hash):
    """Place rows by length with a stable merge sort: the `sort2D` baseline."""
    keys = np.empty(len(lengths), np.int64)
    for row in range(len(lengths)):
        keys[row] = -np.int64(lengths[row]) if descending else np.int64(lengths[row])
    output_hash[:] = np.argsort(keys, kind="mergesort")


@njit(nogil=True, cache=True)
def place_rows(lengths, method, params, classes, descending, output_hash, above, below, counts):
    """Place the rows of one block by any method.

    Args:
        lengths: nonzeros of each row, (rows,).
        method: one of the ORDER_ constants.
        params: (k0, s, t, u) of the published family.
        classes: table of the lut hash.
        descending: longest first (lut and sort).
        output_hash: result, (rows,).
        above: scratch of `place_paper`.
        below: scratch of `place_paper`.
        counts: scratch of `place_classes`.
    """
    if method == ORDER_CLASSES:
        place_classes(lengths, classes, descending, output_hash, counts)
    elif method == ORDER_PAPER:
        k0, s, t, u = params
        place_paper(lengths, k0, s, t, u, output_hash, above, below)
    elif method == ORDER_SORT:
        place_sorted(lengths, descending, output_hash)
    else:
        for row in range(len(lengths)):
            output_hash[row] = row


@njit(nogil=True, cache=True)
def length_classes(samples):
    """Cut row lengths into classes, see `classes.histogram_classes`.

    Args:
        samples: row lengths of a sample of the matrix.

    Returns:
        The class of each length 0..255, (256,) uint8; longer rows have the class of 255.
    """
    counts = np.zeros(CAP + 1, np.int64)
    for k in samples:
        counts[min(np.int64(k), CAP)] += 1
    return _histogram_classes(counts)


@njit(nogil=True, cache=True)
def quality(lengths, order, lanes):
    """Return (sum of group maxima, sum of within-group standard deviations, groups).

    Lane efficiency is `sum(lengths) / (lanes * sum of maxima)`; groups are runs of `lanes` slots.
    """
    maxima = 0
    deviation = 0.0
    groups = 0
    for first in range(0, len(order), lanes):
        last = min(first + lanes, len(order))
        longest = 0
        total = 0.0
        squares = 0.0
        for slot in range(first, last):
            k = np.int64(lengths[order[slot]])
            longest = max(longest, k)
            total += k
            squares += k * k
        mean = total / (last - first)
        maxima += longest
        deviation += np.sqrt(max(squares / (last - first) - mean * mean, 0.0))
        groups += 1
    return maxima, deviation, groups


def tune(blocks: Sequence[NDArray[np.integer]], lanes: int) -> HashParams:
    """Choose (s, t) of the published family by lane efficiency on sample blocks.

    Args:
        blocks: row lengths of each sample block.
        lanes: rows per group.
    """
    best, chosen = None, PAPER_HASH
    widest = max((len(block) for block in blocks), default=1)
    scratch = np.empty((2, widest + 1), np.int64)
    for s in range(7):
        for t in range(10):
            cost = 0
            for block in blocks:
                order = np.empty(len(block), np.int64)
                place_paper(block, 0, s, t, 0, order, scratch[0], scratch[1])
                cost += quality(block, order, lanes)[0]
            if best is None or cost < best:
                best, chosen = cost, HashParams(s=s, t=t)
    return chosen


def reorder(
    lengths: ArrayLike,
    method: str = "lut",
    *,
    params: HashParams = PAPER_HASH,
    lanes: int = 32,
    classes: NDArray[np.uint8] | None = None,
) -> NDArray[np.int64]:
    """Return the row order of one block: entry `slot` is the local row placed there.

    Args:
        lengths: nonzeros of each row of the block, (rows,), non-negative integers.
        method: one of `HASHES`.
        params: parameters of the published family, for `paper`.
        lanes: rows per group, for `tuned`.
        classes: table of the `lut` hash, (256,), non-decreasing; built from `lengths` if absent.

    Raises:
        ConfigError: the method is unknown, or `lanes` not positive.
        InputError: `lengths` is not a vector of non-negative integers, or `classes` not a table.

    Example:
        >>> reorder([5, 0, 1, 2, 3, 2, 0, 4], "paper", params=HashParams(s=1, t=1)).tolist()
        [1, 2, 3, 4, 0, 5, 6, 7]
    """
    k = np.asarray(lengths)
    if k.ndim != 1 or (k.size and (k.dtype.kind not in "iu" or k.min() < 0)):
        raise InputError(
            f"lengths: expected a vector of non-negative integers, got {k.dtype} of shape {k.shape}"
        )
    if not isinstance(lanes, int) or lanes < 1:
        raise ConfigError(f"lanes: expected a positive int, got {lanes!r}")
    k = k.astype(np.int64)
    order = np.arange(k.size)
    if method in ("paper", "tuned"):
        chosen = tune([k], lanes) if method == "tuned" else params
        above, below = np.empty((2, k.size + 1), np.int64)
        place_paper(k, chosen.k0, chosen.s, chosen.t, chosen.u, order, above, below)
    elif method == "lut":
        table = length_classes(k) if classes is None else _checked_classes(classes)
        place_classes(k, table, False, order, np.empty(int(table[CAP]) + 2, np.int64))
    elif method == "sort":
        place_sorted(k, False, order)
    elif method != "none":
        raise ConfigError(f"hash: expected one of {', '.join(HASHES)}, got {method!r}")
    return order


def _checked_classes(classes: NDArray[np.integer]) -> NDArray[np.uint8]:
    table = np.asarray(classes)
    good = table.shape == (CAP + 1,) and table.dtype.kind in "iu"
    if not good or table[0] < 0 or table[CAP] > CAP or (table[1:] < table[:-1]).any():
        raise InputError(
            f"classes: expected {CAP + 1} non-decreasing integers in 0..{CAP}, got {table.dtype} "
            f"of shape {table.shape}"
        )
    return table.astype(np.uint8)
