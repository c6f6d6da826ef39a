# SPDX-License-Identifier: Apache-2.0
"""Which row gets how many bits: kurtosis, the paper's search, exact allocations."""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mpq_dm.omq import (
    allocate_exact,
    allocate_kurtosis,
    allocate_layers,
    average_bits,
    group_size,
    kurtosis,
    mixtures,
    raise_rows,
)
from tenfold_core.errors import ConfigError


@pytest.mark.parametrize(
    ("row", "expected"),
    [([1, 2, 3, 4], 1.64), ([0, 0, 0, 4], 7 / 3), ([0] * 7 + [8], 43 / 7), ([5, 5, 5, 5], 0)],
)
def test_kurtosis_by_hand(row, expected):
    found = kurtosis(torch.tensor([row], dtype=torch.float64))
    assert found.item() == pytest.approx(expected)


def test_kurtosis_ignores_place_and_scale():
    w = torch.randn(5, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(kurtosis(3 * w - 7), kurtosis(w))


def test_a_layer_of_320_rows_has_six_candidates_of_average_two():
    found = mixtures(np.arange(320), 2)
    assert found.shape == (6, 320)
    assert (found.mean(axis=1) == 2).all()
    assert set(found[5]) == {1, 3}  # g = 5: half the rows go up, half go down
    assert (found[1, :32] == 3).all()
    assert (found[1, -32:] == 1).all()
    assert len(mixtures(np.arange(320), 2, search="official")) == 2


@given(st.integers(1, 60), st.integers(2, 8))
def test_candidates_keep_the_average_and_move_whole_groups(rows, bits):
    found = mixtures(np.random.default_rng(rows).permutation(rows), bits)
    assert (found.sum(axis=1) == bits * rows).all()
    for moved, candidate in enumerate(found):
        assert (candidate == bits + 1).sum() == (candidate == bits - 1).sum()
        assert (candidate == bits + 1).sum() == moved * group_size(rows)


def test_one_bit_cannot_be_mixed():
    with pytest.raises(ConfigError, match="weight_bits=1: mixing needs 0, 1 and 2 bits"):
        mixtures(np.arange(10), 1)


def table_error(table, choices):
    columns = {bits: column for column, bits in enumerate(choices)}
    return lambda bits: sum(table[row, columns[int(b)]] for row, b in enumerate(bits))


def random_table(rows, kinds, seed, convex=True):
    rng = np.random.default_rng(seed)
    energy = rng.lognormal(0, 1.5, rows)
    curve = np.array([0.36, 0.119, 0.0376, 0.0116])[:kinds]
    noise = 1 if convex else rng.uniform(0.3, 3, (rows, kinds))
    return energy[:, None] * curve * noise


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("convex", [True, False])
def test_exact_is_the_best_of_all_allocations(seed, convex):
    rows, choices = 7, (1, 2, 3)
    table = random_table(rows, 3, seed, convex)
    error = table_error(table, choices)
    found = allocate_exact(table, choices, 2 * rows)
    every = [b for b in product(choices, repeat=rows) if sum(b) == 2 * rows]
    assert error(found) == pytest.approx(min(error(b) for b in every))
    assert found.sum() == 2 * rows


@pytest.mark.parametrize("seed", range(5))
def test_exact_beats_kurtosis_beats_uniform(seed):
    rows, choices = 100, (1, 2, 3)
    table = random_table(rows, 3, seed)
    error = table_error(table, choices)
    kappa = np.random.default_rng(seed).lognormal(1, 0.5, rows)
    uniform = error(np.full(rows, 2))
    by_kurtosis = error(allocate_kurtosis(kappa, error, 2))
    exact = error(allocate_exact(table, choices, 2 * rows))
    assert exact <= by_kurtosis <= uniform


def test_nothing_moves_where_rows_are_alike():
    table = np.tile([0.36, 0.119, 0.0376], (40, 1))
    assert (allocate_exact(table, (1, 2, 3), 80) == 2).all()
    kappa = np.random.default_rng(0).normal(3, 0.1, 40)
    assert (allocate_kurtosis(kappa, table_error(table, (1, 2, 3)), 2) == 2).all()


def test_allocation_follows_the_rows_when_they_are_permuted():
    table = random_table(30, 3, 0)
    order = np.random.default_rng(1).permutation(30)
    found = allocate_exact(table, (1, 2, 3), 60)
    np.testing.assert_array_equal(allocate_exact(table[order], (1, 2, 3), 60), found[order])


@pytest.mark.parametrize(("choices", "total"), [((1, 2, 3), 9), ((1, 2, 3), 31), ((1, 3), 20)])
def test_totals_out_of_reach_are_refused(choices, total):
    with pytest.raises(ConfigError, match=f"{total} bits for 10 rows"):
        allocate_exact(np.zeros((10, len(choices))), choices, total)


@settings(max_examples=40)
@given(st.integers(0, 10_000))
def test_layers_share_one_budget_about_as_well_as_possible(seed):
    rng = np.random.default_rng(seed)
    sizes, widths, choices = (3, 2), (4, 6), (1, 2, 3)
    tables = [random_table(size, 3, seed + i) for i, size in enumerate(sizes)]
    budget = 2 * sum(s * w for s, w in zip(sizes, widths, strict=True)) + int(rng.integers(0, 5))
    found = allocate_layers(tables, widths, choices, budget)
    spent = sum(int(b.sum()) * w for b, w in zip(found, widths, strict=True))
    assert spent <= budget
    cost = sum(table_error(t, choices)(b) for t, b in zip(tables, found, strict=True))
    width = np.repeat(widths, sizes)
    every = [b for b in product(choices, repeat=5) if (np.array(b) * width).sum() <= budget]
    both = table_error(np.concatenate(tables), choices)
    best = min(both(b) for b in every)
    # At its price it is optimal; what may be lost is less than one row's step.
    steps = -np.diff(np.concatenate(tables), axis=1)
    assert best - 1e-12 <= cost <= best + steps.max()
    uniform = both([2] * 5)
    assert cost <= uniform + 1e-12


def test_a_budget_for_everything_gives_everything():
    tables = [random_table(4, 3, 0)]
    assert (allocate_layers(tables, [10], (1, 2, 3), 1000)[0] == 3).all()
    with pytest.raises(ConfigError, match="expected at least 40"):
        allocate_layers(tables, [10], (1, 2, 3), 39)


def test_plus_raises_the_rows_of_largest_kurtosis():
    kappa = np.array([3.0, 9.0, 1.0, 4.0, 2.0] * 2)
    found = raise_rows(kappa, np.full(10, 2), 0.2)
    assert found.tolist() == [2, 3, 2, 2, 2, 2, 3, 2, 2, 2]
    assert average_bits([found], [7]) == pytest.approx(2.2)
    with pytest.raises(ConfigError, match="plus is 2"):
        raise_rows(kappa, np.full(10, 2), 2)
