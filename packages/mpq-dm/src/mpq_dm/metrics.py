# SPDX-License-Identifier: Apache-2.0
"""How far generated images are from real ones, and how sure that is; numbers only, in float64.

Distances compare two sets of features, (images, features) each: from the demo's classifier, or
Inception's, where the Frechet distance is the FID. Sets have no order; paired errors compare images
made from the same noise and so need far fewer of them.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tenfold_core.errors import ConfigError, InputError

__all__ = [
    "Interval",
    "KernelDistance",
    "bootstrap_ci",
    "bops",
    "class_accuracy",
    "frechet_at_infinity",
    "frechet_distance",
    "frechet_from_moments",
    "inception_score",
    "kernel_distance",
    "paired_difference_ci",
    "paired_error",
    "polynomial_mmd",
    "precision_recall",
]

_CHUNK = 4_000_000  # numbers held at once: 32 MB


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and the ends of its confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class KernelDistance:
    """A squared kernel distance (KID) and the standard error of that mean over subsets."""

    value: float
    standard_error: float


def frechet_distance(features_a: Any, features_b: Any) -> float:
    """Return the Frechet distance of two sets of features, each taken as a Gaussian.

    It is biased upwards by about c / N for N images: compare sets of equal size only, or use
    `frechet_at_infinity`.

    Raises:
        InputError: the sets are no finite matrices of equal width with two rows or more.

    Example:
        >>> frechet_distance([[-1.0], [1.0]], [[2.0], [4.0]])
        9.0
    """
    a, b = _pair(features_a, features_b, least=2)
    return frechet_from_moments(*_moments(a), *_moments(b))


def frechet_from_moments(mean_a: Any, cov_a: Any, mean_b: Any, cov_b: Any) -> float:
    """Return ``|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))``.

    The trace of the root is that of ``(C_a^(1/2) C_b C_a^(1/2))^(1/2)``, which is symmetric: two
    eigenvalue problems, no complex numbers, and singular covariances do no harm.

    Raises:
        InputError: shapes do not fit, or a number is not finite.

    Example:
        >>> frechet_from_moments([0.0], [[1.0]], [1.0], [[4.0]])
        2.0
    """
    mean_a, cov_a = _gaussian(mean_a, cov_a, "a")
    mean_b, cov_b = _gaussian(mean_b, cov_b, "b")
    if len(mean_a) != len(mean_b):
        raise InputError(f"means: found {len(mean_a)} and {len(mean_b)} features, expected equal")
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    product = np.linalg.eigvalsh(root @ cov_b @ root)
    shift = mean_a - mean_b
    spread = np.trace(cov_a) + np.trace(cov_b) - 2 * np.sqrt(product.clip(0)).sum()
    return float(shift @ shift + max(spread, 0.0))


def frechet_at_infinity(
    features: Any,
    reference: Any,
    generator: np.random.Generator,
    *,
    smaller: int | None = None,
    repeats: int = 8,
) -> float:
    """Return the Frechet distance extrapolated to infinitely many generated images.

    With FD(N) = FD_inf + c / N, the distances at two N give FD_inf. The bias by the reference's own
    size stays; it is the same for everything compared with that reference.

    Args:
        features: features of generated images, the larger N.
        reference: features of real images.
        generator: draws the subsets of the smaller N.
        smaller: the smaller N, half of the images by default.
        repeats: subsets of the smaller N whose distances are averaged.

    Raises:
        ConfigError: the smaller N or `repeats` is out of range.
        InputError: as `frechet_distance`.
    """
    features, reference = _pair(features, reference, least=2)
    count = len(features)
    smaller = count // 2 if smaller is None else smaller
    if not 2 <= smaller < count:
        raise ConfigError(f"smaller is {smaller}, expected 2 to {count - 1} of {count} images")
    if repeats < 1:
        raise ConfigError(f"repeats is {repeats}, expected 1 or more")
    target = _moments(reference)
    parts = [
        frechet_from_moments(*_moments(features[generator.permutation(count)[:smaller]]), *target)
        for _ in range(repeats)
    ]
    whole = frechet_from_moments(*_moments(features), *target)
    return float((count * whole - smaller * np.mean(parts)) / (count - smaller))


def polynomial_mmd(features_a: Any, features_b: Any) -> float:
    """Return the unbiased squared MMD with the kernel ``(x . y / d + 1)^3``; it may be negative.

    Raises:
        InputError: as `frechet_distance`.
    """
    a, b = _pair(features_a, features_b, least=2)
    within = 0.0
    for x in (a, b):
        kernel = _cubic(x, x)
        within += (kernel.sum() - np.trace(kernel)) / (len(x) * (len(x) - 1))
    return float(within - 2 * _cubic(a, b).mean())


def kernel_distance(
    features_a: Any, features_b: Any, generator: np.random.Generator, *, subsets: int = 10
) -> KernelDistance:
    """Return the kernel distance (KID) as a mean over subsets, and its standard error.

    Both sets are shuffled and cut into disjoint subsets, so that the estimates are independent and
    the standard error is that of the value returned.

    Args:
        features_a: one set of features.
        features_b: the other.
        generator: shuffles the sets.
        subsets: number of subsets, 2 or more.

    Raises:
        ConfigError: a subset would have fewer than two images.
        InputError: as `frechet_distance`.
    """
    a, b = _pair(features_a, features_b, least=2)
    most = min(len(a), len(b)) // 2
    if not 2 <= subsets <= most:
        raise ConfigError(
            f"subsets is {subsets}, expected 2 to {most} for {len(a)} and {len(b)} images"
        )
    parts = (np.array_split(generator.permutation(len(x)), subsets) for x in (a, b))
    values = [polynomial_mmd(a[rows], b[columns]) for rows, columns in zip(*parts, strict=True)]
    return KernelDistance(float(np.mean(values)), float(np.std(values, ddof=1) / subsets**0.5))


def class_accuracy(logits: Any, labels: Any) -> float:
    """Return the share of images whose largest logit is that of their label.

    Raises:
        InputError: shapes do not fit, a logit is not finite, or a label is no class.
    """
    logits = _matrix(logits, "logits", least=1)
    labels = np.asarray(labels)
    if labels.shape != logits.shape[:1]:
        raise InputError(f"labels: found shape {labels.shape}, expected ({len(logits)},)")
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise InputError(
            f"labels: found {labels.min()} to {labels.max()}, expected 0 to {logits.shape[1] - 1}"
        )
    return float((logits.argmax(axis=1) == labels).mean())


def inception_score(logits: Any) -> float:
    """Return ``exp(mean KL(p(y|x) || p(y)))``: 1 for one class only, at most the number of classes.

    Raises:
        InputError: `logits` is no finite matrix.
    """
    logits = _matrix(logits, "logits", least=1)
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    p = np.exp(log_p)
    marginal = p.mean(axis=0)
    # A class that never occurs has p = 0 everywhere and adds nothing.
    log_marginal = np.log(np.maximum(marginal, 1e-300))
    return float(np.exp((p * (log_p - log_marginal)).sum(axis=1).mean()))


def precision_recall(real: Any, generated: Any, *, neighbours: int = 3) -> tuple[float, float]:
    """Return precision and recall by nearest-neighbour manifolds (Kynkaanniemi et al., 2019).

    A manifold is the union of balls around the images of a set, each as wide as the distance to its
    k-th nearest neighbour. Precision is the share of generated images in the manifold of the real
    ones, recall the share of real images in that of the generated ones.

    Args:
        real: features of real images.
        generated: features of generated images.
        neighbours: k.

    Raises:
        ConfigError: there are not more than k images in a set.
        InputError: as `frechet_distance`.
    """
    real, generated = _pair(real, generated, least=2)
    least = min(len(real), len(generated))
    if not 1 <= neighbours < least:
        raise ConfigError(f"neighbours is {neighbours}, expected 1 to {least - 1} of {least}")
    return _covered(generated, real, neighbours), _covered(real, generated, neighbours)


def paired_error(a: Any, b: Any) -> NDArray[np.float64]:
    """Return the mean squared difference of each pair of samples, over all axes but the first.

    Raises:
        InputError: shapes differ, or there is nothing to compare.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
        raise InputError(f"samples: found shapes {a.shape} and {b.shape}, expected equal ones")
    if a.ndim < 1 or not a.size:
        raise InputError(f"samples: found shape {a.shape}, expected (samples, ...), none empty")
    return np.square(a - b).reshape(len(a), -1).mean(axis=1)


