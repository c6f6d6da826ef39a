# SPDX-License-Identifier: Apache-2.0
"""Samples as PNG files and grids; latents stay safetensors."""

import math
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from tenfold_core.errors import InputError
from tenfold_core.run.atomic import atomic_path
from torch import Tensor

__all__ = ["grid", "is_image", "save_grid", "save_png", "to_pixels"]


def is_image(samples: Float[Tensor, "batch ..."]) -> bool:
    """Tell whether samples can be shown: maps of one or three channels."""
    return samples.dim() == 4 and samples.shape[1] in (1, 3)


def to_pixels(
    samples: Float[Tensor, "batch channels height width"], *, signed: bool = True
) -> NDArray[np.uint8]:
    """Return bytes `(batch, height, width, channels)`.

    Args:
        samples: values of -1 (black) to 1 if `signed`, else 0 to 1; others are clipped.
        signed: which of the two.

    Raises:
        InputError: the samples are not images of one or three channels.
    """
    if not is_image(samples):
        raise InputError(
            f"samples have shape {tuple(samples.shape)}, expected (batch, 1 or 3, height, width)"
        )
    values = samples.detach().float().cpu()
    values = (values + 1) / 2 if signed else values
    scaled = (values.nan_to_num(0).clamp(0, 1) * 255).round().to(torch.uint8)
    return scaled.permute(0, 2, 3, 1).numpy()


def grid(
    pixels: NDArray[np.uint8], *, columns: int | None = None, gap: int = 1
) -> NDArray[np.uint8]:
    """Lay images out row by row with white gaps; as square as possible unless told otherwise."""
    count, height, width, channels = pixels.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    shape = rows * (height + gap) + gap, columns * (width + gap) + gap, channels
    sheet = np.full(shape, 255, np.uint8)
    for number, image in enumerate(pixels):
        top = gap + number // columns * (height + gap)
        left = gap + number % columns * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return sheet


def save_png(path: str | Path, pixels: NDArray[np.uint8], *, scale: int = 1) -> None:
    """Write one picture `(height, width, 1 or 3)` as PNG, atomically, each pixel `scale` wide."""
    from PIL import Image

    if scale > 1:
        pixels = pixels.repeat(scale, axis=0).repeat(scale, axis=1)
    with atomic_path(path) as temporary:
        Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(temporary)


def save_grid(
    path: str | Path,
    rows: dict[str, NDArray[np.uint8]],
    *,
    smallest: int = 32,
) -> None:
    """Write a picture with one labelled row of images for each entry: the same noise by column.

    Args:
        path: a .png file.
        rows: images `(count, height, width, channels)` by label, all of one shape.
        smallest: images are magnified by whole factors to at least so many pixels.
    """
    from PIL import Image, ImageDraw, ImageFont

    first = next(iter(rows.values()))
    factor = max(1, math.ceil(smallest / first.shape[1]))
    strips = [
        grid(images.repeat(factor, axis=1).repeat(factor, axis=2), columns=len(images))
        for images in rows.values()
    ]
    font = ImageFont.load_default(size=max(11, min(16, strips[0].shape[0] // 2)))
    margin = 8 + max(int(font.getlength(label)) for label in rows)
    height, width = strips[0].shape[:2]
    sheet = Image.new("RGB", (margin + width, height * len(strips)), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (label, strip) in enumerate(zip(rows, strips, strict=True)):
        picture = strip.repeat(3, axis=2) if strip.shape[2] == 1 else strip
        sheet.paste(Image.fromarray(picture), (margin, number * height))
        pen.text((4, (number + 0.5) * height), label, fill="black", font=font, anchor="lm")
    with atomic_path(path) as temporary:
        sheet.save(temporary)
