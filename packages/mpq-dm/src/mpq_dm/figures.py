# SPDX-License-Identifier: Apache-2.0
"""What a quantization did, drawn from its report: outliers, bits, training, errors by step.

Layers are numbered in the order of the model, as in the table of the report.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tenfold_core.run.report import ACCENT, BASELINE, PALETTE, figure

__all__ = ["draw_bits", "draw_errors", "draw_kurtosis", "draw_steps", "draw_training"]

Row = Mapping[str, Any]

ROLE_COLORS = {
    "body": PALETTE["blue"], "input": PALETTE["orange"], "output": PALETTE["orange"],
    "time": PALETTE["green"], "skip": PALETTE["purple"],
}  # fmt: skip
MANY = 100
"""Layers that are still told apart by eye."""
Q10, MEDIAN, Q90, MOST = 1, 2, 3, 5
"""Places in a layer's quantiles of kurtosis."""
GAUSSIAN, UNIFORM = 3.0, 1.8
"""Kurtosis of Gaussian and of uniformly distributed weights."""


def draw_kurtosis(path: str | Path, layers: Sequence[Row], *, dark: bool = False) -> None:
    """Draw the kurtosis of every layer's rows, and how the layers' medians are distributed."""
    with figure(path, columns=2, aspect=0.42, dark=dark) as drawing:
        side, by_layer = drawing.subplots(
            1, 2, sharey=True, gridspec_kw={"width_ratios": [1, 4], "wspace": 0.02}
        )
        low, high = _range(layers)
        edges = np.geomspace(low, high, 25)
        for place, label, color in ((MEDIAN, "median", BASELINE), (Q90, "90 %", ACCENT)):
            values = np.array([layer["kurtosis"][place] for layer in layers], float)
            side.hist(
                values[np.isfinite(values)],
                edges,
                orientation="horizontal",
                histtype="step",
                color=color,
                label=label,
            )
        side.set(xlabel="layers", ylabel="kurtosis of a row", yscale="log", ylim=(low, high))
        side.legend(loc="upper right", title="of a layer's rows", fontsize=7, title_fontsize=7)
        _quantiles(by_layer, layers)
        for axes in (side, by_layer):
            axes.axhline(GAUSSIAN, color=BASELINE, linewidth=0.6, linestyle=":", zorder=0)
        ticks = [tick for tick in (2, 3, 5, 10, 20, 50, 100, 200, 500, 1000) if low <= tick <= high]
        side.set_yticks(ticks, [str(tick) for tick in ticks])
        side.minorticks_off()


def _quantiles(axes: Any, layers: Sequence[Row]) -> None:
    """Draw 10 to 90 % of each layer's rows, the median and the largest, coloured by role."""
    told = set()
    for number, layer in enumerate(layers, start=1):
        values, role = np.array(layer["kurtosis"], float), layer["role"]  # none becomes NaN
        color = ROLE_COLORS.get(role, BASELINE)
        axes.vlines(number, values[Q10], values[Q90], color=color, linewidth=_line_width(layers))
        named = "in/out" if role in ("input", "output") else role
        axes.plot(
            number, values[MEDIAN], ".", color=color, markersize=5 if len(layers) <= MANY else 3,
            label=named if named not in told else None,
        )  # fmt: skip
        axes.plot(number, values[MOST], "_", color=color, markersize=4)
        told.add(named)
    axes.set(xlabel="layer, in the order of the model", xlim=(0, len(layers) + 1))
    axes.set_title(
        "bars 10 to 90 % of the rows, dots the median, dashes the largest; dotted line: Gaussian",
        fontsize=7,
    )
    axes.legend(ncols=4, fontsize=7, loc="upper left")


def _range(layers: Sequence[Row]) -> tuple[float, float]:
    """Return limits with room for the legend above."""
    values = np.array([value for layer in layers for value in layer["kurtosis"]], float)
    values = values[np.isfinite(values) & (values > 0)]
    low, high = (values.min(), values.max()) if len(values) else (UNIFORM, GAUSSIAN)
    low, high = min(low, UNIFORM), max(high, GAUSSIAN)
    return float(low / 1.1), float(high * (high / low) ** 0.25 * 1.1)


def _line_width(layers: Sequence[Row]) -> float:
    return float(np.clip(90 / len(layers), 0.4, 2))


def draw_bits(path: str | Path, layers: Sequence[Row], *, dark: bool = False) -> None:
    """Draw which share of every layer's rows has how many bits."""
    widths = sorted({int(bits) for layer in layers for bits in layer["rows_by_bits"]})
    colors = _shades(len(widths))
    numbers = np.arange(1, len(layers) + 1)
    with figure(path, columns=2, aspect=0.32, dark=dark) as drawing:
        axes = drawing.add_subplot(
            xlabel="layer, in the order of the model", ylabel="rows [%]",
            xlim=(0.4, len(layers) + 0.6), ylim=(0, 100),
        )  # fmt: skip
        bottom = np.zeros(len(layers))
        width = 0.9 if len(layers) <= MANY else 1.0  # gaps of many bars make a pattern
        for bits, color in zip(widths, colors, strict=True):
            shares = np.array([_share(layer, bits) for layer in layers])
            axes.bar(numbers, shares, width, bottom, color=color, label=str(bits), linewidth=0)
            bottom += shares
        axes.legend(
            title="bits", loc="center left", bbox_to_anchor=(1, 0.5), reverse=True, fontsize=7
        )


