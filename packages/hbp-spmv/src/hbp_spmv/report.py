# SPDX-License-Identifier: Apache-2.0
"""Tables and the roofline plot from the rows of a benchmark.

`python -m hbp_spmv.report [--check] packages/hbp-spmv` rewrites, in README.md and in
benchmarks/results/*.md, what stands between `<!-- results: FOLDER/TABLE -->` and the next
`<!-- /results -->`. FOLDER lies in benchmarks/results; TABLE is `claims`, `reorder`,
`sizes` or, for a type and a number of threads, such as `products-f64-1`. A folder of a GPU has
`claims`, `ablation`, `fastest`, and such as `products-f64-hot` and `graphs-f64-cold`.
"""

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tenfold_core.errors import InputError
from tenfold_core.run.cli import Positional, main
from tenfold_core.run.report import ACCENT, BASELINE, figure, markdown_table, print_table
from tenfold_core.run.results import rewrite_tables

from hbp_spmv.summary import FOREIGN, LEAST_SPEED_UP, LEFT_OUT, Claim, claims

__all__ = [
    "CASE_COLUMNS",
    "GPU_CASE_COLUMNS",
    "ORDER_COLUMNS",
    "case_cells",
    "case_printer",
    "case_title",
    "claim_lines",
    "claim_table",
    "machine_line",
    "order_cells",
    "print_facts",
    "print_json",
    "print_metrics",
    "product_table",
    "regenerate",
    "reorder_table",
    "roofline",
    "size_slope",
    "size_table",
    "verdict",
]

Row = Mapping[str, Any]

CASE_COLUMNS = (
    "format", "KB", "build ms", "us", "p10", "p90", "GFLOP/s", "GB/s", "% copy", "err/bound",
    "x scipy", "x library", "pays after",
)  # fmt: skip
"""What `hbp-bench` prints for each format."""
GPU_CASE_COLUMNS = (
    "format", "KB", "build ms", "us", "p10", "p90", "graph us", "GFLOP/s", "GB/s", "% copy",
    "err/bound", "x library", "pays after",
)  # fmt: skip
"""The same on a GPU."""
_SHORT = {"float64": "f64", "float32": "f32"}


def case_title(rows: Sequence[Row]) -> str:
    """Say what the rows of one case have in common."""
    row = rows[0]
    threads = f"{row['threads']} thread{'s' if row['threads'] > 1 else ''}"
    threads = threads if row["threads"] else row["device"]
    return (
        f"{row['matrix']}: {row['rows']} x {row['columns']}, {row['nnz']} nonzeros "
        f"({row['row_mean']:.1f} a row, cv {row['row_cv']:.2f}), {row['dtype']}, {threads}, "
        f"{'cold' if row['cold'] else 'hot'}"
    )


def case_cells(rows: Sequence[Row]) -> list[list[str]]:
    """Return a case as text cells, one line per format, in the order of its columns."""
    lines = []
    gpu = not rows[0]["threads"]
    for row in rows:
        name = f"{row['format']} ({row['layout']})" if row["format"] == "auto" else row["format"]
        if row["error"] is not None:
            what = "left out" if row["error"].startswith(LEFT_OUT) else "failed"
            lines.append([row["format"], what, *[""] * (len(CASE_COLUMNS) - 2)])
            continue
        after = "never" if row["breakeven"] is None else str(row["breakeven"])
        times = ["build_ms", "us", "us_p10", "us_p90", *(["graph_us"] if gpu else [])]
        ratios = ["over_vendor"] if gpu else ["over_scipy", "over_vendor"]
        lines.append(
            [
                name,
                f"{row['bytes'] / 1024:.0f}",
                *[_digits(row[column]) for column in (*times, "gflops", "gbs", "copy_percent")],
                f"{row['error_over_bound']:.2g}",
                *[_digits(row[column]) for column in ratios],
                after,
            ]
        )
    return lines


