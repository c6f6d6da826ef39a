# SPDX-License-Identifier: Apache-2.0
"""Other libraries on the model of the demonstration, beside our rounding at the same bits.

Every model samples the images of the full-precision model again, from the same noises and labels;
the error is the mean squared difference of the final images, with its bootstrap interval over
noises. Bytes are those that torch.save writes of its state. The peers round weights without data,
and all but those named by int8 leave the inputs in float32; ours rounds the inputs to 8 bits too,
by plain rounding (rtn-mse) and with scales of each sampling step (stepwise-mse), untrained both.
torchao takes linear layers only, so most weights of this model stay in float32 there.
SDNQ runs without its compiled kernels, ours in mode packed, the slowest for layers this small.

Writes results/peers and peers.md. Needs the extra [bench]; what is not installed is noted.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from mpq_dm import peers
from mpq_dm.benchmarking import resident_bytes
from mpq_dm.config import method_config
from mpq_dm.demo_model import demo_sampler, load_demo
from mpq_dm.method import quantize
from mpq_dm.metrics import bootstrap_ci, paired_error
from mpq_dm.packed import set_mode
from mpq_dm.sampler import Sampler
from tenfold_core.errors import MissingExtraError
from tenfold_core.run.cli import main
from tenfold_core.run.record import RunRecord
from tenfold_core.run.report import markdown_table
from tenfold_core.run.rows import JsonlStream
from tenfold_core.run.seeds import generator
from tenfold_core.run.timing import measure_many
from torch import Tensor

RESULTS = Path(__file__).parent / "results"
STEPS, BITS, METHODS = 8, (4, 3, 2), ("rtn-mse", "stepwise-mse")
COLUMNS = ("model", "bits", "error", "95 % interval", "kB", "ms a call")


def run(*, samples: int = 200, out: Path = RESULTS, device: str = "cpu") -> None:
    """Compare errors, bytes and times, and write the record.

    Args:
        samples: noises.
        out: folder of the results.
        device: cpu; there is nothing to do here for another one.
    """
    if device != "cpu":
        print(f"bench_peers.py measures on the CPU; nothing to do with --device={device}")
        return
    os.environ.setdefault("SDNQ_USE_TORCH_COMPILE", "0")  # minutes for a model this small
    model, scheduler = load_demo()
    sampler = demo_sampler(scheduler=scheduler, steps=STEPS, batch_size=samples, seed=1_000_003)
    models, notes = candidates(model, scheduler)
    exact = sampler.trajectory(model, 0)
    rows = [row(name, found, bits, exact, sampler) for name, (found, bits) in models.items()]
    times = latencies({name: found for name, (found, _) in models.items()})
    folder = out / "peers"
    config = {"samples": samples, "steps": STEPS, "threads": torch.get_num_threads()}
    config |= {"peers": peers.versions()}
    folder.mkdir(parents=True, exist_ok=True)
    with (
        RunRecord(folder, package="mpq-dm", command=["bench_peers.py", *sys.argv[1:]],
                  config=config) as record,
        JsonlStream(folder / "rows.jsonl") as stream,
    ):  # fmt: skip
        for found in rows:
            found["seconds"] = times[found["model"]]
            stream.append(found)
            record.metric(f"error/{found['model']}", found["error"], unit="1", better="lower")
        for text in notes:
            record.note(text)
        record.artefact(folder / "rows.jsonl")
    table = markdown_table(COLUMNS, [cells(found) for found in rows])
    about = "\n\n".join((__doc__ or "").split("\n\n")[1:-1])
    versions = ", ".join(f"{name} {value}" for name, value in peers.versions().items())
    text = "\n\n".join(["# Beside other libraries", about, f"Versions: {versions}.", *notes, table])
    (out / "peers.md").write_text(text + "\n", encoding="utf-8")
    print(table, *notes, sep="\n")


def candidates(model: Any, scheduler: Any) -> tuple[dict[str, tuple[Any, int]], list[str]]:
    """Return models with their bits by name, and why peers are missing."""
    models: dict[str, tuple[Any, int]] = {"float32": (model, 32)}
    notes = []
    for name, peer in peers.PEERS.items():
        try:
            models[name] = peers.quantized_by(name, model), peer.bits
        except MissingExtraError as error:
            notes.append(str(error))
    for bits in BITS:
        for method in METHODS:
            config = method_config(
                method, weight_bits=bits, act_bits=8, steps=STEPS, batch_size=32, calib_samples=32
            )
            ours = demo_sampler(scheduler=scheduler, steps=STEPS, batch_size=32, seed=0)
            packed = quantize(model, config, sampler=ours).model
            set_mode(packed, "packed")
            models[f"ours, {method} W{bits}A8"] = packed, bits
    return models, notes


@torch.no_grad()
def row(name: str, model: Any, bits: int, exact: Tensor, sampler: Sampler) -> dict[str, Any]:
    """Return what one model lost and how large it is."""
    errors = paired_error(exact.numpy(), sampler.trajectory(model, 0).float().numpy())
    interval = bootstrap_ci(errors, generator(0, "peers/bootstrap"))
    return {
        "model": name, "bits": bits, "error": interval.value, "error_low": interval.low,
        "error_high": interval.high, "bytes": resident_bytes(model),
        "stored_bytes": peers.stored_bytes(model),
    }  # fmt: skip


@torch.no_grad()
def latencies(models: dict[str, Any]) -> dict[str, float]:
    """Return the median seconds of a call with 16 images, all models in turns."""
    x, labels = torch.randn(16, 1, 8, 8), torch.arange(16) % 10
    calls = {
        name: (lambda model=model: model(x, 500, class_labels=labels, return_dict=False)[0])
        for name, model in models.items()
    }
    timings = measure_many(calls, min_time_s=0, repeats=10, warmup=2)
    return {name: timing.median for name, timing in timings.items()}


def cells(found: dict[str, Any]) -> list[str]:
    """Return a line of the table."""
    return [
        found["model"], str(found["bits"]), f"{found['error']:.4g}",
        f"{found['error_low']:.3g} to {found['error_high']:.3g}",
        f"{found['stored_bytes'] / 1e3:.4g}", f"{1e3 * found['seconds']:.3g}",
    ]  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main("bench_peers.py", run, package="mpq-dm"))
