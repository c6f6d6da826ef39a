# SPDX-License-Identifier: Apache-2.0
"""The demo's models: a diffusion model of 8x8 digits, and the classifier that judges its images.

Both are shipped. `train_assets` makes them from scikit-learn's digits in a quarter of an hour on
one core; `assets/digits/train.json` is the log of the run that made the shipped ones. The diffusion
model is a plain class-conditional `UNet2DModel`, small enough for 1,000 images in two seconds.
"""

import json
import math
import platform
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from tenfold_core.errors import ConfigError
from tenfold_core.run.atomic import atomic_directory
from tenfold_core.run.checkpoint import load_tensors, save_tensors
from tenfold_core.run.seeds import generator, torch_generator
from torch import Tensor, nn
from torch.nn import functional

from mpq_dm.data import ImageSet, digits, split
from mpq_dm.metrics import class_accuracy, frechet_at_infinity, frechet_distance
from mpq_dm.models import load_model
from mpq_dm.omq import kurtosis
from mpq_dm.roles import find_layers, weight_rows
from mpq_dm.sampler import LatentSampler

__all__ = [
    "ASSETS",
    "Classifier",
    "Progress",
    "build_scheduler",
    "build_unet",
    "classifier_outputs",
    "demo_sampler",
    "load_classifier",
    "load_demo",
    "train_assets",
    "train_classifier",
    "train_demo",
]

ASSETS = Path(__file__).parent / "assets" / "digits"
"""Folder of the shipped models, in diffusers layout."""

Progress = Callable[[int, float], None]
"""Called after every step of training with the number of steps done and the loss."""

CLASSES, SIZE, TIMESTEPS = 10, 8, 1000
CHANNELS = (16, 32)
DEMO_STEPS = 10
"""Sampling steps that the demo deploys and everything is measured with."""
TRAIN_STEPS, BATCH_SIZE, LEARNING_RATE, WARMUP = 12_000, 64, 6e-3, 200
INIT_SCALE = 0.15
"""Share of the default initialisation that the weights start with. What the initialiser draws is
uniform, of kurtosis 1.8, and a short training adds little to it; from a small start the weights are
what was learned, with tails."""
FEATURES = 32
CLASSIFIER_STEPS, CLASSIFIER_RATE, CLASSIFIER_NOISE = 700, 4e-3, 0.3
JUDGED = 1000
"""Images of one of the four sets that a trained model is judged by."""


def build_unet() -> Any:
    """Return the untrained `UNet2DModel`: 8x8, ten classes, attention at 4x4."""
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=SIZE,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=CHANNELS,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=8,
        num_class_embeds=CLASSES,
    )


def build_scheduler() -> Any:
    """Return the `DDIMScheduler` of the model: cosine noise, velocity prediction.

    Velocity and trailing timesteps: sampling then starts at pure noise, where predicted noise says
    nothing about the image. After 1,150 steps of training, ten sampling steps gave Frechet distance
    0.8 and 98.9 % of samples of their class; predicted noise gave 1.1 and 97 %, and with the usual
    leading timesteps 1.5 and 96 %.
    """
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=TIMESTEPS,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=True,
    )


def demo_sampler(
    *, steps: int = DEMO_STEPS, batch_size: int = 250, seed: int = 0, scheduler: Any = None
) -> LatentSampler:
    """Return the sampler of the demo: DDIM without added noise, classes drawn evenly at random."""
    return LatentSampler(
        scheduler=scheduler or build_scheduler(),
        latent_shape=(1, SIZE, SIZE),
        steps=steps,
        batch_size=batch_size,
        seed=seed,
        labels=range(CLASSES),
    )


