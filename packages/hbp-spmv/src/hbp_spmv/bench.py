# SPDX-License-Identifier: Apache-2.0
"""`hbp-bench`: matrices x types x threads x formats, one row each.

The rows of a *case* (matrix, type, threads, hot or cold) are measured together and appended
together; a resumed run drops the rows of an unfinished case and measures it again, so every row is
there exactly once.
"""

import math
import time
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tenfold_core.device import cpu_info, load_average
from tenfold_core.errors import ConfigError, InputError, TenfoldError
from tenfold_core.run.checkpoint import resume_token
from tenfold_core.run.rows import plain

from hbp_spmv.building import default_threads, kernels_work
from hbp_spmv.calibration import Calibration, calibrate, load_calibration
from hbp_spmv.evaluate import Protocol, Subject, resolve_formats
from hbp_spmv.inputs import Source
from hbp_spmv.output import Output, check_output
from hbp_spmv.summary import record_metrics

if TYPE_CHECKING:
    from tenfold_core.sparse.gpu import Runtime

    from hbp_spmv.cuda_selection import DeviceCalibration
    from hbp_spmv.gpu_evaluate import CudaPlace

__all__ = ["BenchConfig", "Result", "demo_config", "device_of", "machine", "not_here", "run"]

_DTYPES = {"f32": "float32", "f64": "float64", "float32": "float32", "float64": "float64"}
_COMPLEX = {"complex64": "float32", "complex128": "float64"}

