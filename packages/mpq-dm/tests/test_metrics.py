# SPDX-License-Identifier: Apache-2.0
"""Distances with known values, intervals that cover, and input that is refused."""

import numpy as np
import pytest
import torch
from mpq_dm.metrics import (
    bootstrap_ci,
    bops,
    class_accuracy,
    frechet_at_infinity,
    frechet_distance,
    frechet_from_moments,
    inception_score,
    kernel_distance,
    paired_difference_ci,
    paired_error,
    polynomial_mmd,
    precision_recall,
)
from scipy.linalg import sqrtm
from tenfold_core.errors import ConfigError, InputError


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def covariance(size, seed, rank=None):
    root = normal(size, rank or size, seed=seed)
    return root @ root.T


def test_frechet_of_two_gaussians_by_hand():
    # (0 - 1)^2 + 1 + 4 - 2 sqrt(1 * 4) = 2
    assert frechet_from_moments([0], [[1]], [1], [[4]]) == pytest.approx(2)
    # equal means, diagonal covariances: the sum of (1 - 2)^2 and (3 - 1)^2 of the deviations
    assert frechet_from_moments([5, 5], np.diag([1, 9]), [5, 5], np.diag([4, 1])) == (
        pytest.approx(5)
    )


@pytest.mark.parametrize("rank", [None, 3])
def test_frechet_agrees_with_the_matrix_root(rank):
    a, b = covariance(6, 1), covariance(6, 2, rank)
    mean = normal(6)
    root = sqrtm(a @ b + 1e-12 * np.eye(6))
    expected = mean @ mean + np.trace(a + b - 2 * root.real)
    found = frechet_from_moments(mean, a, np.zeros(6), b)
    assert found == pytest.approx(expected, rel=1e-5)
    assert frechet_from_moments(np.zeros(6), b, mean, a) == pytest.approx(found)


def test_frechet_of_features():
    a = normal(500, 4)
    assert frechet_distance(torch.from_numpy(a), a) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(a, a + 3) == pytest.approx(4 * 9)
    # scaling by 2 moves each direction's deviation by itself: the sum of the variances
    assert frechet_distance(a - a.mean(0), 2 * (a - a.mean(0))) == pytest.approx(
        np.trace(np.cov(a.T))
    )
    turn = np.linalg.qr(normal(4, 4, seed=3))[0]
    b = normal(300, 4, seed=1) * [1, 2, 3, 4]
    assert frechet_distance(a @ turn, b @ turn) == pytest.approx(frechet_distance(a, b))


def test_features_that_never_vary_do_no_harm():
    a = np.column_stack([normal(50), np.zeros(50)])
    assert np.isfinite(frechet_distance(a, np.zeros((10, 2))))


def test_extrapolation_removes_the_bias_of_few_images():
    reference = normal(20_000, 16, seed=9)
    rng = np.random.default_rng(0)
    biased, extrapolated = [], []
    for seed in range(5):
        features = normal(400, 16, seed=seed)
        biased.append(frechet_distance(features, reference))
        extrapolated.append(frechet_at_infinity(features, reference, rng))
    # 16 directions and 400 images: about (16 + 16 * 17 / 8) / 400 = 0.12 above 0
    assert np.mean(biased) > 0.1
    assert abs(np.mean(extrapolated)) < 0.02


def test_extrapolation_needs_two_sizes():
    with pytest.raises(ConfigError, match="smaller is 10, expected 2 to 9 of 10 images"):
        frechet_at_infinity(normal(10, 2), normal(10, 2), np.random.default_rng(0), smaller=10)
    with pytest.raises(ConfigError, match="repeats is 0"):
        frechet_at_infinity(normal(10, 2), normal(10, 2), np.random.default_rng(0), repeats=0)


def test_polynomial_mmd_by_hand():
    # d = 1, k = (x y + 1)^3. a = {0, 1}: k(0, 1) = 1. b = {1, 2}: k(1, 2) = 27.
    # between: k(0, 1), k(0, 2), k(1, 1), k(1, 2) = 1, 1, 8, 27, mean 9.25
    assert polynomial_mmd([[0], [1]], [[1], [2]]) == pytest.approx(1 + 27 - 2 * 9.25)


def test_kernel_distance_is_unbiased_and_knows_its_error():
    rng = np.random.default_rng(0)
    found = [
        kernel_distance(normal(200, 8, seed=2 * i), normal(150, 8, seed=2 * i + 1), rng)
        for i in range(40)
    ]
    values = np.array([one.value for one in found])
    errors = np.array([one.standard_error for one in found])
    assert abs(values.mean()) < 3 * values.std() / 40**0.5
    assert 0.6 < errors.mean() / values.std() < 1.6
    apart = kernel_distance(normal(200, 8), normal(150, 8, seed=1) + 1, rng)
    assert apart.value > 6 * apart.standard_error


@pytest.mark.parametrize("subsets", [1, 6])
def test_kernel_distance_needs_two_images_a_subset(subsets):
    with pytest.raises(ConfigError, match=f"subsets is {subsets}, expected 2 to 5 for 10 and 20"):
        kernel_distance(normal(10, 2), normal(20, 2), np.random.default_rng(0), subsets=subsets)


def test_class_accuracy():
    logits = torch.tensor([[2.0, 1], [0, 3], [5, 4], [0, 1]])
    assert class_accuracy(logits, torch.tensor([0, 1, 1, 1])) == 0.75
    with pytest.raises(InputError, match=r"labels: found shape \(3,\), expected \(4,\)"):
        class_accuracy(logits, [0, 1, 1])
    with pytest.raises(InputError, match="labels: found 0 to 2, expected 0 to 1"):
        class_accuracy(logits, [0, 1, 2, 1])


