# SPDX-License-Identifier: Apache-2.0
import copy
import warnings

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from tenfold_core.errors import ConfigError, InputError, TenfoldWarning  # noqa: E402
from tenfold_core.quant.activations import (  # noqa: E402
    ActQuant,
    DynamicTokenQuant,
    StepwiseActQuant,
    TimestepContext,
)
from tenfold_core.quant.affine import dequantize  # noqa: E402
from torch import nn  # noqa: E402

GRID = (999, 749, 499, 249, 0)


class Denoiser(nn.Module):
    """Two quantizers around a layer, all at the step that the context tells."""

    def __init__(self, timesteps=GRID, bits=4):
        super().__init__()
        steps = torch.arange(len(timesteps)) + 1.0
        self.context = TimestepContext(timesteps)
        self.first = StepwiseActQuant(steps / 10, steps, bits=bits, context=self.context)
        self.fc = nn.Linear(3, 3)
        self.second = StepwiseActQuant(steps / 20, steps + 2, bits=bits, context=self.context)
        self.handle = self.context.attach(self)

    def forward(self, sample, timestep, scale=1.0):
        return self.second(self.fc(self.first(sample * scale)))


class Head(nn.Module):
    """One quantizer that the model's timestep drives."""

    def __init__(self):
        super().__init__()
        steps = torch.arange(len(GRID)) + 1.0
        self.context = TimestepContext(GRID)
        self.quantizer = StepwiseActQuant(steps / 10, steps, bits=4, context=self.context)
        self.context.attach(self)

    def forward(self, x, timestep):
        return self.quantizer(x)


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Denoiser()


# --- the timestep -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_", "expected"),
    [
        (749, [1]),
        (749.0, [1]),
        (torch.tensor(0), [4]),
        (torch.tensor(249, dtype=torch.int32), [3]),
        (torch.tensor([999, 0, 499]), [0, 4, 2]),
        (torch.tensor([750.5, 2.0]), [1, 4]),  # within 1 % of the least step, 249
    ],
    ids=str,
)
@pytest.mark.parametrize("by_name", [False, True])
def test_timesteps_of_every_form_find_their_step(model, given_, expected, by_name):
    x = torch.zeros(len(expected), 3)
    _ = model(x, timestep=given_) if by_name else model(x, given_)
    assert model.context.index.tolist() == expected
    assert model.context.interpolate(torch.arange(5.0)).tolist() == expected
    assert not model.context.off_grid


@pytest.mark.parametrize("timesteps", [(0.1, 0.25, 0.9), (0.9, 0.25, 0.1)])
def test_float_timesteps_in_either_direction(timesteps):
    context = TimestepContext(timesteps)
    for index, timestep in enumerate(timesteps):
        context.set_(torch.tensor(timestep, dtype=torch.float64))
        assert context.index.tolist() == [index]


def test_between_two_steps_the_scale_is_geometric_and_the_zero_rounded():
    context = TimestepContext([100, 0])
    quantizer = StepwiseActQuant(
        torch.tensor([1.0, 4.0]), torch.tensor([2.0, 7.0]), bits=3, context=context
    )
    with pytest.warns(TenfoldWarning, match="outside the 2 calibrated ones"):
        context.set_(torch.tensor([50, 75, 100, 0]))
    scale, zero = quantizer.params(torch.zeros(4, 2))
    torch.testing.assert_close(scale.flatten(), torch.tensor([2.0, 2**0.5, 1.0, 4.0]))
    assert zero.flatten().tolist() == [4.0, 3.0, 2.0, 7.0]  # 4.5 to even, 3.25


def test_beyond_the_grid_the_nearest_end_is_used():
    context = TimestepContext([900, 100])
    with pytest.warns(TenfoldWarning):
        context.set_(torch.tensor([999, 1]))
    assert context.index.tolist() == [0, 1]
    assert context.interpolate(torch.tensor([3.0, 5.0])).tolist() == [3.0, 5.0]


def test_it_warns_once_and_only_for_timesteps_that_were_not_calibrated(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.zeros(1, 3), 499)
    with pytest.warns(TenfoldWarning, match="outside the 5 calibrated ones"):
        model(torch.zeros(1, 3), 600)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.zeros(1, 3), 610)
    assert model.context.off_grid


def test_one_calibrated_step_serves_every_timestep():
    context = TimestepContext([500])
    context.set_(500)
    assert context.index.tolist() == [0]
    with pytest.warns(TenfoldWarning):
        context.set_(3)
    assert context.interpolate(torch.tensor([7.0])).tolist() == [7.0]


def test_timesteps_in_any_order_give_the_same_result_as_in_order(model):
    x = drawn(5, 3)
    in_order = [model(x, timestep) for timestep in GRID]
    for index in (3, 0, 4, 4, 1, 2):
        assert torch.equal(model(x, GRID[index]), in_order[index])
    assert not torch.equal(in_order[0], in_order[1])


