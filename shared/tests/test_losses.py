# SPDX-License-Identifier: Apache-2.0
import itertools
import math

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from tenfold_core.errors import ConfigError, InputError  # noqa: E402
from tenfold_core.losses import cosine_distance, reduce_terms, reference, relation_kl  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

REDUCTIONS = ("none", "sum", "batchmean", "rows", "mean")


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def pair(batch=2, tokens=5, channels=3, *, seed=0, dtype=torch.float64, width=None):
    generator = seeded(seed)
    student = torch.randn(batch, tokens, channels, generator=generator, dtype=dtype)
    teacher = torch.randn(batch, tokens, width or channels, generator=generator, dtype=dtype)
    return student, teacher


def value_and_gradient(student, *rest, **settings):
    student = student.clone().requires_grad_()
    value = relation_kl(student, *rest, **settings)
    (gradient,) = torch.autograd.grad(value, student)
    return value.detach(), gradient


def test_two_pixels_give_the_divergence_worked_by_hand():
    # teacher rows softmax(1, 0) = (0.731059, 0.268941) and its mirror; student rows (0.5, 0.5):
    # KL = 0.731059 ln(0.731059 / 0.5) + 0.268941 ln(0.268941 / 0.5) = 0.110944
    teacher = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    student = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    rows = relation_kl(student, teacher, reduction="none")
    torch.testing.assert_close(rows, torch.full((1, 2, 1), 0.110944), atol=1e-6, rtol=0)
    # the other direction is ln cosh 0.5 = 0.120115
    swapped = relation_kl(teacher, student, reduction="rows")
    torch.testing.assert_close(swapped, torch.tensor(0.120115), atol=1e-6, rtol=0)


def test_two_frames_give_the_mean_over_every_element():
    # teacher cosines I; student off-diagonal sqrt(1/2): row KL 0.053953, over 2 keys 0.0269766
    teacher = torch.eye(2)[None]
    student = torch.tensor([[[1.0, 0.0], [1.0, 1.0]]])
    value = relation_kl(student, teacher, reduction="mean")
    torch.testing.assert_close(value, torch.tensor(0.0269766), atol=1e-6, rtol=0)


