# SPDX-License-Identifier: Apache-2.0
"""Learned rounding, block by block: AdaRound as Q-Diffusion uses it for diffusion models.

AdaRound (Nagel et al., ICML 2020, arXiv 2004.10568) decides for every weight whether it goes up or
down. Q-Diffusion (Li et al., ICCV 2023, arXiv 2302.04304) learns this for whole residual and
attention blocks of a UNet, on inputs from all sampling steps (sections 3.2 and 3.3):

    min_V  mean || block(x; W_hat(V)) - block(x; W) ||^2  +  lambda sum(1 - |2 h(V) - 1|^beta)

with the rectified sigmoid h of `tenfold_core.quant.rounding` (gamma -0.1, zeta 1.1), beta annealed
from 20 to 2 after a fifth of the steps. Inputs of layers are rounded at their sampling step's
scale, which stays; inputs and outputs of a block are those of the full-precision model, so no
block waits for another.

Of Q-Diffusion's split of concatenated inputs (section 3.4), `skip_splits` finds the place and
`split_smooth` a divisor per channel that brings both parts to one scale: dividing by it and then
rounding is rounding with two scales. Deviation: both parts share the zero point.

Deviation: only layers of the body learn; those of 8 bits at the edges and shortcuts are rounded to
nearest. A block keeps its learned codes only if they reconstruct it better than the nearest ones.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, UInt8
from tenfold_core.errors import DivergedError, InputError
from tenfold_core.quant.activations import TimestepContext
from tenfold_core.quant.affine import dequantize, quantize, storable
from tenfold_core.quant.rounding import AdaRound
from tenfold_core.quant.scales import init_scale
from tenfold_core.run.seeds import torch_generator
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from mpq_dm.config import MPQDMConfig
from mpq_dm.layers import QuantLayer
from mpq_dm.sampler import Sampler
from mpq_dm.temb_cache import table_layers

__all__ = ["learn_rounding", "rounding_units", "skip_splits", "split_smooth"]

BATCH = 16  # samples of a step
PENALTY = 0.01  # lambda, as published
BETA = (20.0, 2.0)
WARM_UP = 0.2  # of the steps, without the penalty
PATH = 20.0  # learning rate times steps, as published: 0.001 for 20,000
MOST_RATE = 0.05
SPLIT_ELEMENTS = 1 << 18  # of either part of an input, for the search of its scale
_BLOCK = re.compile(r"Block(CondNorm)?([123]D)?$")


def rounding_units(model: nn.Module, layers: Collection[str]) -> dict[str, list[str]]:
    """Group layers into what is reconstructed together.

    A unit is a module whose class is named a block and that holds no other such block (ResNet and
    transformer blocks, but not the blocks of a UNet made of these), or attention outside of these,
    or a single layer outside of both.

    Args:
        model: the denoiser.
        layers: names of the layers to learn.

    Returns:
        The layers of each unit, by the name of its module.
    """
    blocks = [name for name, part in model.named_modules() if _BLOCK.search(type(part).__name__)]
    inner = [name for name in blocks if not any(other.startswith(f"{name}.") for other in blocks)]
    attention = [
        name for name, part in model.named_modules() if type(part).__name__.startswith("Attention")
    ]
    found: dict[str, list[str]] = {}
    for layer in layers:
        # names end in a dot, so that `blocks.1` does not begin `blocks.10`
        above = [name for name in inner if layer.startswith(f"{name}.")]
        above = above or [name for name in attention if layer.startswith(f"{name}.")]
        found.setdefault(above[0] if above else layer, []).append(layer)
    return found


def skip_splits(model: nn.Module) -> dict[str, int]:
    """Return, for layers that read a concatenated skip of a UNet, the channels before the skip.

    These are the first convolution and the shortcut of the ResNet blocks of the way up.
    """
    found: dict[str, int] = {}
    middle: Any = getattr(model, "mid_block", None)
    way_down: Any = getattr(model, "down_blocks", None)
    start = middle if getattr(middle, "resnets", None) else (way_down or [None])[-1]
    if not getattr(start, "resnets", None):
        return found
    channels = start.resnets[-1].out_channels
    ups: Any = getattr(model, "up_blocks", None)
    for place, block in enumerate(ups or []):
        for number, resnet in enumerate(getattr(block, "resnets", ())):
            if 0 < channels < resnet.in_channels:
                for leaf in ("conv1", "conv_shortcut"):
                    if getattr(resnet, leaf, None) is not None:
                        found[f"up_blocks.{place}.resnets.{number}.{leaf}"] = channels
            channels = resnet.out_channels
    return found


def split_smooth(
    inputs: Sequence[Float[Tensor, "items channels ..."]],
    smooth: Float[Tensor, " channels"] | None,
    split: int,
    *,
    bits: int,
    method: Any = "mse",
) -> Float[Tensor, " channels"]:
    """Return divisors with which one scale serves both parts of a concatenated input.

    Args:
        inputs: inputs of each sampling step, channels on axis 1.
        smooth: divisors so far; None for none.
        split: channels of the first part.
        bits: width of the input's codes.
        method: how scales are found.
    """
    channels = inputs[0].shape[1]
    divisor = torch.ones(channels, device=inputs[0].device) if smooth is None else smooth.clone()
    shape = (1, channels, *[1] * (inputs[0].dim() - 2))
    each = max(1, SPLIT_ELEMENTS // len(inputs))
    scales = []
    for part in (slice(0, split), slice(split, channels)):
        values = [(x / divisor.view(shape))[:, part].reshape(-1) for x in inputs]
        # strides keep the least and largest of no step in particular; all steps are there
        sample = torch.cat([value[:: max(1, len(value) // each)] for value in values])
        scales.append(init_scale(sample, bits, method=method, zero="int")[0].reshape(()))
    largest = torch.stack(scales).max()
    for part, scale in zip((slice(0, split), slice(split, channels)), scales, strict=True):
        divisor[part] *= scale / largest
    limits = torch.finfo(torch.float16)
    return divisor.clamp(limits.tiny, limits.max).half().float()


def learn_rounding(
    model: nn.Module,
    student: nn.Module,
    layers: Mapping[str, QuantLayer],
    sampler: Sampler,
    timesteps: Sequence[float],
    config: MPQDMConfig,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, UInt8[Tensor, "out in *kernel"]]:
    """Learn the codes of the body's weights at their fixed scales.

    Args:
        model: the full-precision denoiser.
        student: its copy with `QuantLayer`s; weights changed by fine-tuning are rounded as changed.
        layers: the layers of the student, by name.
        sampler: gives the calibration trajectories, its first ones.
        timesteps: what the sampler calls the model with, in order.
        config: `rounding_steps`, `calib_samples`, `calib_bytes` and `seed`.
        progress: told about trajectories and blocks.

    Raises:
        InputError: an input of a block has no batch axis and changes between calls.
        DivergedError: a loss is not finite.
    """
    body = [name for name, layer in layers.items() if layer.plan.role == "body"]
    units = rounding_units(model, body)
    tell = progress or (lambda *_: None)
    codes: dict[str, Tensor] = {}
    done = 0
    for records in _recorded(model, sampler, timesteps, list(units), config, tell):
        for name in list(records):
            own = {layer: layers[layer] for layer in units[name]}
            unit = _Unit(name, student, own, records.pop(name), timesteps)
            codes |= unit.learn(config)
            done += 1
            tell("blocks", done, len(units))
    return codes


@dataclass(slots=True)
class _Record:
    """Calls of a unit of the full-precision model, one entry a sample."""

    chosen: set[int]
    """Which of all samples that pass are kept."""
    passed: int = 0
    leaves: list[list[Any]] = field(default_factory=list)
    batched: list[bool] = field(default_factory=list)
    spec: Any = None
    outputs: list[list[Tensor]] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)

    def add_(self, args: Any, kwargs: Any, output: Any, steps: Tensor) -> None:
        leaves, self.spec = tree_flatten((args, kwargs))
        outputs = [part for part in tree_flatten(output)[0] if _is_float(part)]
        batch = len(outputs[0])
        self.batched = [
            isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == batch for leaf in leaves
        ]
        each = steps.repeat_interleave(batch // len(steps)).tolist()
        for row in range(batch):
            if self.passed in self.chosen:
                kept = [
                    leaf[row : row + 1].detach().cpu().clone() if batched else leaf
                    for leaf, batched in zip(leaves, self.batched, strict=True)
                ]
                self.leaves.append(kept)
                self.outputs.append(
                    [part[row : row + 1].detach().cpu().clone() for part in outputs]
                )
                self.steps.append(each[row])
            self.passed += 1

    def batch(self, rows: Sequence[int], name: str) -> tuple[Any, Any, list[Tensor]]:
        """Return arguments, keyword arguments and outputs of these samples."""
        leaves = []
        for place, batched in enumerate(self.batched):
            values = [self.leaves[row][place] for row in rows]
            if batched:
                leaves.append(torch.cat(values))
                continue
            if isinstance(values[0], Tensor) and not all(torch.equal(values[0], v) for v in values):
                raise InputError(
                    f"block {name!r}: an input of shape {tuple(values[0].shape)} has no batch axis "
                    "and changes between calls; use rounding='nearest'"
                )
            leaves.append(values[0])
        args, kwargs = tree_unflatten(leaves, self.spec)
        outputs = [torch.cat(parts) for parts in zip(*(self.outputs[r] for r in rows), strict=True)]
        return args, kwargs, outputs


class _Unit:
    """One block of the student, with the full-precision calls it has to reproduce."""

    def __init__(
        self,
        name: str,
        student: nn.Module,
        layers: Mapping[str, QuantLayer],
        record: _Record,
        timesteps: Sequence[float],
    ) -> None:
        self.name, self.layers, self.record = name, layers, record
        self.module = student.get_submodule(name)
        self.timesteps = torch.tensor(timesteps)
        first = next(iter(layers.values()))
        self.device = first.rows.device
        # the student itself is not called, so no hook sets the step of its layers and tables
        contexts: list[Any] = [first.act_quant.context]
        contexts += [table.__dict__["context"] for _, table in table_layers(self.module)]
        self.contexts = list({id(context): context for context in contexts}.values())

    def learn(self, config: MPQDMConfig) -> dict[str, Tensor]:
        """Return the codes of the unit's layers: the learned ones, or the nearest if better."""
        learners, nearest = {}, {}
        for name, layer in self.layers.items():
            quant = layer.weight_quant
            scale, zero = storable(quant.scale, quant.zero)
            rows = layer.smoothed_rows().detach().flatten(1)
            learners[name] = AdaRound(rows, scale, zero, quant.qmax)
            nearest[name] = quantize(rows, scale, zero, quant.qmax)
        self._optimize(learners, config)
        learned = {name: learner.hard() for name, learner in learners.items()}
        try:
            losses = [self._loss_of(codes, learners) for codes in (nearest, learned)]
        finally:
            self._use(None)
        best = learned if losses[1] < losses[0] else nearest
        return {name: codes.view_as(self.layers[name].rows) for name, codes in best.items()}

    def _optimize(self, learners: Mapping[str, AdaRound], config: MPQDMConfig) -> None:
        steps = config.rounding_steps
        parameters = [learner.v for learner in learners.values()]
        optimizer = torch.optim.Adam(parameters, lr=min(MOST_RATE, PATH / steps))
        stream = torch_generator(config.seed, f"rounding/{self.name}")
        for step in range(steps):
            rows = torch.randint(len(self.record.steps), (BATCH,), generator=stream).tolist()
            with torch.enable_grad():
                self._use({name: learner() for name, learner in learners.items()})
                loss = self._loss(rows)
                if step >= WARM_UP * steps:
                    beta = _annealed(step / steps)
                    penalties = [learner.regularizer(beta) for learner in learners.values()]
                    loss = loss + PENALTY * torch.stack(penalties).sum()
                found = torch.autograd.grad(loss, parameters)
            if not bool(loss.detach().isfinite()):
                self._use(None)
                raise DivergedError(
                    f"block {self.name!r}: the loss of its rounding is {float(loss.detach())} at "
                    f"step {step}; raise the bits"
                )
            for part, gradient in zip(parameters, found, strict=True):
                part.grad = gradient
            optimizer.step()

    def _use(self, rows: Mapping[str, Tensor] | None) -> None:
        for name, layer in self.layers.items():
            layer.use_rows_(None if rows is None else rows[name].view_as(layer.rows))

    def _loss(self, rows: Sequence[int]) -> Tensor:
        """Return the squared error, summed over channels and else averaged, of these samples."""
        args, kwargs, targets = self.record.batch(rows, self.name)
        steps = torch.tensor([self.record.steps[row] for row in rows])
        for context in self.contexts:
            context.set_(self.timesteps[steps].to(self.device))
        args, kwargs = _moved((args, kwargs), self.device)
        outputs = tree_flatten(self.module(*args, **kwargs))[0]
        losses = [
            (found - target.to(found)).square().sum(1).mean()
            for found, target in zip(filter(_is_float, outputs), targets, strict=True)
        ]
        return torch.stack(losses).sum()

    @torch.no_grad()
    def _loss_of(self, codes: Mapping[str, Tensor], learners: Mapping[str, AdaRound]) -> float:
        """Return the mean loss of all samples with these codes."""
        self._use({
            name: dequantize(part, learners[name].scale, learners[name].zero)
            for name, part in codes.items()
        })  # fmt: skip
        count, total = len(self.record.steps), 0.0
        for first in range(0, count, BATCH):
            rows = range(first, min(first + BATCH, count))
            total += float(self._loss(rows)) * len(rows)
        return total / count


