# SPDX-License-Identifier: Apache-2.0
"""Are the cores of this machine really there? A probe for timings with several threads.

A virtual machine may run two of its processors on the two hardware threads of one core, for seconds
at a time and invisibly from inside: no other process shows, yet two threads that keep their
arithmetic units busy are hardly faster than one. What is timed then says nothing about two cores.
"""

from collections.abc import Callable
from functools import cache, partial
from time import perf_counter
from typing import Any

import numpy as np

from hbp_spmv.generate import banded
from hbp_spmv.matrix import from_csr
from hbp_spmv.summary import LEAST_SPEED_UP

__all__ = ["speed_up"]

_ROWS = 6000  # 0.6 MB of float32: inside the second-level cache of one core
_SAMPLE, _SAMPLES = 20, 100  # products of a sample, and samples: at most 20 ms


def speed_up(threads: int) -> float:
    """Return how many times as fast a cached product is on `threads` threads.

    A helper that slept may take some milliseconds to get a core, so samples go on until two in a
    row are fast.
    """
    one = min(_sample(_product(1)) for _ in range(3))
    several = [_sample(_product(threads)) for _ in range(2)]
    while len(several) < _SAMPLES and one < LEAST_SPEED_UP * max(several[-2:]):
        several.append(_sample(_product(threads)))
    return one / max(several[-2:])


def _sample(product: Callable[[], Any]) -> float:
    started = perf_counter()
    for _ in range(_SAMPLE):
        product()
    return perf_counter() - started


@cache
def _product(threads: int) -> Callable[[], Any]:
    matrix = from_csr(banded(_ROWS), layout="compact", dtype="f32", threads=threads)
    return partial(matrix.matvec, np.ones(_ROWS, np.float32), np.empty(_ROWS, np.float32))
