# SPDX-License-Identifier: Apache-2.0
"""OMQ, outlier-driven mixed quantization (MPQ-DM, section "Outlier-Driven Mixed Quantization").

Every output row of a layer gets its own number of bits. The paper ranks rows by the kurtosis of
their weights, moves whole groups of a tenth of the rows one bit up and as many one bit down, and
keeps the number of groups whose output error on calibration inputs is least. That error is a sum
over rows, so the best allocation can also be computed exactly; both are here.

Notation: n rows, N the average number of bits, e_c(b) the output error of row c at b bits.
"""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from tenfold_core.errors import ConfigError
from torch import Tensor

__all__ = [
    "allocate_exact",
    "allocate_kurtosis",
    "allocate_layers",
    "average_bits",
    "group_size",
    "kurtosis",
    "mixtures",
    "raise_rows",
]

OFFICIAL_RANGE = 1
"""Groups that the published program tries to move; the paper searches all."""


def kurtosis(weight: Float[Tensor, "rows columns"]) -> Float[Tensor, " rows"]:
    """Return mean((w - mean)^4) / std^4 of each row, population moments, 0 for constant rows.

    A Gaussian row has 3, a uniform one 1.8, rows with outliers far more.

    Example:
        >>> import torch
        >>> kurtosis(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
        tensor([1.6400])
    """
    centred = weight - weight.mean(dim=1, keepdim=True)
    variance = centred.square().mean(dim=1)
    fourth = centred.pow(4).mean(dim=1)
    return (fourth / variance.square().clamp_min(1e-30)).where(variance > 0, 0 * variance)


