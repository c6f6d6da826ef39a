# SPDX-License-Identifier: Apache-2.0
"""What quantization costs and gives on a CPU, each figure beside its target.

Latency: one call of a denoiser, the packed modes and float32 eager in turns on the same threads.
The models have random weights, which changes no time: that of google/ddpm-cifar10-32 (128 to 256
channels, 32 x 32, one attention head), the same with heads of 8 channels (the default of diffusers,
where attention takes a quarter of the time and is not quantized), and one of 320 and 640 channels
as in latent diffusion. They are rounded to W4A8 by rtn-minmax, the quickest, from few calibration
images: how scales were found changes no time either.

Loading: from_pretrained of a packed model of 400 million weights of random codes, W4, files in the
page cache, with the weights unpacked and checked but not yet ordered for oneDNN, which the first
call does. Packing: codes of 1280 x 11520, one thread. Training:
calibration with the errors of all rows, and a step of fine-tuning beside one of the same student
and teacher in float32, for 128 and 256 channels at 16 x 16, batch 4. Figures are medians.

Writes results/cpu, a folder for each part, and cpu.md.
"""

import copy
import json
import math
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DModel
from mpq_dm.benchmarking import Call, compare, first_call, machine_rates, resident_bytes, work_of
from mpq_dm.calibration import calibrate
from mpq_dm.config import MPQDMConfig, method_config
from mpq_dm.finetune import FineTuner
from mpq_dm.method import make_sampler, make_student, quantize
from mpq_dm.packed import MODES, packed_layers, set_mode
from mpq_dm.plan import LayerPlan
from mpq_dm.plugin import attach_packed, load
from mpq_dm.roles import find_layers
from mpq_dm.sampler import Sampler, called_timesteps, first_tensor, following
from tenfold_core.errors import ConfigError
from tenfold_core.quant.packing import pack_rows, unpack_rows
from tenfold_core.run.cli import main
from tenfold_core.run.record import RunRecord
from tenfold_core.run.report import markdown_table
from tenfold_core.run.rows import JsonlStream, read_jsonl
from tenfold_core.run.timing import measure_many, ratio

