# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from tenfold_core.errors import ConfigError, InputError
from tenfold_core.quant.affine import dequantize, fake_quant, max_code, quantize
from tenfold_core.quant.rounding import GAMMA, ZETA, AdaRound, rectified_sigmoid


def weights(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 40, generator=generator)
    scale = 0.2 + torch.rand(6, 1, generator=generator)
    zero = 1 + torch.rand(6, 1, generator=generator)
    return x, scale, zero, max_code(torch.tensor([1, 2, 3, 4, 6, 8]))


def test_rectified_sigmoid_by_hand():
    # v = ln 3: sigmoid 3/4, times 1.2 minus 0.1 = 0.8; the ends are cut at 0 and 1
    v = torch.tensor([0.0, math.log(3), -5.0, 5.0])
    assert (GAMMA, ZETA) == (-0.1, 1.1)
    assert rectified_sigmoid(v).tolist() == pytest.approx([0.5, 0.8, 0, 1], abs=1e-6)


def test_starts_as_the_clipped_tensor_and_the_nearest_codes():
    x, scale, zero, qmax = weights()
    rounding = AdaRound(x, scale, zero, qmax)
    position = torch.clamp(x / scale + zero, torch.zeros(()), qmax)
    torch.testing.assert_close(rounding(), scale * (position - zero), rtol=0, atol=1e-5)
    assert torch.equal(rounding.hard(), quantize(x, scale, zero, qmax))


def test_logits_decide_between_the_two_neighbours():
    x = torch.tensor([[0.2, 1.9, -3.0, 9.0]])
    rounding = AdaRound(x, torch.ones(1, 1), torch.ones(1, 1), 3)
    with torch.no_grad():
        rounding.v.fill_(9.0)
    assert rounding.hard().tolist() == [[2, 3, 0, 3]]
    assert rounding().tolist() == [[1, 2, -1, 2]]
    with torch.no_grad():
        rounding.v.fill_(-9.0)
    assert rounding.hard().tolist() == [[1, 2, 0, 3]]


def test_hard_codes_are_what_the_soft_weights_become():
    x, scale, zero, qmax = weights(1)
    rounding = AdaRound(x, scale, zero, qmax)
    with torch.no_grad():
        rounding.v.copy_(torch.sign(torch.randn(x.shape)) * 9)
    assert torch.equal(rounding(), dequantize(rounding.hard(), scale, zero))


def test_regularizer_by_hand_and_its_gradient():
    # h = 0.5, 0.8, 0, 1: 1 - |2h - 1|**2 = 1, 1 - 0.36, 0, 0
    rounding = AdaRound(torch.zeros(4), torch.ones(()), torch.ones(()), 3)
    with torch.no_grad():
        rounding.v.copy_(torch.tensor([0.0, math.log(3), -5.0, 5.0]))
    loss = rounding.regularizer(2.0)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(1.64, abs=1e-6)
    # at ln 3: -2 (2h - 1) * 2 * 1.2 * s (1 - s) = -2 * 0.6 * 2 * 1.2 * 3/16
    assert rounding.v.grad.tolist() == pytest.approx([0, -0.54, 0, 0], abs=1e-6)


def test_soft_weights_pass_gradcheck():
    x, scale, zero, qmax = (value.double() for value in weights(2))
    rounding = AdaRound(x[:, :4], scale, zero, qmax)

    def soft(v):
        return torch.func.functional_call(rounding, {"v": v}, ())

    assert torch.autograd.gradcheck(soft, rounding.v.detach().clone().requires_grad_())


def test_training_lowers_the_output_error_below_nearest_rounding():
    x, _, _, _ = weights(5)
    inputs = torch.randn(200, 40, generator=torch.Generator().manual_seed(4)).cumsum(1)
    scale, zero = torch.full((6, 1), 0.9), torch.full((6, 1), 3.5)
    target = inputs @ x.t()
    rounding = AdaRound(x, scale, zero, 7)
    optimizer = torch.optim.Adam(rounding.parameters(), lr=0.05)
    for step in range(200):
        loss = (inputs @ rounding().t() - target).square().mean()
        loss = loss + 0.3 * rounding.regularizer(20 - 18 * step / 200)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    learned = dequantize(rounding.hard(), scale, zero)
    nearest = fake_quant(x, scale, zero, 7)
    errors = [(inputs @ w.t() - target).square().mean() for w in (learned, nearest)]
    assert errors[0] < 0.5 * errors[1]


def test_bad_inputs_are_refused():
    ones = torch.ones(2, 1)
    with pytest.raises(InputError, match="x: 1 of 4 values are NaN or infinite"):
        AdaRound(torch.tensor([[1.0, float("nan")], [0.0, 1.0]]), ones, ones, 3)
    with pytest.raises(ConfigError, match="beta: expected a positive number, found 0"):
        AdaRound(torch.zeros(2, 3), ones, ones, 3).regularizer(0.0)
