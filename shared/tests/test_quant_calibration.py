# SPDX-License-Identifier: Apache-2.0
"""Smoothing, low-rank changes and the collection of layer inputs."""

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402
from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from tenfold_core.errors import ConfigError, InputError  # noqa: E402
from tenfold_core.quant.activations import TimestepContext  # noqa: E402
from tenfold_core.quant.calibration import InputCollector, Reservoir  # noqa: E402
from tenfold_core.quant.lowrank import LowRankDelta  # noqa: E402
from tenfold_core.quant.smoothing import (  # noqa: E402
    RangeMax,
    activation_multiplier,
    channel_max,
    smooth_scale,
    smooth_weight,
    weight_channel_max,
)
from torch import nn  # noqa: E402

LAYERS = [
    (nn.Linear(6, 4), (5, 6)),
    (nn.Conv2d(6, 4, 3, padding=1), (2, 6, 5, 5)),
    (nn.Conv2d(6, 4, 3, groups=2), (2, 6, 5, 5)),
    (nn.Conv2d(6, 6, 3, groups=6), (2, 6, 5, 5)),
    (nn.Conv1d(6, 4, 2), (2, 6, 5)),
]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed))


# --- smoothing --------------------------------------------------------------------------------


def test_smoothing_by_hand():
    xmax, wmax = torch.tensor([16.0, 1.0]), torch.tensor([1.0, 16.0])
    torch.testing.assert_close(smooth_scale(xmax, wmax, 0.5), torch.tensor([4.0, 0.25]))
    torch.testing.assert_close(smooth_scale(xmax, wmax, 0.25), torch.tensor([2.0, 0.125]))
    torch.testing.assert_close(smooth_scale(xmax, wmax, 1.0), torch.tensor([16.0, 1.0]))
    assert smooth_scale(xmax, wmax, 0).tolist() == [1.0, 1.0]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=str)
def test_smoothing_preserves_the_layer(layer, shape):
    axis, groups = (-1, 1) if isinstance(layer, nn.Linear) else (1, layer.groups)
    x = drawn(*shape)
    x.movedim(axis, -1).mul_(torch.tensor([1e-3, 0.1, 1.0, 10.0, 100.0, 0.0]))
    xmax = channel_max(x, axis).amax(0)
    smooth = smooth_scale(xmax, weight_channel_max(layer.weight, groups=groups), 0.5)
    weight = smooth_weight(layer.weight.detach(), smooth, groups=groups)
    divided = (x.movedim(axis, -1) / smooth).movedim(-1, axis)
    smoothed = torch.func.functional_call(layer, {"weight": weight}, divided)
    torch.testing.assert_close(smoothed, layer(x), rtol=1e-5, atol=1e-5)
    assert not torch.equal(weight, layer.weight)


def test_dead_channels_give_no_infinity():
    # clamped to 1e-5 of the layer, 4e-5 and 1e-5: s**2 = 4e-5 / 1, 4 / 1e-5, 4e-5 / 1e-5
    smooth = smooth_scale(torch.tensor([0.0, 4.0, 0.0]), torch.tensor([1.0, 0.0, 0.0]), 0.5)
    torch.testing.assert_close(smooth, torch.tensor([4e-5, 4e5, 4.0]).sqrt())
    zeros = torch.zeros(3)
    assert smooth_scale(zeros, zeros, 0.5).isfinite().all()
    assert smooth_scale(torch.zeros(0), torch.zeros(0), 0.5).shape == (0,)


def test_smoothing_evens_out_the_two_maxima_at_one_half():
    xmax, wmax = drawn(6).abs() + 0.1, drawn(6, seed=1).abs() + 0.1
    smooth = smooth_scale(xmax, wmax, 0.5)
    torch.testing.assert_close(xmax / smooth, wmax * smooth)


def test_the_folded_multiplier_gives_the_codes_of_the_smoothed_input():
    x, smooth = drawn(200, 6), drawn(6, seed=1).abs() + 0.1
    scale, zero = torch.tensor([0.05, 0.2]), 7.0
    multiplier = activation_multiplier(smooth, scale)
    assert multiplier.shape == (2, 6)
    for step in range(2):
        plain = torch.round(x / smooth / scale[step]) + zero
        folded = torch.round(x * multiplier[step]) + zero
        assert (plain != folded).sum() <= 1  # a tie may fall to the other side


def test_channel_maxima_by_hand():
    x = torch.tensor([[[1.0, -5.0], [2.0, 3.0]]])
    assert channel_max(x, -1).tolist() == [[2.0, 5.0]]
    assert channel_max(x, 1).tolist() == [[5.0, 3.0]]
    assert channel_max(x[0], -1).tolist() == [[1.0, 5.0], [2.0, 3.0]]
    weight = torch.tensor([[1.0], [-2.0], [3.0], [-4.0]])[:, :, None]  # two groups of two rows
    assert weight_channel_max(weight, groups=2).tolist() == [2.0, 4.0]


