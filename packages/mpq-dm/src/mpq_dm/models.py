# SPDX-License-Identifier: Apache-2.0
"""Open what users name: a pipeline, a denoiser with its scheduler, a single file, a hub id."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tenfold_core.errors import InputError, TenfoldError
from tenfold_core.run.checkpoint import read_header

__all__ = ["Source", "load_model", "model_folder", "open_source"]

DENOISERS = ("transformer", "unet")


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A diffusion model as it was found.

    Attributes:
        model: the denoiser, in float32 on the CPU.
        component: its name in a pipeline, unet or transformer.
        pipe: the pipeline, if it is one that diffusers can run.
        scheduler: the scheduler of the pipeline, or the one beside the denoiser.
    """

    model: Any
    component: str
    pipe: Any = None
    scheduler: Any = None

    @property
    def runnable(self) -> Any:
        """The pipeline if there is one, else the denoiser."""
        return self.model if self.pipe is None else self.pipe

    def to(self, device: str) -> "Source":
        """Move the denoiser, and the pipeline if there is one, and return the source."""
        self.runnable.to(device)
        return self


def open_source(
    name: str | Path, *, config: str | Path | None = None, packed: bool = False
) -> Source:
    """Open a pipeline folder, a denoiser's folder, a .safetensors file, or a hub id.

    Args:
        name: what to open. A denoiser's scheduler is looked for in `scheduler` beside it.
        config: the config.json of a single file's model.
        packed: accept models that are quantized already.

    Raises:
        InputError: it is none of them, damaged, or quantized already.
    """
    path = Path(name)
    if path.is_file():
        return _open_file(path, config)
    if not path.exists():
        return _open_hub(str(name))
    if (path / "model_index.json").is_file():
        if not packed:
            for part in DENOISERS:
                if (path / part / "config.json").is_file():
                    _require_plain(path / part)
                    _check_claims(*_model_class(path / part / "config.json"), path / part)
        return _from_pipeline(_open_pipeline(path))
    folder = model_folder(path)
    component = folder.name if folder.name in DENOISERS else "unet"
    model = load_model(path, packed=packed)
    return Source(model=model, component=component, scheduler=_scheduler_beside(path, folder))


def _open_file(path: Path, config: str | Path | None) -> Source:
    if path.suffix in (".ckpt", ".bin", ".pt", ".pth", ".pkl"):
        raise InputError(
            f"{path}: pickle files are not read, expected .safetensors; convert it with the "
            "library that wrote it, or with torch.load(weights_only=True)"
        )
    if path.suffix != ".safetensors" or config is None:
        raise InputError(
            f"{path}: a single file must be .safetensors and needs --config, the model's "
            "config.json; or give the folder of the model"
        )
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    kind, settings = _model_class(Path(config))
    _check_claims(kind, settings, Path(config), [path])
    try:
        model: Any = kind.from_config(settings)
        model.load_state_dict(load_file(path))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{path}: {_short(error)}") from error
    component = "unet" if "UNet" in kind.__name__ else "transformer"
    scheduler = _scheduler_beside(path.parent, Path(config).parent)
    return Source(model=model.eval(), component=component, scheduler=scheduler)


def _open_hub(name: str) -> Source:
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise InputError(f"{name}: no such file or folder")
    try:
        return _from_pipeline(_pretrained_pipeline(name))
    except TenfoldError:
        raise
    except Exception as error:  # of the network, whatever library it is
        raise InputError(
            f"{name}: no such folder here, and not read from the hub: {_short(error)}; where there "
            "is no network, give the folder of a downloaded copy"
        ) from error


