# SPDX-License-Identifier: Apache-2.0
"""How weight codes become operands: shifts, sums, and the operand made anew."""

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402
from tenfold_core.quant.integer import IntWeight, int_conv2d, int_linear  # noqa: E402

SHAPES = [((5, 7), 1), ((6, 4, 3, 3), 1), ((6, 2, 3, 1), 3), ((4, 1, 3), 4), ((3, 1), 1)]


def codes_of(shape, bits, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.uint8)


def zeros_of(rows, low, high):
    return torch.linspace(low, high, rows)


@pytest.mark.parametrize(("shape", "groups"), SHAPES)
@pytest.mark.parametrize("bits", [1, 3, 8])
@pytest.mark.parametrize(("low", "high"), [(0.3, 2.7), (-300.5, 600.25), (0.0, 255.0), (3.0, 3.0)])
def test_codes_shift_by_the_integer_next_to_the_zero_point_that_fits(
    shape, groups, bits, low, high
):
    codes, zero = codes_of(shape, bits), zeros_of(shape[0], low, high)
    weight = IntWeight.from_codes(codes, scale=torch.ones(shape[0]), zero=zero, groups=groups)
    rows = codes.movedim(1, -1).reshape(shape[0], -1).int()
    shift = zero.round().int()
    shift = torch.maximum(torch.minimum(shift, rows.amin(1) + 128), rows.amax(1) - 127)
    shifted, left = rows - shift[:, None], zero - shift
    inner, per_group = rows.shape[1], shape[0] // groups
    operand = weight.operand[:, :per_group, :inner].reshape(shape[0], inner)
    assert torch.equal(operand.int(), shifted)
    assert torch.equal(weight.sums, shifted.sum(1, dtype=torch.int32))
    assert weight.narrow == (255 * int(shifted.abs().sum(1).max()) < 1 << 24)
    assert (weight.offset is None) == (not left.any())
    rest = weight.operand.clone()
    rest[:, :per_group, :inner] = 0
    if weight.offset is not None:
        assert torch.equal(weight.offset, left)
        assert (rest[:, per_group, :inner] == 1).all()
        rest[:, per_group] = 0
    assert not rest.any()
    assert weight.operand.shape[1] % 8 == weight.operand.shape[2] % 8 == 0


@pytest.mark.parametrize(("shape", "groups"), SHAPES)
@pytest.mark.parametrize("zero", [1.25, 2.0, -400.5])
def test_an_operand_made_anew_is_the_one_that_was_dropped(shape, groups, zero):
    codes, zeros = codes_of(shape, 4), torch.full((shape[0],), zero)
    weight = IntWeight.from_codes(codes, scale=torch.ones(shape[0]), zero=zeros, groups=groups)
    dropped = IntWeight(**vars(weight) | {"operand": weight.operand.new_empty(0)})
    again = dropped.with_codes(codes, zeros)
    assert torch.equal(again.operand, weight.operand)
    assert vars(again).keys() == vars(weight).keys()
    assert again.sums is weight.sums


def test_sums_of_the_extremes_are_exact():
    """Rows of 65,793 codes 255 around a zero point of 0 sum to 127 * 65,793 after the shift."""
    codes = torch.full((1, 65_793), 255, dtype=torch.uint8)
    weight = IntWeight.from_codes(codes, scale=torch.ones(1), zero=torch.zeros(1))
    assert weight.sums.tolist() == [127 * 65_793]
    assert not weight.narrow
    x = torch.ones(1, 65_793, dtype=torch.uint8)
    found = int_linear(x, weight, scale=torch.ones(()), zero=torch.zeros((), dtype=torch.int32))
    torch.testing.assert_close(found, torch.tensor([[255.0 * 65_793]]))


def test_a_weight_made_anew_computes_the_same():
    codes, zeros = codes_of((8, 3, 3, 3), 2), torch.full((8,), 1.4)
    weight = IntWeight.from_codes(codes, scale=torch.full((8,), 0.5), zero=zeros)
    x = codes_of((2, 3, 6, 5), 8, seed=1)
    settings = {"scale": torch.tensor(0.1), "zero": torch.tensor(7), "padding": 1}
    found = int_conv2d(x, weight.with_codes(codes, zeros), **settings)
    assert torch.equal(found, int_conv2d(x, weight, **settings))
    expected = F.conv2d(0.1 * (x.float() - 7), 0.5 * (codes.float() - 1.4), padding=1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
