# SPDX-License-Identifier: Apache-2.0
import warnings

import numpy as np
import pytest
from scipy.sparse import csr_array

torch = pytest.importorskip("torch", reason="torch is not installed")

from hbp_spmv import from_csr  # noqa: E402
from hbp_spmv.torch import spmv  # noqa: E402
from tenfold_core.errors import InputError  # noqa: E402
from tenfold_core.testing.sparse import random_csr  # noqa: E402

LAYOUTS = ["compact", "paper", "csr"]


@pytest.fixture
def a():
    return random_csr(30, 20, density=0.2, seed=3, empty_every=6).to_scipy()


def tensor(*shape, **settings):
    values = np.random.default_rng(1).standard_normal(shape)
    return torch.tensor(values, dtype=settings.pop("dtype", torch.float64), **settings)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(20,), (20, 3), (20, 0)])
def test_tensors_give_tensors(a, layout, shape):
    x = tensor(*shape)
    y = from_csr(a, layout=layout) @ x
    assert isinstance(y, torch.Tensor)
    assert y.dtype == torch.float64
    np.testing.assert_allclose(y.numpy(), a @ x.numpy(), rtol=1e-12, atol=1e-13)


def test_strided_expanded_and_conjugated_tensors(a):
    matrix, x = from_csr(a), tensor(20, 2)
    np.testing.assert_allclose(matrix @ x[:, 1], a @ x[:, 1].numpy(), atol=1e-13)
    np.testing.assert_allclose(
        matrix @ x[:, :1].expand(20, 4), a @ x[:, [0] * 4].numpy(), atol=1e-13
    )
    z = torch.complex(x[:, 0], x[:, 1]).conj()
    np.testing.assert_allclose(matrix @ z, a @ z.resolve_conj().numpy(), atol=1e-13)


def test_out_is_filled(a):
    out = torch.full((30,), float("nan"), dtype=torch.float64)
    x = tensor(20)
    found = from_csr(a).matvec(x, out, alpha=2.0)
    assert found is out
    np.testing.assert_allclose(out, 2 * (a @ x.numpy()), rtol=1e-12, atol=1e-13)


def test_the_transposed_product_takes_tensors(a):
    y = tensor(30)
    np.testing.assert_allclose(from_csr(a).rmatvec(y), a.T @ y.numpy(), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(20,), (20, 3)])
def test_gradients_of_x_and_values_pass_gradcheck(a, layout, shape):
    matrix = from_csr(a, layout=layout, keep_perm=True)
    x = tensor(*shape, requires_grad=True)
    values = torch.tensor(a.data, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: spmv(matrix, x), (x,))
    assert torch.autograd.gradcheck(lambda x, values: spmv(matrix, x, values), (x, values))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_by_hand(layout):
    # y = A x with A = [[2, 0], [3, 5]]: d sum(y)/dx = (5, 5), d sum(y)/dA = x of the column
    matrix = from_csr(csr_array(np.array([[2.0, 0], [3, 5]])), layout=layout, keep_perm=True)
    x = torch.tensor([7.0, 11.0], dtype=torch.float64, requires_grad=True)
    values = torch.tensor([2.0, 3.0, 5.0], dtype=torch.float64, requires_grad=True)
    y = spmv(matrix, x, values)
    y.sum().backward()
    assert y.tolist() == [14, 76]
    assert x.grad.tolist() == [5, 5]
    assert values.grad.tolist() == [7, 7, 11]


def test_the_operator_records_the_graph(a):
    x = tensor(20, requires_grad=True)
    y = from_csr(a).matvec(x, alpha=3.0)
    y.sum().backward()
    np.testing.assert_allclose(x.grad, 3 * (a.T @ np.ones(30)), rtol=1e-12, atol=1e-13)


def test_only_what_is_asked_for_has_a_gradient(a):
    matrix = from_csr(a, layout="csr")
    values = torch.tensor(a.data, requires_grad=True)
    x = tensor(20)
    spmv(matrix, x, values).sum().backward()
    assert x.grad is None
    assert values.grad.shape == (a.nnz,)
    assert not spmv(matrix, x).requires_grad


def test_no_grad_and_inference_mode(a):
    matrix, x = from_csr(a), tensor(20, requires_grad=True)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert not (matrix @ x).requires_grad


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(20,), (20, 3)])
def test_second_derivatives_pass_gradgradcheck(a, layout, shape):
    matrix = from_csr(a, layout=layout, keep_perm=True)
    x = tensor(*shape, requires_grad=True)
    values = torch.tensor(a.data, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: spmv(matrix, x), (x,))
    assert torch.autograd.gradgradcheck(lambda x, values: spmv(matrix, x, values), (x, values))


