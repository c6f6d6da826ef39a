# SPDX-License-Identifier: Apache-2.0
"""Tables, verdicts, claims and the roofline, from rows made by hand."""

import json

import pytest
from hbp_spmv.evaluate import COLUMNS
from hbp_spmv.output import write_rows
from hbp_spmv.report import (
    CASE_COLUMNS,
    ORDER_COLUMNS,
    case_cells,
    case_title,
    claim_lines,
    machine_line,
    order_cells,
    product_table,
    regenerate,
    roofline,
    size_slope,
    size_table,
    verdict,
)
from hbp_spmv.summary import claims, geomean, record_metrics
from tenfold_core.errors import InputError


def failed_row(format_, error, **more):
    """Return a row of a format that could not be measured."""
    return row(format_, 1.0, **more) | {
        "us": None, "gflops": None, "gbs": None, "over_vendor": None, "build_ms": None,
        "error": error,
    }  # fmt: skip


def row(format_, us, **more):
    """Return a row of a 10 x 10 matrix with 50 000 entries that takes `us` in a format."""
    facts = dict.fromkeys(COLUMNS) | {
        "matrix": "m", "rows": 10, "columns": 10, "nnz": 50_000, "row_mean": 5.0, "row_cv": 1.5,
        "dtype": "float64", "threads": 1, "cold": False, "format": format_, "layout": None,
        "bytes": 2048, "build_ms": 1.5, "us": us, "us_p10": us, "us_p90": us, "us_min": us,
        "samples": 20, "gflops": 100 / us, "gbs": 500 / us, "copy_gbs": 30.0, "copy_percent": 50.0,
        "error_over_bound": 0.25, "over_scipy": 40 / us, "over_vendor": 30 / us,
        "vendor": "csr-torch", "breakeven": 7,
    }  # fmt: skip
    return facts | more


def case(auto_us=20.0, **more):
    """Return the rows of one case; SciPy takes 40 us, torch 30, our best layout 16."""
    return [
        row("auto", auto_us, layout="compact", regret_percent=25.0, **more),
        row("csr-scipy", 40.0, **more),
        row("csr-torch", 30.0, **more),
        row("hbp-compact", 16.0, layout="compact", **more),
    ]


def order(method, ms, fall, matrix="m", cv=1.5):
    return {
        "matrix": matrix, "row_cv": cv, "method": method, "best_ms": ms, "median_ms": ms,
        "std_fall_percent": fall, "lane_efficiency": 0.5,
    }  # fmt: skip


ORDERS = [
    order("none", 0.1, 0), order("paper", 1, 40), order("lut", 2, 70), order("sort", 8, 75),
    order("quick", 6, 75), order("DP2D", 16, 75),
]  # fmt: skip


def test_a_case_is_told_in_one_line_per_format():
    rows = [*case(), failed_row("ell", "InputError: too wide")]
    assert case_title(rows) == (
        "m: 10 x 10, 50000 nonzeros (5.0 a row, cv 1.50), float64, 1 thread, hot"
    )
    cells = case_cells(rows)
    assert all(len(line) == len(CASE_COLUMNS) for line in cells)
    assert cells[0] == [
        "auto (compact)", "2", "1.5", "20", "20", "20", "5", "25", "50", "0.25", "2", "1.5", "7",
    ]  # fmt: skip
    assert cells[-1][:2] == ["ell", "failed"]
    assert case_cells([row("x", 0.00012, breakeven=None)])[0][-1] == "never"


def test_the_verdict_names_choice_regret_and_library():
    assert verdict(case()) == [
        "auto chose compact, regret 25.0 % (best of ours: hbp-compact); 1.50x as fast as csr-torch"
    ]


def test_the_verdict_says_plainly_when_hbp_loses():
    (line,) = verdict(case(auto_us=60.0, breakeven=None))
    assert "HBP LOSES: csr-torch is 2.00x as fast as auto" in line
    assert "the build never pays against csr-scipy" in line
    (line,) = verdict([*case(), row("sell", 10.0)])
    assert "fastest of all: sell, 2.00x as fast as auto" in line


