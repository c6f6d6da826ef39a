# SPDX-License-Identifier: Apache-2.0
"""Layers and their roles, on tiny models of several families made at run time."""

from collections import Counter

import pytest
import torch
from mpq_dm.roles import find_layers, weight_rows
from torch import nn

diffusers = pytest.importorskip("diffusers")


def unet():
    return diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1,
        block_out_channels=(16, 32), norm_num_groups=8, attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), num_class_embeds=10,
    )  # fmt: skip


def roles(model):
    return {layer.name: layer.role for layer in find_layers(model)[0]}


def test_a_unet():
    found = roles(unet())
    assert found["conv_in"] == "input"
    assert found["conv_out"] == "output"
    assert found["time_embedding.linear_1"] == found["time_embedding.linear_2"] == "time"
    assert found["down_blocks.0.downsamplers.0.conv"] == "skip"
    assert found["down_blocks.1.resnets.0.conv_shortcut"] == "skip"
    assert found["down_blocks.1.resnets.0.time_emb_proj"] == "body"
    assert found["up_blocks.0.upsamplers.0.conv"] == "body"
    assert found["mid_block.attentions.0.to_q"] == "body"
    assert Counter(found.values())["input"] == Counter(found.values())["output"] == 1


def test_a_transformer():
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=1000,
    )  # fmt: skip
    found = roles(model)
    assert found["pos_embed.proj"] == "input"
    assert found["proj_out_1"] == found["proj_out_2"] == "output"
    assert found["transformer_blocks.0.norm1.emb.timestep_embedder.linear_1"] == "time"
    assert found["transformer_blocks.0.norm1.linear"] == "body"
    assert found["transformer_blocks.1.ff.net.2"] == "body"


def test_every_weight_is_either_quantized_or_named():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3, 4))

    model = nn.Sequential(nn.Linear(4, 5), Odd(), nn.Embedding(3, 4), nn.LayerNorm(4))
    found, left = find_layers(model)
    assert [layer.name for layer in found] == ["0"]
    assert left == ["1 (Odd)"]


def test_tied_weights_are_told():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    first, second = find_layers(model)[0]
    assert (first.tied_to, second.tied_to) == (None, "a")


@pytest.mark.parametrize(
    "module",
    [
        nn.Linear(6, 4), nn.Conv1d(6, 4, 3), nn.Conv2d(6, 4, 3, groups=2), nn.Conv3d(2, 4, 2),
        nn.ConvTranspose1d(6, 4, 3), nn.ConvTranspose2d(6, 4, 3, groups=2),
    ],
)  # fmt: skip
def test_a_row_is_what_makes_one_output_channel(module):
    rows = weight_rows(module)
    channels = getattr(module, "out_channels", None) or module.out_features
    inputs = getattr(module, "in_channels", None) or module.in_features
    assert rows.shape[0] == channels
    x = torch.randn(2, inputs, *[5] * (module.weight.ndim - 2))
    x = x if module.weight.ndim > 2 else x.flatten(1)
    channel = 1
    out = module(x).select(1, channel).sum()
    (gradient,) = torch.autograd.grad(out, module.weight)
    with torch.no_grad():
        module.weight.copy_(gradient)
    touched = weight_rows(module).abs().sum(dim=1) > 0
    assert touched.nonzero().flatten().tolist() == [channel]
