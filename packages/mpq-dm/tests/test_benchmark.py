# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: what is counted is right, what was asked is timed, and the record is whole."""

import json
import math

import pytest
import torch
from mpq_dm import peers
from mpq_dm.benchmark import BenchConfig, bench, bench_table
from mpq_dm.benchmarking import compare, first_call, machine_rates, resident_bytes, work_of
from mpq_dm.packed import packed_layers, set_mode
from tenfold_core.errors import ConfigError, MissingExtraError
from tenfold_core.run.record import validate
from tenfold_core.run.rows import read_jsonl
from torch import nn


@pytest.fixture
def folder(tmp_path, unet, scheduler, make, pack):
    """The tiny UNet packed, with its scheduler beside it."""
    _, _, steps = make()
    pack(unet, steps)
    unet.save_pretrained(tmp_path / "packed" / "unet")
    scheduler.save_pretrained(tmp_path / "packed" / "scheduler")
    return tmp_path / "packed"


@pytest.fixture
def run(folder, capsys):
    """Run the verb: run(repeats=3) -> what stands on stdout."""

    def call(**settings):
        from mpq_dm.cli_options import Conditions

        options = {
            "repeats": 3, "batch_size": 2, "conditions": Conditions(labels="0-9"), "quiet": True,
            "device": "cpu",
        }  # fmt: skip
        bench(str(folder), **options | settings)
        return capsys.readouterr().out

    return call


def test_work_of_a_call_by_hand():
    # a convolution of 3 x 3 from 2 to 5 channels on 4 x 4, then a linear layer of 4 to 7:
    # 16 * 5 * 18 products and 20 * 7 * 4
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.last = nn.Conv2d(2, 5, 3, padding=1), nn.Linear(4, 7)

        def forward(self, x):
            return self.last(self.conv(x))

    found = work_of(Model(), ((torch.zeros(1, 2, 4, 4),), {}))
    assert found.macs == 16 * 5 * 18 + 20 * 7 * 4
    assert found.values == (32 + 80) + (80 + 140)


def test_packed_and_plain_models_have_the_same_work(unet, make, pack, make_unet):
    _, sampler, steps = make()
    call = first_call(unet, sampler)
    plain = work_of(unet, call)
    assert work_of(pack(make_unet(), steps), call) == plain


def test_first_call_is_what_the_sampler_gives_and_leaves_no_hook(unet, make):
    _, sampler, steps = make()
    hooks = len(unet._forward_pre_hooks)
    args, kwargs = first_call(unet, sampler)
    assert torch.equal(args[0], sampler.noise(0))
    assert kwargs["timestep"].tolist() == [steps[0]] * 2
    assert len(unet._forward_pre_hooks) == hooks


def test_resident_bytes_count_what_a_mode_keeps(unet, make, pack):
    pack(unet, make()[2])
    stored = sum(t.nbytes for t in (*unet.parameters(), *unet.buffers()))
    weights = sum(math.prod(layer.shape) for _, layer in packed_layers(unet))
    set_mode(unet, "dequant")
    assert resident_bytes(unet) == stored + 4 * weights
    set_mode(unet, "int8")
    assert stored + weights < resident_bytes(unet)


def test_a_speed_up_is_the_first_over_the_other():
    found = compare(
        {"slow": lambda: sum(range(20_000)), "fast": lambda: sum(range(200))},
        repeats=5, device="cpu",
    )  # fmt: skip
    low, middle, high = found["fast"][1]
    assert 10 < middle < 1000
    assert low <= middle <= high
    assert found["slow"][1] == (1.0, 1.0, 1.0)


def test_rates_of_the_machine_are_positive():
    assert all(rate > 1e6 for rate in machine_rates("cpu", size=64, repeats=3).values())


def test_bench_without_the_original_writes_rows_and_a_record(run, tmp_path):
    text = run(out=tmp_path / "bench", baselines="fp32,bf16")
    rows = read_jsonl(tmp_path / "bench" / "rows.jsonl")
    assert [row["candidate"] for row in rows] == ["fp32", "bf16", "int8", "packed", "dequant"]
    assert all(row["images_per_s"] > 0 and row["macs"] == rows[0]["macs"] for row in rows)
    record = json.loads((tmp_path / "bench" / "run.json").read_text())
    validate(record)
    assert record["metrics"]["speedup/fp32"]["value"] == 1
    assert "random weights" in record["notes"][0]
    assert "slower than fp32: " in text
    assert "speed-up" in text


def test_bench_against_the_original_prints_one_line_of_json(run, make_unet, tmp_path):
    make_unet().save_pretrained(tmp_path / "original")
    text = run(against=str(tmp_path / "original"), modes="int8", steps=0, as_json=True)
    found = json.loads(text)
    assert text.count("\n") == 1
    assert found["notes"] == []
    assert [row["candidate"] for row in found["rows"]] == ["fp32", "int8"]
    assert found["rows"][0]["images_per_s"] is None


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"modes": ("int4",)}, "modes is 'int4', expected some of int8,packed,dequant"),
        ({"modes": ("int8", "int8")}, "modes is 'int8,int8'"),
        ({"baselines": ()}, "baselines is ''"),
        ({"repeats": 2}, "repeats is 2, expected 3 or more"),
        ({"steps": -1}, "steps is -1"),
    ],
)
def test_wrong_settings_are_named(settings, text):
    with pytest.raises(ConfigError, match=text):
        BenchConfig(model="x", **settings)


def test_a_table_has_a_cell_for_every_column():
    row = {
        "candidate": "int8", "seconds": 0.5, "seconds_q1": 0.4, "seconds_q3": 0.6, "speedup": 2.0,
        "speedup_q1": 1.9, "speedup_q3": 2.1, "images_per_s": None, "weight_bytes": 3_000_000,
        "macs": 10**9, "bound_seconds": 0.25, "bound_by": "int8 products",
    }  # fmt: skip
    assert bench_table([row]) == [
        ["int8", "500", "400 to 600", "2.00", "1.90 to 2.10", "", "3", "2", "250", "int8 products"]
    ]


def test_unknown_peers_are_named():
    with pytest.raises(ConfigError, match="peer is 'other', expected torchao"):
        peers.quantized_by("other", nn.Linear(2, 2))


def test_a_missing_peer_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "optimum", None)
    with pytest.raises(MissingExtraError, match=r"needs optimum-quanto: .*mpq-dm\[bench\]"):
        peers.quantized_by("quanto qint4", nn.Linear(2, 2))


def test_bytes_of_a_plain_model():
    model = nn.Linear(100, 50)
    assert peers.tensor_bytes(model.weight) == 20_000
    assert 20_200 < peers.stored_bytes(model) < 25_000
