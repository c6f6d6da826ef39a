# SPDX-License-Identifier: Apache-2.0
"""The command `sample`: images of a quantized model, beside the original's from the same noise."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tenfold_core.errors import ConfigError, InputError
from tenfold_core.run.atomic import atomic_directory
from tenfold_core.run.checkpoint import save_tensors
from tenfold_core.run.record import RunRecord
from tenfold_core.run.seeds import generator
from torch import Tensor, nn

from mpq_dm.config import MPQDMConfig
from mpq_dm.images import grid, is_image, save_grid, save_png, to_pixels
from mpq_dm.method import Progress
from mpq_dm.metrics import bootstrap_ci, paired_error
from mpq_dm.models import Source, open_source
from mpq_dm.packed import set_mode
from mpq_dm.plugin import sampling_steps
from mpq_dm.quantizing import Conditioning, read_report, sampler_for
from mpq_dm.sampler import LatentSampler, PipelineSampler, Sampler

__all__ = ["decoding", "open_packed", "sample_to_folder", "samples_of"]

GRID_COLUMNS = 8


def open_packed(name: str, mode: str = "int8") -> tuple[Source, int]:
    """Open a quantized model; return it with the number of steps it was calibrated with.

    Raises:
        InputError: it is no quantized model, or a damaged one.
    """
    source = open_source(name, packed=True)
    try:
        context = sampling_steps(source.model)
    except ConfigError as error:
        raise InputError(f"{name}: {error}; run mpq-dm quantize first") from error
    set_mode(source.model, mode)
    return source, context.num_steps


def samples_of(
    sampler: Sampler,
    model: nn.Module,
    count: int,
    progress: Progress | None = None,
    what: str = "samples",
) -> Tensor:
    """Return `count` samples, on the CPU: those of trajectories 0, 1, ..."""
    batches = math.ceil(count / sampler.batch_size)
    found = []
    for number in range(batches):
        found.append(sampler.trajectory(model, number).float().cpu())
        if progress:
            progress(what, number + 1, batches)
    return torch.cat(found)[:count]


def sample_to_folder(
    name: str,
    out: Path,
    config: MPQDMConfig,
    conditioning: Conditioning,
    *,
    count: int,
    steps: int | None,
    guidance: float | None,
    against: str | None,
    mode: str,
    device: str = "cpu",
    overwrite: bool = False,
    command: Sequence[str] = (),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Sample, write the files, and return the numbers of the record.

    Raises:
        InputError: a model cannot be opened, or `out` exists.
        ConfigError: conditions, mode and model do not fit each other.
    """
    if out.exists() and not overwrite:
        raise InputError(f"{out}: exists already; choose another folder or give --overwrite")
    source, calibrated = open_packed(name, mode)
    config = replace(config, steps=calibrated if steps is None else steps)
    if guidance is None:
        guidance = _calibrated_guidance(Path(name))
    config = replace(config, guidance=guidance)
    sampler = decoding(sampler_for(source, conditioning, config))
    numbers: dict[str, Any] = {"count": count, "steps": config.steps}
    with atomic_directory(out, overwrite=overwrite) as folder, RunRecord(
        folder, package="mpq-dm", command=command, config=config, seed=config.seed,
        device=device,
    ) as record:  # fmt: skip
        images = samples_of(sampler, source.to(device).model, count, progress)
        rows = {"quantized": images}
        if against is not None:
            original = open_source(against)
            theirs = decoding(sampler_for(original, conditioning, config))
            model = original.model.to(device)
            exact = samples_of(theirs, model, count, progress, "samples of the original")
            rows = {"original": exact, **rows}
            error = bootstrap_ci(
                paired_error(exact.numpy(), images.numpy()),
                generator(config.seed, "bootstrap"),
            )
            numbers |= {"paired_error": error.value, "ci_low": error.low, "ci_high": error.high}
        _write(folder, rows, signed=isinstance(sampler, LatentSampler))
        for key, value in numbers.items():
            record.metric(key, value, unit="1")
    return numbers


def _calibrated_guidance(folder: Path) -> float:
    """Return the guidance that a quantized folder's report names, or 1."""
    if not (folder / "report.json").is_file():
        return 1.0
    return float(read_report(folder)["config"].get("guidance", 1.0))


def decoding(sampler: Sampler) -> Sampler:
    """Return the sampler, if it is a pipeline's, so that it decodes what it samples."""
    if isinstance(sampler, PipelineSampler) and getattr(sampler.pipe, "vae", True) is not None:
        return replace(sampler, output_type="pt")
    return sampler


def _write(folder: Path, rows: dict[str, Tensor], *, signed: bool) -> None:
    """Write single images and a grid, or safetensors where samples are no images."""
    images = rows["quantized"]
    if not is_image(images):
        save_tensors(
            folder / "samples.safetensors", {name: part.numpy() for name, part in rows.items()}
        )
        return
    for name, part in rows.items():
        pixels = to_pixels(part, signed=signed)
        for number, image in enumerate(pixels):
            suffix = "" if name == "quantized" else f"-{name}"
            save_png(folder / f"{number:05d}{suffix}.png", image)
    if len(rows) == 1:
        pixels = to_pixels(images, signed=signed)
        save_png(folder / "grid.png", grid(pixels), scale=max(1, 32 // pixels.shape[1]))
        return
    shown = {name: to_pixels(part[:GRID_COLUMNS], signed=signed) for name, part in rows.items()}
    save_grid(folder / "grid.png", shown)
