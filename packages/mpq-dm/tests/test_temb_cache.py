# SPDX-License-Identifier: Apache-2.0
"""Tables of what depends on the timestep alone: found by data flow, equal to the modules."""

import copy
from dataclasses import replace

import pytest
import torch
from diffusers import DiTTransformer2DModel
from mpq_dm.calibration import calibrate
from mpq_dm.config import method_config
from mpq_dm.method import make_student, pack
from mpq_dm.plugin import load
from mpq_dm.sampler import LatentSampler, called_timesteps
from mpq_dm.sizes import account
from mpq_dm.temb_cache import TableLayer, cache_timestep, table_layers, timestep_tables
from tenfold_core.errors import InputError, TenfoldWarning
from tenfold_core.quant.activations import TimestepContext
from torch import nn

STEPS = (750.0, 500.0, 250.0, 0.0)


@pytest.fixture
def sampler(scheduler):
    return LatentSampler(
        scheduler=scheduler, latent_shape=(1, 8, 8), steps=4, batch_size=3, labels=range(10)
    )


@pytest.fixture
def plain(make_unet):
    """A UNet without labels."""
    return make_unet(num_class_embeds=None)


@pytest.fixture
def free(sampler):
    """A sampler without labels."""
    return replace(sampler, labels=None)


def table(values, steps=STEPS):
    context = TimestepContext(steps)
    return TableLayer.from_values(torch.as_tensor(values), context), context


def test_without_labels_the_embedding_and_all_its_projections_are_tables(plain, free):
    cached = cache_timestep(plain, free, STEPS)

    found = {name for name, _ in table_layers(cached)}
    projections = {name for name, _ in plain.named_modules() if name.endswith("time_emb_proj")}
    assert found == {"time_embedding", *projections}
    assert len(projections) == 8  # of two blocks down, two in the middle, four up
    torch.testing.assert_close(
        free.trajectory(cached, 9), free.trajectory(plain, 9), rtol=1e-5, atol=1e-6
    )


def test_with_labels_only_the_embedding_is_a_table(unet, sampler):
    cached = cache_timestep(unet, sampler, STEPS)

    assert [name for name, _ in table_layers(cached)] == ["time_embedding"]
    torch.testing.assert_close(
        sampler.trajectory(cached, 9), sampler.trajectory(unet, 9), rtol=1e-5, atol=1e-6
    )


def test_labels_are_noticed_even_where_only_one_is_ever_drawn(unet, sampler):
    found = timestep_tables(unet, replace(sampler, labels=[3]), STEPS)

    assert list(found) == ["time_embedding"]


def test_a_transformer_keeps_its_label_embedders(scheduler):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=4, in_channels=1, out_channels=1,
            num_layers=2, sample_size=4, patch_size=2, num_embeds_ada_norm=10,
        ).eval()  # fmt: skip
    sampler = LatentSampler(
        scheduler=scheduler, latent_shape=(1, 4, 4), steps=4, batch_size=2, labels=range(10)
    )
    cached = cache_timestep(model, sampler, called_timesteps(model, sampler))

    found = [name for name, _ in table_layers(cached)]
    assert found == [f"transformer_blocks.{n}.norm1.emb.timestep_embedder" for n in range(2)]
    torch.testing.assert_close(
        sampler.trajectory(cached, 5), sampler.trajectory(model, 5), rtol=1e-5, atol=1e-6
    )


def test_the_model_given_stays_as_it_was(plain, free):
    plain.requires_grad_(False)
    plain.conv_in.requires_grad_(True)
    before = copy.deepcopy(plain.state_dict())

    cache_timestep(plain, free, STEPS)

    assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())
    asking = [name for name, part in plain.named_parameters() if part.requires_grad]
    assert asking == ["conv_in.weight", "conv_in.bias"]
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in plain.modules())


def test_a_copy_of_a_cached_model_follows_its_own_calls(plain, free):
    cached = cache_timestep(plain, free, STEPS)
    other = copy.deepcopy(cached)
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))

    wanted = cached(x, timestep=500).sample
    cached(x, timestep=0)
    assert torch.equal(other(x, timestep=500).sample, wanted)
    assert not torch.equal(cached(x, timestep=0).sample, wanted)


class Blind(nn.Module):
    """Labels and noise enter without a weight, where no gradient shows them."""

    def __init__(self):
        super().__init__()
        self.by_label = nn.Linear(2, 2)
        self.by_step = nn.Linear(2, 2)
        self.by_token = nn.Linear(2, 2)
        self.idle = nn.Linear(2, 2)

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        time = torch.stack((timestep, timestep / 2), dim=1) / 1000
        label = self.by_label(time + class_labels.view(-1, 1) / 10)
        token = self.by_token(time[:, None])[:, 0]
        return (sample * (label + token + self.by_step(time)).mean(1).view(-1, 1, 1, 1),)


