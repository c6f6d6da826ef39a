# SPDX-License-Identifier: Apache-2.0
"""The command `eval`: a quantized model beside the original, seed by seed, resumable.

A seed is one of noises and conditions; the quantized model stays what it is. The row of a finished
seed is on the disk, with the error of every noise, so that two evaluations can be compared noise by
noise.
"""

import json
import shutil
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tenfold_core.errors import CheckpointError, ConfigError, InputError, TenfoldWarning
from tenfold_core.run.atomic import atomic_directory, atomic_path
from tenfold_core.run.record import RunRecord
from tenfold_core.run.rows import JsonlStream, plain, read_jsonl
from tenfold_core.run.seeds import generator

from mpq_dm.checkpoint import fingerprint
from mpq_dm.conditions import read_labels
from mpq_dm.config import MPQDMConfig
from mpq_dm.evaluate import (
    LEAST_IMAGES,
    Paired,
    PairedBatch,
    Progress,
    StepError,
    bit_operations,
    distances,
    layer_costs,
    paired_evaluation,
    step_errors,
)
from mpq_dm.features import Embedding
from mpq_dm.images import is_image, save_grid, to_pixels
from mpq_dm.metrics import bootstrap_ci, class_accuracy
from mpq_dm.models import Source, open_source
from mpq_dm.quantizing import Conditioning, read_report, sampler_for
from mpq_dm.real_images import Reference, read_reference
from mpq_dm.sampler import LatentSampler, Sampler
from mpq_dm.sampling import GRID_COLUMNS, decoding, open_packed
from mpq_dm.sizes import account

__all__ = ["BETTER", "EVALUATION", "EvalConfig", "evaluate_to_folder", "summarise"]

EVALUATION = "eval.json"
ROWS, GRID, SETTINGS = "rows.jsonl", "grid.png", "settings.json"
STEP_IMAGES = 256
"""Images of a seed that the error of each sampling step is taken from."""
BETTER: dict[str, Literal["lower", "higher"]] = {
    "frechet": "lower", "frechet_equal": "lower", "frechet_infinity": "lower", "kid": "lower",
    "precision": "higher", "recall": "higher", "class_accuracy": "higher", "paired_error": "lower",
}  # fmt: skip
"""Which direction of a number is an improvement."""
_FREE = ("seeds",)  # may differ when an evaluation goes on


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalConfig:
    """What is compared, with what, and how."""

    model: str
    """The quantized model."""
    against: str
    """The original."""
    data: str | None = None
    """Real images: digits, mnist, or what `read_images` reads; None for paired errors only."""
    features: str | None = None
    """A program that maps images to features, in place of a classifier of the data."""
    image_size: int | None = None
    """Scale real images to so many pixels."""
    count: int = 5000
    """Noises of each seed."""
    seeds: int = 3
    seed: int = 0
    """The first of the seeds."""
    batch_size: int = 64
    steps: int | None = None
    """Sampling steps; by default those the model was calibrated with."""
    guidance: float | None = None
    """Scale of guidance; by default that of calibration."""
    mode: str = "int8"

    def __post_init__(self) -> None:
        least = 2 if self.data is None else LEAST_IMAGES
        for name, value in (("count", least), ("seeds", 1), ("batch_size", 1)):
            if getattr(self, name) < value:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected {value} or more")
        if self.data is None and (self.features or self.image_size):
            raise ConfigError("features and image size are those of real images; give --data")


