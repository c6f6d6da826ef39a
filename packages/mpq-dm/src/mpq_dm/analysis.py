# SPDX-License-Identifier: Apache-2.0
"""What mixed precision can buy, before anything is quantized: outliers and gains by layer."""

from dataclasses import asdict
from typing import Any

import numpy as np
import polars as pl
from torch import nn

from mpq_dm.allocation import row_errors, table_error
from mpq_dm.calibration import LayerDraft, Progress, measure
from mpq_dm.config import MixConfig, MPQDMConfig
from mpq_dm.omq import allocate_exact, allocate_kurtosis, kurtosis
from mpq_dm.roles import Layer, find_layers, weight_rows
from mpq_dm.sampler import Sampler, called_timesteps

__all__ = ["analyze", "totals"]


def analyze(
    model: nn.Module,
    config: MixConfig | None = None,
    sampler: Sampler | None = None,
    progress: Progress | None = None,
) -> pl.DataFrame:
    """Describe every layer: role, size, kurtosis of its rows, error of each allocation.

    Without a sampler, errors are those of white inputs, that is of the weights alone, in multiples
    of the energy of the layer's weights. With one, they are output errors on calibration inputs,
    with rounded inputs and pre-scaling, in multiples of the outputs' energy. Layers outside the
    body have none.

    Args:
        model: a diffusers model, or any other.
        config: average bits and range of the search; `allocation` does not matter.
        sampler: samples with the model; `config` is then an `MPQDMConfig`.
        progress: told about trajectories and layers.

    Returns:
        One row per layer: `layer`, `role`, `rows`, `columns`, `kurtosis_q10`, `kurtosis_median`,
        `kurtosis_q90`, `kurtosis_max`, `uniform`, `kurtosis`, `exact` (errors), `moved` (rows that
        the paper's search moves up, and as many down).
    """
    config = config or MPQDMConfig()
    drafts: dict[str, LayerDraft] = {}
    if sampler is not None:
        settings = config if isinstance(config, MPQDMConfig) else MPQDMConfig(**asdict(config))
        timesteps = called_timesteps(model, sampler)
        drafts = measure(model, sampler, timesteps, settings, progress).drafts
    layers = [layer for layer in find_layers(model)[0] if layer.tied_to is None]
    rows = [_describe(layer, config, drafts.get(layer.name)) for layer in layers]
    return pl.DataFrame(rows, infer_schema_length=None)


def _describe(layer: Layer, config: MixConfig, draft: LayerDraft | None) -> dict[str, Any]:
    weight = weight_rows(layer.module).detach().float()
    if draft is not None:
        weight = draft.rows.flatten(1).cpu()
    kappa = kurtosis(weight.double()).numpy()
    q10, median, q90 = np.quantile(kappa, [0.1, 0.5, 0.9])
    row: dict[str, Any] = {
        "layer": layer.name,
        "role": layer.role,
        "rows": layer.rows,
        "columns": layer.columns,
        "kurtosis_q10": float(q10),
        "kurtosis_median": float(median),
        "kurtosis_q90": float(q90),
        "kurtosis_max": float(kappa.max()),
        "uniform": None,
        "kurtosis": None,
        "exact": None,
        "moved": None,
    }
    choices = MixConfig(weight_bits=config.weight_bits, omq_range=config.omq_range).choices
    if layer.role != "body" or len(choices) == 1:
        return row
    bits = config.weight_bits
    measured = None if draft is None else draft.errors
    table = row_errors(weight, choices) if measured is None else measured
    error = table_error(table, choices)
    paper = allocate_kurtosis(kappa, error, bits, search=config.omq_range)
    exact = allocate_exact(table, choices, bits * len(table))
    if draft is not None and measured is not None:
        energy = draft.energy * len(table)
    else:
        energy = max(float(weight.double().square().sum()), 1e-300)
    row["uniform"] = error(np.full(len(table), bits)) / energy
    row["kurtosis"] = error(paper) / energy
    row["exact"] = error(exact) / energy
    row["moved"] = int((paper > bits).sum())
    return row


def totals(table: pl.DataFrame) -> dict[str, float | int | None]:
    """Sum up a table of `analyze`: weights by role, and what the allocations gain together."""
    body = table.filter(pl.col("uniform").is_not_null())
    energy = body["rows"] * body["columns"]
    result: dict[str, float | int | None] = {
        "layers": table.height,
        "weights": int((table["rows"] * table["columns"]).sum()),
        "body_weights": int(energy.sum()),
        "layers_that_mix": int((body["moved"] > 0).sum()),
    }
    for name in ("kurtosis", "exact"):
        before = float((body["uniform"] * energy).sum())
        after = float((body[name] * energy).sum())
        result[f"gain_{name}"] = 1 - after / before if before else None
    return result
