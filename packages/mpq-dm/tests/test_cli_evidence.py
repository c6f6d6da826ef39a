# SPDX-License-Identifier: Apache-2.0
"""The verbs eval, report, size and info: results on stdout, one line for bad input."""

import copy
import json
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from mpq_dm.cli_evidence import evaluate, info, report, size
from mpq_dm.evaluating import EvalConfig, evaluate_to_folder
from mpq_dm.quantizing import Conditioning
from tenfold_core.errors import CheckpointError, ConfigError, TenfoldWarning
from tenfold_core.run.cli import main as run_command
from tenfold_core.run.record import validate
from tenfold_core.run.rows import read_jsonl

pytest.importorskip("diffusers")

VERBS = {"eval": evaluate, "report": report, "size": size, "info": info}
TIMESTEPS = [666.0, 333.0, 0.0]


def main(*arguments):
    return run_command("mpq-dm", VERBS, [str(argument) for argument in arguments])


@pytest.fixture
def folders(unet, scheduler, pack, tmp_path):
    """An original and a quantized folder: a denoiser with its scheduler beside it."""
    for name, model in (("plain", unet), ("packed", pack(copy.deepcopy(unet), TIMESTEPS))):
        model.save_pretrained(tmp_path / name / "unet")
        scheduler.save_pretrained(tmp_path / name / "scheduler")
    return tmp_path


def arguments(folders, out="out", *more):
    return [
        "eval", folders / "packed", "--against", folders / "plain", "--out", folders / out,
        "-n", 8, "--seeds", 2, "--batch-size", 8, "--labels", "0-9", "--quiet", *more,
    ]  # fmt: skip


def test_eval_writes_numbers_rows_a_grid_and_a_record(folders, capsys):
    assert main(*arguments(folders), "--data", "digits", "-n", 16, "--json") == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    told = json.loads(printed.out)
    out = folders / "out"
    assert sorted(path.name for path in out.iterdir()) == [
        "eval.json", "grid.png", "rows.jsonl", "run.json"
    ]  # fmt: skip
    assert not (folders / "out.state").exists()
    found = json.loads((out / "eval.json").read_text())
    assert found["settings"]["steps"] == 3
    assert {name: found[name] for name in told} == told
    rows = read_jsonl(out / "rows.jsonl")
    assert [row["seed"] for row in rows] == [0, 1]
    means = [np.mean(row["errors"]) for row in rows]
    assert found["paired"]["mean"] == pytest.approx(np.mean(means), rel=1e-5)
    assert (found["paired"]["min"], found["paired"]["max"]) == pytest.approx(
        (min(means), max(means)), rel=1e-5
    )
    assert found["paired"]["low"] < found["paired"]["mean"] < found["paired"]["high"]
    assert found["paired"]["noises"] == 32
    assert [step["timestep"] for step in found["steps"]] == TIMESTEPS
    assert found["real"]["class_accuracy"] > 0.98
    assert found["real"]["frechet_equal"] < found["original"]["frechet_equal"]["mean"]
    assert set(found["original"]) == set(found["quantized"]) >= {"kid", "kid_error", "recall"}
    assert found["size"]["bits_per_weight"] < 8 < found["size"]["original_bytes"]
    record = json.loads((out / "run.json").read_text())
    validate(record)
    assert record["status"] == "done"
    assert record["metrics"]["quantized_frechet"]["better"] == "lower"
    assert len(record["artefacts"]) == 3


def test_eval_without_data_compares_pairs_only(folders, capsys):
    assert main(*arguments(folders)) == 0
    printed = capsys.readouterr().out
    assert "Paired error" in printed
    assert "bits per weight" in printed
    assert "Frechet" not in printed
    assert main(*arguments(folders)) == 2  # out exists
    assert "exists already" in capsys.readouterr().err