def group_size(rows: int) -> int:
    """Return how many rows move together: a tenth of them, at least one."""
    return max(1, rows // 10)


def mixtures(order: NDArray[np.integer], bits: int, *, search: str = "paper") -> NDArray[np.int64]:
    """Return the bits of every candidate: g groups up, g groups down, the rest as it is.

    Args:
        order: rows by falling kurtosis, (n,).
        bits: N, the average that every candidate keeps.
        search: paper (g = 0 .. (n // k) // 2) or official (g = 0, 1).

    Returns:
        One candidate a row, (candidates, n).

    Raises:
        ConfigError: rows would be left with no bit.
    """
    if bits < 2:
        raise ConfigError(
            f"weight_bits={bits}: mixing needs {bits - 1}, {bits} and {bits + 1} bits, expected an "
            "average of at least 2; use plus, or 2 bits"
        )
    rows, group = len(order), group_size(len(order))
    most = (rows // group) // 2
    most = min(most, OFFICIAL_RANGE) if search == "official" else most
    result = np.full((most + 1, rows), bits)
    for moved in range(1, most + 1):
        result[moved, order[: moved * group]] += 1
        result[moved, order[rows - moved * group :]] -= 1
    return result


def allocate_kurtosis(
    kappa: NDArray[np.floating],
    error: Callable[[NDArray[np.integer]], float],
    bits: int,
    *,
    search: str = "paper",
) -> NDArray[np.int64]:
    """Choose the number of moved groups by output error (the paper's search).

    Args:
        kappa: kurtosis of each row, (n,).
        error: output error of an allocation, given the bits of each row.
        bits: N.
        search: paper or official, see `mixtures`.

    Returns:
        Bits of each row, of average N.
    """
    order = np.argsort(-kappa, kind="stable")
    candidates = mixtures(order, bits, search=search)
    errors = [error(candidate) for candidate in candidates]
    return candidates[int(np.argmin(errors))]


def allocate_exact(
    errors: NDArray[np.floating], choices: Sequence[int], total: int
) -> NDArray[np.int64]:
    """Minimise the sum of e_c(b_c) under sum b_c = total, by dynamic programming over rows.

    Args:
        errors: e_c(b) by row and choice, (n, len(choices)).
        choices: allowed bits, ascending, one apart.
        total: bits to spend on all rows.

    Returns:
        Bits of each row, (n,).

    Raises:
        ConfigError: the total cannot be reached.
    """
    rows, kinds = errors.shape
    low = choices[0]
    spend = total - low * rows  # each row takes 0 .. kinds - 1 of these
    if list(choices) != list(range(low, low + kinds)) or not 0 <= spend <= (kinds - 1) * rows:
        raise ConfigError(
            f"allocation: {total} bits for {rows} rows of {list(choices)} bits, "
            f"expected {low * rows} to {(low + kinds - 1) * rows}"
        )
    best = np.full(spend + 1, np.inf)
    best[0] = 0.0
    taken = np.zeros((rows, spend + 1), np.int8)
    for row in range(rows):
        options = np.full((kinds, spend + 1), np.inf)
        for extra in range(min(kinds, spend + 1)):
            options[extra, extra:] = best[: spend + 1 - extra] + errors[row, extra]
        taken[row] = options.argmin(axis=0)
        best = options.min(axis=0)
    result = np.empty(rows, np.int64)
    for row in range(rows - 1, -1, -1):
        extra = int(taken[row, spend])
        result[row] = low + extra
        spend -= extra
    return result


def allocate_layers(
    errors: Sequence[NDArray[np.floating]],
    widths: Sequence[int],
    choices: Sequence[int],
    budget: int,
) -> list[NDArray[np.int64]]:
    """Spread one budget over the rows of all layers: a price per bit, found by bisection.

    At a price each row takes the bits of least error plus price x bits x width, so the result is
    optimal for what it spends; rows that the price leaves undecided are then raised, the best gain
    per bit first, as long as the budget lasts.

    Args:
        errors: e_c(b) of each layer, (n, len(choices)).
        widths: weights of a row, by layer.
        choices: allowed bits, ascending, one apart.
        budget: bits of all weights together.

    Returns:
        Bits of the rows of each layer; together at most the budget.

    Raises:
        ConfigError: not even the fewest bits fit.
    """
    sizes = [len(layer) for layer in errors]
    width = np.repeat(np.asarray(widths, np.int64), sizes)
    table = np.concatenate([np.asarray(layer, np.float64) for layer in errors])
    bits = np.asarray(choices, np.int64)
    if int(width.sum()) * bits[0] > budget:
        raise ConfigError(
            f"allocation: {budget} bits for {int(width.sum())} weights, expected at least "
            f"{int(width.sum()) * int(bits[0])}"
        )

    def at(price: float) -> NDArray[np.int64]:
        cost = table + price * width[:, None] * bits
        return cost.argmin(axis=1)  # of equal ones the fewest bits

    def spent(choice: NDArray[np.int64]) -> int:
        return int((bits[choice] * width).sum())

    low, high = 0.0, 1.0
    if spent(at(low)) <= budget:
        chosen = at(low)
    else:
        while spent(at(high)) > budget:
            high *= 4
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (low, middle) if spent(at(middle)) <= budget else (middle, high)
        chosen = _spend_rest(at(high), table, width, bits, budget)
    ends = np.cumsum(sizes)
    return [bits[chosen[end - size : end]] for end, size in zip(ends, sizes, strict=True)]


def _spend_rest(
    chosen: NDArray[np.int64],
    table: NDArray[np.float64],
    width: NDArray[np.int64],
    bits: NDArray[np.int64],
    budget: int,
) -> NDArray[np.int64]:
    """Raise rows by one bit while the budget lasts, the best gain per weight bit first."""
    chosen = chosen.copy()
    left = budget - int((bits[chosen] * width).sum())
    open_rows = np.flatnonzero(chosen + 1 < len(bits))
    gain = (table[open_rows, chosen[open_rows]] - table[open_rows, chosen[open_rows] + 1]) / width[
        open_rows
    ]
    for row, value in zip(
        open_rows[np.argsort(-gain, kind="stable")], np.sort(gain)[::-1], strict=True
    ):
        if value <= 0:
            break
        if width[row] <= left:
            chosen[row] += 1
            left -= int(width[row])
    return chosen


def raise_rows(
    kappa: NDArray[np.floating], bits: NDArray[np.integer], fraction: float
) -> NDArray[np.int64]:
    """Raise the rows of largest kurtosis by one bit and lower none (the variant "plus").

    Args:
        kappa: kurtosis of each row, (n,).
        bits: bits of each row, (n,).
        fraction: part of the rows.

    Raises:
        ConfigError: the fraction is not between 0 and 1.
    """
    if not 0 <= fraction <= 1:
        raise ConfigError(f"plus is {fraction}, expected a fraction between 0 and 1")
    count = round(fraction * len(kappa))
    raised = np.asarray(bits, np.int64).copy()
    raised[np.argsort(-kappa, kind="stable")[:count]] += 1
    return raised


def average_bits(bits: Sequence[NDArray[np.integer]], widths: Sequence[int]) -> float:
    """Return the bits per weight of all rows of all layers."""
    weights = sum(len(layer) * width for layer, width in zip(bits, widths, strict=True))
    total = sum(int(layer.sum()) * width for layer, width in zip(bits, widths, strict=True))
    return total / weights
