# SPDX-License-Identifier: Apache-2.0
"""How good a quantized model is: numbers only, from models, samplers and images.

The headline is paired: both models sample from the same noise and conditions, and the squared
difference of the two images needs no real data and few noises. Distances to real images follow,
beside the distance of real images to one another, of as many images; both are biased by about c / N
for N images, so they are given extrapolated as well.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from tenfold_core.errors import ConfigError, InputError
from tenfold_core.run.seeds import generator
from torch import Tensor, nn

from mpq_dm.features import Embedding, Extractor
from mpq_dm.metrics import (
    Interval,
    bootstrap_ci,
    bops,
    class_accuracy,
    frechet_distance,
    kernel_distance,
    paired_error,
    precision_recall,
)
from mpq_dm.operators import CONVOLUTIONS, LINEAR, TRANSPOSED, is_transposed
from mpq_dm.packed import PackedLayer
from mpq_dm.sampler import LatentSampler, Sampler, first_tensor, following

__all__ = [
    "LEAST_IMAGES",
    "LayerCost",
    "Paired",
    "PairedBatch",
    "StepError",
    "bit_operations",
    "distances",
    "feature_metrics",
    "images_of",
    "labels_of",
    "layer_costs",
    "noise_errors",
    "paired_batches",
    "paired_evaluation",
    "step_errors",
]

LEAST_IMAGES = 8
"""Fewer images give no distance with an error."""
MOST_IN_MANIFOLD = 5000
"""Images of a set that precision and recall are taken from; their cost grows with the square."""
REPEATS = 8
"""Draws of fewer images whose distances are averaged."""
SUBSETS = 10
"""Disjoint subsets that the kernel distance and its error come from."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class PairedBatch:
    """Samples of two models from the same noise, of -1 to 1 if they are images, on the CPU."""

    original: Float[Tensor, "batch ..."]
    quantized: Float[Tensor, "batch ..."]
    labels: Int[Tensor, " batch"] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Paired:
    """Two models compared on the same noises.

    Attributes:
        errors: mean squared difference of the two samples of each noise.
        interval: their mean, and its bootstrap interval over noises.
        labels: classes of the samples, if they have any.
        original: features of the original model's samples, if asked for.
        quantized: those of the quantized model's.
        shown: the first batch of samples, to look at.
    """

    errors: NDArray[np.float64]
    interval: Interval
    labels: NDArray[np.int64] | None
    original: Embedding | None
    quantized: Embedding | None
    shown: PairedBatch


@dataclass(frozen=True, slots=True)
class StepError:
    """The quantized model's error at one call of the original's trajectory."""

    timestep: float
    error: float
    """Mean squared difference of the two guided predictions."""
    power: float
    """Mean square of the original's prediction."""


@dataclass(frozen=True, slots=True)
class LayerCost:
    """What one layer multiplies for one image, over all sampling steps."""

    layer: str
    macs: float
    weight_bits: float
    act_bits: float


def paired_batches(
    teacher: nn.Module, student: nn.Module, sampler: Sampler, count: int
) -> Iterator[PairedBatch]:
    """Yield samples of both models from the same noises: trajectories 0, 1, ... of the sampler.

    Raises:
        ConfigError: `count` is not positive.
    """
    if count < 1:
        raise ConfigError(f"count is {count}, expected 1 or more")
    for number in range(math.ceil(count / sampler.batch_size)):
        left = count - number * sampler.batch_size
        pair = [
            images_of(sampler, sampler.trajectory(model, number))[:left]
            for model in (teacher, student)
        ]
        labels = labels_of(sampler, number)
        yield PairedBatch(pair[0], pair[1], None if labels is None else labels[:left])


