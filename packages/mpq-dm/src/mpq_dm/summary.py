# SPDX-License-Identifier: Apache-2.0
"""What a quantization did, layer by layer: bits, outliers, errors, losses, sizes."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tenfold_core.run.atomic import atomic_path
from tenfold_core.run.rows import plain
from torch import nn

from mpq_dm.allocation import table_error
from mpq_dm.calibration import Calibration
from mpq_dm.config import MPQDMConfig
from mpq_dm.finetune import TrajectoryLoss
from mpq_dm.omq import allocate_exact, allocate_kurtosis, kurtosis
from mpq_dm.operators import to_rows
from mpq_dm.plan import LayerPlan

__all__ = ["QuantReport", "describe"]


@dataclass(frozen=True, kw_only=True)
class QuantReport:
    """The evidence beside a packed model; `to_json` writes it.

    Attributes:
        config: the settings.
        timesteps: what the sampler called the model with.
        layers: one row a layer: name, role, shape, bits of its rows, kurtosis, output errors on
            the calibration inputs of uniform bits, the paper's search and the exact allocation.
        left: layers that were left as they are, with the reason.
        dead_channels: input channels without any activation or weight, by layer.
        losses: task and relation loss of every trajectory of fine-tuning.
        sizes: bytes by kind and bits per weight, everything included.
        seconds: wall time.
    """

    config: dict[str, Any]
    timesteps: list[float]
    layers: list[dict[str, Any]]
    left: dict[str, str]
    dead_channels: dict[str, int]
    losses: list[dict[str, Any]]
    sizes: dict[str, Any]
    seconds: float
    notes: list[str] = field(default_factory=list)

    def to_json(self, path: str | Path) -> None:
        """Write the report as JSON, atomically."""
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(plain(asdict(self)), indent=1) + "\n")

    def metrics(self) -> dict[str, tuple[float | None, str]]:
        """Return the numbers for the record of the run, with their units."""
        found: dict[str, tuple[float | None, str]] = {
            "seconds": (self.seconds, "s"),
            "bits_per_weight": (self.sizes["bits_per_weight"], "bit"),
            "bytes": (self.sizes["accounted"], "B"),
        }
        mixed = [row for row in self.layers if row.get("error_uniform")]
        for kind in ("kurtosis", "exact", "chosen"):
            ratios = [row[f"error_{kind}"] / row["error_uniform"] for row in mixed]
            if ratios:  # output error on calibration inputs, mean over layers
                found[f"layer_error_{kind}_over_uniform"] = (float(np.mean(ratios)), "1")
        if self.losses:
            found["task_loss_first"] = (self.losses[0]["task"], "1")
            found["task_loss_last"] = (self.losses[-1]["task"], "1")
        return found


def describe(
    model: nn.Module,
    packed: nn.Module,
    found: Calibration,
    config: MPQDMConfig,
    timesteps: Sequence[float],
    losses: Sequence[TrajectoryLoss],
    *,
    seconds: float,
) -> QuantReport:
    """Sum up a quantization: the original model, its packed copy and what calibration found."""
    from mpq_dm.sizes import account

    rows = [
        _layer(name, model.get_submodule(name), plan, found.errors.get(name), config)
        for name, plan in found.plans.items()
    ]
    return QuantReport(
        config=plain(asdict(config)),
        timesteps=[float(value) for value in timesteps],
        layers=rows,
        left=found.left,
        dead_channels=found.dead_channels,
        losses=[asdict(loss) for loss in losses],
        sizes=plain(account(packed)),
        seconds=seconds,
    )


def _layer(
    name: str,
    module: nn.Module,
    plan: LayerPlan,
    errors: NDArray[np.float64] | None,
    config: MPQDMConfig,
) -> dict[str, Any]:
    weight: Any = module.weight
    rows = to_rows(module, weight.detach()).flatten(1).double().cpu()
    if plan.smooth is not None:
        from tenfold_core.quant.smoothing import smooth_weight

        shaped = to_rows(module, weight.detach()).double().cpu()
        groups: Any = getattr(module, "groups", 1)
        rows = smooth_weight(shaped, plan.smooth.double().cpu(), groups=groups).flatten(1)
    kappa = kurtosis(rows).numpy()
    bits = plan.bits.cpu().numpy()
    widths, counts = np.unique(bits, return_counts=True)
    found: dict[str, Any] = {
        "layer": name,
        "role": plan.role,
        "shape": list(weight.shape),
        "act_bits": plan.act_bits,
        "mean_bits": float(bits.mean()),
        "rows_by_bits": {
            int(width): int(count) for width, count in zip(widths, counts, strict=True)
        },
        "kurtosis": [float(value) for value in np.quantile(kappa, [0, 0.1, 0.5, 0.9, 0.99, 1])],
    }
    if errors is None:
        return found
    average = config.weight_bits
    choices = (average - 1, average, average + 1)  # errors are measured for mixtures only
    error = table_error(errors, choices)
    paper = allocate_kurtosis(kappa, error, average, search=config.omq_range)
    exact = allocate_exact(errors, choices, average * len(errors))
    inside = np.clip(bits, choices[0], choices[-1])
    return found | {
        "error_uniform": error(np.full(len(errors), average)),
        "error_kurtosis": error(paper),
        "error_exact": error(exact),
        "error_chosen": error(inside),
    }
