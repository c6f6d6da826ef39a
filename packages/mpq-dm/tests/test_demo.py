# SPDX-License-Identifier: Apache-2.0
"""The demonstration: its rows are those of packed models, its claims follow from them."""

import json
from functools import partial

import pytest
from mpq_dm.demo import LADDER, OTHERS, SETTINGS, Demo, claims, rows
from mpq_dm.demo_command import run_demo
from mpq_dm.planted import compare

SMALL = {
    "samples": 16, "longer": False,
    "fine_tuning": {"trajectories": 1, "batch_size": 4, "rounding_steps": 2, "calib_samples": 4},
}  # fmt: skip


@pytest.fixture(scope="module")
def demo():
    """A demonstration whose measurements the tests share; rows only add to it."""
    return Demo(**SMALL)


def test_every_promised_row_is_there():
    assert {(4, 8), (3, 6), (2, 6)} <= set(SETTINGS)
    assert all(set(LADDER) <= set(SETTINGS[bits]) for bits in ((4, 8), (3, 6), (2, 6)))
    assert set(OTHERS) <= set(SETTINGS[3, 6])
    assert {"stepwise-mse", "efficientdm"} <= set(SETTINGS[3, 4])


def test_the_command_writes_a_table_a_grid_and_a_record(tmp_path, monkeypatch):
    monkeypatch.setattr("mpq_dm.demo_command.compare", partial(compare, seeds=1))
    settings = {(3, 6): ("rtn-mse", "stepwise-mse", "efficientdm", "mpq-dm")}

    found = run_demo(tmp_path, settings=settings, command=["mpq-dm", "demo"], **SMALL)

    record = json.loads((tmp_path / "run.json").read_text())
    assert record["status"] == "done"
    assert {part["path"] for part in record["artefacts"]} == {"rows.jsonl", "grid.png"}
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [line["method"] for line in lines[:5]] == ["full precision", *settings[3, 6]]
    assert lines[0]["error"] == 0
    assert all(line["error_low"] <= line["error"] <= line["error_high"] for line in lines[1:5])
    assert record["metrics"]["error_W3A6_mpq-dm"]["value"] == lines[4]["error"]
    assert record["metrics"]["planted_gain_kurtosis_w3"]["value"] == pytest.approx(0.38, abs=0.05)
    assert any("mpq-dm minus efficientdm" in line for line in found.lines)
    assert len(found.tables) == 2


@pytest.mark.parametrize("method", OTHERS)
def test_other_methods_have_rows_as_well(method, demo):
    row = demo.row(3, 6, method)

    assert 0 < row["error"] < 0.2
    assert row["bits_per_weight"] < 5


def test_claims_are_ratios_and_paired_differences():
    demo = Demo(**SMALL)
    table = list(rows(demo, {(4, 8): ("stepwise-mse", "efficientdm", "mpq-dm")}))

    found = claims(demo, table)

    errors = {row["method"]: row["error"] for row in table}
    ratio = errors["stepwise-mse"] / errors["efficientdm"]
    assert found["fine_tuning_ratio_W4A8"] == pytest.approx(ratio)
    gap = found["mpq-dm_minus_efficientdm_W4A8"]
    assert gap["difference"] == pytest.approx(errors["mpq-dm"] - errors["efficientdm"])
    assert gap["low"] <= gap["difference"] <= gap["high"]


@pytest.mark.slow
def test_the_claims_hold():
    """Fine-tuning halves the error at W3A4, and W4A8 is as good as full precision."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        demo = Demo()
        methods = ("stepwise-mse", "efficientdm")
        table = list(rows(demo, {(3, 4): methods, (4, 8): ("efficientdm",)}))
    finally:
        torch.set_num_threads(threads)

    by_name = {(row["bits"], row["method"]): row for row in table}
    before, after = (by_name["W3A4", method]["error"] for method in methods)
    assert after < before / 2
    exact, rounded = table[0], by_name["W4A8", "efficientdm"]
    assert rounded["accuracy"] > exact["accuracy"] - 0.01
    assert rounded["frechet"] < exact["frechet"] + 0.3
