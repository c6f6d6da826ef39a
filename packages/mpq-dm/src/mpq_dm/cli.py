# SPDX-License-Identifier: Apache-2.0
"""The command line: `mpq-dm VERB ...`.

stdout carries the result, stderr everything else; `--json` prints exactly one line.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from tenfold_core.errors import ConfigError
from tenfold_core.run.cli import Command, Positional, option
from tenfold_core.run.cli import main as run_command

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
from mpq_dm.config import MPQDMConfig, method_config, parse_settings

__all__ = ["main"]

Out = Annotated[Path | None, option("-o", metavar="DIR", help="folder for the record and the rows")]
Bits = Annotated[int, option("-w", "--w", metavar="N")]
ActBits = Annotated[int, option("-a", "--a", metavar="N")]
Settings = Annotated[
    tuple[str, ...],
    option(
        name="set",
        metavar="NAME=VALUE",
        repeated=True,
        help="any other setting of MPQDMConfig; may be given several times",
    ),
]


def main(argv: Sequence[str] | None = None) -> int:
    """Run `mpq-dm` and return its exit code."""
    return run_command("mpq-dm", _VERBS, argv)


def analyze(
    model: Positional[Model],
    *,
    weight_bits: int = 2,
    omq_range: str = "paper",
    calib: bool = False,
    steps: int = 20,
    conditions: Conditions = NO_CONDITIONS,
    out: Out = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say per layer how heavy the outliers are and what mixed bits can buy.

    No calibration is needed: errors are those of the weights, relative to their energy. With
    --calib they are those of the layers' outputs on what the sampler feeds them.

    Args:
        model: folder of a pipeline or denoiser, or hub id.
        weight_bits: average bits of a weight, 2 to 8.
        omq_range: groups that may move, paper or official.
        calib: sample with the model and measure output errors.
        steps: sampling steps of --calib.
        conditions: labels, prompts or embeddings to sample with.
        out: folder for the record and the rows.
        as_json: print one line of JSON instead of a table.
        quiet: no progress on stderr.
    """
    config = MPQDMConfig(weight_bits=weight_bits, omq_range=omq_range, steps=steps)
    from mpq_dm.analysis import analyze, totals
    from mpq_dm.models import open_source

    say(f"reading {model}", quiet)
    source = open_source(model)
    sampler = None
    if calib:
        from mpq_dm.quantizing import sampler_for

        sampler = sampler_for(source, conditions.read(), config)
    table = analyze(source.model, config, sampler, None if quiet else progress_line())
    found = totals(table)
    metrics = {name: (value, "1", None) for name, value in found.items()}
    if out is not None:
        _record(out, "analyze", config, table.to_dicts(), metrics)
    if as_json:
        print(json.dumps(found))
        return
    from tenfold_core.run.report import print_table

    columns = ("layer", "role", "shape", "kurtosis q10", "median", "q90", "max", "uniform",
               "by kurtosis", "exact", "moved")  # fmt: skip
    print_table(columns, [_cells(row) for row in table.to_dicts()], stream=sys.stdout)
    shares = {name: found[f"gain_{name}"] for name in ("kurtosis", "exact")}
    gains = ", ".join(f"{name} {100 * x:.1f} %" for name, x in shares.items() if x is not None)
    print(
        f"{found['layers']} layers, {found['weights']} weights, {found['body_weights']} of them to "
        f"be mixed at {weight_bits} bits; weight error saved: {gains or 'nothing to mix'}"
    )


