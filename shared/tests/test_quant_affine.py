# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tenfold_core.errors import ConfigError, InputError
from tenfold_core.quant import reference
from tenfold_core.quant.affine import (
    LearnableAffine,
    check_finite,
    dequantize,
    fake_quant,
    max_code,
    quantize,
    round_ste,
    storable,
)


def rows(seed=0, count=8, columns=50):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, columns, generator=generator)
    scale = 0.1 + torch.rand(count, 1, generator=generator)
    zero = 3 * torch.randn(count, 1, generator=generator)
    qmax = max_code(1 + torch.arange(count) % 8)
    return x, scale, zero, qmax


def test_two_bits_over_minus_one_to_two_are_exact():
    w = torch.tensor([[-1.0, 0.0, 1.0, 2.0]])
    one = torch.ones(1, 1)
    assert quantize(w, one, one, 3).tolist() == [[0, 1, 2, 3]]
    assert fake_quant(w, one, one, 3).tolist() == w.tolist()


@pytest.mark.parametrize(
    ("zero", "codes", "mse"), [(0.0, [0, 0, 0, 1], 0.75), (1 / 3, [0, 0, 1, 1], 0.5)]
)
def test_a_free_zero_point_saves_a_third_of_the_error_of_one_bit(zero, codes, mse):
    # d = 3: x/d + 1/3 = 0, 1/3, 2/3, 1, read back as -1 or 2; without it as 0 or 3.
    w = torch.tensor([-1.0, 0.0, 1.0, 2.0])
    scale, zero = torch.tensor(3.0), torch.tensor(zero)
    assert quantize(w, scale, zero, 1).tolist() == codes
    error = (fake_quant(w, scale, zero, 1) - w).square().mean()
    assert float(error) == pytest.approx(mse, abs=1e-6)


def test_fast_and_reference_give_the_same_codes_and_values():
    x, scale, zero, qmax = (value.double() for value in rows())
    assert np.array_equal(quantize(x, scale, zero, qmax), reference.quantize(x, scale, zero, qmax))
    values = reference.fake_quant(x, scale, zero, qmax)
    assert np.array_equal(fake_quant(x, scale, zero, qmax).numpy(), values)
    codes = quantize(x, scale, zero, qmax)
    assert np.array_equal(dequantize(codes, scale, zero), reference.dequantize(codes, scale, zero))


def test_one_pass_over_mixed_widths_is_every_row_on_its_own():
    x, scale, zero, qmax = rows()
    together = fake_quant(x, scale, zero, qmax)
    for row in range(len(x)):
        alone = fake_quant(x[row], scale[row], zero[row], int(qmax[row]))
        assert torch.equal(together[row], alone)


@given(
    bits=st.integers(1, 8),
    scale=st.floats(2.0**-20, 2.0**20, width=32),
    zero=st.floats(-1000, 1000, width=32),
    seed=st.integers(0, 9),
)
def test_a_row_never_has_more_values_than_its_width_allows(bits, scale, zero, seed):
    x = torch.randn(2000, generator=torch.Generator().manual_seed(seed)) * scale * 2**bits
    values = fake_quant(x, torch.tensor(scale), torch.tensor(zero), 2**bits - 1)
    assert len(values.unique()) <= 2**bits


def test_a_fractional_zero_point_keeps_four_values_at_two_bits():
    # Clamping round(x/d) + z instead gives -1.3, -1, 0, 1, 1.7: five.
    x = torch.linspace(-4, 4, 1001)
    values = fake_quant(x, torch.tensor(1.0), torch.tensor(1.3), 3).unique()
    assert values.tolist() == pytest.approx([-1.3, -0.3, 0.7, 1.7])


def test_codes_read_back_are_the_fake_quantized_values_bit_for_bit():
    x, scale, zero, qmax = rows(1)
    codes = quantize(x, scale, zero, qmax)
    assert codes.dtype == torch.uint8
    assert torch.equal(dequantize(codes, scale, zero), fake_quant(x, scale, zero, qmax))