def test_second_derivatives_by_hand():
    # f = (2 x)^2 + x^3 at x = 3: f' = 8 x + 3 x^2 = 51, f'' = 8 + 6 x = 26
    x = torch.tensor([3.0], dtype=torch.float64, requires_grad=True)
    y = ((from_csr(csr_array([[2.0]])) @ x) ** 2).sum() + (x**3).sum()
    (first,) = torch.autograd.grad(y, x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert first.tolist() == [51]
    assert second.tolist() == [26]


@pytest.mark.parametrize("shape", [(20,), (20, 3)])
@pytest.mark.parametrize("factor", [1, 1 - 2j])
def test_complex_gradients_pass_gradcheck(a, shape, factor):
    matrix = from_csr(a * factor, layout="csr")
    z = torch.complex(tensor(*shape), tensor(*shape).flip(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: spmv(matrix, z), (z,))
    assert torch.autograd.gradgradcheck(lambda z: spmv(matrix, z), (z,))


def test_complex_matrices_have_real_gradients_of_real_operands(a):
    matrix = from_csr(a * (1 - 2j))
    x = tensor(20, requires_grad=True)
    values = torch.tensor(a.data * (1 - 2j), requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: spmv(matrix, x), (x,))
    assert torch.autograd.gradcheck(lambda x, values: spmv(matrix, x, values), (x, values))


def test_a_step_of_gradient_descent_lowers_a_residual(a):
    matrix, b = from_csr(a), tensor(30)
    x = torch.nn.Parameter(torch.zeros(20, dtype=torch.float64))
    optimizer = torch.optim.SGD([x], lr=0.01)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = ((matrix @ x - b) ** 2).sum()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses == sorted(losses, reverse=True)
    assert len(set(losses)) == 5


def test_single_precision_has_single_precision_gradients(a):
    matrix = from_csr(a, dtype="float32")
    x = tensor(20, dtype=torch.float32, requires_grad=True)
    y = matrix @ x
    y.sum().backward()
    assert y.dtype == x.grad.dtype == torch.float32


def test_empty_matrices_have_empty_gradients():
    x = torch.zeros(0, dtype=torch.float64, requires_grad=True)
    y = from_csr(csr_array((4, 0))) @ x
    y.sum().backward()
    assert y.tolist() == [0] * 4
    assert x.grad.shape == (0,)


@pytest.mark.parametrize("grad", [False, True])
def test_tensors_that_do_not_fit_are_refused(a, grad):
    matrix = from_csr(a, dtype="float32")
    with pytest.raises(InputError, match=r"x has shape \(19,\), expected \(20,\)"):
        matrix @ tensor(19, dtype=torch.float32, requires_grad=grad)
    with pytest.raises(InputError, match="digits would be lost"):
        matrix @ tensor(20, requires_grad=grad)
    with pytest.raises(
        InputError, match=r"x is a tensor of torch\.bfloat16 \(torch\.strided\), which"
    ):
        matrix @ tensor(20, dtype=torch.bfloat16, requires_grad=grad)
    with pytest.raises(InputError, match=r"x is a tensor of torch\.float32 \(torch\.sparse_coo"):
        matrix @ tensor(20, dtype=torch.float32).to_sparse_coo()
    with pytest.raises(InputError, match="x lies on meta, the matrix on the CPU"):
        matrix @ torch.empty(20, device="meta", requires_grad=grad)


def test_values_and_out_that_do_not_fit_are_refused(a):
    matrix, x = from_csr(a, layout="compact"), tensor(20, requires_grad=True)
    with pytest.raises(InputError, match=rf"values have shape \(3,\), expected \({a.nnz},\)"):
        spmv(matrix, x, tensor(3))
    with pytest.raises(InputError, match="build with keep_perm=True"):
        spmv(matrix, x, tensor(a.nnz))
    with pytest.raises(InputError, match="out: not available for a tensor that requires grad"):
        matrix.matvec(x, tensor(30))
    with pytest.raises(InputError, match="out is a ndarray, expected a tensor"):
        matrix.matvec(x.detach(), np.zeros(30))


@pytest.mark.parametrize("layout", ["sparse_csr", "sparse_coo"])
def test_torch_matrices_are_taken(a, layout):
    dense = torch.tensor(a.toarray())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = dense.to_sparse_csr() if layout == "sparse_csr" else dense.to_sparse_coo()
    x = tensor(20)
    np.testing.assert_allclose(from_csr(given) @ x, dense @ x, rtol=1e-12, atol=1e-13)
