# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: T201  (stdout carries the result)
"""Verbs that show what a quantization did: `eval`, `report`, `size` and `info`.

Nothing heavy is imported until one of them runs.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from tenfold_core.errors import InputError, TenfoldError
from tenfold_core.run.cli import Positional, option

from mpq_dm.cli_options import (
    NO_CONDITIONS,
    Conditions,
    Count,
    Device,
    Folder,
    Json,
    Mode,
    Model,
    Quiet,
    progress_line,
    say,
)

__all__ = ["evaluate", "info", "report", "size"]

Data = Annotated[str | None, option(metavar="digits|mnist|PATH")]
File = Annotated[Path | None, option("-o", metavar="FILE")]
Program = Annotated[Path | None, option(metavar="FILE")]


def evaluate(
    model: Positional[Model],
    *,
    against: Model,
    out: Folder,
    data: Data = None,
    count: Count = 5000,
    seeds: int = 3,
    seed: int = 0,
    features: Program = None,
    image_size: int | None = None,
    batch_size: int = 64,
    steps: int | None = None,
    guidance: float | None = None,
    conditions: Conditions = NO_CONDITIONS,
    mode: Mode = "int8",
    device: Device = "auto",
    resume: bool = False,
    overwrite: bool = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure a quantized model beside the original, from the same noises and to real images.

    Args:
        model: folder of a quantized pipeline or denoiser.
        against: the original: a folder or a hub id.
        out: folder for the numbers, the rows of all seeds and a grid of pairs.
        data: real images: digits, mnist, a parquet file or folder, .npz, a folder of images.
        count: noises of each seed.
        seeds: seeds of noises and conditions; the model stays what it is.
        seed: the first seed.
        features: program from images of -1 to 1 to features, .pt (TorchScript) or .pt2 (exported),
            in place of a classifier of the data; that of Inception makes the distance the FID.
        image_size: scale real images to so many pixels.
        batch_size: images sampled together.
        steps: sampling steps; by default those the model was calibrated with.
        guidance: scale of classifier-free guidance; by default that of calibration.
        conditions: labels, prompts or embeddings to sample with.
        mode: int8, packed or dequant.
        device: where to compute.
        resume: go on with the finished seeds in OUT.state.
        overwrite: replace an older folder.
        as_json: print one line of JSON instead of a table.
        quiet: no progress on stderr.
    """
    from tenfold_core.device import resolve

    from mpq_dm.evaluating import EvalConfig, evaluate_to_folder

    config = EvalConfig(
        model=model, against=against, data=data, image_size=image_size, count=count, seeds=seeds,
        features=None if features is None else str(features), seed=seed, batch_size=batch_size,
        steps=steps, guidance=guidance, mode=mode,
    )  # fmt: skip
    found = evaluate_to_folder(
        config, out, conditions.read(), device=str(resolve(device, via="torch")), resume=resume,
        overwrite=overwrite, command=["mpq-dm", *sys.argv[1:]],
        progress=None if quiet else progress_line(),
    )  # fmt: skip
    if as_json:
        print(json.dumps({key: value for key, value in found.items() if key != "settings"}))
        return
    from mpq_dm.report import evaluation_lines

    print("\n".join(evaluation_lines(found)))
    say(f"written: {out}", quiet)


def report(
    model: Positional[Path],
    *,
    out: File = None,
    html: bool = False,
    evaluation: Annotated[Path | None, option("--eval", metavar="DIR")] = None,
    quiet: Quiet = False,
) -> None:
    """Write what a quantization did as Markdown with figures, or as one HTML file.

    Args:
        model: folder that mpq-dm quantize wrote.
        out: file to write, by default report.md or report.html in that folder.
        html: one self-contained file of HTML.
        evaluation: folder that mpq-dm eval wrote; by default one within the model's.
        quiet: no lines on stderr.
    """
    from mpq_dm.report import write_report

    for path in write_report(model, out, html=html, evaluation=evaluation):
        say(f"written: {path}", quiet)


