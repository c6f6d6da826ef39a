# SPDX-License-Identifier: Apache-2.0
"""The command line: `hbp-spmv VERB ...`, and `hbp-bench` for its most used verb.

stdout carries the result, stderr everything else; `--json` prints exactly one line.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from tenfold_core.errors import ConfigError, TenfoldError
from tenfold_core.run.cli import Positional, option
from tenfold_core.run.cli import main as run_command

from hbp_spmv.config import BuildConfig
from hbp_spmv.report import print_facts, print_json

__all__ = ["bench_main", "main"]

Json = Annotated[bool, option(name="json", help="print one line of JSON instead of text")]
Quiet = Annotated[bool, option(help="no progress on stderr")]
Out = Annotated[str | None, option("-o", metavar="PATH")]
Device = Annotated[
    str,
    option(
        metavar="auto|cpu|cuda[:N]", help="where the products run; auto stands for the CPU here"
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How matrix files are read."""

    edgelist: bool = False
    """Read files as edge lists, whatever their names."""
    banner: bool = True
    """Whether Matrix Market files must begin with their banner; --no-banner reads those without."""
    max_memory: str | None = None
    """Most bytes that reading may take, such as 8G; half of the machine's by default."""
    sum: bool = True
    """Add up repeated entries; --no-sum refuses them."""
    finite: bool = False
    """Refuse NaN and infinity."""
    drop_zeros: bool = False
    """Remove entries stored with the value zero."""

    def options(self) -> dict[str, Any]:
        """Return the settings of `hbp_spmv.read`."""
        settings = asdict(self)
        settings["sum_duplicates"] = settings.pop("sum")
        settings["max_memory"] = _bytes(self.max_memory)
        return settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """How products are timed."""

    hot: bool = False
    """The same arrays again and again, as in a solver (the default)."""
    cold: bool = False
    """Overwrite the caches before each product."""
    min_time: float = 0.2
    """Seconds of products per format, at least."""
    repeats: int = 20
    """Samples per format."""
    n_products: int = 1000
    """Products that auto may expect to follow a build."""
    limit_time: float | None = None
    """Begin nothing new after this many seconds."""

    def protocol(self, seed: int) -> Any:
        """Return the settings of `hbp_spmv.evaluate`."""
        if self.hot and self.cold:
            raise ConfigError("--hot and --cold exclude each other; leave one out")
        from hbp_spmv.evaluate import Protocol

        return Protocol(
            min_time_s=self.min_time, repeats=self.repeats, cold=self.cold, seed=seed,
            n_products=self.n_products,
        )  # fmt: skip


_READING = Reading()
_TIMING = Timing()
_BUILD = BuildConfig()


def main(argv: Sequence[str] | None = None) -> int:
    """Run `hbp-spmv` and return its exit code."""
    return run_command("hbp-spmv", _VERBS, argv)


def bench_main(argv: Sequence[str] | None = None) -> int:
    """Run `hbp-bench`, which is `hbp-spmv bench`."""
    return run_command("hbp-bench", bench, argv, package="hbp-spmv")


def demo(
    *, out: Out = None, seed: int = 0, device: Device = "auto", as_json: Json = False,
    quiet: Quiet = False,
) -> int:  # fmt: skip
    """Show the claim on matrices made here: reordering by hash, and products against libraries.

    Args:
        out: folder for the record run.json and the rows.
        seed: seed of the matrices and vectors.
        device: where the products run; auto stands for the CPU.
        as_json: one line of JSON.
        quiet: no progress.
    """
    if _place(device) != "cpu":
        raise ConfigError(f"--device {device}: demo shows the CPU; use hbp-bench --device {device}")
    from tenfold_core.run.report import print_table

    from hbp_spmv.bench import demo_config, run
    from hbp_spmv.inputs import matrix_sources
    from hbp_spmv.report import ORDER_COLUMNS, case_printer, claim_lines, order_cells
    from hbp_spmv.summary import claims

    if out is not None and Path(out).suffix:
        raise ConfigError(f"{out}: expected a folder, whose name has no suffix")
    found = run(
        matrix_sources((), seed=seed),
        demo_config(seed),
        out=out,
        verb="demo",
        say=_sayer(quiet),
        on_case=case_printer(silent=as_json),
    )
    if as_json:
        _print_result(found)
        return _exit_code(found)
    print()
    title, cells = "Reordering the rows of all blocks", order_cells(found.reorderings)
    print_table(ORDER_COLUMNS, cells, title=title, stream=sys.stdout)
    print("\nClaims, judged on these matrices")
    print("\n".join(claim_lines(claims(found.rows, found.reorderings))))
    return _exit_code(found)


