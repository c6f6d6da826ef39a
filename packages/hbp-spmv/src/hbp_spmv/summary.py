# SPDX-License-Identifier: Apache-2.0
"""What the rows of a benchmark say together: the metrics of its record, and the claims they carry.

Ratios are speed-ups, so above 1 is better; they are averaged geometrically. Matrices with at most
20 000 nonzeros are left out of the comparisons with libraries: their products are mostly overhead.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import exp, isfinite, log
from statistics import median, quantiles
from typing import Any

__all__ = [
    "FOREIGN",
    "LARGE",
    "LEAST_SPEED_UP",
    "LEFT_OUT",
    "SKEWED",
    "Claim",
    "at_least",
    "claims",
    "geomean",
    "losses",
    "record_metrics",
]

LARGE = 20_000
"""Nonzeros above which a product is more than its overhead."""
SKEWED = 1.0
"""Coefficient of variation of the row lengths from which a matrix counts as skewed."""
FOREIGN = 0.1
"""Cores that others may use before a timing counts as disturbed."""
LEAST_SPEED_UP = 1.5
"""Speed-up by a second thread below which the machine is not in order; two cores give 1.7 to 1.9
(see `hbp_spmv.parallel`)."""
LEFT_OUT = "left out: "
"""How the error of a format begins that is not meant for the matrix, and did not fail."""
_THREADED = 200_000
_SHORT = {"float64": "f64", "float32": "f32", "complex128": "c128", "complex64": "c64"}

Rows = Sequence[Mapping[str, Any]]
Metrics = dict[str, tuple[float | None, str, str | None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One statement, what was found and whether it holds."""

    text: str
    target: str
    found: str
    passed: bool | None
    """None: nothing to judge it by."""
    detail: str = ""
    """Every loss, by name."""


def geomean(values: Iterable[float]) -> float | None:
    """Return the geometric mean of positive numbers, None without any."""
    logs = [log(value) for value in values if value > 0 and isfinite(value)]
    return exp(sum(logs) / len(logs)) if logs else None


def record_metrics(rows: Rows, reorderings: Rows = ()) -> Metrics:
    """Return value, unit and better direction of each figure, per type and thread count."""
    metrics: Metrics = {}
    for method, baseline, ratios in _reorder_ratios(reorderings):
        metrics[f"reorder_{method}_over_{baseline}"] = (geomean(ratios.values()), "x", "higher")
    cases = dict.fromkeys((row["dtype"], row["threads"], bool(row["cold"])) for row in rows)
    for dtype, threads, cold in cases:
        case = (dtype, threads, cold)
        part = [row for row in rows if (row["dtype"], row["threads"], bool(row["cold"])) == case]
        auto = [row for row in part if row["format"] == "auto" and row["us"]]
        large = [row for row in auto if row["nnz"] > LARGE and row["over_vendor"]]
        regrets = [row["regret_percent"] for row in auto if row["regret_percent"] is not None]
        errors = [row["error_over_bound"] for row in part if row["error_over_bound"] is not None]
        over_vendor = [row["over_vendor"] for row in large]
        figures: Metrics = {
            "auto_over_scipy": (geomean(_column(auto, "over_scipy")), "x", "higher"),
            "auto_over_vendor": (geomean(_column(auto, "over_vendor")), "x", "higher"),
            "auto_wins": (_share(value >= 1 for value in over_vendor), "share", "higher"),
            "auto_worst": (min(over_vendor, default=None), "x", "higher"),
            "regret_median": (median(regrets) if regrets else None, "%", "lower"),
            "regret_p90": (_p90(regrets), "%", "lower"),
            "regret_max": (max(regrets, default=None), "%", "lower"),
            "error_over_bound": (max(errors, default=None), "1", "lower"),
            "matrices": (len({row["matrix"] for row in part}), "1", None),
            "disturbed": (_disturbed(part), "1", "lower"),
            "failed_formats": (sum(map(_failed, part)), "1", "lower"),
        }
        if not threads:
            del figures["auto_over_scipy"], figures["disturbed"]
        place = f"t{threads}" if threads else "gpu"
        both = cold and any((dtype, threads) == (d, t) and not c for d, t, c in cases)
        suffix = f"{_SHORT.get(dtype, dtype)}_{place}{'_cold' if both else ''}"
        metrics |= {f"{name}_{suffix}": figure for name, figure in figures.items()}
    return metrics


