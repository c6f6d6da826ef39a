# SPDX-License-Identifier: Apache-2.0
"""What samples are conditioned on, as users write it: labels, prompts, embeddings."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tenfold_core.errors import InputError

__all__ = ["check_labels", "read_embeddings", "read_labels", "read_prompts"]


def read_labels(text: str, *, model: Any = None) -> list[int]:
    """Return the labels of a list with ranges such as `0-9,12`, or of a file of one a line.

    Args:
        text: the list, or the path of the file.
        model: a denoiser; labels that it has no embedding for are refused.

    Raises:
        InputError: a part is not a label or a range of labels, or out of the model's range; names
            the line.
    """
    listed = text.replace(" ", "").strip("0123456789-,") == ""
    parts = [("labels", part) for part in text.split(",")]
    if not listed and Path(text).is_file():
        lines = _lines(text)
        parts = [(f"{text}:{number}", line) for number, line in enumerate(lines, 1) if line.strip()]
        if not parts:
            raise InputError(f"{text}: no labels, expected one a line")
    found: list[int] = []
    for where, part in parts:
        labels = _labels(where, part.strip())
        check_labels([labels[0], labels[-1]], model, where)
        found += labels
    return found


def _lines(path: str | Path) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not readable as text ({error})") from error


def _labels(where: str, part: str) -> range:
    first, dash, last = part.partition("-")
    if not first.isdecimal() or (dash and not last.isdecimal()):
        raise InputError(f"{where}: {part!r}, expected a label or a range such as 0-9")
    low, high = int(first), int(last) if dash else int(first)
    if high < low or high - low >= 1 << 20:
        raise InputError(f"{where}: {part!r}, expected a rising range of at most 2**20 labels")
    return range(low, high + 1)


def check_labels(
    labels: Sequence[int], model: Any, where: str = "labels", *, null: bool = False
) -> None:
    """Refuse labels that the denoiser has no embedding for.

    Args:
        labels: the labels.
        model: the denoiser.
        where: file and line, or the option, for the message.
        null: accept the label that a DiT has beyond its classes, for no class.

    Raises:
        InputError: names the first such label and the allowed range.
    """
    config = getattr(model, "config", None)
    for name in ("num_class_embeds", "num_embeds_ada_norm"):
        count = getattr(config, name, None)
        if count:
            most = count if null and name == "num_embeds_ada_norm" else count - 1
            for label in labels:
                if not 0 <= label <= most:
                    raise InputError(f"{where}: {label}, expected 0 to {most} ({name})")


def read_prompts(path: str | Path) -> list[str]:
    """Return the prompts of a file, one a line; blank lines are left out.

    Raises:
        InputError: the file cannot be read or holds no prompt.
    """
    prompts = [line.strip() for line in _lines(path) if line.strip()]
    if not prompts:
        raise InputError(f"{path}: no prompts, expected one a line")
    return prompts


def read_embeddings(path: str | Path) -> Mapping[str, Any]:
    """Return precomputed arguments from a safetensors file, one entry per condition.

    Raises:
        InputError: the file is damaged, empty, or its tensors have different numbers of entries.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file, expected .safetensors")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: not a safetensors file ({error})") from error
    lengths = {name: len(value) for name, value in tensors.items() if value.dim()}
    if not lengths or len(lengths) != len(tensors) or len(set(lengths.values())) > 1:
        raise InputError(f"{path}: entries {lengths}, expected as many of each tensor")
    return tensors