def bench(
    files: Positional[tuple[str, ...]] = (), *, formats: str = "", dtype: str = "f64",
    threads: str = "", device: Device = "auto", suite: str | None = None, seed: int = 0,
    out: Out = None, plot: str | None = None, resume: bool = False, timing: Timing = _TIMING,
    reading: Reading = _READING, as_json: Json = False, quiet: Quiet = False,
) -> int:  # fmt: skip
    """Time the product of each matrix in several formats, against libraries and a bound.

    Args:
        files: matrix files, folders of them, @suite, @demo (what the extra of that name brings);
            nothing: matrices made at run time.
        formats: names separated by commas, or all; by default auto, our layouts, SciPy, torch if
            it is installed, merge CSR and SELL, and on a GPU all that can run.
        dtype: f32, f64 or both, separated by a comma.
        threads: thread counts separated by commas; by default the cores of this process, or as
            many as OMP_NUM_THREADS says if those are fewer.
        device: where the products run; auto stands for the CPU.
        suite: folder that @suite stands for; by default that of the variable HBP_MATRICES.
        seed: seed of the generated matrices and of the vectors.
        out: folder, or a name in .parquet, .csv or .jsonl; the record lies in the folder, or beside
            the file in NAME.run.
        plot: roofline plot, .svg, .png or .pdf.
        resume: continue the interrupted run that --out holds.
        timing: how products are timed.
        reading: how files are read.
        as_json: one line of JSON.
        quiet: no progress.
    """
    from hbp_spmv.inputs import matrix_sources

    sources = matrix_sources(files, suite=suite, seed=seed, **reading.options())
    if len(sources) == 1:  # a bad file is told before kernels are imported
        sources = [sources[0].loaded()]
    from hbp_spmv.bench import BenchConfig, run
    from hbp_spmv.report import case_printer

    config = BenchConfig(
        device=_place(device),
        formats=_names(formats),
        dtypes=_names(dtype),
        threads=tuple(_count("threads", name) for name in _names(threads)),
        limit_time_s=timing.limit_time,
        protocol=timing.protocol(seed),
    )
    found = run(
        sources, config, out=out, resume=resume, plot=plot, say=_sayer(quiet),
        on_case=case_printer(silent=as_json),
    )  # fmt: skip
    return _finish_bench(found, as_json=as_json, summary=len(sources) > 1)


def _finish_bench(found: Any, *, as_json: bool, summary: bool) -> int:
    """Print what a benchmark found and could not read; return the exit code."""
    from hbp_spmv.report import print_metrics

    for text in found.unread:
        print(f"hbp-spmv: error: {text}", file=sys.stderr)
    if as_json:
        _print_result(found)
    elif summary:
        print_metrics(found.metrics)
    return _exit_code(found)


def info(file: Positional[str], *, reading: Reading = _READING, as_json: Json = False) -> None:
    """Describe a matrix: shape, symmetry, row lengths, bandwidth, bytes per format, advice.

    Args:
        file: matrix file, or a saved .hbp.safetensors.
        reading: how files are read.
        as_json: one line of JSON.
    """
    if _is_saved(file):
        from hbp_spmv.storage import load

        matrix = load(file)
        facts = {"file": file, "shape": matrix.shape, "dtype": matrix.dtype.name}
        facts |= asdict(matrix.stats) | {"config": asdict(matrix.config)}
        print_facts(facts, as_json=as_json)
        return
    from hbp_spmv.building import require_kernels

    require_kernels("info")
    from hbp_spmv.info import describe_file

    print_facts(describe_file(file, **reading.options()), as_json=as_json)