def bootstrap_ci(
    values: Any, generator: np.random.Generator, *, level: float = 0.95, resamples: int = 2000
) -> Interval:
    """Return the mean of values and its percentile bootstrap interval.

    Raises:
        ConfigError: `level` or `resamples` is out of range.
        InputError: there are fewer than two values, or one is not finite.
    """
    values = _values(values, "values")
    if values.ndim != 1:
        raise InputError(f"values: found shape {values.shape}, expected one axis")
    if not 0 < level < 1:
        raise ConfigError(f"level is {level}, expected a number between 0 and 1")
    if resamples < 1:
        raise ConfigError(f"resamples is {resamples}, expected 1 or more")
    means = np.concatenate(list(_resampled_means(values, generator, resamples)))
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(values.mean()), float(low), float(high))


def paired_difference_ci(
    errors_a: Any,
    errors_b: Any,
    generator: np.random.Generator,
    *,
    level: float = 0.95,
    resamples: int = 2000,
) -> Interval:
    """Return the mean of ``a - b`` over noises and its bootstrap interval; below 0, a is better.

    Noises are what is resampled; both methods keep the same ones, which removes the spread that
    they share. With several training seeds, (seeds, noises), a noise's difference is the mean over
    seeds: the interval then holds for these seeds, not for others.

    Raises:
        ConfigError: `level` or `resamples` is out of range.
        InputError: shapes differ, or a number is not finite.
    """
    a, b = _values(errors_a, "errors_a"), _values(errors_b, "errors_b")
    if a.shape != b.shape or a.ndim > 2:
        raise InputError(
            f"errors: found shapes {a.shape} and {b.shape}, expected equal ones, (noises,) or "
            "(seeds, noises)"
        )
    difference = np.atleast_2d(a - b).mean(axis=0)
    return bootstrap_ci(difference, generator, level=level, resamples=resamples)


