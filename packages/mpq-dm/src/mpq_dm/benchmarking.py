# SPDX-License-Identifier: Apache-2.0
"""Latency of one call and of whole sampling, for the original and the packed modes in turns.

Every candidate is called once a round, in an order that reverses, so that a machine that slows down
slows all of them; a speed-up is the median over rounds of the ratio within the round. Beside each
time stands its bound: the products over the rate of a large matrix product of the same type on the
same threads, or the bytes over the rate of a copy, whichever takes longer. Loading, compiling and
the first two calls are not timed.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from tenfold_core.errors import MissingExtraError
from tenfold_core.run.record import RunRecord
from tenfold_core.run.rows import JsonlStream
from tenfold_core.run.timing import Timing, measure_many
from torch import Tensor, nn

from mpq_dm import peers
from mpq_dm.benchmark import BenchConfig
from mpq_dm.config import MPQDMConfig
from mpq_dm.models import Source, open_source
from mpq_dm.packed import PackedLayer, packed_layers, set_mode
from mpq_dm.quantizing import Conditioning, sampler_for
from mpq_dm.sampler import Sampler, first_tensor
from mpq_dm.sampling import open_packed

__all__ = [
    "BenchResult",
    "Work",
    "benchmark_model",
    "compare",
    "first_call",
    "machine_rates",
    "record_rows",
    "resident_bytes",
    "work_of",
]

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """What was measured.

    Attributes:
        rows: one for each candidate.
        machine: rates of the machine that the bounds come from.
        notes: what a reader must know, such as peers that are not installed.
    """

    rows: list[dict[str, Any]]
    machine: dict[str, float]
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Return what stands below the table."""
        rates = ", ".join(
            f"{name} {value / 1e9:.4g} {'GB/s' if name == 'copy' else 'GMAC/s'}"
            for name, value in self.machine.items()
            if name != "threads"
        )
        base = self.rows[0]["candidate"]
        slower = [row["candidate"] for row in self.rows if row["speedup"] < 1]
        return [
            f"speed-up over {base}; the machine's own rates: {rates}",
            f"slower than {base}: {', '.join(slower) if slower else 'none'}",
            *self.notes,
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one call of a denoiser has to do in its layers with weights."""

    macs: int
    """Products; those of attention have no weights and are not counted."""
    values: int
    """Numbers that the layers read and write, without their weights."""


class _Reached(Exception):
    """Ends a trajectory whose first call has been seen."""


def first_call(model: nn.Module, sampler: Sampler) -> Call:
    """Return the arguments of the first call of the denoiser in trajectory 0."""
    found: list[Call] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append((args, kwargs))
        raise _Reached

    handle = model.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)
    try:
        sampler.trajectory(model, 0)
    except _Reached:
        pass
    finally:
        handle.remove()
    args, kwargs = found[0]
    return _moved(args, torch.clone), _moved(kwargs, torch.clone)


@torch.no_grad()
def work_of(model: nn.Module, call: Call) -> Work:
    """Count the work of one call by making it."""
    totals = {"macs": 0, "values": 0}

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        shape = module.shape if isinstance(module, PackedLayer) else module.weight.shape
        inner = prod(shape[1:]) if isinstance(shape, Sequence) else 0
        totals["macs"] += output.numel() * inner
        totals["values"] += output.numel() + args[0].numel()

    kinds = (PackedLayer, nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    handles = [m.register_forward_hook(hook) for m in model.modules() if isinstance(m, kinds)]
    try:
        model(*call[0], **call[1])
    finally:
        for handle in handles:
            handle.remove()
    return Work(**totals)


def resident_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's tensors and of what its packed layers keep for their mode.

    On a CPU oneDNN has a second copy of integer weights in its own order, which is counted.
    """
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    total = sum(peers.tensor_bytes(tensor) for tensor in tensors.values())
    for _, layer in packed_layers(model):
        prepared, rows = layer._int_weight, layer._float_rows
        if prepared is not None:
            copies = 1 if prepared.operand.device.type == "cpu" else 0
            total += prepared.nbytes + copies * prepared.operand.nbytes
        total += 0 if rows is None else rows.nbytes
    return total


def machine_rates(device: str, *, size: int = 1024, repeats: int = 5) -> dict[str, float]:
    """Return products and bytes per second of large matrix products and of a copy, in turns.

    Names are fp32, bf16, int8 (products per second) and copy (bytes read and written).
    """
    one = torch.ones(size, size, device=device)
    half, whole = one.bfloat16(), one.to(torch.int8)
    data = torch.ones(1 << 26, device=device)
    into = torch.empty_like(data)
    calls: dict[str, Callable[[], Any]] = {
        "fp32": lambda: one @ one,
        "bf16": lambda: half @ half,
        "int8": lambda: torch._int_mm(whole, whole.t()),
        "copy": lambda: into.copy_(data),
    }
    timings = measure_many(calls, min_time_s=0.05, repeats=repeats, device=device)
    rates = {name: size**3 / timing.min for name, timing in timings.items()}
    return rates | {"copy": 2 * data.nbytes / timings["copy"].min}


def compare(
    candidates: Mapping[str, Callable[[], Any]], *, repeats: int, device: str
) -> dict[str, tuple[Timing, tuple[float, float, float]]]:
    """Time calls in turns; return each with quartiles of the first one's time over its own."""
    import numpy as np

    timings = measure_many(candidates, min_time_s=0, repeats=repeats, warmup=2, device=device)
    base = np.array(next(iter(timings.values())).samples)
    return {
        name: (timing, tuple(np.percentile(base / timing.samples, [25, 50, 75]).tolist()))
        for name, timing in timings.items()
    }


def benchmark_model(
    config: BenchConfig,
    conditioning: Conditioning,
    *,
    device: str = "cpu",
    say: Callable[[str], None] = lambda _: None,
) -> BenchResult:
    """Time a quantized model in its modes against the original.

    Raises:
        InputError: a model cannot be opened, or is not quantized.
        ConfigError: conditions are missing, or there is no scheduler.
    """
    say(f"opening {config.model}")
    source, steps = open_packed(config.model, "packed")
    steps = steps if config.steps is None else config.steps
    settings = MPQDMConfig(
        steps=max(steps, 1), guidance=config.guidance, batch_size=config.batch_size,
        seed=config.seed,
    )  # fmt: skip
    for part in (source.model, source.pipe):
        if part is not None:
            part.to(device)
    sampler = sampler_for(source, conditioning, settings)
    call = first_call(source.model, sampler)
    models, notes = _candidates(source, config, device, call)
    say(f"timing {', '.join(models)}: {config.repeats} calls each")
    calls = {name: _caller(model, call) for name, model in models.items()}
    with torch.no_grad():
        found = compare(calls, repeats=config.repeats, device=device)
        speeds = {}
        if steps:
            say(f"sampling {config.batch_size} images in {steps} steps")
            speeds = _sampling_rates(models, sampler, config, device)
        rates = machine_rates(device)
    work = work_of(next(iter(models.values())), call)
    rows = [
        _row(name, models[name], timing, quartiles, work, rates)
        | {"images_per_s": speeds.get(name)}
        for name, (timing, quartiles) in found.items()
    ]
    threads = {"threads": float(torch.get_num_threads())}
    return BenchResult(rows=rows, machine=rates | threads, notes=notes)


def record_rows(
    out: Path, found: BenchResult, config: Any, *, device: str, command: Sequence[str]
) -> None:
    """Write the rows and the record of a benchmark."""
    out.mkdir(parents=True, exist_ok=True)
    with (
        RunRecord(out, package="mpq-dm", command=command, config=config, device=device) as record,
        JsonlStream(out / "rows.jsonl") as stream,
    ):
        for row in found.rows:
            stream.append(row)
            for key, unit in (("seconds", "s"), ("speedup", "1"), ("weight_bytes", "B")):
                better = "higher" if key == "speedup" else "lower"
                record.metric(f"{key}/{row['candidate']}", row[key], unit=unit, better=better)
        for name, value in found.machine.items():
            record.metric(f"machine/{name}", value, unit="B/s" if name == "copy" else "1/s")
        for text in found.notes:
            record.note(text)
        record.artefact(out / "rows.jsonl")


def _candidates(
    source: Source, config: BenchConfig, device: str, call: Call
) -> tuple[dict[str, Any], list[str]]:
    """Return the models by name, baselines first, and notes."""
    notes: list[str] = []
    if config.against is None:
        notes.append("the original is one of the same config with random weights")
        about = {k: v for k, v in source.model.config.items() if k != "quantization_config"}
        original = type(source.model).from_config(about).eval()
    else:
        original = open_source(config.against).model
    original.to(device)
    models: dict[str, Any] = {}
    for name in config.baselines:
        kind, _, compiled = name.partition("-")
        model = original if kind == "fp32" else _in_bf16(original)
        if compiled:
            model = model if model is not original else copy.deepcopy(original)
            model.compile()
        models[name] = model
    for mode in config.modes:
        models[mode] = copy.deepcopy(source.model)
        set_mode(models[mode], mode)
    if config.peers:
        notes += _add_peers_(models, original, call)
    return models, notes


def _add_peers_(models: dict[str, Any], original: Any, call: Call) -> list[str]:
    """Add the peers that run this model; return why others do not."""
    notes = []
    for name in peers.PEERS:
        try:
            model = peers.quantized_by(name, original)
            with torch.no_grad():
                model(*call[0], **call[1])
        except MissingExtraError as error:
            notes.append(str(error))
        except Exception as error:  # whatever a library raises for layers it does not know
            text = " ".join(str(error).split())[:200]
            notes.append(f"{name}: {type(error).__name__}: {text}")
        else:
            models[name] = model
    return notes


def _in_bf16(original: Any) -> Any:
    """Return a copy in bfloat16 that takes and gives float32, as samplers want."""
    model = copy.deepcopy(original).to(torch.bfloat16)

    def halve(_: Any, args: Any, kwargs: Any) -> Any:
        return _moved(args, _to_bf16), _moved(kwargs, _to_bf16)

    def widen(_: Any, args: Any, kwargs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return tuple(part.float() for part in output)
        return first_tensor(output).float(),  # fmt: skip

    model.register_forward_pre_hook(halve, with_kwargs=True)
    model.register_forward_hook(widen, with_kwargs=True)
    return model


def _to_bf16(value: Tensor) -> Tensor:
    return value.bfloat16() if value.is_floating_point() and value.dim() > 1 else value


def _moved(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply a change to all tensors in arguments."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {name: _moved(part, change) for name, part in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_moved(part, change) for part in value)
    return value


def _caller(model: Any, call: Call) -> Callable[[], Tensor]:
    args, kwargs = call
    return lambda: first_tensor(model(*args, **kwargs))


def _sampling_rates(
    models: Mapping[str, Any], sampler: Sampler, config: BenchConfig, device: str
) -> dict[str, float]:
    """Return images per second of whole trajectories."""
    calls = {
        name: (lambda model=model: sampler.trajectory(model, 0)) for name, model in models.items()
    }
    timings = measure_many(
        calls, min_time_s=0, repeats=max(1, config.repeats // 3), warmup=1, device=device
    )
    return {name: config.batch_size / timing.median for name, timing in timings.items()}


def _row(
    name: str,
    model: nn.Module,
    timing: Timing,
    quartiles: tuple[float, float, float],
    work: Work,
    rates: Mapping[str, float],
) -> dict[str, Any]:
    kind = "int8" if name in ("int8", "packed") else "bf16" if name.startswith("bf16") else "fp32"
    width = 2 if kind == "bf16" else 4
    resident = resident_bytes(model)
    limits = {
        f"{kind} products": work.macs / rates[kind],
        "memory": (resident + width * work.values) / rates["copy"],
    }
    bound = max(limits, key=limits.__getitem__)
    return {
        "candidate": name, "seconds": timing.median, "seconds_q1": timing.q1,
        "seconds_q3": timing.q3, "speedup": quartiles[1], "speedup_q1": quartiles[0],
        "speedup_q3": quartiles[2], "repeats": timing.repeats, "weight_bytes": resident,
        "macs": work.macs, "values": work.values, "bound_seconds": limits[bound],
        "bound_by": bound,
    }  # fmt: skip