def _share(layer: Row, bits: int) -> float:
    rows = {int(width): count for width, count in layer["rows_by_bits"].items()}
    return 100 * rows.get(bits, 0) / sum(rows.values())


def _shades(count: int) -> list[Any]:
    """Return colours from light for few bits to dark for many, in order for any colour vision."""
    from matplotlib import colormaps

    return [colormaps["cividis_r"](place) for place in np.linspace(0, 1, count)]


def draw_training(path: str | Path, losses: Sequence[Row], *, dark: bool = False) -> None:
    """Draw task loss, relation loss and the ratio of their gradients over fine-tuning."""
    panels = [("task", "task loss"), ("relation", "relation loss"),
              ("grad_ratio", "gradient, relation / task")]  # fmt: skip
    with figure(path, columns=2, aspect=0.36, dark=dark) as drawing:
        for axes, (name, label) in zip(drawing.subplots(1, 3), panels, strict=True):
            found = [(row["trajectory"] + 1, row[name]) for row in losses if row[name] is not None]
            axes.set(xlabel="trajectory", title=label)
            if not found:
                axes.text(0.5, 0.5, "none", ha="center", transform=axes.transAxes, color=BASELINE)
                axes.set(xticks=[], yticks=[])
                continue
            trajectories, values = (np.array(part, float) for part in zip(*found, strict=True))
            window = max(1, len(values) // 20)
            if name == "grad_ratio" or window == 1:
                axes.plot(trajectories, values, ".-", color=ACCENT, linewidth=1, markersize=3)
            else:
                axes.plot(trajectories, values, color=BASELINE, linewidth=0.5, alpha=0.6)
                mean = np.convolve(values, np.full(window, 1 / window), "valid")
                axes.plot(trajectories[window - 1 :], mean, color=ACCENT, linewidth=1.2)
                axes.set_title(f"{label}, mean of {window}")
            axes.set_ylim(0, 1.05 * values.max() if values.max() > 0 else 1)


def draw_steps(path: str | Path, steps: Sequence[Row], *, dark: bool = False) -> None:
    """Draw the error of the prediction at every sampling step, relative to the prediction."""
    timesteps = [step["timestep"] for step in steps]
    powers = np.array([step["power"] for step in steps], float)
    powers[powers <= 0] = np.nan  # a prediction of nothing has no relative error
    spread = {
        name: 100 * np.array([step["error"][name] for step in steps]) / powers
        for name in ("mean", "min", "max")
    }
    with figure(path, columns=1, aspect=0.7, dark=dark) as drawing:
        axes = drawing.add_subplot(
            xlabel="timestep, from noise to image", ylabel="squared error [% of the prediction]"
        )
        axes.fill_between(timesteps, spread["min"], spread["max"], color=ACCENT, alpha=0.25)
        axes.plot(timesteps, spread["mean"], ".-", color=ACCENT, linewidth=1.2)
        if len(timesteps) > 1 and timesteps[0] > timesteps[-1]:
            axes.invert_xaxis()
        if (spread["mean"] > 0).any():
            axes.set_yscale("log")
            _plain_log_ticks(axes)


def _plain_log_ticks(axes: Any) -> None:
    """Write 0.5, 1, 2 in place of powers of ten, also where an axis spans less than a decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))


def draw_errors(path: str | Path, layers: Sequence[Row], *, dark: bool = False) -> None:
    """Draw every mixed layer's output error relative to uniform bits, by way of allocation."""
    mixed = [
        (number, layer)
        for number, layer in enumerate(layers, start=1)
        if layer.get("error_uniform")
    ]
    ways = (("exact", BASELINE, "."), ("kurtosis", PALETTE["blue"], "x"), ("chosen", ACCENT, "o"))
    with figure(path, columns=2, aspect=0.32, dark=dark) as drawing:
        axes = drawing.add_subplot(
            xlabel="layer, in the order of the model", ylabel="error [% of uniform bits]",
            xlim=(0, len(layers) + 1),
        )  # fmt: skip
        axes.axhline(100, color=BASELINE, linewidth=0.6, linestyle=":")
        for name, color, marker in ways:
            values = [100 * layer[f"error_{name}"] / layer["error_uniform"] for _, layer in mixed]
            places = [number for number, _ in mixed]
            (drawn,) = axes.plot(places, values, marker, color=color, label=name, markersize=5)
            if marker == "o":
                drawn.set_markerfacecolor("none")
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=7)
