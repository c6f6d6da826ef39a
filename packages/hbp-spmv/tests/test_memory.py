# SPDX-License-Identifier: Apache-2.0
"""What a build allocates at its peak, as a multiple of the bytes of CSR with int32 indices."""

import tracemalloc
from functools import cache

import numpy as np
import pytest
from hbp_spmv import from_csr
from scipy.sparse import csr_array
from tenfold_core.testing.sparse import csr_from_lengths

BOUND = 2.5
SETTINGS = {
    "compact": {"layout": "compact"},
    "csr": {"layout": "csr"},
    "auto": {"layout": "auto"},
    "paper": {"layout": "paper"},
    "paper, tuned": {"layout": "paper", "hash": "tuned"},
    "strips of 4096": {"layout": "compact", "strips": 4096},
    "strips of 1024": {"layout": "compact", "strips": 1024},
}


@cache
def matrix(rows: int, longest: int, columns: int, dtype: str) -> csr_array:
    """Rows of 0 to `longest` nonzeros anywhere."""
    rng = np.random.default_rng(0)
    a = csr_from_lengths(rng.integers(0, longest + 1, rows), columns, rng, dtype=dtype)
    parts = (a.data, a.indices.astype(np.int32), a.indptr.astype(np.int32))
    return csr_array(parts, shape=a.shape)


def csr_bytes(a):
    return a.data.nbytes + a.indices.nbytes + a.indptr.nbytes


def peak_of_a_build(a, **settings):
    """Return the peak of traced memory in bytes, the finished layout included."""
    from_csr(a, threads=2, **settings)  # loading kernels is not part of a build
    tracemalloc.start()
    built = from_csr(a, threads=2, **settings)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert built.nbytes <= peak
    return peak


@pytest.mark.parametrize("layout", ["compact", "csr", "auto"])
def test_the_peak_grows_in_step_with_the_nonzeros(layout):
    a = matrix(25_000, 79, 20_000, "float64")
    assert a.nnz > 980_000
    parts = [a[:rows] for rows in (6_250, 12_500, 25_000)]
    peaks = [peak_of_a_build(part, layout=layout) / csr_bytes(part) for part in parts]
    assert max(peaks) <= BOUND
    assert max(peaks) <= 1.2 * min(peaks)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_build_peaks_below_two_and_a_half_times_the_csr_bytes(name, dtype):
    # 1.3 nonzeros a (row, strip) pair of 4096 columns; the paper's arrays alone are 1.8 and 2.2
    a = matrix(30_000, 24, 36_000, dtype)
    assert a.nnz > 355_000
    assert peak_of_a_build(a, **SETTINGS[name]) <= BOUND * csr_bytes(a)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", ["compact", "csr", "strips of 4096", "strips of 1024"])
def test_so_it_does_with_three_nonzeros_a_row_in_49_strips(name, dtype):
    a = matrix(60_000, 6, 200_000, dtype)
    assert peak_of_a_build(a, **SETTINGS[name]) <= BOUND * csr_bytes(a)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("hash", ["lut", "paper", "tuned"])
def test_the_dense_arrays_of_layout_paper_are_all_it_takes(hash, dtype):
    rows, strips = 60_000, 49
    a = matrix(rows, 3, 200_000, dtype)
    groups = strips * rows // 32  # the last block row has 96 rows, a multiple of 32 as all are
    arrays = a.nnz * (a.dtype.itemsize + 8) + 8 * rows * strips + 8 * (groups + 1)
    blocks = strips * -(-rows // 512)
    peak = peak_of_a_build(a, layout="paper", hash=hash)
    assert arrays > BOUND * csr_bytes(a)
    assert peak <= arrays + 8 * rows + 64 * blocks + 300_000
    assert peak <= 1.05 * arrays