def test_inception_score():
    assert inception_score(np.zeros((5, 7))) == pytest.approx(1)
    assert inception_score(1000 * np.eye(4)) == pytest.approx(4)  # sure, and every class occurs
    assert inception_score([[1000, 0, 0]] * 3) == pytest.approx(1)  # sure of one class only


def test_precision_and_recall():
    line = np.arange(10.0)[:, None]
    assert precision_recall(line, line, neighbours=1) == (1, 1)
    assert precision_recall(line, line + 100) == (0, 0)
    # half of the real modes: everything generated is real, half of the real is found
    both = np.concatenate([normal(100, 2), normal(100, 2, seed=1) + 50])
    precision, recall = precision_recall(both, normal(100, 2, seed=2))
    assert precision > 0.9
    assert 0.4 < recall <= 0.5
    with pytest.raises(ConfigError, match="neighbours is 10, expected 1 to 9"):
        precision_recall(line, line, neighbours=10)


def test_precision_in_chunks_is_the_same(monkeypatch):
    a, b = normal(70, 3), normal(50, 3, seed=1) * 1.5
    whole = precision_recall(a, b)
    monkeypatch.setattr("mpq_dm.metrics._CHUNK", 100)
    assert precision_recall(a, b) == whole


def test_paired_error():
    a = torch.zeros(2, 1, 2, 2)
    b = a.clone()
    b[1, 0, 0] = 2
    np.testing.assert_array_equal(paired_error(a, b), [0, 2])  # (4 + 4 + 0 + 0) / 4
    np.testing.assert_array_equal(paired_error([1.0, 2.0], [1.0, 4.0]), [0, 4])
    with pytest.raises(InputError, match=r"shapes \(2, 1, 2, 2\) and \(2, 1, 2, 1\)"):
        paired_error(a, b[..., :1])
    with pytest.raises(InputError, match="none empty"):
        paired_error(a[:0], b[:0])


def test_the_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        found = bootstrap_ci(normal(100, seed=seed), rng, level=0.8, resamples=300)
        hits += found.low <= 0 <= found.high
    assert 0.7 <= hits / 200 <= 0.9  # 0.8 +- 3.5 standard errors


def test_the_interval_of_a_constant_is_a_point(monkeypatch):
    monkeypatch.setattr("mpq_dm.metrics._CHUNK", 7)
    found = bootstrap_ci([2.0] * 5, np.random.default_rng(0), resamples=10)
    assert (found.value, found.low, found.high) == (2, 2, 2)


def test_pairing_sees_what_separate_intervals_do_not():
    rng = np.random.default_rng(0)
    shared = rng.lognormal(0, 1, (3, 300))
    a, b = shared, 1.02 * shared + 0.01
    apart = [bootstrap_ci(x.mean(axis=0), rng) for x in (a, b)]
    assert apart[0].high > apart[1].low
    paired = paired_difference_ci(a, b, rng)
    assert paired.low < paired.value < paired.high < 0
    assert paired.value == pytest.approx((a - b).mean())
    one = paired_difference_ci(a[0], b[0], rng)
    assert one.high < 0


@pytest.mark.bad_input
def test_bad_samples_for_intervals():
    rng = np.random.default_rng(0)
    with pytest.raises(InputError, match="values: 1 of 2 numbers are not finite"):
        bootstrap_ci([1, np.nan], rng)
    with pytest.raises(InputError, match=r"values: found shape \(1,\)"):
        bootstrap_ci([1.0], rng)
    with pytest.raises(InputError, match="expected one axis"):
        bootstrap_ci(np.zeros((2, 2)), rng)
    with pytest.raises(ConfigError, match="level is 95"):
        bootstrap_ci([1, 2], rng, level=95)
    with pytest.raises(ConfigError, match="resamples is 0"):
        bootstrap_ci([1, 2], rng, resamples=0)
    with pytest.raises(InputError, match=r"errors: found shapes \(2,\) and \(3,\)"):
        paired_difference_ci([1, 2], [1, 2, 3], rng)


def test_bops():
    assert bops([(1000, 2, 6), (10, 8, 8)]) == 12_640
    assert bops([]) == 0
    with pytest.raises(InputError, match="layer 1: found"):
        bops([(1, 1, 1), (1, -1, 1)])
    with pytest.raises(InputError, match="layer 0: found"):
        bops([(1, 1)])


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (np.zeros(3), np.zeros((3, 1)), r"first features: found shape \(3,\)"),
        (np.zeros((3, 2)), np.zeros((1, 2)), r"second features: found shape \(1, 2\)"),
        (np.zeros((3, 2)), np.zeros((3, 4)), "found 2 and 4 columns"),
        (np.zeros((3, 2)), np.full((3, 2), np.inf), "second features: 6 of 6 numbers"),
    ],
)
def test_bad_features(a, b, message):
    rng = np.random.default_rng(0)
    for metric in (frechet_distance, polynomial_mmd, precision_recall):
        with pytest.raises(InputError, match=message):
            metric(a, b)
    for metric in (frechet_at_infinity, kernel_distance):
        with pytest.raises(InputError, match=message):
            metric(a, b, rng)


def test_bad_moments():
    with pytest.raises(InputError, match=r"moments b: found mean \(2,\) and covariance \(1, 1\)"):
        frechet_from_moments([0], [[1]], [0, 0], [[1]])
    with pytest.raises(InputError, match="found 1 and 2 features"):
        frechet_from_moments([0], [[1]], [0, 0], np.eye(2))
    with pytest.raises(InputError, match="covariance a: 1 of 1 numbers are not finite"):
        frechet_from_moments([0], [[np.nan]], [0], [[1]])
