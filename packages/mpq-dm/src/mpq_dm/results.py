# SPDX-License-Identifier: Apache-2.0
"""The tables of the README, made from committed results."""

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
    file = results / folder / "rows.jsonl"
    makers = {"table": demo_table, "planted": planted_table, "figures": figure_table}
    if table not in makers:
        raise InputError(f"{path}: table {name!r}, expected one of {', '.join(makers)}")
    if not file.exists():
        raise InputError(f"{path}: table {name!r} needs {file}, which is missing")
    return makers[table](read_jsonl(file))


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


def planted_table(rows: Rows) -> str:
    """Return the table of layers whose outliers are known."""
    lines = [
        [
            row["case"], f"W{row['bits']}", f"{-100 * row['gain_kurtosis']:+.0f} %",
            f"{-100 * row['gain_exact']:+.0f} %",
        ]
        for row in rows
        if "case" in row
    ]  # fmt: skip
    return markdown_table(("100 rows of 512 weights", "bits", "by kurtosis", "exact"), lines)


def figure_table(rows: Rows) -> str:
    """Return a benchmark's figures with their targets."""
    lines = [
        [row["figure"], row["found"], row["target"], row["verdict"]]
        for row in rows
        if "verdict" in row
    ]
    return markdown_table(("figure", "found", "target", "verdict"), lines)