def test_range_maxima_with_momentum_by_hand():
    collected = RangeMax(1, bounds=[500], momentum=0.75)
    collected.update_(torch.tensor([[4.0], [8.0]]), 100)  # first: the mean, 6
    collected.update_(torch.tensor([[2.0]]), 499)  # 0.75 * 6 + 0.25 * 2
    collected.update_(torch.tensor([[1.0], [3.0]]), torch.tensor([500, 20]))  # 1; 0.75 * 5 + 0.75
    assert collected.value.tolist() == [[4.5], [1.0]]
    assert collected.count.tolist() == [4, 1]


def test_range_maxima_without_momentum_are_the_maxima():
    collected, x = RangeMax(3), drawn(4, 2, 3).abs()
    for part in x:
        collected.update_(part)
    assert torch.equal(collected.value[0], x.amax((0, 1)))


@pytest.mark.bad_input
def test_bad_smoothing_is_refused():
    good = torch.ones(3)
    with pytest.raises(ConfigError, match="alpha: got 2"):
        smooth_scale(good, good, 2)
    with pytest.raises(InputError, match="3 channels of the activation, 2 of the weight"):
        smooth_scale(good, good[:2], 0.5)
    for bad in (float("nan"), float("inf"), -1.0):
        with pytest.raises(InputError, match="of the activation is negative or not finite"):
            smooth_scale(torch.full((3,), bad), good, 0.5)
    with pytest.raises(InputError, match="has 4 input channels, the scale has 3"):
        smooth_weight(torch.ones(2, 4), good)
    with pytest.raises(ConfigError, match="rising"):
        RangeMax(3, bounds=[2, 1])
    with pytest.raises(ConfigError, match="momentum: got 1"):
        RangeMax(3, momentum=1)
    with pytest.raises(InputError, match="expected 3 finite channels"):
        RangeMax(3).update_(torch.full((1, 3), float("nan")))
    with pytest.raises(InputError, match="2 values for 3 samples"):
        RangeMax(3).update_(torch.ones(3, 3), torch.zeros(2))


# --- low rank ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 8), (6, 8, 3), (6, 8, 3, 2)], ids=str)
def test_a_fresh_change_is_exactly_zero_and_its_a_is_kaiming_uniform(shape):
    change = LowRankDelta(shape, 2, generator=seeded())
    assert torch.equal(change.delta(), torch.zeros(shape))
    bound = 1 / (8 * torch.Size(shape[2:]).numel()) ** 0.5
    assert 0.5 * bound < change.a.abs().max() <= bound
    assert torch.equal(change.a, LowRankDelta(shape, 2, generator=seeded()).a)
    assert not torch.equal(change.a, LowRankDelta(shape, 2, generator=seeded(1)).a)


def test_every_tap_of_a_convolution_has_its_own_product():
    change = LowRankDelta((5, 4, 3, 2), 2, generator=seeded())
    change.b.data = drawn(*change.b.shape)
    for row in range(3):
        for column in range(2):
            product = change.b[:, :, row, column] @ change.a[:, :, row, column]
            torch.testing.assert_close(change.delta()[:, :, row, column], product)


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=str)
def test_merged_equals_unmerged(layer, shape):
    change = LowRankDelta(layer.weight.shape, 2, generator=seeded())
    x, plain = drawn(*shape), layer.weight.detach()
    fresh = torch.func.functional_call(layer, {"weight": plain + change.delta()}, x)
    assert torch.equal(fresh, layer(x))
    change.b.data = drawn(*change.b.shape)
    merged = torch.func.functional_call(layer, {"weight": plain + change.delta()}, x)
    no_bias = {"weight": change.delta(), "bias": torch.zeros_like(layer.bias)}
    branch = torch.func.functional_call(layer, no_bias, x)
    torch.testing.assert_close(merged, layer(x) + branch, rtol=1e-5, atol=1e-5)


def test_a_linear_change_is_two_thin_layers():
    change, x = LowRankDelta((6, 8), 3, generator=seeded()), drawn(4, 8)
    change.b.data = drawn(6, 3)
    torch.testing.assert_close(
        F.linear(F.linear(x, change.a), change.b), F.linear(x, change.delta())
    )


