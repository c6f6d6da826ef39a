# SPDX-License-Identifier: Apache-2.0
"""Table B and the ablation: every format on a GPU, both types, hot and cold, within ten minutes.

`make bench PKG=hbp-spmv ARGS=--device=cuda`. Matrices: a stencil, an R-MAT graph and a band of 55
to 65 million nonzeros, then the suite (`--suite DIR`, or the variable HBP_MATRICES), or the ones
that `hbp-bench` makes. The host needs NumPy, SciPy and CuPy; what else is missing (numba for the
published layout, torch, Matplotlib) leaves its part out and is named. Writes results/gpu, gpu.md.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path

from hbp_spmv.bench import BenchConfig, not_here, run
from hbp_spmv.evaluate import Protocol
from hbp_spmv.generate import banded, stencil27
from hbp_spmv.generate_large import rmat_in_chunks
from hbp_spmv.gpu_ablation import ablate
from hbp_spmv.gpu_summary import gpu_claims
from hbp_spmv.inputs import SUITE_VARIABLE, Source, matrix_sources
from hbp_spmv.report import claim_lines, regenerate
from tenfold_core.errors import TenfoldError, TenfoldWarning
from tenfold_core.run.atomic import atomic_path
from tenfold_core.run.rows import JsonlStream
from tenfold_core.sparse.gpu import Runtime, cuda_runtime

RESULTS = Path(__file__).parent / "results"
TABLE_SHARE = 0.65
"""Part of the time after which table B begins nothing new, so that the ablation has its turn."""
ABLATED = 8
"""Matrices of the ablation."""

PAGE = """\
# Table B: {gpu}

Medians of a product in microseconds, as a user calls it and as one of 50 launches in a CUDA graph;
cold: with the caches overwritten before each. Results stay on the device. A build begins with CSR
on the host, in the ablation with CSR on the device. Device, versions and settings:
[run.json](gpu/run.json).
{image}
## Claims

{claims}
{products}
## Ablation: time over the best of each matrix, geometric mean, by row order (float64, hot)

{ablation}

## The fastest combination of each matrix

