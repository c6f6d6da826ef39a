# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning along the teacher's trajectories: task loss on the guided noise, TRD on features.

The full-precision model samples; at every call the student sees the same input, and one step of
AdamW lowers `sum (eps_q - eps)^2 + lambda L_TRD`. No data is needed, and the states never depend on
the student. A trajectory is the unit of resuming: its noise and conditions follow from its number.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tenfold_core.errors import CheckpointError, DivergedError, TenfoldError
from tenfold_core.run.seeds import torch_generator
from torch import Tensor, nn

from mpq_dm.config import MPQDMConfig
from mpq_dm.layers import QuantLayer
from mpq_dm.sampler import Sampler, first_tensor, following
from mpq_dm.trd import FeatureTap, RelationWindow

__all__ = ["FineTuner", "TrajectoryLoss"]

_OPTIMIZER_KEYS = ("step", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrajectoryLoss:
    """What one trajectory of fine-tuning cost."""

    trajectory: int
    task: float
    """Sum over the steps of `sum (eps_q - eps)^2`."""
    relation: float
    """Sum over the windows of the relation loss, without its factor."""
    grad_ratio: float | None
    """Norm of the relation loss's gradient over the task loss's, both as they enter, where looked
    at: 0 says that the relation loss does nothing."""


class FineTuner:
    """Trains the layers of a student; see the module.

    Args:
        teacher: the full-precision model.
        student: its copy with `QuantLayer`s, its context attached.
        layers: the layers of the student to train, by name.
        sampler: gives the trajectories.
        config: learning rates, losses, number of trajectories.
        num_calls: calls of the denoiser in one trajectory.
    """

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        layers: Mapping[str, QuantLayer],
        sampler: Sampler,
        config: MPQDMConfig,
        num_calls: int,
    ) -> None:
        self.teacher, self.student, self.layers = teacher, student, layers
        self.sampler, self.config = sampler, config
        self.total_steps = max(1, config.trajectories * num_calls)
        self.done = 0
        """Trajectories that are finished."""
        self._step = 0
        self._groups = parameter_groups(layers, config)
        self._names = parameter_names(layers)
        self.optimizer = torch.optim.AdamW(self._groups, fused=True)
        self._rates = [group["lr"] for group in self.optimizer.param_groups]

    def run(
        self,
        *,
        on_trajectory: Callable[[TrajectoryLoss], None] | None = None,
        save: Callable[[dict[str, np.ndarray]], None] | None = None,
    ) -> None:
        """Train until all trajectories are done.

        Args:
            on_trajectory: told the losses of every trajectory.
            save: given the state of the last finished trajectory, now and then and when the run is
                interrupted or fails.

        Raises:
            DivergedError: the loss is not finite.
            TenfoldError: the memory of the device does not hold a step.
        """
        last = self.state()
        try:
            while self.done < self.config.trajectories:
                losses = self._trajectory(self.done)
                self.done += 1
                last = self.state()
                if on_trajectory:
                    on_trajectory(losses)
                if save and self._due():
                    save(last)
        except (KeyboardInterrupt, Exception):
            if save:
                save(last)
            raise

    def _due(self) -> bool:
        return self.done % self.config.save_every == 0 or self.done == self.config.trajectories

    def _trajectory(self, number: int) -> TrajectoryLoss:
        """Let the teacher sample once, with a training step at every call."""
        relation = self.config.trd_weight > 0
        taps = [FeatureTap(self.student), FeatureTap(self.teacher)] if relation else []
        window = RelationWindow(
            self.config.trd_window, tau=self.config.trd_tau, grad=self.config.trd_grad,
            rows=self.config.trd_rows,
            generator=torch_generator(self.config.seed, f"relation/{number}"),
        )  # fmt: skip
        sums = {"task": 0.0, "relation": 0.0}
        ratio: list[float] = []
        look = number % self.config.save_every == 0

        def on_call(call: inspect.BoundArguments, output: Any) -> None:
            sample = call.args[0]
            with torch.enable_grad():
                found = self.student(*call.args, **call.kwargs)
                target = self.sampler.guide(first_tensor(output), sample).detach()
                task = (self.sampler.guide(first_tensor(found), sample) - target).square().sum()
                extra = window.add(*(tap.take() for tap in taps)) if taps else None
                loss = task if extra is None else task + self.config.trd_weight * extra
                if look and not ratio and extra is not None:
                    ratio.append(self._grad_ratio(task, self.config.trd_weight * extra))
                self._update(loss, number)
            sums["task"] += float(task.detach())
            sums["relation"] += 0.0 if extra is None else float(extra.detach())

        try:
            with following(self.teacher, on_call):
                self.sampler.trajectory(self.teacher, number)
        except torch.OutOfMemoryError as error:
            raise TenfoldError(self._too_large(number, error)) from error
        finally:
            for tap in taps:
                tap.remove()
        return TrajectoryLoss(trajectory=number, grad_ratio=ratio[0] if ratio else None, **sums)

    def _update(self, loss: Tensor, number: int) -> None:
        if not bool(loss.detach().isfinite()):
            raise DivergedError(
                f"fine-tuning: the loss is {float(loss.detach())} in trajectory {number}, step "
                f"{self._step}{self._first_bad()}; lower the learning rates or raise the bits"
            )
        loss.backward()
        parameters = list(self._names.values())
        if not bool(torch.nn.utils.get_total_norm(_gradients(parameters)).isfinite()):
            raise DivergedError(
                f"fine-tuning: a gradient is not finite in trajectory {number}, step "
                f"{self._step}{self._first_bad()}; lower the learning rates or raise the bits"
            )
        factor = max(0.0, 1 - self._step / self.total_steps)
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._step += 1

    def _too_large(self, number: int, error: Exception) -> str:
        found = ". ".join(" ".join(str(error).split()).split(". ")[:2]).rstrip(".")
        fewer = ""
        if self.config.trd_weight > 0:
            tried = self.config.trd_rows
            fewer = f", or --trd-rows {512 if tried is None else max(1, tried // 2)}, which draws "
            fewer += "so many positions for the relation loss"
        return (
            f"fine-tuning, trajectory {number}: {found}; start again with a --batch-size below "
            f"{self.config.batch_size}{fewer}"
        )

    def _first_bad(self) -> str:
        for name, layer in self.layers.items():
            for what, scale in (("weight", layer.weight_quant.scale), ("input", _act_scale(layer))):
                if not bool(scale.isfinite().all()):
                    return f", the scale of the {what} of layer {name!r} is not finite"
        for name, part in self._names.items():
            if part.grad is not None and not bool(part.grad.isfinite().all()):
                return f", that of {name} first"
        return ""

    def _grad_ratio(self, task: Tensor, relation: Tensor) -> float:
        """Return how large the relation loss's gradient is beside the task loss's."""
        if not relation.requires_grad:
            return 0.0
        parameters = [part for group in self._groups for part in group["params"]]
        norms = []
        for loss in (relation, task):
            found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            squares = [part.double().square().sum() for part in found if part is not None]
            norms.append(float(torch.stack(squares).sum().sqrt()))
        return norms[0] / norms[1] if norms[1] else math.inf

    def state(self) -> dict[str, np.ndarray]:
        """Return a copy of everything that training has changed, by name."""
        found = {"done": np.array([self.done, self._step])}
        for name, part in self._names.items():
            found[name] = _numpy(part)
            for key, value in self.optimizer.state.get(part, {}).items():
                found[f"{name}/{key}"] = _numpy(value)
        return found

    @torch.no_grad()
    def load_(self, state: Mapping[str, np.ndarray], where: str) -> None:
        """Continue from a state.

        Raises:
            CheckpointError: it is not a state of these layers.
        """
        missing = [name for name in ("done", *self._names) if name not in state]
        if missing:
            raise CheckpointError(f"{where}: {missing[0]!r} is missing, expected a state of this "
                                  "model; start again without --resume")  # fmt: skip
        self.done, self._step = (int(value) for value in state["done"])
        for name, part in self._names.items():
            if state[name].shape != tuple(part.shape):
                raise CheckpointError(
                    f"{where}: {name!r} has shape {state[name].shape}, expected "
                    f"{tuple(part.shape)}; start again without --resume"
                )
            part.copy_(torch.from_numpy(np.array(state[name])))
            stored = {key: f"{name}/{key}" for key in _OPTIMIZER_KEYS if f"{name}/{key}" in state}
            if stored:
                self.optimizer.state[part] = {
                    key: torch.from_numpy(np.array(state[path])).to(part.device)
                    for key, path in stored.items()
                }


