# SPDX-License-Identifier: Apache-2.0
import importlib.util
import json
import re
import shutil
import sys
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from diffusers.configuration_utils import ConfigMixin, register_to_config  # noqa: E402
from diffusers.quantizers import PipelineQuantizationConfig, auto  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from tenfold_core.errors import (  # noqa: E402
    CheckpointError,
    ConfigError,
    InputError,
    MissingExtraError,
)
from tenfold_core.quant import plugin  # noqa: E402
from tenfold_core.quant.plugin import (  # noqa: E402
    PackedConfig,
    PackedQuantizer,
    attach,
    register,
    replace_module,
)
from tenfold_core.quant.state import (  # noqa: E402
    bits_of,
    check_files,
    check_numbers,
    find_module,
    float_of,
    stored_bytes,
    tied_names,
)
from torch import nn  # noqa: E402

WEIGHTS = "diffusion_pytorch_model.safetensors"


class ToyMethod(str, Enum):  # noqa: UP042  (what diffusers itself uses)
    TOY = "toy"


@dataclass(kw_only=True)
class ToyConfig(PackedConfig):
    method = ToyMethod.TOY
    quantize_command = "toy quantize MODEL --out DIR"
    bits: int = 8


class PackedToy(nn.Module):
    """Codes and half-precision scales of a linear or a convolution, and a float32 gain."""

    def __init__(self, module, rows, columns):
        super().__init__()
        self.shape = (rows, *module.weight.shape[1:])
        self.conv = (module.stride, module.padding) if isinstance(module, nn.Conv2d) else None
        self.register_buffer("codes", torch.empty(rows, columns, dtype=torch.int8))
        self.register_buffer("scale", torch.empty(rows, dtype=torch.int16))
        self.register_buffer("gain", torch.empty(1, dtype=torch.float32))
        self.bias = module.bias

    def fill(self, weight):
        rows = weight.detach().float().flatten(1)
        scale = (rows.abs().amax(1) / 127).half()
        self.codes = (rows / scale[:, None].float()).round().clamp(-127, 127).to(torch.int8)
        self.scale = bits_of(scale)
        self.gain = torch.tensor([1 + 2**-20])  # lost in float16 and in bfloat16

    def forward(self, x):
        weight = self.codes.float() * float_of(self.scale, torch.float16)[:, None].float()
        weight = (weight * self.gain).view(self.shape).to(x.dtype)
        if self.conv is None:
            return nn.functional.linear(x, weight, self.bias)
        return nn.functional.conv2d(x, weight, self.bias, *self.conv)


class ToyQuantizer(PackedQuantizer):
    def build(self, module, entry):
        if entry["bits"] != self.quantization_config.bits:
            raise ValueError(f"bits are {entry['bits']}")
        packed = PackedToy(module, entry["rows"], entry["columns"])
        if entry.get("cache"):
            packed.register_buffer("cache", torch.empty(1), persistent=False)
        return packed

    def finish(self, model):
        model.finished = True


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    for mapping in (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING):
        monkeypatch.setitem(mapping, "toy", None)
        monkeypatch.delitem(mapping, "toy")  # both are undone: nothing stays registered
    register(ToyConfig, ToyQuantizer)


def unet():
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=4,
    ).eval()


def dit():
    torch.manual_seed(0)
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=2,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=10,
        norm_num_groups=1,
    ).eval()


def output(model):
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(2, model.config.in_channels, 8, 8, generator=generator).to(model.dtype)
    arguments = {"timestep": torch.tensor([3, 7])}
    if "DiT" in type(model).__name__:
        arguments["class_labels"] = torch.tensor([1, 2])
    with torch.no_grad():
        return model(sample, **arguments).sample


