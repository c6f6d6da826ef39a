# SPDX-License-Identifier: Apache-2.0
"""The method written down literally: slow loops, the published search, float64, no cleverness.

Names and results are those of the fast modules; the tests hold them equal bit for bit.
"""

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from hbp_spmv.config import PAPER_HASH, HashParams

__all__ = ["build_paper", "place_paper", "product_paper"]


def place_paper(lengths: NDArray[np.integer], params: HashParams = PAPER_HASH) -> NDArray[np.int64]:
    """Place rows by the published outward search: a, a+1, a-1, a+2, a-2, ..."""
    rows = len(lengths)
    output_hash = np.full(rows, -1)
    for row in range(rows):
        b = max(int(lengths[row]) - params.k0, 0)
        home = ((b >> params.s) << params.t) + params.u * b
        if home >= rows:
            slot = rows - 1
            while output_hash[slot] >= 0:
                slot -= 1
        else:
            slot, distance = home, 0
            while True:
                above, below = home + distance, home - distance
                if above < rows and output_hash[above] < 0:
                    slot = above
                    break
                if below >= 0 and output_hash[below] < 0:
                    slot = below
                    break
                distance += 1
        output_hash[slot] = row
    return output_hash


def build_paper(
    a: csr_array,
    *,
    height: int = 512,
    width: int = 4096,
    lanes: int = 32,
    params: HashParams = PAPER_HASH,
) -> dict[str, NDArray]:
    """Build the six arrays of the published layout block by block, group by group, step by step."""
    rows, columns = a.shape
    strips = -(-columns // width)
    col, data, add_sign, zero_row, begin_ptr, output_hash = [], [], [], [], [0], []
    for top in range(0, rows, height):
        block_rows = range(top, min(top + height, rows))
        for strip in range(strips):
            left, right = strip * width, (strip + 1) * width
            entries = []
            for row in block_rows:
                span = range(a.indptr[row], a.indptr[row + 1])
                entries.append([j for j in span if left <= a.indices[j] < right])
            placed = place_paper(np.array([len(e) for e in entries]), params)
            output_hash.extend(placed)
            for first in range(0, len(entries), lanes):
                group = [list(entries[row]) for row in placed[first : first + lanes]]
                empty = 0
                for entry in group:
                    zero_row.append(empty if entry else -1)
                    empty += not entry
                unfinished = sum(bool(entry) for entry in group)
                while unfinished:
                    for entry in group:
                        if not entry:
                            continue
                        j = entry.pop(0)
                        col.append(a.indices[j])
                        data.append(a.data[j])
                        add_sign.append(unfinished if entry else -1)
                        unfinished -= not entry
                begin_ptr.append(len(col))
    return {
        "col": np.array(col, np.int32),
        "data": np.array(data, a.dtype),
        "add_sign": np.array(add_sign, np.int32),
        "zero_row": np.array(zero_row, np.int32),
        "begin_ptr": np.array(begin_ptr, np.int32),
        "output_hash": np.array(output_hash, np.int32),
    }


def product_paper(
    arrays: dict[str, NDArray],
    x: NDArray,
    shape: tuple[int, int],
    *,
    height: int = 512,
    width: int = 4096,
    lanes: int = 32,
) -> NDArray[np.float64]:
    """Multiply by walking add_sign lane by lane, then add the strips of each row in order."""
    rows, columns = shape
    strips = -(-columns // width)
    y = np.zeros(rows)
    slot = group = 0
    for top in range(0, rows, height):
        block_height = min(height, rows - top)
        for _ in range(strips):
            for first in range(0, block_height, lanes):
                for lane in range(min(lanes, block_height - first)):
                    if arrays["zero_row"][slot + lane] >= 0:
                        j = arrays["begin_ptr"][group] + lane - arrays["zero_row"][slot + lane]
                        total = 0.0
                        while True:
                            total += float(arrays["data"][j]) * float(x[arrays["col"][j]])
                            if arrays["add_sign"][j] < 0:
                                break
                            j += arrays["add_sign"][j]
                        y[top + arrays["output_hash"][slot + lane]] += total
                slot += min(lanes, block_height - first)
                group += 1
    return y
