# SPDX-License-Identifier: Apache-2.0
import copy
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tenfold_core.errors import InputError, MissingExtraError
from tenfold_core.sparse import CSR
from tenfold_core.testing.sparse import csr_matrices, random_csr

# 0 0 7 0
# 1 0 0 2      row 1 stores its columns unsorted and column 3 twice (0.5 + 1.5)
# 0 0 0 0
UNSORTED = ([0, 1, 4, 4], [2, 3, 0, 3], [7.0, 0.5, 1.0, 1.5])


def test_a_matrix_reports_its_sizes():
    matrix = CSR((3, 4), *UNSORTED)
    assert (matrix.shape, matrix.nnz, matrix.dtype) == ((3, 4), 4, np.float64)
    assert matrix.nbytes == 4 * 8 + 4 * 8 + 4 * 8
    assert repr(matrix) == "<CSR 3 x 4, 4 entries, float64, int64 indices>"
    assert matrix.row_lengths().tolist() == [1, 3, 0]
    assert matrix.rows().tolist() == [0, 1, 1, 1]
    assert matrix.to_dense().tolist() == [[0, 0, 7, 0], [1, 0, 0, 2], [0, 0, 0, 0]]


def test_canonical_sorts_sums_and_counts_into_a_copy():
    indptr, indices, data = (np.array(part) for part in UNSORTED)
    matrix = CSR((3, 4), indptr, indices, data)
    assert not matrix.is_canonical()
    canonical, merged = matrix.canonical()
    assert merged == 1
    assert canonical.indptr.tolist() == [0, 1, 3, 3]
    assert canonical.indices.tolist() == [2, 0, 3]
    assert canonical.data.tolist() == [7.0, 1.0, 2.0]
    assert canonical.is_canonical()
    assert canonical.canonical()[0] is canonical
    assert [indptr.tolist(), indices.tolist(), data.tolist()] == list(UNSORTED)


def test_canonical_of_unsorted_rows_without_duplicates_merges_nothing():
    canonical, merged = CSR((1, 3), [0, 2], [2, 0], [5.0, 6.0]).canonical()
    assert (canonical.indices.tolist(), canonical.data.tolist(), merged) == ([0, 2], [6.0, 5.0], 0)


def test_explicit_zeros_and_cancelled_duplicates_stay():
    canonical, merged = CSR((1, 2), [0, 3], [1, 1, 0], [1.0, -1.0, 0.0]).canonical()
    assert (canonical.data.tolist(), merged) == ([0.0, 0.0], 1)


def test_arrays_are_shared_and_never_written():
    indptr, indices = np.array([0, 1], np.int32), np.array([0], np.int32)
    data = np.array([2.0])
    for array in (indptr, indices, data):
        array.setflags(write=False)
    matrix = CSR((1, 1), indptr, indices, data)
    assert np.shares_memory(matrix.data, data)
    assert np.shares_memory(matrix.indices, indices)
    assert not matrix.data.flags.writeable


def test_strided_arrays_and_other_index_types_are_accepted():
    strided = np.array([1.0, -1.0, 2.0, -1.0])[::2]
    matrix = CSR((2, 2), np.array([0, 1, 2], np.uint8), np.array([1, 0], ">i4"), strided)
    assert matrix.indptr.dtype == np.int64
    assert matrix.indices.dtype == np.int64
    assert matrix.data.flags.c_contiguous
    assert matrix.to_dense().tolist() == [[0, 1], [2, 0]]


def test_arrays_longer_than_needed_are_cut():
    matrix = CSR((1, 4), [0, 2], [0, 1, 99], [1.0, 2.0, 3.0])
    assert (matrix.nnz, matrix.indices.tolist()) == (2, [0, 1])


