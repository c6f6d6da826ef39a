# SPDX-License-Identifier: Apache-2.0
"""The demonstration: one small model, every method, the same noise for all of them.

The shipped diffusion model of digits is quantized by the paper's method and its baselines at
several bits. Each packed model samples the images of the full-precision model again, from the same
noises and labels, so the headline number is paired: the mean squared difference of the final
images, with its bootstrap interval over noises.
"""

import json
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tenfold_core.run.seeds import generator
from torch import Tensor, nn

from mpq_dm.calibration import Measurement, measure, plan_layers
from mpq_dm.config import MPQDMConfig, method_config
from mpq_dm.data import digits
from mpq_dm.demo_model import ASSETS, classifier_outputs, demo_sampler, load_classifier, load_demo
from mpq_dm.images import save_grid, to_pixels
from mpq_dm.method import QuantResult, quantize
from mpq_dm.metrics import (
    bootstrap_ci,
    class_accuracy,
    frechet_distance,
    paired_difference_ci,
    paired_error,
)
from mpq_dm.packed import set_mode
from mpq_dm.ptqd import CorrectedSampler, fit_correction
from mpq_dm.sampler import Sampler, called_timesteps

__all__ = ["LADDER", "OTHERS", "SETTINGS", "Demo", "claims", "rows", "write_table"]

LADDER = (
    "rtn-minmax", "rtn-mse", "smooth-mse", "stepwise-mse",
    "efficientdm", "efficientdm-omq", "mpq-dm", "mpq-dm-exact",
)  # fmt: skip
"""From plain rounding to the whole method, and its exact allocation."""
OTHERS = ("hawq", "adaround", "ptqd", "tfmq")
"""Methods of others."""
SETTINGS: dict[tuple[int, int], tuple[str, ...]] = {
    (3, 4): ("efficientdm", "mpq-dm", "smooth-mse", "stepwise-mse"),  # the longest ones first
    (4, 8): LADDER,
    (3, 6): (*LADDER, *OTHERS),
    (2, 6): LADDER,
}
"""Bits of weights and of inputs, and the methods shown there."""

SAMPLES, STEPS = 1000, 8
GRID_COLUMNS = 12
FINE_TUNING: dict[str, Any] = {
    # 40 optimiser steps instead of the paper's 16,000, so larger ones
    "trajectories": 5, "batch_size": 64, "lora_lr": 0.02, "weight_lr": 1e-4, "act_lr": 4e-3,
    "rounding_steps": 40,
}  # fmt: skip
LONGER: dict[tuple[int, int], dict[str, Any]] = {(3, 4): {"trajectories": 20, "lora_lr": 0.008}}
"""What differs at the setting that shows what fine-tuning is worth."""
_MEASURED_BY = ("weight_bits", "act_bits", "scale_method", "smooth_alpha", "act_init", "rounding")