def test_every_sample_of_a_batch_has_its_own_step(model):
    x = drawn(4, 3)
    timesteps = torch.tensor([0, 999, 499, 0])
    together = model(x, timesteps)
    for sample in range(4):
        alone = model(x[sample : sample + 1], timesteps[sample])
        assert torch.equal(together[sample : sample + 1], alone)


def test_frames_folded_into_the_batch_share_their_samples_step(model):
    model.context.set_(torch.tensor([999, 0]))
    scale, zero = model.first.params(torch.zeros(6, 2, 3))
    torch.testing.assert_close(scale.flatten(), torch.tensor([0.1] * 3 + [0.5] * 3))
    assert scale.shape == zero.shape == (6, 1, 1)


def test_a_removed_hook_no_longer_follows(model):
    model(torch.zeros(1, 3), 0)
    model.handle.remove()
    model(torch.zeros(1, 3), 999)
    assert model.context.index.tolist() == [4]


def test_a_copy_follows_its_own_calls(model):
    other = copy.deepcopy(model)
    assert other.context is other.first.context is other.second.context
    model(torch.zeros(1, 3), 0)
    with pytest.raises(InputError, match="not set yet"):
        other.first(torch.zeros(1, 3))
    other(torch.zeros(1, 3), 999)
    assert (model.context.index.item(), other.context.index.item()) == (4, 0)


def test_the_state_holds_only_what_was_calibrated_or_trained(model):
    names = {name for name in model.state_dict() if not name.startswith("fc.")}
    kinds = ("initial", "rho", "offset")
    assert names == {f"{layer}.{kind}" for layer in ("first", "second") for kind in kinds}


@pytest.mark.skipif(
    hasattr(ActQuant.forward, "__wrapped__"), reason="torch.compile cannot trace the type checks"
)
# torch.compile itself makes an instance of every autograd.Function it meets
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_it_compiles_as_one_graph_for_every_timestep():
    # the "eager" backend captures the graph and generates no code, so no compiler is needed
    model, x = Head(), drawn(3, 2)
    try:
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        first = compiled(x, torch.tensor([999, 0, 249]))
    except (ImportError, RuntimeError) as error:
        if isinstance(error, torch._dynamo.exc.Unsupported):
            raise
        pytest.skip(f"torch.compile does not run here: {str(error).splitlines()[0]}")
    with torch.compiler.set_stance("fail_on_recompile"):
        second = compiled(x, torch.tensor([0, 600, 499]))
    assert not model.context._warned
    with pytest.warns(TenfoldWarning, match="outside the 5 calibrated ones"):
        model.context.check()
    torch.testing.assert_close(first, model(x, torch.tensor([999, 0, 249])))
    torch.testing.assert_close(second, model(x, torch.tensor([0, 600, 499])))


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("timesteps", "match"),
    [
        ([], "at least one finite number"),
        ([1.0, float("nan")], "at least one finite number"),
        ([3, 3, 1], "strictly rising or falling"),
        ([1, 3, 2], "strictly rising or falling"),
    ],
)
def test_bad_timestep_grids_are_refused(timesteps, match):
    with pytest.raises(ConfigError, match=match):
        TimestepContext(timesteps)


def test_a_model_without_a_timestep_is_refused():
    context = TimestepContext([1, 0])
    with pytest.raises(ConfigError, match=r"Linear.forward: no parameter 'timestep' among"):
        context.attach(nn.Linear(2, 2))
    context.attach(layer := nn.Linear(2, 2), argument="input")
    with pytest.raises(InputError, match="input: not given"):
        layer()


# --- static per step --------------------------------------------------------------------------


def test_zero_points_stay_codes_and_zero_stays_zero(model):
    with torch.no_grad():
        model.first.offset.copy_(torch.tensor([-3.0, 99.0, 1.4, 1.6, 15.0]))
    for timestep, expected in zip(GRID, (0, 15, 1, 2, 15), strict=True):
        model.context.set_(timestep)
        x = torch.zeros(2, 3)
        codes, _, zero = model.first.codes(x)
        assert zero.unique().tolist() == [expected]
        assert codes.unique().tolist() == [expected]
        assert torch.equal(model.first(x), x)


def test_codes_read_back_are_the_output_bit_for_bit(model):
    x = drawn(3, 2, 4)
    model.context.set_(torch.tensor([749, 0, 249]))
    codes, scale, zero = model.first.codes(x)
    assert torch.equal(dequantize(codes, scale, zero), model.first(x))
    assert len(codes.unique()) <= 16


def test_only_the_steps_that_ran_get_a_gradient(model):
    model(drawn(2, 3), torch.tensor([999, 249])).sum().backward()
    assert (model.first.rho.grad != 0).tolist() == [True, False, False, True, False]