Rows = list[dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchConfig:
    """What to measure; its `protocol` says how."""

    formats: tuple[str, ...] = ()
    """Format names or `all`; nothing for the default selection."""
    dtypes: tuple[str, ...] = ("f64",)
    threads: tuple[int, ...] = ()
    """Thread counts; nothing for all cores of this process. A GPU has none to choose."""
    device: str = "cpu"
    """cpu, or a GPU: cuda, cuda:N."""
    hot_and_cold: bool = False
    """Measure both with caches that are warm and with overwritten ones."""
    reorder: bool = False
    """Also time the row orders of all blocks, method by method."""
    limit_time_s: float | None = None
    """Begin no further case after this time."""
    protocol: Protocol = field(default_factory=Protocol)

    def __post_init__(self) -> None:
        for name in self.dtypes:
            if name not in _DTYPES:
                raise ConfigError(f"dtype: {name!r} is not known, expected f32 or f64")
        for count in self.threads:
            if not 1 <= count <= 1024:
                raise ConfigError(f"threads: found {count}, expected 1 to 1024")
        if self.threads and self.device != "cpu":
            raise ConfigError(f"threads: {self.device} has none to choose; leave them out")
        if self.limit_time_s is not None and not self.limit_time_s > 0:
            raise ConfigError(f"limit-time is {self.limit_time_s}, expected seconds above 0")
        if not self.dtypes:
            raise ConfigError("dtype: found none, expected f32, f64 or both")

    @property
    def cases(self) -> list[tuple[str, int, bool]]:
        """Types, thread counts and whether cold, each once, in the order they were given."""
        threads = self.threads or ((default_threads() if self.device == "cpu" else 0),)
        dtypes = dict.fromkeys(_DTYPES[name] for name in self.dtypes)
        cold = (False, True) if self.hot_and_cold else (self.protocol.cold,)
        return [(d, count, c) for d in dtypes for count in dict.fromkeys(threads) for c in cold]


def demo_config(seed: int) -> BenchConfig:
    """Return the settings of the demonstration: a minute on two cores, kernels compiled."""
    protocol = Protocol(min_time_s=0.06, repeats=12, seed=seed)
    return BenchConfig(threads=(1, min(default_threads(), 2)), reorder=True, protocol=protocol)


@dataclass(slots=True)
class Result:
    """What a run measured, and what it could not read."""

    calibration: "Calibration | DeviceCalibration"
    rows: Rows = field(default_factory=list)
    reorderings: Rows = field(default_factory=list)
    """Time and quality of each row order, by matrix and method."""
    unread: list[str] = field(default_factory=list)
    """Why a matrix was passed over, one line each."""
    notes: list[str] = field(default_factory=list)
    metrics: dict[str, tuple[float | None, str, str | None]] = field(default_factory=dict)
    """Value, unit and better direction by name."""


def machine(say: Callable[[str], None] = lambda text: None) -> Calibration:
    """Return this host's calibration, measuring it first if that was never done.

    A host without compiled kernels cannot be measured; it has that of `load_calibration`.
    """
    found = load_calibration()
    if found.cpu != "default" or not kernels_work():
        return found
    say("measuring this machine once (a few seconds)")
    return calibrate()


class _CpuPlace:
    """The processor, as a place to measure on; a GPU is a `gpu_evaluate.CudaPlace`."""

    name = "cpu"

    def facts(self) -> dict[str, Any]:
        """Return nothing: the record describes the processor by itself."""
        return {}

    def formats(self, names: Sequence[str]) -> tuple[tuple[str, ...], list[str]]:
        """Return the formats to measure and why others are left out."""
        return resolve_formats(names)

    def calibration(self, say: Callable[[str], None]) -> Calibration:
        """Return this host's calibration."""
        return machine(say)

    def subject(self, name: str, a: Any, protocol: Protocol) -> Subject:
        """Return a matrix to be measured."""
        return Subject(name, a, protocol)


def _place(device: str, runtime: "Runtime | None") -> "_CpuPlace | CudaPlace":
    if device == "cpu":
        return _CpuPlace()
    from hbp_spmv.gpu_evaluate import CudaPlace

    return CudaPlace(device, runtime)


def device_of(arguments: Sequence[str]) -> str:
    """Return the value of `--device` in a command line, `cpu` without one, and parse nothing else.

    What parses the command line in full is not installed on every host with a GPU.
    """
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--device", nargs="?", default="cpu", const="cpu")
    return str(parser.parse_known_args(list(arguments))[0].device)


def not_here(script: str, device: str, *, on_gpu: bool) -> str | None:
    """Say why a benchmark has nothing to do for `--device`, or return None.

    Args:
        script: name of the benchmark.
        device: what was asked for; `auto` is the CPU.
        on_gpu: the benchmark measures a GPU and not the CPU.
    """
    if (device not in ("cpu", "auto")) == on_gpu:
        return None
    what, other = ("a GPU", "cuda") if on_gpu else ("the CPU", "cpu")
    return f"{script}: measures {what}, nothing to do for --device {device}; give --device {other}"


def run(
    sources: Sequence[Source],
    config: BenchConfig,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    plot: str | Path | None = None,
    verb: str = "bench",
    runtime: "Runtime | None" = None,
    say: Callable[[str], None] = lambda text: None,
    on_case: Callable[[Rows, Any], None] = lambda rows, calibration: None,
) -> Result:
    """Measure every source in every format, type and thread count.

    A matrix that cannot be read is named in `Result.unread`; if it is the only one, it is an error.

    Args:
        sources: matrices, see `hbp_spmv.inputs`.
        config: what to measure.
        out: folder or file for the rows and the record; None writes nothing.
        resume: continue the run that `out` holds.
        plot: file for a roofline plot.
        verb: command that the record names.
        runtime: what computes on a GPU; by default that of the device.
        say: called with progress texts.
        on_case: called with the rows of each finished case.

    Raises:
        TenfoldError: a setting, the output or every matrix is not usable.
        CheckpointError: `resume` and the earlier run had other settings or inputs.
    """
    check_output(out, plot)
    if resume and out is None:
        raise ConfigError("--resume: nothing to resume without --out")
    place = _place(config.device, runtime)
    formats, left_out = place.formats(config.formats)
    if len(sources) == 1:  # one that cannot be read is told before anything is measured
        sources = [sources[0].loaded()]
    for text in left_out:
        say(f"left out: {text}")
    if config.reorder and not kernels_work():
        left_out.append("row orders: numba does not work here")
        say(f"left out: {left_out[-1]}")
    _warn_if_busy(say)
    result = Result(place.calibration(say), notes=[f"left out: {text}" for text in left_out])
    with ExitStack() as stack:
        output = None
        if out is not None:
            token = _token(sources, config, formats, place.name)
            settings = _settings(sources, config, formats, result) | place.facts()
            settings["token"] = token
            output = Output(out, verb=verb, settings=settings, device=place.name)
            stack.enter_context(output)
            if resume:
                result.rows, result.reorderings = output.resume(formats)
                say(f"resumed with {len(result.rows)} rows")
            elif output.rows_path.exists():
                say(f"{output.rows_path}: an earlier result is replaced; --resume continues one")
        _measure(sources, config, formats, place, result, output, say, on_case)
        result.metrics = record_metrics(result.rows, result.reorderings)
        if output is not None:
            output.finish(result.rows, result.metrics, [*result.notes, *result.unread])
        if plot is not None:
            from hbp_spmv.report import roofline

            roofline(plot, result.rows, result.calibration.bandwidth)
    return result


def _measure(
    sources: Sequence[Source],
    config: BenchConfig,
    formats: tuple[str, ...],
    place: "_CpuPlace | CudaPlace",
    result: Result,
    output: Output | None,
    say: Callable[[str], None],
    on_case: Callable[[Rows, Any], None],
) -> None:
    done = {
        (row["matrix"], _real(row["dtype"]), row["threads"], row["cold"]) for row in result.rows
    }
    ordered = {row["matrix"] for row in result.reorderings}
    deadline = time.monotonic() + (config.limit_time_s or math.inf)
    for number, source in enumerate(sources, start=1):
        cases = [case for case in config.cases if (source.name, *case) not in done]
        if not cases:
            continue
        if time.monotonic() > deadline:
            _stop(source.name, result, say)
            return
        if len(sources) > 1:
            say(f"{source.name} ({number} of {len(sources)})")
        try:
            subject = place.subject(source.name, source.load(), config.protocol)
        except TenfoldError as error:
            result.unread.append(str(error))
            continue
        if config.reorder and kernels_work() and source.name not in ordered:
            result.reorderings += _reorder_rows(subject)
        for turn, (dtype, threads, cold) in enumerate(cases):
            if turn and time.monotonic() > deadline:
                _stop(f"{source.name}, {dtype}, {_which(threads, cold=cold)}", result, say)
                return
            rows = subject.measure(formats, dtype, threads, result.calibration, cold=cold)
            if output is not None:
                output.append(rows, result.reorderings)
            result.rows += rows
            on_case(rows, result.calibration)
    if not result.rows and result.unread:
        raise InputError(f"{result.unread[0]} (and no other matrix could be read)")


def _which(threads: int, *, cold: bool) -> str:
    return f"threads {threads}" if threads else "cold" if cold else "hot"


def _stop(before: str, result: Result, say: Callable[[str], None]) -> None:
    result.notes.append(f"stopped before {before}: the limit on time was reached")
    say(result.notes[-1])


def _reorder_rows(subject: Subject) -> Rows:
    from hbp_spmv.preprocessing import reorder_times  # compiled; only where that is possible

    facts = subject.facts()
    return [
        {**facts, "method": method, **plain(found)}
        for method, found in reorder_times(subject.a).items()
    ]


def _real(dtype: str) -> str:
    return _COMPLEX.get(dtype, dtype)


def _warn_if_busy(say: Callable[[str], None]) -> None:
    load, cores = load_average(), cpu_info().usable_cores
    if load and load[0] > 0.5 * cores:
        say(f"the load average is {load[0]:.1f} on {cores} cores: timings will scatter")


def _token(
    sources: Sequence[Source], config: BenchConfig, formats: tuple[str, ...], place: str
) -> str:
    try:
        release = version("hbp-spmv")
    except PackageNotFoundError:  # run from a source tree
        release = "0+unknown"
    inputs = [[source.name, source.identity] for source in sources]
    settings = (asdict(config.protocol), formats, config.cases, config.reorder, place)
    return resume_token(release, settings, inputs)


def _settings(
    sources: Sequence[Source], config: BenchConfig, formats: tuple[str, ...], result: Result
) -> dict[str, Any]:
    return {
        **asdict(config),
        "formats": formats,
        "cases": config.cases,
        "matrices": [Path(source.name).name for source in sources],
        "calibration": result.calibration,
    }
