# SPDX-License-Identifier: Apache-2.0
import json
from dataclasses import asdict

import numpy as np
import pytest
from hbp_spmv.baselines import BASELINES
from hbp_spmv.compact import CompactLayout
from hbp_spmv.config import BuildConfig
from hbp_spmv.info import describe_file, matrix_info
from hbp_spmv.method import PaperLayout
from scipy.io import mmwrite
from scipy.sparse import csr_array, random_array
from tenfold_core.testing.sparse import awkward_matrices, banded, random_csr

AWKWARD = awkward_matrices()


def test_features_by_hand():
    # Rows of 2, 0, 1, 3 entries; |i - j| = 0, 3, 2, 3, 1, 0; a zero and a NaN among the values.
    dense = np.array([[5, 0, 0, 1], [0, 0, 0, 0], [7, 0, 0, 0], [1, 0, 3, 4]], float)
    a = csr_array(dense)
    a.data[0], a.data[2] = 0, np.nan
    found = matrix_info(a, duplicates=2)
    assert (found.shape, found.nnz, found.dtype) == ((4, 4), 6, "float64")
    assert (found.row_mean, found.row_max, found.empty_rows) == (1.5, 3, 1)
    assert found.row_cv == pytest.approx(np.std([2, 0, 1, 3]) / 1.5)
    assert found.row_histogram == {"0": 1, "1": 1, "2-3": 2}
    assert found.row_quantiles["50%"] == 1.5
    assert (found.bandwidth_mean, found.bandwidth_max) == (1.5, 3)
    # Off the diagonal: (0,3) and (3,0) mirror each other with value 1, (2,0) and (3,2) do not.
    assert (found.pattern_symmetry, found.numeric_symmetry) == (0.5, 0.5)
    assert found.symmetry_exact
    assert (found.explicit_zeros, found.non_finite, found.duplicates) == (1, 1, 2)
    assert not found.uniform
    assert found.predicted_bytes["csr-int32"] == 6 * 12 + 5 * 4 + 8 * 8


def test_numeric_symmetry_is_told_from_that_of_the_pattern():
    skew = csr_array(np.array([[0.0, 2.0], [-2.0, 0.0]]))
    assert (matrix_info(skew).pattern_symmetry, matrix_info(skew).numeric_symmetry) == (1, 0)
    assert matrix_info(csr_array(abs(skew))).numeric_symmetry == 1


def test_symmetry_of_a_large_matrix_is_sampled(monkeypatch):
    monkeypatch.setattr("hbp_spmv.info.EXACT_SYMMETRY", 100)
    monkeypatch.setattr("hbp_spmv.info.SYMMETRY_SAMPLE", 500)
    half = random_array((900, 900), density=0.01, rng=np.random.default_rng(0))
    found = matrix_info(csr_array(half + half.T))
    assert not found.symmetry_exact
    assert (found.pattern_symmetry, found.numeric_symmetry) == (1, 1)
    lower = csr_array(half + half.T).copy()
    lower.data[lower.indices > np.repeat(np.arange(900), np.diff(lower.indptr))] *= 2
    assert matrix_info(lower).numeric_symmetry == 0


def test_square_only_features_are_none_elsewhere():
    found = matrix_info(random_csr(30, 40).to_scipy())
    assert found.bandwidth_mean is found.bandwidth_max is found.pattern_symmetry is None


def test_pairs_count_the_strips_that_each_row_meets():
    # Strips of 65536: {0, 4095, 4096, 16384} {65536}; of 16384: {0..4096} {16384} {65536};
    # of 4096: {0, 4095} {4096} {16384} {65536}.
    columns = np.array([0, 4095, 4096, 16384, 65536])
    a = csr_array((np.ones(5), columns, np.array([0, 5, 5])), shape=(2, 70000))
    assert matrix_info(a).pairs_per_nonzero == {65536: 2 / 5, 16384: 3 / 5, 4096: 4 / 5}


def test_narrow_groups_are_those_whose_columns_fit_16_bits():
    wide = csr_array((np.ones(2), np.array([0, 65536]), np.array([0, 2])), shape=(1, 70000))
    fits = csr_array((np.ones(2), np.array([1, 65536]), np.array([0, 2])), shape=(1, 70000))
    end = csr_array((np.ones(1), np.array([69999]), np.array([0, 1])), shape=(1, 70000))
    assert [matrix_info(a).narrow_groups for a in (wide, fits, end)] == [0, 1, 1]


def test_equal_values_are_recognised():
    a = csr_array(np.array([[3.0, 3.0], [0.0, 3.0]]))
    assert matrix_info(a).uniform
    assert not matrix_info(a + csr_array(np.eye(2))).uniform


def test_predicted_bytes_are_those_of_the_layouts():
    a = random_csr(5000, 5000, density=0.002).to_scipy()
    vectors = 8 * (5000 + 5000)
    found = matrix_info(a).predicted_bytes
    compact = CompactLayout.from_csr(a, BuildConfig(layout="compact", sigma=512, lanes=16))
    paper = PaperLayout.from_csr(a, BuildConfig(layout="paper", hash="none"))
    assert found["compact"] == pytest.approx(compact.nbytes + vectors, rel=1e-3)
    assert found["paper"] == paper.nbytes + vectors + 2 * 8 * len(paper.output_hash)
    assert found["sell"] == pytest.approx(BASELINES["sell"].build(a, 1).nbytes + vectors, rel=0.05)
    assert found["csr-int64"] - found["csr-int32"] == 4 * (a.nnz + 5001)


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex128"])
def test_every_awkward_matrix_has_features_that_json_takes(dtype):
    for matrix in AWKWARD.values():
        found = matrix_info(matrix.to_scipy().astype(dtype))
        assert json.loads(json.dumps(asdict(found)))["nnz"] == matrix.nnz
        assert sum(found.row_histogram.values()) == matrix.shape[0]
        assert 0 < found.lane_efficiency <= 1
        assert 0 <= found.narrow_groups <= 1


def test_a_file_is_described_with_advice(tmp_path):
    path = tmp_path / "band.mtx"
    mmwrite(path, banded(50).to_scipy())
    facts = describe_file(path)
    assert facts["file"] == str(path)
    assert facts["bandwidth_max"] == 2
    assert facts["duplicates"] == 0
    assert facts["advice"] in ("csr", "compact")
    assert facts["reasons"]
    json.dumps(facts)