@pytest.mark.parametrize(
    ("shape", "indptr", "indices", "data", "message"),
    [
        (3, [0], [], [], "shape is 3, expected two counts"),
        ((1.5, 2), [0], [], [], "expected two counts"),
        ((1, 2, 3), [0], [], [], "expected two counts"),
        ((-1, 2), [0], [], [], "not negative"),
        ((2, 2), [0, 1], [0], [1.0], "indptr has 2 entries, expected rows . 1 = 3"),
        ((1, 2), [1, 1], [0], [1.0], "indptr starts with 1, expected 0"),
        ((1, 2), [0, 2], [0], [1.0, 2.0], "indptr ends with 2, but indices has 1"),
        ((1, 2), [0, 2], [0, 1], [1.0], "indptr ends with 2, but data has 1"),
        ((1, 2), [0, -1], [0], [1.0], "indptr ends with -1"),
        ((1, 2), [[0, 1]], [0], [1.0], "indptr is 2-D"),
        ((1, 2), [0.0, 1.0], [0], [1.0], "indptr is 1-D of dtype float64"),
        ((1, 2), [0, 1], [0.5], [1.0], "indices is 1-D of dtype float64"),
        ((1, 2), [0, 1], [0], [[1.0]], "data is 2-D"),
        ((1, 2), [0, 1], [0], ["x"], "data is 1-D of dtype <U1"),
        ((1, 2), np.array([0, 2**63], np.uint64), [0], [1.0], "expected less than 2..63"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(shape, indptr, indices, data, message):
    with pytest.raises(InputError, match=message):
        CSR(shape, indptr, indices, data)


def test_a_full_check_finds_a_falling_indptr_and_a_column_outside():
    with pytest.raises(InputError, match="indptr falls from 2 to 1 at row 1"):
        CSR((3, 2), [0, 2, 1, 2], [0, 1], [1.0, 1.0]).check()
    with pytest.raises(InputError, match=r"indices\[2\] = 5 in row 2, expected 0 <= column < 2"):
        CSR((3, 2), [0, 2, 2, 3], [0, 1, 5], [1.0, 1.0, 1.0]).check()
    with pytest.raises(InputError, match=r"indices\[0\] = -1 in row 0"):
        CSR((1, 2), [0, 1], [-1], [1.0]).check()


def test_scipy_round_trip_shares_the_arrays():
    sparse = pytest.importorskip("scipy.sparse")
    source = random_csr(20, 30, density=0.2).to_scipy()
    matrix = CSR.from_scipy(source)
    assert np.shares_memory(matrix.data, source.data)
    back = matrix.to_scipy()
    assert np.shares_memory(back.data, source.data)
    assert (back != source).nnz == 0
    assert CSR.from_scipy(source.tocoo()).to_dense().tolist() == source.toarray().tolist()
    assert CSR.from_scipy(sparse.csr_matrix(source)).nnz == source.nnz


def test_only_two_dimensional_sparse_matrices_are_taken():
    with pytest.raises(InputError, match="got ndarray, expected a two-dimensional"):
        CSR.from_scipy(np.eye(2))


def test_without_scipy_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "scipy.sparse", None)
    with pytest.raises(MissingExtraError, match=r"tenfold-core\[sparse\]"):
        CSR((1, 1), [0, 0], [], []).to_scipy()


def test_matrices_can_be_copied_and_pickled():
    matrix = CSR((3, 4), *UNSORTED)
    for other in (copy.deepcopy(matrix), pickle.loads(pickle.dumps(matrix))):
        assert other.to_dense().tolist() == matrix.to_dense().tolist()


def test_a_matrix_cannot_be_reassigned():
    with pytest.raises(AttributeError, match="cannot assign"):
        CSR((1, 1), [0, 0], [], []).shape = (2, 2)


@given(csr_matrices(max_rows=40, max_columns=40), st.integers(0, 2**32 - 1))
def test_canonical_undoes_any_shuffle_within_rows(matrix, seed):
    order = np.lexsort((np.random.default_rng(seed).random(matrix.nnz), matrix.rows()))
    shuffled = CSR(matrix.shape, matrix.indptr, matrix.indices[order], matrix.data[order]).check()
    canonical, merged = shuffled.canonical()
    assert merged == 0
    np.testing.assert_array_equal(canonical.indices, matrix.indices)
    np.testing.assert_array_equal(canonical.data, matrix.data)
