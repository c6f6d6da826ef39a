# SPDX-License-Identifier: Apache-2.0
"""Layers with planted outliers: where mixed precision helps by construction, and where it must not.

A layer of 100 Gaussian rows of 512 weights gets some rows from Student's t with three degrees of
freedom, whose tails are heavy and whose variance is three times as large.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from tenfold_core.quant.scales import Zero
from tenfold_core.run.seeds import generator
from torch import Tensor

from mpq_dm.allocation import row_errors, table_error
from mpq_dm.omq import allocate_exact, allocate_kurtosis, kurtosis

__all__ = ["CASES", "compare", "planted_layer"]

ROWS, COLUMNS, SEEDS = 100, 512, 5
CASES: dict[str, dict[str, Any]] = {
    "30 heavy rows": {"heavy": 30},
    "30 heavy rows, integer zero": {"heavy": 30, "zero": "int"},
    "30 heavy rows of equal variance": {"heavy": 30, "equal": True},
    "10 heavy rows": {"heavy": 10},
    "Gaussian rows only": {"heavy": 0},
}
"""Planted rows, whether they are scaled back to variance 1, and the zero point of the codes."""


def planted_layer(heavy: int, seed: int, *, equal: bool = False) -> Float[Tensor, "rows columns"]:
    """Return a layer whose first `heavy` rows are Student-t(3), the rest Gaussian.

    Args:
        heavy: rows to plant.
        seed: seed of the weights.
        equal: scale every row to variance 1.
    """
    rng = generator(seed, "planted")
    weight = rng.standard_normal((ROWS, COLUMNS))
    weight[:heavy] = rng.standard_t(3, (heavy, COLUMNS))
    if equal:
        weight /= weight.std(axis=1, keepdims=True)
    return torch.from_numpy(weight)


def compare(seed: int = 0, seeds: int = SEEDS) -> Iterator[dict[str, Any]]:
    """Yield one row per case and number of bits: the error of each allocation, mean over seeds.

    Errors are sums over rows of the mean squared error of a weight.
    """
    for case, settings in CASES.items():
        options = dict(settings)
        zero = options.pop("zero", "free")
        layers = [planted_layer(seed=seed + number, **options) for number in range(seeds)]
        for bits in (2, 3, 4):
            choices = (bits - 1, bits, bits + 1)
            found = np.array([_errors(layer, bits, choices, zero) for layer in layers])
            uniform, paper, exact, moved = found.mean(axis=0)
            yield {
                "case": case, "bits": bits, "uniform": float(uniform), "kurtosis": float(paper),
                "exact": float(exact), "gain_kurtosis": float(1 - paper / uniform),
                "gain_exact": float(1 - exact / uniform), "moved": float(moved),
            }  # fmt: skip


def _errors(
    weight: Tensor, bits: int, choices: tuple[int, ...], zero: Zero
) -> tuple[float, float, float, int]:
    table = row_errors(weight, choices, zero=zero) / weight.shape[1]
    error = table_error(table, choices)
    paper = allocate_kurtosis(kurtosis(weight).numpy(), error, bits)
    exact = allocate_exact(table, choices, bits * len(table))
    return error(np.full(len(table), bits)), error(paper), error(exact), int((paper > bits).sum())
