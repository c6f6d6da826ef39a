# SPDX-License-Identifier: Apache-2.0
import json
import os
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pytest
from hbp_spmv import calibrate, calibration, from_csr
from hbp_spmv.calibration import DEFAULT, load_calibration
from tenfold_core.errors import TenfoldWarning
from tenfold_core.testing.sparse import random_csr


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty cache folder; nothing is loaded yet."""
    monkeypatch.setenv("HBP_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(calibration, "_LOADED", [])
    monkeypatch.setattr(calibration, "_WARNED", [])
    return tmp_path


@pytest.fixture
def forget(monkeypatch):
    """Load again, as another process would."""
    return lambda: monkeypatch.setattr(calibration, "_LOADED", [])


@pytest.fixture
def quick(monkeypatch):
    """Measure every product with one call, and a fixed bandwidth."""

    def once(fn, budget=0.0):
        fn()
        return 1e-5

    monkeypatch.setattr(calibration, "_seconds", once)


def write(text):
    path = calibration._path()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def test_without_a_calibration_the_default_holds(folder):
    assert load_calibration() is DEFAULT
    assert not calibration.hardware_gather()
    assert list(folder.iterdir()) == []


def test_a_calibration_comes_back_in_another_process(folder, forget, quick):
    found = calibrate()
    assert load_calibration() is found
    forget()
    assert load_calibration() == found
    assert calibration._path().is_relative_to(folder)
    assert len(list(folder.rglob("*.json"))) == 1


def test_a_calibration_need_not_be_kept(folder, quick):
    found = calibrate(save=False)
    assert load_calibration() is found
    assert list(folder.iterdir()) == []


def test_every_cost_is_finite_and_not_negative(folder, quick):
    found = calibrate(save=False)
    costs = [getattr(found, f.name) for f in fields(found) if f.name.endswith(("_ns", "_us"))]
    assert len(costs) == 9
    assert all(0 <= cost < float("inf") for cost in costs)
    assert [size for size, _ in found.bandwidth] == sorted(size for size, _ in found.bandwidth)
    assert all(rate > 0 for _, rate in found.bandwidth)
    assert isinstance(found.gather, bool)
    assert found.cpu != "default"


def test_bandwidth_is_that_of_the_level_that_holds_the_working_set():
    levels = replace(DEFAULT, bandwidth=((100, 9.0), (1000, 5.0)))
    assert [levels.bandwidth_at(size) for size in (1, 100, 101, 1000, 5000)] == [9, 9, 5, 5, 5]


FIELDS = asdict(DEFAULT)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "3",
        "{}",
        json.dumps({"cpu": "x"}),
        json.dumps(FIELDS | {"surplus": 1}),
        json.dumps({name: value for name, value in FIELDS.items() if name != "miss_ns"}),
        json.dumps(FIELDS | {"bandwidth": []}),
        json.dumps(FIELDS | {"bandwidth": [[1, 2, 3]]}),
        json.dumps(FIELDS | {"bandwidth": [["a", 2]]}),
        json.dumps(FIELDS | {"bandwidth": [[1024, 0.0]]}),
        json.dumps(FIELDS | {"bandwidth": [[1024, float("nan")]]}),
        json.dumps(FIELDS | {"bandwidth": [["1024", 2.0]]}),
        json.dumps(FIELDS | {"bandwidth": [[1024.5, 2.0]]}),
        json.dumps(FIELDS | {"bandwidth": [[0, 2.0]]}),
        json.dumps(FIELDS | {"bandwidth": [[1024, True]]}),
        json.dumps(FIELDS | {"bandwidth": [[2048, 2.0], [1024, 1.0]]}),
        json.dumps(FIELDS | {"bandwidth": [[1024, 2.0], [1024, 1.0]]}),
        json.dumps(FIELDS | {"bandwidth": [[1024, 10**400]]}),
        "[" * 100_000,
        json.dumps(FIELDS | {"cpu": 3}),
        json.dumps(FIELDS | {"csr_row_ns": True}),
        json.dumps(FIELDS | {"csr_row_ns": "0.5"}),
        json.dumps(FIELDS | {"csr_row_ns": "fast"}),
        json.dumps(FIELDS | {"csr_row_ns": None}),
        json.dumps(FIELDS | {"csr_row_ns": float("nan")}),
        json.dumps(FIELDS | {"csr_row_ns": float("inf")}),
        json.dumps(FIELDS | {"csr_row_ns": -1.0}),
        json.dumps(FIELDS | {"gather": "yes"}),
    ],
)
def test_a_file_that_cannot_be_used_is_ignored(folder, text):
    write(text)
    assert load_calibration() is DEFAULT
    assert from_csr(random_csr(50, 50, density=0.2).to_scipy()).shape == (50, 50)


def test_a_file_that_is_no_text_is_ignored(folder):
    calibration._path().parent.mkdir(parents=True)
    calibration._path().write_bytes(b"\xff\xfe\x00")
    assert load_calibration() is DEFAULT


def test_a_folder_in_place_of_the_file_is_ignored(folder):
    calibration._path().mkdir(parents=True)
    assert load_calibration() is DEFAULT


def test_a_cache_that_cannot_be_written_warns_once_and_is_used(folder, quick, monkeypatch):
    blocked = folder / "file"
    blocked.touch()
    monkeypatch.setenv("HBP_CACHE_DIR", str(blocked))
    with pytest.warns(TenfoldWarning, match="calibration not kept") as caught:
        found = calibrate()
    assert len(caught) == 1
    assert load_calibration() is found
    calibrate()  # a second warning would be an error here


def test_a_user_without_a_home_has_the_default(monkeypatch):
    for name in ("HBP_CACHE_DIR", "XDG_CACHE_HOME", "HOME", "USERPROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(calibration, "_LOADED", [])
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(RuntimeError, match="home"):
        Path("~").expanduser()
    assert load_calibration() is DEFAULT
    assert from_csr(random_csr(50, 50, density=0.2).to_scipy()).shape == (50, 50)


def test_a_user_without_a_home_can_calibrate(monkeypatch, quick):
    for name in ("HBP_CACHE_DIR", "XDG_CACHE_HOME", "HOME", "USERPROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(calibration, "_LOADED", [])
    monkeypatch.setattr(calibration, "_WARNED", [])
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.warns(TenfoldWarning, match="calibration not kept"):
        found = calibrate()
    assert load_calibration() is found


def test_xdg_cache_home_is_respected(tmp_path, monkeypatch):
    monkeypatch.delenv("HBP_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert calibration._path().is_relative_to(tmp_path)


def test_seconds_is_the_best_of_several_calls():
    calls = []
    best = calibration._seconds(lambda: calls.append(1), budget=0.0)
    assert len(calls) == 6
    assert 0 <= best < 0.1


def test_measured_copies_move_what_they_claim(monkeypatch):
    # copies timed at 1 s each: the rate is the bytes read and written
    monkeypatch.setattr(calibration, "_seconds", lambda fn: 1.0)
    monkeypatch.setattr(np, "ones", lambda size: np.zeros(min(size, 8)))
    rates = calibration._bandwidth()
    assert all(rate == round(2 * 64 / 1e9, 2) for _, rate in rates)