{fastest}
"""

Say = Callable[[str], None]


def main(argv: Sequence[str] | None = None, *, runtime: Runtime | None = None) -> int:
    """Measure table B and the ablation, and judge the claims; return the exit code.

    Args:
        argv: the command line.
        runtime: what computes; by default that of the device.
    """
    options = _parser().parse_args(argv)
    if text := not_here("bench_gpu.py", options.device, on_gpu=True):
        print(text)
        return 0
    warnings.simplefilter("ignore", TenfoldWarning)  # on numba: what lacks it is named below
    try:
        return _measure(options, runtime or cuda_runtime(options.device))
    except TenfoldError as error:
        print(f"bench_gpu.py: error: {error}", file=sys.stderr)
        return error.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench_gpu.py", description=(__doc__ or "").split("\n")[0]
    )
    add = parser.add_argument
    add("--device", default="cpu", help="cuda or cuda:N; without it there is nothing to do")
    add("--suite", help=f"folder of matrices; by default that of the variable {SUITE_VARIABLE}")
    add("--size", choices=("full", "small"), default="full", help="small: to try the command")
    add("--dtype", default="f64,f32", help="f64, f32 or both")
    add("--formats", default="", help="names separated by commas; by default all that can run")
    add("--min-time", type=float, default=0.03, help="seconds of products per format, at least")
    add("--repeats", type=int, default=10, help="samples per format")
    add("--seed", type=int, default=0, help="seed of the matrices and vectors")
    add("--limit-time", type=float, default=540.0, help="begin nothing new after these seconds")
    add("--no-ablation", action="store_true", help="table B alone")
    add("--resume", action="store_true", help="continue an interrupted table B")
    add("--out", type=Path, default=RESULTS, help="folder of the results")
    return parser


def _measure(options: argparse.Namespace, runtime: Runtime) -> int:
    begun = time.monotonic()
    folder = options.out / "gpu"
    folder.mkdir(parents=True, exist_ok=True)
    config = BenchConfig(
        device=options.device,
        formats=tuple(name for name in options.formats.split(",") if name),
        dtypes=tuple(options.dtype.split(",")),
        hot_and_cold=True,
        limit_time_s=TABLE_SHARE * options.limit_time,
        protocol=Protocol(min_time_s=options.min_time, repeats=options.repeats, seed=options.seed),
    )
    sources = _sources(options)
    plot = folder / "roofline.svg" if importlib.util.find_spec("matplotlib") else None
    found = run(
        sources, config, out=folder, resume=options.resume, plot=plot, runtime=runtime, say=_say
    )
    ablation = []
    if not options.no_ablation:
        chosen = _ablated(sources, found.rows)
        left = begun + options.limit_time
        ablation = _ablation(folder, chosen, config.protocol, runtime, deadline=left)
        _complete_record(folder, time.monotonic() - begun)
    for text in (*found.unread, *found.notes):
        print(text)
    _write_page(options.out, config, str(found.rows[0]["device"]), plot=plot is not None)
    print("\n".join(claim_lines(gpu_claims(found.rows, ablation))))
    return 2 if found.unread else 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _sources(options: argparse.Namespace) -> list[Source]:
    """List the large matrices, each kept once it is made, and then the others."""
    seed = options.seed
    if options.size == "small":
        made = {
            "stencil27-n4": partial(stencil27, 4),
            "rmat-7-4": partial(rmat_in_chunks, 7, 4, seed=seed),
        }
    else:
        made = {
            "stencil27-n128": partial(stencil27, 128),
            "rmat-22-16": partial(rmat_in_chunks, 22, 16, seed=seed),
            "banded-64": partial(banded, 1_000_000, 64, 200, seed=seed),
        }
    found = [Source(name, cache(make), f"{name} {seed}") for name, make in made.items()]
    folder = options.suite or os.environ.get(SUITE_VARIABLE)
    if folder:
        found += matrix_sources(("@suite",), suite=folder, seed=seed)
    elif options.size == "full":
        found += matrix_sources((), seed=seed)
    return found


def _ablated(sources: Sequence[Source], rows: Sequence[dict]) -> list[Source]:
    """Return the matrices with the most nonzeros of those that were measured."""
    nnz = {row["matrix"]: row["nnz"] for row in rows}
    largest = sorted(nnz, key=nnz.__getitem__, reverse=True)[:ABLATED]
    return [source for source in sources if source.name in largest]


def _ablation(
    folder: Path,
    sources: Sequence[Source],
    protocol: Protocol,
    runtime: Runtime,
    *,
    deadline: float,
) -> list[dict]:
    """Write a row for every combination on every matrix that the time allows, and return them."""
    found = []
    with JsonlStream(folder / "ablation.jsonl") as stream:
        for source in sources:
            if time.monotonic() > deadline:
                _say(f"ablation: stopped before {source.name}: the limit on time was reached")
                break
            _say(f"ablation: {source.name}")
            rows = ablate(
                source.name, source.load(), runtime, protocol,
                go_on=lambda: time.monotonic() <= deadline,
            )  # fmt: skip
            for row in rows:
                stream.append(row)
                found.append(row)
    return found


def _complete_record(folder: Path, seconds: float) -> None:
    """Add the ablation to the record of table B."""
    path, table = folder / "run.json", folder / "ablation.jsonl"
    record = json.loads(path.read_text(encoding="utf-8"))
    content = table.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    record["artefacts"] += [{"path": table.name, "sha256": digest, "bytes": len(content)}]
    record["seconds"] = round(seconds, 6)
    text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def _write_page(out: Path, config: BenchConfig, gpu: str, *, plot: bool) -> None:
    """Write the page of the results, its tables where `out` belongs to a package."""
    products = []
    for dtype in config.dtypes:
        for kind, title in (("products", "calls"), ("graphs", "in CUDA graphs")):
            for state in ("hot", "cold"):
                table = _block(f"{kind}-{dtype}-{state}")
                products.append(f"\n## Products, {dtype}, {state}, {title}\n\n{table}\n")
    page = PAGE.format(
        gpu=gpu,
        image="\n![Roofline](gpu/roofline.svg)\n" if plot else "",
        claims=_block("claims"),
        products="".join(products),
        ablation=_block("ablation"),
        fastest=_block("fastest"),
    )
    (out / "gpu.md").write_text(page, encoding="utf-8")
    if (out.parent.name, out.name) == ("benchmarks", "results"):
        regenerate(out.resolve().parents[1])


def _block(table: str) -> str:
    """Return the markers between which `make results` writes a table."""
    return f"<!-- results: gpu/{table} -->\n<!-- /results -->"


if __name__ == "__main__":
    raise SystemExit(main())
