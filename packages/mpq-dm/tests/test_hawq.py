# SPDX-License-Identifier: Apache-2.0
"""HAWQ: traces against a dense Hessian, the programme against brute force."""

from itertools import product

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from mpq_dm.config import MPQDMConfig
from mpq_dm.hawq import (
    allocate_layerwise,
    hessian_traces,
    rounding_losses,
    sensitivities,
    whole_layers,
)
from mpq_dm.sampler import LatentSampler
from tenfold_core.errors import ConfigError, InputError
from torch import nn


class Denoiser(nn.Module):
    """Two convolutions with a bend in between, and a branch that ends nowhere."""

    def __init__(self, channels=1):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first = nn.Conv2d(channels, 3, 3, padding=1)
            self.second = nn.Conv2d(3, channels, 1)
            self.idle = nn.Linear(2, 2)

    def forward(self, sample, timestep, return_dict=True):
        found = self.second(torch.tanh(self.first(sample) + timestep.view(-1, 1, 1, 1) / 1000))
        return (found,)


def sampler(size=2, kind=LatentSampler, batch_size=4, **settings):
    scheduler = DDIMScheduler(num_train_timesteps=1000, clip_sample=False)
    return kind(
        scheduler=scheduler, latent_shape=(1, size, size), steps=2, batch_size=batch_size,
        **settings,
    )  # fmt: skip


def config(**settings):
    return MPQDMConfig(weight_bits=3, allocation="hawq", **settings)


def dense_trace(model, source, name):
    """The trace of the Hessian of mean 1/2 ||eps(W') - eps(W)||^2, entry by entry."""
    states = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: states.append((args[0], kwargs["timestep"])), with_kwargs=True
    )
    source.trajectory(model, 0)
    hook.remove()
    weight = dict(model.named_parameters())[name]
    targets = [model(x, t)[0].detach() for x, t in states]

    def loss(value):
        found = [torch.func.functional_call(model, {name: value}, (x, t))[0] for x, t in states]
        parts = [(f - y).square().sum() / 2 for f, y in zip(found, targets, strict=True)]
        return torch.stack(parts).sum() / sum(len(x) for x, _ in states)

    hessian = torch.autograd.functional.hessian(loss, weight.detach())
    return float(hessian.reshape(weight.numel(), weight.numel()).diagonal().sum())


class SameNoise(LatentSampler):
    """Every trajectory is the first one."""

    def noise(self, number):
        return super().noise(0)


def test_the_trace_is_exact_where_one_sample_has_one_output():
    # u is 1 or -1, and its sign does not change the square
    model, source = Denoiser(), sampler(size=1, batch_size=1)
    layers = {"first": model.first, "second": model.second}
    found = hessian_traces(model, source, layers, config(calib_samples=1))
    for name in layers:
        wanted = dense_trace(model, source, f"{name}.weight")
        assert found[name] == pytest.approx(wanted, rel=1e-4)


def test_the_mean_of_many_probes_is_the_trace_of_the_dense_hessian():
    model, source = Denoiser(), sampler(kind=SameNoise)
    layers = {"first": model.first, "second": model.second}
    found = hessian_traces(model, source, layers, config(calib_samples=600))
    for name in layers:
        wanted = dense_trace(model, source, f"{name}.weight")
        assert found[name] == pytest.approx(wanted, rel=0.1)


def test_traces_leave_the_model_as_it_was_and_repeat():
    model, source = Denoiser().requires_grad_(False), sampler()
    layers = {"first": model.first, "idle": model.idle}
    told = []
    with torch.no_grad():
        first = hessian_traces(
            model, source, layers, config(calib_samples=8), lambda *line: told.append(line)
        )
    assert first == hessian_traces(model, source, layers, config(calib_samples=8))
    assert first["idle"] == 0 < first["first"]
    assert told == [("Hessian trajectories", 1, 2), ("Hessian trajectories", 2, 2)]
    assert not any(part.requires_grad or part.grad is not None for part in model.parameters())
    assert not model._forward_hooks


def test_a_gradient_that_is_not_finite_is_an_error():
    model = Denoiser()
    model.first.weight.data[0] = torch.inf
    with pytest.raises(InputError, match="'second': the gradient is not finite"):
        hessian_traces(model, sampler(), {"second": model.second}, config(calib_samples=4))