def test_the_verdict_warns_of_other_processes():
    lines = verdict(case(foreign_cores=0.84))
    assert lines[0] == "other processes used 0.8 cores meanwhile: do not trust this table"
    assert len(verdict(case(foreign_cores=0.02))) == 1


def test_the_verdict_tells_every_failure():
    failed = [failed_row("auto", "a: b"), row("csr-scipy", 40.0)]
    assert verdict(failed) == ["auto failed: a: b"]


def test_geometric_mean():
    assert geomean([2.0, 8.0]) == pytest.approx(4)
    assert geomean([]) is None


def test_metrics_of_a_record():
    rows = case() + case(auto_us=40.0, matrix="slow") + case(nnz=100, matrix="small")
    found = record_metrics(rows, ORDERS)
    assert found["auto_over_vendor_f64_t1"][0] == pytest.approx((1.5 * 0.75 * 1.5) ** (1 / 3))
    assert found["auto_wins_f64_t1"] == (0.5, "share", "higher")
    assert found["auto_worst_f64_t1"] == (0.75, "x", "higher")
    assert found["regret_max_f64_t1"] == (25.0, "%", "lower")
    assert found["matrices_f64_t1"][0] == 3
    assert found["reorder_paper_over_DP2D"] == (pytest.approx(16.0), "x", "higher")


def test_claims_pass_and_miss_by_their_targets():
    verdicts = {claim.text: claim.passed for claim in claims(case(), ORDERS)}
    assert verdicts == {
        "reorder by hash 'lut' against sort2D": True,  # 8 / 2
        "reorder by hash 'lut' against DP2D": True,  # 16 / 2
        "reorder by hash 'paper' against sort2D": True,
        "reorder by hash 'paper' against DP2D": True,
        "fall of the within-group deviation by 'lut', mean where cv > 0.5": True,
        "auto against the best of SciPy and torch, f64, 1 thread": True,  # 30 / 20
        "auto against torch (int32), cv >= 1, f64, 1 thread": True,
        "auto against SciPy, cv >= 1, f64, 1 thread": True,  # 40 / 20
        "auto against SciPy, all, f64, 1 thread": True,
    }
    slow = {claim.text: claim for claim in claims(case(auto_us=35.0), [])}
    best = slow["auto against the best of SciPy and torch, f64, 1 thread"]
    assert not best.passed
    assert best.detail == "m 0.86"
    assert best.found == "0 % of 1, least 0.86x"


def test_without_torch_the_claim_about_libraries_is_not_judged():
    text = "auto against the best of SciPy and torch, f64, 1 thread"
    rows = [row for row in case() if row["format"] != "csr-torch"]
    (claim,) = [claim for claim in claims(rows, []) if claim.text == text]
    assert claim.passed is None
    assert claim.found == "torch not installed; against SciPy only: 100 % of 1, least 2.00x"
    rows += [failed_row("csr-torch", "RuntimeError: x"), *case(matrix="n")]
    (claim,) = [claim for claim in claims(rows, []) if claim.text == text]
    assert claim.passed is None
    assert claim.found.startswith("torch failed on m; against SciPy only there: 100 % of 2")


def test_claims_that_nothing_was_measured_for_are_told_so():
    small = claims(case(nnz=100), [])
    assert {claim.passed for claim in small} == {None}
    assert claims([], []) == []


def test_two_threads_are_compared_with_one():
    rows = case(nnz=300_000) + case(auto_us=10.0, nnz=300_000, threads=2)
    text = "auto on 2 threads against 1, above 2e5 nonzeros, f64"
    (found,) = [claim for claim in claims(rows, []) if claim.text == text]
    assert (found.found, found.passed) == ("2.00x on 1", True)


def test_claim_lines_name_the_losses():
    lines = claim_lines(claims(case(auto_us=50.0), ORDERS))
    assert lines[0].startswith("pass  reorder by hash 'lut' against sort2D: 4.00x on 1")
    assert any(line.startswith("MISS") and line.endswith("m 0.60") for line in lines)


def test_row_orders_as_cells():
    (cells,) = order_cells(ORDERS)
    assert len(cells) == len(ORDER_COLUMNS)
    assert cells == ["m", "1.50", "1", "2", "8", "6", "16", "40 %", "70 %", "75 %"]


