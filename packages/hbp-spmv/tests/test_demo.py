# SPDX-License-Identifier: Apache-2.0
"""The demonstration: what it claims holds here, with a margin for a busy machine."""

import json

import pytest
from hbp_spmv.cli import main
from hbp_spmv.output import read_rows
from hbp_spmv.summary import geomean
from tenfold_core.run.record import validate

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Run it once; return its folder."""
    out = tmp_path_factory.mktemp("demo") / "out"
    assert main(["demo", "--out", str(out), "--quiet", "--json"]) == 0
    return out


def test_the_record_is_whole_and_names_every_file(demo):
    record = json.loads((demo / "run.json").read_text(encoding="utf-8"))
    validate(record)
    assert record["status"] == "done"
    assert record["command"][:2] == ["hbp-spmv", "demo"]
    assert {artefact["path"] for artefact in record["artefacts"]} == {"rows.jsonl", "reorder.jsonl"}
    assert record["metrics"]["matrices_f64_t1"]["value"] == 6


def test_every_product_stays_within_its_bound(demo):
    rows = read_rows(demo / "rows.jsonl")
    assert [row["error"] for row in rows if row["error"]] == []
    assert max(row["error_over_bound"] for row in rows) <= 1


def test_the_hash_orders_rows_faster_than_sorting_and_dynamic_programming(demo):
    metrics = json.loads((demo / "run.json").read_text(encoding="utf-8"))["metrics"]
    assert metrics["reorder_lut_over_sort2D"]["value"] >= 2
    assert metrics["reorder_lut_over_DP2D"]["value"] >= 2
    assert metrics["reorder_paper_over_DP2D"]["value"] >= 2


def test_auto_beats_scipy_and_the_published_layout(demo):
    rows = [row for row in read_rows(demo / "rows.jsonl") if row["threads"] == 1]
    times = {(row["matrix"], row["format"]): row["us"] for row in rows}
    matrices = sorted({matrix for matrix, _ in times})
    over_scipy = geomean(times[m, "csr-scipy"] / times[m, "auto"] for m in matrices)
    over_paper = geomean(times[m, "hbp-paper"] / times[m, "auto"] for m in matrices)
    assert over_scipy >= 1.2
    assert over_paper >= 2
