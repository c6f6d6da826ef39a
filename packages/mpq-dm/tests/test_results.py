# SPDX-License-Identifier: Apache-2.0
"""The README's tables say what the rows say, losses included."""

import json

import pytest
from mpq_dm.results import readme_table
from tenfold_core.errors import InputError


@pytest.fixture
def results(tmp_path):
    def write(folder, *rows):
        (tmp_path / folder).mkdir(parents=True)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / folder / "rows.jsonl").write_text(lines)
        return tmp_path

    return write


def model(seed, error, **more):
    return {
        "seed": seed, "bits": "W3A6", "method": "mpq-dm", "bits_per_weight": 4.56, "error": error,
        "error_low": error - 0.001, "error_high": error + 0.002, "frechet": 0.9, "accuracy": 0.99,
        **more,
    }  # fmt: skip


def test_one_seed_has_its_interval(results):
    text = readme_table(results("demo", model(0, 0.007)), "README.md", "demo/table")

    assert "| W3A6 mpq-dm | 4.56 | 7.0 [6.0, 9.0] | 0.90 | 0.990 |" in text


def test_several_seeds_have_their_mean_and_range(results):
    folder = results("demo", model(0, 0.006), model(1, 0.008))

    assert "| 7.0 (6.0 to 8.0) |" in readme_table(folder, "README.md", "demo/table")


def test_missed_targets_are_shown(results):
    missed = {"figure": "speed", "value": 2.019, "unit": "x", "target": ">= 2.5", "met": False}
    folder = results("cpu/latency", missed, {**missed, "figure": "no target", "target": ""})

    text = readme_table(folder, "README.md", "cpu/targets")

    assert "| speed | 2.02 x | >= 2.5 | missed |" in text
    assert "no target" not in text


def test_unknown_tables_and_missing_rows_are_named(tmp_path):
    with pytest.raises(
        InputError, match="table 'demo/more', expected one of table, short, planted"
    ):
        readme_table(tmp_path, "README.md", "demo/more")
    with pytest.raises(InputError, match="needs rows in"):
        readme_table(tmp_path, "README.md", "demo/table")