@dataclass
class Demo:
    """The models, noises and real images that all rows share.

    Args:
        seed: seed of calibration, fine-tuning and LoRA; the noises of evaluation have their own.
        samples: images of each model.
        fine_tuning: settings of the trained methods.
        longer: train longer at the settings of `LONGER`.
        folder: another model than the shipped one, with its scheduler, as `train_assets` writes it.
    """

    seed: int = 0
    samples: int = SAMPLES
    fine_tuning: dict[str, Any] = field(default_factory=lambda: dict(FINE_TUNING))
    longer: bool = True
    folder: Path | None = None

    def __post_init__(self) -> None:
        self.model, self.scheduler = load_demo(self.folder or ASSETS)
        self.classifier = load_classifier()
        self.evaluation = demo_sampler(
            scheduler=self.scheduler, steps=STEPS, batch_size=self.evaluation_batch,
            seed=1_000_003,
        )  # fmt: skip
        self.labels = torch.cat([
            self.evaluation.arguments(number)["class_labels"] for number in range(self._batches)
        ])  # fmt: skip
        self.real = classifier_outputs(self.classifier, digits().images)[0].numpy()
        self.exact = self._images(self.evaluation, self.model)
        self.images: dict[str, Tensor] = {"full precision": self.exact}
        self.errors: dict[tuple[int, int, str], np.ndarray] = {}
        self._measured: dict[tuple[Any, ...], Measurement] = {}

    @property
    def _batches(self) -> int:
        return -(-self.samples // self.evaluation_batch)

    @property
    def evaluation_batch(self) -> int:
        """Images sampled together for evaluation."""
        return min(250, self.samples)

    def full_precision(self) -> dict[str, Any]:
        """Return the row of the model itself."""
        return {
            "bits": "FP", "method": "full precision", "bits_per_weight": 32.0, "error": 0.0,
            "error_low": 0.0, "error_high": 0.0, **self._quality(self.exact), "seconds": 0.0,
        }  # fmt: skip

    def row(self, weight_bits: int, act_bits: int, method: str) -> dict[str, Any]:
        """Quantize, sample, compare, and return the row of the table."""
        started = time.perf_counter()
        config, sampler = self._config(weight_bits, act_bits, method)
        result = self.quantized(config, sampler)
        seconds = time.perf_counter() - started
        set_mode(result.model, "dequant")  # the fastest for layers this small, with the same codes
        evaluation: Sampler = self.evaluation
        if method == "ptqd":
            evaluation = self._corrected(result.model, sampler, config)
        images = self._images(evaluation, result.model)
        errors = paired_error(self.exact.numpy(), images.numpy())
        self.errors[weight_bits, act_bits, method] = errors
        self.images[_label(weight_bits, act_bits, method)] = images
        interval = bootstrap_ci(errors, generator(self.seed, "demo/bootstrap"))
        return {
            "bits": f"W{weight_bits}A{act_bits}", "method": method,
            "bits_per_weight": result.report.sizes["bits_per_weight"],
            "error": interval.value, "error_low": interval.low, "error_high": interval.high,
            **self._quality(images), "seconds": seconds,
            "layer_error": {
                kind: value
                for kind in ("kurtosis", "exact", "chosen")
                for value, _ in [result.report.metrics().get(
                    f"layer_error_{kind}_over_uniform", (None, ""))]
            },
            "trd_grad_ratio": next(
                (loss["grad_ratio"] for loss in result.report.losses if loss["grad_ratio"]), None
            ),
        }  # fmt: skip

    def quantized(self, config: MPQDMConfig, sampler: Sampler) -> QuantResult:
        """Quantize the model; what was measured serves all methods of the same bits and scales."""
        if config.cache_temb or config.allocation == "hawq":
            return quantize(self.model, config, sampler=sampler)
        key = tuple(getattr(config, name) for name in _MEASURED_BY)
        if key not in self._measured:
            mixed = replace(config, allocation="kurtosis") if config.act_init == "step" else config
            steps = called_timesteps(self.model, sampler)
            self._measured[key] = measure(self.model, sampler, steps, mixed)
        plans = plan_layers(self._measured[key], config)
        return quantize(self.model, config, sampler=sampler, calibration=plans)

    def _config(self, weight_bits: int, act_bits: int, method: str) -> tuple[MPQDMConfig, Sampler]:
        settings: dict[str, Any] = {
            "weight_bits": weight_bits, "act_bits": act_bits, "steps": self.evaluation.steps,
            "seed": self.seed, "calib_samples": 32, **self.fine_tuning,
        }  # fmt: skip
        if self.longer and (weight_bits, act_bits) in LONGER:
            settings |= LONGER[weight_bits, act_bits]
        trained = method_config(method, weight_bits=weight_bits).trajectories > 0
        untrained: dict[str, Any] = {} if trained else {"trajectories": 0}
        config = method_config(method, **{**settings, **untrained})
        sampler = demo_sampler(
            scheduler=self.scheduler, steps=config.steps, batch_size=config.batch_size,
            seed=self.seed,
        )  # fmt: skip
        return config, sampler

    def _corrected(self, model: nn.Module, sampler: Sampler, config: MPQDMConfig) -> Sampler:
        steps = called_timesteps(self.model, sampler)
        correction = fit_correction(self.model, model, sampler, steps, config)
        return CorrectedSampler(sampler=self.evaluation, correction=correction)

    def _images(self, sampler: Sampler, model: Any) -> Tensor:
        parts = [sampler.trajectory(model, number) for number in range(self._batches)]
        return torch.cat(parts)[: self.samples]

    def _quality(self, images: Tensor) -> dict[str, float]:
        features, logits = classifier_outputs(self.classifier, images)
        return {
            "frechet": frechet_distance(self.real, features.numpy()),
            "accuracy": class_accuracy(logits.numpy(), self.labels[: len(images)].numpy()),
        }

    def difference(self, bits: tuple[int, int], ours: str, theirs: str) -> dict[str, float]:
        """Return the mean difference of two methods' errors over the same noises, ours first."""
        found = paired_difference_ci(
            self.errors[(*bits, ours)], self.errors[(*bits, theirs)],
            generator(self.seed, "demo/bootstrap"),
        )  # fmt: skip
        return {"difference": found.value, "low": found.low, "high": found.high}

    def save_grid(self, path: Path, methods: Sequence[str]) -> None:
        """Write one row of images per model, the same noise in each column."""
        shown = {
            name: to_pixels(images[:GRID_COLUMNS])
            for name, images in self.images.items()
            if name == "full precision" or name.split(" ")[1] in methods
        }
        save_grid(path, shown, smallest=24)


def rows(
    demo: Demo,
    settings: Mapping[tuple[int, int], Sequence[str]] = SETTINGS,
    *,
    workers: int = 1,
) -> Iterator[dict[str, Any]]:
    """Yield the rows of the table, the full-precision model first.

    Args:
        demo: takes up the errors and images of all rows.
        settings: bits, and the methods shown there.
        workers: processes of one thread each. Layers this small gain little from a second thread,
            and rows do not depend on each other.
    """
    yield demo.full_precision()
    tasks = [(*bits, method) for bits, methods in settings.items() for method in methods]
    if workers == 1:
        for task in tasks:
            yield demo.row(*task)
        return
    options = {"seed": demo.seed, "samples": demo.samples, "fine_tuning": demo.fine_tuning,
               "longer": demo.longer, "folder": demo.folder}  # fmt: skip
    with ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (options,)) as pool:
        try:
            for task, found in zip(tasks, pool.map(_work, tasks), strict=True):
                row, demo.errors[task], demo.images[_label(*task)] = found
                yield row
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


