# SPDX-License-Identifier: Apache-2.0
"""TRD: its windows, its gradient, and the known answer of its loss."""

import pytest
import torch
from mpq_dm.trd import FeatureTap, RelationWindow, as_tokens
from tenfold_core.errors import ConfigError
from torch import nn

TEACHER = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
STUDENT = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
# teacher rows softmax(1, 0) and softmax(0, 1), student rows (1/2, 1/2):
# sum p log(2 p) with p = (0.7311, 0.2689) is 0.1109, and there are two rows
TWO_ROWS = 2 * 0.11093


def test_known_answer_summed_over_rows():
    found = RelationWindow(1).add(STUDENT, TEACHER)

    assert found.item() == pytest.approx(TWO_ROWS, abs=1e-4)


def test_a_window_yields_its_loss_at_its_end_and_averages_before_comparing():
    window = RelationWindow(2)
    other = torch.tensor([[[0.0, 2.0], [4.0, 0.0]]])

    assert window.add(STUDENT, TEACHER) is None
    found = window.add(other, other)

    expected = RelationWindow(1).add((STUDENT + other) / 2, (TEACHER + other) / 2)
    assert torch.equal(found, expected)
    assert window.add(STUDENT, TEACHER) is None


def test_reset_forgets_an_unfinished_window():
    window = RelationWindow(2)
    window.add(STUDENT, TEACHER)
    window.reset()

    assert window.add(STUDENT, TEACHER) is None


def test_only_the_current_step_has_a_gradient():
    window = RelationWindow(2)
    earlier, current, teacher = (
        torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(seed), requires_grad=True)
        for seed in (1, 2, 3)
    )

    window.add(earlier, teacher)
    window.add(current, teacher).backward()

    assert earlier.grad is None
    assert teacher.grad is None
    assert current.grad.abs().sum() > 0


def test_the_published_program_has_no_gradient_at_all():
    student = STUDENT.clone().requires_grad_()

    assert not RelationWindow(1, grad="none").add(student, TEACHER).requires_grad


def test_drawn_rows_are_unbiased():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 1, 6, 4, generator=generator)
    whole = RelationWindow(1).add(student, teacher)
    window = RelationWindow(1, rows=2, generator=generator)

    drawn = torch.stack([window.add(student, teacher) for _ in range(3000)])

    error = (drawn.std() / len(drawn) ** 0.5).item()
    assert drawn.mean().item() == pytest.approx(whole.item(), abs=4 * error)


def test_blocks_of_rows_give_the_whole_map(monkeypatch):
    student, teacher = torch.randn(2, 2, 9, 4, generator=torch.Generator().manual_seed(0))
    whole = RelationWindow(1).add(student, teacher)
    monkeypatch.setattr("mpq_dm.trd._BLOCK_LOGITS", 40)  # two rows of 2 x 9 logits at a time

    torch.testing.assert_close(RelationWindow(1).add(student, teacher), whole)


def test_maps_become_tokens_and_tokens_stay():
    maps = torch.arange(12.0).reshape(1, 2, 2, 3)

    tokens = as_tokens(maps)

    assert tokens.shape == (1, 6, 2)
    assert tokens[0, 4].tolist() == [4.0, 10.0]
    assert as_tokens(tokens) is tokens


def test_the_feature_is_what_enters_the_output_layers(unet):
    tap = FeatureTap(unet)
    seen = []
    unet.up_blocks[-1].register_forward_hook(lambda *call: seen.append(call[2]))

    with torch.no_grad():
        unet(torch.zeros(1, 1, 8, 8), 0, class_labels=torch.tensor([0]))

    assert torch.equal(tap.take(), as_tokens(seen[0]))
    with pytest.raises(ConfigError, match="output layers were not called"):
        tap.take()


def test_a_model_without_output_layers_is_named():
    with pytest.raises(ConfigError, match="Identity has none of conv_norm_out, norm_out"):
        FeatureTap(nn.Identity())
