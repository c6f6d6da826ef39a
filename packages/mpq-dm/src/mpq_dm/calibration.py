# SPDX-License-Identifier: Apache-2.0
"""From the sampler's own trajectories to the plan of every layer.

The model is data-free: its inputs are what the full-precision model meets while it samples. They
give the pre-scaling of each input channel, the scale of the inputs at each sampling step, and the
output error of every row at every number of bits, by which OMQ spends the bits.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from tenfold_core.errors import ConfigError, InputError
from tenfold_core.quant.activations import TimestepContext
from tenfold_core.quant.affine import check_finite, fake_quant, storable
from tenfold_core.quant.calibration import InputCollector
from tenfold_core.quant.scales import init_scale
from tenfold_core.quant.smoothing import smooth_scale, smooth_weight, weight_channel_max
from tenfold_core.run.seeds import torch_generator
from torch import Tensor, nn

from mpq_dm.adaround import skip_splits, split_smooth
from mpq_dm.allocation import allocate
from mpq_dm.config import MPQDMConfig
from mpq_dm.operators import apply_weight, channel_axis, to_rows
from mpq_dm.plan import LayerPlan
from mpq_dm.roles import Layer, find_layers
from mpq_dm.sampler import Sampler

__all__ = [
    "Calibration",
    "LayerDraft",
    "Measurement",
    "calibrate",
    "check_model",
    "measure",
    "output_errors",
    "plan_layers",
]

SAMPLE_ELEMENTS = 1 << 13  # of a layer's inputs at one step, for the search of their scale
ERROR_ELEMENTS = 1 << 22  # of a layer's inputs and outputs, for the errors of its rows
_EDGE_ROLES = ("input", "time", "output")

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What calibration found.

    Attributes:
        plans: the plan of every layer to quantize, by name.
        halves: layers to keep in half precision (`skip_bits=16`).
        left: layers and modules left as they are, each with the reason.
        errors: by layer of the body, the output error of each row and number of bits.
        dead_channels: input channels without any activation or weight, by layer.
    """

    plans: dict[str, LayerPlan]
    halves: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    errors: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    dead_channels: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What the calibration trajectories say; bits are chosen from it by `plan_layers`.

    Attributes:
        layers: the layers to quantize, by name.
        drafts: what was measured of each.
        halves: layers to keep in half precision.
        left: layers and modules left as they are.
        traces: by layer, the sensitivity that HAWQ needs; empty for the other allocations.
    """

    layers: dict[str, Layer]
    drafts: dict[str, "LayerDraft"]
    halves: list[str]
    left: dict[str, str]
    traces: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LayerDraft:
    """A layer between calibration and allocation."""

    rows: Tensor
    """Pre-scaled weight."""
    smooth: Tensor | None
    act_bits: int
    act_scale: Tensor
    act_zero: Tensor
    errors: NDArray[np.float64] | None
    """Output error of each row and number of bits."""
    energy: float
    """Mean square of an exact output."""
    dead: int
    """Input channels without any activation or weight."""


def calibrate(
    model: nn.Module,
    sampler: Sampler,
    timesteps: Sequence[float],
    config: MPQDMConfig,
    progress: Progress | None = None,
) -> Calibration:
    """Run the sampler with the full-precision model and plan every layer.

    Args:
        model: the denoiser.
        sampler: gives the calibration trajectories, its first ones.
        timesteps: what the sampler calls the model with, in order.
        config: bits, scales, allocation.
        progress: told about trajectories and layers.

    Raises:
        InputError: a weight or an input holds NaN or infinities, or the model cannot be quantized.
    """
    return plan_layers(measure(model, sampler, timesteps, config, progress), config)


@torch.no_grad()
def measure(
    model: nn.Module,
    sampler: Sampler,
    timesteps: Sequence[float],
    config: MPQDMConfig,
    progress: Progress | None = None,
) -> Measurement:
    """Run the calibration trajectories; arguments as `calibrate`.

    The result serves every allocation of the same bits, scales, pre-scaling and rounding.
    """
    check_model(model)
    layers, halves, left = _to_quantize(model, sampler, config)
    sizes = {name: size for name, (_, size) in layers.items()}
    found = {name: layer for name, (layer, _) in layers.items()}
    tell = progress or (lambda *_: None)
    drafts: dict[str, LayerDraft] = {}
    splits = skip_splits(model) if config.rounding == "adaround" else {}
    for group in _passes(sizes, list(found), len(timesteps), config):
        parts = {name: found[name].module for name in group}
        # twice the samples: guidance may double the batch
        wanted = 2 * config.calib_samples * len(timesteps) * sum(sizes[name] for name in group)
        least = len(group) * len(timesteps) * max(sizes[name] for name in group)
        most_bytes = min(config.calib_bytes, max(wanted, least))
        collector = _collect(model, sampler, timesteps, parts, most_bytes, config, tell)
        for name in group:
            drafts[name] = _draft(found[name], collector, config, len(timesteps), splits.get(name))
            collector.drop(name)
            tell("layers", len(drafts), len(found))
    traces = _traces(model, sampler, found, config, tell)
    return Measurement(layers=found, drafts=drafts, halves=halves, left=left, traces=traces)


@torch.no_grad()
def plan_layers(found: Measurement, config: MPQDMConfig) -> Calibration:
    """Spend the bits on the rows and find the weights' scales.

    Args:
        found: of a config with the same bits, scales and pre-scaling; errors are known only if its
            allocation needed them.
        config: the allocation.
    """
    bits = _allocate(found, config)
    result = Calibration(plans={}, halves=found.halves, left=found.left)
    for name, draft in found.drafts.items():
        role = found.layers[name].role
        flat = draft.rows.flatten(1)
        widths = bits.get(name)
        if widths is None:
            widths = torch.full((len(flat),), _weight_bits(role, config))
        method: Any = config.scale_method
        scale, zero = storable(
            *init_scale(flat, widths.to(flat.device), method=method, name=f"{name}.weight")
        )
        result.plans[name] = LayerPlan(
            role=role, bits=widths, scale=scale, zero=zero, smooth=draft.smooth,
            act_bits=draft.act_bits, act_scale=draft.act_scale, act_zero=draft.act_zero,
        )  # fmt: skip
        if draft.errors is not None:
            result.errors[name] = draft.errors
        if draft.dead:
            result.dead_channels[name] = draft.dead
    return result


def check_model(model: nn.Module) -> None:
    """Refuse what cannot be quantized as it is.

    Raises:
        InputError: the model is quantized already, carries LoRA layers, or has weights that are
            not finite.
    """
    kind = type(model).__name__
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        method = getattr(getattr(model, "quantization_method", None), "value", "unknown method")
        raise InputError(f"{kind}: quantized already ({method}), expected the original weights")
    if getattr(model, "peft_config", None) or any("lora_A" in n for n, _ in model.named_modules()):
        raise InputError(f"{kind}: LoRA layers are loaded; unload LoRA first, or fuse it")
    for name, weight in model.named_parameters():
        if weight.is_floating_point():
            check_finite(weight.detach(), f"{kind}: {name}")


def output_errors(
    module: nn.Module,
    inputs: Float[Tensor, "items ..."],
    rounded_inputs: Float[Tensor, "items ..."],
    rows: Float[Tensor, "out in *kernel"],
    choices: Sequence[int],
    method: Any = "mse",
) -> NDArray[np.float64]:
    """Return the mean squared output error of each row at each number of bits, `(out, choices)`.

    Args:
        module: the layer, for its stride, padding and groups.
        inputs: pre-scaled inputs, exact.
        rounded_inputs: the same inputs, rounded; or `inputs` again.
        rows: pre-scaled weight.
        choices: numbers of bits.
        method: how scales are found.
    """
    flat = rows.flatten(1)
    exact = apply_weight(module, inputs, rows)
    axis = channel_axis(module) % exact.dim()
    others = [place for place in range(exact.dim()) if place != axis]
    result = np.empty((len(rows), len(choices)))
    for place, bits in enumerate(choices):
        scale, zero = storable(*init_scale(flat, bits, method=method))
        rounded = fake_quant(flat, scale, zero, 2**bits - 1).view_as(rows)
        lost = apply_weight(module, rounded_inputs, rounded) - exact
        result[:, place] = lost.double().square().mean(others).cpu().numpy()
    return result


def _to_quantize(
    model: nn.Module, sampler: Sampler, config: MPQDMConfig
) -> tuple[dict[str, tuple[Layer, int]], list[str], dict[str, str]]:
    """Return the layers with the bytes of their inputs, those kept in halves, and the rest."""
    found, unknown = find_layers(model)
    left = {line.split(" ")[0]: f"unknown class {line.split(' ')[1]}" for line in unknown}
    tied = {layer.tied_to for layer in found if layer.tied_to}
    layers: dict[str, Layer] = {}
    halves: list[str] = []
    for layer in found:
        bits = _weight_bits(layer.role, config)
        if layer.tied_to or layer.name in tied:
            left[layer.name] = f"tied to {layer.tied_to}" if layer.tied_to else "tied to others"
        elif bits == 16:
            halves.append(layer.name)
        elif bits > 8:
            left[layer.name] = f"full precision ({layer.role})"
        else:
            layers[layer.name] = layer
    sizes = _input_sizes(model, sampler, layers)
    left |= {name: "not called by the sampler" for name in layers if name not in sizes}
    return {name: (layers[name], sizes[name]) for name in layers if name in sizes}, halves, left


def _weight_bits(role: str, config: MPQDMConfig) -> int:
    if role == "body":
        return config.weight_bits
    return config.skip_bits if role == "skip" else config.edge_bits


def _input_sizes(model: nn.Module, sampler: Sampler, layers: Mapping[str, Layer]) -> dict[str, int]:
    """Return the bytes of one sample's input, by layer, for layers that are called at all."""
    sizes: dict[str, int] = {}

    def measure(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            sizes[name] = max(sizes.get(name, 0), args[0][0].numel() * args[0].element_size())

        return hook

    handles = [
        layer.module.register_forward_pre_hook(measure(name)) for name, layer in layers.items()
    ]
    try:
        sampler.trajectory(model, 0)
    finally:
        for handle in handles:
            handle.remove()
    return sizes


def _passes(
    sizes: Mapping[str, int], names: Sequence[str], steps: int, config: MPQDMConfig
) -> Iterator[list[str]]:
    """Split the layers so that each pass holds at least one input of each layer and step."""
    group: list[str] = []
    largest = 0
    for name in names:
        if sizes[name] * steps > config.calib_bytes:
            raise ConfigError(
                f"calib_bytes is {config.calib_bytes}, but {steps} inputs of layer {name!r} have "
                f"{sizes[name] * steps} bytes; raise it"
            )
        most = max(largest, sizes[name])
        if group and (len(group) + 1) * steps * most > config.calib_bytes:
            yield group
            group, most = [], sizes[name]
        group.append(name)
        largest = most
    if group:
        yield group


def _collect(
    model: nn.Module,
    sampler: Sampler,
    timesteps: Sequence[float],
    parts: Mapping[str, nn.Module],
    most_bytes: int,
    config: MPQDMConfig,
    tell: Progress,
) -> InputCollector:
    """Run the calibration trajectories and return the inputs of these layers."""
    context = TimestepContext(timesteps).to(next(model.parameters()).device)
    collector = InputCollector(
        parts,
        max_bytes=most_bytes,
        generator=torch_generator(config.seed, "calibration"),
        context=context,
    )
    handle = context.attach(model)
    count = math.ceil(config.calib_samples / sampler.batch_size)
    try:
        with collector:
            for number in range(count):
                sampler.trajectory(model, number)
                tell("calibration trajectories", number + 1, count)
    finally:
        handle.remove()
    return collector


def _draft(
    layer: Layer,
    collector: InputCollector,
    config: MPQDMConfig,
    steps: int,
    split: int | None = None,
) -> LayerDraft:
    module, body = layer.module, layer.role == "body"
    weight: Tensor = module.weight  # type: ignore[assignment]
    rows = to_rows(module, weight.detach()).float()
    groups = getattr(module, "groups", 1)
    xmax, wmax = collector.channel_max(layer.name), weight_channel_max(rows, groups=groups).cpu()
    smooth = _smooth(xmax, wmax, config.smooth_alpha, rows.device)
    act_bits = config.act_bits if body else 8
    inputs = [collector.inputs(layer.name, step).float().to(rows.device) for step in range(steps)]
    if split is not None:
        smooth = split_smooth(inputs, smooth, split, bits=act_bits, method=config.scale_method)
    if smooth is not None:
        rows = smooth_weight(rows, smooth, groups=groups)
    inputs = [_scaled(x, smooth, module) for x in inputs]
    pooled = config.act_init == "pooled" or layer.role in _EDGE_ROLES
    act_scale, act_zero = _input_scales(inputs, act_bits, config.scale_method, pooled)
    errors, energy = None, 0.0
    if body and len(config.choices) > 1:
        errors, energy = _row_errors(module, inputs, act_scale, act_zero, act_bits, rows, config)
    return LayerDraft(
        rows=rows,
        smooth=smooth,
        act_bits=act_bits,
        act_scale=act_scale,
        act_zero=act_zero,
        errors=errors,
        energy=energy,
        dead=int(((xmax == 0) | (wmax == 0)).sum()),
    )


def _smooth(
    xmax: Tensor, wmax: Tensor, alpha: float, device: torch.device
) -> Float[Tensor, " channels"] | None:
    """Return the divisors as the file will hold them, in float16, or None without pre-scaling."""
    if alpha == 0:
        return None
    limits = torch.finfo(torch.float16)
    smooth = smooth_scale(xmax, wmax, alpha).clamp(limits.tiny, limits.max)
    return smooth.half().float().to(device)


def _scaled(x: Tensor, smooth: Tensor | None, module: nn.Module) -> Tensor:
    if smooth is None:
        return x
    axis = channel_axis(module)
    return x / (smooth if axis == -1 else smooth.view(-1, *[1] * (x.dim() - 2)))


def _input_scales(
    inputs: Sequence[Tensor], bits: int, method: Any, pooled: bool
) -> tuple[Float[Tensor, " steps"], Float[Tensor, " steps"]]:
    """Return scale and integer zero point of the inputs at every sampling step."""
    samples = [_sampled(x.reshape(-1), SAMPLE_ELEMENTS) for x in inputs]
    if pooled:
        share = max(1, SAMPLE_ELEMENTS // len(samples))
        samples = [torch.cat([_sampled(values, share) for values in samples])]
    found = [init_scale(values, bits, method=method, zero="int") for values in samples]
    scale = torch.stack([scale for scale, _ in found]).expand(len(inputs))
    zero = torch.stack([zero for _, zero in found]).expand(len(inputs))
    return scale.clone(), zero.clone()


def _sampled(values: Tensor, most: int) -> Tensor:
    """Return evenly spread values, at most so many, and always the least and the largest."""
    if len(values) <= most:
        return values
    places = torch.arange(most, device=values.device) * (len(values) - 1) // max(1, most - 1)
    chosen = values[places]
    return torch.cat((chosen, values.aminmax().min[None], values.aminmax().max[None]))


def _row_errors(
    module: nn.Module,
    inputs: Sequence[Tensor],
    act_scale: Tensor,
    act_zero: Tensor,
    act_bits: int,
    rows: Tensor,
    config: MPQDMConfig,
) -> tuple[NDArray[np.float64], float]:
    """Return the rows' errors and the mean energy of an exact output."""
    outputs = apply_weight(module, inputs[0][:1], rows).numel()
    each = max(1, ERROR_ELEMENTS // max(inputs[0][0].numel(), outputs) // len(inputs))
    stream = torch_generator(config.seed, "calibration/errors")
    chosen = [
        x if len(x) <= each else x[torch.randperm(len(x), generator=stream)[:each].to(x.device)]
        for x in inputs
    ]
    exact = torch.cat(chosen)
    rounded = exact
    if config.omq_acts:
        rounded = torch.cat([
            fake_quant(x, act_scale[step], act_zero[step], 2**act_bits - 1)
            for step, x in enumerate(chosen)
        ])  # fmt: skip
    method = config.omq_scale_method or config.scale_method
    errors = output_errors(module, exact, rounded, rows, config.choices, method)
    energy = float(apply_weight(module, exact, rows).double().square().mean()) or 1.0
    return errors, energy


def _traces(
    model: nn.Module,
    sampler: Sampler,
    layers: Mapping[str, Layer],
    config: MPQDMConfig,
    tell: Progress,
) -> dict[str, float]:
    """Return the trace of the Hessian of the body's layers, if the allocation asks for it."""
    if config.allocation != "hawq" or len(config.choices) == 1:
        return {}
    from mpq_dm.hawq import hessian_traces

    body = {name: layer.module for name, layer in layers.items() if layer.role == "body"}
    return hessian_traces(model, sampler, body, config, tell)


def _allocate(found: Measurement, config: MPQDMConfig) -> dict[str, Tensor]:
    """Return the bits of the rows of the body's layers."""
    layers = found.layers
    body = {name: draft for name, draft in found.drafts.items() if layers[name].role == "body"}
    if config.allocation == "hawq" and found.traces:
        from mpq_dm.hawq import whole_layers

        parts = [
            (
                draft.rows,
                draft.smooth,
                getattr(layers[name].module, "groups", 1),
                found.traces[name],
            )
            for name, draft in body.items()
        ]
        return dict(zip(body, whole_layers(parts, config), strict=True))
    tables = []
    for draft in body.values():
        if draft.errors is None:
            continue
        # one budget for all layers compares them: each counts by its error relative to its output
        whole = config.allocation == "exact-layers"
        tables.append(draft.errors / (len(draft.rows) * draft.energy) if whole else draft.errors)
    weights = [draft.rows.flatten(1).cpu() for draft in body.values()]
    chosen = allocate(weights, config, errors=tables or None)
    return {name: torch.from_numpy(bits) for name, bits in zip(body, chosen, strict=True)}