def pack(model):
    entries = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, (nn.Linear, nn.Conv2d)) and not name.startswith(("conv_in", "pos_")):
            rows, columns = module.weight.flatten(1).shape
            entries[name] = {"bits": 8, "rows": rows, "columns": columns}
            packed = PackedToy(module, rows, columns)
            packed.fill(module.weight)
            replace_module(model, name, packed)
    attach(model, ToyConfig(modules=entries))
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A packed U-Net on disk; the tests that change it take a copy."""
    path = tmp_path_factory.mktemp("packed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(auto.AUTO_QUANTIZER_MAPPING, "toy", ToyQuantizer)
        patch.setitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "toy", ToyConfig)
        pack(unet()).save_pretrained(path)
    return path


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def load(path, **settings):
    return diffusers.UNet2DModel.from_pretrained(path, **settings)


def edit(path, change):
    """Change the model's config.json in place."""
    config = json.loads((path / "config.json").read_text())
    change(config["quantization_config"])
    (path / "config.json").write_text(json.dumps(config))


def edit_tensors(path, change):
    tensors = load_file(path / WEIGHTS)
    change(tensors)
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})


def first_packed(tensors):
    return next(name for name in tensors if name.endswith(".codes"))


@pytest.mark.parametrize("make", [unet, dit])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_loaded_model_gives_the_same_bits(make, dtype, tmp_path):
    make().save_pretrained(tmp_path / "plain")
    # loaded and not cast: .to(dtype) would cast what is computed and not saved as well
    model = pack(type(make()).from_pretrained(tmp_path / "plain", dtype=dtype))
    model.save_pretrained(tmp_path / "first")
    loaded = type(model).from_pretrained(tmp_path / "first", dtype=dtype)
    assert torch.equal(output(loaded), output(model))
    loaded.save_pretrained(tmp_path / "second")
    first, second = ((tmp_path / name / WEIGHTS).read_bytes() for name in ("first", "second"))
    assert first == second
    configs = [json.loads((tmp_path / k / "config.json").read_text()) for k in ("first", "second")]
    for config in configs:
        config.pop("_name_or_path")  # diffusers notes where it loaded from
    assert configs[0] == configs[1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cast_while_loading_leaves_packed_tensors_alone(folder, dtype):
    loaded, saved = load(folder, dtype=dtype), load_file(folder / WEIGHTS)
    state = loaded.state_dict()
    packed = [name for name in saved if name.endswith((".codes", ".scale", ".gain"))]
    assert len(packed) > 30
    assert all(torch.equal(state[name], saved[name]) for name in packed)
    assert {state[name].dtype for name in saved if name not in packed} == {dtype}
    in_memory = pack(unet())
    for parameter in in_memory.parameters():
        parameter.data = parameter.data.to(dtype)
    assert torch.equal(output(loaded), output(in_memory))


def test_a_pipeline_gives_the_same_images(tmp_path):
    def images(pipe):
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(5)
        return pipe(generator=generator, num_inference_steps=2, output_type="np").images

    pipe = diffusers.DDIMPipeline(unet=pack(unet()), scheduler=diffusers.DDIMScheduler())
    pipe.save_pretrained(tmp_path)
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert isinstance(loaded, diffusers.DDIMPipeline)
    assert loaded.unet.quantization_method == "toy"
    assert (images(loaded) == images(pipe)).all()


def test_a_mapping_for_a_packed_pipeline_is_accepted_and_the_saved_config_wins(tmp_path):
    model = pack(unet())
    diffusers.DDPMPipeline(unet=model, scheduler=diffusers.DDPMScheduler()).save_pretrained(
        tmp_path
    )
    mapping = PipelineQuantizationConfig(quant_mapping={"unet": ToyConfig(modules={}, bits=4)})
    with pytest.warns(UserWarning, match="from the model will be used"):
        loaded = diffusers.DDPMPipeline.from_pretrained(tmp_path, quantization_config=mapping)
    assert loaded.unet.hf_quantizer.quantization_config.bits == 8
    assert torch.equal(output(loaded.unet), output(model))


def test_weights_that_are_not_quantized_name_the_command_that_does_it(tmp_path):
    expected = "not quantized, and toy cannot quantize while loading; run `toy quantize MODEL"
    model = unet()
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match=expected):
        load(tmp_path / "model", quantization_config=ToyConfig(modules={}))
    diffusers.DDIMPipeline(unet=model, scheduler=diffusers.DDIMScheduler()).save_pretrained(
        tmp_path / "pipe"
    )
    mapping = PipelineQuantizationConfig(quant_mapping={"unet": ToyConfig(modules={})})
    with pytest.raises(ConfigError, match=expected):
        diffusers.DDIMPipeline.from_pretrained(tmp_path / "pipe", quantization_config=mapping)


