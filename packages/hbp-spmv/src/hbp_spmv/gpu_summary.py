# SPDX-License-Identifier: Apache-2.0
"""What the rows of a GPU say together: the targets of the package there, and every loss.

Claims about kernels compare products in CUDA graphs, where a format has one, and otherwise calls;
claims about calls compare what a user waits for. All are hot.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from hbp_spmv.summary import SKEWED, Claim, at_least, losses

__all__ = ["FEW_STRIPS", "LARGE", "gpu_claims", "graph_time"]

LARGE = 1_000_000
"""Nonzeros from which a product is more than its launch."""
FEW_STRIPS = 16
"""Strips of 4096 columns up to which the published layout stays small."""
REGULAR = ("stencil", "banded")
"""How the names of matrices begin that are like those of finite elements."""
_CUSPARSE = ("cusparse-csr-alg1", "cusparse-csr-alg2")
_SHORT = {"float64": "f64", "float32": "f32"}

Rows = Sequence[Mapping[str, Any]]
Case = dict[str, Mapping[str, Any]]


def gpu_claims(rows: Rows, ablation: Rows = ()) -> list[Claim]:
    """Judge the statements about a GPU; where there are no rows, nothing is judged.

    Args:
        rows: rows of a benchmark on a GPU.
        ablation: rows of `gpu_ablation`.
    """
    hot = [row for row in rows if not row["cold"] and row["us"]]
    result = []
    for dtype in ("float64", "float32"):
        cases: dict[str, Case] = {}
        for row in hot:
            if row["dtype"] == dtype:
                cases.setdefault(row["matrix"], {})[row["format"]] = row
        result += _claims_of(cases, _SHORT[dtype])
    return [*result, _build_claim(ablation)]


def graph_time(row: Mapping[str, Any]) -> float:
    """Return the time of a product in a graph, or of a call where there is no graph."""
    return row["graph_us"] or row["us"]


def _claims_of(cases: Mapping[str, Case], dtype: str) -> list[Claim]:
    auto = {name: case for name, case in cases.items() if "auto" in case}
    large = {name: case for name, case in auto.items() if case["auto"]["nnz"] >= LARGE}
    small = {name: case for name, case in auto.items() if name not in large}
    skewed = {
        name: case
        for name, case in cases.items()
        if {"hbp-paper", "csr-scalar-8192"} <= case.keys() and _is_skewed(case["hbp-paper"])
    }
    paper = {
        name: graph_time(case["csr-scalar-8192"]) / graph_time(case["hbp-paper"])
        for name, case in skewed.items()
    }
    best = "the better preprocessed cuSPARSE CSR (int32)"
    many, few = f"nnz >= 1e6, {dtype}", f"nnz < 1e6, {dtype}"
    in_graphs = {
        name: min(graph_time(case[v]) for v in _CUSPARSE if v in case) / graph_time(case["auto"])
        for name, case in large.items()
        if any(v in case for v in _CUSPARSE)
    }
    calls = _over(large, _CUSPARSE)
    int64, cupyx = _over(large, ("csr-torch-int64",)), _over(small, ("cupyx",))
    return [
        at_least(f"auto against {best}, in graphs, {many}", 1.3, in_graphs, below=1.0),
        at_least(f"auto against {best}, calls, {many}", 1.3, calls, below=1.0),
        at_least(f"auto against torch (int64), calls, {many}", 1.8, int64, below=1.0),
        _bandwidth_claim(large, dtype),
        at_least(f"auto against CuPy's A @ x, calls, {few}", 2.0, cupyx, below=2.0),
        _never_claim(auto, dtype),
        at_least(
            f"hbp-paper against csr-scalar-8192, cv >= 1, up to {FEW_STRIPS} strips, {dtype}",
            1.0, paper, below=1.0,
        ),
    ]  # fmt: skip


def _is_skewed(row: Mapping[str, Any]) -> bool:
    return row["row_cv"] >= SKEWED and row["columns"] <= FEW_STRIPS * 4096


def _over(cases: Mapping[str, Case], formats: Sequence[str]) -> dict[str, float]:
    """Return, by matrix, how many times as fast a call of `auto` is as the best of some formats."""
    return {
        name: min(case[v]["us"] for v in formats if v in case) / case["auto"]["us"]
        for name, case in cases.items()
        if any(v in case for v in formats)
    }


def _bandwidth_claim(cases: Mapping[str, Case], dtype: str) -> Claim:
    shares = {
        name: case["auto"]["copy_percent"] * case["auto"]["us"] / graph_time(case["auto"])
        for name, case in cases.items()
        if name.startswith(REGULAR)
    }
    worst = min(shares.values(), default=None)
    below = {name: share / 100 for name, share in shares.items()}
    return Claim(
        text=f"auto, share of the copy bandwidth, stencils and bands, nnz >= 1e6, {dtype}",
        target=">= 80 %",
        found="-" if worst is None else f"least {worst:.0f} % of {len(shares)}",
        passed=None if worst is None else worst >= 80,
        detail=losses(below, below=0.8),
    )


def _never_claim(cases: Mapping[str, Case], dtype: str) -> Claim:
    ratios = {
        name: case["auto"]["over_vendor"]
        for name, case in cases.items()
        if case["auto"]["over_vendor"]
    }
    worst = min(ratios.values(), default=None)
    return Claim(
        text=f"auto against the best call of any library, {dtype}",
        target="never < 0.95x",
        found="-" if worst is None else f"least {worst:.2f}x of {len(ratios)}",
        passed=None if worst is None else worst >= 0.95,
        detail=losses(ratios, below=0.95),
    )


def _build_claim(ablation: Rows) -> Claim:
    """Judge the build of layout compact by its own products, from CSR that is on the device."""
    products: dict[str, float] = {}
    for row in ablation:
        default = row["hash"] == "lut" and not row["strips"]
        if row["us"] and default and row["nnz"] >= LARGE:  # 16-bit columns come first
            products.setdefault(row["matrix"], 1e3 * row["build_ms"] / graph_time(row))
    worst = max(products.values(), default=None)
    slow = {name: count for name, count in products.items() if count > 30}
    return Claim(
        text="build of layout compact on the device, in products, nnz >= 1e6",
        target="<= 30",
        found="-" if worst is None else f"most {worst:.0f} of {len(products)}",
        passed=None if worst is None else worst <= 30,
        detail=losses(slow, below=float("inf")),
    )
