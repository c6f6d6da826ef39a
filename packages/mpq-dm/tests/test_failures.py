# SPDX-License-Identifier: Apache-2.0
"""What goes wrong from outside: damaged input, full disks, interruptions, no network, no memory."""

import errno
import json
import shutil
import struct
from types import SimpleNamespace

import mpq_dm
import pytest
import torch
from mpq_dm.cli import main as run_cli
from mpq_dm.conditions import check_labels, read_embeddings, read_labels, read_prompts
from mpq_dm.finetune import FineTuner
from mpq_dm.method import quantize
from mpq_dm.models import open_source
from mpq_dm.quantizing import Conditioning, sampler_for
from safetensors.torch import load_file, save_file
from tenfold_core.errors import CheckpointError, ConfigError, InputError, TenfoldError

diffusers = pytest.importorskip("diffusers")

WEIGHTS = "diffusion_pytorch_model.safetensors"
ROUNDED = ("--method", "rtn-minmax")
TUNED = (
    "-w", "3", "--trajectories", "3", "--set", "rank=2", "--set", "lora_lr=0.02",
    "--set", "scale_method=minmax", "--set", "save_every=1",
)  # fmt: skip

QUICK = (*TUNED, "--set", "allocation=uniform")


@pytest.fixture(scope="module")
def original(make_unet, tmp_path_factory):
    """The folder of a small denoiser, its scheduler beside it; nobody writes to it."""
    path = tmp_path_factory.mktemp("original")
    make_unet(flat=True).save_pretrained(path / "unet")
    diffusers.DDIMScheduler(clip_sample=False).save_pretrained(path / "scheduler")
    return path


@pytest.fixture
def copy(original, tmp_path):
    """A copy of it to damage."""
    return shutil.copytree(original, tmp_path / "copy")


def run(model, out, *more):
    """Quantize from the command line with two steps and two images."""
    return run_cli([
        "quantize", str(model), "--out", str(out), "--labels", "0-9", "--steps", "2",
        "--batch-size", "2", "--set", "calib_samples=2", "--device", "cpu", "--quiet", *more,
    ])  # fmt: skip


def line(capsys):
    """Return what was said on stderr, which must be one line."""
    (text,) = capsys.readouterr().err.splitlines()
    return text


def stop(*_):
    raise KeyboardInterrupt


