# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from hbp_spmv import from_csr
from hypothesis import given
from numpy.testing import assert_array_equal
from scipy.sparse import csr_array
from tenfold_core.errors import ConfigError, InputError
from tenfold_core.testing.sparse import awkward_matrices, csr_matrices, random_csr


def test_arrays_are_those_of_csr(worked_example):
    arrays = from_csr(worked_example, layout="csr").arrays()
    assert arrays["ptr"].tolist() == [0, 5, 5, 6, 8, 11, 13, 13, 17]
    assert arrays["col"].tolist() == [0, 1, 2, 3, 4, 0, 0, 1, 0, 1, 2, 0, 1, 0, 1, 2, 3]
    assert arrays["col"].dtype == np.uint16
    assert arrays["val"].tolist() == worked_example.data.tolist()


def test_product_of_the_worked_example(worked_example):
    y = from_csr(worked_example, layout="csr") @ np.arange(1.0, 9)
    assert y.tolist() == [190, 0, 30, 122, 308, 182, 0, 820]


@pytest.mark.parametrize(("columns", "dtype"), [(65536, np.uint16), (65537, np.uint32)])
def test_columns_take_16_bits_where_they_fit(columns, dtype):
    a = csr_array(([1.0, 2.0], ([0, 1], [0, columns - 1])), shape=(2, columns))
    matrix = from_csr(a, layout="csr")
    x = np.zeros(columns)
    x[[0, -1]] = 3, 5
    assert matrix.arrays()["col"].dtype == dtype
    assert (matrix @ x).tolist() == [3, 10]


def test_the_index_width_can_be_asked_for():
    a = random_csr(5, 70_000, density=1e-4).to_scipy()
    assert from_csr(a[:, :9], layout="csr", index="u32").arrays()["col"].dtype == np.uint32
    with pytest.raises(ConfigError, match="index='u16': 70000 columns, layout 'csr' reaches 65536"):
        from_csr(a, layout="csr", index="u16")


def test_columns_beyond_32_bits_are_refused_and_not_wrapped():
    a = csr_array((np.ones(1), np.array([2**32 + 1]), [0, 1]), shape=(1, 2**33))
    for layout in ("csr", "compact", "auto"):
        with pytest.raises(InputError, match=r"columns"):
            from_csr(a, layout=layout)


def test_equal_values_are_stored_once():
    a = csr_array(np.eye(5) * 7)
    matrix = from_csr(a, layout="csr")
    assert matrix.arrays()["val"].tolist() == [7]
    assert matrix.stats.uniform
    assert matrix.nbytes == 6 * 8 + 5 * 2 + 8
    assert_array_equal(matrix.to_csr().toarray(), a.toarray())


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_bytes_follow_the_model(dtype):
    a = random_csr(90, 80, density=0.2, dtype=dtype).to_scipy()
    size = np.dtype(dtype).itemsize
    assert from_csr(a, layout="csr").nbytes == 8 * 91 + a.nnz * (2 + size)


@given(csr_matrices(max_rows=100, max_columns=100))
def test_csr_comes_back_identical(matrix):
    back = from_csr(matrix.to_scipy(), layout="csr").to_csr()
    assert back.data.tobytes() == matrix.data.tobytes()
    assert_array_equal(back.indices, matrix.indices)
    assert_array_equal(back.indptr, matrix.indptr)


@pytest.mark.parametrize("name", awkward_matrices())
def test_the_source_is_copied(name):
    a = awkward_matrices()[name].to_scipy()
    matrix = from_csr(a, layout="csr")
    before = matrix.to_csr().toarray()
    a.data[:] = -1
    assert_array_equal(matrix.to_csr().toarray(), before)
