# SPDX-License-Identifier: Apache-2.0
"""Is the cost linear in the nonzeros? Matrices of one kind and growing size, on one thread.

Rows have 1 to 31 nonzeros near the diagonal, 16 on average, so that only the size changes. Sizes
double within two tiers: all data inside the third-level cache, and at least 1.5 times as large.
Between the tiers the time per nonzero must rise, because memory is slower than a cache; within a
tier the slope of log time over log nonzeros should be 1. A build is the best of several, because
the system clears fresh pages at changing speed; a product is a median. Small matrices are left out:
below about 1e5 nonzeros fixed costs count (a build 0.3 ms, a call 1 us). Plain CSR has another
reason to slow down with size: a processor that has learnt all row ends of a small matrix
mispredicts them in a larger one.

Writes results/sizes and sizes.md.
"""

import sys
from functools import partial
from pathlib import Path
from time import perf_counter

import numpy as np
from hbp_spmv import HBPMatrix, from_csr
from hbp_spmv.bench import device_of, not_here
from hbp_spmv.report import regenerate, size_slope
from scipy.sparse import csr_array
from tenfold_core.device import cpu_info
from tenfold_core.errors import ConfigError
from tenfold_core.run.cli import main
from tenfold_core.run.record import RunRecord
from tenfold_core.run.rows import JsonlStream
from tenfold_core.run.timing import measure_many

RESULTS = Path(__file__).parent / "results"
LAYOUTS = ("compact", "csr")
TIERS = {
    "cache": (0.05, 0.1, 0.2, 0.4),
    "memory": (1.5, 3.0, 6.0, 12.0),
}
"""Bytes of CSR as parts of the third-level cache, of which others may use a share."""
BYTES_PER_NONZERO = 12 + 20 / 16
PAGE = """\
# Cost over size

{about}

<!-- results: sizes/sizes -->
<!-- /results -->
"""


def sweep(
    *,
    min_time: float = 0.2,
    repeats: int = 20,
    seed: int = 0,
    out: Path = RESULTS,
    device: str = "cpu",
) -> None:
    """Time build and product over sizes, one thread, float64.

    Args:
        min_time: seconds of products per size and layout, at least.
        repeats: samples per size and layout; builds are repeated a quarter as often.
        seed: seed of the matrices and vectors.
        out: folder of the results.
        device: cpu; there is nothing to do here for another one.
    """
    if text := not_here("bench_sizes.py", device, on_gpu=False):
        print(text)
        return
    cpu = cpu_info()
    if not cpu.l3_bytes:
        raise ConfigError("this machine does not tell the size of its third-level cache")
    folder = out / "sizes"
    config = {"min_time": min_time, "repeats": repeats}
    folder.mkdir(parents=True, exist_ok=True)
    command = ["bench_sizes.py", *sys.argv[1:]]
    with (
        RunRecord(folder, package="hbp-spmv", command=command, config=config, seed=seed) as record,
        JsonlStream(folder / "rows.jsonl") as rows,
    ):
        for tier, parts in TIERS.items():
            sizes = [round(part * cpu.l3_bytes / BYTES_PER_NONZERO) for part in parts]
            print(f"{tier}: {sizes[0]} to {sizes[-1]} nonzeros", file=sys.stderr, flush=True)
            found = measure_tier(tier, sizes, min_time=min_time, repeats=repeats, seed=seed)
            for row in found:
                rows.append(row)
            for layout in LAYOUTS:
                for what, column in (("build", "build_ms"), ("product", "us")):
                    value = size_slope([r for r in found if r["layout"] == layout], column)
                    record.metric(f"slope_{what}_{layout}_{tier}", value, unit="1")
                    print(f"{tier:<7} {layout:<8} {what:<8} slope {value:.2f}")
        record.artefact(folder / "rows.jsonl")
    about = (__doc__ or "").split("\n\n")[1]
    page = PAGE.format(about=about)
    (out / "sizes.md").write_text(page, encoding="utf-8")
    if out == RESULTS:
        regenerate(RESULTS.parents[1])


def measure_tier(
    tier: str, sizes: list[int], *, min_time: float, repeats: int, seed: int
) -> list[dict]:
    """Return one row per size and layout; the products of all sizes take turns."""
    rng = np.random.default_rng(seed)
    matrices = [near_diagonal(nnz, rng) for nnz in sizes]
    built: dict[tuple[int, str], HBPMatrix] = {}
    times: dict[tuple[int, str], list[float]] = {}
    for _ in range(max(3, repeats // 4)):
        for size, a in enumerate(matrices):
            for layout in LAYOUTS:
                begin = perf_counter()
                built[size, layout] = from_csr(a, layout=layout, threads=1)
                times.setdefault((size, layout), []).append(perf_counter() - begin)
    x = [rng.standard_normal(a.shape[1]) for a in matrices]
    y = [np.empty(a.shape[0]) for a in matrices]
    calls = {
        f"{size} {layout}": partial(h.matvec, x[size], out=y[size])
        for (size, layout), h in built.items()
    }
    timings = measure_many(calls, min_time_s=min_time, repeats=repeats)
    return [
        {
            "tier": tier,
            "layout": layout,
            "nnz": matrices[size].nnz,
            "bytes": h.nbytes,
            "build_ms": 1e3 * min(times[size, layout]),
            "us": 1e6 * timings[f"{size} {layout}"].median,
            "us_p10": 1e6 * timings[f"{size} {layout}"].p10,
            "us_p90": 1e6 * timings[f"{size} {layout}"].p90,
        }
        for (size, layout), h in built.items()
    ]


def near_diagonal(nnz: int, rng: np.random.Generator) -> csr_array:
    """Return a square matrix of about `nnz` nonzeros, 1 to 31 a row within 64 of the diagonal."""
    rows = max(nnz // 16, 128)
    lengths = rng.integers(1, 32, rows)
    ends = np.concatenate([[0], np.cumsum(lengths)])
    steps = rng.integers(1, 4, ends[-1])  # gaps between neighbours in a row
    walk = np.cumsum(steps)
    offset = walk - np.repeat(walk[ends[:-1]] - steps[ends[:-1]], lengths) - 48
    column = np.repeat(np.arange(rows), lengths) + offset
    kept = (column >= 0) & (column < rows)
    counts = np.add.reduceat(kept, ends[:-1])
    pointers = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    values = rng.standard_normal(pointers[-1])
    return csr_array((values, column[kept].astype(np.int32), pointers), shape=(rows, rows))


if __name__ == "__main__":
    if text := not_here("bench_sizes.py", device_of(sys.argv[1:]), on_gpu=False):
        raise SystemExit(print(text))  # before what a GPU's host may lack is imported
    raise SystemExit(main("bench_sizes.py", sweep, package="hbp-spmv"))