def verdict(rows: Sequence[Row]) -> list[str]:
    """Say what `auto` chose, how far from the best it was, and plainly when it loses."""
    lines = [_fault(row) for row in rows if row["error"] is not None]
    times = {row["format"]: row["us"] for row in rows if row["us"]}
    auto = next((row for row in rows if row["format"] == "auto" and row["us"]), None)
    foreign = rows[0]["foreign_cores"] or 0
    if foreign > FOREIGN:
        lines.append(f"other processes used {foreign:.1f} cores meanwhile: do not trust this table")
    found = rows[0]["speed_up"]
    if found is not None and found < LEAST_SPEED_UP:
        lines.append(
            f"a probe found these threads only {found:.1f} times as fast as one: the host shares "
            "its cores; do not trust this table"
        )
    if auto is None:
        return lines
    text = f"auto chose {auto['layout']}"
    if auto["regret_percent"] is not None:
        ours = [name for name in times if name == "auto" or name.startswith("hbp-")]
        best_ours = min(ours, key=times.__getitem__)
        text += f", regret {auto['regret_percent']:.1f} % (best of ours: {best_ours})"
    if auto["vendor"]:
        ratio = auto["over_vendor"]
        if ratio >= 1:
            text += f"; {ratio:.2f}x as fast as {auto['vendor']}"
        else:
            text += f"; HBP LOSES: {auto['vendor']} is {1 / ratio:.2f}x as fast as auto"
    best = min(times, key=times.__getitem__)
    if times[best] < times["auto"] and best != auto["vendor"] and not best.startswith("hbp-"):
        text += f"; fastest of all: {best}, {times['auto'] / times[best]:.2f}x as fast as auto"
    against = "csr-scipy" if auto["threads"] else auto["vendor"]
    if auto["breakeven"] is None and against:
        text += f"; the build never pays against {against}"
    return [*lines, text]


def _fault(row: Row) -> str:
    reason = row["error"].removeprefix(LEFT_OUT)
    return f"{row['format']} {'failed' if reason == row['error'] else 'left out'}: {reason}"


def product_table(rows: Sequence[Row], dtype: str, threads: int) -> str:
    """Write the times of all matrices in one type and thread count as Markdown, in microseconds."""
    part = [row for row in rows if (row["dtype"], row["threads"]) == (dtype, threads)]
    formats = [name for name in dict.fromkeys(row["format"] for row in part) if name != "auto"]
    by_matrix: dict[str, dict[str, Row]] = {}
    for row in part:
        by_matrix.setdefault(row["matrix"], {})[row["format"]] = row
    lines = []
    for matrix, found in by_matrix.items():
        auto = found.get("auto", {})
        facts = next(iter(found.values()))
        lines.append(
            [
                matrix, facts["nnz"], f"{facts['row_cv']:.2f}", _digits(auto.get("build_ms")),
                *[_digits(found[name]["us"] if name in found else None) for name in formats],
                f"{_digits(auto.get('us'))} ({auto.get('layout') or 'failed'})",
                _digits(auto.get("gflops")), _digits(auto.get("over_vendor")),
            ]
        )  # fmt: skip
    columns = ["matrix", "nnz", "cv", "build ms", *formats, "auto", "GFLOP/s", "x library"]
    return markdown_table(columns, lines)


ORDER_COLUMNS = (
    "matrix", "cv", "paper ms", "lut ms", "sort2D ms", "quicksort ms", "DP2D ms",
    "std fall paper", "lut", "sort2D",
)  # fmt: skip
"""What ordering the rows of all blocks costs, and by how much their spread in a group falls."""


def order_cells(reorderings: Sequence[Row]) -> list[list[str]]:
    """Return one line of text cells per matrix, in the order of `ORDER_COLUMNS`."""
    by_matrix: dict[str, dict[str, Row]] = {}
    for row in reorderings:
        by_matrix.setdefault(row["matrix"], {})[row["method"]] = row
    return [
        [
            matrix,
            f"{found['lut']['row_cv']:.2f}",
            *[
                _digits(found[name]["best_ms"])
                for name in ("paper", "lut", "sort", "quick", "DP2D")
            ],
            *[f"{found[name]['std_fall_percent']:.0f} %" for name in ("paper", "lut", "sort")],
        ]
        for matrix, found in by_matrix.items()
    ]


def reorder_table(reorderings: Sequence[Row]) -> str:
    """Write what ordering the rows of all blocks costs, per method, as Markdown."""
    return markdown_table(ORDER_COLUMNS, order_cells(reorderings))


def size_slope(rows: Sequence[Row], column: str) -> float:
    """Return the least-squares slope of the log of a time over the log of the nonzeros."""
    import numpy as np

    nnz, time = (np.log([row[name] for row in rows]) for name in ("nnz", column))
    return float(np.polyfit(nnz, time, 1)[0])


def size_table(rows: Sequence[Row]) -> str:
    """Write the cost per nonzero over sizes as Markdown, and its slope after each tier."""
    lines: list[list[str]] = []
    tiers = dict.fromkeys((row["tier"], row["layout"]) for row in rows)
    for tier, layout in tiers:
        part = [row for row in rows if (row["tier"], row["layout"]) == (tier, layout)]
        lines += [
            [
                tier, layout, str(row["nnz"]),
                _digits(row["build_ms"]), _digits(1e6 * row["build_ms"] / row["nnz"]),
                _digits(row["us"]), _digits(1e3 * row["us"] / row["nnz"]),
            ]
            for row in part
        ]  # fmt: skip
        slopes = [_judged(size_slope(part, column)) for column in ("build_ms", "us")]
        lines.append([tier, layout, "slope", "", slopes[0], "", slopes[1]])
    columns = ["tier", "layout", "nnz", "build ms", "ns a nonzero", "product us", "ns a nonzero"]
    return markdown_table(columns, lines)


