# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from hbp_spmv import from_csr, verify
from hbp_spmv.errors import VerificationError
from tenfold_core.errors import ConfigError, InputError
from tenfold_core.testing.sparse import awkward_matrices


@pytest.mark.parametrize("layout", ["compact", "paper", "csr"])
@pytest.mark.parametrize("name", awkward_matrices())
def test_every_built_matrix_passes(name, layout):
    a = awkward_matrices()[name].to_scipy()
    found = verify(from_csr(a, layout=layout), a, trials=2)
    assert found.trials == 2
    assert 0 <= found.worst <= 1
    assert -1 <= found.row < max(a.shape[0], 1)


@pytest.mark.parametrize("dtype", ["float32", "complex128"])
def test_the_matrix_decides_the_type(skewed, dtype):
    assert verify(from_csr(skewed, dtype=dtype), skewed).worst <= 1


def test_a_changed_value_is_found_with_its_row(skewed):
    matrix = from_csr(skewed, layout="csr")
    other = skewed.copy()
    row = int(np.flatnonzero(np.diff(other.indptr))[5])
    other.data[other.indptr[row]] *= 1.001
    with pytest.raises(VerificationError, match=rf"row {row}: got .*, want .* within .* differs"):
        verify(matrix, other)


def test_a_changed_column_is_found(skewed):
    other = skewed.copy()
    row = int(np.flatnonzero(np.diff(other.indptr) == 1)[0])
    entry = other.indptr[row]
    other.indices[entry] = (other.indices[entry] + 1) % 500
    with pytest.raises(VerificationError, match=f"row {row}:"):
        verify(from_csr(skewed), other)


def test_another_shape_is_refused(skewed):
    with pytest.raises(InputError, match=r"matrix has shape \(600, 500\), the one to compare"):
        verify(from_csr(skewed), skewed.T)


def test_no_trials_are_no_verification(skewed):
    with pytest.raises(ConfigError, match="trials: expected at least 1, got 0"):
        verify(from_csr(skewed), skewed, trials=0)
