# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from hbp_spmv import reference
from hbp_spmv.hashing import HashParams
from numpy.testing import assert_allclose, assert_array_equal
from scipy.sparse import csr_array
from tenfold_core.testing.sparse import awkward_matrices

SMALL = {"height": 8, "width": 8, "lanes": 4, "params": HashParams(s=1, t=1)}


def test_published_arrays_of_the_worked_example(worked_example):
    arrays = reference.build_paper(worked_example, **SMALL)
    assert arrays["output_hash"].tolist() == [1, 2, 3, 4, 0, 5, 6, 7]
    assert arrays["col"].tolist() == [0, 0, 0, 1, 1, 2, 0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 4]
    data = [30, 40, 50, 41, 51, 52, 10, 60, 80, 11, 61, 81, 12, 82, 13, 83, 14]
    assert arrays["data"].tolist() == data
    signs = [-1, 2, 2, -1, 1, -1, 3, 3, 3, 3, -1, 2, 2, 2, 2, -1, -1]
    assert arrays["add_sign"].tolist() == signs
    assert arrays["zero_row"].tolist() == [-1, 1, 1, 1, 0, 0, -1, 1]
    assert arrays["begin_ptr"].tolist() == [0, 6, 17]


def test_product_of_the_worked_example(worked_example):
    arrays = reference.build_paper(worked_example, **SMALL)
    y = reference.product_paper(arrays, np.arange(1.0, 9), (8, 8), height=8, width=8, lanes=4)
    assert y.tolist() == [190, 0, 30, 122, 308, 182, 0, 820]


def test_two_blocks_by_two_strips_by_hand():
    # A = [[1, 2, 3], [0, 0, 4], [5, 0, 0]], M = 2, N = 2, W = 2, every home is 0
    a = np.array([[1.0, 2, 3], [0, 0, 4], [5, 0, 0]])
    arrays = reference.build_paper(csr_array(a), height=2, width=2, lanes=2, params=HashParams())
    # block (0,0): row 0 has 1, 2; row 1 is empty; block (0,1): rows 0 and 1 have one each
    # block (1,0): row 2 has 5; block (1,1): empty
    assert arrays["col"].tolist() == [0, 1, 2, 2, 0]
    assert arrays["data"].tolist() == [1, 2, 3, 4, 5]
    assert arrays["add_sign"].tolist() == [1, -1, -1, -1, -1]
    assert arrays["zero_row"].tolist() == [0, -1, 0, 0, 0, -1]
    assert arrays["output_hash"].tolist() == [0, 1, 0, 1, 0, 0]
    assert arrays["begin_ptr"].tolist() == [0, 2, 4, 5, 5]


@pytest.mark.parametrize("name", awkward_matrices())
def test_the_walk_gives_the_product(name):
    matrix = awkward_matrices()[name]
    x = np.random.default_rng(1).standard_normal(matrix.shape[1])
    arrays = reference.build_paper(matrix.to_scipy(), height=100, width=200)
    y = reference.product_paper(arrays, x, matrix.shape, height=100, width=200)
    assert_allclose(y, matrix.to_dense() @ x, rtol=1e-12, atol=1e-12)


def test_the_literal_placement_is_a_permutation():
    lengths = np.random.default_rng(2).integers(0, 60, 513)
    assert_array_equal(np.sort(reference.place_paper(lengths)), np.arange(513))
