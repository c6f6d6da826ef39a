# SPDX-License-Identifier: Apache-2.0
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tenfold_core.errors import ConfigError, InputError, MissingExtraError, TenfoldWarning
from tenfold_core.sparse import CSR, Backend, backends, products, register, select_backend, spmv
from tenfold_core.testing.sparse import assert_close_to_reference, awkward_matrices, csr_matrices

NAMES = ["scipy", "numba", "numpy", "reference"]


@pytest.fixture(params=NAMES)
def backend(request):
    if not backends()[request.param]:
        pytest.skip(f"{request.param} is not installed")
    return request.param


def test_a_product_worked_by_hand(backend):
    # [0 3] [1]   [6]
    # [4 0] [2] = [4]
    matrix = CSR((2, 2), [0, 1, 2], [1, 0], [3.0, 4.0])
    assert spmv(matrix, np.array([1.0, 2.0]), backend=backend).tolist() == [6.0, 4.0]


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64", "complex128"])
@pytest.mark.parametrize("structure", awkward_matrices())
def test_every_structure_keeps_the_bound(backend, structure, dtype):
    matrix = awkward_matrices(dtype)[structure]
    x = np.random.default_rng(1).standard_normal(matrix.shape[1]).astype(dtype)
    y = spmv(matrix, x, backend=backend)
    assert y.dtype == np.dtype(dtype)
    assert_close_to_reference(y, matrix, x)


@given(csr_matrices(), st.sampled_from([name for name, usable in backends().items() if usable]))
def test_random_structures_keep_the_bound(matrix, name):
    x = np.random.default_rng(2).standard_normal(matrix.shape[1])
    assert_close_to_reference(spmv(matrix, x, backend=name), matrix, x)


def test_the_columns_of_a_matrix_are_multiplied_each(backend):
    matrix = awkward_matrices()["wide"]
    x = np.asfortranarray(np.random.default_rng(3).standard_normal((900, 3)))
    y = spmv(matrix, x, backend=backend)
    assert y.shape == (40, 3)
    for column in range(3):
        assert_close_to_reference(y[:, column], matrix, x[:, column])
    assert spmv(matrix, x[:, :0], backend=backend).shape == (40, 0)


def test_nan_in_x_reaches_exactly_the_rows_that_store_its_column(backend):
    matrix = awkward_matrices()["empty_rows"]
    x = np.ones(600)
    x[5] = np.nan
    touched = np.isin(np.arange(600), matrix.rows()[matrix.indices == 5])
    assert (np.isnan(spmv(matrix, x, backend=backend)) == touched).all()


def test_integers_multiply_as_floats(backend):
    y = spmv(CSR((1, 2), [0, 2], [0, 1], [1, 2]), np.array([True, True]), backend=backend)
    assert (y.dtype, y.tolist()) == (np.float64, [3.0])


def test_integer_valued_data_give_the_same_bits_everywhere(backend):
    matrix = awkward_matrices()["block_513"]
    whole = CSR(matrix.shape, matrix.indptr, matrix.indices, np.round(matrix.data * 100))
    x = np.arange(513.0)
    assert (spmv(whole, x, backend=backend) == spmv(whole, x, backend="reference")).all()


@pytest.mark.parametrize("structure", ["empty_rows", "dense_row", "no_rows"])
def test_numba_gives_the_same_bits_for_any_number_of_threads(structure):
    pytest.importorskip("numba")
    matrix = awkward_matrices()[structure]
    x = np.random.default_rng(4).standard_normal(matrix.shape[1])
    one, two, many = (spmv(matrix, x, backend="numba", threads=n) for n in (1, 2, 64))
    assert one.tobytes() == two.tobytes() == many.tobytes()


def test_read_only_and_strided_arrays_multiply(backend):
    matrix = CSR((2, 2), [0, 1, 2], [1, 0], np.array([3.0, 4.0]))
    x = np.array([1.0, 9.0, 2.0, 9.0])[::2]
    x.setflags(write=False)
    assert spmv(matrix, x, backend=backend).tolist() == [6.0, 4.0]


@pytest.mark.parametrize("x", [np.ones(3), np.ones((2, 2, 1)), np.float64(1), np.array(["a", "b"])])
def test_a_wrong_x_is_refused(x):
    with pytest.raises(InputError, match="x has"):
        spmv(CSR((2, 2), [0, 1, 2], [1, 0], [3.0, 4.0]), x)


def test_unknown_backends_are_named_with_the_known_ones():
    names = "auto, scipy, numba, numpy, cupy, reference"
    with pytest.raises(ConfigError, match=f"'cuda', expected {names}"):
        select_backend("cuda")


def test_auto_takes_the_first_that_can_run(monkeypatch):
    monkeypatch.setattr(products, "_BACKENDS", {})
    register(Backend("absent", lambda: False, lambda *_: None, "pip install absent"))
    register(Backend("manual", lambda: True, lambda *_: None, automatic=False))
    register(Backend("first", lambda: True, lambda *_: None))
    register(Backend("second", lambda: True, lambda *_: None))
    assert select_backend().name == "first"
    assert backends() == {"absent": False, "manual": True, "first": True, "second": True}
    with pytest.raises(MissingExtraError, match="'absent' cannot run here: pip install absent"):
        select_backend("absent")
    with pytest.raises(ConfigError, match="registered already"):
        register(Backend("first", lambda: True, lambda *_: None))


@pytest.mark.parametrize(("name", "module"), [("scipy", "scipy.sparse"), ("numba", "numba")])
def test_a_missing_library_names_its_extra(monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "tenfold_core.sparse._numba_csr", raising=False)
    monkeypatch.delattr("tenfold_core.sparse._numba_csr", raising=False)
    for probe in (products._has_scipy, products._numba_kernels):
        probe.cache_clear()
    with pytest.raises(MissingExtraError, match=r"tenfold-core\[sparse\]"):
        select_backend(name)
    monkeypatch.undo()
    for probe in (products._has_scipy, products._numba_kernels):
        probe.cache_clear()


def test_numba_without_a_writable_cache_is_left_out_with_one_warning(monkeypatch):
    pytest.importorskip("numba")

    class Blocked:
        def find_spec(self, name, path=None, target=None):
            if name == "tenfold_core.sparse._numba_csr":
                raise RuntimeError("cannot cache function: no locator available")

    monkeypatch.delitem(sys.modules, "tenfold_core.sparse._numba_csr", raising=False)
    monkeypatch.delattr("tenfold_core.sparse._numba_csr", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Blocked(), *sys.meta_path])
    products._numba_kernels.cache_clear()
    with pytest.warns(TenfoldWarning, match="numba cannot be used: cannot cache"):
        assert not backends()["numba"]
    assert not backends()["numba"]
    products._numba_kernels.cache_clear()