def _annealed(progress: float) -> float:
    """Return beta at this part of all steps, linear after the warm-up."""
    start, end = BETA
    return end + (start - end) * max(0.0, 1 - (progress - WARM_UP) / (1 - WARM_UP))


def _recorded(
    model: nn.Module,
    sampler: Sampler,
    timesteps: Sequence[float],
    units: Sequence[str],
    config: MPQDMConfig,
    tell: Callable[[str, int, int], None],
) -> Iterator[dict[str, _Record]]:
    """Yield recordings of as many units at a time as fit into `calib_bytes`."""
    count = -(-config.calib_samples // sampler.batch_size)
    sizes = _sizes(model, sampler, units)
    stream = torch_generator(config.seed, "rounding/samples")
    group: dict[str, _Record] = {}
    filled = 0
    for name in units:
        each, samples = sizes[name]
        total = samples * count
        kept = max(1, min(total, config.calib_bytes // each))
        if group and filled + kept * each > config.calib_bytes:
            yield _run(model, sampler, timesteps, group, count, tell)
            group, filled = {}, 0
        chosen = torch.randperm(total, generator=stream)[:kept]
        group[name] = _Record(set(chosen.tolist()))
        filled += kept * each
    if group:
        yield _run(model, sampler, timesteps, group, count, tell)


def _sizes(model: nn.Module, sampler: Sampler, units: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Return the bytes of one sample's call of each unit, and its samples in a trajectory."""
    found = {name: (1, 0) for name in units}

    def measure(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            leaves = [part for part in tree_flatten((args, kwargs, output))[0] if _is_float(part)]
            batch = len(next(part for part in tree_flatten(output)[0] if _is_float(part)))
            size = sum(part.numel() * part.element_size() for part in leaves) // batch
            found[name] = (max(size, found[name][0]), found[name][1] + batch)

        return hook

    handles = [
        model.get_submodule(name).register_forward_hook(measure(name), with_kwargs=True)
        for name in units
    ]
    try:
        sampler.trajectory(model, 0)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _run(
    model: nn.Module,
    sampler: Sampler,
    timesteps: Sequence[float],
    records: dict[str, _Record],
    count: int,
    tell: Callable[[str, int, int], None],
) -> dict[str, _Record]:
    """Let the full-precision model sample, and fill the recordings."""
    context = TimestepContext(timesteps).to(next(model.parameters()).device)

    def keep(record: _Record) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            record.add_(args, kwargs, output, context.index.cpu())

        return hook

    handles = [context.attach(model)]
    handles += [
        model.get_submodule(name).register_forward_hook(keep(record), with_kwargs=True)
        for name, record in records.items()
    ]
    try:
        for number in range(count):
            sampler.trajectory(model, number)
            tell("rounding trajectories", number + 1, count)
    finally:
        for handle in handles:
            handle.remove()
    return records


def _moved(tree: Any, device: torch.device) -> Any:
    leaves, spec = tree_flatten(tree)
    moved = [leaf.to(device) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    return tree_unflatten(moved, spec)


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
