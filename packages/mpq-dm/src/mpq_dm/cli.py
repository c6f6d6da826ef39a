# SPDX-License-Identifier: Apache-2.0
"""The command line: `mpq-dm VERB ...`.

stdout carries the result, stderr everything else; `--json` prints exactly one line.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from tenfold_core.run.cli import Positional, option
from tenfold_core.run.cli import main as run_command

from mpq_dm.config import MixConfig

__all__ = ["main"]

Json = Annotated[bool, option(name="json", help="print one line of JSON instead of a table")]
Quiet = Annotated[bool, option(help="no progress on stderr")]
Out = Annotated[Path | None, option("-o", metavar="DIR", help="folder for the record and the rows")]


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


_VERBS = {"demo": demo, "analyze": analyze}


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
