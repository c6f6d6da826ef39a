# SPDX-License-Identifier: Apache-2.0
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tenfold_core.errors import InputError
from tenfold_core.sparse import CSR, componentwise_bound, error_over_bound, reference_product
from tenfold_core.testing.sparse import assert_close_to_reference

U32, U64 = 2.0**-24, 2.0**-53


def row(*values):
    return CSR((1, len(values)), [0, len(values)], list(range(len(values))), list(values))


def test_the_bound_of_a_row_worked_by_hand():
    # k = 2: (k + 2) u = 4u; sum |a||x| = 3*1 + 4*2 = 11.
    matrix, x = row(3.0, -4.0), np.array([1.0, 2.0])
    assert componentwise_bound(matrix, x)[0] == pytest.approx(4 * U64 / (1 - 4 * U64) * 11)
    assert componentwise_bound(matrix, x, unit=U32)[0] == pytest.approx(
        4 * U32 / (1 - 4 * U32) * 11
    )
    single = CSR((1, 2), [0, 2], [0, 1], np.array([3, -4], np.float32))
    assert componentwise_bound(single, x.astype(np.float32))[0] == pytest.approx(44 * U32, rel=1e-5)


def test_the_bound_of_an_empty_row_is_less_than_any_normal_number():
    bound = componentwise_bound(CSR((2, 2), [0, 0, 1], [0], [1.0]), np.ones(2))
    assert 0 < bound[0] < np.finfo(float).tiny < bound[1]


@given(
    st.lists(
        st.tuples(
            st.floats(-1e100, 1e100, allow_subnormal=False),
            st.floats(-1e100, 1e100, allow_subnormal=False),
        ).filter(lambda pair: pair[0] * pair[1] == 0 or abs(pair[0] * pair[1]) > 1e-250),
        max_size=12,
    )
)
def test_the_reference_is_the_exact_sum_rounded_once(pairs):
    exact = sum((Fraction(a) * Fraction(b) for a, b in pairs), Fraction(0))
    got = reference_product(row(*(a for a, _ in pairs)), np.array([b for _, b in pairs]))
    assert got.tolist() == [float(exact)]


def test_the_reference_survives_cancellation_that_float64_does_not():
    matrix, x = row(1e16, 1.0, -1e16), np.ones(3)
    assert reference_product(matrix, x).tolist() == [1.0]


def test_complex_products_are_exact_too():
    # (1 + 2i)(3 - i) = 5 + 5i
    got = reference_product(row(1 + 2j), np.array([3 - 1j]))
    assert got.tolist() == [5 + 5j]
    worst, _ = error_over_bound(got.astype(np.complex64), row(1 + 2j), np.array([3 - 1j]))
    assert worst == 0


def test_nan_and_infinity_follow_ieee_and_stay_in_their_row():
    matrix = CSR((4, 2), [0, 1, 2, 4, 5], [0, 1, 0, 1, 1], [1.0, 1.0, 1.0, -1.0, 0.0])
    assert reference_product(matrix, np.array([math.nan, 2.0])).tolist()[1:2] == [2.0]
    got = reference_product(matrix, np.array([math.inf, math.inf]))
    assert got[:2].tolist() == [math.inf, math.inf]
    assert np.isnan(got[2:]).all()


def test_huge_values_do_not_poison_the_reference():
    assert reference_product(row(1e300, 1.0), np.array([1e-10, 1.0])).tolist() == [1e290]
    assert reference_product(row(1e308, 1e308), np.ones(2)).tolist() == [math.inf]


def test_the_error_is_given_as_a_multiple_of_the_bound_with_its_row():
    matrix = CSR((2, 2), [0, 1, 2], [0, 1], [1.0, 1.0])
    x = np.array([1.0, 2.0])
    y = np.array([1.0, 2.0 + 32 * U64])
    worst, where = error_over_bound(y, matrix, x)
    assert where == 1
    assert worst == pytest.approx(32 * U64 / (3 * U64 * 2), rel=0.5)
    known = {"exact": reference_product(matrix, x), "bound": componentwise_bound(matrix, x)}
    assert error_over_bound(y, matrix, x, **known) == (worst, where)
    with pytest.raises(AssertionError, match=r"row 1 of .*got .*exact .*bound"):
        assert_close_to_reference(y, matrix, x)
    assert_close_to_reference(x, matrix, x)


def test_wrong_nans_and_infinities_count_as_infinite_errors():
    matrix, x = row(1.0), np.array([math.inf])
    assert error_over_bound(np.array([math.inf]), matrix, x) == (0.0, 0)
    assert error_over_bound(np.array([math.nan]), matrix, x) == (math.inf, 0)
    assert error_over_bound(np.array([math.nan]), matrix, np.ones(1)) == (math.inf, 0)
    assert error_over_bound(np.array([math.nan]), matrix, np.array([math.nan])) == (0.0, 0)


def test_an_empty_result_has_no_error():
    assert error_over_bound(np.zeros(0), CSR((0, 3), [0], [], []), np.ones(3)) == (0.0, -1)


def test_lengths_must_fit():
    with pytest.raises(InputError, match="x has shape"):
        reference_product(row(1.0), np.ones(2))
    with pytest.raises(InputError, match="y has shape"):
        error_over_bound(np.ones(2), row(1.0), np.ones(1))