def test_two_memory_rows_give_the_divergence_worked_by_hand():
    # logits (10, 0) of the student against (0, 10): 10 tanh 5 = 9.999092
    student, teacher = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]])
    value = relation_kl(student, teacher, memory=torch.eye(2), tau=0.1)
    torch.testing.assert_close(value, torch.tensor(9.999092), atol=1e-5, rtol=0)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("keys", ["own", "batch", "memory"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("chunk", [None, 2])
def test_every_form_agrees_with_the_loops(reduction, keys, masked, chunk):
    student, teacher = pair(3, 5, 4)
    settings = {"tau": 0.3, "reduction": reduction}
    if keys == "batch":
        settings |= {"student_keys": student, "teacher_keys": teacher}
    if keys == "memory":
        settings["memory"] = torch.randn(7, 4, generator=seeded(1), dtype=torch.float64)
    if masked:
        settings["mask"] = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
    found = relation_kl(student, teacher, chunk=chunk, **settings)
    expected = reference.relation_kl(student, teacher, **settings)
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_tokens_may_keep_their_lengths():
    student, teacher = pair(3, 5, 4)
    found = relation_kl(student, teacher, normalize=False, chunk=2)
    expected = reference.relation_kl(student, teacher, normalize=False)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    assert found != relation_kl(student, teacher)


@pytest.mark.parametrize("keys", ["own", "other", "memory"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("chunk", [1, 2, 3, 64])
def test_blocks_give_the_dense_value_and_gradient(keys, masked, chunk):
    student, teacher = pair(2, 7, 3, width=5 if keys != "memory" else 3)
    student_keys = torch.randn(3, 4, 3, generator=seeded(2), dtype=torch.float64)
    settings = {"tau": 0.5}
    if keys == "other":
        settings["teacher_keys"] = torch.randn(3, 4, 5, generator=seeded(3), dtype=torch.float64)
    if keys == "memory":
        settings["memory"] = torch.randn(6, 3, generator=seeded(3), dtype=torch.float64)
    if masked:
        settings["mask"] = torch.rand(2, 7, generator=seeded(4)) > 0.4
    gradients = {}
    for size in (None, chunk):
        leaves = [student.clone().requires_grad_(), student_keys.clone().requires_grad_()]
        if keys == "other":
            settings["student_keys"] = leaves[1]
        value = relation_kl(leaves[0], teacher, chunk=size, **settings)
        wanted = leaves if keys == "other" else leaves[:1]
        gradients[size] = (value, *torch.autograd.grad(value, wanted))
    for dense, blocks in zip(*gradients.values(), strict=True):
        torch.testing.assert_close(blocks, dense, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("scope", ["own", "batch", "memory"])
def test_the_gradient_is_the_finite_difference(normalize, chunk, scope):
    student, teacher = pair(2, 3, 2)
    memory = torch.randn(4, 2, generator=seeded(5), dtype=torch.float64)

    def loss(tokens):
        settings = {"tau": 0.4, "normalize": normalize, "chunk": chunk}
        if scope == "batch":
            settings |= {"student_keys": tokens, "teacher_keys": teacher}
        if scope == "memory":
            settings["memory"] = memory
        return relation_kl(tokens, teacher, **settings)

    assert torch.autograd.gradcheck(loss, (student.requires_grad_(),))


def test_the_logits_gradient_is_the_difference_of_the_distributions():
    # with keys = identity and no normalisation a token is its row of logits
    student, teacher = pair(1, 4, 6)
    eye = torch.eye(6, dtype=torch.float64)
    _, gradient = value_and_gradient(
        student, teacher, memory=eye, normalize=False, tau=0.7, chunk=3
    )
    expected = ((student / 0.7).softmax(-1) - (teacher / 0.7).softmax(-1)) / 0.7
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("chunk", [None, 2])
def test_only_the_student_receives_a_gradient(chunk):
    student, teacher = (side.requires_grad_() for side in pair())
    keys_s, keys_t = (side.requires_grad_() for side in pair(2, 3, 3, seed=1))
    memory = torch.randn(4, 3, dtype=torch.float64, generator=seeded(2)).requires_grad_()
    relation_kl(student, teacher, student_keys=keys_s, teacher_keys=keys_t, chunk=chunk).backward()
    assert student.grad.abs().sum() > 0
    assert keys_s.grad.abs().sum() > 0
    relation_kl(student, teacher, memory=memory, chunk=chunk).backward()
    cosine_distance(student, teacher).backward()
    assert teacher.grad is None
    assert keys_t.grad is None
    assert memory.grad is None


@pytest.mark.parametrize("chunk", [None, 2])
def test_keys_alone_may_learn(chunk):
    student, teacher = pair()
    keys = student.clone().requires_grad_()
    relation_kl(student, teacher, student_keys=keys, teacher_keys=teacher, chunk=chunk).backward()
    assert keys.grad.abs().sum() > 0


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements of any tensor an operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(item, torch.Tensor):
                self.elements = max(self.elements, item.numel())
        return result


@pytest.mark.parametrize("scope", ["own", "batch"])
def test_blocks_never_hold_a_whole_map(scope):
    student, teacher = pair(2, 256, 4, dtype=torch.float32)
    largest = {}
    for chunk in (None, 8):
        with LargestTensor() as seen:
            tokens = student.clone().requires_grad_()
            keys = {"student_keys": tokens, "teacher_keys": teacher} if scope == "batch" else {}
            relation_kl(tokens, teacher, chunk=chunk, **keys).backward()
        largest[chunk] = seen.elements
    maps = {"own": 2, "batch": 4}[scope]
    assert largest[None] == maps * 256 * 256
    # own: a block of 8 rows of both samples; batch: 8 rows against both groups of keys
    assert largest[8] == 2 * 8 * 256


def test_what_blocks_save_for_backward_grows_with_the_tokens_only():
    student, teacher = pair(1, 128, 4, dtype=torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor.numel()) or tensor, lambda tensor: tensor
    ):
        relation_kl(student.requires_grad_(), teacher, chunk=8)
    assert max(saved) == 128 * 4


@pytest.mark.parametrize("reduction", ["sum", "batchmean", "rows", "mean"])
@pytest.mark.parametrize("chunk", [None, 1])
def test_drawn_rows_are_unbiased(reduction, chunk):
    student, teacher = pair(2, 4, 3)
    whole = value_and_gradient(student, teacher, reduction=reduction)
    # all six pairs of the four positions are equally likely: enumerate what the draw can give
    drawn = {}
    for seed in itertools.count():
        index = tuple(sorted(torch.randperm(4, generator=seeded(seed))[:2].tolist()))
        settings = {"rows": 2, "generator": seeded(seed), "reduction": reduction, "chunk": chunk}
        drawn.setdefault(index, value_and_gradient(student, teacher, **settings))
        if len(drawn) == 6:
            break
    for expected, values in zip(whole, zip(*drawn.values(), strict=True), strict=True):
        torch.testing.assert_close(torch.stack(values).mean(0), expected)
    assert len({float(value) for value, _ in drawn.values()}) == 6


def test_drawn_rows_meet_every_memory_row_and_repeat_with_their_seed():
    student, teacher = pair(2, 6, 3)
    memory = torch.randn(9, 3, dtype=torch.float64, generator=seeded(6))
    first, again = (
        relation_kl(student, teacher, memory=memory, rows=2, generator=seeded(7)) for _ in range(2)
    )
    index = torch.randperm(6, generator=seeded(7))[:2]
    kept = relation_kl(student[:, index], teacher[:, index], memory=memory)
    assert first == again
    torch.testing.assert_close(first, 3 * kept)


def test_as_many_drawn_rows_as_tokens_are_all_of_them():
    student, teacher = pair()
    drawn = relation_kl(student, teacher, rows=5, generator=seeded(0))
    assert drawn == relation_kl(student, teacher)


def test_a_masked_token_is_as_good_as_absent():
    student, teacher = pair(1, 5, 3)
    mask = torch.tensor([[True, False, True, True, False]])
    value, gradient = value_and_gradient(student, teacher, mask=mask)
    shorter = relation_kl(student[mask][None], teacher[mask][None])
    torch.testing.assert_close(value, shorter)
    assert not gradient[~mask].any()
    assert gradient[mask].all()


@pytest.mark.parametrize("chunk", [None, 2])
def test_a_token_of_no_length_has_neither_relations_nor_gradient(chunk):
    student, teacher = pair(1, 4, 3)
    student[0, 1] = 0
    value, gradient = value_and_gradient(student, teacher, chunk=chunk)
    assert value.isfinite()
    assert gradient.isfinite().all()
    assert not gradient[0, 1].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("chunk", [None, 2])
def test_half_precision_and_autocast_compute_in_float32(dtype, chunk):
    student, teacher = (side.to(dtype) for side in pair())
    expected, gradient = value_and_gradient(student.float(), teacher.float(), chunk=chunk)
    student.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = relation_kl(student, teacher, chunk=chunk)
    found.backward()
    assert found.dtype == torch.float32
    assert torch.equal(found.detach(), expected)
    assert torch.equal(student.grad, gradient.to(dtype))


def test_sides_and_keys_of_several_dtypes_meet_in_the_students():
    student, teacher = pair(dtype=torch.float32)
    memory = torch.randn(4, 3, generator=seeded(1))
    expected = relation_kl(student, teacher, memory=memory)
    torch.testing.assert_close(
        relation_kl(student, teacher.double(), memory=memory.double(), chunk=2), expected
    )


shapes = st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 4))


@given(shapes, st.integers(0, 99), st.sampled_from([0.1, 1.0, 3.0]))
def test_the_divergence_is_never_negative_and_zero_for_equal_relations(shape, seed, tau):
    student, teacher = pair(*shape, seed=seed)
    assert relation_kl(student, teacher, tau=tau, reduction="none").min() > -1e-12
    # scale of each token and a common rotation leave the cosines alone
    rotation, _ = torch.linalg.qr(
        torch.randn(shape[2], shape[2], generator=seeded(seed), dtype=torch.float64)
    )
    lengths = torch.rand(*shape[:2], 1, generator=seeded(seed), dtype=torch.float64) + 0.1
    same = relation_kl(teacher @ rotation * lengths, teacher, tau=tau)
    torch.testing.assert_close(same, torch.zeros_like(same), atol=1e-12, rtol=0)


@given(shapes, st.integers(0, 99))
def test_the_order_of_tokens_and_samples_does_not_matter(shape, seed):
    student, teacher = pair(*shape, seed=seed)
    tokens = torch.randperm(shape[1], generator=seeded(seed))
    samples = torch.randperm(shape[0], generator=seeded(seed))
    moved = relation_kl(student[samples][:, tokens], teacher[samples][:, tokens])
    torch.testing.assert_close(moved, relation_kl(student, teacher))


@given(shapes, st.integers(0, 99), st.integers(1, 9))
def test_blocks_of_any_size_agree(shape, seed, chunk):
    student, teacher = pair(*shape, seed=seed)
    dense, blocks = (value_and_gradient(student, teacher, chunk=size) for size in (None, chunk))
    torch.testing.assert_close(blocks, dense, rtol=1e-9, atol=1e-12)


def test_one_sample_against_itself_is_the_batch_of_one():
    student, teacher = pair(1)
    batch = relation_kl(student, teacher, student_keys=student, teacher_keys=teacher)
    torch.testing.assert_close(batch, relation_kl(student, teacher))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_cosine_distance_agrees_with_the_loops(reduction):
    student, teacher = pair(3, 4, 5)
    student[0, 0] = 0
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]]).bool()
    for settings in ({}, {"mask": mask}):
        found = cosine_distance(student, teacher, reduction=reduction, **settings)
        expected = reference.cosine_distance(student, teacher, reduction=reduction, **settings)
        expected = torch.tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(found.flatten(), expected.flatten())


