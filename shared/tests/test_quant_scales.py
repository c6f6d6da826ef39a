# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tenfold_core.errors import ConfigError, InputError
from tenfold_core.quant import reference, scales
from tenfold_core.quant.affine import fake_quant, max_code, quantize
from tenfold_core.quant.scales import init_scale

KINDS = ["free", "int", "symmetric"]


def gaussian(rows, columns, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=dtype)


def error(x, scale, zero, qmax, norm=2.0):
    return (fake_quant(x, scale, zero, qmax) - x).abs().pow(norm).sum(-1)


def test_range_of_minus_one_to_two():
    w = torch.tensor([[-1.0, 0.0, 1.0, 2.0]])
    assert [value.item() for value in init_scale(w, 2)] == [1, 1]
    assert [value.item() for value in init_scale(w, 1, zero="int")] == [3, 0]
    scale, zero = init_scale(w, 1)
    assert scale.item() == 3
    assert zero.item() == pytest.approx(1 / 3)


def test_integer_zero_points_by_hand():
    # (0.75 + 1) / 7 = 0.25 and 1 / 0.25 = 4; 1.6 / 7 and 1 / (1.6 / 7) = 4.375 -> 4
    w = torch.tensor([[-1, -0.5, 0, 0.25, 0.75], [-1, -0.4, 0.1, 0.6, 0.6]])
    scale, zero = init_scale(w, 3, zero="int")
    assert scale.flatten().tolist() == pytest.approx([0.25, 1.6 / 7])
    assert zero.flatten().tolist() == [4, 4]
    assert quantize(w, scale, zero, 7).tolist() == [[0, 2, 4, 5, 7], [0, 2, 4, 7, 7]]
    assert fake_quant(w, scale, zero, 7)[1].tolist() == pytest.approx(
        [-0.914286, -0.457143, 0, 0.685714, 0.685714], abs=1e-6
    )


def test_an_integer_zero_point_widens_a_range_that_lacks_zero():
    scale, zero = init_scale(torch.tensor([[4.0, 6.0], [-6.0, -4.0]]), 2, zero="int")
    assert scale.flatten().tolist() == [2, 2]
    assert zero.flatten().tolist() == [0, 3]


def test_symmetric_range_uses_the_larger_side():
    scale, zero = init_scale(torch.tensor([[-1.0, 3.0]]), 3, zero="symmetric")
    assert [scale.item(), zero.item()] == [1, 4]


@pytest.mark.parametrize("zero", KINDS)
@pytest.mark.parametrize(
    "settings",
    [
        {"method": "minmax"},
        {"method": "mse"},
        {"method": "mse", "norm": 2.0, "steps": 50, "step_size": 0.02},
    ],
)
def test_fast_and_reference_agree(zero, settings):
    x = (
        gaussian(6, 40, dtype=torch.float64)
        + torch.linspace(-1, 1, 6, dtype=torch.float64)[:, None]
    )
    bits = torch.tensor([2, 3, 4, 5, 8, 2])
    scale, zeros = init_scale(x, bits, zero=zero, **settings)
    wanted_scale, wanted_zeros = reference.init_scale(x, bits, zero=zero, **settings)
    np.testing.assert_allclose(scale, wanted_scale, rtol=1e-12)
    np.testing.assert_allclose(zeros, wanted_zeros, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("zero", KINDS)
def test_float32_search_reaches_the_least_error_of_all_candidates(zero):
    x = gaussian(5, 60, seed=1)
    scale, zeros = init_scale(x, 3, method="mse", zero=zero)
    best = reference.init_scale(x.double(), 3, method="mse", zero=zero)
    wanted = error(x.double(), *(torch.from_numpy(value) for value in best), 7, 2.4)
    found = error(x.double(), scale.double(), zeros.double(), 7, 2.4)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=0)