_demo: Demo | None = None  # of a worker


def _start_worker(options: dict[str, Any]) -> None:
    global _demo
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops the pool
    torch.set_num_threads(1)
    _demo = Demo(**options)


def _work(task: tuple[int, int, str]) -> tuple[dict[str, Any], np.ndarray, Tensor]:
    assert _demo is not None
    row = _demo.row(*task)
    return row, _demo.errors[task], _demo.images[_label(*task)][:GRID_COLUMNS].clone()


def _label(weight_bits: int, act_bits: int, method: str) -> str:
    return f"W{weight_bits}A{act_bits} {method}"


def claims(demo: Demo, table: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what the table is to show, as numbers: ratios and paired differences."""
    errors = {(row["bits"], row["method"]): row["error"] for row in table}
    found: dict[str, Any] = {}
    for weight_bits, act_bits in {bits[:2] for bits in demo.errors}:
        name, bits = f"W{weight_bits}A{act_bits}", (weight_bits, act_bits)
        before, after = errors[name, "stepwise-mse"], errors[name, "efficientdm"]
        found[f"fine_tuning_ratio_{name}"] = before / after
        for ours in ("efficientdm-omq", "mpq-dm", "mpq-dm-exact"):
            if (*bits, ours) not in demo.errors:
                continue
            found[f"{ours}_minus_efficientdm_{name}"] = demo.difference(bits, ours, "efficientdm")
    return dict(sorted(found.items()))


def write_table(path: Path, content: Any) -> None:
    """Write rows and claims as JSON, atomically."""
    from tenfold_core.run.atomic import atomic_path
    from tenfold_core.run.rows import plain

    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(plain(content), indent=1) + "\n", encoding="utf-8")