def test_shards_and_device_maps_give_the_same_bits(folder, tmp_path):
    expected = output(load(folder))
    load(folder).save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert torch.equal(output(load(tmp_path)), expected)
    assert torch.equal(output(load(folder, device_map={"": "cpu"})), expected)


def test_modules_cannot_be_left_on_disk(folder, tmp_path):
    places = {"": "cpu", "mid_block": "disk"}
    with pytest.raises(ConfigError, match="'disk' is not possible for packed modules"):
        load(folder, device_map=places, offload_folder=tmp_path)


def test_a_packed_model_behaves_as_diffusers_wants(folder):
    for model in (load(folder), pack(unet())):
        assert model.finished
        assert model.hf_quantizer.is_serializable
        assert not model.hf_quantizer.is_trainable
        assert model.is_quantized
        assert model.quantization_method is ToyMethod.TOY
        assert model.to("cpu") is model
        for cast in (model.half, model.float, lambda model=model: model.to(torch.float16)):
            with pytest.raises(ValueError, match="quantized model"):
                cast()
        with pytest.raises(ConfigError, match="use safe_serialization=True"):
            model.save_pretrained(folder.parent / "never", safe_serialization=False)


def test_a_packed_module_compiles_as_one_graph(folder):
    module = load(folder).mid_block.attentions[0].to_q
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    x = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(compiled(x), module(x))


def test_a_builder_that_makes_state_nobody_saves_is_told(copy):
    edit(copy, lambda settings: one_entry(settings, {"cache": True}))
    with pytest.raises(TypeError, match="cache would not be saved; make it persistent"):
        load(copy)


def test_modules_a_class_keeps_in_float32_stay_there(folder, monkeypatch):
    monkeypatch.setattr(diffusers.UNet2DModel, "_keep_in_fp32_modules", ["conv_norm_out"])
    model = load(folder, dtype=torch.bfloat16)
    assert model.conv_norm_out.weight.dtype == torch.float32
    assert model.conv_in.weight.dtype == torch.bfloat16


def test_the_file_has_the_bytes_that_are_accounted(folder):
    path = folder / WEIGHTS
    header = int.from_bytes(path.read_bytes()[:8], "little")
    assert stored_bytes(load(folder)) == path.stat().st_size - 8 - header


class Twins(diffusers.ModelMixin, ConfigMixin):
    """Two names of one layer, two layers with one weight, and one that shares nothing."""

    config_name = "config.json"

    @register_to_config
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.again = self.first
        self.left, self.right, self.other = (nn.Linear(4, 4) for _ in range(3))
        self.right.weight = self.left.weight

    def forward(self, x):
        for layer in (self.first, self.left, self.right, self.other, self.again):
            x = layer(x)
        return x


@pytest.mark.parametrize("packed", [("first",), ("again",), ("first", "other"), ()])
def test_tied_weights_are_stored_once_and_stay_tied(packed, tmp_path):
    torch.manual_seed(0)
    model, x = Twins(), torch.randn(3, 4)
    for name in packed:
        layer = PackedToy(module := find_module(model, name), 4, 4)
        layer.fill(module.weight)
        replace_module(model, name, layer)
    entries = {name: {"bits": 8, "rows": 4, "columns": 4} for name in packed}
    attach(model, ToyConfig(modules=entries))
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / WEIGHTS)) == set(model.state_dict()) - set(tied_names(model))
    assert not any(name.startswith("again") for name in load_file(tmp_path / WEIGHTS))
    loaded = Twins.from_pretrained(tmp_path, device_map={"": "cpu"})
    assert loaded.again is loaded.first
    assert loaded.right.weight is loaded.left.weight
    assert isinstance(loaded.first, PackedToy) == bool(set(packed) & {"first", "again"})
    assert torch.equal(loaded(x), model(x))
    linear = 4 * (16 + 4)
    toy = 16 + 4 * 2 + 4 + 4 * 4
    plain = 4 - len(packed)  # four layers have tensors of their own, two of them share a weight
    assert stored_bytes(loaded) == plain * linear - 16 * 4 + len(packed) * toy