def test_products_as_a_table():
    rows = [*case(), failed_row("hbp-compact", "x: y", matrix="n", row_cv=0.0)]
    lines = product_table(rows, "float64", 1).splitlines()
    assert lines[2] == "| m | 50000 | 1.50 | 1.5 | 40 | 30 | 16 | 20 (compact) | 5 | 1.5 |"
    assert lines[3] == "| n | 50000 | 0.00 | - | - | - | - | - (failed) | - | - |"


def test_cost_over_size_as_a_table_with_slopes():
    rows = [
        {"tier": "cache", "layout": "csr", "nnz": 1000 * k, "build_ms": 0.5 * k, "us": 2.0 * k * k}
        for k in (1, 2, 4)
    ]
    assert size_slope(rows, "build_ms") == pytest.approx(1)
    lines = size_table(rows).splitlines()
    assert lines[2] == "| cache | csr | 1000 | 0.5 | 500 | 2 | 2 |"
    assert lines[5] == "| cache | csr | slope |  | 1.00 (pass) |  | 2.00 (miss) |"


def test_the_machine_in_one_line():
    assert machine_line([(32 << 10, 35.6), (1 << 20, 95.0)]).endswith("32 KiB 36, 1 MiB 95")


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_the_roofline_is_drawn(suffix, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"r.{suffix}"
    roofline(path, case(), [(1 << 15, 40.0), (1 << 27, 12.0)])
    assert path.stat().st_size > 5000
    if suffix == "svg":
        text = path.read_text(encoding="utf-8")
        assert all(word in text for word in ("hbp-compact", "copy 32 KiB, 40 GB/s", "GFLOP/s"))
        before = path.read_bytes()
        roofline(path, case(), [(1 << 15, 40.0), (1 << 27, 12.0)])
        assert path.read_bytes() == before


def test_a_roofline_of_nothing_is_refused(tmp_path):
    with pytest.raises(InputError, match="nothing was measured"):
        roofline(tmp_path / "r.svg", [failed_row("auto", "a: b")], [])
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def package(tmp_path):
    """A package folder with one result folder, a README and a page of tables."""
    results = tmp_path / "benchmarks" / "results"
    (results / "suite").mkdir(parents=True)
    write_rows(results / "suite" / "rows.jsonl", case())
    lines = "".join(json.dumps(found) + "\n" for found in ORDERS)
    (results / "suite" / "reorder.jsonl").write_text(lines, encoding="utf-8")
    block = "<!-- results: suite/{} -->\n{}<!-- /results -->\n"
    readme = "# Title\n\n" + block.format("claims", "old\n") + "\nText.\n"
    (tmp_path / "README.md").write_text(readme, encoding="utf-8")
    page = block.format("reorder", "") + "\nBetween.\n\n" + block.format("products-f64-1", "")
    (results / "suite.md").write_text(page, encoding="utf-8")
    return tmp_path


def test_tables_are_rewritten_between_their_marks(package, capsys):
    assert regenerate(package, check=True) == 1
    assert "README.md: differs" in capsys.readouterr().err
    assert "old" in (package / "README.md").read_text(encoding="utf-8")
    assert regenerate(package) == 0
    assert regenerate(package, check=True) == 0
    text = (package / "README.md").read_text(encoding="utf-8")
    assert text.startswith("# Title\n\n<!-- results: suite/claims -->\n\n| claim |")
    assert text.endswith("|\n\n<!-- /results -->\n\nText.\n")
    assert "old" not in text
    page = (package / "benchmarks" / "results" / "suite.md").read_text(encoding="utf-8")
    assert page.index("| m | 1.50 | 1 | 2 |") < page.index("Between.") < page.index("20 (compact)")


@pytest.mark.parametrize(
    ("table", "text"),
    [
        ("suite/nothing", "expected claims, reorder, sizes or"),
        ("gone/claims", "is missing; run 'make"),
    ],
)
def test_a_table_that_cannot_be_made_is_an_error(table, text, package):
    mark = f"<!-- results: {table} -->\n<!-- /results -->\n"
    (package / "README.md").write_text(mark, encoding="utf-8")
    with pytest.raises(InputError, match=text):
        regenerate(package)