def test_cosine_distance_takes_channels_from_any_axis_but_the_batch():
    student, teacher = pair(2, 4, 5)
    last = cosine_distance(student, teacher, reduction="none")
    moved = cosine_distance(student.mT, teacher.mT, dim=1, reduction="none")
    torch.testing.assert_close(moved, last)
    # (3, 4) and (4, 3): 24 / 25
    value = cosine_distance(torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, 3.0]]), dim=1)
    torch.testing.assert_close(value, torch.tensor(0.04))


def test_cosine_distance_has_the_finite_differences_gradient():
    student, teacher = pair()
    assert torch.autograd.gradcheck(
        lambda tokens: cosine_distance(tokens, teacher), (student.requires_grad_(),)
    )


@pytest.mark.parametrize(
    ("reduction", "plain", "masked"),
    # terms 1 + 3 + 5 + 7 of two samples; the mask keeps 1 and 7; each term sums up 4 elements
    [("sum", 16, 8), ("batchmean", 8, 4), ("rows", 4, 4), ("mean", 1, 1)],
)
def test_reductions_by_hand(reduction, plain, masked):
    terms, mask = torch.tensor([[1.0, 3.0], [5.0, 7.0]]), torch.eye(2).bool()
    assert reduce_terms(terms, reduction, elements=4) == plain
    assert reduce_terms(terms, reduction, elements=4, mask=mask) == masked
    assert reduce_terms(terms, reduction, mask=torch.zeros(2, 2).bool()) == 0


