# SPDX-License-Identifier: Apache-2.0
"""An R-MAT graph of tens of millions of edges in seconds, drawn and merged in chunks by threads.

It is drawn otherwise than `generate.rmat`, so the same seed gives another matrix; here it does not
depend on the number of threads either.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from tenfold_core.device import cpu_info
from tenfold_core.errors import ConfigError

__all__ = ["GRAPH500", "rmat_in_chunks"]

GRAPH500 = (0.57, 0.19, 0.19, 0.05)
CHUNK = 1 << 21
"""Edges of a chunk."""
PIECES = 16
"""Ranges of edges that are merged apart."""
_BITS = 16  # of a random number, which chooses the quadrants of two levels


def rmat_in_chunks(
    scale: int = 22,
    edge_factor: int = 16,
    probabilities: Sequence[float] = GRAPH500,
    *,
    seed: int = 0,
) -> csr_array:
    """Draw `edge_factor * 2**scale` edges, relabel the vertices at random, merge equal edges.

    An edge drawn k times has the value k. Probabilities are rounded to multiples of 2**-16 for two
    levels together.

    Raises:
        ConfigError: a size is out of range, or the probabilities are negative or do not sum to 1.
    """
    if not 1 <= scale <= 30 or not 1 <= edge_factor < (1 << 31) >> scale:
        raise ConfigError(
            f"rmat: scale {scale} and edge factor {edge_factor}, expected 1 to 30, at least 1 and "
            "fewer than 2**31 edges"
        )
    share = np.asarray(probabilities, dtype=np.float64)
    if share.shape != (4,) or (share < 0).any() or abs(share.sum() - 1) > 1e-9:
        raise ConfigError(f"rmat: probabilities are {probabilities}, expected four with sum 1")
    vertices, edges = 1 << scale, edge_factor << scale
    sizes = [min(CHUNK, edges - start) for start in range(0, edges, CHUNK)]
    streams = np.random.SeedSequence(seed).spawn(len(sizes) + 1)
    label = np.random.default_rng(streams[-1]).permutation(vertices)
    draw = partial(_draw, scale=scale, share=share, label=label)
    with ThreadPoolExecutor(max(1, min(cpu_info().usable_cores, PIECES))) as pool:
        keys = np.concatenate(list(pool.map(draw, streams, sizes)))
        ends = [(piece * vertices // PIECES) << scale for piece in range(PIECES + 1)]
        parts = list(pool.map(partial(_merged, keys), ends, ends[1:]))
    del keys
    found = np.concatenate([part for part, _ in parts])
    lengths = np.bincount(found >> scale, minlength=vertices)
    matrix = csr_array(
        (
            np.concatenate([counts for _, counts in parts]).astype(np.float64),
            (found & (vertices - 1)).astype(np.int32),
            np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
        ),
        shape=(vertices, vertices),
    )
    matrix.has_canonical_format = True
    return matrix


def _draw(
    stream: np.random.SeedSequence,
    size: int,
    *,
    scale: int,
    share: NDArray[np.float64],
    label: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Return row and column of each edge as one number."""
    rng = np.random.default_rng(stream)
    row, column = np.zeros((2, size), np.uint32)
    for levels in [2] * (scale // 2) + [1] * (scale % 2):
        code = _table(share, levels)[rng.integers(0, 1 << _BITS, size, dtype=np.uint16)]
        row = (row << levels) | (code >> levels)
        column = (column << levels) | (code & ((1 << levels) - 1))
    return (label[row] << scale) | label[column]


def _table(share: NDArray[np.float64], levels: int) -> NDArray[np.uint8]:
    """Return, for each random number, `levels` bits of the row and then as many of the column."""
    joint, rows, columns = np.ones(1), np.zeros(1, int), np.zeros(1, int)
    for _ in range(levels):
        joint = np.outer(joint, share).ravel()
        rows = np.add.outer(2 * rows, [0, 0, 1, 1]).ravel()
        columns = np.add.outer(2 * columns, [0, 1, 0, 1]).ravel()
    bounds = np.rint(np.cumsum(joint) * (1 << _BITS)).astype(int)
    return np.repeat((rows << levels) | columns, np.diff(bounds, prepend=0)).astype(np.uint8)


def _merged(
    keys: NDArray[np.int64], low: int, high: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the distinct numbers from `low` to below `high`, ascending, and how often each is."""
    part = keys[(keys >= low) & (keys < high)]
    part.sort()
    first = np.ones(len(part), bool)
    first[1:] = part[1:] != part[:-1]
    starts = np.flatnonzero(first)
    return part[starts], np.diff(starts, append=len(part))