def test_quantizing_twice_changes_nothing():
    x, scale, zero, qmax = rows(2)
    once = fake_quant(x, scale, zero, qmax)
    assert torch.equal(fake_quant(once, scale, zero, qmax), once)


def test_error_is_at_most_half_a_step_inside_the_range():
    x, scale, zero, qmax = rows(3)
    position = x / scale + zero
    inside = (position >= 0) & (position <= qmax)
    error = (fake_quant(x, scale, zero, qmax) - x).abs() / scale
    assert inside.any()
    assert float(error[inside].max()) <= 0.5 + 1e-4
    assert float(error[~inside].max()) > 0.5


def test_equal_to_pytorch_for_an_integer_zero_point_away_from_halves():
    # PyTorch rounds before it adds the zero point, so only exact halves may differ.
    x = torch.randn(6, 4000, generator=torch.Generator().manual_seed(4))
    scale = torch.tensor([0.5, 0.3, 0.1, 0.07, 1.0, 0.011])
    zero = torch.tensor([3, 0, 15, 8, 1, 7], dtype=torch.int32)
    theirs = torch.fake_quantize_per_channel_affine(x, scale, zero, 0, 0, 15)
    ours = fake_quant(x, scale[:, None], zero[:, None].float(), 15)
    position = x / scale[:, None]
    near_half = ((position - position.floor()) - 0.5).abs() < 1e-4
    assert float(near_half.float().mean()) < 1e-3
    assert torch.equal(ours[~near_half], theirs[~near_half])


def test_symmetric_codes_are_unsigned_codes_around_half():
    x = torch.linspace(-2, 2, 101).add(0.003)
    signed = 0.25 * torch.clamp(torch.round(x / 0.25), -4, 3)
    assert torch.equal(fake_quant(x, torch.tensor(0.25), torch.tensor(4.0), 7), signed)


def test_round_ste_rounds_halves_to_even_and_passes_the_gradient():
    x = torch.tensor([-1.5, -0.5, 0.5, 1.5, 2.5, float("inf")], requires_grad=True)
    y = round_ste(x)
    y.backward(torch.arange(6.0))
    assert y.tolist() == [-2, 0, 0, 2, 2, float("inf")]
    assert x.grad.tolist() == [0, 1, 2, 3, 4, 5]


def test_gradients_of_the_closed_form_by_hand():
    # d = 0.5, z = 1, qmax = 3: positions 2.4, 3.2, -0.2, 9, -3 -> codes 2, 3, 0 and clamped 3, 0.
    x = torch.tensor([0.7, 1.1, -0.6, 4.0, -2.0], requires_grad=True)
    scale = torch.full((5,), 0.5, requires_grad=True)
    zero = torch.ones(5, requires_grad=True)
    fake_quant(x, scale, zero, 3).sum().backward()
    assert x.grad.tolist() == [1, 1, 1, 0, 0]
    # inside (q - z) - x/d: 1 - 1.4, 2 - 2.2, -1 + 1.2; outside q - z: 2, -1
    assert scale.grad.tolist() == pytest.approx([-0.4, -0.2, 0.2, 2, -1], abs=1e-6)
    assert zero.grad.tolist() == [0, 0, 0, -0.5, -0.5]


@pytest.mark.parametrize("mixed", [False, True])
def test_gradients_are_those_of_the_function_with_its_rounding_frozen(mixed):
    x, scale, zero, qmax = (value.double() for value in rows(5, count=4, columns=6))
    qmax = qmax if mixed else 3
    position = x / scale + zero
    residual = position.round() - position
    inside = (position.round() >= 0) & (position.round() <= qmax)
    end = torch.where(position < 0, 0.0, 1.0) * qmax

    def frozen(x, scale, zero):
        codes = torch.where(inside, x / scale + zero + residual, end)
        return scale * (codes - zero)

    assert 0 < int(inside.sum()) < inside.numel()
    inputs = [value.clone().requires_grad_() for value in (x, scale, zero)]
    assert torch.autograd.gradcheck(frozen, inputs)
    ours = torch.autograd.grad(fake_quant(*inputs, qmax).pow(3).sum(), inputs)
    expected = torch.autograd.grad(frozen(*inputs).pow(3).sum(), inputs)
    for found, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("qmax", [3, torch.tensor([[3.0]])])