def _open_pipeline(path: Path) -> Any:
    try:
        return _pretrained_pipeline(path)
    except TenfoldError:
        raise
    except (OSError, ValueError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        raise InputError(
            f"{path}: {_short(error)}; expected a folder written by save_pretrained"
        ) from error


def _pretrained_pipeline(name: str | Path) -> Any:
    import diffusers
    import torch
    from diffusers.utils import logging

    logging.disable_progress_bar()  # our own progress says what is going on
    return diffusers.DiffusionPipeline.from_pretrained(
        name, dtype=torch.float32, use_safetensors=True
    )


def _check_claims(
    kind: Any, settings: Mapping[str, Any], place: Path, files: Sequence[Path] | None = None
) -> None:
    """Refuse a config that describes far more weights than its files hold, before it is built.

    Raises:
        InputError: so it does, or no model can be built from it.
    """
    import torch

    try:
        with torch.device("meta"):
            empty = kind.from_config(dict(settings))
    except RuntimeError:
        return  # not every class can be built without values; what is built then says the rest
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        raise InputError(f"{place}: no {kind.__name__} can be built: {_short(error)}") from error
    files = sorted(place.glob("*.safetensors")) if files is None else files
    stored = sum(
        math.prod(entry.shape) for path in files for entry in read_header(path).tensors.values()
    )
    claimed = sum(part.numel() for part in empty.parameters())
    if files and claimed > 2 * stored:
        raise InputError(
            f"{place}: the config describes {claimed} weights, but the files hold {stored}"
        )


def _from_pipeline(pipe: Any) -> Source:
    for name in DENOISERS:
        if getattr(pipe, name, None) is not None:
            return Source(
                model=getattr(pipe, name).eval(), component=name, pipe=pipe,
                scheduler=getattr(pipe, "scheduler", None),
            )  # fmt: skip
    raise InputError(f"{type(pipe).__name__} has neither {' nor '.join(DENOISERS)}")


def _scheduler_beside(*folders: Path) -> Any:
    """Return the scheduler in one of the folders, or next to one, if there is any."""
    places = [place / "scheduler" for folder in folders for place in (folder, folder.parent)]
    found = next((place for place in places if place.is_dir()), None)
    return None if found is None else _scheduler(found)


def _scheduler(folder: Path) -> Any:
    import diffusers

    about = _config(folder / "scheduler_config.json")
    kind = getattr(diffusers, str(about.get("_class_name")), None)
    if not isinstance(kind, type) or not issubclass(kind, diffusers.SchedulerMixin):
        raise InputError(
            f"{folder / 'scheduler_config.json'}: _class_name is {about.get('_class_name')!r}, "
            f"expected a scheduler of diffusers {diffusers.__version__}"
        )
    return kind.from_pretrained(folder)


def model_folder(path: str | Path) -> Path:
    """Return the folder of the denoiser: `path` itself, or its `transformer` or `unet`.

    Raises:
        InputError: there is no model in diffusers layout.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such folder; expected a model in diffusers layout")
    if (path / "config.json").is_file():
        return path
    for name in DENOISERS:
        if (path / name / "config.json").is_file():
            return path / name
    raise InputError(
        f"{path}: neither config.json nor {' or '.join(f'{n}/config.json' for n in DENOISERS)}, "
        "expected the folder of a diffusers model or pipeline"
    )


def load_model(path: str | Path, *, packed: bool = False) -> Any:
    """Return the denoiser in a folder, in float32 on the CPU; only safetensors files are read.

    Args:
        path: the folder of the model, or one that has it as `unet` or `transformer`.
        packed: accept a model that is quantized already.

    Raises:
        InputError: the folder holds no model that diffusers knows, or it is quantized already.
    """
    folder = model_folder(path)
    if not packed:
        _require_plain(folder)
    kind, settings = _model_class(folder / "config.json")
    if not packed:
        _check_claims(kind, settings, folder)
    import torch

    try:
        model: Any = kind.from_pretrained(folder, use_safetensors=True, dtype=torch.float32)
    except TenfoldError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{folder}: {_short(error)}") from error
    return model.eval()


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:297]}..."


def _require_plain(folder: Path) -> None:
    about = _config(folder / "config.json").get("quantization_config")
    if about is not None:
        method = about.get("quant_method") if isinstance(about, dict) else about
        raise InputError(f"{folder}: the model is quantized already ({method}), expected weights")


def _model_class(path: Path) -> tuple[Any, dict[str, Any]]:
    """Return the class that a config.json names, and the config."""
    config = _config(path)
    import diffusers

    name = config.get("_class_name")
    kind = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not isinstance(kind, type) or not issubclass(kind, diffusers.ModelMixin):
        raise InputError(
            f"{path}: _class_name is {name!r}, expected a model of diffusers "
            f"{diffusers.__version__}"
        )
    return kind, config


def _config(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: found {type(found).__name__}, expected an object")
    return found