def size(model: Positional[Path], *, as_json: Json = False) -> None:
    """Count every byte of a quantized model by role and kind, and compare with the files.

    Args:
        model: folder of a quantized pipeline or denoiser.
        as_json: print one line of JSON instead of a table.

    Raises:
        TenfoldError: what is accounted is not what the files hold.
    """
    from tenfold_core.run.rows import plain

    from mpq_dm.sizes import account

    found = account(model)
    if as_json:
        print(json.dumps(plain(found) | {"agrees": found.agrees}))
    else:
        from tenfold_core.run.report import print_table

        from mpq_dm.report import SIZE_COLUMNS, size_rows

        print_table(SIZE_COLUMNS, size_rows(plain(found)), stream=sys.stdout)
        print(
            f"{found.weights:,} weights, {found.accounted:,} bytes accounted, "
            f"{found.bits_per_weight:.3f} bits per weight with everything included"
        )
    disk = found.disk
    if disk is not None and not found.agrees:
        raise TenfoldError(
            f"{model}: {found.accounted:,} bytes accounted, the files hold {disk.data:,}; they "
            "were not written by mpq-dm as they are, quantize again"
        )
    if disk is not None and not as_json:
        print(
            f"{disk.data:,} bytes in {disk.files} file{'s'[: disk.files > 1]}, the same, beside "
            f"{disk.headers:,} of headers"
        )


def info(model: Positional[Path], *, as_json: Json = False) -> None:
    """Describe the folder of a model, plain or quantized, from its configs and headers.

    Args:
        model: folder of a pipeline or denoiser.
        as_json: print one line of JSON.
    """
    found = describe_folder(model)
    if as_json:
        print(json.dumps(found))
        return
    width = max(map(len, found))
    for name, value in found.items():
        lines = [f"{value:,}" if isinstance(value, int) else str(value)]
        if isinstance(value, Mapping):
            lines = [f"{key:8}{part}" for key, part in value.items()]
        print(f"{name:{width}}  " + f"\n{'':{width}}  ".join(lines))


def describe_folder(path: Path) -> dict[str, Any]:
    """Return what the configs and tensor headers of a model's folder say; no tensor is read.

    Raises:
        InputError: there is no model, or a config is damaged.
        CheckpointError: a tensor file is damaged.
    """
    from math import prod

    from tenfold_core.run.checkpoint import read_header

    from mpq_dm.models import model_folder

    folder = model_folder(path)
    config = _json(folder / "config.json")
    files = [read_header(file) for file in sorted(folder.glob("*.safetensors"))]
    tensors = [tensor for file in files for tensor in file.tensors.values()]
    pipeline = path / "model_index.json"
    found: dict[str, Any] = {"folder": str(path)}
    if pipeline.is_file():
        found["pipeline"] = str(_json(pipeline).get("_class_name"))
    found["model"] = str(config.get("_class_name"))
    for name in ("sample_size", "in_channels", "out_channels", "num_class_embeds"):
        if config.get(name) is not None:
            found[name.replace("_", " ")] = config[name]
    found |= _scheduler(path, folder)
    found["files"] = len(files)
    found["bytes"] = sum(tensor.stop - tensor.start for tensor in tensors)
    found["types"] = ", ".join(sorted({tensor.dtype for tensor in tensors}))
    about = config.get("quantization_config")
    if not isinstance(about, dict):
        found["weights"] = sum(prod(tensor.shape) for tensor in tensors)
        found["quantized"] = "no"
        return found
    return found | _quantized(path, about)


def _quantized(path: Path, about: Mapping[str, Any]) -> dict[str, Any]:
    method = about.get("quant_method")
    found: dict[str, Any] = {"quantized": f"by {method}, format {about.get('format')}"}
    if method != "mpq-dm":
        return found
    from mpq_dm.sizes import account

    sizes = account(path)
    timesteps = about.get("timesteps") or []
    report = path / "report.json"
    if report.is_file():
        config = _json(report).get("config", {})
        found["method"] = (
            f"{config.get('allocation')} allocation, {config.get('trajectories')} trajectories of "
            f"fine-tuning, seed {config.get('seed')}"
        )
    return found | {
        "bits": f"W{about.get('weight_bits')}A{about.get('act_bits')}",
        "weights": sizes.weights,
        "bits per weight": f"{sizes.bits_per_weight:.3f} with everything included",
        "sampling": f"{len(timesteps)} steps, timesteps {timesteps[0]:g} to {timesteps[-1]:g}",
        "prediction": str(about.get("prediction_type")),
        "roles": {
            role.role: f"{role.layers} layers of {role.bits:.2f} bits" for role in sizes.roles
        },
        "accounted": "every byte" if sizes.agrees else "NOT what the files hold; see mpq-dm size",
    }


def _scheduler(path: Path, folder: Path) -> dict[str, str]:
    for place in (path, folder.parent):
        file = place / "scheduler" / "scheduler_config.json"
        if file.is_file():
            return {"scheduler": str(_json(file).get("_class_name"))}
    return {}


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: found {type(found).__name__}, expected an object")
    return found
