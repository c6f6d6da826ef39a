# SPDX-License-Identifier: Apache-2.0
"""The command `quantize`: from a model's name to a folder, resumable, with a record beside it."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tenfold_core.errors import ConfigError, InputError, TenfoldError
from tenfold_core.run.atomic import atomic_directory
from tenfold_core.run.record import RunRecord
from torch import Tensor

from mpq_dm.conditions import check_labels, read_embeddings, read_labels, read_prompts
from mpq_dm.config import MPQDMConfig
from mpq_dm.method import Progress, QuantResult, make_sampler, quantize
from mpq_dm.models import Source, open_source
from mpq_dm.sampler import Sampler

__all__ = ["Conditioning", "quantize_to_folder", "sampler_for", "save_result"]

REPORT = "report.json"
RECORD = "run.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditioning:
    """What samples are conditioned on, as the command line names it."""

    labels: str | None = None
    negative_label: int | None = None
    prompts: Path | None = None
    embeddings: Path | None = None


def sampler_for(source: Source, conditioning: Conditioning, config: MPQDMConfig) -> Sampler:
    """Return the sampler of an opened model under these conditions.

    Raises:
        InputError: a file of conditions is damaged, or a label has no embedding.
        ConfigError: there is no scheduler, or guidance lacks its unconditional side.
    """
    conditions: dict[str, Any] = {}
    labels = None
    if conditioning.labels is not None:
        labels = read_labels(conditioning.labels, model=source.model)
    if conditioning.prompts is not None:
        conditions["prompt"] = read_prompts(conditioning.prompts)
    if conditioning.embeddings is not None:
        conditions |= read_embeddings(conditioning.embeddings)
    if source.pipe is None and source.scheduler is None:
        raise ConfigError(
            "the denoiser has no scheduler beside it; give the folder of its pipeline, or put the "
            "scheduler's folder next to the denoiser's"
        )
    _require_conditions(source, labels, conditions)
    negative: dict[str, Tensor] = {}
    if source.pipe is None and conditioning.negative_label is not None:
        import torch

        check_labels([conditioning.negative_label], source.model, "--negative-label", null=True)
        negative["class_labels"] = torch.tensor([conditioning.negative_label])
    return make_sampler(
        source.runnable, config, scheduler=source.scheduler, conditions=conditions,
        labels=labels, negative=negative,
    )  # fmt: skip


def _require_conditions(
    source: Source, labels: Sequence[int] | None, conditions: Mapping[str, Any]
) -> None:
    settings = getattr(source.model, "config", None)
    classes = getattr(settings, "num_class_embeds", None)
    if source.pipe is None and classes and labels is None:
        raise ConfigError(
            f"the model is conditioned on {classes} classes; give --labels, for example "
            f"--labels 0-{classes - 1}"
        )
    if source.pipe is None or conditions or labels is not None:
        return
    import inspect

    parameters = inspect.signature(type(source.pipe).__call__).parameters
    if "class_labels" in parameters:
        raise ConfigError(f"{type(source.pipe).__name__} samples classes; give --labels")
    if "prompt" in parameters:
        raise ConfigError(
            f"{type(source.pipe).__name__} samples from text; give --prompts, or --embeddings with "
            "prompt_embeds"
        )


def quantize_to_folder(
    name: str,
    out: Path,
    config: MPQDMConfig,
    conditioning: Conditioning,
    *,
    model_config: Path | None = None,
    device: str = "cpu",
    resume: bool = False,
    overwrite: bool = False,
    command: Sequence[str] = (),
    progress: Progress | None = None,
) -> QuantResult:
    """Quantize a model and write the folder, its report and its record.

    The state of an unfinished run lies in `OUT.state` and is removed at the end.

    Raises:
        InputError: `out` exists, or what `open_source` and `quantize` refuse.
        CheckpointError: `resume` without a state, or with one of another run.
    """
    state = out.with_name(out.name + ".state")
    if out.exists() and not overwrite:
        raise InputError(f"{out}: exists already; choose another folder or give --overwrite")
    if not out.absolute().parent.is_dir():
        raise InputError(f"{out}: the folder {out.absolute().parent} does not exist")
    if not resume and _holds_work(state):
        raise InputError(
            f"{state}: an unfinished run; give --resume to go on with it, or remove the folder"
        )
    source = open_source(name, config=model_config).to(device)
    record = RunRecord(
        state, package="mpq-dm", command=command, config=config, seed=config.seed, device=device
    )
    try:
        with record:
            result = quantize(
                source.runnable, config, sampler=sampler_for(source, conditioning, config),
                checkpoint_dir=state, resume_from=state if resume else None, progress=progress,
            )  # fmt: skip
            for key, (value, unit) in result.report.metrics().items():
                record.metric(key, value, unit=unit)
            with atomic_directory(out, overwrite=overwrite) as folder:
                save_result(result, source, folder)
                _record_in(folder, record)
    except BaseException:
        if not _holds_work(state):
            shutil.rmtree(state, ignore_errors=True)
        raise
    shutil.rmtree(state)
    return result


def _record_in(folder: Path, record: RunRecord) -> None:
    """Write the record where the model is; if that fails, it stays where it was."""
    before, record.folder = record.folder, folder
    try:
        for path in sorted(folder.rglob("*.safetensors")):
            record.artefact(path)
        record.finish()
    finally:
        record.folder = before


def _holds_work(state: Path) -> bool:
    """Tell whether there is more in a folder than the record of a run that had just begun."""
    if state.is_dir():
        return any(path.name != RECORD for path in state.iterdir())
    return state.exists()


def resume_hint(out: Path) -> str:
    """Return what to do after a run for this folder was interrupted."""
    state = out.with_name(out.name + ".state")
    if not _holds_work(state):
        return "nothing was kept yet; start again with the same command"
    return f"the state is kept in {state}; go on with the same command and --resume"


def save_result(result: QuantResult, source: Source, folder: Path) -> None:
    """Write the pipeline, or the denoiser with its scheduler, and the report.

    Raises:
        InputError: the disk is full, or the folder cannot be written.
    """
    try:
        if result.pipe is not None:
            result.pipe.save_pretrained(folder)
        else:
            result.model.save_pretrained(folder / source.component)
            if source.scheduler is not None:
                source.scheduler.save_pretrained(folder / "scheduler")
        result.report.to_json(folder / REPORT)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error}); nothing was kept") from error
    except Exception as error:
        if isinstance(error, TenfoldError) or "SafetensorError" not in type(error).__name__:
            raise
        raise InputError(f"{folder}: cannot be written ({error}); nothing was kept") from error


def read_report(folder: Path) -> dict[str, Any]:
    """Return the report of a quantized folder.

    Raises:
        InputError: there is none, or it is damaged.
    """
    path = folder / REPORT
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(found, dict) or "layers" not in found:
        raise InputError(f"{path}: no layers in it, expected a report of mpq-dm quantize")
    return found