def convert(
    source: Positional[str],
    target: Positional[str],
    *,
    dtype: str | None = None,
    threads: int | None = None,
    build: BuildConfig = _BUILD,
    reading: Reading = _READING,
    as_json: Json = False,
) -> None:
    """Convert between matrix files and saved .hbp.safetensors, in either direction.

    Args:
        source: matrix file, or a saved .hbp.safetensors.
        target: .hbp.safetensors, .mtx, .mtx.gz or .npz.
        dtype: f32, f64, c64 or c128; by default that of the source.
        threads: threads that the layout is chosen for.
        build: the layout, for a .hbp.safetensors.
        reading: how files are read.
        as_json: one line of JSON.
    """
    from hbp_spmv.convert import convert_file

    facts = convert_file(
        source, target, dtype=dtype, threads=threads, config=build, reading=reading.options()
    )
    print_facts(facts, as_json=as_json)


def verify(
    file: Positional[str],
    *,
    against: str | None = None,
    trials: int = 3,
    seed: int = 0,
    device: Device = "auto",
    reading: Reading = _READING,
    as_json: Json = False,
) -> None:
    """Check a saved matrix: its arrays, and its products against an exactly rounded one.

    Args:
        file: saved .hbp.safetensors.
        against: the matrix file it was made from; by default its own entries.
        trials: number of random vectors.
        seed: seed of the vectors.
        device: where the products run; auto stands for the CPU.
        reading: how the matrix file is read.
        as_json: one line of JSON.
    """
    place = _place(device)
    from hbp_spmv.storage import load
    from hbp_spmv.verification import verify as verify_matrix

    if trials < 1:
        raise ConfigError(f"trials: found {trials}, expected at least 1")
    matrix = load(file)
    if against is None:
        source = matrix.to_csr()
    else:
        from hbp_spmv.readers import read

        source = read(against, **reading.options())
    try:
        found = verify_matrix(matrix.to(place), source, trials=trials, seed=seed)
    except TenfoldError as error:
        raise type(error)(f"{file}: {error}") from None
    facts = {"file": file, "against": against or "its own entries", "device": place}
    facts |= asdict(found)
    print_facts(facts | {"verdict": "within the bound"}, as_json=as_json)


def select(
    file: Positional[str],
    *,
    threads: int | None = None,
    n_products: int = 1000,
    tune: bool = False,
    device: Device = "auto",
    reading: Reading = _READING,
    as_json: Json = False,
) -> None:
    """Say which layout `auto` takes for a matrix, what it expects of each, and why.

    Args:
        file: matrix file.
        threads: threads of the product.
        n_products: products that are going to follow the build.
        tune: time the candidates whatever n_products says.
        device: where the products run; auto stands for the CPU.
        reading: how the file is read.
        as_json: one line of JSON.
    """
    place = _place(device)
    from hbp_spmv.readers import read
    from hbp_spmv.selection import select as select_layout

    if n_products < 1:
        raise ConfigError(f"n-products: found {n_products}, expected at least 1")
    a = read(file, **reading.options())
    plan = select_layout(a, device=place, threads=threads, n_products=n_products, tune=tune)
    print_facts({"file": file, **asdict(plan)}, as_json=as_json)


def calibrate(*, save: bool = True, device: Device = "auto", as_json: Json = False) -> None:
    """Measure this machine (a few seconds): its roofline, and the costs that `auto` reckons with.

    Args:
        save: keep the result in the user's cache folder; --no-save only prints it. That of a GPU is
            measured anew in each process and never kept.
        device: what to measure; auto stands for the CPU.
        as_json: one line of JSON.
    """
    place = _place(device)
    found: dict[str, Any]
    if place == "cpu":
        from hbp_spmv.calibration import calibrate as measure

        found = asdict(measure(save=save))
    else:
        from hbp_spmv.gpu_evaluate import CudaPlace

        gpu = CudaPlace(place)
        found = {"device": gpu.name, **asdict(gpu.calibration(_sayer(quiet=True)))}
    if as_json:
        print_json(found)
        return
    bandwidth: Any = found.pop("bandwidth")
    for size, rate in bandwidth:
        # 2 flops for 12 bytes (f64 value, 32-bit index): what CSR can reach at that copy rate.
        print(f"copy, {size >> 10:>8} KiB: {rate:6.1f} GB/s, CSR at most {rate / 6:5.1f} GFLOP/s")
    print_facts(found, as_json=False)


