# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from hbp_spmv.schedule import cut, published_allocation, published_block
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from tenfold_core.errors import ConfigError

WORK = st.lists(st.integers(0, 1000), max_size=300).map(np.array)


def fixed_runs(a):
    """List the blocks of the fixed runs: warp w takes b block rows of strip w mod C."""
    blocks = []
    for warp in range(a.warps):
        first = warp // a.strips * a.run
        last = min(first + a.run, a.block_rows)
        blocks += [(row, warp % a.strips) for row in range(first, last)]
    return blocks


@given(WORK, st.integers(1, 70), st.sampled_from([0.0, 0.3, 0.8, 1.0]))
def test_every_unit_lies_in_one_chunk_and_every_chunk_in_one_queue(work, workers, fixed_share):
    chunks = cut(work, workers, fixed_share=fixed_share)
    assert chunks.bounds.dtype == chunks.queues.dtype == np.int64
    assert chunks.bounds[0] == 0
    assert chunks.bounds[-1] == len(work)
    assert (np.diff(chunks.bounds) >= 0).all()
    assert len(chunks.queues) == workers + 2
    assert chunks.queues[0] == 0
    assert chunks.queues[-1] == len(chunks.bounds) - 1
    assert (np.diff(chunks.queues) >= 0).all()


def test_shares_by_hand():
    # 100 units of work 1, two workers: 80 % in two runs of 4 chunks of 10, 20 % in 8 chunks of 2.5
    chunks = cut(np.ones(100, int), 2, fixed_share=0.8)
    assert chunks.queues.tolist() == [0, 4, 8, 16]
    assert chunks.bounds[:9].tolist() == [0, 10, 20, 30, 40, 50, 60, 70, 80]
    assert chunks.bounds[9:].tolist() == [83, 85, 88, 90, 93, 95, 98, 100]


def test_a_static_schedule_has_no_tickets_and_a_dynamic_one_only_tickets():
    static, dynamic = (cut(np.ones(64, int), 4, fixed_share=share) for share in (1.0, 0.0))
    assert static.queues.tolist() == [0, 4, 8, 12, 16, 16]
    assert dynamic.queues.tolist() == [0, 0, 0, 0, 0, 16]


def test_one_worker_gets_one_chunk():
    chunks = cut(np.arange(9), 1)
    assert chunks.bounds.tolist() == [0, 9]
    assert chunks.queues.tolist() == [0, 1, 1]


@given(st.integers(0, 2**32 - 1), st.integers(2, 16))
def test_no_chunk_exceeds_its_share_by_more_than_one_unit(seed, workers):
    work = np.random.default_rng(seed).zipf(1.7, 400).clip(max=5000)
    chunks = cut(work, workers, fixed_share=0.8)
    sums = np.diff(np.concatenate([[0], np.cumsum(work)])[chunks.bounds])
    assert sums.max() <= 0.8 * work.sum() / (4 * workers) + work.max()


def test_work_without_cost_is_still_handed_out():
    chunks = cut(np.zeros(7, int), 3)
    assert int(np.diff(chunks.bounds).sum()) == 7


def test_nothing_to_do():
    assert not cut(np.empty(0, int), 3).bounds.any()


@pytest.mark.parametrize("workers", [0, -2])
def test_workers_must_be_positive(workers):
    with pytest.raises(ConfigError, match=f"workers: expected at least 1, got {workers}"):
        cut(np.ones(3), workers)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_the_fixed_share_is_a_share(share):
    with pytest.raises(ConfigError, match=r"fixed_share: expected a value in 0\.\.1"):
        cut(np.ones(3), 2, fixed_share=share)


def test_published_figures_of_order_321821():
    # R = ceil(321821 / 512), C = ceil(321821 / 4096)
    a = published_allocation(629, 79, 256)
    assert (a.teams, a.run, a.full, a.wide) == (4, 157, 3, 60)
    assert a.competitive == 9499
    assert a.block_rows * a.strips == 49_691


def test_published_arithmetic_covers_order_321821_exactly_once():
    a = published_allocation(629, 79, 256)
    blocks = fixed_runs(a) + [published_block(a, ticket) for ticket in range(a.competitive)]
    assert len(blocks) == len(set(blocks)) == 49_691
    rows, strips = np.array(blocks).T
    assert_array_equal(np.unique(rows), np.arange(629))
    assert_array_equal(np.unique(strips), np.arange(79))


def test_published_arithmetic_when_the_last_team_is_short():
    # T = 2, b = 2, F = 2: 1 of 5 block rows is left, fewer than b; res = 8*5 - 2*2*8 - 0*1 = 8
    a = published_allocation(5, 8, 16)
    assert (a.teams, a.run, a.full, a.competitive) == (2, 2, 2, 8)
    blocks = fixed_runs(a) + [published_block(a, ticket) for ticket in range(a.competitive)]
    assert len(blocks) == len(set(blocks)) == 40


@pytest.mark.parametrize(("block_rows", "strips"), [(255, 1), (1, 1), (3, 79), (63, 4)])
def test_published_arithmetic_divides_by_zero_on_narrow_matrices(block_rows, strips):
    with pytest.raises(ConfigError, match=r"divides by zero here.*schedule='mixed'"):
        published_allocation(block_rows, strips)


@pytest.mark.parametrize(("block_rows", "strips", "wrong"), [(125, 4, 4), (76, 16, 64)])
def test_published_arithmetic_repeats_and_skips_blocks(block_rows, strips, wrong):
    a = published_allocation(block_rows, strips)
    blocks = fixed_runs(a) + [published_block(a, ticket) for ticket in range(a.competitive)]
    inside = {(row, strip) for row, strip in blocks if row < block_rows}
    assert block_rows * strips - len(inside) == wrong
