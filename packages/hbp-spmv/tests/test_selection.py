# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace

import numpy as np
import pytest
from hbp_spmv import BuildConfig, from_csr, select, selection
from hbp_spmv.calibration import DEFAULT
from hbp_spmv.selection import features, predict
from numpy.testing import assert_array_equal
from scipy.sparse import coo_array, csr_array, eye_array
from tenfold_core.device import cupy_or_none
from tenfold_core.errors import ConfigError, MissingExtraError
from tenfold_core.testing.sparse import awkward_matrices, random_csr


@pytest.fixture(scope="module")
def regular():
    """Long rows of one length: nothing to gain from a reordering."""
    rows, columns = np.divmod(np.arange(600 * 60), 60)
    values = np.random.default_rng(0).standard_normal(len(rows))
    return csr_array(coo_array((values, (rows, (rows + columns) % 600)), shape=(600, 600)))


@pytest.fixture(scope="module")
def irregular():
    """60 000 short rows of changing length: the branch predictor fails at every row."""
    rng = np.random.default_rng(0)
    rows = np.repeat(np.arange(60_000), rng.integers(0, 9, 60_000))
    columns = rng.integers(0, 5000, len(rows))
    return csr_array(
        coo_array((rng.standard_normal(len(rows)), (rows, columns)), shape=(60_000, 5000))
    )


@pytest.fixture
def timed(monkeypatch):
    """Let the timing return given microseconds."""

    def give(csr, compact):
        monkeypatch.setattr(selection, "_time", lambda *_: {"csr": csr, "compact": compact})

    return give


def test_features_by_hand():
    # lengths 2, 2, 0, 1: mean 1.25; three neighbours, two of which differ
    a = csr_array(np.array([[1.0, 1, 0], [1, 0, 1], [0, 0, 0], [0, 1, 0]]))
    f = features(a, lanes=4)
    assert (f.rows, f.columns, f.nnz, f.mean) == (4, 3, 5, 1.25)
    assert f.cv == pytest.approx(np.std([2, 2, 0, 1]) / 1.25)
    assert f.switches == 2 / 3
    assert f.slots == 8  # one group whose longest row has 2
    assert f.scatter == 0
    assert (f.wide, f.uniform) == (False, True)


@pytest.mark.parametrize("name", awkward_matrices())
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("size", [4, 8])
def test_predictions_are_positive_and_finite(name, threads, size):
    f = features(awkward_matrices()[name].to_scipy())
    predicted = predict(f, DEFAULT, threads=threads, size=size)
    assert set(predicted) == {"csr", "compact"}
    assert all(0 < us < 1e6 for us in predicted.values())


def test_predictions_grow_with_the_matrix(regular):
    f = features(regular)
    larger = replace(f, rows=10 * f.rows, nnz=10 * f.nnz, slots=10 * f.slots)
    small, large = predict(f, DEFAULT), predict(larger, DEFAULT)
    assert all(large[name] > 5 * small[name] for name in small)


def test_a_miss_costs_only_where_x_leaves_the_cache(regular):
    f = replace(features(regular), scatter=1.0, columns=1 << 30)
    free = predict(f, replace(DEFAULT, miss_ns=0.0))
    dear = predict(f, replace(DEFAULT, miss_ns=1e6))
    assert all(dear[name] > free[name] for name in free)


def test_changing_lengths_make_compact_the_prediction(irregular):
    plan = select(irregular)
    assert plan.format == "compact"
    assert plan.predicted_us["compact"] < plan.predicted_us["csr"] / selection.CLOSE
    assert plan.params == {"hash": "lut", "lanes": 16}
    assert "over 1.6 times that" in plan.reasons[-1]
    assert not plan.timed_us


def test_few_products_do_not_pay_for_a_reordering(irregular):
    plan = select(irregular, n_products=1)
    assert plan.format == "csr"
    assert plan.params == {}
    assert "1 products: the reordering does not pay for its build" in plan.reasons