def test_a_mask_hides_even_a_nan():
    terms = torch.tensor([[1.0, math.nan]])
    assert reduce_terms(terms, "none", mask=torch.tensor([[True, False]])).tolist() == [[1, 0]]


TOKENS = torch.ones(2, 3, 4)


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"tau": 0.0}, ConfigError, r"tau is 0\.0, expected a positive"),
        ({"tau": math.nan}, ConfigError, "tau is nan"),
        ({"chunk": 0}, ConfigError, "chunk is 0, expected at least 1"),
        ({"rows": 0}, ConfigError, "rows is 0, expected at least 1"),
        ({"rows": 2}, ConfigError, "rows is 2 without a generator"),
        ({"rows": 2, "generator": torch.Generator(), "reduction": "none"}, ConfigError, "'none'"),
        ({"student_keys": TOKENS}, ConfigError, "come together"),
        (
            {"student_keys": TOKENS, "teacher_keys": TOKENS, "memory": TOKENS[0]},
            ConfigError,
            "exclude each other",
        ),
    ],
)
def test_settings_that_make_no_sense_are_named(settings, error, match):
    with pytest.raises(error, match=match):
        relation_kl(TOKENS, TOKENS, **settings)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("student", "teacher", "settings", "match"),
    [
        (TOKENS[0], TOKENS[0], {}, r"student has shape \(3, 4\)"),
        (TOKENS, TOKENS[:, :2], {}, r"teacher \(2, 2, 4\)"),
        (TOKENS[:0], TOKENS[:0], {}, "nothing to relate"),
        (TOKENS, TOKENS.long(), {}, r"teacher is torch\.int64"),
        (TOKENS, TOKENS.to("meta"), {}, "teacher is on meta, student on cpu"),
        (TOKENS, TOKENS, {"memory": TOKENS}, r"memory has shape \(1, 2, 3, 4\)"),
        (TOKENS, TOKENS, {"memory": TOKENS[0, :, :2]}, r"expected \(groups, keys, 4\)"),
        (TOKENS, TOKENS[..., :2], {"memory": TOKENS[0]}, r"expected \(groups, keys, 2\)"),
        (
            TOKENS,
            TOKENS,
            {"student_keys": TOKENS, "teacher_keys": TOKENS[:1]},
            "same groups and keys",
        ),
        (TOKENS, TOKENS, {"mask": torch.ones(2, 4).bool()}, r"mask has shape \(2, 4\)"),
        (TOKENS, TOKENS, {"mask": torch.ones(2, 3)}, r"dtype torch\.float32"),
    ],
)
def test_tensors_that_do_not_fit_are_named(student, teacher, settings, match):
    with pytest.raises(InputError, match=match):
        relation_kl(student, teacher, **settings)


@pytest.mark.bad_input
def test_other_functions_name_what_does_not_fit():
    with pytest.raises(InputError, match="compares them vector by vector"):
        cosine_distance(TOKENS, TOKENS[:1])
    with pytest.raises(ConfigError, match="dim is 0"):
        cosine_distance(TOKENS, TOKENS, dim=0)
    with pytest.raises(ConfigError, match="dim is 3"):
        cosine_distance(TOKENS, TOKENS, dim=3)
    with pytest.raises(ConfigError, match="expected one of none, sum"):
        reduce_terms(TOKENS, "median")
    with pytest.raises(ConfigError, match="elements is 0"):
        reduce_terms(TOKENS, "mean", elements=0)
    with pytest.raises(InputError, match=r"mask has shape \(2, 3\)"):
        reduce_terms(TOKENS, "mean", mask=torch.ones(2, 3).bool())
    with pytest.raises(InputError, match=r"dtype torch\.float32"):
        reduce_terms(TOKENS, "mean", mask=TOKENS)
