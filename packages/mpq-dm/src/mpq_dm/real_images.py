# SPDX-License-Identifier: Apache-2.0
"""Real images that generated ones are compared with, and how far real images are from each other.

A fifth of the images is held out: its distance from the rest is the floor, which nothing generated
can be expected to pass.
"""

import hashlib
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from tenfold_core.errors import ConfigError, InputError
from torch import nn

from mpq_dm.checkpoint import fingerprint
from mpq_dm.data import ImageSet, digits, mnist_small, read_images, split
from mpq_dm.evaluate import LEAST_IMAGES, Progress, distances
from mpq_dm.features import (
    Embedding,
    Extractor,
    digits_extractor,
    read_extractor,
    train_extractor,
)

__all__ = ["Reference", "read_reference"]

_NAMED = {"digits": digits, "mnist": mnist_small}


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """Real images, as features.

    Attributes:
        extractor: what made them.
        real: the part that everything is compared with.
        floor: distances of the part held out from `real`.
        held_out: number of images held out.
        equal: number of images that generated ones are compared by with the floor.
        digest: hash of the images and of the extractor's weights.
    """

    extractor: Extractor
    real: Embedding
    floor: dict[str, float]
    held_out: int
    equal: int
    digest: str


def read_reference(
    data: str,
    shape: tuple[int, ...],
    *,
    count: int,
    image_size: int | None = None,
    features: str | None = None,
    classes: Collection[int] | None = None,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Reference:
    """Read real images, split them, and embed them.

    Without `features` the shipped classifier embeds `digits`, and one trained on them all others:
    always on the CPU, so that a run that goes on has the same one.

    Args:
        data: `digits`, `mnist`, or what `mpq_dm.data.read_images` reads.
        shape: channels, height and width that the images must have, those of the samples.
        count: number of generated images; the floor is given for so many at most.
        image_size: scale the images to so many pixels.
        features: a program that maps images to features.
        classes: leave out all other classes, where images have classes.
        seed: seed of classifier and subsets.
        device: where to embed.
        progress: told about training.

    Raises:
        InputError: the images cannot be read, do not fit the samples, or are too few.
        ConfigError: an image size for images that have one.
    """
    if data in _NAMED:
        if image_size is not None:
            raise ConfigError(f"image size is {image_size}, expected none: {data} have theirs")
        images = _NAMED[data]()
    else:
        images = read_images(data, size=image_size)
    _require_fit(data, images, shape)
    train, held_out = split(images)
    compared, floored = (_only(part, classes) for part in (train, held_out))
    for name, part in (("to compare with", compared), ("held out", floored)):
        if len(part) < LEAST_IMAGES:
            raise InputError(
                f"{data}: {len(part)} images {name}, expected {LEAST_IMAGES} or more; a fifth of "
                "each class that is sampled is held out"
            )
    if features is not None:
        extractor = read_extractor(features)
    elif data == "digits":
        extractor = digits_extractor(held_out)
    else:
        extractor = train_extractor(train, held_out, seed=seed, progress=progress)
    extractor.to(device)
    real, other = (extractor.embed(part.images) for part in (compared, floored))
    equal = min(count, len(other) // 2)
    floor = distances(real.features, other.features, equal=equal, classes=floored.labels, seed=seed)
    return Reference(
        extractor=extractor,
        real=real,
        floor=floor,
        held_out=len(other),
        equal=equal,
        digest=_digest(images, extractor, classes),
    )


def _require_fit(data: str, images: ImageSet, shape: tuple[int, ...]) -> None:
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise InputError(
            f"samples have shape {shape}, expected images of 1 or 3 channels to compare with "
            f"{data}; give the folder of the whole pipeline, or leave out --data"
        )
    found = tuple(images.images.shape[1:])
    if found != shape:
        hint = "; give --image-size" if found[0] == shape[0] and data not in _NAMED else ""
        raise InputError(f"{data}: images of shape {found}, expected {shape} like samples{hint}")


def _only(data: ImageSet, classes: Collection[int] | None) -> ImageSet:
    if classes is None or len(data.names) < 2:
        return data
    wanted = np.isin(data.labels.numpy(), sorted(classes))
    return data.take(data.labels.new_tensor(np.flatnonzero(wanted)))


def _digest(images: ImageSet, extractor: Extractor, classes: Collection[int] | None) -> str:
    found = hashlib.blake2b(digest_size=16)
    for part in (images.images, images.labels):
        found.update(part.numpy().tobytes())
    if isinstance(extractor.net, nn.Module):
        found.update(fingerprint(extractor.net).encode())
    found.update(repr(None if classes is None else sorted(classes)).encode())
    return found.hexdigest()