def test_enough_products_pay_for_a_reordering(irregular):
    plan = select(irregular, n_products=selection.TIMED_PRODUCTS)
    assert plan.format == "compact"
    assert "the reordering pays" in plan.reasons[-1]


@pytest.mark.parametrize(
    ("csr", "compact", "expected"),
    [(100.0, 50.0, "compact"), (50.0, 100.0, "csr"), (100.0, 99.0, "csr"), (100.0, 100.0, "csr")],
)
def test_close_predictions_are_timed_and_ties_are_csr(regular, timed, csr, compact, expected):
    timed(csr, compact)
    plan = select(regular, n_products=1_000_000)
    assert plan.format == expected
    assert plan.timed_us == {"csr": csr, "compact": compact}
    assert f"timed: compact {compact} us, csr {csr} us" in plan.reasons[-1]
    assert plan.build_ms.keys() == {"csr", "compact"}


def test_a_faster_layout_must_also_pay_for_its_build(regular, timed):
    timed(100.0, 96.0)
    plan = select(regular, n_products=10, tune=True)
    assert plan.format == "csr"
    assert "10 products do not pay for the build" in plan.reasons[-1]


def test_tune_times_whatever_the_number_of_products(regular, timed):
    timed(1e6, 1.0)
    assert not select(regular, n_products=10).timed_us
    plan = select(regular, n_products=10, tune=True)
    assert plan.timed_us
    assert plan.format == "compact"


def test_real_timing_measures_both(regular):
    plan = select(regular)
    assert plan.timed_us.keys() == {"csr", "compact"}
    assert all(us > 0 for us in plan.timed_us.values())


def test_the_matrix_keeps_the_reasons_and_the_chosen_layout(irregular):
    matrix = from_csr(irregular)
    assert (matrix.layout, matrix.config.layout) == ("compact", "auto")
    assert matrix.reasons == select(irregular).reasons
    assert matrix.reasons[0].startswith("60000 x 5000, 4.0 nonzeros a row, cv")
    assert from_csr(irregular, layout="csr").reasons == ()
    few = from_csr(irregular, n_products=1)
    assert few.layout == "csr"
    x = np.ones(5000)
    np.testing.assert_allclose(few @ x, matrix @ x, rtol=1e-12, atol=1e-12)


def test_settings_of_the_candidates_are_kept(irregular):
    matrix = from_csr(irregular, config=BuildConfig(lanes=8, hash="sort"))
    assert (matrix._stored.lanes, matrix.config.hash) == (8, "sort")
    assert select(irregular, config=BuildConfig(lanes=8, hash="sort")).params == {
        "hash": "sort",
        "lanes": 8,
    }


def test_16_bit_columns_rule_out_csr_on_wide_matrices():
    a = eye_array(70_000, format="csr")
    assert select(a, config=BuildConfig(index="u16")).format == "compact"


@pytest.mark.parametrize("n_products", [0, -5])
def test_no_products_are_refused(regular, n_products):
    with pytest.raises(ConfigError, match=f"n_products: expected a positive int, got {n_products}"):
        select(regular, n_products=n_products)
    with pytest.raises(ConfigError, match="n_products: expected a positive int"):
        from_csr(regular, n_products=n_products)


@pytest.mark.skipif(cupy_or_none() is not None, reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused(regular):
    with pytest.raises((ConfigError, MissingExtraError), match=r"device.*'cuda'"):
        select(regular, device="cuda")


@pytest.mark.parametrize("name", awkward_matrices())
def test_every_structure_has_a_plan(name):
    plan = select(awkward_matrices()[name].to_scipy())
    assert plan.format in ("csr", "compact")
    assert plan.reasons


def test_complex_matrices_are_stored_by_rows():
    a = random_csr(20, 20, density=0.5).to_scipy().astype(complex)
    plan = select(a)
    assert plan.format == "csr"
    assert "complex values" in plan.reasons[0]
    assert_array_equal(from_csr(a).arrays()["val"], a.data)