@pytest.mark.parametrize(
    ("shape", "rank", "expected"),
    [
        ((64, 64), 32, 32),
        ((10, 64), 32, 5),
        ((64, 4), 32, 2),
        ((64, 1, 3, 3), 32, 4),
        ((1, 9), 4, 0),
    ],
)
def test_the_rank_is_capped(shape, rank, expected):
    change = LowRankDelta(shape, rank, generator=seeded())
    assert change.rank == expected == len(change.a)
    assert torch.equal(change.delta(), torch.zeros(shape))


def test_gradients_start_in_b_alone():
    change = LowRankDelta((6, 8), 2, generator=seeded())
    (change.delta() * drawn(6, 8)).sum().backward()
    assert torch.equal(change.a.grad, torch.zeros(2, 8))
    assert (change.b.grad != 0).all()


def test_the_residual_init_is_the_best_change_of_its_rank():
    residual = drawn(6, 8)
    change = LowRankDelta((6, 8), 2, generator=seeded())
    change.init_from_residual_(residual)
    singular = torch.linalg.svdvals(residual)
    left = (residual - change.delta()).square().sum()
    torch.testing.assert_close(left, singular[2:].square().sum())
    weight = torch.linspace(0.1, 5, 8)
    change.init_from_residual_(residual, weight)
    left = ((residual - change.delta()) * weight).square().sum()
    best = torch.linalg.svdvals(residual * weight)[2:].square().sum()
    torch.testing.assert_close(left, best)


def test_the_residual_init_recovers_a_low_rank_convolution_whole():
    shape = (6, 3, 3, 3)
    source = LowRankDelta(shape, 2, generator=seeded())
    source.b.data = drawn(*source.b.shape)
    change = LowRankDelta(shape, 3, generator=seeded(1))
    change.init_from_residual_(source.delta())
    torch.testing.assert_close(change.delta(), source.delta(), rtol=1e-4, atol=1e-5)


def test_a_rank_above_a_taps_own_is_filled_with_zeros():
    residual = drawn(16, 2, 3, 3)
    change = LowRankDelta(residual.shape, 8, generator=seeded())  # every tap is 16 x 2
    change.init_from_residual_(residual)
    torch.testing.assert_close(change.delta(), residual)
    assert not change.a[2:].any()


@pytest.mark.bad_input
def test_bad_low_rank_settings_are_refused():
    with pytest.raises(ConfigError, match=r"expected a weight \(out, in, \*kernel\), got \(4,\)"):
        LowRankDelta((4,), 2, generator=seeded())
    with pytest.raises(ConfigError, match="rank: got 0"):
        LowRankDelta((4, 4), 0, generator=seeded())
    change = LowRankDelta((4, 4), 2, generator=seeded())
    with pytest.raises(InputError, match=r"got shape \(4, 5\), expected \(4, 4\)"):
        change.init_from_residual_(drawn(4, 5))
    with pytest.raises(InputError, match="expected 4 positive values"):
        change.init_from_residual_(drawn(4, 4), torch.tensor([1.0, 1, 0, 1]))


# --- calibration ------------------------------------------------------------------------------


def test_a_reservoir_keeps_everything_until_it_is_full():
    reservoir = Reservoir(5, seeded())
    reservoir.add_(torch.tensor([[1.0], [2.0]]))
    reservoir.add_(torch.tensor([[3.0]]))
    assert reservoir.items.tolist() == [[1.0], [2.0], [3.0]]


def test_a_reservoir_is_a_uniform_sample():
    counts = torch.zeros(20)
    for seed in range(600):
        reservoir = Reservoir(5, seeded(seed))
        for part in torch.arange(20.0).split([3, 9, 1, 7]):
            reservoir.add_(part[:, None])
        kept = reservoir.items.flatten().long()
        assert len(kept.unique()) == 5
        counts[kept] += 1
    # each is kept with probability 1/4: mean 150, standard deviation 10.6
    assert ((counts - 150).abs() < 4.5 * 10.6).all()


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 1)
        self.fc = nn.Linear(4, 2)
        self.context = TimestepContext([2, 1, 0])
        self.context.attach(self)

    def forward(self, x, timestep):
        return self.fc(self.conv(x))

    def layers(self):
        return {"conv": self.conv, "fc": self.fc}


def test_inputs_per_step_come_from_that_step():
    model = Chain()
    collector = InputCollector(
        model.layers(), max_bytes=10_000, generator=seeded(), context=model.context
    )
    with collector:
        for timestep in (0, 2, 1, 2):
            model(torch.full((2, 2, 4, 4), float(timestep)), timestep)
        model(torch.arange(3.0)[:, None, None, None].expand(3, 2, 4, 4), torch.arange(3))
    assert collector.inputs("conv", 0).unique().tolist() == [2.0]
    assert [len(collector.inputs("conv", step)) for step in range(3)] == [5, 3, 3]
    assert collector.inputs("conv").shape == (11, 2, 4, 4)
    assert collector.channel_max("conv").tolist() == [2.0, 2.0]
    assert collector.channel_max("fc").shape == (4,)