def bops(layers: Iterable[Sequence[int | float]]) -> float:
    """Return the bit operations of layers: multiplications times weight bits times input bits.

    Args:
        layers: (macs, weight_bits, act_bits) of each layer; mixed rows count by their average.

    Raises:
        InputError: a number is negative or not finite.

    Example:
        >>> bops([(1000, 2, 6), (10, 8, 8)])
        12640.0
    """
    total = 0.0
    for number, row in enumerate(layers):
        if len(row) != 3 or not all(np.isfinite(value) and value >= 0 for value in row):
            raise InputError(
                f"layer {number}: found {tuple(row)}, expected (macs, weight_bits, act_bits), none "
                "negative"
            )
        macs, weight_bits, act_bits = row
        total += float(macs) * float(weight_bits) * float(act_bits)
    return total


def _values(values: Any, name: str) -> NDArray[np.float64]:
    values = np.asarray(values, np.float64)
    if values.ndim < 1 or values.shape[-1] < 2:
        raise InputError(f"{name}: found shape {values.shape}, expected two values or more")
    _finite(values, name)
    return values


def _finite(values: NDArray[np.float64], name: str) -> None:
    if not np.isfinite(values).all():
        count = int((~np.isfinite(values)).sum())
        raise InputError(f"{name}: {count} of {values.size} numbers are not finite")


def _matrix(values: Any, name: str, *, least: int) -> NDArray[np.float64]:
    values = np.asarray(values, np.float64)
    if values.ndim != 2 or len(values) < least or not values.shape[1]:
        raise InputError(
            f"{name}: found shape {values.shape}, expected two axes, at least {least} rows and a "
            "column"
        )
    _finite(values, name)
    return values


def _pair(a: Any, b: Any, *, least: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    a, b = _matrix(a, "first features", least=least), _matrix(b, "second features", least=least)
    if a.shape[1] != b.shape[1]:
        raise InputError(
            f"features: found {a.shape[1]} and {b.shape[1]} columns, expected the same extractor"
        )
    return a, b


def _gaussian(mean: Any, cov: Any, name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    mean, cov = np.asarray(mean, np.float64), np.asarray(cov, np.float64)
    if mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
        raise InputError(
            f"moments {name}: found mean {mean.shape} and covariance {cov.shape}, expected (d,) "
            "and (d, d)"
        )
    _finite(mean, f"mean {name}")
    _finite(cov, f"covariance {name}")
    return mean, cov


def _moments(features: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return mean and covariance, the latter over N - 1 as in every published FID."""
    mean = features.mean(axis=0)
    centred = features - mean
    return mean, centred.T @ centred / (len(features) - 1)


def _cubic(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    return (a @ b.T / a.shape[1] + 1) ** 3


def _distances(
    a: NDArray[np.float64], b: NDArray[np.float64]
) -> Iterator[tuple[slice, NDArray[np.float64]]]:
    """Yield distances of some rows of `a` to all of `b`, exact even where points coincide."""
    from scipy.spatial.distance import cdist

    step = max(1, _CHUNK // len(b))
    for start in range(0, len(a), step):
        rows = slice(start, start + step)
        yield rows, cdist(a[rows], b)


def _covered(points: NDArray[np.float64], manifold: NDArray[np.float64], neighbours: int) -> float:
    radius = np.empty(len(manifold))
    for rows, distance in _distances(manifold, manifold):
        # place 0 is the point itself
        radius[rows] = np.partition(distance, neighbours, axis=1)[:, neighbours]
    inside = [(distance <= radius).any(axis=1) for _, distance in _distances(points, manifold)]
    return float(np.concatenate(inside).mean())


def _resampled_means(
    values: NDArray[np.float64], generator: np.random.Generator, resamples: int
) -> Iterator[NDArray[np.float64]]:
    step = max(1, _CHUNK // len(values))
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        yield values[generator.integers(len(values), size=(count, len(values)))].mean(axis=1)