def test_what_no_gradient_shows_is_seen_in_the_trajectories(sampler):
    assert list(timestep_tables(Blind(), sampler, STEPS)) == ["by_step"]


def test_values_are_chosen_by_step_and_interpolated_between_steps():
    layer, context = table([[0.0, 8.0], [4.0, 0.0], [6.0, 2.0], [7.0, 7.0]])
    x = torch.zeros(2, 5)

    context.set_(500)
    assert layer(x).tolist() == [[4.0, 0.0], [4.0, 0.0]]
    context.set_(torch.tensor([0, 750]))
    assert layer(x).tolist() == [[7.0, 7.0], [0.0, 8.0]]
    assert layer(torch.zeros(4, 5)).tolist() == [[7, 7], [7, 7], [0, 8], [0, 8]]
    with pytest.warns(TenfoldWarning, match="outside the 4 calibrated ones"):
        context.set_(375)
    assert layer(x[:1]).tolist() == [[5.0, 1.0]]
    context.set_(9999)
    assert layer(x[:1]).tolist() == [[0.0, 8.0]]
    assert layer(x[:1].half()).dtype == torch.float16
    assert layer(x[:0]).shape == (0, 2)


def test_a_table_is_saved_bit_by_bit_and_built_without_memory():
    values = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)) * 1e-9
    layer, context = table(values)

    with torch.device("meta"):
        other = TableLayer.empty(layer.entry(), 4)
    assert other.table.is_meta
    other.load_state_dict(layer.state_dict(), assign=True)
    other.half().to(torch.float64)
    other.check("table")
    other.bind_(context)
    assert torch.equal(other.values, values)
    assert layer.entry() == {"role": "time", "table": [4, 6]}
    assert list(layer.state_dict()) == ["table"]
    assert repr(layer) == "TableLayer(steps=4, channels=6)"


def test_a_packed_model_saves_and_loads_its_tables(plain, free, tmp_path):
    cached = cache_timestep(plain, free, STEPS)
    config = method_config("tfmq", steps=4, calib_samples=3, batch_size=3, weight_bits=4)
    found = calibrate(cached, free, STEPS, config)
    student, layers = make_student(cached, found, STEPS, config)
    wanted = free.trajectory(student, 9)
    packed = pack(student, layers, found, STEPS, config, free)
    made = free.trajectory(packed, 9)
    packed.save_pretrained(tmp_path)
    loaded = load(tmp_path)

    assert not any("time_emb" in name for name in found.plans)
    torch.testing.assert_close(made, wanted, rtol=1e-3, atol=1e-3)
    assert torch.equal(free.trajectory(loaded, 9), made)
    names = [name for name, _ in table_layers(loaded)]
    assert len(names) == 9
    values = cached.get_submodule("time_embedding").values
    assert torch.equal(loaded.get_submodule("time_embedding").values, values)
    assert account(tmp_path).agrees
    assert account(tmp_path).accounted == account(packed).accounted


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ({"role": "time"}, "expected role 'time' and the shape of a table"),
        ({"role": "body", "table": [4, 6]}, "expected role 'time'"),
        ({"role": "time", "table": [4, 6], "bits": 8}, "expected role 'time'"),
        ({"role": "time", "table": "4x6"}, "expected role 'time'"),
        ({"role": "time", "table": [4.0, 6]}, "expected role 'time'"),
        ({"role": "time", "table": [5, 6]}, r"expected 4 steps and channels, found \[5, 6\]"),
        ({"role": "time", "table": [4, 0]}, "expected 4 steps and channels"),
        ({"role": "time", "table": [4]}, "expected 4 steps and channels"),
    ],
)
def test_an_entry_that_makes_no_sense_is_refused(entry, text):
    with pytest.raises(InputError, match=text):
        TableLayer.empty(entry, 4)


@pytest.mark.bad_input
def test_misuse_is_refused():
    with pytest.raises(InputError, match=r"found inf at step 1, channel 0"):
        table([[0.0], [torch.inf], [0.0], [0.0]])
    with pytest.raises(InputError, match="table: expected 4 steps, found 2"):
        table([[0.0], [1.0]])
    layer, context = table([[0.0], [1.0], [2.0], [3.0]])
    context.set_(torch.tensor([0, 750]))
    with pytest.raises(InputError, match="no multiple of the 2 timesteps"):
        layer(torch.zeros(3, 5))
    with pytest.raises(InputError, match="cached without its condition"):
        layer(torch.zeros(2, 5), torch.zeros(2, 5))
    layer.bind_(None)
    with pytest.raises(InputError, match="the table follows no context"):
        layer(torch.zeros(2, 5))
