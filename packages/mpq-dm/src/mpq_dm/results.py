# SPDX-License-Identifier: Apache-2.0
"""The tables of the README, made from committed results."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tenfold_core.errors import InputError
from tenfold_core.run.report import markdown_table
from tenfold_core.run.rows import read_jsonl

__all__ = ["demo_table", "planted_table", "readme_table"]

Rows = Sequence[Mapping[str, Any]]


def readme_table(results: Path, path: Path, name: str) -> str:
    """Return the table of that name as Markdown.

    Raises:
        InputError: no such table, or its results are missing.
    """
    folder, _, table = name.partition("/")
    makers = {"table": demo_table, "short": short_table, "planted": planted_table,
              "targets": target_table}  # fmt: skip
    if table not in makers:
        raise InputError(f"{path}: table {name!r}, expected one of {', '.join(makers)}")
    files = sorted((results / folder).rglob("rows.jsonl"))
    if not files:
        raise InputError(f"{path}: table {name!r} needs rows in {results / folder}, none are there")
    return makers[table]([row for file in files for row in read_jsonl(file)])


def demo_table(rows: Rows) -> str:
    """Return the demonstration's table: one line a model, over all seeds of the run."""
    models: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        if "method" in row:
            models.setdefault((row["bits"], row["method"]), []).append(row)
    seeds = max(len(found) for found in models.values())
    lines = []
    for (bits, method), found in models.items():
        first = found[0]
        name = method if bits == "FP" else f"{bits} {method}"
        errors = [1000 * row["error"] for row in found]
        spread = (
            f"[{1000 * first['error_low']:.1f}, {1000 * first['error_high']:.1f}]"
            if len(found) == 1
            else f"({min(errors):.1f} to {max(errors):.1f})"
        )
        lines.append([
            name, f"{first['bits_per_weight']:.2f}", f"{np.mean(errors):.1f} {spread}",
            f"{np.mean([row['frechet'] for row in found]):.2f}",
            f"{np.mean([row['accuracy'] for row in found]):.3f}",
        ])  # fmt: skip
    what = "95 % CI" if seeds == 1 else f"range of {seeds} seeds"
    columns = ("model", "bits/weight", f"trajectory error x 1000 ({what})", "FD", "accuracy")
    return markdown_table(columns, lines)


def short_table(rows: Rows) -> str:
    """Return the demonstration's table at its two hardest settings."""
    return demo_table([row for row in rows if row.get("bits") in ("FP", "W3A4", "W2A6")])


def planted_table(rows: Rows) -> str:
    """Return the table of layers whose outliers are known: kurtosis and exact, by bits."""
    cases: dict[str, list[str]] = {}
    for row in rows:
        if "case" in row:
            gains = [f"{-100 * row[f'gain_{name}']:+.0f}" for name in ("kurtosis", "exact")]
            cases.setdefault(row["case"], [row["case"]]).append(" / ".join(gains) + " %")
    columns = ("100 rows of 512 weights (kurtosis / exact)", "W2", "W3", "W4")
    return markdown_table(columns, list(cases.values()))


def target_table(rows: Rows) -> str:
    """Return a benchmark's figures that have a target; of packing, that of 2 bits."""
    lines = [
        [
            row["figure"], f"{row['value']:.3g} {row['unit']}", row["target"],
            "met" if row["met"] else "missed",
        ]
        for row in rows
        if row.get("target") and not re.match(r"(un)?pack [1348] ", row["figure"])
    ]  # fmt: skip
    return markdown_table(("figure", "found", "target", "verdict"), lines)
