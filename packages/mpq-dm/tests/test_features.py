# SPDX-License-Identifier: Apache-2.0
"""Features: a classifier of any images, and what is not one."""

import warnings

import numpy as np
import pytest
import torch
from mpq_dm.data import ImageSet, digits, split
from mpq_dm.features import (
    Embedding,
    Extractor,
    ImageClassifier,
    digits_extractor,
    read_extractor,
    train_extractor,
)
from tenfold_core.errors import ConfigError, InputError, TenfoldWarning
from torch import nn


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (3, 5, 9), (1, 1, 1), (1, 28, 28)])
def test_a_classifier_of_any_size(shape):
    net = ImageClassifier(shape, 7)
    images = torch.zeros(2, *shape)
    assert net.features(images).shape == (2, 64)
    assert net(images).shape == (2, 7)


def test_a_trained_classifier_knows_images_it_has_not_seen():
    train, held_out = split(digits())
    told = []
    found = train_extractor(
        train, held_out, steps=120, progress=lambda what, done, total: told.append((done, total))
    )
    assert found.accuracy > 0.95
    assert told[-1] == (120, 120)
    embedded = found.embed(held_out.images[:5], batch_size=2)
    assert embedded.features.shape == (5, 64)
    assert embedded.logits.shape == (5, 10)
    again = train_extractor(train, held_out, steps=120)
    assert all(
        torch.equal(first, second)
        for first, second in zip(found.net.parameters(), again.net.parameters(), strict=True)
    )


def test_a_classifier_that_knows_little_is_told():
    generator = torch.Generator().manual_seed(0)
    noise = ImageSet(
        torch.rand(60, 1, 4, 4, generator=generator), torch.arange(60) % 3, ("0", "1", "2")
    )
    with pytest.warns(TenfoldWarning, match="distances in its features say little"):
        found = train_extractor(*split(noise), steps=2)
    assert found.accuracy < 0.9


def test_images_of_one_class_train_nothing():
    data = ImageSet(torch.zeros(20, 1, 4, 4), torch.zeros(20, dtype=torch.long), ("0",))
    with pytest.raises(InputError, match="images of one class, expected two or more"):
        train_extractor(*split(data))
    with pytest.raises(ConfigError, match="steps is 0, expected 1 or more"):
        train_extractor(*split(digits()), steps=0)


def test_the_shipped_classifier_knows_digits():
    found = digits_extractor(split(digits())[1])
    assert found.accuracy > 0.98
    assert found.embed(torch.zeros(3, 1, 8, 8)).features.shape == (3, 32)


def test_images_are_clipped_as_files_are():
    identity = Extractor(net=nn.Flatten(), name="pixels")
    images = torch.tensor([-3.0, -1.0, 0.5, 2.0]).view(1, 1, 2, 2)
    assert identity.embed(images).features.tolist() == [[-1.0, -1.0, 0.5, 1.0]]


def test_torchscript_is_read(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on how old the format is
        program = torch.jit.script(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)))
        torch.jit.save(program, tmp_path / "linear.pt")
    found = read_extractor(tmp_path / "linear.pt")
    embedded = found.embed(torch.zeros(5, 1, 2, 2))
    assert embedded.features.shape == (5, 3)
    assert embedded.logits is None
    with pytest.raises(InputError, match=r"linear\.pt: .*expected a program of images"):
        found.embed(torch.zeros(5, 1, 3, 3))


@pytest.mark.slow
def test_an_exported_program_is_read(tmp_path):
    batch = {0: torch.export.Dim("batch", min=2)}
    program = torch.export.export(
        nn.Flatten(), (torch.zeros(4, 1, 2, 2),), dynamic_shapes={"input": batch}
    )
    torch.export.save(program, tmp_path / "flat.pt2")
    found = read_extractor(tmp_path / "flat.pt2")
    assert found.embed(torch.ones(5, 1, 2, 2)).features.tolist() == [[1.0] * 4] * 5


def test_weights_alone_are_no_program(tmp_path):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "weights.pt")
    with pytest.raises(InputError, match="not readable as TorchScript"):
        read_extractor(tmp_path / "weights.pt")
    (tmp_path / "weights.pt").rename(tmp_path / "weights.pt2")
    with pytest.raises(InputError, match="not readable as an exported program"):
        read_extractor(tmp_path / "weights.pt2")


def test_embeddings_join_in_order():
    parts = [Embedding(np.full((2, 1), value), np.full((2, 3), value)) for value in (1.0, 2.0)]
    joined = Embedding.joined(parts)
    assert joined.features[:, 0].tolist() == [1, 1, 2, 2]
    assert joined.logits.shape == (4, 3)
    assert len(joined) == 4