def claims(rows: Rows, reorderings: Rows) -> list[Claim]:
    """Judge the statements that the package makes about its speed.

    Args:
        rows: rows of a benchmark, see `hbp_spmv.evaluate.Row`.
        reorderings: one row per matrix and method, see `hbp_spmv.preprocessing`.
    """
    return [
        *_reorder_claims(reorderings),
        *[
            claim
            for dtype, threads in dict.fromkeys((row["dtype"], row["threads"]) for row in rows)
            for claim in _product_claims(rows, dtype, threads)
            if claim.found != "-" or dtype in ("float64", "float32")  # few matrices are complex
        ],
        *_scaling_claims(rows),
    ]


def _reorder_ratios(reorderings: Rows) -> list[tuple[str, str, dict[str, float]]]:
    """Return, per hash and baseline, how many times as fast the hash is, by matrix."""
    times: dict[str, dict[str, float]] = {}
    for row in reorderings:
        times.setdefault(row["method"], {})[row["matrix"]] = max(row["best_ms"], 1e-6)
    return [
        (method, name, {m: times[key][m] / ms for m, ms in times[method].items()})
        for method in ("lut", "paper")
        for key, name in (("sort", "sort2D"), ("DP2D", "DP2D"))
        if method in times and key in times
    ]


def _reorder_claims(reorderings: Rows) -> list[Claim]:
    targets = {"sort2D": 3.5, "DP2D": 3.7}
    result = [
        at_least(f"reorder by hash {method!r} against {name}", targets[name], ratios, below=1.0)
        for method, name, ratios in _reorder_ratios(reorderings)
    ]
    if not result:
        return []
    falls = {
        row["matrix"]: row["std_fall_percent"]
        for row in reorderings
        if row["method"] == "lut" and row["row_cv"] > 0.5
    }
    mean = sum(falls.values()) / len(falls) if falls else None
    result.append(
        Claim(
            text="fall of the within-group deviation by 'lut', mean where cv > 0.5",
            target=">= 60 %",
            found="-" if mean is None else f"{mean:.0f} % on {len(falls)}",
            passed=None if mean is None else mean >= 60,
        )
    )
    return result


def _product_claims(rows: Rows, dtype: str, threads: int) -> list[Claim]:
    where = f"{_SHORT.get(dtype, dtype)}, {threads} thread{'s' if threads > 1 else ''}"
    times = _times(rows, dtype, threads)
    large = {m: t for m, t in times.items() if t["nnz"] > LARGE and "auto" in t}
    attempted = any(
        row["format"] == "csr-torch" and (row["dtype"], row["threads"]) == (dtype, threads)
        for row in rows
    )
    result = [_library_claim(large, where, "failed" if attempted else "not installed")]
    skewed = _ratios(large, "csr-torch", lambda t: t["row_cv"] >= SKEWED)
    result.append(
        at_least(f"auto against torch (int32), cv >= 1, {where}", 1.25, skewed, below=1.0)
    )
    if threads == 1:
        scipy = _ratios(large, "csr-scipy", lambda t: t["row_cv"] >= SKEWED)
        result.append(at_least(f"auto against SciPy, cv >= 1, {where}", 1.8, scipy, below=1.0))
        scipy = _ratios(large, "csr-scipy", lambda t: True)
        result.append(at_least(f"auto against SciPy, all, {where}", 1.8, scipy, below=1.0))
    return result