def _judged(slope: float) -> str:
    """Return a slope and whether it is 1 within a tenth."""
    return f"{slope:.2f} ({'pass' if abs(slope - 1) <= 0.1 else 'miss'})"


def print_metrics(metrics: Mapping[str, tuple[float | None, str, str | None]]) -> None:
    """Print the figures of a record, one per line."""
    print()
    for name, (value, unit, _) in metrics.items():
        print(
            f"{name:<28} {'-' if value is None else f'{value:.4g}'} {unit if unit != '1' else ''}"
        )


def case_printer(*, silent: bool) -> Callable[[Sequence[Row], Any], None]:
    """Return a function that prints the rows of a case, the first time with the machine."""
    begun = silent

    def show(rows: Sequence[Row], calibration: Any) -> None:
        nonlocal begun
        if silent:
            return
        if not begun:
            gpu = None if rows[0]["threads"] else rows[0]["device"]
            print(machine_line(calibration.bandwidth, gpu=gpu))
        begun = True
        title = f"\n{case_title(rows)}"
        columns = CASE_COLUMNS if rows[0]["threads"] else GPU_CASE_COLUMNS
        print_table(columns, case_cells(rows), title=title, stream=sys.stdout)
        print("\n".join(verdict(rows)), flush=True)

    return show


def claim_table(found: Sequence[Claim]) -> str:
    """Write every claim with its target, what was found, and every loss, as Markdown."""
    words = {True: "pass", False: "miss", None: "not measured"}
    return markdown_table(
        ["claim", "target", "found", "verdict", "below the line"],
        [[c.text, c.target, c.found, words[c.passed], c.detail] for c in found],
    )


def claim_lines(found: Sequence[Claim]) -> list[str]:
    """Return every claim as a line of text."""
    words = {True: "pass", False: "MISS", None: "not measured"}
    return [
        f"{words[c.passed]:<5} {c.text}: {c.found}, target {c.target}"
        + (f"; below the line: {c.detail}" if c.detail else "")
        for c in found
    ]


def machine_line(bandwidth: Sequence[tuple[int, float]], *, gpu: str | None = None) -> str:
    """Say what the figures were measured on: this processor, or the GPU of that name."""
    from tenfold_core.device import cpu_info, load_average

    cpu, load = cpu_info(), load_average()
    copies = ", ".join(f"{_size(size)} {rate:.0f}" for size, rate in bandwidth)
    if gpu is not None:
        return f"{gpu}; copy in GB/s: {copies}"
    return (
        f"{cpu.model}, {cpu.usable_cores} cores, load {load[0] if load else 0:.1f}; "
        f"copy by one thread in GB/s: {copies}"
    )


def roofline(
    path: str | Path,
    rows: Sequence[Row],
    bandwidth: Sequence[tuple[int, float]],
    *,
    dark: bool = False,
) -> None:
    """Draw GFLOP/s over arithmetic intensity, ours in the accent colour, under measured copies.

    Args:
        path: .svg, .png or .pdf.
        rows: rows of a benchmark.
        bandwidth: (working set in bytes, GB/s of one thread's copy), ascending.
        dark: for a dark page.
    """
    shown = [row for row in rows if row["us"] and row["gflops"] and row["gbs"]]
    if not shown:
        raise InputError(f"{path}: nothing was measured that could be drawn")
    threads = max(1, *(row["threads"] for row in shown))  # 0 on a GPU, whose copy counts once
    markers = "osD^vP*Xd<>p8|_x+1234"
    names = list(dict.fromkeys(row["format"] for row in shown))
    with figure(path, columns=2, aspect=0.6, dark=dark) as drawing:
        axes = drawing.add_subplot(
            xscale="log", yscale="log", xlabel="arithmetic intensity [flop/byte]", ylabel="GFLOP/s"
        )
        intensities = [row["gflops"] / row["gbs"] for row in shown]
        ends = [min(intensities) / 1.2, max(intensities) * 1.2]
        for size, rate in bandwidth:
            top = threads * rate
            axes.plot(ends, [top * end for end in ends], color=BASELINE, linewidth=0.6)
            axes.annotate(
                f"copy {_size(size)}, {top:.0f} GB/s",
                (ends[0], top * ends[0]),
                xytext=(0, 2),
                textcoords="offset points",
                fontsize=6,
                color=BASELINE,
            )
        for place, name in enumerate(names):
            ours = name == "auto" or name.startswith("hbp-")
            part = [row for row in shown if row["format"] == name]
            axes.plot(
                [row["gflops"] / row["gbs"] for row in part],
                [row["gflops"] for row in part],
                linestyle="none", marker=markers[place % len(markers)], markersize=3.5,
                color=ACCENT if ours else BASELINE, label=name,
                markerfacecolor="none" if name.startswith("hbp-") else None,
            )  # fmt: skip
        drawing.legend(fontsize=6, loc="outside right center")