def test_the_end_codes_keep_the_whole_gradient(qmax):
    x = torch.tensor([[0.0, 3.0, 3.4, 3.6, -0.4, -0.6]], requires_grad=True)
    fake_quant(x, torch.ones(1, 1), torch.zeros(1, 1), qmax).sum().backward()
    assert x.grad.tolist() == [[1, 1, 1, 0, 1, 0]]


def test_half_precision_inputs_are_computed_in_the_type_of_the_scale():
    x = torch.linspace(-1, 1, 256, dtype=torch.bfloat16)
    y = fake_quant(x, torch.tensor([1 / 127]), torch.tensor([128.0]), 255)
    assert y.dtype == torch.float32
    assert float((y - x.float()).abs().max()) <= 0.5 / 127 + 1e-6


def test_max_code():
    assert [max_code(bits) for bits in (1, 2, 8)] == [1, 3, 255]
    assert max_code(torch.tensor([1, 3, 8])).tolist() == [[1], [7], [255]]


@pytest.mark.parametrize("bits", [0, 9, True, torch.tensor([1, 9]), torch.tensor([0, 2])])
def test_widths_outside_1_to_8_are_refused(bits):
    with pytest.raises(ConfigError, match="bits: expected"):
        max_code(bits)


@pytest.mark.bad_input
@pytest.mark.parametrize("bits", [2.0, torch.tensor([2.0]), torch.tensor(2), torch.tensor([True])])
def test_widths_of_another_kind_are_refused(bits):
    with pytest.raises(ConfigError, match="bits: expected"):
        max_code(bits)


def test_check_finite_names_the_tensor_and_counts():
    check_finite(torch.zeros(3), "conv_in.weight")
    bad = torch.tensor([1.0, float("nan"), float("inf"), -float("inf")])
    with pytest.raises(InputError, match=r"conv_in\.weight: 3 of 4 values are NaN or infinite"):
        check_finite(bad, "conv_in.weight")


def test_storable_numbers_survive_the_file():
    _, scale, zero, _ = rows(6)
    stored_scale, stored_zero = storable(scale, zero)
    assert torch.equal(stored_scale.half().float(), stored_scale)
    assert torch.equal(stored_zero.half().float(), stored_zero)
    torch.testing.assert_close(stored_scale, scale, rtol=2**-11, atol=0)
    torch.testing.assert_close(stored_zero, zero, rtol=2**-11, atol=0)


def test_storable_keeps_whole_zero_points():
    zero = torch.arange(256.0)
    assert torch.equal(storable(torch.full((256,), 1e-9), zero)[1], zero)


def test_storable_widens_what_float16_cannot_hold():
    # row 0: step below 2**-24. row 1: 100 to 100.003 at 2 bits, offset 100 = 2048 steps of 0.0488
    scale, zero = storable(torch.tensor([1e-9, 0.001]), torch.tensor([1.5, -100000.0]))
    assert scale.tolist() == pytest.approx([2**-24, 100 / 2048], rel=1e-3)
    assert zero.tolist() == pytest.approx([1.5, -2048], rel=1e-3)
    x = torch.tensor([100.0, 100.003])
    assert float((fake_quant(x, scale[1], zero[1], 3) - x).abs().max()) <= 100 / 2048