def parameter_groups(layers: Mapping[str, QuantLayer], config: MPQDMConfig) -> list[dict[str, Any]]:
    """Return AdamW's groups: each layer's LoRA follows the layer's mean scale.

    EfficientDM Eq. 8: the step of LoRA is in proportion to the scale its product is rounded at.
    """
    groups: list[dict[str, Any]] = []
    zeros: list[Tensor] = []
    inputs: list[Tensor] = []
    for layer in layers.values():
        mean = float(layer.weight_quant.initial.mean())
        if layer.lora is not None:
            rate, decay = config.lora_lr * mean, config.lora_decay
            groups.append(_group(list(layer.lora.parameters()), rate, decay))
        # the published rate is that of the scale itself; rho is its logarithm
        rate = config.weight_lr / mean
        groups.append(_group([layer.weight_quant.rho], rate, config.scale_decay))
        zeros.append(layer.weight_quant.offset)
        inputs += layer.act_quant.parameters()
    groups.append(_group(zeros, config.weight_lr, config.scale_decay))
    groups.append(_group(inputs, config.act_lr, config.scale_decay))
    return groups


def parameter_names(layers: Mapping[str, QuantLayer]) -> dict[str, nn.Parameter]:
    """Return what is trained, by name."""
    return {
        f"{name}.{key}": part
        for name, layer in layers.items()
        for key, part in layer.named_parameters()
        if part.requires_grad
    }


def _group(parameters: list[Any], rate: float, decay: float) -> dict[str, Any]:
    return {"params": parameters, "lr": rate, "weight_decay": decay}


def _act_scale(layer: QuantLayer) -> Tensor:
    return layer.act_quant.initial * torch.exp(layer.act_quant.rho)


def _gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    return [part.grad for part in parameters if part.grad is not None]


def _numpy(values: Tensor) -> np.ndarray:
    return values.detach().cpu().clone().numpy()