def regenerate(folder: Positional[Path], *, check: bool = False) -> int:
    """Rewrite the tables of a package from its committed results.

    Args:
        folder: The package's folder.
        check: Change nothing, exit with 1 if a table differs.
    """
    results = folder / "benchmarks" / "results"
    return rewrite_tables(folder, partial(_block, results), check=check)


def _block(results: Path, file: Path, name: str) -> str:
    folder, _, table = name.partition("/")

    def rows(of: str) -> Sequence[Row]:
        from tenfold_core.run.rows import read_jsonl

        from hbp_spmv.output import read_rows

        path = results / folder / of
        if not path.exists() and (name == "gpu/claims" or of == "ablation.jsonl"):
            return []
        if not path.exists():
            raise InputError(
                f"{file}: table {name!r} needs {path}, which is missing; run 'make bench'"
            )
        return read_rows(path) if of == "rows.jsonl" and table != "sizes" else read_jsonl(path)

    if name == "gpu/claims":
        from hbp_spmv.gpu_summary import gpu_claims

        text = claim_table(gpu_claims(rows("rows.jsonl"), rows("ablation.jsonl")))
    elif table == "claims":
        text = claim_table(claims(rows("rows.jsonl"), rows("reorder.jsonl")))
    elif table == "reorder":
        text = reorder_table(rows("reorder.jsonl"))
    elif table == "sizes":
        text = size_table(rows("rows.jsonl"))
    elif match := re.fullmatch(r"products-(f32|f64)-(\d+)", table):
        dtype = {"f32": "float32", "f64": "float64"}[match[1]]
        text = product_table(rows("rows.jsonl"), dtype, int(match[2]))
    elif (text := _gpu_table(table, rows)) is None:
        raise InputError(
            f"{file}: table {name!r}: expected claims, reorder, sizes or products-f64-1; on a GPU "
            "claims, ablation, fastest, products-f64-hot or graphs-f64-cold"
        )
    return text


def _gpu_table(table: str, rows: Callable[[str], Sequence[Row]]) -> str | None:
    """Return a table of a GPU's results, None if there is no table of that name."""
    match = re.fullmatch(r"(products|graphs)-(f32|f64)-(hot|cold)", table)
    if match is None and table not in ("ablation", "fastest"):
        return None
    from hbp_spmv.gpu_report import ablation_table, best_table, gpu_product_table

    if match is None:
        return (ablation_table if table == "ablation" else best_table)(rows("ablation.jsonl"))
    dtype = {"f32": "float32", "f64": "float64"}[match[2]]
    column = {"products": "us", "graphs": "graph_us"}[match[1]]
    return gpu_product_table(rows("rows.jsonl"), dtype, cold=match[3] == "cold", column=column)


def print_json(value: Any) -> None:
    """Print one line of JSON."""
    from tenfold_core.run.rows import plain

    print(json.dumps(plain(value), ensure_ascii=False, allow_nan=False))


def print_facts(facts: Mapping[str, Any], *, as_json: bool) -> None:
    """Print facts by name, one per line, or as one line of JSON."""
    if as_json:
        print_json(facts)
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        lines = (
            value
            if isinstance(value, list | tuple) and value and isinstance(value[0], str)
            else [value]
        )
        for place, line in enumerate(lines):
            print(f"{name.replace('_', ' ') if place == 0 else '':<{width}}  {_text(line)}")


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(part)}" for name, part in value.items()) or "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return " x ".join(map(_text, value)) or "-"
    return "-" if value is None else str(value)


def _digits(value: float | None) -> str:
    """Write a number with three significant digits and no exponent."""
    if value is None:
        return "-"
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.3g}" if value >= 0.001 else f"{value:.1g}"


def _size(size: int) -> str:
    return f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"


if __name__ == "__main__":
    raise SystemExit(main("python -m hbp_spmv.report", regenerate, package="hbp-spmv"))