def train_demo(
    seed: int = 0,
    steps: int = TRAIN_STEPS,
    *,
    batch_size: int = BATCH_SIZE,
    data: ImageSet | None = None,
    progress: Progress | None = None,
) -> Any:
    """Train the diffusion model and return it with averaged weights, in evaluation mode.

    Args:
        seed: seed of initialisation, images, noises and timesteps.
        steps: optimiser steps.
        batch_size: images of a step.
        data: images to train on, the training part of the digits by default.
        progress: called after every step.

    Raises:
        ConfigError: `steps` or `batch_size` is not positive.
    """
    _require_positive(steps=steps, batch_size=batch_size)
    data = data or split(digits())[0]
    with torch.random.fork_rng(devices=[]):  # diffusers initialises from the global stream
        torch.manual_seed(int(generator(seed, "demo/init").integers(2**31)))
        unet = build_unet()
    _shrink_(unet)
    unet.train().to(memory_format=torch.channels_last)  # a tenth faster here
    # The average reaches back a tenth of the training, a thousand steps at most.
    decay = 1 - 1 / min(1000, max(1, steps // 10))
    average = torch.optim.swa_utils.AveragedModel(
        unet, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(decay)
    )
    optimizer = torch.optim.AdamW(unet.parameters(), LEARNING_RATE, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    scheduler, stream = build_scheduler(), torch_generator(seed, "demo/train")
    for step in range(steps):
        loss = _velocity_loss(unet, scheduler, data, batch_size, stream)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(unet)
        if progress is not None:
            progress(step + 1, loss.item())
    return average.module.to(memory_format=torch.contiguous_format).eval()


def load_demo(folder: Path = ASSETS) -> tuple[Any, Any]:
    """Return the diffusion model, float32 in evaluation mode, and its DDIM scheduler.

    Args:
        folder: where `train_assets` wrote them; by default the shipped ones.
    """
    from diffusers import DDIMScheduler

    return load_model(folder), DDIMScheduler.from_pretrained(folder / "scheduler")


class Classifier(nn.Module):
    """Three convolutions and a layer of features; knows noisy digits as well as clean ones."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv_2 = nn.Conv2d(16, 32, 3, padding=1, stride=2)
        self.conv_3 = nn.Conv2d(32, 32, 3, padding=1)
        self.penultimate = nn.Linear(32 * (SIZE // 2) ** 2, FEATURES)
        self.last = nn.Linear(FEATURES, CLASSES)

    def features(self, images: Float[Tensor, "images 1 8 8"]) -> Float[Tensor, "images features"]:
        """Return the penultimate features, which distances are measured in."""
        x = images
        for conv in (self.conv_1, self.conv_2, self.conv_3):
            x = functional.silu(conv(x))
        return functional.silu(self.penultimate(x.flatten(1)))

    def forward(self, images: Float[Tensor, "images 1 8 8"]) -> Float[Tensor, "images classes"]:
        """Return the logits of the ten classes."""
        return self.last(self.features(images))


def train_classifier(
    seed: int = 0, steps: int = CLASSIFIER_STEPS, *, data: ImageSet | None = None
) -> Classifier:
    """Train the classifier, in about two seconds, and return it in evaluation mode.

    Args:
        seed: seed of initialisation, images and noises.
        steps: optimiser steps.
        data: images to train on, the training part of the digits by default.

    Raises:
        ConfigError: `steps` is not positive.
    """
    _require_positive(steps=steps)
    data = data or split(digits())[0]
    stream = torch_generator(seed, "classifier/train")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(generator(seed, "classifier/init").integers(2**31)))
        model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), CLASSIFIER_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    for _ in range(steps):
        rows = torch.randint(len(data), (BATCH_SIZE,), generator=stream)
        noise = torch.randn(BATCH_SIZE, *data.images.shape[1:], generator=stream)
        logits = model(data.images[rows] + CLASSIFIER_NOISE * noise)
        loss = functional.cross_entropy(logits, data.labels[rows], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def load_classifier() -> Classifier:
    """Return the shipped classifier, float32 in evaluation mode."""
    tensors, _ = load_tensors(ASSETS / "classifier.safetensors", verify=True)
    model = Classifier()
    model.load_state_dict(
        {name: torch.from_numpy(array.astype(np.float32)) for name, array in tensors.items()}
    )
    return model.eval()


@torch.no_grad()
def classifier_outputs(
    classifier: Classifier, images: Float[Tensor, "images 1 8 8"], *, batch_size: int = 1000
) -> tuple[Float[Tensor, "images features"], Float[Tensor, "images classes"]]:
    """Return features and logits of many images, in parts that fit the caches."""
    features = torch.cat([classifier.features(part) for part in images.split(batch_size)])
    return features, classifier.last(features)


def train_assets(
    folder: str | Path, *, seed: int = 0, steps: int = TRAIN_STEPS, progress: Progress | None = None
) -> dict[str, Any]:
    """Train both models, write them with their log as `load_demo` reads them, return the log.

    Args:
        folder: where to write, in place of what is there.
        seed: seed of everything.
        steps: optimiser steps of the diffusion model.
        progress: called after every step.

    Raises:
        ConfigError: `steps` is not positive.
    """
    losses: list[float] = []

    def follow(step: int, loss: float) -> None:
        losses.append(loss)
        if progress is not None:
            progress(step, loss)

    train, held_out = split(digits())
    classifier = (
        train_classifier(seed, CLASSIFIER_STEPS, data=train).half().float()
    )  # judged as it is shipped
    started = time.perf_counter()
    unet = train_demo(seed, steps, data=train, progress=follow).half().float()
    log = {
        "seed": seed,
        "steps": steps,
        "batch_size": BATCH_SIZE,
        "learning_rate": LEARNING_RATE,
        "parameters": sum(parameter.numel() for parameter in unet.parameters()),
        "images": len(train),
        "seconds": round(time.perf_counter() - started, 1),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in ("torch", "diffusers", "scikit-learn")},
        "loss": _curve(losses),
        "kurtosis": _kurtosis(unet),
        "quality": _quality(unet, classifier, train, held_out),
    }
    with atomic_directory(folder, overwrite=True) as target:
        unet.half().save_pretrained(target / "unet")
        build_scheduler().save_pretrained(target / "scheduler")
        arrays = {name: value.half().numpy() for name, value in classifier.state_dict().items()}
        save_tensors(target / "classifier.safetensors", arrays)
        (target / "train.json").write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")
    return log


@torch.no_grad()
def _shrink_(unet: nn.Module) -> None:
    for name, parameter in unet.named_parameters():
        if parameter.ndim > 1 and not name.startswith(("time_embedding", "class_embedding")):
            parameter.mul_(INIT_SCALE)


def _rate(step: int, steps: int) -> float:
    """Return the share of the learning rate: linear warm-up, then half a cosine to a hundredth."""
    return min(1.0, (step + 1) / WARMUP) * (0.01 + 0.495 * (1 + math.cos(math.pi * step / steps)))


def _velocity_loss(
    unet: nn.Module, scheduler: Any, data: ImageSet, batch_size: int, stream: torch.Generator
) -> Tensor:
    rows = torch.randint(len(data), (batch_size,), generator=stream)
    images = data.images[rows].contiguous(memory_format=torch.channels_last)
    noise = torch.randn(images.shape, generator=stream)
    timesteps = torch.randint(TIMESTEPS, (batch_size,), generator=stream)
    noisy = scheduler.add_noise(images, noise, timesteps)
    (found,) = unet(noisy, timesteps, class_labels=data.labels[rows], return_dict=False)
    return functional.mse_loss(found, scheduler.get_velocity(images, noise, timesteps))


def _curve(losses: list[float], points: int = 50) -> list[list[int | float]]:
    """Return [step, mean loss since the point before] at about 50 points."""
    parts = np.array_split(np.array(losses), min(points, len(losses)))
    ends = np.cumsum([len(part) for part in parts])
    return [[int(end), round(float(part.mean()), 5)] for end, part in zip(ends, parts, strict=True)]


def _kurtosis(unet: nn.Module) -> dict[str, float]:
    """Return quantiles of the kurtosis of the rows that mixed precision may move."""
    rows = [
        kurtosis(weight_rows(layer.module).detach().double())
        for layer in find_layers(unet)[0]
        if layer.role == "body"
    ]
    found = torch.cat(rows)
    quantiles = {"q10": 0.1, "median": 0.5, "q90": 0.9, "q99": 0.99, "max": 1.0}
    return {name: round(found.quantile(q).item(), 3) for name, q in quantiles.items()}


def _quality(
    unet: nn.Module, classifier: Classifier, train: ImageSet, held_out: ImageSet, seed: int = 0
) -> dict[str, int | float]:
    """Return class accuracies, and Frechet distances to the training images.

    The floor is the distance of the held-out images; `frechet_like_held_out` is that of samples, as
    many and as many of each class.
    """
    sampler, sets = demo_sampler(seed=seed, batch_size=JUDGED), range(4)
    images = torch.cat([sampler.trajectory(unet, number) for number in sets])
    labels = torch.cat([sampler.arguments(number)["class_labels"] for number in sets])
    features, logits = classifier_outputs(classifier, images)
    real, _ = classifier_outputs(classifier, train.images)
    other, other_logits = classifier_outputs(classifier, held_out.images)
    rng = generator(seed, "demo/quality")
    wholes = [frechet_distance(part, real) for part in features.split(JUDGED)]
    alike = [frechet_distance(features[_like(labels, held_out, rng)], real) for _ in range(20)]
    found = {
        "sampling_steps": DEMO_STEPS,
        "class_accuracy": class_accuracy(logits, labels),
        f"frechet_{JUDGED}": float(np.mean(wholes)),
        "frechet_infinity": frechet_at_infinity(features, real, rng, smaller=JUDGED),
        "frechet_like_held_out": float(np.mean(alike)),
        "frechet_held_out": frechet_distance(other, real),
        "held_out_images": len(held_out),
        "held_out_accuracy": class_accuracy(other_logits, held_out.labels),
    }
    return {name: round(value, 4) for name, value in found.items()}


def _like(labels: Tensor, data: ImageSet, rng: np.random.Generator) -> Tensor:
    """Return rows drawn so that each class occurs as often as in `data`, where there are enough."""
    rows = [
        rng.permutation(np.flatnonzero(labels.numpy() == label))[
            : int((data.labels == label).sum())
        ]
        for label in range(CLASSES)
    ]
    return torch.from_numpy(np.concatenate(rows))


def _require_positive(**settings: int) -> None:
    for name, value in settings.items():
        if value < 1:
            raise ConfigError(f"{name} is {value}, expected 1 or more")
