# SPDX-License-Identifier: Apache-2.0
"""What images are compared by: a classifier trained on the data at hand, or a program of the user.

Distances of two sets of images are those of their features. With the features of Inception-v3, as a
TorchScript or exported program, the Frechet distance is the FID.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from tenfold_core.errors import ConfigError, InputError, TenfoldWarning
from tenfold_core.run.seeds import generator, torch_generator
from torch import Tensor, nn
from torch.nn import functional

from mpq_dm.data import ImageSet
from mpq_dm.metrics import class_accuracy

__all__ = [
    "Embedding",
    "Extractor",
    "ImageClassifier",
    "digits_extractor",
    "read_extractor",
    "train_extractor",
]

LEAST_ACCURACY = 0.9
"""Below it a classifier says little about images; whoever uses one is warned."""
STEPS, BATCH_SIZE, RATE, NOISE = 800, 64, 2e-3, 0.2
WIDTHS, FEATURES, SMALLEST = (32, 64, 64), 64, 4
_SUFFIXES = (".pt", ".pt2")


@dataclass(frozen=True, slots=True)
class Embedding:
    """What an extractor makes of some images."""

    features: NDArray[np.float64]
    """One row an image."""
    logits: NDArray[np.float64] | None = None
    """Logits of the classes, if the extractor is a classifier."""

    def __len__(self) -> int:
        return len(self.features)

    @staticmethod
    def joined(parts: "list[Embedding]") -> "Embedding":
        """Return the rows of all parts, in order."""
        logits = [part.logits for part in parts if part.logits is not None]
        return Embedding(
            np.concatenate([part.features for part in parts]),
            np.concatenate(logits) if logits else None,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Extractor:
    """Maps images of -1 to 1 to features.

    Attributes:
        net: a classifier with `features` and `last`, or any callable of images.
        name: what it is, for people.
        accuracy: its accuracy on images it was not trained on, if it is a classifier.
    """

    net: Any
    name: str
    accuracy: float | None = None

    def to(self, device: str | torch.device) -> "Extractor":
        """Move the network; returns this."""
        if isinstance(self.net, nn.Module):
            self.net.to(device)
        return self

    @torch.no_grad()
    def embed(
        self, images: Float[Tensor, "images channels height width"], *, batch_size: int = 500
    ) -> Embedding:
        """Return the features of images, clipped to what a file of them would hold.

        Raises:
            InputError: the network does not take images of this shape, or returns no features.
        """
        device = _device(self.net)
        parts = [
            self._batch(part.to(device).float().clamp(-1, 1)) for part in images.split(batch_size)
        ]
        return Embedding.joined(parts)

    def _batch(self, images: Tensor) -> Embedding:
        classifier = hasattr(self.net, "last")
        try:
            found = self.net.features(images) if classifier else self.net(images)
        except Exception as error:  # whatever a program of the user raises
            raise InputError(
                f"{self.name}: {_line(error)}; expected a program of images "
                f"{tuple(images.shape)} with values -1 to 1"
            ) from error
        found = found if isinstance(found, Tensor) else found[0]
        features = found.flatten(1) if found.dim() > 1 else found
        if features.dim() != 2 or len(features) != len(images):
            raise InputError(
                f"{self.name}: output of shape {tuple(found.shape)} for {len(images)} images, "
                "expected a row of features for each"
            )
        logits = self.net.last(found).double().cpu().numpy() if classifier else None
        return Embedding(features.double().cpu().numpy(), logits)


class ImageClassifier(nn.Module):
    """Convolutions that halve the image until it is small, a layer of features, and the classes.

    Args:
        shape: channels, height and width of an image.
        classes: number of classes.
    """

    def __init__(self, shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        channels, height, width = shape
        self.convs = nn.ModuleList([nn.Conv2d(channels, WIDTHS[0], 3, padding=1)])
        for place in range(1, 1 + max(1, math.ceil(math.log2(max(height, width) / SMALLEST)))):
            before, after = (WIDTHS[min(k, len(WIDTHS) - 1)] for k in (place - 1, place))
            self.convs.append(nn.Conv2d(before, after, 3, padding=1, stride=2))
            height, width = -(-height // 2), -(-width // 2)
        last = WIDTHS[min(len(self.convs), len(WIDTHS)) - 1]
        self.penultimate = nn.Linear(last * height * width, FEATURES)
        self.last = nn.Linear(FEATURES, classes)

    def features(
        self, images: Float[Tensor, "images channels height width"]
    ) -> Float[Tensor, "images features"]:
        """Return the penultimate features, which distances are measured in."""
        x = images
        for conv in self.convs:
            x = functional.silu(conv(x))
        return functional.silu(self.penultimate(x.flatten(1)))

    def forward(
        self, images: Float[Tensor, "images channels height width"]
    ) -> Float[Tensor, "images classes"]:
        """Return the logits of the classes."""
        return self.last(self.features(images))


def train_extractor(
    train: ImageSet,
    held_out: ImageSet,
    *,
    seed: int = 0,
    steps: int = STEPS,
    progress: Callable[[str, int, int], None] | None = None,
) -> Extractor:
    """Train a classifier of the images and return it with its accuracy on the part held out.

    Args:
        train: images to train on.
        held_out: images to judge it by; a warning is given where it knows less than 90 % of them.
        seed: seed of initialisation, images and noises.
        steps: optimiser steps.
        progress: called after every step.

    Raises:
        InputError: the images are of one class only.
        ConfigError: `steps` is not positive.
    """
    if steps < 1:
        raise ConfigError(f"steps is {steps}, expected 1 or more")
    if len(train.labels.unique()) < 2:
        raise InputError(
            "data: images of one class, expected two or more to train the classifier whose "
            "features are compared; give --features, or a subfolder for each class"
        )
    _, channels, height, width = train.images.shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(generator(seed, "features/init").integers(2**31)))
        net = ImageClassifier((channels, height, width), len(train.names))
    stream = torch_generator(seed, "features/train")
    optimizer = torch.optim.AdamW(net.parameters(), RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2 * RATE, total_steps=steps + 1)
    for step in range(steps):
        rows = torch.randint(len(train), (BATCH_SIZE,), generator=stream)
        images = train.images[rows]
        noisy = images + NOISE * torch.randn(images.shape, generator=stream)
        loss = functional.cross_entropy(net(noisy), train.labels[rows], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress("steps of the classifier", step + 1, steps)
    return _judged(net.eval(), held_out, f"classifier of {len(train)} images")


def digits_extractor(held_out: ImageSet) -> Extractor:
    """Return the shipped classifier of 8x8 digits."""
    from mpq_dm.demo_model import load_classifier

    return _judged(load_classifier(), held_out, "shipped classifier of digits")


def read_extractor(path: str | Path) -> Extractor:
    """Read a program that maps images of -1 to 1 to features.

    A program is executed as it is: read only files that you trust.

    Args:
        path: TorchScript (.pt) or an exported program (.pt2), from `torch.export.save`.

    Raises:
        InputError: it is neither.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file, expected a program, .pt or .pt2")
    if path.suffix not in _SUFFIXES:
        raise InputError(
            f"{path}: suffix {path.suffix!r}, expected .pt (torch.jit.save) or .pt2 "
            "(torch.export.save)"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on how old the format is
            if path.suffix == ".pt":
                net: Any = torch.jit.load(path, map_location="cpu").eval()
            else:
                net = torch.export.load(path).module()
    except Exception as error:  # zip, unpickling and schema errors, of many kinds
        kind = "TorchScript" if path.suffix == ".pt" else "an exported program"
        raise InputError(f"{path}: not readable as {kind} ({_line(error)})") from error
    return Extractor(net=net, name=path.name)


def _judged(net: Any, held_out: ImageSet, name: str) -> Extractor:
    found = Extractor(net=net, name=name).embed(held_out.images)
    accuracy = class_accuracy(found.logits, held_out.labels.numpy())
    if accuracy < LEAST_ACCURACY:
        warnings.warn(
            f"the {name} knows {100 * accuracy:.1f} % of {len(held_out)} images held out, less "
            f"than {100 * LEAST_ACCURACY:.0f} %: distances in its features say little; give "
            "better ones with --features",
            TenfoldWarning,
            stacklevel=2,
        )
    return Extractor(net=net, name=name, accuracy=accuracy)


def _device(net: Any) -> torch.device:
    if isinstance(net, nn.Module):
        for part in net.parameters():
            return part.device
    return torch.device("cpu")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