@given(
    seed=st.integers(0, 50),
    bits=st.integers(1, 8),
    zero=st.sampled_from(["free", "int"]),
    norm=st.sampled_from([2.0, 2.4]),
    offset=st.floats(-2, 2),
)
def test_mse_is_never_worse_than_minmax(seed, bits, zero, norm, offset):
    x = (gaussian(4, 50, seed) + offset).double()
    plain = error(x, *init_scale(x, bits, zero=zero), 2**bits - 1, norm)
    searched = init_scale(x, bits, method="mse", zero=zero, norm=norm)
    assert bool((error(x, *searched, 2**bits - 1, norm) <= plain * (1 + 1e-9)).all())


def test_more_bits_never_hurt_a_gaussian_row():
    x = gaussian(8, 256)
    errors = [error(x, *init_scale(x, b, method="mse", norm=2.0), 2**b - 1) for b in range(1, 9)]
    for wide, narrow in zip(errors[1:], errors, strict=False):
        assert bool((wide < narrow).all())


@pytest.mark.parametrize(
    ("bits", "zero", "mse"),
    [
        (1, "int", 0.592),
        (1, "free", 0.362),
        (2, "int", 0.149),
        (2, "free", 0.119),
        (3, "int", 0.0405),
        (3, "free", 0.0376),
        (4, "int", 0.0119),
        (4, "free", 0.0116),
        (5, "free", 0.0035),
    ],
)
def test_least_error_of_a_unit_gaussian(bits, zero, mse):
    # The quantiles of the distribution stand for a row: no noise, and the middle is the mean.
    x = torch.special.ndtri((torch.arange(20000).double() + 0.5) / 20000).unsqueeze(0)
    grid = {"norm": 2.0, "steps": 240, "step_size": 0.004}
    scale, zeros = init_scale(x, bits, method="mse", zero=zero, **grid)
    found = float(error(x, scale, zeros, 2**bits - 1) / x.shape[1])
    assert found == pytest.approx(mse, rel=0.01)


@pytest.mark.parametrize("method", ["minmax", "mse"])
@pytest.mark.parametrize("zero", KINDS)
@pytest.mark.parametrize("value", [0.0, 0.3, -0.3, 1e-30, -7e12])
def test_a_constant_row_comes_back_exactly(method, zero, value):
    x = torch.stack([torch.full((9,), value), torch.arange(9.0)])
    bits = torch.tensor([2, 4])
    scale, zeros = init_scale(x, bits, method=method, zero=zero)
    assert torch.equal(fake_quant(x, scale, zeros, max_code(bits))[0], x[0])


def test_a_free_zero_point_of_a_constant_row_puts_it_on_code_zero():
    x = torch.tensor([[0.3, 0.3], [-2.0, -2.0], [0.0, 0.0]])
    scale, zero = init_scale(x, 2)
    torch.testing.assert_close(zero, -x[:, :1] / scale)
    assert quantize(x, scale, zero, 3).tolist() == [[0, 0], [0, 0], [0, 0]]


def test_rows_far_from_zero_or_nearly_constant_keep_float_accuracy():
    x = torch.tensor([[1000.0, 1000.5, 1001.0], [1.0, 1.0 + 2**-23, 1.0]])
    scale, zero = init_scale(x, 2, method="mse")
    assert float((fake_quant(x, scale, zero, 3) - x).abs()[0].max()) <= scale[0] / 2 * 1.01
    assert float((fake_quant(x, scale, zero, 3) - x).abs()[1].max()) < 1e-6


@pytest.mark.parametrize("zero", KINDS)
def test_rows_of_subnormal_numbers_stay_near_zero(zero):
    x = torch.tensor([[1e-45, 3e-45, -1e-45], [0.0, 1e-45, 0.0]])
    scale, zeros = init_scale(x, 8, method="mse", zero=zero)
    assert float(fake_quant(x, scale, zeros, 255).abs().max()) < 1e-35


def test_the_largest_floats_do_not_overflow():
    x = torch.tensor([[-3e38, 0.0, 3e38]])
    for zero in KINDS:
        scale, zeros = init_scale(x, 8, zero=zero)
        assert bool(torch.isfinite(fake_quant(x / 2, scale / 2, zeros, 255)).all())