def test_weights_that_came_apart_are_not_saved_as_one(tmp_path):
    model = Twins()
    attach(model, ToyConfig(modules={}))
    model.right.weight = nn.Parameter(model.left.weight + 1)
    with pytest.raises(ConfigError, match=r"'right.weight' and 'left.weight' were tied"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda t, k: t.pop(k), InputError, r"codes' is missing, expected I8 \(\d+, \d+\)"),
        (
            lambda t, k: t.pop("conv_in.weight"),
            InputError,
            r"safetensors: tensor 'conv_in.weight' is missing, expected F32 \(8, 3, 3, 3\)",
        ),
        (
            lambda t, k: t.update({k: t[k][:, 1:].clone()}),
            InputError,
            r"codes': found I8 \(\d+, \d+\), expected I8 \(\d+, \d+\); the file and its config",
        ),
        (lambda t, k: t.update({k: t[k].float()}), InputError, r"found F32 .*, expected I8"),
        (
            lambda t, k: t.update({"extra.codes": torch.zeros(3)}),
            InputError,
            r"safetensors: tensor 'extra.codes': found F32 \(3,\), expected no tensor of that name",
        ),
        (
            lambda t, k: t.update({k.replace("codes", "gain"): torch.ones(1).half()}),
            InputError,
            r"gain': found F16 \(1,\), expected F32",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(copy, change, error, match):
    edit_tensors(copy, lambda tensors: change(tensors, first_packed(tensors)))
    with pytest.raises(error, match=match):
        load(copy, ignore_mismatched_sizes=True)


def test_a_truncated_file_is_named(copy):
    data = (copy / WEIGHTS).read_bytes()
    (copy / WEIGHTS).write_bytes(data[:-100])
    with pytest.raises(OSError, match=f"Unable to load weights .*{WEIGHTS}"):
        load(copy)
    with pytest.raises(CheckpointError, match=WEIGHTS):
        check_files([copy / WEIGHTS], {})


def test_tensors_a_model_class_ignores_may_be_there(copy, monkeypatch):
    edit_tensors(copy, lambda tensors: tensors.update({"old.weight": torch.zeros(3)}))
    monkeypatch.setattr(diffusers.UNet2DModel, "_keys_to_ignore_on_load_unexpected", ["^old"])
    assert load(copy).finished


def test_only_safetensors_are_read(copy):
    torch.save(load_file(copy / WEIGHTS), copy / "diffusion_pytorch_model.bin")
    with pytest.raises(InputError, match=r"model\.bin: expected a \.safetensors file"):
        load(copy, use_safetensors=False)


def test_a_tensor_in_two_files_is_refused(folder, tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "1.safetensors")
    save_file({"a": torch.ones(2)}, tmp_path / "2.safetensors")
    files = [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    with pytest.raises(InputError, match=r"2\.safetensors: tensor 'a' is also in .*1\.safetensors"):
        check_files(files, {"a": torch.ones(2)})


def one_entry(settings, change):
    name = next(iter(settings["modules"]))
    settings["modules"][name] |= change


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s: s.update(format=2), "format is 2, expected 1; the file is from another version"),
        (lambda s: s.update(colour="red"), "unknown field 'colour', expected modules, tied, bits"),
        (lambda s: s.pop("modules"), r"missing field 'modules', .* \(required: modules\)"),
        (lambda s: s.update(modules=[]), r"field 'modules' is \[\], expected names with a desc"),
        (lambda s: s.update(modules={"conv_in": 3}), "expected names with a description each"),
        (lambda s: s.update(tied={"a": 1}), "expected names with the names they are tied to"),
        (lambda s: s.update(tied={"a": "conv_in.weight"}), "not two tensors' names"),
        (lambda s: s.update(tied={"conv_in.bias": "conv_in.weight"}), "has not the shape of"),
        (lambda s: s["modules"].update(nothing={}), "module 'nothing': UNet2DModel has no part"),
        (
            lambda s: s["modules"].update({"conv_in.deep": {}}),
            "module 'conv_in.deep': conv_in has no part 'deep', only no parts at all",
        ),
        (lambda s: one_entry(s, {"bits": 3}), r"\(Conv2d|Linear\): ValueError: bits are 3"),
        (lambda s: one_entry(s, {"rows": 9}), r"found I16 \(\d+,\), expected I16 \(9,\); the file"),
        (lambda s: one_entry(s, {"rows": -1}), "RuntimeError: "),
        (lambda s: one_entry(s, {"rows": 10**12}), "claims 1000000000000, expected at most 65536"),
        (lambda s: one_entry(s, {"x": [float("nan")]}), "cannot be written as JSON: Out of range"),
        (lambda s: s["modules"].update({next(iter(s["modules"])): {}}), "KeyError: 'bits'"),
    ],
)
def test_configs_that_do_not_fit_are_named(copy, change, match):
    edit(copy, change)
    with pytest.raises((InputError, ConfigError), match=match) as caught:
        load(copy)
    assert str(caught.value).startswith(("config.json: quantization_config", str(copy)))
    assert "\n" not in str(caught.value)