def test_gradients_have_their_closed_form():
    # d = 0.5, z = 1, 2 bits: x/d + z = 2.2 (code 2, inside) and 5 (code 3, outside)
    context = TimestepContext([0])
    context.set_(0)
    quantizer = StepwiseActQuant(torch.tensor([0.5]), torch.ones(1), bits=2, context=context)
    x = torch.tensor([[0.6, 2.0]], requires_grad=True)
    y = quantizer(x)
    assert y.tolist() == [[0.5, 1.0]]
    y.sum().backward()
    # d y / d d = (1 - 1.2) + (3 - 1) = 1.8, times d for the logarithm; d y / d z = 0 - d
    torch.testing.assert_close(x.grad, torch.tensor([[1.0, 0.0]]))
    torch.testing.assert_close(quantizer.rho.grad, torch.tensor([0.9]))
    torch.testing.assert_close(quantizer.offset.grad, torch.tensor([-0.5]))


@pytest.mark.bad_input
def test_bad_scales_are_refused():
    context = TimestepContext([1, 0])
    good = torch.ones(2)
    with pytest.raises(ConfigError, match="3 scales and 2 zero points for 2 calibrated steps"):
        StepwiseActQuant(torch.ones(3), good, bits=4, context=context)
    for bad in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match="positive, finite scales"):
            StepwiseActQuant(torch.tensor([1.0, bad]), good, bits=4, context=context)
    with pytest.raises(ConfigError, match="got 9, expected 1 to 8"):
        StepwiseActQuant(good, good, bits=9, context=context)
    context.set_(torch.tensor([0, 1]))
    with pytest.raises(InputError, match="no multiple of the 2 timesteps"):
        StepwiseActQuant(good, good, bits=4, context=context)(torch.zeros(3, 2))
    with pytest.raises(NotImplementedError):
        ActQuant(4).params(good)


# --- dynamic per token ------------------------------------------------------------------------


def test_a_token_by_hand():
    codes, scale, zero = DynamicTokenQuant(6).codes(torch.tensor([[-1.0, 0.0, 2.0]]))
    assert codes.tolist() == [[0, 21, 63]]
    torch.testing.assert_close(scale, torch.tensor([[3 / 63]]))
    assert zero.tolist() == [[21.0]]
    codes, scale, zero = DynamicTokenQuant(3, symmetric=True).codes(torch.tensor([[-6.0, 0, 3]]))
    assert codes.tolist() == [[1, 4, 6]]  # d = 6/3; 3/2 + 4 = 5.5 to even
    assert (scale.item(), zero.item()) == (2.0, 4.0)


@given(st.integers(2, 8), st.booleans(), st.integers(0, 2**20), st.sampled_from([1e-30, 1.0, 1e30]))
def test_every_token_is_within_half_a_step_and_alone(bits, symmetric, seed, size):
    quantizer = DynamicTokenQuant(bits, symmetric=symmetric)
    x = drawn(3, 4, 5, seed=seed) * size
    y, (scale, _) = quantizer(x), quantizer.params(x)
    # x / d, the sum with z and the product back each round a number of at most 2**bits
    slack = 3 * 2**bits * torch.finfo(torch.float32).eps
    assert ((y - x).abs() <= (0.5 + slack) * scale).all()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    shuffled = quantizer(x.reshape(12, 5)[order])
    assert torch.equal(shuffled, y.reshape(12, 5)[order])


@pytest.mark.parametrize("symmetric", [False, True])
def test_tokens_of_zeros_come_back_as_zeros_and_leave_the_others_alone(symmetric):
    quantizer = DynamicTokenQuant(4, symmetric=symmetric)
    x = torch.stack((torch.zeros(4), torch.full((4,), 0.75), torch.full((4,), -0.75)))
    torch.testing.assert_close(quantizer(x), x)
    assert quantizer(x)[0].tolist() == [0.0] * 4


def test_half_precision_keeps_its_type_and_gradients_pass():
    x = drawn(2, 3).to(torch.bfloat16).requires_grad_()
    y = DynamicTokenQuant(8)(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_one_bit_has_no_symmetric_range():
    with pytest.raises(ConfigError, match="at least 2"):
        DynamicTokenQuant(1, symmetric=True)
    assert DynamicTokenQuant(1)(torch.tensor([[0.0, 3.0]])).tolist() == [[0.0, 3.0]]


def test_the_step_of_a_call_is_known_where_all_samples_are_at_a_calibrated_one():
    context = TimestepContext([999.0, 500.0, 1.0])
    assert context.step is None
    context.set_(torch.tensor([500, 500]))
    assert context.step == 1
    context.set_(torch.tensor([500, 1]))
    assert context.step is None
    with pytest.warns(TenfoldWarning, match="outside the 3 calibrated"):
        context.set_(700)
    assert context.step is None