def test_the_budget_holds_and_the_maxima_see_everything():
    model, x = Chain(), drawn(50, 2, 4, 4)
    with InputCollector(model.layers(), max_bytes=2000, generator=seeded()) as collector:
        for part in x.split(7):
            model(part, 0)
    assert len(collector.inputs("conv")) == 1000 // 128  # 2 * 4 * 4 floats of 4 bytes
    assert len(collector.inputs("fc")) == 1000 // 192
    assert collector.num_bytes <= 2000
    assert torch.equal(collector.channel_max("conv"), x.abs().amax((0, 2, 3)))
    collector.drop("conv")
    assert collector.num_bytes == 5 * 192
    with pytest.raises(InputError, match="no inputs of layer 'conv'"):
        collector.inputs("conv")


def test_rows_are_tokens_of_the_samples():
    layer, x = nn.Linear(3, 2), drawn(4, 5, 3)
    with InputCollector(
        {"fc": layer}, max_bytes=7 * 12, generator=seeded(), unit="row"
    ) as collector:
        layer(x)
    rows = collector.inputs("fc")
    assert rows.shape == (7, 3)
    assert all(any(torch.equal(row, token) for token in x.reshape(20, 3)) for row in rows)


@given(st.integers(0, 2**20))
def test_the_same_seed_keeps_the_same_inputs_and_the_output_is_untouched(seed):
    layer, x = nn.Linear(3, 2), drawn(30, 3, seed=seed)
    expected, kept = layer(x), []
    for _ in range(2):
        with InputCollector({"fc": layer}, max_bytes=60, generator=seeded(seed)) as collector:
            assert torch.equal(layer(x), expected)
            assert torch.equal(layer(input=x), expected)
        kept.append(collector.inputs("fc"))
    assert torch.equal(*kept)


def test_hooks_are_gone_after_the_block_and_after_an_error():
    layer = nn.Linear(3, 2)
    collector = InputCollector({"fc": layer}, max_bytes=600, generator=seeded())
    layer(drawn(2, 3))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), collector:
        layer(drawn(0, 4))
    layer(drawn(2, 3))
    assert len(collector.inputs("fc")) == 2
    assert not layer._forward_pre_hooks


def test_an_empty_batch_is_passed_over():
    layer = nn.Linear(3, 2)
    with InputCollector({"fc": layer}, max_bytes=600, generator=seeded()) as collector:
        layer(torch.zeros(0, 3))
        layer(torch.ones(1, 3))
    assert collector.inputs("fc").tolist() == [[1.0, 1.0, 1.0]]


@pytest.mark.bad_input
def test_bad_calibration_is_refused():
    layer = nn.Linear(3, 2)
    for layers, budget in (({}, 10), ({"fc": layer}, 0)):
        with pytest.raises(ConfigError, match="expected layers and a budget"):
            InputCollector(layers, max_bytes=budget, generator=seeded())
    with pytest.raises(ConfigError, match="a convolution has no rows"):
        InputCollector({"c": nn.Conv1d(1, 1, 1)}, max_bytes=9, generator=seeded(), unit="row")
    with pytest.raises(ConfigError, match="capacity: got 0"):
        Reservoir(0, seeded())
    with pytest.raises(InputError, match="nothing was collected"):
        _ = Reservoir(1, seeded()).items
    with InputCollector({"fc": layer}, max_bytes=30, generator=seeded()) as collector:
        with pytest.raises(InputError, match="no inputs of layer 'fc'; was it called"):
            collector.channel_max("fc")
        with pytest.raises(ConfigError, match="has 60 bytes, its share of the budget is 30"):
            layer(drawn(1, 5, 3))
        layer(drawn(1, 3))
        with pytest.raises(InputError, match=r"items of shape \(2, 3\) after \(3,\)"):
            layer(drawn(1, 2, 3))
        with pytest.raises(InputError, match=r"layer 'fc': channel maxima.*may hold NaN"):
            layer(torch.full((1, 3), float("nan")))
        with pytest.raises(InputError, match="called without a tensor"):
            layer(input=None)


def test_a_batch_that_does_not_match_the_timesteps_is_refused():
    context = TimestepContext([1, 0])
    context.set_(torch.tensor([0, 1]))
    layer = nn.Linear(3, 2)
    with (
        InputCollector({"fc": layer}, max_bytes=900, generator=seeded(), context=context),
        pytest.raises(InputError, match="3 items are no multiple of the 2 timesteps"),
    ):
        layer(drawn(3, 3))
