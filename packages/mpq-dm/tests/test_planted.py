# SPDX-License-Identifier: Apache-2.0
"""Allocations on layers whose outliers are known."""

import numpy as np
import pytest
import torch
from mpq_dm.allocation import allocate, row_errors
from mpq_dm.config import MixConfig
from mpq_dm.omq import average_bits
from mpq_dm.planted import compare, planted_layer


@pytest.fixture(scope="module")
def rows():
    return {(row["case"], row["bits"]): row for row in compare()}


@pytest.mark.parametrize(("bits", "gain"), [(2, 0.25), (3, 0.38), (4, 0.48)])
def test_the_search_finds_planted_outliers(rows, bits, gain):
    row = rows["30 heavy rows", bits]
    assert row["gain_kurtosis"] == pytest.approx(gain, abs=0.04)
    assert row["gain_exact"] >= row["gain_kurtosis"]


def test_an_integer_zero_makes_two_bit_mixing_poor(rows):
    assert rows["30 heavy rows, integer zero", 2]["gain_kurtosis"] < 0.1


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_tails_alone_buy_less_than_loud_rows(rows, bits):
    equal, loud = rows["30 heavy rows of equal variance", bits], rows["30 heavy rows", bits]
    assert 0 <= equal["gain_kurtosis"] < loud["gain_kurtosis"]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_nothing_moves_among_gaussian_rows(rows, bits):
    row = rows["Gaussian rows only", bits]
    assert (row["moved"], row["gain_kurtosis"]) == (0, 0)
    assert 0 <= row["gain_exact"] < 0.02


def test_errors_fall_with_bits_and_follow_the_inputs():
    weight = planted_layer(10, 0)
    table = row_errors(weight, (1, 2, 3, 4))
    assert (np.diff(table, axis=1) < 0).all()
    x = torch.randn(300, 512, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gram = x.T @ x / len(x)
    found = row_errors(weight, (2,), gram=gram)
    from tenfold_core.quant.affine import fake_quant
    from tenfold_core.quant.scales import init_scale

    scale, zero = init_scale(weight, 2, method="mse")
    outputs = x @ (weight - fake_quant(weight, scale, zero, 3)).T
    np.testing.assert_allclose(found[:, 0], outputs.square().mean(0).numpy(), rtol=1e-9)


@pytest.mark.parametrize("allocation", ["uniform", "kurtosis", "exact", "exact-layers"])
def test_every_allocation_keeps_the_average(allocation):
    weights = [planted_layer(30, 0), planted_layer(0, 1)[:40, :100]]
    found = allocate(weights, MixConfig(weight_bits=3, allocation=allocation))
    widths = [weight.shape[1] for weight in weights]
    average = average_bits(found, widths)
    if allocation == "exact-layers":
        assert 2.99 < average <= 3
        assert found[0].mean() > 3 > found[1].mean()  # the loud layer gets more
    else:
        assert [layer.mean() for layer in found] == [3, 3]


def test_plus_adds_a_tenth_of_a_bit():
    weights = [planted_layer(30, 0)]
    found = allocate(weights, MixConfig(weight_bits=2, allocation="uniform", plus=0.1))
    assert found[0].mean() == pytest.approx(2.1)
    assert set(np.flatnonzero(found[0] == 3)) <= set(range(30))  # planted rows
