# SPDX-License-Identifier: Apache-2.0
"""What reordering costs and what it buys, method by method: the paper's preprocessing claim.

The paper states that its hash preprocesses 3.53 times faster than sorting (sort2D) and 3.67 times
faster than the dynamic programming of Regu2D (DP2D), averaged over its matrices. Here every method
gets the same input, the row lengths of all blocks, and writes the same output, the row order of all
blocks, in one compiled loop on one thread.
"""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from tenfold_core.errors import ConfigError

from hbp_spmv.compiled import njit
from hbp_spmv.dp2d import ALPHA, cut_groups
from hbp_spmv.hashing import (
    MAX_CLASSES,
    PAPER_HASH,
    HashParams,
    length_classes,
    place_classes,
    place_paper,
    place_sorted,
)
from hbp_spmv.method import block_lengths

__all__ = ["METHODS", "Reordering", "reorder_times"]

METHODS = ("none", "paper", "lut", "sort", "quick", "DP2D")
"""Row orders compared: `sort` is sort2D (stable merge sort), `quick` the same by quicksort."""
_SAMPLES = 64
"""Blocks from whose lengths the lut hash builds its table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reordering:
    """One row of the comparison."""

    best_ms: float
    median_ms: float
    std_fall_percent: float
    """Fall of the mean within-group standard deviation of the row lengths against `none`."""
    lane_efficiency: float
    """nnz / (lanes * sum of group maxima)."""


def reorder_times(
    a: csr_array,
    *,
    height: int = 512,
    width: int = 4096,
    lanes: int = 32,
    params: HashParams = PAPER_HASH,
    repeats: int = 5,
) -> dict[str, Reordering]:
    """Time the row order of all blocks by every method of `METHODS`, and judge the orders.

    The rounds are interleaved, so that a slow moment of the machine meets every method. Compilation
    and the count of the block lengths are excluded; the table of the lut hash is included.

    Args:
        a: canonical CSR.
        height: rows of a block.
        width: columns of a block.
        lanes: rows per group.
        params: parameters of the published hash.
        repeats: rounds.

    Raises:
        ConfigError: `repeats` is not positive.
    """
    if repeats < 1:
        raise ConfigError(f"repeats: expected at least 1, got {repeats}")
    problem = _Problem(
        block_lengths(a, height, width), _edges(a.shape, height, width), lanes, params
    )
    judged = {name: problem.judge(*problem.solve(name)) for name in METHODS}  # compiles, too
    times: dict[str, list[float]] = {name: [] for name in METHODS}
    for _ in range(repeats):
        for name in METHODS:
            begin = perf_counter()
            problem.solve(name)
            times[name].append(1e3 * (perf_counter() - begin))
    unordered = judged["none"][1]
    return {
        name: Reordering(
            best_ms=min(times[name]),
            median_ms=median(times[name]),
            std_fall_percent=100 * (1 - deviation / unordered) if unordered else 0.0,
            lane_efficiency=efficiency,
        )
        for name, (efficiency, deviation) in judged.items()
    }


def _edges(shape: tuple[int, int], height: int, width: int) -> NDArray[np.int64]:
    """Return the slot at which each block begins, and the end."""
    tops = np.arange(0, shape[0], height)
    heights = np.repeat(np.minimum(height, shape[0] - tops), -(-shape[1] // width))
    return np.concatenate([[0], np.cumsum(heights)]).astype(np.int64)


class _Problem:
    """The lengths of all blocks, and a buffer for their order."""

    def __init__(
        self, lengths: NDArray[np.int32], edges: NDArray, lanes: int, params: HashParams
    ) -> None:
        self.lengths = lengths
        self.edges = edges
        self.lanes = lanes
        self.params = (params.k0, params.s, params.t, params.u)
        self.order = np.empty(len(lengths), np.int32)
        self.ends = np.empty(len(lengths), np.int32)
        self.uniform = _uniform_ends(edges, lanes)

    def solve(self, name: str) -> tuple[NDArray, NDArray]:
        """Return the order and the slot after each group, in buffers that the next call reuses."""
        groups = _SOLVERS[name](self)
        return self.order, self.uniform if groups is None else self.ends[:groups]

    def judge(self, order: NDArray, ends: NDArray) -> tuple[float, float]:
        """Return lane efficiency and mean within-group standard deviation."""
        maxima, deviation = _quality(self.lengths, self.edges, order, ends)
        slots = self.lanes * maxima
        efficiency = int(self.lengths.sum()) / slots if slots else 1.0
        return efficiency, deviation / len(ends) if len(ends) else 0.0

    def table(self) -> NDArray[np.uint8]:
        """Return the lut table of evenly spaced blocks that have nonzeros."""
        return length_classes(_sample(self.lengths, self.edges, _SAMPLES))


def _none(p: _Problem) -> None:
    _order_none(p.edges, p.order)


def _paper(p: _Problem) -> None:
    _order_paper(p.lengths, p.edges, p.params, p.order)


def _lut(p: _Problem) -> None:
    _order_classes(p.lengths, p.edges, p.table(), p.order)


def _sort(p: _Problem) -> None:
    _order_sort(p.lengths, p.edges, p.order)


def _quick(p: _Problem) -> None:
    _order_quick(p.lengths, p.edges, p.order)


def _dp(p: _Problem) -> int:
    return _order_dp(p.lengths, p.edges, p.lanes, p.order, p.ends)


_SOLVERS: dict[str, Callable[[_Problem], int | None]] = dict(
    zip(METHODS, (_none, _paper, _lut, _sort, _quick, _dp), strict=True)
)
"""Each writes the order of all blocks; DP2D also the groups, whose number it returns."""


@njit(nogil=True, cache=True)
def _tallest(edges):
    tallest = 0
    for block in range(len(edges) - 1):
        tallest = max(tallest, edges[block + 1] - edges[block])
    return tallest


@njit(nogil=True, cache=True)
def _sample(lengths, edges, wanted):
    """Return the lengths of up to `wanted` evenly spaced blocks that are not empty."""
    filled = np.empty(len(edges), np.int64)
    count = 0
    for block in range(len(edges) - 1):
        for slot in range(edges[block], edges[block + 1]):
            if lengths[slot] > 0:
                filled[count] = block
                count += 1
                break
    taken = min(wanted, count)
    sample = np.empty(taken * _tallest(edges), lengths.dtype)
    size = 0
    for number in range(taken):
        block = filled[number * (count - 1) // max(taken - 1, 1)]
        for slot in range(edges[block], edges[block + 1]):
            sample[size] = lengths[slot]
            size += 1
    return sample[:size]


@njit(nogil=True, cache=True)
def _uniform_ends(edges, lanes):
    """Return the slot after each group when every block is cut into runs of `lanes` slots."""
    count = 0
    for block in range(len(edges) - 1):
        count += (edges[block + 1] - edges[block] + lanes - 1) // lanes
    ends = np.empty(count, np.int32)
    group = 0
    for block in range(len(edges) - 1):
        for first in range(edges[block], edges[block + 1], lanes):
            ends[group] = min(first + lanes, edges[block + 1])
            group += 1
    return ends


@njit(nogil=True, cache=True)
def _order_none(edges, order):
    for block in range(len(edges) - 1):
        for slot in range(edges[block], edges[block + 1]):
            order[slot] = slot - edges[block]


@njit(nogil=True, cache=True)
def _order_paper(lengths, edges, params, order):
    k0, s, t, u = params
    scratch = np.empty((2, _tallest(edges) + 1), np.int64)
    for block in range(len(edges) - 1):
        first, end = edges[block], edges[block + 1]
        place_paper(lengths[first:end], k0, s, t, u, order[first:end], scratch[0], scratch[1])


@njit(nogil=True, cache=True)
def _order_classes(lengths, edges, classes, order):
    counts = np.empty(MAX_CLASSES + 2, np.int64)
    for block in range(len(edges) - 1):
        first, end = edges[block], edges[block + 1]
        place_classes(lengths[first:end], classes, False, order[first:end], counts)


@njit(nogil=True, cache=True)
def _order_sort(lengths, edges, order):
    for block in range(len(edges) - 1):
        first, end = edges[block], edges[block + 1]
        place_sorted(lengths[first:end], False, order[first:end])


@njit(nogil=True, cache=True)
def _order_quick(lengths, edges, order):
    for block in range(len(edges) - 1):
        first, end = edges[block], edges[block + 1]
        order[first:end] = np.argsort(lengths[first:end], kind="quicksort")


@njit(nogil=True, cache=True)
def _order_dp(lengths, edges, lanes, order, ends):
    scratch = np.empty((2, _tallest(edges) + 1), np.int64)
    groups = 0
    for block in range(len(edges) - 1):
        first, end = edges[block], edges[block + 1]
        place_sorted(lengths[first:end], False, order[first:end])
        count = cut_groups(
            lengths[first:end], order[first:end], lanes, ALPHA, scratch[0], scratch[1],
            ends[groups:],
        )  # fmt: skip
        for group in range(groups, groups + count):
            ends[group] += first
        groups += count
    return groups


@njit(nogil=True, cache=True)
def _quality(lengths, edges, order, ends):
    """Return (sum of group maxima, sum of within-group standard deviations)."""
    maxima = 0
    deviation = 0.0
    slot = 0
    block = 0
    for end in ends:
        while edges[block + 1] <= slot:
            block += 1
        longest = 0
        total = 0.0
        squares = 0.0
        size = end - slot
        while slot < end:
            k = np.int64(lengths[edges[block] + order[slot]])
            longest = max(longest, k)
            total += k
            squares += k * k
            slot += 1
        mean = total / size
        maxima += longest
        deviation += np.sqrt(max(squares / size - mean * mean, 0.0))
    return maxima, deviation
