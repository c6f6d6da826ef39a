# SPDX-License-Identifier: Apache-2.0
"""The command line: results on stdout, records on disk, one line for bad input."""

import json
from functools import partial

import pytest
from mpq_dm.cli import main

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    model = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1,
        block_out_channels=(16, 32), norm_num_groups=8, attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    pipeline = diffusers.DDPMPipeline(model, diffusers.DDPMScheduler())
    pipeline.save_pretrained(path)
    return path


def test_analyze_describes_every_layer_of_a_pipeline(folder, capsys, tmp_path):
    assert main(["analyze", str(folder), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr()
    assert "mid_block.attentions.0.to_q" in printed.out
    assert "weight error saved" in printed.out
    assert "reading" in printed.err
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    body = [row for row in rows if row["role"] == "body"]
    assert all(row["exact"] <= row["kurtosis"] <= row["uniform"] for row in body)
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["metrics"]["layers"]["value"] == len(rows)


def test_analyze_takes_the_model_folder_and_prints_one_line_of_json(folder, capsys):
    assert main(["analyze", str(folder / "unet"), "--json", "--quiet", "--weight-bits", "3"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert 0 <= found["gain_kurtosis"] <= found["gain_exact"] < 1
    assert printed.err == ""


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["nowhere"], "nowhere: no such file or folder"),
        (["{empty}"], "neither config.json nor"),
        (["{broken}"], "not readable as JSON"),
        (["{foreign}"], "_class_name is 'Nobody'"),
        (["{quantized}"], "quantized already (other)"),
        (["{weightless}"], "weightless"),
        (["{unet}", "--weight-bits", "1"], "mixing needs 0, 1 and 2 bits"),
        (["{unet}", "--weight-bits", "9"], "weight_bits is 9, expected 1 to 8"),
        (["{unet}", "--omq-range", "some"], "omq_range is 'some', expected paper or official"),
    ],
)
def test_bad_input_is_one_line(arguments, text, folder, tmp_path, capsys):
    configs = {
        "empty": None, "broken": "{", "foreign": '{"_class_name": "Nobody"}',
        "quantized": '{"quantization_config": {"quant_method": "other"}}',
        "weightless": '{"_class_name": "UNet2DModel"}',
    }  # fmt: skip
    places = {"unet": folder / "unet"}
    for name, content in configs.items():
        places[name] = tmp_path / name
        places[name].mkdir()
        if content is not None:
            (places[name] / "config.json").write_text(content)
    arguments = [argument.format(**places) for argument in arguments]
    assert main(["analyze", *arguments, "--quiet", "--out", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert text in printed.err
    assert len(printed.err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_the_demonstration_shows_the_planted_outliers(capsys, tmp_path, monkeypatch):
    """The verb at its smallest: the model itself, few images, one layer of each kind."""
    from mpq_dm import demo_command, planted

    small = partial(demo_command.run_demo, settings={}, samples=4)
    monkeypatch.setattr(demo_command, "compare", partial(planted.compare, seeds=1))
    monkeypatch.setattr(demo_command, "run_demo", small)

    assert main(["demo", "--out", str(tmp_path), "--quiet", "--workers", "1"]) == 0

    printed = capsys.readouterr()
    assert "Gaussian rows only" in printed.out
    assert "full precision" in printed.out
    assert printed.err == ""
    metrics = json.loads((tmp_path / "run.json").read_text())["metrics"]
    gains = [metrics[f"planted_gain_{name}_w3"]["value"] for name in ("kurtosis", "exact")]
    assert 0.3 < gains[0] <= gains[1]
