# SPDX-License-Identifier: Apache-2.0
"""Every byte of a packed model is accounted, and the known sizes come out."""

import json

import pytest
import torch
from mpq_dm.omq import mixtures, raise_rows
from mpq_dm.packed import PackedLayer
from mpq_dm.roles import find_layers
from mpq_dm.sizes import account
from safetensors.torch import load_file, save_file
from tenfold_core.errors import CheckpointError, InputError
from tenfold_core.quant.activations import TimestepContext
from tenfold_core.quant.packing import packed_nbytes
from tenfold_core.run.rows import plain
from torch import nn

diffusers = pytest.importorskip("diffusers")

WEIGHTS = "diffusion_pytorch_model.safetensors"
STEPS = [999.0, 749.0, 499.0, 249.0]
HALF = "down_blocks.0.downsamplers.0.conv"


@pytest.fixture
def model(unet, pack):
    return pack(unet, STEPS, halves=[HALF])


def test_a_convolution_of_two_bits_with_one_group_up_and_one_down(plan_of):
    module = nn.Conv2d(320, 320, 3, bias=False)
    bits = torch.from_numpy(mixtures(torch.arange(320).numpy(), 2)[1])  # 32 x 1, 256 x 2, 32 x 3
    layer = PackedLayer.from_plan(module, *plan_of(module, 1, bits=bits), TimestepContext([1.0]))
    state = {name: part.numel() * part.element_size() for name, part in layer.named_buffers()}
    acts = state.pop("act_scale") + state.pop("act_zero")
    assert acts == 4 + 2
    # 640 row-bits of 2,880 weights; scale and zero, row_order, smooth of 2 bytes a channel
    assert state == {
        "qweight": 230_400, "scale": 640, "zero": 640, "row_order": 640, "smooth": 640,
    }  # fmt: skip
    assert sum(state.values()) == 232_960
    assert 8 * 232_960 / module.weight.numel() == pytest.approx(2.0222, abs=5e-5)
    assert packed_nbytes((320, 320, 3, 3), layer.entry.groups, smooth=320) == 232_960


def test_ten_percent_of_rows_one_bit_up_cost_five_megabytes_on_ldm_4():
    with torch.device("meta"):
        model = diffusers.UNet2DConditionModel(
            sample_size=64, in_channels=3, out_channels=3, layers_per_block=2,
            block_out_channels=(192, 384, 576, 960), cross_attention_dim=512,
            down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * 3),
            up_block_types=(*["CrossAttnUpBlock2D"] * 3, "UpBlock2D"),
        )  # fmt: skip
    layers = find_layers(model)[0]
    assert len(layers) == 283
    assert sum(layer.weights for layer in layers) == 400_586_880
    cost = 0
    for layer in layers:
        if layer.role == "body":
            bits = torch.full((layer.rows,), 2).numpy()
            raised = int((raise_rows(0.0 * bits, bits, 0.1) == 3).sum())
            shape = (layer.rows, layer.columns)
            uniform = packed_nbytes(shape, ((2, layer.rows),))
            order = 2 * layer.rows
            mixed = packed_nbytes(shape, ((2, layer.rows - raised), (3, raised)))
            cost += mixed - order - uniform
    assert cost / 1e6 == pytest.approx(4.83, abs=5e-3)


@pytest.mark.parametrize("shard", [None, "4KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_accounted_is_on_disk(shard, dtype, model, tmp_path):
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.save_pretrained(tmp_path, **({"max_shard_size": shard} if shard else {}))
    found, in_memory = account(tmp_path), account(model)
    files = list(tmp_path.glob("*.safetensors"))
    assert found.disk.files == len(files)
    assert (len(files) > 3) == (shard is not None)
    assert found.disk.data + found.disk.headers == sum(path.stat().st_size for path in files)
    assert found.accounted == found.disk.data == in_memory.accounted
    assert found.agrees
    assert in_memory.agrees
    assert found.layers == in_memory.layers
    assert found.roles == in_memory.roles
    saved = {name: part for path in files for name, part in load_file(path).items()}
    assert found.accounted == sum(part.nbytes for part in saved.values())
    assert found.layers[0].bias == saved[f"{found.layers[0].layer}.bias"].nbytes


def test_the_parts_add_up(model):
    found = account(model)
    assert found.accounted == found.other + sum(layer.bytes for layer in found.layers)
    assert sum(role.layers for role in found.roles) == len(found.layers)
    assert sum(role.bytes for role in found.roles) == sum(layer.bytes for layer in found.layers)
    by_name = {layer.layer: layer for layer in found.layers}
    middle = by_name["mid_block.resnets.0.conv1"]
    # rows of 144 weights: 6 of 1 bit, 5 of 2, 5 of 3; float32 bias, 4 steps
    assert (middle.codes, middle.scales, middle.order) == (6 * 18 + 5 * 36 + 5 * 54, 64, 32)
    assert (middle.smooth, middle.acts, middle.bias) == (32, 24, 64)
    assert (middle.weights, middle.bits) == (16 * 144, 31 / 16)
    half = by_name[HALF]
    assert (half.role, half.bits, half.codes, half.scales) == ("skip", 16, 2 * half.weights, 0)
    originals = sum(layer.weights for layer in found.layers)
    assert found.weights == originals + 10 * 32  # the table of labels is not packed
    assert found.bits_per_weight == 8 * found.accounted / found.weights
    roles = {role.role: role for role in found.roles}
    assert roles["time"].bits == roles["input"].bits == 8
    assert 1.9 < roles["body"].bits < 2
    assert json.dumps(plain(found))


def test_a_pipeline_s_folder_is_that_of_its_denoiser(model, scheduler, tmp_path):
    diffusers.DDIMPipeline(unet=model, scheduler=scheduler).save_pretrained(tmp_path)
    assert account(tmp_path) == account(tmp_path / "unet")


def test_files_that_do_not_agree_with_their_config_are_told(model, tmp_path):
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    name = "mid_block.resnets.0.conv1.qweight"
    tensors[name] = torch.cat((tensors[name], tensors[name][:7]))
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    found = account(tmp_path)
    assert not found.agrees
    assert found.disk.data == found.accounted + 7


def test_what_is_not_packed_is_refused(unet, model, tmp_path):
    with pytest.raises(InputError, match="UNet2DModel: not packed"):
        account(diffusers.UNet2DModel(**small()))
    plain_folder = tmp_path / "plain"
    diffusers.UNet2DModel(**small()).save_pretrained(plain_folder)
    with pytest.raises(InputError, match="no model quantized by mpq-dm"):
        account(plain_folder)
    model.save_pretrained(tmp_path / "packed")
    data = (tmp_path / "packed" / WEIGHTS).read_bytes()
    (tmp_path / "packed" / WEIGHTS).write_bytes(data[:-9])
    with pytest.raises(CheckpointError, match=WEIGHTS):
        account(tmp_path / "packed")
    (tmp_path / "packed" / WEIGHTS).unlink()
    with pytest.raises(InputError, match=r"no \.safetensors file"):
        account(tmp_path / "packed")


def small():
    return {
        "sample_size": 8, "block_out_channels": (8,), "norm_num_groups": 4, "layers_per_block": 1,
        "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",),
        "attention_head_dim": 8,
    }  # fmt: skip
