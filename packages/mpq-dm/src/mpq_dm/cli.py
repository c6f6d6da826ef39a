# SPDX-License-Identifier: Apache-2.0
"""The command line: `mpq-dm VERB ...`.

stdout carries the result, stderr everything else; `--json` prints exactly one line.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from tenfold_core.run.cli import Positional, option
from tenfold_core.run.cli import main as run_command

from mpq_dm.config import MixConfig, MPQDMConfig, method_config, parse_settings

__all__ = ["main"]

Json = Annotated[bool, option(name="json", help="print one line of JSON instead of a table")]
Quiet = Annotated[bool, option(help="no progress on stderr")]
Out = Annotated[Path | None, option("-o", metavar="DIR", help="folder for the record and the rows")]
Folder = Annotated[Path, option("-o", metavar="DIR")]
Model = Annotated[str, option(metavar="MODEL")]
Bits = Annotated[int, option("-w", "--w", metavar="N")]
ActBits = Annotated[int, option("-a", "--a", metavar="N")]
Device = Annotated[str, option(metavar="auto|cpu|cuda[:N]", help="where to compute")]
Settings = Annotated[
    tuple[str, ...],
    option(name="set", metavar="NAME=VALUE", help="any other setting of MPQDMConfig"),
]
Mode = Annotated[str, option(metavar="int8|packed|dequant", help="how products are computed")]
Count = Annotated[int, option("-n", metavar="N")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """What samples are conditioned on."""

    labels: str | None = None
    """Class labels to draw from, such as 0-9,12, or a file of one a line."""
    negative_label: int | None = None
    """The label that stands for no condition, for guidance of a denoiser without a pipeline."""
    prompts: Path | None = None
    """Text file of prompts to draw from, one a line."""
    embeddings: Path | None = None
    """Safetensors file of arguments to draw from, one entry per condition."""

    def read(self) -> Any:
        """Return the settings in the terms of `mpq_dm.quantizing`."""
        from mpq_dm.quantizing import Conditioning

        return Conditioning(**asdict(self))


_NO_CONDITIONS = Conditions()


def main(argv: Sequence[str] | None = None) -> int:
    """Run `mpq-dm` and return its exit code."""
    return run_command("mpq-dm", _VERBS, argv)


def analyze(
    model: Positional[Path],
    *,
    weight_bits: int = 2,
    omq_range: str = "paper",
    out: Out = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say per layer how heavy the outliers are and what mixed bits can buy.

    No calibration is needed: errors are those of the weights, relative to their energy.

    Args:
        model: folder of a diffusers model or pipeline.
        weight_bits: average bits of a weight, 2 to 8.
        omq_range: groups that may move, paper or official.
        out: folder for the record and the rows.
        as_json: print one line of JSON instead of a table.
        quiet: no progress on stderr.
    """
    config = MixConfig(weight_bits=weight_bits, omq_range=omq_range)
    from mpq_dm.analysis import analyze, totals
    from mpq_dm.models import load_model

    _say(f"reading {model}", quiet)
    table = analyze(load_model(model), config)
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


def demo(*, out: Out = None, seed: int = 0, as_json: Json = False, quiet: Quiet = False) -> None:
    """Show what the allocation of bits does on layers whose outliers are known.

    Args:
        out: folder for the record and the rows.
        seed: seed of the planted layers.
        as_json: print one line of JSON instead of a table.
        quiet: no progress on stderr.
    """
    from mpq_dm.planted import compare

    rows = []
    for row in compare(seed):
        rows.append(row)
        _say(f"{row['case']}, W{row['bits']}", quiet)
    metrics = {
        f"gain_{name}_w{row['bits']}": (row[f"gain_{name}"], "1", "higher")
        for row in rows
        if row["case"] == "30 heavy rows"
        for name in ("kurtosis", "exact")
    }
    if out is not None:
        _record(out, "demo", {"seed": seed}, rows, metrics, seed=seed)
    if as_json:
        print(json.dumps({name: value for name, (value, _, _) in metrics.items()}))
        return
    from tenfold_core.run.report import print_table

    columns = ("layer of 100 rows", "bits", "uniform", "by kurtosis", "exact", "rows moved up")
    cells = [
        (
            row["case"], row["bits"], f"{row['uniform']:.2f}",
            f"{row['kurtosis']:.2f} ({-100 * row['gain_kurtosis']:+.0f} %)",
            f"{row['exact']:.2f} ({-100 * row['gain_exact']:+.0f} %)", f"{row['moved']:.0f}",
        )
        for row in rows
    ]  # fmt: skip
    print_table(columns, cells, title="Weight error, mean of 5 layers", stream=sys.stdout)


def quantize(
    model: Positional[Model],
    *,
    out: Folder,
    weight_bits: Bits = 2,
    act_bits: ActBits = 6,
    method: str = "mpq-dm",
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
    conditions: Conditions = _NO_CONDITIONS,
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
    chosen = method_config(method, **known | parse_settings(settings))
    from tenfold_core.device import resolve

    from mpq_dm.quantizing import quantize_to_folder

    result = quantize_to_folder(
        model, out, chosen, conditions.read(), model_config=config,
        device=str(resolve(device, via="torch")), resume=resume, overwrite=overwrite,
        command=["mpq-dm", *sys.argv[1:]], progress=None if quiet else _progress(),
    )  # fmt: skip
    numbers = {name: value for name, (value, _) in result.report.metrics().items()}
    if as_json:
        print(json.dumps(numbers))
        return
    for name, value in numbers.items():
        print(f"{name:32} {value:.6g}" if isinstance(value, float) else f"{name:32} {value}")
    for name, why in result.report.left.items():
        _say(f"left as it is: {name} ({why})", quiet)
    _say(f"written: {out}", quiet)


def sample(
    model: Positional[Model],
    *,
    out: Folder,
    count: Count = 16,
    seed: int = 0,
    steps: int | None = None,
    guidance: float = 1.0,
    eta: float = 0.0,
    batch_size: int = 16,
    conditions: Conditions = _NO_CONDITIONS,
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
        guidance: scale of classifier-free guidance.
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

    config = MPQDMConfig(
        steps=steps or 1, guidance=guidance, eta=eta, batch_size=min(batch_size, count), seed=seed
    )
    found = sample_to_folder(
        model, out, config, conditions.read(), count=count, steps=steps, against=against,
        mode=mode, device=str(resolve(device, via="torch")), overwrite=overwrite,
        command=["mpq-dm", *sys.argv[1:]], progress=None if quiet else _progress(),
    )  # fmt: skip
    print(json.dumps(found) if as_json else "\n".join(f"{k:24} {v}" for k, v in found.items()))


_VERBS = {
    "demo": demo, "analyze": analyze, "quantize": quantize, "sample": sample,
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


def _say(text: str, quiet: bool) -> None:
    if not quiet:
        print(text, file=sys.stderr, flush=True)


def _progress() -> Callable[[str, int, int], None]:
    """Return what writes one changing line on a terminal, and a line now and then elsewhere."""
    from tenfold_core.run.report import is_plain

    plain, last = is_plain(), [""]

    def show(what: str, done: int, total: int) -> None:
        text = f"{what}: {done} of {total}"
        if not plain:
            print(f"\r\x1b[K{text}", end="\n" if done == total else "", file=sys.stderr, flush=True)
        elif done in (1, total) or done * 10 // total != (done - 1) * 10 // total:
            if text != last[0]:
                print(text, file=sys.stderr, flush=True)
            last[0] = text

    return show