RESULTS = Path(__file__).parent / "results"
PARTS = ("latency", "loading", "packing", "training")
CIFAR: dict[str, Any] = {
    "sample_size": 32, "in_channels": 3, "out_channels": 3, "layers_per_block": 2,
    "block_out_channels": (128, 256, 256, 256), "attention_head_dim": None,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "downsample_padding": 0, "norm_eps": 1e-6, "flip_sin_to_cos": False, "freq_shift": 1,
}  # fmt: skip
LATENT: dict[str, Any] = {
    "sample_size": 32, "in_channels": 4, "out_channels": 4, "layers_per_block": 1,
    "block_out_channels": (320, 640), "attention_head_dim": 32,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
SMALL = CIFAR | {
    "sample_size": 16, "layers_per_block": 1, "block_out_channels": (128, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "cifar": (CIFAR, 4),
    "cifar, heads of 8": (CIFAR | {"attention_head_dim": 8}, 4),
    "latent, 320 channels": (LATENT, 2),
}
"""Settings and batch."""
LARGE = LATENT | {"block_out_channels": (320, 640, 1280), "layers_per_block": 2} | {
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
TARGETS: dict[str, tuple[str, float]] = {
    "int8 speed-up": (">=", 2.5), "load int8": ("<", 3.0), "load packed": ("<", 3.0),
    "pack": (">=", 200.0), "unpack": (">=", 200.0), "training step": ("<=", 1.5),
}  # fmt: skip
COLUMNS = ("figure", "value", "unit", "quartiles", "target", "verdict")
PAGE = "# On a CPU\n\n{about}\n\nMachine: {machine}\n\n{table}\n"

Row = dict[str, Any]


def run(
    *,
    parts: str = "latency,loading,packing,training",
    repeats: int = 10,
    threads: int | None = None,
    work: Path | None = None,
    prepare: bool = False,
    out: Path = RESULTS,
    device: str = "cpu",
) -> None:
    """Measure and write records, one for each part.

    Args:
        parts: which of latency, loading, packing and training.
        repeats: timed calls of each candidate.
        threads: of torch, by default what it chooses.
        work: folder that keeps the packed models, so that a second run need not make them.
        prepare: make the packed models of `work`, and measure nothing.
        out: folder of the results.
        device: cpu; there is nothing to do here for another one.
    """
    if device != "cpu":
        print(f"bench_cpu.py measures on the CPU; nothing to do with --device={device}")
        return
    wanted = parts.split(",")
    if not set(wanted) <= set(PARTS):
        raise ConfigError(f"parts is {parts!r}, expected some of {','.join(PARTS)}")
    if threads:
        torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as name:
        folder = work or Path(name)
        if prepare:
            prepare_in(folder)
            return
        measured: dict[str, Callable[[int], list[Row]]] = {
            "latency": lambda repeats: latency(repeats, folder), "packing": packing,
            "loading": lambda repeats: loading(repeats, folder), "training": training,
        }  # fmt: skip
        for part in wanted:
            print(part, file=sys.stderr, flush=True)
            write(out / "cpu" / part, measured[part], repeats)
    write_page(out)


def prepare_in(folder: Path) -> None:
    """Make all packed models in a folder."""
    for name in MODELS:
        rounded(name, folder)
    write_large(folder / "large")


def write(folder: Path, measured: Callable[[int], list[Row]], repeats: int) -> None:
    """Run one part, print its figures and write its record."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"repeats": repeats, "threads": torch.get_num_threads()}
    command = ["bench_cpu.py", *_without_folders(sys.argv[1:])]
    with (
        RunRecord(folder, package="mpq-dm", command=command, config=config) as record,
        JsonlStream(folder / "rows.jsonl") as stream,
    ):
        for row in measured(repeats):
            stream.append(row)
            record.metric(row["figure"], row["value"], unit=row["unit"])
            print("  ".join(cells(row)))
        record.artefact(folder / "rows.jsonl")


def _without_folders(arguments: list[str]) -> list[str]:
    """Leave out where a machine keeps its files, which changes no figure."""
    return [
        text
        for text, before in zip(arguments, ["", *arguments], strict=False)
        if not {text, before} & {"--work", "--out"} and not text.startswith(("--work=", "--out="))
    ]


def figure(
    name: str, value: float, unit: str, *, target: str = "", quartiles: tuple[float, ...] = (),
) -> Row:  # fmt: skip
    """Return a row, with its verdict if there is a target."""
    sign, limit = TARGETS.get(target, ("", None))
    met = None
    if limit is not None:
        met = value >= limit if sign == ">=" else value <= limit
    return {
        "figure": name, "value": value, "unit": unit, "quartiles": list(quartiles),
        "target": "" if limit is None else f"{sign} {limit:g}", "met": met,
    }  # fmt: skip


def cells(row: Row) -> list[str]:
    """Return a line of the table."""
    return [
        row["figure"], f"{row['value']:.4g}", row["unit"],
        " to ".join(f"{x:.3g}" for x in row["quartiles"]), row["target"],
        "" if row["met"] is None else "met" if row["met"] else "missed",
    ]  # fmt: skip


def write_page(out: Path) -> None:
    """Write all parts that have been measured as one page."""
    rows, machine = [], ""
    for part in PARTS:
        folder = out / "cpu" / part
        if (folder / "run.json").is_file():
            rows += [cells(row) for row in read_jsonl(folder / "rows.jsonl")]
            record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
            about, versions = record["device"], record["versions"]
            machine = (
                f"{about['model']}, {about['usable_cores']} cores, {record['config']['threads']} "
                f"threads, torch {versions['torch']}, Python {versions['python']}."
            )
    text = (__doc__ or "").split("\n\n")
    page = PAGE.format(
        about="\n\n".join(text[1:-1]), machine=machine, table=markdown_table(COLUMNS, rows)
    )
    (out / "cpu.md").write_text(page, encoding="utf-8")


def untrained(settings: dict[str, Any]) -> Any:
    """Return a denoiser with random weights, the same every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DModel(**settings).eval()


def sampler_of(model: Any, config: MPQDMConfig) -> Sampler:
    """Return a sampler whose samples stay near their start, as a trained model's do."""
    return make_sampler(model, config, scheduler=DDIMScheduler(clip_sample=True))


def rounded(name: str, folder: Path) -> tuple[Any, Any, Sampler]:
    """Return a model, itself rounded to W4A8 and packed, and its sampler."""
    settings, batch = MODELS[name]
    model = untrained(settings)
    config = method_config(
        "rtn-minmax", weight_bits=4, act_bits=8, steps=2, batch_size=batch, calib_samples=batch
    )
    sampler = sampler_of(model, config)
    place = folder / name.replace(", ", "-").replace(" ", "-")
    if not place.exists():
        quantize(model, config, sampler=sampler).model.save_pretrained(place)
    return model, load(place), sampler


def latency(repeats: int, folder: Path) -> list[Row]:
    """Time one call of each model in float32 eager and in the packed modes."""
    rates = machine_rates("cpu")
    rows = [figure(f"machine, {name}", rates[name] / 1e9, "G/s") for name in rates]
    for name in MODELS:
        model, packed, sampler = rounded(name, folder)
        models: dict[str, Any] = {"fp32": model}
        for mode in MODES:
            models[mode] = copy.deepcopy(packed)
            set_mode(models[mode], mode)
        rows += timed(name, models, first_call(model, sampler), repeats, rates)
    return rows


@torch.no_grad()
def timed(
    name: str, models: dict[str, Any], call: Call, repeats: int, rates: dict[str, float]
) -> list[Row]:
    """Return times, ratios, bounds and bytes of models that take turns."""
    args, kwargs = call
    calls = {
        kind: (lambda model=model: first_tensor(model(*args, **kwargs)))
        for kind, model in models.items()
    }
    work = work_of(models["fp32"], call)
    rows = []
    for kind, (timing, (low, middle, high)) in compare(
        calls, repeats=repeats, device="cpu"
    ).items():
        quartiles = (1e3 * timing.q1, 1e3 * timing.q3)
        rows.append(figure(f"{name}: {kind}", 1e3 * timing.median, "ms", quartiles=quartiles))
        rate = rates["int8" if kind in ("int8", "packed") else "fp32"]
        rows.append(figure(f"{name}: {kind}, bound by products", 1e3 * work.macs / rate, "ms"))
        rows.append(figure(f"{name}: {kind}, weights", resident_bytes(models[kind]) / 1e6, "MB"))
        if kind != "fp32":
            rows.append(
                figure(
                    f"{name}: {kind} over fp32",
                    middle,
                    "x",
                    target=f"{kind} speed-up",
                    quartiles=(low, high),
                )
            )
    return rows


def loading(repeats: int, work: Path) -> list[Row]:
    """Time from_pretrained of a packed model of 400 million weights."""
    folder = work / "large"
    write_large(folder)
    packed = load(folder, mode="packed")
    weights = sum(math.prod(layer.shape) for _, layer in packed_layers(packed))
    size = sum(path.stat().st_size for path in folder.iterdir())
    rows = [figure("large model", weights / 1e6, "M weights"),
            figure("large model on disk", size / 1e6, "MB")]  # fmt: skip
    del packed
    for mode in ("int8", "packed"):
        seconds = []
        for _ in range(max(3, repeats // 3)):
            started = perf_counter()
            load(folder, mode=mode)
            seconds.append(perf_counter() - started)
        low, middle, high = np.percentile(seconds, [25, 50, 75]).tolist()
        found = figure(
            f"load, mode {mode}", middle, "s", target=f"load {mode}", quartiles=(low, high)
        )
        rows.append(found)
    return rows


def write_large(folder: Path) -> None:
    """Write a packed model of 400 million weights of random codes, unless it is there."""
    if folder.exists():
        return
    with torch.device("meta"):
        model: Any = UNet2DModel(**LARGE).eval()
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.zero_()
    stream, plans = torch.Generator().manual_seed(0), {}
    for layer in find_layers(model)[0]:
        shape = layer.module.weight.shape
        bits = 4 if layer.role == "body" else 8
        codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=stream)
        rows = shape[0]
        plan = LayerPlan(
            role=layer.role, bits=torch.full((rows,), bits), scale=torch.full((rows, 1), 0.25),
            zero=torch.full((rows, 1), 7.25), smooth=None, act_bits=8,
            act_scale=torch.full((2,), 0.05), act_zero=torch.full((2,), 128.0),
        )  # fmt: skip
        plans[layer.name] = plan, codes
    attach_packed(model, plans, timesteps=[999, 499], weight_bits=4, act_bits=8, mode="packed")
    model.save_pretrained(folder)


def packing(repeats: int) -> list[Row]:
    """Time packing and unpacking of one large weight, on one thread."""
    rows = []
    for bits in (1, 2, 3, 4, 8):
        codes = np.random.default_rng(0).integers(0, 2**bits, (1280, 11520), dtype=np.uint8)
        packed = pack_rows(codes, bits)
        calls = {
            "pack": lambda codes=codes, bits=bits: pack_rows(codes, bits),
            "unpack": lambda packed=packed, bits=bits: unpack_rows(packed, bits, 11520),
        }
        for name, timing in measure_many(calls, repeats=max(repeats, 20)).items():
            speeds = [codes.size / 1e6 / x for x in (timing.median, timing.q3, timing.q1)]
            rows.append(
                figure(
                    f"{name} {bits} bits",
                    speeds[0],
                    "M weights/s",
                    target=name,
                    quartiles=(speeds[1], speeds[2]),
                )
            )
    return rows


def training(repeats: int) -> list[Row]:
    """Time calibration with the errors of all rows, and steps of fine-tuning."""
    model = untrained(SMALL)
    config = method_config(
        "mpq-dm", weight_bits=4, act_bits=8, steps=2, batch_size=4, calib_samples=4,
        trajectories=100,
    )  # fmt: skip
    sampler = sampler_of(model, config)
    steps = called_timesteps(model, sampler)
    started = perf_counter()
    found = calibrate(model, sampler, steps, config)
    seconds = perf_counter() - started
    weights = sum(layer.module.weight.numel() for layer in find_layers(model)[0])
    rows = [
        figure("model to train", weights / 1e6, "M weights"),
        figure("calibration and allocation", seconds / weights * 1e6, "s per M weights"),
    ]
    trajectories = {"float32 student and teacher": float_steps(model, sampler)}
    for name, weight in (("fine-tuning, no relation loss", 0.0), ("fine-tuning", 100.0)):
        settings = replace(config, trd_weight=weight)
        student, layers = make_student(model, found, steps, settings)
        body = {key: layer for key, layer in layers.items() if layer.plan.role == "body"}
        tuner = FineTuner(model, student, body, sampler, settings, len(steps))
        trajectories[name] = lambda tuner=tuner: tuner._trajectory(1)
    timings = measure_many(trajectories, min_time_s=0, repeats=max(3, repeats // 3), warmup=1)
    base = timings["float32 student and teacher"]
    for name, timing in timings.items():
        rows.append(figure(name, timing.median / len(steps), "s a step"))
        if timing is not base:
            rows.append(
                figure(f"{name} over float32", ratio(timing, base), "x", target="training step")
            )
    return rows


def float_steps(teacher: Any, sampler: Sampler) -> Callable[[], None]:
    """Return what trains a copy of a model in float32 along one trajectory."""
    student = copy.deepcopy(teacher)
    optimizer = torch.optim.AdamW(student.parameters(), 1e-6, fused=True)

    def on_call(call: Any, output: Any) -> None:
        with torch.enable_grad():
            found = first_tensor(student(*call.args, **call.kwargs))
            (found - first_tensor(output).detach()).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def trajectory() -> None:
        with following(teacher, on_call):
            sampler.trajectory(teacher, 1)

    return trajectory


if __name__ == "__main__":
    raise SystemExit(main("bench_cpu.py", run, package="mpq-dm"))
