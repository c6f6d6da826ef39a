# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: T201  (stdout carries the result)
"""The verb `bench`: how fast a quantized model is beside the original, and what bounds it.

Nothing heavy is imported until it runs.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tenfold_core.errors import ConfigError
from tenfold_core.run.cli import Positional, option

from mpq_dm.cli_options import NO_CONDITIONS, Conditions, Device, Json, Model, Quiet, say

__all__ = ["BASELINES", "BenchConfig", "bench", "bench_table"]

BASELINES = ("fp32", "bf16", "fp32-compiled", "bf16-compiled")
"""Ways to run the original."""
_MODES = ("int8", "packed", "dequant")  # of mpq_dm.packed, which imports torch

Out = Annotated[Path | None, option("-o", metavar="DIR", help="folder for the record and the rows")]
Original = Annotated[str | None, option(metavar="MODEL")]
Modes = Annotated[str, option(metavar="int8,packed,dequant", help="ways to compute products")]
Baselines = Annotated[str, option(metavar=",".join(BASELINES), help="ways to run the original")]

COLUMNS = ("candidate", "ms", "quartiles", "speed-up", "quartiles of it", "images/s", "MB",
           "GMAC/s", "bound ms", "bound by")  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchConfig:
    """What is timed, and how often."""

    model: str
    against: str | None = None
    """The original; by default a model of the same config with random weights."""
    modes: tuple[str, ...] = _MODES
    baselines: tuple[str, ...] = ("fp32",)
    """The first one is what all others are compared with."""
    peers: bool = False
    """Time the libraries of the extra [bench] as well, those that are installed."""
    batch_size: int = 4
    steps: int | None = None
    """Sampling steps for images per second; None for those of calibration, 0 for none."""
    guidance: float = 1.0
    repeats: int = 10
    """Timed calls of each candidate; whole samplings are repeated a third as often."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (("modes", _MODES), ("baselines", BASELINES)):
            value = getattr(self, name)
            if not value or len(set(value)) != len(value) or not set(value) <= set(allowed):
                raise ConfigError(
                    f"{name} is {','.join(value)!r}, expected some of {','.join(allowed)}"
                )
        for name, least in (("batch_size", 1), ("repeats", 3), ("steps", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} is {value}, expected {least} or more")


def bench(
    model: Positional[Model],
    *,
    against: Original = None,
    out: Out = None,
    modes: Modes = "int8,packed,dequant",
    baselines: Baselines = "fp32",
    peers: bool = False,
    batch_size: int = 4,
    steps: int | None = None,
    guidance: float = 1.0,
    repeats: int = 10,
    conditions: Conditions = NO_CONDITIONS,
    seed: int = 0,
    device: Device = "auto",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Time a quantized model beside the original, taking turns in one process.

    Args:
        model: folder of a quantized pipeline or denoiser.
        against: the original; by default its architecture with random weights, as fast.
        out: folder for the record and the rows.
        modes: which of int8, packed and dequant.
        baselines: which of fp32, bf16, fp32-compiled and bf16-compiled; the first is the measure.
        peers: time the libraries of the extra [bench] that are installed as well.
        batch_size: images sampled together.
        steps: sampling steps for images per second; by default those of calibration, 0 for none.
        guidance: scale of classifier-free guidance.
        repeats: timed calls of each candidate.
        conditions: labels, prompts or embeddings to sample with.
        seed: seed of noises and conditions.
        device: where to compute.
        as_json: print one line of JSON instead of a table.
        quiet: no progress on stderr.
    """
    config = BenchConfig(
        model=model, against=against, modes=tuple(modes.split(",")), peers=peers,
        baselines=tuple(baselines.split(",")), batch_size=batch_size, steps=steps,
        guidance=guidance, repeats=repeats, seed=seed,
    )  # fmt: skip
    from tenfold_core.device import resolve

    from mpq_dm.benchmarking import benchmark_model, record_rows

    place = str(resolve(device, via="torch"))
    found = benchmark_model(
        config, conditions.read(), device=place, say=lambda text: say(text, quiet)
    )
    if out is not None:
        record_rows(out, found, config, device=place, command=["mpq-dm", *sys.argv[1:]])
    if as_json:
        print(json.dumps({"rows": found.rows, "machine": found.machine, "notes": found.notes}))
        return
    from tenfold_core.run.report import print_table

    print_table(COLUMNS, bench_table(found.rows), stream=sys.stdout)
    print("\n".join(found.lines()))


def bench_table(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return the cells of the table, one line for each candidate."""
    return [
        [
            row["candidate"],
            f"{1e3 * row['seconds']:.4g}",
            f"{1e3 * row['seconds_q1']:.4g} to {1e3 * row['seconds_q3']:.4g}",
            f"{row['speedup']:.2f}",
            f"{row['speedup_q1']:.2f} to {row['speedup_q3']:.2f}",
            "" if row["images_per_s"] is None else f"{row['images_per_s']:.3g}",
            f"{row['weight_bytes'] / 1e6:.4g}",
            f"{row['macs'] / row['seconds'] / 1e9:.4g}",
            f"{1e3 * row['bound_seconds']:.3g}",
            row["bound_by"],
        ]
        for row in rows
    ]