def test_an_interrupted_evaluation_goes_on_and_gives_the_same(folders):
    config = EvalConfig(
        model=str(folders / "packed"), against=str(folders / "plain"), count=8, seeds=3,
        batch_size=4,
    )  # fmt: skip
    labels = Conditioning(labels="0-9")
    whole = evaluate_to_folder(config, folders / "whole", labels)

    def stop(what, done, total):
        if what.startswith("seed 1"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate_to_folder(config, folders / "parts", labels, progress=stop)
    assert not (folders / "parts").exists()
    assert [row["seed"] for row in read_jsonl(folders / "parts.state" / "rows.jsonl")] == [0]
    told = []
    found = evaluate_to_folder(
        config, folders / "parts", labels, resume=True,
        progress=lambda what, done, total: told.append(what.split(",")[0]),
    )  # fmt: skip
    assert sorted(set(told)) == ["seed 1", "seed 2"]
    for result in (whole, found):
        for row in result["seeds"]:
            del row["seconds"]
    assert found == whole
    assert (folders / "parts" / "grid.png").is_file()
    assert not (folders / "parts.state").exists()


def test_going_on_with_other_settings_is_refused(folders, capsys):
    config = {"model": str(folders / "packed"), "against": str(folders / "plain"), "batch_size": 4}
    labels = Conditioning(labels="0-9")

    def stop(what, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate_to_folder(EvalConfig(**config, count=8), folders / "out", labels, progress=stop)
    with pytest.raises(CheckpointError, match=r"out\.state: count is 8, and 12 now"):
        evaluate_to_folder(EvalConfig(**config, count=12), folders / "out", labels, resume=True)
    assert main(*arguments(folders)) == 2
    assert "an unfinished evaluation; give --resume" in capsys.readouterr().err
    assert main(*arguments(folders, "other"), "--resume") == 2
    assert "no unfinished evaluation" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--data", "nowhere"], "nowhere: no such file or folder"),
        (["--data", "{plain}"], "no parquet file"),
        (["--data", "{large}"], "images of shape (1, 16, 16), expected (1, 8, 8)"),
        (["--data", "{colour}"], "images of shape (3, 8, 8), expected (1, 8, 8)"),
        (["--data", "{unnamed}"], "images of one class, expected two or more"),
        (["--data", "{few}"], "4 images held out, expected 8 or more"),
        (["--data", "digits", "--image-size", "16"], "image size is 16, expected none"),
        (["--data", "digits", "-n", "7"], "count is 7, expected 8 or more"),
        (["--image-size", "8"], "give --data"),
        (["--data", "digits", "--features", "nowhere.pt"], "nowhere.pt: no such file"),
        (["--data", "digits", "--features", "{large}"], "suffix '.npz', expected .pt"),
        (["--data", "digits", "--features", "{broken}"], "not readable as TorchScript"),
        (["--labels", "10"], "labels: 10, expected 0 to 9"),
        (["--against", "{packed}"], "quantized already"),
        (["--against", "{other}"], "in_channels of the original is 3, expected 1"),
        (["--mode", "fast"], "mode is 'fast'"),
        (["--out", "{missing}"], "does not exist"),
        (["--seeds", "0"], "seeds is 0, expected 1 or more"),
    ],
)  # fmt: skip
def test_bad_input_of_eval_is_one_line_and_leaves_nothing(
    more, text, folders, make_unet, tmp_path, capsys
):
    places = {name: folders / name for name in ("plain", "packed", "other")}
    rng = np.random.default_rng(0)
    shapes = {
        "large": (40, 16, 16), "colour": (40, 8, 8, 3), "unnamed": (40, 8, 8), "few": (20, 8, 8)
    }  # fmt: skip
    for name, shape in shapes.items():
        places[name] = tmp_path / f"{name}.npz"
        labels = (
            np.zeros(len(range(shape[0])), int) if name == "unnamed" else np.arange(shape[0]) % 2
        )
        np.savez(places[name], images=rng.integers(0, 255, shape, np.uint8), labels=labels)
    places["broken"] = tmp_path / "broken.pt"
    places["broken"].write_bytes(b"nothing")
    places["missing"] = tmp_path / "missing" / "out"
    if "{other}" in more:
        make_unet(in_channels=3).save_pretrained(places["other"] / "unet")
    before = sorted(folders.iterdir())
    assert main(*arguments(folders), *[part.format(**places) for part in more]) == 2
    printed = capsys.readouterr()
    assert text in printed.err
    assert len(printed.err.splitlines()) == 1
    assert printed.out == ""
    assert sorted(folders.iterdir()) == before


def test_a_program_of_the_user_gives_the_features(folders, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on how old the format is
        program = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten())
        torch.jit.save(torch.jit.script(program), folders / "means.pt")
    more = ["--data", "digits", "--features", folders / "means.pt", "--json"]
    assert main(*arguments(folders), *more) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["features"]["name"] == "means.pt"
    assert found["features"]["width"] == 4
    assert found["features"]["accuracy"] is None
    assert "class_accuracy" not in found["original"]


