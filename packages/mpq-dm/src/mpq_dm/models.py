# SPDX-License-Identifier: Apache-2.0
"""Read a diffusers model from a folder: of the model itself, or of a pipeline that has one."""

import json
from pathlib import Path
from typing import Any

from tenfold_core.errors import InputError

__all__ = ["load_model", "model_folder"]

DENOISERS = ("transformer", "unet")


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


def load_model(path: str | Path) -> Any:
    """Return the denoiser in a folder, in float32 on the CPU; only safetensors files are read.

    Raises:
        InputError: the folder holds no model that diffusers knows, or it is quantized already.
    """
    folder = model_folder(path)
    config = _config(folder / "config.json")
    name = config.get("_class_name")
    if "quantization_config" in config:
        method = config["quantization_config"].get("quant_method")
        raise InputError(f"{folder}: the model is quantized already ({method}), expected weights")
    import diffusers
    import torch

    kind = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not isinstance(kind, type) or not issubclass(kind, diffusers.ModelMixin):
        raise InputError(
            f"{folder / 'config.json'}: _class_name is {name!r}, expected a model of diffusers "
            f"{diffusers.__version__}"
        )
    try:
        model: Any = kind.from_pretrained(folder, use_safetensors=True, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: {' '.join(str(error).split())[:300]}") from error
    return model.eval()


def _config(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: found {type(found).__name__}, expected an object")
    return found