def evaluate_to_folder(
    config: EvalConfig,
    out: Path,
    conditioning: Conditioning,
    *,
    device: str = "cpu",
    resume: bool = False,
    overwrite: bool = False,
    command: Sequence[str] = (),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Evaluate, write `eval.json`, rows, a grid and the record; return what is in the first.

    The finished seeds of an interrupted run lie in `OUT.state`, which is removed at the end.

    Raises:
        InputError: `out` exists, or models, data and features cannot be opened or do not fit.
        ConfigError: settings and conditions do not fit the models.
        CheckpointError: `resume` without a state, or with one of another run.
    """
    state = out.with_name(out.name + ".state")
    _check_places(out, state, resume=resume, overwrite=overwrite)
    source, calibrated = open_packed(config.model, config.mode)
    original = open_source(config.against)
    _require_alike(original.model, source.model)
    tuned = _tuning(config.model)
    settings = MPQDMConfig(
        steps=config.steps or calibrated, eta=0.0, batch_size=min(config.batch_size, config.count),
        guidance=tuned.get("guidance", 1.0) if config.guidance is None else config.guidance,
        seed=config.seed,
    )  # fmt: skip
    _warn_of_seen_noise(config, tuned)
    for part in (source.pipe, original.model, source.model):
        if part is not None:
            part.to(device)
    owner = source if source.pipe is not None or source.scheduler is not None else original
    sampler = decoding(sampler_for(owner, conditioning, settings))
    reference = _reference(config, conditioning, original, sampler, device, progress)
    identity = _identity(config, settings, conditioning, original, source, reference)
    _check_identity(state / SETTINGS, identity, resume=resume)
    record = RunRecord(
        state, package="mpq-dm", command=command, config=config, seed=config.seed, device=device
    )
    with record:
        rows = _rows(state, config, original, source, sampler, reference, progress)
        found = summarise(rows, reference, _costs(original, source, sampler))
        found = {"settings": plain(identity), **found}
        _write_metrics(record, found)
        with atomic_directory(out, overwrite=overwrite) as folder:
            _finish(folder, state, found, record)
    shutil.rmtree(state)
    return found


def summarise(
    rows: Sequence[Mapping[str, Any]],
    reference: Reference | None,
    size: Mapping[str, float],
) -> dict[str, Any]:
    """Sum up the rows of all seeds.

    Args:
        rows: what the seeds gave.
        reference: the real images, if there are any.
        size: bits, bytes and bit operations of both models.

    Returns:
        `paired`, with the interval over all noises and the range of the seeds; `original` and
        `quantized`, mean and range of every number by name; `real`, those of real images held out;
        `steps`, the error of each sampling step; `size`; `seeds`, what they gave.
    """
    errors = np.concatenate([np.asarray(row["errors"], np.float64) for row in rows])
    interval = bootstrap_ci(errors, generator(rows[0]["seed"], "bootstrap of all seeds"))
    found: dict[str, Any] = {
        "paired": _spread([row["paired_error"] for row in rows])
        | {"low": interval.low, "high": interval.high, "noises": len(errors)},
        "steps": _steps([row["steps"] for row in rows]),
        "size": dict(size),
        "seeds": [{k: v for k, v in row.items() if k not in ("errors", "steps")} for row in rows],
    }
    if reference is None:
        return found
    for side in ("original", "quantized"):
        found[side] = {name: _spread([row[side][name] for row in rows]) for name in rows[0][side]}
    accuracy = reference.extractor.accuracy
    found["real"] = reference.floor | ({} if accuracy is None else {"class_accuracy": accuracy})
    found["features"] = {
        "name": reference.extractor.name, "accuracy": accuracy, "images": len(reference.real),
        "held_out": reference.held_out, "equal": reference.equal,
        "width": reference.real.features.shape[1],
    }  # fmt: skip
    return found


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"mean": float(np.mean(values)), "min": float(min(values)), "max": float(max(values))}


def _steps(rows: Sequence[Sequence[Mapping[str, float]]]) -> list[dict[str, Any]]:
    """Return timestep, error over seeds and the prediction's power, call by call."""
    return [
        {
            "timestep": calls[0]["timestep"],
            "error": _spread([call["error"] for call in calls]),
            "power": float(np.mean([call["power"] for call in calls])),
        }
        for calls in zip(*rows, strict=True)
    ]


def _check_places(out: Path, state: Path, *, resume: bool, overwrite: bool) -> None:
    if out.exists() and not overwrite:
        raise InputError(f"{out}: exists already; choose another folder or give --overwrite")
    if not out.absolute().parent.is_dir():
        raise InputError(f"{out}: the folder {out.absolute().parent} does not exist")
    if state.exists() and not resume:
        raise InputError(
            f"{state}: an unfinished evaluation; give --resume to go on with it, or remove it"
        )
    if resume and not (state / SETTINGS).is_file():
        raise CheckpointError(f"{state}: no unfinished evaluation; start again without --resume")


def _require_alike(original: Any, quantized: Any) -> None:
    """Refuse an original that samples something else."""
    if type(original) is not type(quantized):
        raise InputError(
            f"the original is a {type(original).__name__}, expected a {type(quantized).__name__} "
            "like the quantized model"
        )
    for name in ("sample_size", "in_channels", "out_channels", "num_class_embeds"):
        values = [getattr(model.config, name, None) for model in (original, quantized)]
        if values[0] != values[1]:
            raise InputError(
                f"{name} of the original is {values[0]}, expected {values[1]} as of the quantized "
                "model; give the model it was made from"
            )


def _tuning(model: str) -> dict[str, Any]:
    """Return the settings a model was quantized with, where its folder has a report."""
    folder = Path(model)
    return dict(read_report(folder)["config"]) if (folder / "report.json").is_file() else {}


def _warn_of_seen_noise(config: EvalConfig, tuned: Mapping[str, Any]) -> None:
    seed = tuned.get("seed")
    if seed is not None and config.seed <= seed < config.seed + config.seeds:
        warnings.warn(
            f"seed {seed} is that of calibration and fine-tuning: its noises were seen; evaluate "
            "with other seeds",
            TenfoldWarning,
            stacklevel=3,
        )


def _reference(
    config: EvalConfig,
    conditioning: Conditioning,
    original: Source,
    sampler: Any,
    device: str,
    progress: Progress | None,
) -> Reference | None:
    if config.data is None:
        return None
    labels = None if conditioning.labels is None else set(read_labels(conditioning.labels))
    return read_reference(
        config.data, _sample_shape(sampler, original), count=config.count, classes=labels,
        image_size=config.image_size, features=config.features, seed=config.seed,
        device=device, progress=progress,
    )  # fmt: skip


def _sample_shape(sampler: Any, original: Source) -> tuple[int, ...]:
    """Return the shape of one sample; a pipeline shows it by sampling one."""
    if isinstance(sampler, LatentSampler):
        return tuple(sampler.latent_shape)
    return tuple(replace(sampler, batch_size=1).trajectory(original.model, 0).shape[1:])


def _identity(
    config: EvalConfig,
    settings: MPQDMConfig,
    conditioning: Conditioning,
    original: Source,
    source: Source,
    reference: Reference | None,
) -> dict[str, Any]:
    """Return everything that the rows depend on."""
    found = asdict(config) | {
        "steps": settings.steps,
        "guidance": settings.guidance,
        "conditions": asdict(conditioning),
        "model_hash": fingerprint(source.model),
        "original_hash": fingerprint(original.model),
        "data_hash": None if reference is None else reference.digest,
    }
    return plain(found)


def _check_identity(path: Path, identity: Mapping[str, Any], *, resume: bool) -> None:
    """Begin a state, or refuse one of another evaluation."""
    if not resume:
        path.parent.mkdir()
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(identity, indent=1) + "\n", encoding="utf-8")
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error}); remove it") from error
    for name, value in identity.items():
        if name not in _FREE and found.get(name) != value:
            raise CheckpointError(
                f"{path.parent}: {name} is {found.get(name)!r}, and {value!r} now; go on with the "
                "same settings, or remove it"
            )


