# SPDX-License-Identifier: Apache-2.0
"""Row errors of a layer, and the bits that an allocation gives its rows.

The output error of a layer on inputs X is a sum over rows, e_c = mean over inputs of
(x . w_c - x . w_hat_c)^2 = d^T H d with d = w_c - w_hat_c and H = X^T X / M. Without inputs H is
the identity: the weight error itself, which is the output error for white inputs.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from tenfold_core.quant.affine import fake_quant
from tenfold_core.quant.scales import Method, Zero, init_scale
from torch import Tensor

from mpq_dm.config import MixConfig
from mpq_dm.omq import allocate_exact, allocate_kurtosis, allocate_layers, kurtosis, raise_rows

__all__ = ["allocate", "row_errors", "table_error"]

ROWS_AT_ONCE = 4096


def row_errors(
    weight: Float[Tensor, "rows columns"],
    choices: Sequence[int],
    *,
    gram: Float[Tensor, "columns columns"] | None = None,
    zero: Zero = "free",
    method: Method = "mse",
) -> NDArray[np.float64]:
    """Return e_c(b) of every row and number of bits, (rows, choices).

    Args:
        weight: one row per output channel.
        choices: numbers of bits.
        gram: H of the inputs; by default the identity.
        zero: zero points of the codes, free or int.
        method: how scales are found, mse or minmax.
    """
    result = np.empty((weight.shape[0], len(choices)))
    for first in range(0, weight.shape[0], ROWS_AT_ONCE):
        part = weight[first : first + ROWS_AT_ONCE]
        for place, bits in enumerate(choices):
            scale, offset = init_scale(part, bits, method=method, zero=zero)
            lost = (part - fake_quant(part, scale, offset, 2**bits - 1)).double()
            error = lost.square().sum(1) if gram is None else ((lost @ gram) * lost).sum(1)
            result[first : first + ROWS_AT_ONCE, place] = error.numpy()
    return result


def table_error(errors: NDArray[np.floating], choices: Sequence[int]):
    """Return a function from the bits of all rows to the sum of their errors."""
    low = choices[0]
    rows = np.arange(len(errors))
    return lambda bits: float(errors[rows, np.asarray(bits) - low].sum())


def allocate(
    weights: Sequence[Float[Tensor, "rows columns"]],
    config: MixConfig,
    *,
    errors: Sequence[NDArray[np.floating]] | None = None,
) -> list[NDArray[np.int64]]:
    """Return the bits of every row of every layer of the body.

    Args:
        weights: weights by layer, one row per output channel.
        config: average bits, allocation and range.
        errors: e_c(b) by layer for `config.choices`; by default the weight errors.
    """
    bits, choices = config.weight_bits, config.choices
    if len(choices) == 1 or config.plus:
        result = [np.full(len(weight), bits) for weight in weights]
    else:
        tables = errors or [row_errors(weight, choices) for weight in weights]
        if config.allocation == "exact-layers":
            widths = [weight.shape[1] for weight in weights]
            budget = bits * sum(weight.numel() for weight in weights)
            result = allocate_layers(tables, widths, choices, budget)
        else:
            result = [
                _one_layer(weight, table, config)
                for weight, table in zip(weights, tables, strict=True)
            ]
    if not config.plus:
        return result
    return [
        raise_rows(kurtosis(weight).double().numpy(), layer, config.plus)
        for weight, layer in zip(weights, result, strict=True)
    ]


def _one_layer(weight: Tensor, table: NDArray[np.floating], config: MixConfig) -> NDArray[np.int64]:
    choices = config.choices
    if config.allocation == "exact":
        return allocate_exact(table, choices, config.weight_bits * len(table))
    kappa = kurtosis(weight.double()).numpy()
    error = table_error(table, choices)
    return allocate_kurtosis(kappa, error, config.weight_bits, search=config.omq_range)