def test_claimed_sizes_are_refused_before_anything_is_built(copy, monkeypatch):
    def build(self, module, entry):
        raise AssertionError("the builder was reached")

    edit(copy, lambda settings: one_entry(settings, {"rows": 10**12}))
    monkeypatch.setattr(ToyQuantizer, "build", build)
    with pytest.raises(InputError, match="claims 1000000000000"):
        load(copy)
    layer = nn.Linear(300, 300)
    check_numbers("layer", {"groups": [[2, 300]], "columns": 90_300, "smooth": True}, layer)
    with pytest.raises(InputError, match="claims 90301, expected at most 90300"):
        check_numbers("layer", {"groups": [[2, 90_301]]}, layer)


def test_one_module_under_two_names_is_described_once(tmp_path):
    model = Twins()
    attach(model, ToyConfig(modules={}))
    model.save_pretrained(tmp_path)
    entry = {"bits": 8, "rows": 4, "columns": 4}
    edit(tmp_path, lambda settings: settings["modules"].update(first=entry, again=entry))
    with pytest.raises(InputError, match="modules 'first' and 'again' are one"):
        Twins.from_pretrained(tmp_path)


def test_a_config_survives_the_file():
    config = ToyConfig(modules={"a": {"groups": ((2, 3), (1, 4))}}, bits=4, tied={"b": "a"})
    assert config.modules == {"a": {"groups": [[2, 3], [1, 4]]}}
    assert json.loads(config.to_json_string()) == config.to_dict() == config.to_diff_dict()
    assert config.to_dict()["quant_method"] == "toy"
    assert ToyConfig.from_dict(config.to_dict()) == config
    assert ToyConfig.from_dict(config.to_dict(), return_unused_kwargs=True, x=1)[1] == {"x": 1}
    assert "groups" not in repr(config)  # diffusers prints it in every debug log
    config.to_dict()["modules"].clear()
    assert config.modules
    with pytest.raises(ConfigError, match=r"takes no arguments beside the file: \['x'\]"):
        ToyConfig.from_dict(config.to_dict(), x=1)
    with pytest.raises(InputError, match="quant_method is 'torchao', expected 'toy'"):
        ToyConfig.from_dict(config.to_dict() | {"quant_method": "torchao"})
    with pytest.raises(ConfigError, match="cannot be written as JSON"):
        ToyConfig(modules={"a": {"scale": torch.ones(1)}})
    with pytest.raises(ConfigError, match="cannot be written as JSON"):
        ToyConfig(modules={}, bits=float("nan"))