def test_pipelines_are_compared_as_the_images_they_return(
    make_unet, scheduler, pack, tmp_path, capsys
):
    from diffusers import DDIMPipeline

    unet = make_unet(num_class_embeds=None)
    for name, model in (("plain", unet), ("packed", pack(copy.deepcopy(unet), TIMESTEPS))):
        DDIMPipeline(model, scheduler).save_pretrained(tmp_path / name)
    more = ["-n", 8, "--seeds", 1, "--batch-size", 8, "--data", "digits", "--json", "--quiet"]
    folders = [tmp_path / "packed", "--against", tmp_path / "plain", "--out", tmp_path / "out"]
    assert main("eval", *folders, *more) == 0
    found = json.loads(capsys.readouterr().out)
    assert 0 < found["paired"]["mean"] < 4  # of images clipped to -1 to 1
    assert found["quantized"]["frechet"]["mean"] > 0
    assert "class_accuracy" not in found["quantized"]
    assert main("info", tmp_path / "packed") == 0
    assert "DDIMPipeline" in capsys.readouterr().out


def test_only_the_classes_that_are_sampled_are_compared_with(folders, capsys):
    assert main(*arguments(folders), "--data", "digits", "--labels", "3,4", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["features"]["images"] + found["features"]["held_out"] == 183 + 181


def test_noises_of_fine_tuning_are_told(folders):
    settings = {"config": {"seed": 1, "guidance": 1.0}, "layers": []}
    (folders / "packed" / "report.json").write_text(json.dumps(settings))
    config = EvalConfig(
        model=str(folders / "packed"), against=str(folders / "plain"), count=2, seeds=2,
    )  # fmt: skip
    with pytest.warns(TenfoldWarning, match="seed 1 is that of calibration"):
        evaluate_to_folder(config, folders / "out", Conditioning(labels="0-9"))


def test_labels_are_asked_for_before_anything_is_written(folders):
    config = EvalConfig(model=str(folders / "packed"), against=str(folders / "plain"), count=2)
    with pytest.raises(ConfigError, match="give --labels"):
        evaluate_to_folder(config, folders / "out", Conditioning())
    assert not (folders / "out.state").exists()


def test_size_accounts_every_byte(folders, capsys):
    assert main("size", folders / "packed", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["agrees"]
    assert found["accounted"] == found["disk"]["data"]
    assert main("size", folders / "packed") == 0
    printed = capsys.readouterr().out
    assert f"{found['accounted']:,} bytes accounted" in printed
    rows = {line.split()[0]: line.split() for line in printed.splitlines()}
    assert rows["all"][-1] == f"{found['accounted']:,}"
    totals = [int(rows[name][-1].replace(",", "")) for name in rows if name in
              ("input", "time", "body", "skip", "output", "other")]  # fmt: skip
    assert sum(totals) == found["accounted"]


def test_size_fails_where_the_files_hold_something_else(folders, capsys):
    from safetensors.torch import load_file, save_file

    path = folders / "packed" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"extra": torch.zeros(3)}, path, metadata={"format": "pt"})
    assert main("size", folders / "packed") == 1
    printed = capsys.readouterr()
    assert "bytes accounted, the files hold" in printed.err
    assert len(printed.err.splitlines()) == 1
    assert main("size", folders / "packed", "--json") == 1
    assert not json.loads(capsys.readouterr().out)["agrees"]


def test_size_of_a_plain_model_is_refused(folders, capsys):
    assert main("size", folders / "plain") == 2
    assert "no model quantized by mpq-dm" in capsys.readouterr().err


def test_info_describes_plain_and_quantized_folders(folders, capsys):
    assert main("info", folders / "plain", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["model"], found["quantized"], found["types"]) == ("UNet2DModel", "no", "F32")
    assert found["bytes"] == 4 * found["weights"]
    assert found["scheduler"] == "DDIMScheduler"
    assert main("info", folders / "packed" / "unet") == 0
    printed = capsys.readouterr().out
    for text in ("W2A6", "3 steps, timesteps 666 to 0", "DDIMScheduler", "every byte", "body"):
        assert text in printed


@pytest.mark.parametrize(
    ("content", "text"),
    [(None, "neither config.json nor"), ("{", "not readable as JSON"), ("[]", "found list")],
)
def test_info_of_no_model_is_one_line(content, text, tmp_path, capsys):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert main("info", tmp_path) == 2
    printed = capsys.readouterr()
    assert text in printed.err
    assert len(printed.err.splitlines()) == 1


def test_info_of_a_damaged_file_is_one_line(folders, capsys):
    path = folders / "plain" / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    assert main("info", folders / "plain") == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    shutil.rmtree(folders / "plain")
    assert main("info", folders / "plain") == 2
    assert "no such folder" in capsys.readouterr().err


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from tenfold_core.run.cli import main; import mpq_dm.cli_evidence as verbs; "
        "main('mpq-dm', {'eval': verbs.evaluate}, ['eval', '--help']); "
        "heavy = {'torch', 'diffusers', 'matplotlib', 'numpy', 'scipy'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--against" in done.stdout
