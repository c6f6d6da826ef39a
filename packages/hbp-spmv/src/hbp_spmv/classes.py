# SPDX-License-Identifier: Apache-2.0
"""Classes of row lengths: the table of the `lut` hash, and which rows are too long for a group.

Plain Python on 256 numbers, so that a GPU host without numba can use it as well.
"""

import numpy as np

__all__ = [
    "CAP",
    "FEWEST_IN_SEGMENT",
    "FEW_SEGMENTS",
    "MAX_CLASSES",
    "OWN_CLASS",
    "heavy_limit",
    "histogram_classes",
]

CAP = 255
"""Longest row length told apart by the `lut` hash."""
MAX_CLASSES = 32
OWN_CLASS = 8
"""Lengths 0..8 have a class each."""
FEW_SEGMENTS = 64
FEWEST_IN_SEGMENT = 512
"""Mean nonzeros of a segment below which 16-bit offsets cost more than they save."""


def heavy_limit(rows: int, nnz: int) -> int:
    """Return the longest row that stays in a group; longer ones are cut into segments."""
    mean = nnz / max(rows, 1)
    return int(min(max(128, 16 * mean), max(4096, nnz / 64)))


def histogram_classes(counts):
    """Cut row lengths into at most 32 monotone classes of about equal work.

    Lengths 0..8 have a class each. So have the longer ones if there are few enough; otherwise they
    are cut so that each class carries about the same number of nonzeros.

    Args:
        counts: rows of each length 0..255, longer ones counted as 255, (256,).

    Returns:
        The class of each length 0..255, (256,) uint8; longer rows have the class of 255.
    """
    work = counts * np.arange(CAP + 1)
    work[: OWN_CLASS + 1] = 0
    total = max(work.sum(), 1)
    spare = MAX_CLASSES - (OWN_CLASS + 1)
    few = (work > 0).sum() <= spare
    classes = np.empty(CAP + 1, np.uint8)
    done = 0  # nonzeros, or lengths, in the classes so far
    for k in range(CAP + 1):
        if k <= OWN_CLASS:
            classes[k] = k
        elif few:
            classes[k] = OWN_CLASS + 1 + min(done, spare - 1)
            done += work[k] > 0
        else:  # by the middle of its work: a length that dominates is apart from shorter ones
            middle = done + work[k] // 2
            classes[k] = OWN_CLASS + 1 + min(middle * spare // total, spare - 1)
            done += work[k]
    return classes
