# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from hbp_spmv import reference
from hbp_spmv.classes import OWN_CLASS
from hbp_spmv.hashing import (
    CAP,
    HASHES,
    MAX_CLASSES,
    HashParams,
    length_classes,
    quality,
    reorder,
    tune,
)
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from tenfold_core.errors import ConfigError, InputError

PARAMS = [
    HashParams(),
    HashParams(s=1, t=7),
    HashParams(s=0, t=5),
    HashParams(k0=3, s=2, t=3, u=5),
    HashParams(s=0, t=0, u=31),
    HashParams(k0=31, s=31, t=31, u=31),
]
SIZES = [1, 2, 31, 32, 33, 511, 512, 513]
WORKED = [5, 0, 1, 2, 3, 2, 0, 4]


def skewed_lengths(seed, rows):
    return np.minimum(np.random.default_rng(seed).zipf(1.5, rows) - 1, 400)


def test_home_slots_of_the_worked_example():
    # a(k) = (k >> 1) << 1: 5 -> 4, 0 -> 0, 1 -> 0, 2 -> 2, 3 -> 2, 2 -> 2, 0 -> 0, 4 -> 4;
    # the first row of an empty block always gets its home slot
    params = HashParams(s=1, t=1)
    homes = [reorder([k] + [0] * 7, "paper", params=params).tolist().index(0) for k in WORKED]
    assert homes == [4, 0, 0, 2, 2, 2, 0, 4]


def test_output_hash_of_the_worked_example():
    order = reorder(WORKED, "paper", params=HashParams(s=1, t=1))
    assert order.tolist() == [1, 2, 3, 4, 0, 5, 6, 7]


def test_the_upper_slot_wins_at_equal_distance():
    # home 2 for all: 2, then 3 (one above), 1 (one below), 4, 0
    order = reorder([2, 2, 2, 2, 2], "paper", params=HashParams(s=0, t=0))
    assert order.tolist() == [4, 2, 0, 1, 3]


def test_a_home_beyond_the_block_takes_the_highest_free_slot():
    # homes 9, 9, 3 in four slots: 3, 2, then 3 is taken and 2 as well: 1; the last row gets 0
    order = reorder([9, 9, 3, 0], "paper", params=HashParams(s=0, t=0))
    assert order.tolist() == [3, 2, 1, 0]


def test_k0_and_u_shift_the_home():
    # b = max(k - 2, 0); a = (b << 1) + 3 b = 5 b: k = 3 -> 5, k = 2 -> 0, k = 1 -> 0
    params = HashParams(k0=2, s=0, t=1, u=3)
    assert reorder([3, 2, 1, 1, 1, 1, 1], "paper", params=params).tolist() == [1, 2, 3, 4, 5, 0, 6]


@pytest.mark.parametrize("params", PARAMS, ids=str)
@pytest.mark.parametrize("rows", SIZES)
def test_paper_hash_is_a_permutation_and_equals_the_literal_search(rows, params):
    rng = np.random.default_rng(rows)
    for lengths in (rng.integers(0, 4, rows), rng.integers(0, 80, rows), np.zeros(rows, int)):
        order = reorder(lengths, "paper", params=params)
        assert_array_equal(np.sort(order), np.arange(rows))
        assert_array_equal(order, reference.place_paper(lengths, params))


def test_union_find_equals_the_literal_search_on_thousands_of_blocks():
    rng = np.random.default_rng(0)
    for _ in range(3000):
        lengths = rng.integers(0, rng.integers(1, 100), rng.integers(1, 40))
        k0, s, t, u = (int(value) for value in rng.integers(0, [9, 7, 10, 4]))
        params = HashParams(k0=k0, s=s, t=t, u=u)
        assert_array_equal(
            reorder(lengths, "paper", params=params), reference.place_paper(lengths, params)
        )


@pytest.mark.parametrize("params", [HashParams(s=0, t=31), HashParams(s=0, t=0, u=31)], ids=str)
def test_lengths_beyond_32_bits_do_not_overflow_the_hash(params):
    lengths = np.array([1 << 40, 0, 1 << 62, 3, (1 << 63) - 1])
    assert_array_equal(
        reorder(lengths, "paper", params=params), reference.place_paper(lengths, params)
    )


@given(st.lists(st.integers(0, 1000), max_size=600), st.sampled_from(HASHES))
def test_every_hash_is_a_permutation(lengths, method):
    order = reorder(lengths, method)
    assert_array_equal(np.sort(order), np.arange(len(lengths)))


@given(st.lists(st.integers(0, CAP), max_size=600))
def test_lut_with_one_class_per_length_is_a_stable_sort(lengths):
    order = reorder(lengths, "lut", classes=np.arange(CAP + 1, dtype=np.uint8))
    assert_array_equal(order, np.argsort(np.array(lengths, int), kind="stable"))


@given(st.lists(st.integers(0, OWN_CLASS), max_size=600))
def test_lut_sorts_short_rows_stably(lengths):
    assert_array_equal(reorder(lengths), np.argsort(np.array(lengths, int), kind="stable"))