def _library_claim(large: Mapping[str, Mapping[str, Any]], where: str, absence: str) -> Claim:
    """Judge `auto` by the faster library of each matrix; without torch, only say what was found.

    Args:
        large: times by matrix and format.
        where: type and threads, in words.
        absence: why a matrix lacks a time of torch.
    """
    best = {
        matrix: min(t[name] for name in ("csr-scipy", "csr-torch") if name in t) / t["auto"]
        for matrix, t in large.items()
        if "csr-scipy" in t
    }
    share = _share(ratio >= 1 for ratio in best.values())
    worst = min(best.values(), default=0.0)
    lacking = [matrix for matrix in best if "csr-torch" not in large[matrix]]
    found = "-" if share is None else f"{100 * share:.0f} % of {len(best)}, least {worst:.2f}x"
    if lacking:
        some = "" if len(lacking) == len(best) else f" on {', '.join(sorted(lacking))}"
        found = f"torch {absence}{some}; against SciPy only{' there' if some else ''}: {found}"
    return Claim(
        text=f"auto against the best of SciPy and torch, {where}",
        target=">= 1.0x on >= 90 %, never < 0.9x",
        found=found,
        passed=None if share is None or lacking else share >= 0.9 and worst >= 0.9,
        detail=losses(best, below=1.0),
    )


def _scaling_claims(rows: Rows) -> list[Claim]:
    result = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        one, two = (_times(rows, dtype, threads) for threads in (1, 2))
        ratios = {
            matrix: t["auto"] / two[matrix]["auto"]
            for matrix, t in one.items()
            if t["nnz"] > _THREADED and "auto" in t and "auto" in two.get(matrix, {})
        }
        if ratios:
            name = f"auto on 2 threads against 1, above 2e5 nonzeros, {_SHORT.get(dtype, dtype)}"
            result.append(at_least(name, 1.7, ratios, below=1.5))
    return result


def at_least(text: str, target: float, ratios: Mapping[str, float], *, below: float) -> Claim:
    """Claim a geometric mean, and name every matrix whose ratio is `below`."""
    mean = geomean(ratios.values())
    return Claim(
        text=text,
        target=f">= {target}x (geomean)",
        found="-" if mean is None else f"{mean:.2f}x on {len(ratios)}",
        passed=None if mean is None else mean >= target,
        detail=losses(ratios, below=below),
    )


def losses(ratios: Mapping[str, float], *, below: float) -> str:
    """Name every matrix whose ratio is `below`, the worst first."""
    lost = sorted((ratio, matrix) for matrix, ratio in ratios.items() if ratio < below)
    return ", ".join(f"{matrix} {ratio:.2f}" for ratio, matrix in lost)


def _times(rows: Rows, dtype: str, threads: int) -> dict[str, dict[str, Any]]:
    """Return, by matrix, the median time of each format, with `nnz` and `row_cv`."""
    result: dict[str, dict[str, Any]] = {}
    for row in rows:
        if (row["dtype"], row["threads"]) == (dtype, threads) and row["us"]:
            facts = {"nnz": row["nnz"], "row_cv": row["row_cv"]}
            result.setdefault(row["matrix"], facts)[row["format"]] = row["us"]
    return result


def _ratios(
    times: Mapping[str, Mapping[str, Any]], base: str, holds: Callable[[Mapping[str, Any]], bool]
) -> dict[str, float]:
    return {m: t[base] / t["auto"] for m, t in times.items() if base in t and holds(t)}


def _column(rows: Rows, name: str) -> list[float]:
    return [row[name] for row in rows if row[name] is not None]


def _share(holds: Iterable[bool]) -> float | None:
    found = list(holds)
    return sum(found) / len(found) if found else None


def _failed(row: Mapping[str, Any]) -> bool:
    """Tell whether a format was measured and failed; one that is left out says so first."""
    return row["error"] is not None and not row["error"].startswith(LEFT_OUT)


def _disturbed(rows: Rows) -> int:
    """Count the matrices during whose timing others were running or a core was not there."""
    return len(
        {
            row["matrix"]
            for row in rows
            if (row["foreign_cores"] or 0) > FOREIGN
            or (row["speed_up"] is not None and row["speed_up"] < LEAST_SPEED_UP)
        }
    )


def _p90(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return max(values, default=None)
    return quantiles(values, n=10, method="inclusive")[8]
