# SPDX-License-Identifier: Apache-2.0
"""Packed models in diffusers: their files, their use, and every file that must not load."""

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tenfold_core.errors import CheckpointError, ConfigError, InputError, TenfoldWarning
from tenfold_core.quant.state import bits_of, float_of
from torch import nn

diffusers = pytest.importorskip("diffusers")

from diffusers.quantizers import PipelineQuantizationConfig  # noqa: E402
from mpq_dm.packed import MODES, PackedLayer, packed_layers, set_mode  # noqa: E402
from mpq_dm.plugin import (  # noqa: E402
    MPQDMQuantConfig,
    attach_packed,
    load,
    sampling_steps,
)

WEIGHTS = "diffusion_pytorch_model.safetensors"
STEPS = [999.0, 749.0, 499.0, 249.0]
LAYER = "mid_block.resnets.0.conv1"  # of the body, mixed bits
HALF = "down_blocks.0.downsamplers.0.conv"


def output(model, timestep=499):
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(2, 1, 8, 8, generator=generator).to(model.dtype)
    with torch.no_grad():
        return model(sample, timestep, class_labels=torch.tensor([1, 2])).sample


@pytest.fixture
def model(unet, pack):
    return pack(unet, STEPS, halves=[HALF])


@pytest.fixture(scope="module")
def saved(pack, tmp_path_factory):
    """The packed model on disk, made once."""
    path = tmp_path_factory.mktemp("saved") / "unet"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = diffusers.UNet2DModel(
            sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=4,
            block_out_channels=(8, 16), attention_head_dim=8, num_class_embeds=10,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip
    pack(unet, STEPS, halves=[HALF]).save_pretrained(path)
    return path


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of the packed model that a test may damage."""
    return shutil.copytree(saved, tmp_path / "unet")


@pytest.fixture
def pipeline(model, scheduler, tmp_path):
    path = tmp_path / "pipe"
    diffusers.DDIMPipeline(unet=model, scheduler=scheduler).save_pretrained(path)
    return path


def settings_of(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def edit_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


# --- files --------------------------------------------------------------------------------------


def test_the_config_is_the_format(folder, model):
    found = settings_of(folder)
    modules = found.pop("modules")
    assert found == {
        "quant_method": "mpq-dm", "format": 1, "weight_bits": 2, "act_bits": 6,
        "timesteps": STEPS, "prediction_type": None,
    }  # fmt: skip
    assert modules[LAYER] == {
        "role": "body", "act_bits": 6, "groups": [[1, 6], [2, 5], [3, 5]], "smooth": True,
    }  # fmt: skip
    assert modules[HALF] == {
        "role": "skip", "act_bits": 16, "groups": [[16, 8]], "smooth": False,
    }  # fmt: skip
    assert len(modules) == len(list(packed_layers(model)))


@pytest.mark.parametrize("mode", MODES)
def test_a_loaded_model_gives_the_same_bits_and_files(mode, folder, model):
    set_mode(model, mode)
    loaded = load(folder, mode=mode)
    assert {layer.mode for _, layer in packed_layers(loaded)} == {mode}
    assert torch.equal(output(loaded), output(model))
    loaded.save_pretrained(folder.parent / "again")
    assert (folder / WEIGHTS).read_bytes() == (folder.parent / "again" / WEIGHTS).read_bytes()
    assert settings_of(folder) == settings_of(folder.parent / "again")
    assert not any(name.startswith("mpqdm") for name in load_file(folder / WEIGHTS))


def test_three_modes_agree(model):
    found = {}
    for mode in MODES:
        set_mode(model, mode)
        found[mode] = output(model)
    assert torch.equal(found["int8"], found["packed"])
    # a float sum next to a rounding boundary may move a later code, of 64 in a layer
    assert (found["int8"] - found["dequant"]).abs().mean() < 0.01 * found["int8"].abs().mean()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cast_while_loading_keeps_codes_and_scales(dtype, folder):
    loaded, saved = load(folder, dtype=dtype), load_file(folder / WEIGHTS)
    state = loaded.state_dict()
    floats = {name for name, value in saved.items() if value.is_floating_point()}
    assert len(floats) < len(saved) / 2
    for name, value in saved.items():
        expected = value.to(dtype) if name in floats else value
        assert torch.equal(state[name], expected)
    assert output(loaded).dtype == loaded.dtype == dtype
    assert dict(packed_layers(loaded))[LAYER].weight.dtype == dtype
    plain = output(load(folder))
    # half precision moves codes next to a rounding boundary: close, not equal
    assert (output(loaded).float() - plain).abs().mean() < 0.5 * plain.abs().mean()


def test_a_pipeline_gives_the_same_images(pipeline, model, scheduler):
    def images(pipe):
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(5)
        with pytest.warns(TenfoldWarning, match="outside the 4 calibrated ones"):
            return pipe(generator=generator, num_inference_steps=2, output_type="np").images

    model.config.num_class_embeds = None
    model.class_embedding = None  # DDIMPipeline gives no labels
    pipe = diffusers.DDIMPipeline(unet=model, scheduler=scheduler)
    expected = images(pipe)
    for loaded in (diffusers.DiffusionPipeline.from_pretrained(pipeline), load(pipeline)):
        assert isinstance(loaded, diffusers.DDIMPipeline)
        assert loaded.unet.quantization_method == "mpq-dm"
        loaded.unet.config.num_class_embeds = None
        loaded.unet.class_embedding = None
        assert (images(loaded) == expected).all()


def test_a_pipeline_s_mapping_takes_the_config(pipeline, tmp_path, scheduler):
    config = MPQDMQuantConfig(modules={}, weight_bits=3, act_bits=8, timesteps=[1.0])
    mapping = PipelineQuantizationConfig(quant_mapping={"unet": config})
    with pytest.warns(UserWarning, match="from the model will be used"):
        loaded = diffusers.DDIMPipeline.from_pretrained(pipeline, quantization_config=mapping)
    assert loaded.unet.hf_quantizer.quantization_config.weight_bits == 2
    plain = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), attention_head_dim=8,
    )  # fmt: skip
    diffusers.DDIMPipeline(unet=plain, scheduler=scheduler).save_pretrained(tmp_path / "plain")
    with pytest.raises(ConfigError, match="run `mpq-dm quantize MODEL --out DIR` and load"):
        diffusers.DDIMPipeline.from_pretrained(tmp_path / "plain", quantization_config=mapping)


# --- a model in use -----------------------------------------------------------------------------


def test_all_layers_follow_one_context(folder):
    model = load(folder)
    context = sampling_steps(model)
    layers = [layer for _, layer in packed_layers(model) if not layer.entry.is_half]
    assert all(layer.context is context for layer in layers)
    first = output(model, 999)
    second = output(model, 249)
    assert not torch.equal(first, second)
    assert torch.equal(output(model, 999), first)  # any order, no counter
    mixed = output(model, torch.tensor([999, 249]))
    torch.testing.assert_close(mixed, torch.stack((first[0], second[1])))
    with pytest.warns(TenfoldWarning, match="outside the 4 calibrated ones"):
        output(model, 600)
    with pytest.raises(ConfigError, match="Linear is not quantized by mpq-dm"):
        sampling_steps(nn.Linear(1, 1))


def test_copies_and_moves(model):
    expected = output(model)
    other = copy.deepcopy(model)
    assert sampling_steps(other) is not sampling_steps(model)
    assert dict(packed_layers(other))[LAYER].context is sampling_steps(other)
    output(other, 999)
    assert torch.equal(output(other), expected)
    assert model.to("cpu") is model
    with pytest.raises(ValueError, match="quantized model"):
        model.half()


@pytest.mark.slow
@pytest.mark.skipif(hasattr(PackedLayer.forward, "__wrapped__"), reason="type checks do not trace")
def test_a_model_compiles_as_one_graph(model):
    first, second = output(model, torch.tensor([999, 249])), output(model, torch.tensor([499] * 2))
    sample = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    try:
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        with torch.no_grad():
            found = compiled(sample, torch.tensor([999, 249]), class_labels=torch.tensor([1, 2]))
    except (ImportError, RuntimeError) as error:
        if isinstance(error, torch._dynamo.exc.Unsupported):
            raise
        pytest.skip(f"torch.compile does not run here: {str(error).splitlines()[0]}")
    assert torch.equal(found.sample, first)
    with torch.no_grad(), torch.compiler.set_stance("fail_on_recompile"):
        found = compiled(sample, torch.tensor([499, 499]), class_labels=torch.tensor([1, 2]))
    assert torch.equal(found.sample, second)


class Pair(diffusers.ModelMixin, diffusers.ConfigMixin):
    """Two layers of one weight."""

    config_name = "config.json"

    @diffusers.configuration_utils.register_to_config
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(6, 6), nn.Linear(6, 6)
        self.right.weight = self.left.weight

    def forward(self, x, timestep):
        return self.right(self.left(x))


def test_layers_of_one_weight_store_its_codes_once(plan_of, tmp_path):
    model, x = Pair(), torch.ones(2, 6)
    plans = {name: plan_of(getattr(model, name), 2) for name in ("left", "right")}
    plans["right"] = (plans["right"][0].__class__(**values(plans["right"][0], act_bits=4,
                      act_zero=torch.tensor([8.0, 8]))), plans["right"][1])  # fmt: skip
    attach_packed(model, plans, timesteps=[1, 2], weight_bits=2, act_bits=6)
    model.save_pretrained(tmp_path)
    saved = set(load_file(tmp_path / WEIGHTS))
    assert {name for name in saved if name.startswith("right")} == {
        "right.bias", "right.act_scale", "right.act_zero",
    }  # fmt: skip
    loaded = Pair.from_pretrained(tmp_path)
    assert loaded.right.qweight is loaded.left.qweight
    assert torch.equal(loaded(x, 1), model(x, 1))
    other = Pair()
    plans = {name: plan_of(getattr(other, name), 2, seed=len(name)) for name in ("left", "right")}
    with pytest.raises(ConfigError, match="'left' and 'right' share one weight and differ in"):
        attach_packed(other, plans, timesteps=[1, 2], weight_bits=2, act_bits=6)


def values(plan, **changes):
    return {name: getattr(plan, name) for name in plan.__slots__} | changes


def test_attaching_names_the_layer_that_does_not_fit(unet, plan_of):
    plan = plan_of(unet.get_submodule(LAYER), 3)
    settings = {"timesteps": STEPS, "weight_bits": 2, "act_bits": 6}
    with pytest.raises(InputError, match=rf"layer '{LAYER}': act_scale: found .* \(3,\), expected"):
        attach_packed(unet, {LAYER: plan}, **settings)
    with pytest.raises(InputError, match="module 'nothing': UNet2DModel has no part"):
        attach_packed(unet, {}, halves=["nothing"], **settings)
    assert isinstance(unet.get_submodule(LAYER), nn.Conv2d)
    with pytest.raises(ConfigError, match="mode is 'fast', expected int8, packed, dequant"):
        attach_packed(unet, {}, mode="fast", **settings)


# --- what must not load -------------------------------------------------------------------------


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s: s.update(weight_bits=0), "weight_bits is 0, expected 1 to 8"),
        (lambda s: s.update(act_bits=2.5), "act_bits is 2.5, expected 1 to 8"),
        (lambda s: s.update(timesteps=[3, 1, 2]), r"strictly rising or falling .*\[3.0, 1.0, 2.0"),
        (lambda s: s.update(timesteps=[]), r"expected at least one finite number.*found \[\]"),
        (lambda s: s.update(timesteps=["a"]), r"timesteps is \['a'\], expected a list of numbers"),
        (lambda s: s.update(timesteps=3), "timesteps is 3, expected a list of numbers"),
        (lambda s: s.update(timesteps=[*STEPS, 9]), r"act_scale': found I32 \(4,\), expected .*5"),
        (lambda s: s.update(prediction_type=3), "prediction_type is 3, expected text or null"),
        (lambda s: s.update(format=2), "format is 2, expected 1"),
        (lambda s: s.pop("timesteps"), "missing field 'timesteps'"),
        (lambda s: s["modules"][LAYER].update(groups=[[0, 16]]), r"expected pairs of bits \(1 to"),
        (lambda s: s["modules"][LAYER].update(groups=[[9, 16]]), r"expected pairs of bits \(1 to"),
        (
            lambda s: s["modules"][LAYER].update(groups=[[2, 10**12]]),
            "claims 1000000000000, expected at most 65536",
        ),
        (
            lambda s: s["modules"][LAYER].update(groups=[[2, 17]]),
            "expected 16 rows in all, found 17",
        ),
        (
            lambda s: s["modules"][LAYER].update(groups=[[2, 8], [3, 8]]),
            rf"{LAYER}.qweight': found U8 \(\d+,\), expected U8 \(\d+,\)",
        ),
        (lambda s: s["modules"][LAYER].update(smooth=False), "smooth': found .* expected no tens"),
        (lambda s: s["modules"][LAYER].update(groups=[[2, 16]]), "qweight': found U8|row_order"),
        (lambda s: s["modules"].update(conv_norm_out=s["modules"][LAYER]), "GroupNorm: expected a"),
    ],
)
def test_configs_that_do_not_fit_are_named(change, match, folder):
    edit_config(folder, change)
    with pytest.raises((InputError, ConfigError), match=match) as caught:
        load(folder)
    assert str(caught.value).startswith(("config.json: quantization_config", str(folder)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "change", "match"),
    [
        (
            "scale",
            lambda t: bits_of(float_of(t, torch.float16) * 0),
            "a finite number > 0, found 0",
        ),
        ("scale", lambda t: torch.full_like(t, 0x7C00), "a finite number > 0, found inf in row 0"),
        ("zero", lambda t: torch.full_like(t, 0x7E00), "a finite number, found nan in row 0"),
        ("smooth", lambda t: -t.abs() - 1, "a finite number > 0, found -?[n\\d].* at 0"),
        ("act_scale", lambda t: t * 0, "a finite number > 0, found 0.0 at 0"),
        ("act_zero", lambda t: t + 64, "a code of 6 bits, 0 to 63, found 9[3-9] at 0"),
        ("act_zero", lambda t: t - 64, "0 to 63, found -"),
        ("row_order", lambda t: t.clamp(max=14), r"each of 0\.\.15 once, found 15 different"),
        ("row_order", lambda t: t - 1, r"each of 0\.\.15 once, found 16 different from -1 to 14"),
    ],
)
def test_values_that_no_run_writes_are_named_with_file_and_tensor(key, change, match, folder):
    name = f"{LAYER}.{key}"
    edit_tensors(folder, lambda tensors: tensors.update({name: change(tensors[name])}))
    with pytest.raises(InputError, match=match) as caught:
        load(folder)
    assert str(caught.value).startswith(f"{folder / WEIGHTS}: {name}: expected")


@pytest.mark.parametrize(
    ("key", "change", "match"),
    [
        ("qweight", lambda t: t[:-1], r"found U8 \(\d+,\), expected U8 \(\d+,\)"),
        ("qweight", lambda t: t.float(), r"found F32 .*, expected U8"),
        ("scale", lambda t: float_of(t, torch.float16), r"found F16 \(16,\), expected I16"),
        ("act_scale", lambda t: t[:3], r"found I32 \(3,\), expected I32 \(4,\)"),
        ("row_order", lambda t: t.int(), r"found I32 \(16,\), expected I16 \(16,\)"),
    ],
)
def test_tensors_of_another_size_or_type_are_named(key, change, match, folder):
    name = f"{LAYER}.{key}"
    edit_tensors(folder, lambda tensors: tensors.update({name: change(tensors[name]).clone()}))
    with pytest.raises(InputError, match=match) as caught:
        load(folder)
    assert str(caught.value).startswith(f"{folder / WEIGHTS}: tensor '{name}'")


def test_a_damaged_file_in_shards_is_named(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    index = json.loads((tmp_path / f"{WEIGHTS}.index.json").read_text())["weight_map"]
    assert torch.equal(output(load(tmp_path)), output(model))
    shard = tmp_path / index[f"{LAYER}.act_scale"]
    tensors = load_file(shard)
    tensors[f"{LAYER}.act_scale"] *= 0
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"{shard.name}: {LAYER}\.act_scale: expected a finite"):
        load(tmp_path)


@pytest.mark.parametrize("kept", [4, 60, -1])
def test_truncated_files_are_named(kept, folder):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:kept])
    with pytest.raises(CheckpointError, match=WEIGHTS):
        load(folder)
    with pytest.raises((OSError, CheckpointError), match=WEIGHTS):
        diffusers.UNet2DModel.from_pretrained(folder)


def test_pickles_are_refused(folder):
    torch.save(load_file(folder / WEIGHTS), folder / "diffusion_pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    expected = r"model\.bin: expected a \.safetensors file; other formats are not read"
    for read in (load, diffusers.UNet2DModel.from_pretrained):
        with pytest.raises(InputError, match=expected):
            read(folder)


def test_folders_without_a_quantized_model_are_told_apart(unet, folder, tmp_path):
    unet_folder = tmp_path / "other"
    for name, content, match in (
        ("none", None, "neither config.json nor model_index.json"),
        ("broken", "{", r"config.json: not readable as JSON"),
        ("list", "[]", "config.json: found list, expected an object"),
        ("plain", "{}", "no model quantized by mpq-dm; run `mpq-dm quantize MODEL"),
        (
            "foreign",
            '{"_class_name": "Nobody", "quantization_config": {"quant_method": "mpq-dm"}}',
            "_class_name is 'Nobody', expected a model of diffusers",
        ),
    ):
        path = unet_folder / name
        path.mkdir(parents=True)
        if content is not None:
            (path / "config.json").write_text(content)
        with pytest.raises(InputError, match=match):
            load(path)
    with pytest.raises(ConfigError, match="mode is 'fast', expected int8, packed, dequant"):
        load(folder, mode="fast")


def test_a_failed_load_leaves_the_mode_of_the_next_one(folder, tmp_path):
    broken = shutil.copytree(folder, tmp_path / "broken")
    edit_config(broken, lambda settings: settings.update(format=3))
    with pytest.raises(InputError):
        load(broken, mode="dequant")
    assert {layer.mode for _, layer in packed_layers(load(folder))} == {"int8"}