@given(st.lists(st.integers(0, 5000), max_size=600))
def test_sort_is_stable(lengths):
    assert_array_equal(reorder(lengths, "sort"), np.argsort(np.array(lengths, int), kind="stable"))


def test_none_keeps_the_row_order():
    assert reorder(WORKED, "none").tolist() == list(range(8))


@given(st.lists(st.integers(0, 3000), max_size=600))
def test_classes_are_monotone_and_at_most_32(lengths):
    classes = length_classes(np.array(lengths, int)).astype(int)
    assert classes.shape == (CAP + 1,)
    assert_array_equal(classes[: OWN_CLASS + 1], np.arange(OWN_CLASS + 1))
    assert (np.diff(classes) >= 0).all()
    assert len(np.unique(classes)) <= MAX_CLASSES
    assert classes.max() < MAX_CLASSES


def test_long_classes_carry_about_the_same_work():
    lengths = np.arange(OWN_CLASS + 1, CAP + 1).repeat(20)
    classes = length_classes(lengths).astype(int)
    work = np.bincount(classes[lengths], lengths)[OWN_CLASS + 1 :]
    # a class boundary can miss its share by one length: 255 * 20 nonzeros
    assert len(work) == MAX_CLASSES - OWN_CLASS - 1
    assert np.abs(work - work.mean()).max() <= CAP * 20


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("lanes", [4, 16, 32])
def test_lut_is_never_worse_than_no_reordering_on_skewed_rows(seed, lanes):
    lengths = skewed_lengths(seed, 2048)
    maxima, deviation, groups = quality(lengths, reorder(lengths), lanes)
    plain_maxima, plain_deviation, plain_groups = quality(lengths, np.arange(2048), lanes)
    assert groups == plain_groups
    assert maxima <= plain_maxima
    assert deviation <= plain_deviation


@pytest.mark.parametrize("seed", range(8))
def test_tuned_is_at_least_as_good_as_the_paper_on_its_sample(seed):
    lengths = skewed_lengths(seed, 512)
    tuned, _, _ = quality(lengths, reorder(lengths, "tuned", lanes=32), 32)
    paper, _, _ = quality(lengths, reorder(lengths, "paper"), 32)
    assert tuned <= paper


def test_tuned_finds_parameters_that_separate_two_lengths():
    # 2 and 6 alternate: any s <= 2 tells them apart, the published s = 4 does not
    lengths = np.tile([2, 6], 256)
    chosen = tune([lengths], 32)
    maxima, _, _ = quality(lengths, reorder(lengths, "paper", params=chosen), 32)
    assert chosen.s <= 2
    assert maxima == 8 * 2 + 8 * 6


def test_tune_of_nothing_returns_parameters():
    assert isinstance(tune([], 16), HashParams)


def test_quality_by_hand():
    # groups (1, 3) and (5): maxima 3 + 5; standard deviations 1 + 0
    assert quality(np.array([3, 1, 5]), np.array([1, 0, 2]), 2) == (8, 1.0, 2)


@pytest.mark.parametrize(
    "lengths",
    [[[1, 2]], [1.5], [-1, 2], ["a"], [True, False]],
    ids=["2-D", "float", "<0", "text", "bool"],
)
@pytest.mark.parametrize("method", HASHES)
def test_bad_lengths_are_refused(lengths, method):
    with pytest.raises(InputError, match="lengths: expected a vector of non-negative integers"):
        reorder(lengths, method)


def test_unknown_methods_are_refused():
    with pytest.raises(
        ConfigError, match="expected one of lut, paper, tuned, sort, none, got 'md5'"
    ):
        reorder([1], "md5")


@pytest.mark.parametrize(
    "classes",
    [np.zeros(10, np.uint8), np.arange(CAP + 1)[::-1].astype(np.uint8), np.full(CAP + 1, 300.0)],
    ids=["short", "falling", "float"],
)
def test_a_table_that_is_not_monotone_over_all_lengths_is_refused(classes):
    with pytest.raises(InputError, match="classes: expected 256 non-decreasing"):
        reorder([1, 2, 3], classes=classes)


@pytest.mark.parametrize("lanes", [0, -1, 2.5])
def test_lanes_must_be_positive(lanes):
    with pytest.raises(ConfigError, match="lanes: expected a positive int"):
        reorder([1, 2, 3], "tuned", lanes=lanes)


@pytest.mark.parametrize("name", ["k0", "s", "t", "u"])
@pytest.mark.parametrize("value", [-1, 32, 1.0, None])
def test_hash_parameters_have_a_range(name, value):
    with pytest.raises(ConfigError, match=f"hash parameter '{name}': expected an int in 0..31"):
        HashParams(**{name: value})


def test_the_input_is_not_changed():
    lengths = np.array(WORKED)
    for method in HASHES:
        reorder(lengths, method)
    assert lengths.tolist() == WORKED