def files(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- while saving -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 2, "cannot be written (.*No space left"),
        (KeyboardInterrupt(), 130, "go on with the same command and --resume"),
    ],
)
def test_a_save_that_fails_leaves_the_old_folder_and_can_be_repeated(
    error, code, text, original, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old.txt").write_text("old")
    whole = diffusers.UNet2DModel.save_pretrained

    def fail(self, folder, **settings):
        whole(self, folder, **settings)
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(diffusers.UNet2DModel, "save_pretrained", fail)
        assert run(original, out, "--overwrite", *ROUNDED) == code
    said = " ".join(capsys.readouterr().err.split())

    assert text.split("(.*")[0] in said
    assert text.split("(.*")[-1] in said
    assert files(out) == {"old.txt": b"old"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.state"]
    assert run(original, out, "--overwrite", "--resume", *ROUNDED) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert mpq_dm.account(out).agrees


def test_a_record_that_cannot_be_written_leaves_nothing_half_written(
    original, tmp_path, monkeypatch
):
    from tenfold_core.run.record import RunRecord

    def full(self, path):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(RunRecord, "artefact", full)
    assert run(original, tmp_path / "out", *ROUNDED) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["out.state"]


# --- interruptions ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interrupted(original, tmp_path_factory):
    """A folder where a run was interrupted in its second trajectory, and what was said."""
    path = tmp_path_factory.mktemp("interrupted")
    whole = FineTuner._trajectory

    def second(self, number):
        return whole(self, number) if number == 0 else stop()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FineTuner, "_trajectory", second)
        code = run(original, path / "out", *TUNED)
    return SimpleNamespace(path=path, code=code)


@pytest.fixture
def unfinished(interrupted, tmp_path):
    """A copy of that folder to go on in."""
    return shutil.copytree(interrupted.path, tmp_path / "unfinished")


def test_a_run_stopped_in_training_goes_on_to_the_same_files(
    original, interrupted, unfinished, tmp_path
):
    assert interrupted.code == 130
    assert [path.name for path in unfinished.iterdir()] == ["out.state"]
    record = json.loads((unfinished / "out.state" / "run.json").read_text())
    assert record["status"] == "interrupted"

    assert run(original, unfinished / "out", *TUNED, "--resume") == 0
    assert run(original, tmp_path / "whole", *TUNED) == 0

    parts = files(unfinished / "out" / "unet")
    assert parts == files(tmp_path / "whole" / "unet")
    assert set(parts) == {WEIGHTS, "config.json"}
    reports = [
        json.loads((path / "report.json").read_text())
        for path in (unfinished / "out", tmp_path / "whole")
    ]
    assert reports[0]["losses"] == reports[1]["losses"]
    assert [path.name for path in unfinished.iterdir()] == ["out"]


def test_ctrl_c_in_training_says_how_to_go_on(original, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(FineTuner, "_trajectory", stop)

    assert run(original, tmp_path / "out", *QUICK) == 130

    said = capsys.readouterr().err
    assert f"kept in {tmp_path / 'out.state'}; go on with the same command and --resume" in said
    assert said.splitlines()[-1] == "mpq-dm: interrupted"


def test_ctrl_c_before_anything_is_kept_leaves_nothing(original, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(mpq_dm.method, "calibrate", stop)
        assert run(original, tmp_path / "out", *ROUNDED) == 130
    assert "nothing was kept yet; start again with the same command" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert run(original, tmp_path / "out", *ROUNDED, "--resume") == 2
    assert "interrupted before its first checkpoint, start again" in line(capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (("-w", "4"), "weight_bits was 3, is 4 now; repeat the old command"),
        (("--set", "trd_tau=2"), "trd_tau was 1.0, is 2 now"),
        (("--seed", "5"), "seed was 3407, is 5 now"),
    ],
)
def test_going_on_with_another_setting_names_it(change, text, original, unfinished, capsys):
    assert run(original, unfinished / "out", *TUNED, *change, "--resume") == 2
    assert text in line(capsys)
    assert (unfinished / "out.state" / "training.safetensors").is_file()


def test_going_on_with_another_model_says_so(copy, unfinished, capsys):
    tensors = load_file(copy / "unet" / WEIGHTS)
    tensors["conv_in.bias"][0] += 1
    save_file(tensors, copy / "unet" / WEIGHTS, metadata={"format": "pt"})

    assert run(copy, unfinished / "out", *TUNED, "--resume") == 2
    assert "model was " in line(capsys)


def test_an_unfinished_run_is_not_overwritten_without_a_word(original, unfinished, capsys):
    assert run(original, unfinished / "out", *TUNED) == 2
    assert "an unfinished run; give --resume to go on with it, or remove" in line(capsys)


def test_a_damaged_checkpoint_is_named(original, unfinished, capsys):
    path = unfinished / "out.state" / "training.safetensors"
    path.write_bytes(path.read_bytes()[:-1])

    assert run(original, unfinished / "out", *TUNED, "--resume") == 2
    assert "training.safetensors" in line(capsys)


# --- numbers and memory -------------------------------------------------------------------------


def test_lack_of_memory_in_the_relation_loss_names_the_options(
    original, tmp_path, capsys, monkeypatch
):
    def full(*_, **__):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1 GiB"
        )

    monkeypatch.setattr("mpq_dm.trd.relation_kl", full)
    assert run(original, tmp_path / "out", *QUICK) == 1
    said = line(capsys)
    assert "trajectory 0: CUDA out of memory. Tried to allocate 2.00 GiB; start again" in said
    assert "--batch-size below 2, or --trd-rows 512" in said
    assert run(original, tmp_path / "other", *QUICK, "--trd-rows", "16") == 1
    assert "--trd-rows 8" in line(capsys)


def test_lack_of_memory_without_the_relation_loss_names_the_batch(unet, make, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(FineTuner, "_update", full)
    config, sampler, _ = make("efficientdm", trajectories=1, scale_method="minmax")

    with pytest.raises(TenfoldError, match=r"--batch-size below 2$"):
        quantize(unet, config, sampler=sampler)


def test_a_loss_that_is_not_finite_keeps_the_last_good_state(
    original, tmp_path, capsys, monkeypatch
):
    whole = FineTuner._trajectory

    def spoil(self, number):
        if number == 1:
            layer = self.layers["mid_block.resnets.0.conv1"]
            with torch.no_grad():
                layer.weight_quant.rho[0] = float("nan")
        return whole(self, number)

    monkeypatch.setattr(FineTuner, "_trajectory", spoil)
    assert run(original, tmp_path / "out", *QUICK) == 1
    said = line(capsys)
    assert "the loss is nan in trajectory 1, step 2, the scale of the weight of layer " in said
    assert "'mid_block.resnets.0.conv1' is not finite" in said
    assert not (tmp_path / "out").exists()
    kept = load_file(tmp_path / "out.state" / "training.safetensors")
    assert kept["done"].tolist() == [1, 2]
    assert all(part.isfinite().all() for part in kept.values())


def test_a_weight_that_is_not_finite_is_named_and_nothing_is_written(copy, tmp_path, capsys):
    tensors = load_file(copy / "unet" / WEIGHTS)
    tensors["conv_in.weight"].view(-1)[:2] = float("nan")
    save_file(tensors, copy / "unet" / WEIGHTS, metadata={"format": "pt"})

    assert run(copy, tmp_path / "out", *ROUNDED) == 2

    assert "UNet2DModel: conv_in.weight: 2 of 72 values" in line(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


# --- models that cannot be taken ----------------------------------------------------------------


def test_a_hub_id_without_a_network_names_the_alternative(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    expected = "nobody/nothing: no such folder here, .*give the folder of a downloaded copy"
    with pytest.raises(InputError, match=expected):
        open_source("nobody/nothing")

    def unreachable(*_, **__):
        raise RuntimeError("the network of some library")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", unreachable)
    with pytest.raises(InputError, match="the network of some library; where there is no network"):
        open_source("nobody/nothing")


@pytest.mark.parametrize("name", ["nowhere", "./a/b", "/a/b", "a/b/c"])
def test_what_is_no_hub_id_is_a_missing_folder(name):
    with pytest.raises(InputError, match="no such file or folder"):
        open_source(name)


def single(copy, change=None, **config):
    """Open the single file of a copy with a config of these changes."""
    path = copy / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    if change is not None:
        tensors = load_file(copy / "unet" / WEIGHTS)
        change(tensors)
        save_file(tensors, copy / "unet" / WEIGHTS)
    return open_source(copy / "unet" / WEIGHTS, config=path)


def test_a_single_file_with_its_config_is_the_model(copy, tmp_path):
    from_file, from_folder = single(copy), open_source(copy)

    assert from_file.component == "unet"
    assert type(from_file.scheduler) is type(from_folder.scheduler)
    for name, part in from_folder.model.state_dict().items():
        assert torch.equal(part, from_file.model.state_dict()[name]), name
    config = copy / "unet" / "config.json"
    assert run(copy / "unet" / WEIGHTS, tmp_path / "file", *ROUNDED, "--config", str(config)) == 0
    assert run(copy, tmp_path / "folder", *ROUNDED) == 0
    outs = [tmp_path / name / "unet" / WEIGHTS for name in ("file", "folder")]
    assert outs[0].read_bytes() == outs[1].read_bytes()


def test_halves_in_a_single_file_are_computed_in_float32(copy):
    halves = single(copy, lambda found: found.update({k: v.half() for k, v in found.items()}))

    assert {part.dtype for part in halves.model.parameters()} == {torch.float32}


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("change", "config", "text"),
    [
        (None, {"_class_name": "Nobody"}, "_class_name is 'Nobody', expected a model of diffusers"),
        (None, {"norm_num_groups": 3}, "no UNet2DModel can be built: .* divisible by num_groups"),
        (
            None,
            {"num_class_embeds": 10**12},
            "describes 32000000010289 weights, but the files hold",
        ),
        (None, {"block_out_channels": [20_000]}, "weights, but the files hold 10609"),
        (lambda found: found.pop("conv_in.bias"), {}, r'Missing key\(s\).*"conv_in.bias"'),
        (
            lambda found: found.update({"conv_in.bias": torch.zeros(9)}),
            {},
            "size mismatch for conv_in.bias",
        ),
    ],
)
def test_a_single_file_that_does_not_fit_its_config_is_told(change, config, text, copy):
    with pytest.raises(InputError, match=text) as caught:
        single(copy, change, **config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("place", ["", "unet"])
def test_a_folder_whose_config_claims_too_much_is_refused_before_it_is_built(place, copy):
    path = copy / "unet" / "config.json"
    claims = json.loads(path.read_text()) | {"block_out_channels": [100_000]}
    path.write_text(json.dumps(claims))

    with pytest.raises(InputError, match=r"describes \d{13} weights, but the files hold 10609"):
        open_source(copy / place)


@pytest.mark.parametrize("kept", [4, 100, -1])
def test_truncated_files_are_named(kept, copy):
    path = copy / "unet" / WEIGHTS
    path.write_bytes(path.read_bytes()[:kept])

    for read in (lambda: single(copy), lambda: open_source(copy)):
        with pytest.raises((InputError, CheckpointError), match=WEIGHTS):
            read()


def test_a_header_of_a_gigabyte_is_refused_before_it_is_read(copy):
    path = copy / "unet" / WEIGHTS
    path.write_bytes(struct.pack("<Q", 1 << 30) + path.read_bytes()[8:])

    for read in (lambda: single(copy), lambda: open_source(copy)):
        with pytest.raises((InputError, CheckpointError), match="header"):
            read()


@pytest.mark.parametrize("name", ["model.ckpt", "model.bin", "model.pt", "model.pth", "model.pkl"])
def test_pickle_files_are_not_opened(name, tmp_path):
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(InputError, match="pickle files are not read"):
        open_source(tmp_path / name)


def test_a_folder_of_pickles_is_not_opened(copy):
    weights = copy / "unet" / WEIGHTS
    torch.save(load_file(weights), weights.with_name("diffusion_pytorch_model.bin"))
    weights.unlink()

    with pytest.raises(InputError, match=r"diffusion_pytorch_model\.safetensors"):
        open_source(copy)


def test_a_file_of_another_kind_or_without_a_config_is_told(copy, tmp_path):
    (tmp_path / "note.txt").write_text("text")
    for path in (tmp_path / "note.txt", copy / "unet" / WEIGHTS):
        with pytest.raises(InputError, match=r"must be \.safetensors and needs --config"):
            open_source(path)


def test_an_unknown_scheduler_is_named(copy):
    (copy / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "Other"}')
    with pytest.raises(InputError, match="_class_name is 'Other', expected a scheduler"):
        open_source(copy)


def test_without_a_scheduler_the_error_says_where_it_belongs(copy, tmp_path, capsys):
    shutil.rmtree(copy / "scheduler")
    assert run(copy, tmp_path / "out", *ROUNDED) == 2
    assert "no scheduler beside it; give the folder of its pipeline, or put" in line(capsys)


def test_lora_in_a_pipeline_is_refused(make_unet, scheduler):
    pipe = diffusers.DDIMPipeline(make_unet(flat=True, num_class_embeds=None), scheduler)
    pipe.unet.peft_config = {"default": object()}
    config = mpq_dm.method_config("rtn-minmax", steps=2, calib_samples=2, batch_size=2)

    with pytest.raises(InputError, match="UNet2DModel: LoRA layers are loaded; unload LoRA first"):
        quantize(pipe, config)


def test_what_is_quantized_already_is_not_quantized_again(original, tmp_path, capsys):
    assert run(original, tmp_path / "once", *ROUNDED) == 0
    capsys.readouterr()
    assert run(tmp_path / "once", tmp_path / "twice", *ROUNDED) == 2
    assert "quantized already (mpq-dm), expected weights" in line(capsys)
    model = open_source(tmp_path / "once", packed=True).model
    with pytest.raises(InputError, match="UNet2DModel: quantized already"):
        quantize(model, mpq_dm.method_config("rtn-minmax"), sampler=object())


# --- conditions ---------------------------------------------------------------------------------


CLASSES = SimpleNamespace(config=SimpleNamespace(num_class_embeds=10))
DIT = SimpleNamespace(config=SimpleNamespace(num_embeds_ada_norm=1000))


def test_labels_are_lists_ranges_or_lines(tmp_path):
    path = tmp_path / "labels.txt"
    path.write_text("3\n\n0-2\n 9 \n")

    assert read_labels("7") == [7]
    assert read_labels("0-2, 5,9-9") == [0, 1, 2, 5, 9]
    assert read_labels(str(path)) == [3, 0, 1, 2, 9]
    assert read_labels(",".join(map(str, range(1000)))) == list(range(1000))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10", "labels: 10, expected 0 to 9"),
        ("0-20", "labels: 20, expected 0 to 9"),
        ("5-3", "labels: '5-3', expected a rising range"),
        ("0-9999999999", "expected a rising range of at most"),
        ("cat", "labels: 'cat', expected a label or a range such as 0-9"),
        ("-1", "labels: '-1', expected a label"),
        ("1,,2", "labels: '', expected a label"),
        ("", "labels: '', expected a label"),
    ],
)
def test_labels_that_make_no_sense_are_told(text, expected):
    with pytest.raises(InputError, match=expected):
        read_labels(text, model=CLASSES)


def test_files_of_labels_name_their_line(tmp_path):
    path = tmp_path / "labels.txt"
    for content, text in (
        (b"1\n\n12\n", r"labels\.txt:3: 12, expected 0 to 9 \(num_class_embeds\)"),
        (b"1\ndog\n", r"labels\.txt:2: 'dog', expected a label"),
        (b"\n \n", r"labels\.txt: no labels, expected one a line"),
        (b"", r"labels\.txt: no labels"),
        (b"\xff\xfe", r"labels\.txt: not readable as text"),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=text):
            read_labels(str(path), model=CLASSES)


def test_only_a_dit_has_a_label_for_no_class():
    check_labels([1000], DIT, null=True)
    with pytest.raises(InputError, match="labels: 1000, expected 0 to 999"):
        check_labels([1000], DIT)
    with pytest.raises(InputError, match="--negative-label: 10, expected 0 to 9"):
        check_labels([10], CLASSES, "--negative-label", null=True)
    check_labels([10**6], SimpleNamespace())


def test_prompts_are_the_lines_that_are_not_blank(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\n\n  a dög  \n", encoding="utf-8")
    assert read_prompts(path) == ["a cat", "a dög"]
    path.write_text(" \n\n")
    with pytest.raises(InputError, match=r"prompts\.txt: no prompts, expected one a line"):
        read_prompts(path)
    path.write_bytes(b"\xff")
    with pytest.raises(InputError, match="not readable as text"):
        read_prompts(path)
    with pytest.raises(InputError, match="not readable as text"):
        read_prompts(tmp_path / "missing.txt")


def test_embeddings_have_one_entry_a_condition(tmp_path):
    path = tmp_path / "found.safetensors"
    save_file({"a": torch.ones(3, 2), "b": torch.ones(3, 4)}, path)
    assert {name: part.shape for name, part in read_embeddings(path).items()} == {
        "a": (3, 2), "b": (3, 4)
    }  # fmt: skip
    for tensors in ({"a": torch.ones(3), "b": torch.ones(2)}, {"a": torch.tensor(1.0)}, {}):
        save_file(tensors, path)
        with pytest.raises(InputError, match="expected as many of each tensor"):
            read_embeddings(path)
    path.write_bytes(b"text")
    with pytest.raises(InputError, match="not a safetensors file"):
        read_embeddings(path)
    with pytest.raises(InputError, match="no such file"):
        read_embeddings(tmp_path / "missing.safetensors")


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (("--labels", "0-10"), "labels: 10, expected 0 to 9 (num_class_embeds)"),
        (("--guidance", "3"), "no unconditional arguments are known"),
        (("--guidance", "3", "--negative-label", "10"), "--negative-label: 10, expected 0 to 9"),
        (("--method", "best"), "method is 'best', expected rtn-minmax,"),
        (("--set", "speed=1"), "no setting 'speed', expected one of act_bits"),
        (("--set", "rank"), "--set rank: expected name=value"),
        (("-w", "1"), "weight_bits is 1: mixing needs 0, 1 and 2 bits; use allocation='uniform'"),
        (("--out", "{none}/out"), "does not exist"),
        (("--out", "{copy}"), "exists already; choose another folder or give --overwrite"),
    ],
)
def test_bad_options_of_quantize_are_one_line_and_leave_nothing(more, text, copy, tmp_path, capsys):
    places = {"none": tmp_path / "none", "copy": copy}
    code = run(copy, tmp_path / "out", *[part.format(**places) for part in more])

    assert code == 2
    assert text in line(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_pipelines_ask_for_the_conditions_they_take(make_unet, scheduler):
    source = SimpleNamespace(model=make_unet(flat=True), pipe=None, scheduler=scheduler)
    config = mpq_dm.method_config("rtn-minmax", steps=2)
    with pytest.raises(ConfigError, match="on 10 classes; give --labels, for example"):
        sampler_for(source, Conditioning(), config)

    class OfClasses:
        def __call__(self, class_labels): ...

    class OfText:
        def __call__(self, prompt, prompt_embeds): ...

    for pipe, text in ((OfClasses(), "give --labels"), (OfText(), "give --prompts, or --embedd")):
        source.pipe = pipe
        with pytest.raises(ConfigError, match=text):
            sampler_for(source, Conditioning(), config)
