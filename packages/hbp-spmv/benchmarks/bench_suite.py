# SPDX-License-Identifier: Apache-2.0
"""Table A: every matrix of a suite in both types, on one and two threads, within ten minutes.

`make bench PKG=hbp-spmv ARGS="--suite DIR"`, or with the variable HBP_MATRICES set; without either,
on the matrices that are made at run time. Writes results/suite (or results/generated): the rows,
the row orders, the record, the roofline; then suite.md, whose tables `make results` fills in.
"""

import os
import sys
from pathlib import Path

from hbp_spmv.bench import BenchConfig, device_of, not_here, run
from hbp_spmv.evaluate import Protocol
from hbp_spmv.inputs import SUITE_VARIABLE, matrix_sources
from hbp_spmv.report import claim_lines, regenerate
from hbp_spmv.summary import claims
from tenfold_core.device import cpu_info
from tenfold_core.run.cli import main

RESULTS = Path(__file__).parent / "results"
FORMATS = (
    "auto",
    "csr-scipy",
    "csr-torch",
    "csr-merge",
    "sell",
    "hbp-compact",
    "hbp-csr",
    "hbp-paper",
)

PAGE = """\
# {title}

Times in microseconds are medians of a product, hot, the result allocated; `x library` compares
`auto` with the faster of SciPy and torch (int32 indices, the same threads). `build ms` is that of
`auto`, which times its two candidates. Machine, load and versions: [run.json]({name}/run.json).

![Roofline]({name}/roofline.svg)

## Claims

{claims}

## Ordering the rows of all blocks (512 x 4096, groups of 32), one thread

{reorder}
{products}"""


def measure(
    *,
    suite: str | None = None,
    min_time: float = 0.15,
    repeats: int = 20,
    seed: int = 0,
    resume: bool = False,
    limit_time: float | None = None,
    device: str = "cpu",
) -> None:
    """Measure table A and judge its claims.

    Args:
        suite: folder of matrices; by default that of the variable HBP_MATRICES.
        min_time: seconds of products per format, at least.
        repeats: samples per format.
        seed: seed of the vectors and of generated matrices.
        resume: continue an interrupted run.
        limit_time: begin nothing new after this many seconds.
        device: cpu; there is nothing to do here for another one.
    """
    if text := not_here("bench_suite.py", device, on_gpu=False):
        print(text)
        return
    folder = suite or os.environ.get(SUITE_VARIABLE)
    name = "suite" if folder else "generated"
    config = BenchConfig(
        formats=FORMATS,
        dtypes=("f64", "f32"),
        threads=(1, 2) if cpu_info().usable_cores > 1 else (1,),
        reorder=True,
        limit_time_s=limit_time,
        protocol=Protocol(min_time_s=min_time, repeats=repeats, seed=seed),
    )
    (RESULTS / name).mkdir(parents=True, exist_ok=True)
    found = run(
        matrix_sources(("@suite",) if folder else (), suite=folder, seed=seed),
        config,
        out=RESULTS / name,
        resume=resume,
        plot=RESULTS / name / "roofline.svg",
        say=lambda text: print(text, file=sys.stderr, flush=True),
    )
    for text in (*found.unread, *found.notes):
        print(text)
    write_page(name, config)
    print("\n".join(claim_lines(claims(found.rows, found.reorderings))))


def write_page(name: str, config: BenchConfig) -> None:
    """Write the page of a result folder with its tables."""
    titles = {"suite": "Table A: real matrices", "generated": "The matrices made at run time"}
    products = [
        f"\n## Products, {dtype}, {threads} thread{'s' if threads > 1 else ''}\n\n"
        + block(f"{name}/products-{dtype.replace('float', 'f')}-{threads}")
        for dtype, threads, _ in config.cases
    ]
    page = PAGE.format(
        title=titles[name],
        name=name,
        claims=block(f"{name}/claims"),
        reorder=block(f"{name}/reorder"),
        products="\n".join(products),
    )
    (RESULTS / f"{name}.md").write_text(page + "\n", encoding="utf-8")
    regenerate(RESULTS.parents[1])


def block(name: str) -> str:
    """Return the markers between which `make results` writes a table."""
    return f"<!-- results: {name} -->\n<!-- /results -->"


if __name__ == "__main__":
    if text := not_here("bench_suite.py", device_of(sys.argv[1:]), on_gpu=False):
        raise SystemExit(print(text))  # before what a GPU's host may lack is imported
    raise SystemExit(main("bench_suite.py", measure, package="hbp-spmv"))
