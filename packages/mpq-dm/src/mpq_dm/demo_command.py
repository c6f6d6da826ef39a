# SPDX-License-Identifier: Apache-2.0
"""The command `demo`: run the tables, say what they show, and leave the record and the pictures."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from tenfold_core.run.record import RunRecord
from tenfold_core.run.rows import JsonlStream, plain

from mpq_dm.demo import SETTINGS, Demo, claims, rows
from mpq_dm.planted import compare

__all__ = ["DemoResult", "run_demo"]

GRID = ("rtn-minmax", "stepwise-mse", "efficientdm", "mpq-dm", "mpq-dm-exact")
_TITLE = "{samples} images of {steps} steps each, from the same noise as the full-precision model's"


@dataclass
class DemoResult:
    """What the demonstration prints."""

    tables: list[tuple[str, Sequence[str], list[Sequence[Any]]]] = field(default_factory=list)
    """Title, columns and cells."""
    lines: list[str] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)


def run_demo(
    out: Path | None,
    *,
    seed: int = 0,
    seeds: int = 1,
    retrain: bool = False,
    settings: Mapping[tuple[int, int], Sequence[str]] = SETTINGS,
    workers: int = 1,
    say: Callable[[str], None] = lambda _: None,
    command: Sequence[str] = (),
    **options: Any,
) -> DemoResult:
    """Run the demonstration.

    Args:
        out: folder for run.json, rows.jsonl and grid.png, if any.
        seed: the first seed.
        seeds: number of seeds.
        retrain: train the diffusion model first.
        settings: bits and the methods shown there.
        workers: processes to share the rows.
        say: told what is going on.
        command: the command line, for the record.
        **options: settings of `Demo`.
    """
    result = DemoResult()
    with ExitStack() as stack:
        record = stream = None
        if out is not None:
            record = stack.enter_context(
                RunRecord(out, package="mpq-dm", command=command, config=options, seed=seed)
            )
            out.mkdir(parents=True, exist_ok=True)
            stream = stack.enter_context(JsonlStream(out / "rows.jsonl"))
        if retrain:
            options |= _retrained(stack, out, seed, say)
        table: list[dict[str, Any]] = []
        found: list[dict[str, Any]] = []
        demo = None
        for number in range(seed, seed + seeds):
            demo = Demo(seed=number, **options)
            part = []
            for row in rows(demo, settings, workers=workers):
                part.append({"seed": number, **row})
                say(f"seed {number}: {row['bits']} {row['method']}, {row['seconds']:.1f} s")
                if stream is not None:
                    stream.append(plain(part[-1]))
            found.append(claims(demo, part))
            table += part
            result.tables.append((_title(demo, number, seeds), _COLUMNS, [_cells(r) for r in part]))
        _planted(result, seed, stream)
        _say_claims(result, found, table)
        if record is not None and out is not None and demo is not None:
            for name, value in result.numbers.items():
                record.metric(name, value, unit="1")
            demo.save_grid(out / "grid.png", GRID)
            for name in ("rows.jsonl", "grid.png"):
                record.artefact(out / name)
    return result


_COLUMNS = (
    "model", "bits/weight", "trajectory error x 1000 [95 % CI]", "Frechet distance",
    "class accuracy", "seconds",
)  # fmt: skip


def _title(demo: Demo, seed: int, seeds: int) -> str:
    title = _TITLE.format(samples=demo.samples, steps=demo.evaluation.steps)
    return title if seeds == 1 else f"seed {seed}: {title}"


def _cells(row: Mapping[str, Any]) -> list[str]:
    low, mean, high = (1000 * row[f"error{part}"] for part in ("_low", "", "_high"))
    name = row["method"] if row["bits"] == "FP" else f"{row['bits']} {row['method']}"
    return [
        name, f"{row['bits_per_weight']:.2f}", f"{mean:.2f} [{low:.2f}, {high:.2f}]",
        f"{row['frechet']:.2f}", f"{row['accuracy']:.3f}", f"{row['seconds']:.1f}",
    ]  # fmt: skip


def _say_claims(
    result: DemoResult, found: Sequence[Mapping[str, Any]], table: Sequence[Mapping[str, Any]]
) -> None:
    """Put the claims into lines and numbers; over several seeds, their mean and range."""
    for name in found[0]:
        values = [claim[name] for claim in found]
        if name.startswith("fine_tuning_ratio"):
            result.numbers[name] = float(np.mean(values))
            spread = f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
            result.lines.append(
                f"{name.rsplit('_', 1)[1]}: fine-tuning divides the trajectory error of rounding "
                f"by {np.mean(values):.2f}{spread}"
            )
            continue
        ours, bits = name.split("_minus_efficientdm_")
        for claim in values:
            low, mean, high = (1000 * claim[key] for key in ("low", "difference", "high"))
            verdict = "less" if high < 0 else "more" if low > 0 else "no difference"
            spent = " against ".join(
                f"{row['bits_per_weight']:.2f}"
                for name in (ours, "efficientdm")
                for row in [
                    next(row for row in table if (row["bits"], row["method"]) == (bits, name))
                ]
            )
            result.lines.append(
                f"{bits}: error of {ours} minus efficientdm's at equal steps, {spent} bits a "
                f"weight: {mean:+.2f} [{low:+.2f}, {high:+.2f}] x 1000, {verdict}"
            )
        result.numbers[name] = float(np.mean([claim["difference"] for claim in values]))
    result.lines.append(
        "Intervals are over noises, for one fine-tuning each; another seed of fine-tuning may move "
        "an error by as much."
    )
    for key in dict.fromkeys((row["bits"], row["method"]) for row in table):
        same = [row for row in table if (row["bits"], row["method"]) == key]
        for name in ("error", "frechet"):
            result.numbers[f"{name}_{'_'.join(key)}"] = float(np.mean([r[name] for r in same]))


def _planted(result: DemoResult, seed: int, stream: JsonlStream | None) -> None:
    """Add the table of layers whose outliers are known."""
    cells: list[Sequence[Any]] = []
    for row in compare(seed):
        if stream is not None:
            stream.append(row)
        if row["case"] == "30 heavy rows":
            for name in ("kurtosis", "exact"):
                result.numbers[f"planted_gain_{name}_w{row['bits']}"] = row[f"gain_{name}"]
        cells.append([
            row["case"], row["bits"], f"{row['uniform']:.2f}",
            f"{row['kurtosis']:.2f} ({-100 * row['gain_kurtosis']:+.0f} %)",
            f"{row['exact']:.2f} ({-100 * row['gain_exact']:+.0f} %)", f"{row['moved']:.0f}",
        ])  # fmt: skip
    columns = ("layer of 100 rows", "bits", "uniform", "by kurtosis", "exact", "rows moved up")
    title = "Planted outliers: weight error, mean of 5 layers"
    result.tables.append((title, columns, list(cells)))


def _retrained(
    stack: ExitStack, out: Path | None, seed: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Train the models of the demonstration and return them as options of `Demo`."""
    from mpq_dm.demo_model import train_assets

    folder = Path(stack.enter_context(TemporaryDirectory())) if out is None else out
    place = folder / "trained"

    def told(step: int, loss: float) -> None:
        if step % 500 == 0:
            say(f"training: step {step}, loss {loss:.4f}")

    train_assets(place, seed=seed, progress=told)
    return {"folder": place}
