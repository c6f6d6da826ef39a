# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from hbp_spmv import from_csr
from hbp_spmv.generate import delaunay_p1, stencil7
from numpy.testing import assert_allclose
from scipy.sparse import csr_array, eye_array
from scipy.sparse.linalg import LinearOperator, aslinearoperator, cg, eigsh, gmres, lsqr, svds

LAYOUTS = ["compact", "paper", "csr", "auto"]


@pytest.fixture(scope="module")
def spd():
    """A shifted finite-element matrix, symmetric positive definite."""
    a = csr_array(delaunay_p1(points=1500, seed=1))
    return csr_array(a + 0.01 * a.diagonal().max() * eye_array(a.shape[0]))


@pytest.fixture(scope="module")
def right_side(spd):
    return np.random.default_rng(0).standard_normal(spd.shape[0])


def iterations(solver, operator, b, **settings):
    count = []
    found, status = solver(operator, b, callback=lambda _: count.append(1), **settings)
    assert status == 0
    return found, len(count)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("wrapped", [False, True])
def test_cg_takes_the_iterations_it_takes_with_scipy(spd, right_side, layout, wrapped):
    matrix = from_csr(spd, layout=layout)
    operator = matrix.aslinearoperator() if wrapped else matrix
    expected, steps = iterations(cg, spd, right_side, rtol=1e-8)
    found, own_steps = iterations(cg, operator, right_side, rtol=1e-8)
    assert steps > 20
    assert abs(own_steps - steps) <= 1
    assert_allclose(found, expected, rtol=1e-6, atol=1e-8)


def test_cg_converges_in_single_precision(spd, right_side):
    single, b = spd.astype("float32"), right_side.astype("float32")
    found, status = cg(from_csr(single), b, rtol=1e-4)
    assert status == 0
    assert np.linalg.norm(single @ found - b) <= 1e-3 * np.linalg.norm(b)


def test_gmres_solves_a_nonsymmetric_system(right_side, spd):
    scale = spd.diagonal().max()
    a = csr_array(spd + 3 * scale * eye_array(spd.shape[0]) + scale * eye_array(spd.shape[0], k=1))
    found, status = gmres(from_csr(a), right_side, rtol=1e-9)
    assert status == 0
    assert_allclose(a @ found, right_side, atol=1e-7 * np.linalg.norm(right_side))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_eigsh_finds_the_known_eigenvalues(layout):
    # the 7-point Laplacian of n^3 points: 6 - 2 (cos + cos + cos) of k pi / (n + 1)
    n = 8
    cosines = 2 * np.cos(np.arange(1, n + 1) * np.pi / (n + 1))
    largest = 6 - 3 * cosines[-1]
    matrix = from_csr(stencil7(n=n), layout=layout)
    found = eigsh(matrix.aslinearoperator(), k=1, return_eigenvectors=False)
    assert_allclose(found, [largest], rtol=1e-10)


def test_svds_and_lsqr_use_the_transposed_product(spd):
    tall = csr_array(spd[:, :200])
    matrix = from_csr(tall)
    largest = svds(matrix.aslinearoperator(), k=1, return_singular_vectors=False, rng=0)
    assert_allclose(largest, svds(tall, k=1, return_singular_vectors=False, rng=0), rtol=1e-8)
    b = np.random.default_rng(1).standard_normal(tall.shape[0])
    expected = lsqr(tall, b, atol=1e-13, btol=1e-13)[0]
    assert_allclose(lsqr(matrix, b, atol=1e-13, btol=1e-13)[0], expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex128"])
def test_the_operator_has_every_product(spd, dtype):
    a = (spd[:, :300] * (1 if dtype != "complex128" else 1 + 2j)).astype(dtype)
    operator = from_csr(a).aslinearoperator()
    x = np.random.default_rng(2).standard_normal((300, 3)).astype(dtype)
    y = np.random.default_rng(3).standard_normal((a.shape[0], 3)).astype(dtype)
    tolerance = (
        {"rtol": 1e-4, "atol": 1e-4} if dtype == "float32" else {"rtol": 1e-11, "atol": 1e-11}
    )
    assert isinstance(operator, LinearOperator)
    assert (operator.shape, operator.dtype) == (a.shape, np.dtype(dtype))
    assert_allclose(operator @ x, a @ x, **tolerance)
    assert_allclose(operator.matvec(x[:, :1]), a @ x[:, :1], **tolerance)
    assert_allclose(operator.rmatmat(y), a.conj().T @ y, **tolerance)
    assert_allclose(operator.rmatvec(y[:, 0]), a.conj().T @ y[:, 0], **tolerance)
    assert_allclose(operator.H @ y, a.conj().T @ y, **tolerance)


def test_scipy_takes_the_matrix_itself_as_an_operator(spd):
    matrix = from_csr(spd)
    operator = aslinearoperator(matrix)
    x = np.random.default_rng(2).standard_normal(spd.shape[0])
    assert_allclose(operator @ x, spd @ x, rtol=1e-11, atol=1e-11)
    assert_allclose((2 * operator + operator).matvec(x), 3 * (spd @ x), rtol=1e-11, atol=1e-11)
    assert_allclose(operator.T @ x, spd.T @ x, rtol=1e-11, atol=1e-11)