def _rows(
    state: Path,
    config: EvalConfig,
    original: Source,
    source: Source,
    sampler: Any,
    reference: Reference | None,
    progress: Progress | None,
) -> list[dict[str, Any]]:
    """Return the row of every seed, those from before included."""
    path = state / ROWS
    features = None if reference is None else reference.extractor
    with JsonlStream(path, resume=True) as stream:
        done = {row["seed"]: row for row in read_jsonl(path)}
        for seed in range(config.seed, config.seed + config.seeds):
            if seed in done:
                continue
            started = time.perf_counter()
            of_seed = replace(sampler, seed=seed)
            paired = paired_evaluation(
                original.model, source.model, of_seed, config.count, seed=seed,
                features=features, progress=_named(progress, seed),
            )  # fmt: skip
            steps = _step_errors(original.model, source.model, of_seed, config.count)
            if not (state / GRID).exists() and is_image(paired.shown.original):
                _save_grid(state / GRID, paired.shown)
            row = _row(seed, paired, steps, reference)
            done[seed] = plain(row | {"seconds": round(time.perf_counter() - started, 3)})
            stream.append(done[seed])
    return [done[seed] for seed in range(config.seed, config.seed + config.seeds)]


def _row(
    seed: int, paired: Paired, steps: Sequence[StepError], reference: Reference | None
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "seed": seed,
        "noises": len(paired.errors),
        "paired_error": paired.interval.value,
        "low": paired.interval.low,
        "high": paired.interval.high,
        "steps": [asdict(step) for step in steps],
        "errors": [float(f"{error:.6g}") for error in paired.errors],
    }
    if reference is None:
        return row
    for side in ("original", "quantized"):
        part: Embedding = getattr(paired, side)
        row[side] = distances(
            reference.real.features, part.features, equal=reference.equal, seed=seed
        )
        known = 0 if part.logits is None else part.logits.shape[1]
        if paired.labels is not None and paired.labels.max() < known:
            row[side]["class_accuracy"] = class_accuracy(part.logits, paired.labels)
    return row