@pytest.mark.parametrize(
    ("scale", "zero", "text"),
    [
        (0.0, 1.0, "scale: found 0"),
        (-1.0, 1.0, "scale: found -1"),
        (float("nan"), 1.0, "scale: 1 of 1"),
        (1.0, float("inf"), "zero: 1 of 1"),
        (1e5, 1.0, r"scale: 1e\+05 is beyond torch.float16"),
    ],
)
def test_storable_refuses(scale, zero, text):
    with pytest.raises(InputError, match=text):
        storable(torch.tensor([scale]), torch.tensor([zero]))


@pytest.mark.parametrize("integer_zero", [False, True])
def test_learnable_affine_starts_as_the_function(integer_zero):
    x, scale, zero, qmax = rows(7)
    zero = torch.clamp(zero.round().abs(), torch.zeros(()), qmax) if integer_zero else zero
    quantizer = LearnableAffine(scale, zero, qmax, integer_zero=integer_zero)
    assert torch.equal(quantizer(x), fake_quant(x, scale, zero, qmax))
    assert torch.equal(
        dequantize(quantizer.codes(x), quantizer.scale, quantizer.zero), quantizer(x)
    )
    kind = "integer" if integer_zero else "free"
    assert repr(quantizer) == f"LearnableAffine(shape=(8, 1), zero={kind}, learn_zero=True)"


def test_learnable_affine_scale_is_relative_and_stays_positive():
    x, scale, zero, qmax = rows(8)
    quantizer = LearnableAffine(scale, zero, qmax)
    raw = scale.clone().requires_grad_()
    fake_quant(x, raw, zero, qmax).square().sum().backward()
    quantizer(x).square().sum().backward()
    torch.testing.assert_close(quantizer.rho.grad, raw.grad * scale)
    with torch.no_grad():
        quantizer.rho.fill_(-30.0)
    assert bool((quantizer.scale > 0).all())


def test_integer_zero_points_are_trained_but_stay_codes():
    quantizer = LearnableAffine(
        torch.tensor([0.5, 0.5]), torch.tensor([1.0, 3.0]), 3, integer_zero=True
    )
    with torch.no_grad():
        quantizer.offset.copy_(torch.tensor([1.4, 3.7]))
    assert quantizer.zero.tolist() == [1, 3]
    assert quantizer(torch.zeros(2)).tolist() == [0, 0]
    # both values lie above the range: d/dz = -scale; the second offset has left the codes
    quantizer(torch.tensor([9.0, 9.0])).sum().backward()
    assert quantizer.offset.grad.tolist() == [-0.5, 0]


def test_a_frozen_zero_point_is_stored_but_not_trained():
    quantizer = LearnableAffine(torch.ones(2, 1), torch.ones(2, 1), 3, learn_zero=False)
    assert [name for name, _ in quantizer.named_parameters()] == ["rho"]
    other = LearnableAffine(torch.full((2, 1), 7.0), torch.zeros(2, 1), 15, learn_zero=False)
    other.load_state_dict(quantizer.state_dict())
    x = torch.linspace(-2, 4, 40).reshape(2, 20)
    assert torch.equal(other(x), quantizer(x))


def test_training_reduces_the_error_of_a_bad_scale():
    x = torch.randn(4, 400, generator=torch.Generator().manual_seed(9))
    quantizer = LearnableAffine(torch.full((4, 1), 2.5), torch.full((4, 1), 0.3), 3)
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.05)
    errors = []
    for _ in range(120):
        loss = (quantizer(x) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(float(loss.detach()))
    assert errors[0] > 0.3
    assert errors[-1] < 0.13  # the best 2-bit quantizer of a Gaussian reaches 0.119


def test_learnable_affine_refuses_other_shapes_and_bad_scales():
    with pytest.raises(
        InputError, match=r"zero: expected the shape of scale, \(2, 1\), found \(2,\)"
    ):
        LearnableAffine(torch.ones(2, 1), torch.ones(2), 3)
    with pytest.raises(InputError, match="scale: found 0, expected positive"):
        LearnableAffine(torch.zeros(2, 1), torch.ones(2, 1), 3)
