# SPDX-License-Identifier: Apache-2.0
"""Who computes which block: the published mixed allocation, and the one used here.

The paper gives every warp a fixed run of blocks and lets the warps compete for the rest. Its
integer arithmetic (`published_blocks`) divides by zero on narrow matrices and can repeat or skip
blocks, so it is kept for study only. `cut` keeps the idea: the first `fixed_share` of the *work* is
cut into one contiguous run per worker, the rest is drawn from a shared queue.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tenfold_core.errors import ConfigError

__all__ = ["Allocation", "Chunks", "cut", "published_allocation", "published_block"]

FIXED_SHARE = 0.8
"""Share of the work that is allocated in advance."""
RUN_CHUNKS = 4
"""Chunks per fixed run, so that an idle worker can take over part of a run."""
TICKET_CHUNKS = 4
"""Chunks per worker in the shared queue."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """The published allocation for R block rows, C strips and P warps."""

    block_rows: int
    strips: int
    warps: int
    teams: int
    """T = ceil(P / C), warps that share a strip in the regular case."""
    run: int
    """b = floor(R / T), block rows of a fixed run."""
    full: int
    """F = floor(P / C), strips' worth of complete runs."""
    wide: int
    """a = C - (P mod C), strips with one fixed run fewer."""
    competitive: int
    """Blocks left to the ticket counter."""


def published_allocation(block_rows: int, strips: int, warps: int = 256) -> Allocation:
    """Return the published division of R x C blocks among P warps.

    Raises:
        ConfigError: the published arithmetic has no fixed part here (b = 0), as on narrow matrices.
    """
    teams = -(-warps // strips)
    run = block_rows // teams
    if run == 0:
        raise ConfigError(
            f"published allocation: {block_rows} block rows for {teams} warps a strip leave no "
            "fixed run (the published code divides by zero here); use schedule='mixed'"
        )
    full = warps // strips
    competitive = strips * block_rows - warps * run
    if teams > 1 and block_rows - full * run < run:
        left = block_rows - full * run
        competitive = strips * block_rows - full * run * strips - (warps % strips) * left
    return Allocation(
        block_rows=block_rows,
        strips=strips,
        warps=warps,
        teams=teams,
        run=run,
        full=full,
        wide=strips - warps % strips,
        competitive=competitive,
    )


def published_block(allocation: Allocation, ticket: int) -> tuple[int, int]:
    """Return (block row, strip) of competitive block number `ticket`."""
    a = allocation
    p = ticket - a.run * a.wide
    if p < 0:
        return a.full * a.run + ticket // a.wide, a.warps % a.strips + ticket % a.wide
    return a.teams * a.run + p // a.strips, p % a.strips


@dataclass(frozen=True, slots=True)
class Chunks:
    """Ranges of work units and the queues they stand in.

    Chunk c covers units `bounds[c]..bounds[c+1]-1`; queue w < workers is worker w's fixed run,
    queue `workers` the shared one; queue q holds chunks `queues[q]..queues[q+1]-1`.
    """

    bounds: NDArray[np.int64]
    queues: NDArray[np.int64]


def cut(work: NDArray[np.integer], workers: int, *, fixed_share: float = FIXED_SHARE) -> Chunks:
    """Cut units 0..len(work)-1 into chunks of about equal work.

    Every unit lies in exactly one chunk. With one worker there is a single chunk.

    Args:
        work: cost of each unit, non-negative.
        workers: number of threads.
        fixed_share: share of the work in fixed runs: 1 is a static schedule, 0 a dynamic one.

    Raises:
        ConfigError: `workers` is not positive or `fixed_share` is outside 0..1.
    """
    if workers < 1:
        raise ConfigError(f"workers: expected at least 1, got {workers}")
    if not 0 <= fixed_share <= 1:
        raise ConfigError(f"fixed_share: expected a value in 0..1, got {fixed_share}")
    units = len(work)
    if workers == 1:
        return Chunks(np.array([0, units]), np.array([0, 1, 1]))
    done = _running_total(work)
    runs = workers * RUN_CHUNKS if fixed_share > 0 else 0
    tickets = workers * TICKET_CHUNKS if fixed_share < 1 else 0
    fixed = np.linspace(0, fixed_share * done[-1], runs + 1)
    shared = np.linspace(fixed[-1], done[-1], tickets + 1)
    edges = np.concatenate([fixed, shared[1:]])
    bounds = np.searchsorted(done, edges, side="left")
    bounds[0], bounds[-1] = 0, units
    per_run = RUN_CHUNKS if runs else 0
    queues = np.concatenate([np.arange(workers + 1) * per_run, [runs + tickets]])
    return Chunks(np.maximum.accumulate(bounds).astype(np.int64), queues.astype(np.int64))


def _running_total(work: NDArray[np.integer]) -> NDArray[np.float64]:
    """Return the work before each unit, and all of it; piece by piece, since NumPy casts copies."""
    total = np.zeros(len(work) + 1)
    for first in range(0, len(work), 1 << 14):
        piece = total[first + 1 : first + 1 + (1 << 14)]
        np.cumsum(work[first : first + len(piece)], dtype=np.float64, out=piece)
        piece += total[first]
    return total
