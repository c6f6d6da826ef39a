# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernel for plain CSR, emulated on the CPU, and the backend that uses it."""

import numpy as np
import pytest
from tenfold_core.device import cupy_or_none
from tenfold_core.errors import InputError, MissingExtraError
from tenfold_core.sparse import CSR, spmv
from tenfold_core.sparse.gpu import RowsProduct, multiply_rows
from tenfold_core.sparse.gpu.rows import column_chunks
from tenfold_core.testing.cuda import EmulatedRuntime, compiler
from tenfold_core.testing.sparse import assert_close_to_reference, csr_from_lengths

emulated = pytest.mark.skipif(compiler() is None, reason="no C++ compiler to emulate kernels")


def matrix(mean, dtype="float64", rows=130):
    rng = np.random.default_rng(0)
    lengths = rng.poisson(mean, rows)
    lengths[5:9] = 0
    lengths[11] = 300
    return csr_from_lengths(lengths, 400, rng, dtype=dtype)


@emulated
@pytest.mark.parametrize(("mean", "dtype"), [(2, "float64"), (12, "float32"), (40, "float64")])
def test_rows_within_the_bound(mean, dtype):
    a = matrix(mean, dtype)
    x = np.random.default_rng(1).standard_normal(400).astype(dtype)
    assert_close_to_reference(multiply_rows(a, x, EmulatedRuntime()), a, x)


@emulated
def test_columns_have_the_bits_of_each_alone():
    a = matrix(5)
    x = np.random.default_rng(1).standard_normal((400, 3))
    y = multiply_rows(a, x, EmulatedRuntime())
    for j in range(3):
        alone = multiply_rows(a, np.ascontiguousarray(x[:, j]), EmulatedRuntime())
        np.testing.assert_array_equal(y[:, j], alone)


@emulated
def test_alpha_and_beta():
    a = matrix(5)
    x, old = np.random.default_rng(1).standard_normal(400), np.arange(130.0)
    product = RowsProduct(
        a.shape, a.indptr.astype(np.int64), a.indices.astype(np.int32), a.data, EmulatedRuntime()
    )
    y = old.copy()
    product(x, y, 2.0, -0.5)
    np.testing.assert_allclose(y, 2 * (a.to_scipy() @ x) - 0.5 * old, atol=1e-12)
    y[:] = np.nan  # is not read
    product(x, y)
    np.testing.assert_allclose(y, a.to_scipy() @ x, atol=1e-12)


@pytest.mark.parametrize("columns", range(20))
def test_chunks_cover_every_column_once(columns):
    chunks = column_chunks(columns)
    assert [c for first, width in chunks for c in range(first, first + width)] == [*range(columns)]


def test_arrays_that_contradict_each_other_are_refused():
    with pytest.raises(InputError, match="3 row starts for 3 rows"):
        RowsProduct((3, 3), np.zeros(3), np.zeros(0), np.zeros(0), EmulatedRuntime())


def test_complex_values_are_refused():
    a = CSR((1, 1), [0, 1], [0], np.array([1j]))
    with pytest.raises(InputError, match="got complex128"):
        multiply_rows(a, np.ones(1, complex), EmulatedRuntime())


@pytest.mark.skipif(cupy_or_none() is not None, reason="there is a CUDA device")
def test_the_backend_says_what_it_lacks():
    with pytest.raises(MissingExtraError, match="'cupy' cannot run here: no CUDA device"):
        spmv(matrix(3), np.ones(400), backend="cupy")


@pytest.mark.gpu
@pytest.mark.skipif(cupy_or_none() is None, reason="no CUDA device that CuPy can use")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_backend_on_a_device(dtype):
    a = matrix(7, dtype)
    x = np.random.default_rng(1).standard_normal(400).astype(dtype)
    assert_close_to_reference(spmv(a, x, backend="cupy"), a, x)