def _step_errors(original: Any, quantized: Any, sampler: Sampler, count: int) -> list[StepError]:
    """Return the errors of all calls, mean over some trajectories."""
    batches = ceil(min(count, STEP_IMAGES) / sampler.batch_size)
    found = [step_errors(original, quantized, sampler, number) for number in range(batches)]
    return [
        StepError(
            timestep=calls[0].timestep,
            error=float(np.mean([call.error for call in calls])),
            power=float(np.mean([call.power for call in calls])),
        )
        for calls in zip(*found, strict=True)
    ]


def _named(progress: Progress | None, seed: int) -> Progress | None:
    if progress is None:
        return None
    return lambda what, done, total: progress(f"seed {seed}, {what}", done, total)


def _save_grid(path: Path, pairs: PairedBatch) -> None:
    sides = {"original": pairs.original, "quantized": pairs.quantized}
    save_grid(path, {name: to_pixels(part[:GRID_COLUMNS]) for name, part in sides.items()})


def _costs(original: Source, source: Source, sampler: Sampler) -> dict[str, float]:
    """Return bits, bytes and bit operations of both models."""
    sizes = account(source.model)
    plain_bytes = sum(part.numel() * part.element_size() for part in original.model.parameters())
    costs = [layer_costs(part.model, sampler) for part in (original, source)]
    return {
        "bits": sizes.bits,
        "bits_per_weight": sizes.bits_per_weight,
        "bytes": sizes.accounted,
        "original_bytes": plain_bytes,
        "macs": sum(cost.macs for cost in costs[0]),
        "bops": bit_operations(costs[1]),
        "original_bops": bit_operations(costs[0]),
    }


def _write_metrics(record: RunRecord, found: Mapping[str, Any]) -> None:
    paired = found["paired"]
    record.metric("paired_error", paired["mean"], unit="1", better="lower")
    for name in ("low", "high"):
        record.metric(f"paired_error_{name}", paired[name], unit="1")
    for side in ("original", "quantized"):
        for name, spread in found.get(side, {}).items():
            record.metric(f"{side}_{name}", spread["mean"], unit="1", better=BETTER.get(name))
    for name, value in found.get("real", {}).items():
        record.metric(f"real_{name}", value, unit="1")
    units = {"bits": "bit", "bits_per_weight": "bit", "bytes": "B", "original_bytes": "B"}
    for name, value in found["size"].items():
        record.metric(name, value, unit=units.get(name, "1"))


def _finish(folder: Path, state: Path, found: Mapping[str, Any], record: RunRecord) -> None:
    """Fill the folder; the record goes where the numbers go."""
    (folder / EVALUATION).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for name in (ROWS, GRID):
        if (state / name).exists():
            shutil.copy(state / name, folder / name)
    record.folder = folder
    for path in sorted(folder.iterdir()):
        record.artefact(path)
    record.finish()
    record.folder = state