def generate(
    name: Positional[str],
    *,
    out: Annotated[str, option("-o", metavar="PATH")],
    n: int | None = None,
    scale: int | None = None,
    edge_factor: int | None = None,
    per_row: int | None = None,
    bandwidth: int | None = None,
    shortest: int | None = None,
    exponent: float | None = None,
    sinks: int | None = None,
    seed: int = 0,
    as_json: Json = False,
) -> None:
    """Make a matrix and write it: delaunay_p1, stencil27, rmat, banded, powerlaw, transport, ...

    Args:
        name: generator; see `hbp_spmv.generate`.
        out: .mtx, .mtx.gz or .npz.
        n: grid points per edge, rows, points of the mesh, or sources.
        scale: rmat: logarithm of the number of vertices.
        edge_factor: rmat: edges per vertex.
        per_row: banded: nonzeros of a row.
        bandwidth: banded: farthest diagonal.
        shortest: powerlaw: shortest row.
        exponent: powerlaw: exponent of the row lengths.
        sinks: transport: number of sinks.
        seed: seed of the generators that draw.
        as_json: one line of JSON.
    """
    from hbp_spmv.convert import make_file

    settings = {
        "n": n, "scale": scale, "edge_factor": edge_factor, "per_row": per_row,
        "bandwidth": bandwidth, "shortest": shortest, "exponent": exponent, "sinks": sinks,
    }  # fmt: skip
    given = {key: value for key, value in settings.items() if value is not None}
    print_facts(make_file(name, out, given, seed=seed), as_json=as_json)


def warmup(*, full: bool = False, as_json: Json = False, quiet: Quiet = False) -> None:
    """Compile the kernels into numba's cache, so that no later process waits for them.

    Args:
        full: for every number of lanes, not the usual one alone (several minutes).
        as_json: one line of JSON.
        quiet: no progress.
    """
    from hbp_spmv.warmup import compile_all

    print_facts(compile_all(full=full, say=_sayer(quiet)), as_json=as_json)


_VERBS = {
    "demo": demo, "bench": bench, "info": info, "convert": convert, "verify": verify,
    "select": select, "calibrate": calibrate, "generate": generate, "warmup": warmup,
}  # fmt: skip


def _place(device: str) -> str:
    """Return `cpu`, which `auto` stands for, or the GPU that was asked for and answers."""
    from tenfold_core.device import resolve

    return "cpu" if device == "auto" else str(resolve(device))


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _count(what: str, text: str) -> int:
    if not text.isdecimal():
        raise ConfigError(f"{what}: {text!r} is not a number, expected such as 1,2")
    return int(text)


def _bytes(text: str | None) -> int | None:
    if text is None:
        return None
    units = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
    number, unit = text.rstrip("KMGTkmgt"), text[len(text.rstrip("KMGTkmgt")) :].upper()
    if not number.isdecimal() or unit not in units:
        raise ConfigError(f"max-memory: {text!r} is not a size, expected such as 800M or 8G")
    return int(number) << units[unit]


def _is_saved(file: str) -> bool:
    return Path(file).suffix.lower() == ".safetensors"


def _sayer(quiet: bool) -> Any:
    def say(text: str) -> None:
        if not quiet:
            print(f"hbp-spmv: {text}", file=sys.stderr, flush=True)

    return say


def _exit_code(found: Any) -> int:
    """Return 1 if `auto` failed somewhere, 2 if a matrix could not be read; say where it failed."""
    failed = [row for row in found.rows if row["format"] == "auto" and row["error"]]
    for row in failed:
        where = f"threads {row['threads']}" if row["threads"] else row["device"]
        case = f"{row['matrix']}, {row['dtype']}, {where}"
        print(f"hbp-spmv: error: {case}: auto failed: {row['error']}", file=sys.stderr)
    return 1 if failed else 2 if found.unread else 0


def _print_result(found: Any) -> None:
    metrics = {name: value for name, (value, _, _) in found.metrics.items()}
    parts = {"rows": found.rows, "metrics": metrics, "notes": found.notes}
    print_json(parts | ({"reorderings": found.reorderings} if found.reorderings else {}))
