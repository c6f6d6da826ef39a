# SPDX-License-Identifier: Apache-2.0
"""Tables from the rows of a benchmark on a GPU; `report` prints and places them."""

from collections.abc import Mapping, Sequence
from typing import Any

from tenfold_core.run.report import markdown_table

from hbp_spmv.gpu_ablation import HASHES
from hbp_spmv.gpu_evaluate import LIBRARIES
from hbp_spmv.gpu_summary import graph_time
from hbp_spmv.summary import geomean

__all__ = ["ablation_table", "best_table", "gpu_product_table"]

Rows = Sequence[Mapping[str, Any]]


def gpu_product_table(rows: Rows, dtype: str, *, cold: bool, column: str = "us") -> str:
    """Write one time of all formats and matrices as Markdown, in microseconds.

    Args:
        rows: rows of a benchmark.
        dtype: float32 or float64.
        cold: those with overwritten caches.
        column: `us`, a call, or `graph_us`, in a CUDA graph.
    """
    part = [row for row in rows if (row["dtype"], bool(row["cold"])) == (dtype, cold)]
    formats = list(dict.fromkeys(row["format"] for row in part))
    by_matrix: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in part:
        by_matrix.setdefault(row["matrix"], {})[row["format"]] = row
    lines = []
    for matrix, found in by_matrix.items():
        facts = next(iter(found.values()))
        times = {name: row[column] for name, row in found.items() if row[column]}
        cells = [_digits(times.get(name)) for name in formats]
        lines.append([matrix, facts["nnz"], f"{facts['row_cv']:.2f}", *cells, *_auto(found, times)])
    columns = ["matrix", "nnz", "cv", *formats, "auto took", "% copy", "x library"]
    return markdown_table(columns, lines)


def _auto(found: Mapping[str, Mapping[str, Any]], times: Mapping[str, float]) -> list[str]:
    """Say what `auto` took, its share of the copy bandwidth and how it compares with libraries."""
    auto = found.get("auto", {})
    if "auto" not in times:
        return [auto.get("layout") or "-", "-", "-"]
    percent = auto["copy_percent"] * auto["us"] / times["auto"]
    best = min((v for v in LIBRARIES if v in times), key=times.__getitem__, default=None)
    against = "-" if best is None else f"{times[best] / times['auto']:.2f} ({best})"
    return [auto["layout"] or "-", _digits(percent), against]


def ablation_table(rows: Rows) -> str:
    """Write, per row order, the time over the best of each matrix, averaged geometrically.

    The number of matrices follows where a combination does not exist on all of them.
    """
    measured = [row for row in rows if row["us"]]
    best: dict[str, float] = {}
    for row in measured:
        best[row["matrix"]] = min(graph_time(row), best.get(row["matrix"], float("inf")))
    kinds = dict.fromkeys((row["strips"], row["schedule"], row["index"]) for row in rows)
    lines = []
    for kind in kinds:
        cells = []
        for order in HASHES:
            ratios = [
                graph_time(row) / best[row["matrix"]]
                for row in measured
                if (row["strips"], row["schedule"], row["index"]) == kind and row["hash"] == order
            ]
            mean = geomean(ratios)
            count = f" ({len(ratios)})" if len(ratios) < len(best) else ""
            cells.append("-" if mean is None else f"{mean:.2f}{count}")
        strips, schedule, index = kind
        allocation = ("fixed runs" + (", ticket" if schedule == "mixed" else "")) if strips else "-"
        lines.append([str(strips or "none"), allocation, index, *cells])
    return markdown_table(["strips", "allocation", "index", *HASHES], lines)


def best_table(rows: Rows) -> str:
    """Write the fastest combination of each matrix, and that of the default order, as Markdown."""
    lines = []
    for matrix in dict.fromkeys(row["matrix"] for row in rows):
        part = [row for row in rows if row["matrix"] == matrix]
        found = [row for row in part if row["us"]]
        left_out = len(part) - len(found)
        if not found:
            lines.append([matrix, part[0]["nnz"], "-", "-", "-", "-", left_out])
            continue
        best = min(found, key=graph_time)
        names = [best["hash"], best["schedule"], f"strips {best['strips'] or 'none'}"]
        lines.append(
            [
                matrix, best["nnz"], f"{best['row_cv']:.2f}", ", ".join([*names, best["index"]]),
                _digits(graph_time(best)), best["detail"], left_out,
            ]
        )  # fmt: skip
    columns = ["matrix", "nnz", "cv", "fastest", "us", "stored", "left out or failed"]
    return markdown_table(columns, lines)


def _digits(value: float | None) -> str:
    """Write a number with three significant digits and no exponent."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