def test_names_are_registered_once():
    register(ToyConfig, ToyQuantizer)

    class Other(ToyConfig):
        pass

    with pytest.raises(ConfigError, match=r"'toy' is already registered by .*ToyConfig"):
        register(Other, ToyQuantizer)
    Other.method = "plain"
    with pytest.raises(ConfigError, match=r"Other.method is 'plain', expected a member"):
        register(Other, ToyQuantizer)


def test_without_registration_nothing_loads_or_attaches(folder, monkeypatch):
    monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, "toy")
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "toy")
    with pytest.raises(ValueError, match="Unknown quantization type, got toy"):
        load(folder)
    with pytest.raises(ConfigError, match="method 'toy' is not registered"):
        attach(unet(), ToyConfig(modules={}))


def test_attach_refuses_what_could_not_be_saved(folder):
    with pytest.raises(ConfigError, match="UNet2DModel is already quantized by toy"):
        attach(load(folder), ToyConfig(modules={}))
    with pytest.raises(InputError, match="module 'nothing'"):
        attach(unet(), ToyConfig(modules={"nothing": {}}))
    model = unet()
    model.conv_in.register_buffer("cache", torch.ones(1), persistent=False)
    with pytest.raises(TypeError, match="cache would not be saved"):
        attach(model, ToyConfig(modules={"conv_in": {}}))


def test_a_diffusers_that_names_no_files_is_refused():
    quantizer = ToyQuantizer(ToyConfig(modules={}))
    with pytest.raises(ConfigError, match=r"use 0\.42 or newer"):
        quantizer.preprocess_model(unet())


def test_a_file_that_changes_while_it_is_read_is_noticed():
    quantizer = ToyQuantizer(ToyConfig(modules={}))
    assert quantizer.check_quantized_param_shape("x", torch.ones(2), torch.ones(2))
    with pytest.raises(InputError, match=r"'x' has shape \(3,\), expected \(2,\)"):
        quantizer.check_quantized_param_shape("x", torch.ones(2), torch.ones(3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_bit_views_keep_every_value(dtype):
    values = torch.tensor([0.0, -0.0, 1.5, -3e-5, float("inf"), float("nan")], dtype=dtype)
    bits = bits_of(values)
    assert not bits.is_floating_point()
    assert torch.equal(bits_of(float_of(bits, dtype)), bits)
    assert torch.equal(float_of(bits, dtype)[:5], values[:5])
    with pytest.raises(InputError, match="expected floats"):
        bits_of(bits)
    with pytest.raises(InputError, match=r"expected torch\."):
        float_of(torch.zeros(2, dtype=torch.uint8), dtype)


def test_replacing_reaches_every_place_of_a_module():
    shared = nn.Linear(2, 2)
    model = nn.Sequential(shared, nn.ModuleList([shared, nn.ReLU()]), nn.Sequential(shared))
    replacement = nn.Identity()
    replace_module(model, "1.0", replacement)
    assert model[0] is model[1][0] is model[2][0] is replacement
    with pytest.raises(InputError, match=r"module '1\.x': 1 has no part 'x', only 0, 1"):
        replace_module(model, "1.x", replacement)


def test_no_other_module_of_the_package_imports_diffusers():
    folder = Path(plugin.__file__).parent
    pattern = re.compile(r"^\s*(from|import) (diffusers|tenfold_core\.quant\.plugin)", re.M)
    found = [path.name for path in folder.glob("*.py") if pattern.search(path.read_text())]
    assert found == ["plugin.py"]


def test_without_diffusers_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers.quantizers", None)
    spec = importlib.util.spec_from_file_location("plugin_alone", plugin.__file__)
    with pytest.raises(MissingExtraError, match=r"pip install 'diffusers>=0\.42' accelerate"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
