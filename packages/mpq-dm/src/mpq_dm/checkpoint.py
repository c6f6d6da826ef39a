# SPDX-License-Identifier: Apache-2.0
"""The folder from which an interrupted quantization goes on: plans, then the state of training."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tenfold_core.errors import CheckpointError
from tenfold_core.run.checkpoint import load_tensors, save_tensors
from tenfold_core.run.rows import plain
from torch import Tensor, nn

from mpq_dm.calibration import Calibration
from mpq_dm.config import MPQDMConfig
from mpq_dm.finetune import FineTuner, TrajectoryLoss
from mpq_dm.plan import LayerPlan

__all__ = ["Checkpoints", "fingerprint"]

_PLAN_TENSORS = ("bits", "scale", "zero", "smooth", "act_scale", "act_zero")
_FREE = ("save_every", "calib_bytes")
"""Settings that may differ when a run goes on."""


class Checkpoints:
    """Write and read the state of a quantization.

    Args:
        folder: where the files are.
        config: the settings; a run goes on with the same ones only.
        model: the full-precision model.
        timesteps: what the sampler calls it with.
        sampler: its conditions and scheduler count as settings.
    """

    def __init__(
        self,
        folder: str | Path,
        config: MPQDMConfig,
        model: nn.Module,
        timesteps: Sequence[float],
        sampler: Any = None,
    ) -> None:
        self.folder = Path(folder)
        self._calibration = self.folder / "calibration.safetensors"
        self._training = self.folder / "training.safetensors"
        settings = {name: value for name, value in asdict(config).items() if name not in _FREE}
        if sampler is not None:
            settings |= {"conditions": _conditions(sampler), "scheduler": _scheduler(sampler)}
        self._identity = plain(
            settings | {"model": fingerprint(model), "timesteps": list(timesteps)}
        )

    def save_calibration(self, found: Calibration) -> None:
        """Write what calibration found."""
        tensors: dict[str, np.ndarray] = {}
        plans: dict[str, Any] = {}
        for name, plan in found.plans.items():
            plans[name] = {"role": plan.role, "act_bits": plan.act_bits}
            for key in _PLAN_TENSORS:
                value = getattr(plan, key)
                if value is not None:
                    tensors[f"{name}/{key}"] = value.detach().cpu().numpy()
        for name, table in found.errors.items():
            tensors[f"{name}/errors"] = table
        rest = {"halves": found.halves, "left": found.left, "dead_channels": found.dead_channels}
        self._write(self._calibration, tensors, {"plans": plans, **rest})

    def load_calibration(self) -> Calibration:
        """Return what calibration found.

        Raises:
            CheckpointError: there is none, or it is of another model or other settings.
        """
        tensors, about = self._read(self._calibration)
        device = "cpu"
        plans: dict[str, LayerPlan] = {}
        for name, entry in about["plans"].items():
            parts: dict[str, Any] = {
                key: torch.from_numpy(np.array(tensors[f"{name}/{key}"])).to(device)
                if f"{name}/{key}" in tensors
                else None
                for key in _PLAN_TENSORS
            }
            plans[name] = LayerPlan(**entry, **parts)
        errors = {
            name: np.array(tensors[f"{name}/errors"])
            for name in plans
            if f"{name}/errors" in tensors
        }
        rest = {key: about[key] for key in ("halves", "left", "dead_channels")}
        return Calibration(plans=plans, errors=errors, **rest)

    def save_training(
        self, state: Mapping[str, np.ndarray], losses: Sequence[TrajectoryLoss]
    ) -> None:
        """Write the state of fine-tuning after a finished trajectory, and the losses so far."""
        done = int(state["done"][0])
        kept = [asdict(loss) for loss in losses if loss.trajectory < done]
        self._write(self._training, state, {"losses": kept})

    def load_training_(self, tuner: FineTuner) -> list[TrajectoryLoss]:
        """Bring a tuner to the saved state, if there is one; return the losses up to there.

        Raises:
            CheckpointError: the state is of another model or other settings, or damaged.
        """
        if not self._training.exists():
            return []
        state, about = self._read(self._training)
        tuner.load_(state, str(self._training))
        return [TrajectoryLoss(**loss) for loss in about["losses"]]

    def _write(self, path: Path, tensors: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        metadata = {"identity": json.dumps(self._identity), "about": json.dumps(plain(about))}
        save_tensors(path, dict(tensors), metadata)

    def _read(self, path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        if not path.exists():
            raise CheckpointError(
                f"{path}: no such file; the run was interrupted before its first checkpoint, "
                "start again without --resume"
            )
        tensors, metadata = load_tensors(path, mmap=False, verify=True)
        try:
            identity, about = json.loads(metadata["identity"]), json.loads(metadata["about"])
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"{path}: not a state of mpq-dm ({error})") from error
        for name, value in self._identity.items():
            if identity.get(name) != value:
                raise CheckpointError(
                    f"{path}: {name} was {_short(identity.get(name))}, is {_short(value)} now; "
                    "repeat the old command or start without --resume"
                )
        return tensors, about


def fingerprint(model: nn.Module) -> str:
    """Return a hash of the model's weights and their names."""
    found = hashlib.blake2b(digest_size=16)
    for name, value in model.state_dict().items():
        part: Tensor = value.detach().cpu().contiguous().reshape(-1)
        found.update(name.encode())
        found.update(part.view(torch.uint8).numpy().data)
    return found.hexdigest()


def _conditions(sampler: Any) -> str:
    """Return a hash of the conditions of the first trajectories."""
    found = hashlib.blake2b(digest_size=16)
    for number in range(4):
        for name, value in sorted(sampler.arguments(number).items()):
            if isinstance(value, torch.Generator):
                continue
            found.update(name.encode())
            if isinstance(value, Tensor):
                found.update(value.detach().cpu().float().numpy().tobytes())
            else:
                found.update(repr(value).encode())
    return found.hexdigest()


def _scheduler(sampler: Any) -> dict[str, Any]:
    scheduler = getattr(sampler, "scheduler", None)
    if scheduler is None:
        scheduler = getattr(getattr(sampler, "pipe", None), "scheduler", None)
    settings = dict(getattr(scheduler, "config", {}))
    return {"class": type(scheduler).__name__, **{key: str(settings[key]) for key in settings}}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