@pytest.mark.parametrize("zero", KINDS)
def test_widths_by_row_equal_one_call_for_each_width(zero):
    x = gaussian(6, 64, seed=4)
    bits = torch.tensor([2, 3, 8, 2, 3, 4])
    together = init_scale(x, bits, method="mse", zero=zero)
    for row, width in enumerate(bits.tolist()):
        alone = init_scale(x[row : row + 1], width, method="mse", zero=zero)
        assert torch.equal(together[0][row], alone[0][0])
        assert torch.equal(together[1][row], alone[1][0])


def test_a_vector_is_one_row():
    x = gaussian(1, 300, seed=5)
    scale, zero = init_scale(x[0], 4, method="mse", zero="int")
    assert scale.shape == zero.shape == ()
    as_row = init_scale(x, 4, method="mse", zero="int")
    assert torch.equal(scale, as_row[0][0, 0])
    assert torch.equal(zero, as_row[1][0, 0])


def test_scaling_the_rows_scales_the_result():
    x = gaussian(5, 70, seed=6)
    scale, zero = init_scale(x, 3, method="mse")
    scaled, same = init_scale(x * 2.0**-40, 3, method="mse")
    assert torch.equal(scaled, scale * 2.0**-40)
    assert torch.equal(same, zero)


@pytest.mark.parametrize("block", [16, 100, 1000])
def test_blocks_bound_the_memory_and_change_nothing(monkeypatch, block):
    x = gaussian(9, 50, seed=7, dtype=torch.float64)
    whole = init_scale(x, 3, method="mse")
    sizes = []
    add_errors = scales._add_errors

    def watched(errors, position, *rest):
        sizes.append(position.numel())
        add_errors(errors, position, *rest)

    monkeypatch.setattr(scales, "_BLOCK_CPU", block)
    monkeypatch.setattr(scales, "_add_errors", watched)
    parts = init_scale(x, 3, method="mse")
    assert max(sizes) <= block
    assert sum(sizes) == x.numel()
    torch.testing.assert_close(parts[0], whole[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(parts[1], whole[1], rtol=1e-12, atol=0)


def test_half_precision_non_contiguous_and_empty_inputs():
    x = gaussian(40, 6, seed=8).bfloat16().t()
    scale, zero = init_scale(x, 4, method="mse")
    assert scale.dtype == torch.float32
    assert torch.equal(scale, init_scale(x.float().contiguous(), 4, method="mse")[0])
    assert zero.requires_grad is False
    assert [value.shape for value in init_scale(torch.zeros(0, 3), 4)] == [(0, 1), (0, 1)]
    assert init_scale(torch.ones(3, 1), 4, method="mse")[0].flatten().tolist() == [1, 1, 1]


def test_nan_is_refused_by_name():
    x = torch.tensor([[1.0, float("nan")], [float("inf"), 0.0]])
    with pytest.raises(InputError, match=r"conv_in\.weight: 2 of 4 values are NaN or infinite"):
        init_scale(x, 2, name="conv_in.weight")


@pytest.mark.parametrize("shape", [(3, 0), (0,), (2, 3, 4), ()])
def test_other_shapes_are_refused(shape):
    with pytest.raises(InputError, match=r"w: expected \(rows, columns\) or \(columns,\)"):
        init_scale(torch.zeros(shape), 2, name="w")


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("bits", "settings", "text"),
    [
        (9, {}, "bits: expected a whole number from 1 to 8, found 9"),
        (torch.tensor([2, 2]), {}, "bits: expected 3 rows"),
        (1, {"zero": "symmetric"}, "symmetric codes need at least 2 bits"),
        (2, {"zero": "none"}, "zero: expected 'free', 'int' or 'symmetric', found 'none'"),
        (2, {"method": "max"}, "method: expected 'minmax' or 'mse', found 'max'"),
        (2, {"norm": 0.0}, "norm: expected a positive number"),
        (2, {"steps": 0}, "0 steps of 0.01 leave no range"),
        (2, {"steps": 101}, "101 steps of 0.01 leave no range"),
        (2, {"step_size": 0.0}, "80 steps of 0.0 leave no range"),
    ],
)
def test_bad_settings_are_refused(bits, settings, text):
    with pytest.raises(ConfigError, match=text):
        init_scale(torch.ones(3, 4), bits, **settings)
