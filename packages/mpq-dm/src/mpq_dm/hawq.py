# SPDX-License-Identifier: Apache-2.0
"""HAWQ: whole layers get N-1, N or N+1 bits, by the trace of the Hessian and an integer programme.

HAWQ-V2 (Dong et al., NeurIPS 2020, arXiv 1911.03852) ranks layers by
`Omega_l(b) = tr(H_l) / n_l * ||W_l - Q_b(W_l)||^2`, HAWQ-V3 (Yao et al., ICML 2021,
arXiv 2011.10680, Eq. 11) minimises the sum of these under a limit on the size of the model.

The loss is the one that data-free quantization has, `L(W') = mean 1/2 ||eps(W') - eps(W)||^2` over
the calls of the sampler. It is 0 at W, so its Hessian there is `J^T J` exactly, with J the
derivative of the guided prediction, and Hutchinson's estimator can be drawn on the side of the
outputs: `tr(H_l) = E_u ||J_l^T u||^2` for u of random signs. One backward pass is a probe for all
layers at once, without second derivatives, which the kernels of attention do not have.

Deviation: HAWQ takes the training loss and draws the probe in weight space, `E_v v^T H v`.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from tenfold_core.errors import ConfigError, InputError
from tenfold_core.quant.affine import fake_quant, storable
from tenfold_core.quant.scales import init_scale
from tenfold_core.quant.smoothing import smooth_weight
from tenfold_core.run.seeds import torch_generator
from torch import Tensor, nn

from mpq_dm.config import MPQDMConfig
from mpq_dm.omq import kurtosis, raise_rows
from mpq_dm.sampler import Sampler, first_tensor, following

__all__ = [
    "allocate_layerwise",
    "hessian_traces",
    "rounding_losses",
    "sensitivities",
    "whole_layers",
]

_COST_RANGE = 1e6  # of all costs together: HiGHS calls an absolute gap below 1e-6 closed


def hessian_traces(
    model: nn.Module,
    sampler: Sampler,
    layers: Mapping[str, nn.Module],
    config: MPQDMConfig,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, float]:
    """Estimate the trace of each layer's block of the Hessian, with one probe per call.

    Args:
        model: the full-precision denoiser.
        sampler: gives the calibration trajectories, its first ones.
        layers: modules of the model by name; the trace is that of their `weight`.
        config: `calib_samples` and `seed`.
        progress: told about trajectories.

    Raises:
        InputError: a gradient is not finite.
    """
    weights: list[Any] = [module.weight for module in layers.values()]
    sums = torch.zeros(len(weights), dtype=torch.float64)
    predictions = 0
    stream = torch_generator(config.seed, "hawq")
    count = math.ceil(config.calib_samples / sampler.batch_size)
    for number in range(count):
        for call in _calls(model, sampler, number):
            with _differentiable(weights):
                output = first_tensor(model(*call.args, **call.kwargs))
                guided = sampler.guide(output, call.args[0])
                signs = torch.randint(0, 2, guided.shape, generator=stream) * 2 - 1
                found = torch.autograd.grad(
                    (guided * signs.to(guided)).sum(), weights, allow_unused=True
                )
            predictions += len(guided)
            for place, part in enumerate(found):
                if part is not None:
                    sums[place] += part.double().square().sum().cpu()
        if progress:
            progress("Hessian trajectories", number + 1, count)
    traces = dict(zip(layers, (sums / max(1, predictions)).tolist(), strict=True))
    for name, trace in traces.items():
        if not math.isfinite(trace):
            raise InputError(f"layer {name!r}: the gradient is not finite, expected finite weights")
    return traces


def _calls(model: nn.Module, sampler: Sampler, number: int) -> Iterator[inspect.BoundArguments]:
    """Yield the calls of one trajectory, made by then: the model may be called in between."""
    calls: list[inspect.BoundArguments] = []
    with following(model, lambda call, _: calls.append(call)):
        sampler.trajectory(model, number)
    yield from calls


@contextmanager
def _differentiable(weights: Sequence[nn.Parameter]) -> Iterator[None]:
    before = [weight.requires_grad for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for weight, old in zip(weights, before, strict=True):
            weight.requires_grad_(old)


def whole_layers(
    parts: Sequence[tuple[Tensor, Tensor | None, int, float]], config: MPQDMConfig
) -> list[Int[Tensor, " out"]]:
    """Return the bits of every row of the body's layers, equal within a layer.

    Args:
        parts: pre-scaled weight, divisors of its input channels, groups and trace of each layer.
        config: average bits, `plus` (rows raised beyond it) and how scales are found.
    """
    sizes = [rows.numel() for rows, _, _, _ in parts]
    losses = [rounding_losses(rows, smooth, config, groups=n) for rows, smooth, n, _ in parts]
    costs = sensitivities([trace for *_, trace in parts], sizes, losses)
    bits = allocate_layerwise(costs, sizes, config.choices, config.weight_bits * sum(sizes))
    found = []
    for width, (rows, *_) in zip(bits, parts, strict=True):
        layer = np.full(len(rows), width)
        if config.plus:
            layer = raise_rows(kurtosis(rows.flatten(1).double().cpu()).numpy(), layer, config.plus)
        found.append(torch.from_numpy(layer))
    return found


def rounding_losses(
    rows: Float[Tensor, "out in *kernel"],
    smooth: Float[Tensor, " channels"] | None,
    config: MPQDMConfig,
    *,
    groups: int = 1,
) -> NDArray[np.float64]:
    """Return `||W - Q_b(W)||^2` of one layer for each of `config.choices`.

    Args:
        rows: pre-scaled weight, what is rounded.
        smooth: divisors of the input channels; what is lost is counted in W, not in W s.
        config: numbers of bits and how scales are found.
        groups: groups of a convolution.
    """
    flat = rows.flatten(1)
    found = []
    for bits in config.choices:
        method: Any = config.scale_method
        scale, zero = storable(*init_scale(flat, bits, method=method))
        lost = rows - fake_quant(flat, scale, zero, 2**bits - 1).view_as(rows)
        if smooth is not None:
            lost = smooth_weight(lost, 1 / smooth, groups=groups)
        found.append(float(lost.double().square().sum()))
    return np.array(found)


def sensitivities(
    traces: Sequence[float], sizes: Sequence[int], losses: Sequence[NDArray[np.float64]]
) -> NDArray[np.float64]:
    """Return `Omega_l(b) = tr(H_l) / n_l * ||W_l - Q_b(W_l)||^2`, `(layers, choices)`."""
    mean_trace = np.asarray(traces, np.float64) / np.asarray(sizes, np.float64)
    return mean_trace[:, None] * np.stack(list(losses))


def allocate_layerwise(
    costs: NDArray[np.floating], sizes: Sequence[int], choices: Sequence[int], budget: int
) -> NDArray[np.int64]:
    """Minimise `sum_l costs[l, b_l]` under `sum_l n_l b_l <= budget`: HAWQ-V3's programme.

    One variable of 0 or 1 for each layer and number of bits, solved to optimality by HiGHS.

    Args:
        costs: `(layers, choices)`.
        sizes: n_l, the weights of each layer.
        choices: numbers of bits.
        budget: bits of all weights together.

    Returns:
        Bits of each layer.

    Raises:
        InputError: a cost is not finite.
        ConfigError: the least number of bits exceeds the budget.
    """
    costs, widths = np.asarray(costs, np.float64), np.asarray(choices)
    if costs.shape != (len(sizes), len(choices)) or not np.isfinite(costs).all():
        raise InputError(
            f"costs: shape {costs.shape}, finite: {bool(np.isfinite(costs).all())}; expected "
            f"{(len(sizes), len(choices))} finite numbers"
        )
    if min(choices) * sum(sizes) > budget:
        raise ConfigError(
            f"budget is {budget} bits, but {sum(sizes)} weights of {min(choices)} bits need more"
        )
    unit = math.gcd(*sizes)
    limit = budget // unit
    counts = np.asarray(sizes, np.int64) // unit
    while True:
        bits = widths[_solve(costs, np.outer(counts, widths), limit)]
        # the solver meets the budget up to its tolerance; the result does so exactly
        excess = int((bits * np.asarray(sizes, np.int64)).sum()) - budget
        if excess <= 0:
            return bits.astype(np.int64)
        limit -= -(-excess // unit)


def _solve(costs: NDArray[np.float64], use: NDArray[np.int64], limit: int) -> NDArray[np.intp]:
    """Return the choice of each layer of least cost whose `use` together is at most `limit`."""
    layers, each = costs.shape
    spread = costs - costs.min(axis=1, keepdims=True)
    largest = spread.max() or 1.0
    one_each = np.kron(np.eye(layers), np.ones(each))
    found = milp(
        c=(spread / largest).reshape(-1) * _COST_RANGE,
        integrality=np.ones(layers * each),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(use.reshape(1, -1).astype(np.float64), -np.inf, limit),
        ],
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        raise InputError(f"costs: the integer programme has no solution ({found.message})")
    return found.x.reshape(layers, each).argmax(axis=1)