def test_rounding_losses_are_counted_in_the_weight_itself():
    rows = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    plain = rounding_losses(rows, None, config())
    assert (np.diff(plain) < 0).all()
    assert len(plain) == 3
    twice = rounding_losses(2 * rows, torch.full((4,), 2.0), config())
    assert twice == pytest.approx(plain, rel=1e-3)
    grouped = rounding_losses(2 * rows, torch.full((8,), 2.0), config(), groups=2)
    assert grouped == pytest.approx(plain, rel=1e-3)


def test_sensitivity_of_a_layer_by_hand():
    # tr / n = 6 / 3 = 2, times losses 4, 2, 1
    found = sensitivities([6.0], [3], [np.array([4.0, 2.0, 1.0])])
    assert found.tolist() == [[8.0, 4.0, 2.0]]


def test_the_layer_that_matters_gets_the_bits_of_the_one_that_does_not():
    costs = np.array([[90.0, 30.0, 10.0], [9.0, 3.0, 1.0]])
    assert allocate_layerwise(costs, [10, 10], (1, 2, 3), 40).tolist() == [3, 1]
    # twice as large, the first is not worth it: 20 bits more than the second can give
    assert allocate_layerwise(costs, [20, 10], (1, 2, 3), 60).tolist() == [2, 2]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 12), st.integers(1, 5000)), min_size=1, max_size=5),
    st.integers(0, 2**31),
)
def test_the_programme_equals_brute_force(layers, seed):
    rng = np.random.default_rng(seed)
    costs = -np.sort(-rng.random((len(layers), 3)), axis=1)
    costs *= 10.0 ** np.array([[power] for power, _ in layers])
    sizes = [size for _, size in layers]
    budget = 2 * sum(sizes)
    found = allocate_layerwise(costs, sizes, (1, 2, 3), budget)
    best = min(
        sum(costs[place, width - 1] for place, width in enumerate(bits))
        for bits in product((1, 2, 3), repeat=len(sizes))
        if sum(n * width for n, width in zip(sizes, bits, strict=True)) <= budget
    )
    assert int((found * np.array(sizes)).sum()) <= budget
    reached = float(costs[np.arange(len(sizes)), found - 1].sum())
    assert reached <= best + 1e-9 * costs.max()


def test_a_model_of_three_hundred_layers_takes_a_moment():
    rng = np.random.default_rng(0)
    sizes = rng.integers(100_000, 15_000_000, 300).tolist()
    costs = rng.lognormal(0, 3, (300, 1)) * np.array([1.0, 0.25, 0.07])
    found = allocate_layerwise(costs, sizes, (1, 2, 3), 2 * sum(sizes))
    assert set(found.tolist()) == {1, 2, 3}
    used = int((found * np.array(sizes)).sum())
    assert 0.999 * 2 * sum(sizes) < used <= 2 * sum(sizes)


@pytest.mark.bad_input
def test_impossible_programmes_are_refused():
    with pytest.raises(ConfigError, match="budget is 10 bits, but 20 weights of 1 bits need more"):
        allocate_layerwise(np.ones((2, 3)), [10, 10], (1, 2, 3), 10)
    with pytest.raises(InputError, match="finite: False"):
        allocate_layerwise(np.full((1, 3), np.nan), [10], (1, 2, 3), 20)
    with pytest.raises(InputError, match=r"expected \(2, 3\) finite numbers"):
        allocate_layerwise(np.ones((1, 3)), [10, 10], (1, 2, 3), 40)


def test_all_rows_of_a_layer_get_the_same_bits_and_plus_raises_some():
    stream = torch.Generator().manual_seed(0)
    rows = [torch.randn(10, 8, generator=stream), torch.randn(10, 8, generator=stream)]
    parts = [(rows[0], None, 1, 100.0), (rows[1], None, 1, 1.0)]
    bits = whole_layers(parts, config())
    assert [part.unique().tolist() for part in bits] == [[4], [2]]
    raised = whole_layers(parts, config(plus=0.1))
    assert [int(part.sum()) for part in raised] == [41, 21]