def demo(
    *,
    out: Out = None,
    seed: int = 0,
    seeds: int = 1,
    retrain: bool = False,
    workers: int | None = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Quantize the shipped diffusion model of digits by every method and compare, in 3 minutes.

    Args:
        out: folder for the record, the rows and the pictures.
        seed: seed of calibration and fine-tuning.
        seeds: seeds of fine-tuning, one after the other, each with a whole table.
        retrain: train the diffusion model first, a quarter of an hour, and use that one.
        workers: processes of one thread that share the rows; by default one a core, at most 4.
        as_json: print one line of JSON instead of tables.
        quiet: no progress on stderr.
    """
    from tenfold_core.device import cpu_info

    from mpq_dm.demo_command import run_demo

    found = run_demo(
        out, seed=seed, seeds=seeds, retrain=retrain,
        workers=workers or min(4, cpu_info().usable_cores), say=lambda text: say(text, quiet),
        command=["mpq-dm", *sys.argv[1:]],
    )  # fmt: skip
    if as_json:
        print(json.dumps(found.numbers))
        return
    from tenfold_core.run.report import print_table

    for title, columns, cells in found.tables:
        print_table(columns, cells, title=title, stream=sys.stdout)
    print("\n".join(found.lines))


def quantize(
    model: Positional[Model],
    *,
    out: Folder,
    weight_bits: Bits = 2,
    act_bits: ActBits = 6,
    method: str = "mpq-dm",
    preset: str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    trajectories: int | None = None,
    batch_size: int | None = None,
    plus: float | None = None,
    skip_bits: int | None = None,
    cache_temb: bool = False,
    trd_rows: int | None = None,
    seed: int | None = None,
    settings: Settings = (),
    conditions: Conditions = NO_CONDITIONS,
    config: Path | None = None,
    device: Device = "auto",
    resume: bool = False,
    overwrite: bool = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Quantize a diffusion model into a folder that diffusers loads after `import mpq_dm`.

    Args:
        model: folder of a pipeline or denoiser, hub id, or a .safetensors file with --config.
        out: folder to write; it must not exist.
        weight_bits: average bits of a weight in the body, 1 to 8.
        act_bits: bits of the body's inputs.
        method: mpq-dm, or a baseline: rtn-mse, smooth-mse, efficientdm, adaround, hawq, ...
        preset: published settings of a model: imagenet-ldm4 or lsun-bedrooms-ldm4.
        steps: sampling steps of the sampler you will use.
        guidance: scale of classifier-free guidance; 1 for none.
        trajectories: length of fine-tuning; 0 for none.
        batch_size: images sampled together.
        plus: part of the rows that get one more bit for nothing.
        skip_bits: bits of shortcuts and strided downsamplers: 8, 16 or 32.
        cache_temb: store a table of the timestep's embedding in place of its layers.
        trd_rows: positions drawn for the relation loss, to save memory.
        seed: seed of everything drawn.
        settings: any other setting, for example --set lora_lr=0.01.
        conditions: labels, prompts or embeddings to sample with.
        config: config.json of a single .safetensors file.
        device: where to compute.
        resume: go on with the unfinished run in OUT.state.
        overwrite: replace an older folder.
        as_json: print one line of JSON instead of a table.
        quiet: no progress on stderr.
    """
    given = {
        "weight_bits": weight_bits, "act_bits": act_bits, "steps": steps, "guidance": guidance,
        "trajectories": trajectories, "batch_size": batch_size, "plus": plus,
        "skip_bits": skip_bits, "trd_rows": trd_rows, "seed": seed,
        "cache_temb": cache_temb or None,
    }  # fmt: skip
    known = {name: value for name, value in given.items() if value is not None}
    if method == "ptqd":
        raise ConfigError(
            "method ptqd corrects the sampler, which a folder cannot hold; quantize with "
            "stepwise-mse and sample through mpq_dm.ptqd.CorrectedSampler"
        )
    chosen = method_config(method, preset=preset, **known | parse_settings(settings))
    from tenfold_core.device import resolve

    from mpq_dm.quantizing import quantize_to_folder, resume_hint

    try:
        result = quantize_to_folder(
            model, out, chosen, conditions.read(), model_config=config,
            device=str(resolve(device, via="torch")), resume=resume, overwrite=overwrite,
            command=["mpq-dm", *sys.argv[1:]], progress=None if quiet else progress_line(),
        )  # fmt: skip
    except KeyboardInterrupt:
        say(f"\ninterrupted; {resume_hint(out)}", False)
        raise
    numbers = {name: value for name, (value, _) in result.report.metrics().items()}
    if as_json:
        print(json.dumps(numbers))
        return
    for name, value in numbers.items():
        print(f"{name:32} {value:.6g}" if isinstance(value, float) else f"{name:32} {value}")
    for name, why in result.report.left.items():
        say(f"left as it is: {name} ({why})", quiet)
    say(f"written: {out}", quiet)


def sample(
    model: Positional[Model],
    *,
    out: Folder,
    count: Count = 16,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    eta: float = 0.0,
    batch_size: int = 16,
    conditions: Conditions = NO_CONDITIONS,
    against: str | None = None,
    mode: Mode = "int8",
    device: Device = "auto",
    overwrite: bool = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Sample images from a quantized model: PNG files, a grid, and a record.

    Args:
        model: folder of a quantized pipeline or denoiser.
        out: folder for the images.
        count: number of images.
        seed: seed of noises and conditions.
        steps: sampling steps; by default those it was calibrated with.
        guidance: scale of classifier-free guidance; by default as it was quantized with.
        eta: noise of a DDIM sampler.
        batch_size: images sampled together.
        conditions: labels, prompts or embeddings to sample with.
        against: the original model: its images from the same noise beside them.
        mode: int8, packed or dequant.
        device: where to compute.
        overwrite: replace an older folder.
        as_json: print one line of JSON.
        quiet: no progress on stderr.
    """
    from tenfold_core.device import resolve

    from mpq_dm.sampling import sample_to_folder

    if count < 1:
        raise ConfigError(f"-n is {count}, expected at least 1")
    config = MPQDMConfig(
        steps=1 if steps is None else steps, eta=eta, batch_size=min(batch_size, count), seed=seed
    )
    found = sample_to_folder(
        model, out, config, conditions.read(), count=count, steps=steps, guidance=guidance,
        against=against,
        mode=mode, device=str(resolve(device, via="torch")), overwrite=overwrite,
        command=["mpq-dm", *sys.argv[1:]], progress=None if quiet else progress_line(),
    )  # fmt: skip
    print(json.dumps(found) if as_json else "\n".join(f"{k:24} {v}" for k, v in found.items()))


_VERBS = {
    "demo": demo, "analyze": analyze, "quantize": quantize, "sample": sample,
    "eval": Command("mpq_dm.cli_evidence:evaluate", "What a quantized model lost, with intervals."),
    "size": Command("mpq_dm.cli_evidence:size", "Account for every byte of a quantized model."),
    "info": Command("mpq_dm.cli_evidence:info", "Say what is in the folder of a model."),
    "report": Command("mpq_dm.cli_evidence:report", "Write the report of a quantized model."),
    "bench": Command("mpq_dm.benchmark:bench", "Time a quantized model against the original."),
}  # fmt: skip


def _cells(row: Mapping[str, Any]) -> list[str]:
    errors = [row["uniform"], row["kurtosis"], row["exact"]]
    return [
        row["layer"],
        row["role"],
        f"{row['rows']} x {row['columns']}",
        *[f"{row[f'kurtosis_{name}']:.2f}" for name in ("q10", "median", "q90", "max")],
        *["" if error is None else f"{error:.4f}" for error in errors],
        "" if row["moved"] is None else str(row["moved"]),
    ]


def _record(
    out: Path,
    verb: str,
    config: Any,
    rows: Sequence[Mapping[str, Any]],
    metrics: Mapping[str, tuple[Any, str, Any]],
    *,
    seed: int | None = None,
) -> None:
    from tenfold_core.run.record import RunRecord
    from tenfold_core.run.rows import JsonlStream

    out.mkdir(parents=True, exist_ok=True)
    command = ["mpq-dm", verb, *sys.argv[2:]]
    with (
        RunRecord(out, package="mpq-dm", command=command, config=config, seed=seed) as record,
        JsonlStream(out / "rows.jsonl") as stream,
    ):
        for row in rows:
            stream.append(row)
        for name, (value, unit, better) in metrics.items():
            record.metric(name, value, unit=unit, better=better)
        record.artefact(out / "rows.jsonl")