def paired_evaluation(
    teacher: nn.Module,
    student: nn.Module,
    sampler: Sampler,
    count: int,
    *,
    features: Extractor | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Paired:
    """Sample both models from the same noises and compare the samples pair by pair.

    Args:
        teacher: the full-precision model.
        student: the quantized model.
        sampler: gives noises and conditions; its eta must be 0, or noise is added to both.
        count: number of noises.
        features: embeds the samples, batch by batch; samples themselves are not kept.
        seed: seed of the bootstrap.
        progress: called after every batch.

    Raises:
        ConfigError: `count` is less than two.
        InputError: a sample is not finite, or has another shape than the features take.
    """
    if count < 2:
        raise ConfigError(f"count is {count}, expected 2 or more")
    batches = math.ceil(count / sampler.batch_size)
    errors: list[NDArray[np.float64]] = []
    labels: list[Tensor] = []
    embedded: tuple[list[Embedding], list[Embedding]] = ([], [])
    shown: PairedBatch | None = None
    for number, batch in enumerate(paired_batches(teacher, student, sampler, count), start=1):
        shown = shown or batch
        errors.append(paired_error(batch.original.numpy(), batch.quantized.numpy()))
        if batch.labels is not None:
            labels.append(batch.labels)
        if features is not None:
            for parts, images in zip(embedded, (batch.original, batch.quantized), strict=True):
                parts.append(features.embed(images))
        if progress is not None:
            progress("batches of paired samples", number, batches)
    assert shown is not None
    found = np.concatenate(errors)
    original, quantized = (Embedding.joined(parts) if parts else None for parts in embedded)
    return Paired(
        errors=found,
        interval=bootstrap_ci(found, generator(seed, "bootstrap")),
        labels=torch.cat(labels).numpy() if labels else None,
        original=original,
        quantized=quantized,
        shown=shown,
    )


def images_of(sampler: Sampler, samples: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
    """Return a sampler's samples on the CPU; what a pipeline decoded to 0 to 1 becomes -1 to 1."""
    found = samples.detach().float().cpu()
    decoded = not isinstance(sampler, LatentSampler) and (
        getattr(sampler, "output_type", "latent") != "latent"
    )
    return found.mul(2).sub(1) if decoded else found


def labels_of(sampler: Any, number: int) -> Int[Tensor, " batch"] | None:
    """Return the classes that the samples of a trajectory are conditioned on, if any."""
    arguments = sampler.arguments(number) if hasattr(sampler, "arguments") else {}
    found = arguments.get("class_labels")
    if found is None:
        return None
    return torch.as_tensor(found).cpu()[-sampler.batch_size :]  # after the unconditional half


def step_errors(
    teacher: nn.Module, student: nn.Module, sampler: Sampler, number: int
) -> list[StepError]:
    """Return the error of the guided prediction at every call of one trajectory of the teacher.

    The teacher samples; the student is called with the same arguments, so its errors do not add up.
    """
    found: list[StepError] = []

    def on_call(call: inspect.BoundArguments, output: Any) -> None:
        sample = call.args[0]
        exact = sampler.guide(first_tensor(output), sample).double()
        guess = sampler.guide(first_tensor(student(*call.args, **call.kwargs)), sample).double()
        found.append(
            StepError(
                timestep=float(torch.as_tensor(call.arguments["timestep"]).reshape(-1)[0]),
                error=float((guess - exact).square().mean()),
                power=float(exact.square().mean()),
            )
        )

    with torch.no_grad(), following(teacher, on_call):
        sampler.trajectory(teacher, number)
    return found


def noise_errors(
    teacher: nn.Module, student: nn.Module, sampler: Sampler, number: int
) -> list[float]:
    """Return the mean squared error of the prediction at every call of a teacher's trajectory."""
    return [step.error for step in step_errors(teacher, student, sampler, number)]


def distances(
    real: NDArray[np.float64],
    other: NDArray[np.float64],
    *,
    equal: int | None = None,
    classes: Int[Tensor, " other"] | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Return the distances of a set of features from those of real images.

    Args:
        real: features of the real images of reference.
        other: features of generated images, or of other real ones for the floor.
        equal: sets are also compared by so many images of `other`, by default half of them:
            distances of sets of different sizes cannot be compared.
        classes: classes of `other`, if it has a fixed share of each: subsets are then drawn as if
            each image had been drawn alone, or they would look closer than generated images can.
        seed: seed of all subsets.

    Returns:
        `frechet` of all images and `frechet_equal` of `equal`, `frechet_infinity` extrapolated,
        `kid` with `kid_error`, its standard error, `precision` and `recall`.

    Raises:
        InputError: a set has less than eight images, or its features are not finite.
        ConfigError: `equal` is out of range.
    """
    for name, features in (("real", real), ("other", other)):
        if len(features) < LEAST_IMAGES:
            raise InputError(f"{name}: {len(features)} images, expected {LEAST_IMAGES} or more")
    half = len(other) // 2
    equal = half if equal is None else equal
    if not 2 <= equal <= len(other):
        raise ConfigError(f"equal is {equal}, expected 2 to {len(other)} of {len(other)} images")
    rng = generator(seed, "distances")

    def drawn(count: int) -> float:
        """Return the mean distance of draws of some images."""
        draws = (_draw(classes, len(other), count, rng) for _ in range(REPEATS))
        return float(np.mean([frechet_distance(other[rows], real) for rows in draws]))

    whole = frechet_distance(other, real)
    # FD(N) = FD + c / N, at two N
    large, far = (len(other), whole) if classes is None else (half, drawn(half))
    small = large // 2
    subsets = min(SUBSETS, min(len(real), len(other)) // 2)
    kid = kernel_distance(other, real, rng, subsets=subsets)
    few = [x[rng.permutation(len(x))[:MOST_IN_MANIFOLD]] for x in (real, other)]
    precision, recall = precision_recall(few[0], few[1])
    return {
        "frechet": whole,
        "frechet_equal": drawn(equal),
        "frechet_infinity": (large * far - small * drawn(small)) / (large - small),
        "kid": kid.value,
        "kid_error": kid.standard_error,
        "precision": precision,
        "recall": recall,
    }


def _draw(
    classes: Int[Tensor, " images"] | None, images: int, count: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Draw some rows of a set, their classes as if each had been drawn alone."""
    order = rng.permutation(images)
    if classes is None:
        return order[:count]
    labels = classes.numpy()
    names, sizes = np.unique(labels, return_counts=True)
    counts = np.minimum(rng.multinomial(count, sizes / images), sizes)
    parts = [order[labels[order] == name][:few] for name, few in zip(names, counts, strict=True)]
    taken = np.concatenate(parts)
    rest = order[~np.isin(order, taken)]  # where a class had not enough
    return np.concatenate((taken, rest[: count - len(taken)]))


def feature_metrics(
    real: Float[Tensor, "real channels height width"],
    real_labels: Int[Tensor, " real"] | None,
    fake: Float[Tensor, "fake channels height width"],
    fake_labels: Int[Tensor, " fake"] | None,
    features: Extractor,
    *,
    seed: int = 0,
) -> dict[str, float]:
    """Return distances of generated images from real ones, and how often classes are recognised.

    Args:
        real: real images, -1 to 1.
        real_labels: their classes; with them `real_accuracy` is returned.
        fake: generated images, -1 to 1.
        fake_labels: the classes they should be of; with them `class_accuracy` is returned.
        features: embeds the images; accuracies need a classifier.
        seed: seed of all subsets.

    Raises:
        InputError: as `distances`, or shapes or labels do not fit the features.
    """
    found = [features.embed(images) for images in (real, fake)]
    result = distances(found[0].features, found[1].features, seed=seed)
    for name, part, labels in (
        ("real_accuracy", found[0], real_labels),
        ("class_accuracy", found[1], fake_labels),
    ):
        if labels is not None and part.logits is not None:
            result[name] = class_accuracy(part.logits, labels.numpy())
    return result


def layer_costs(model: nn.Module, sampler: Any) -> list[LayerCost]:
    """Return what every linear layer and convolution multiplies for one image, and at what widths.

    Measured by hooks along a trajectory of one image, both halves of guidance included. A layer
    that is not packed counts as 32 x 32 bits. Products of attention are not layers and not counted,
    nor is what a table of the timestep's embedding replaces.

    Args:
        model: the original or the quantized model.
        sampler: one of this package's samplers.
    """
    macs: dict[str, float] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, (PackedLayer, *LINEAR, *CONVOLUTIONS, *TRANSPOSED)):
            handles.append(module.register_forward_hook(_counter(name, module, macs)))
    try:
        sampler = replace(sampler, batch_size=1)
        sampler.trajectory(model, 0)
    finally:
        for handle in handles:
            handle.remove()
    layers = dict(model.named_modules())
    return [LayerCost(name, count, *_widths(layers[name])) for name, count in macs.items()]


def bit_operations(costs: Sequence[LayerCost]) -> float:
    """Return the bit operations (BOPs) of an image: multiplications times both widths."""
    return bops((cost.macs, cost.weight_bits, cost.act_bits) for cost in costs)


def _counter(name: str, module: nn.Module, macs: dict[str, float]) -> Callable[..., None]:
    packed = isinstance(module, PackedLayer)
    operator: Any = module.operator if packed else module
    weights = prod(module.shape) if packed else operator.weight.numel()
    channels = -1 if isinstance(operator, LINEAR) else 1

    def count(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        # every weight meets every position of the output; transposed, of the input
        places = args[0] if is_transposed(operator) else output
        macs[name] = macs.get(name, 0.0) + places.numel() / places.shape[channels] * weights

    return count


def _widths(module: nn.Module) -> tuple[float, float]:
    if not isinstance(module, PackedLayer):
        return 32.0, 32.0
    rows = sum(count for _, count in module.entry.groups)
    bits = sum(width * count for width, count in module.entry.groups) / rows
    return bits, float(module.entry.act_bits)
