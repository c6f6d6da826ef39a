# SPDX-License-Identifier: Apache-2.0
"""The kernels of ``grouped.cu`` in Triton; importing this module needs triton.

A program takes TILE groups, one for each of its warps, or as many segments, or empty rows. Sums
have the order of ``grouped.cu`` whatever the launch: a row of a group is one chain of fused
multiply-adds, a segment 32 interleaved chains and a tree, a split row chains and a tree over its
parts. So results are deterministic and have the bits of the CUDA kernels. Strips need no kernel of
their own: the base of a group is a column of the whole matrix.

The factors alpha and beta arrive as the bits of float64 numbers: Triton would pass them as float32.
"""

import triton
import triton.language as tl

__all__ = ["INTERPRETED", "combine_parts", "grouped_product"]

WARP = tl.constexpr(32)
NOWHERE = tl.constexpr(0xFFFFFFFF)
AHEAD = tl.constexpr(4)
"""Elements of a row that are loaded before the first is added."""
VARYING = ["x", "y", "partial", "alpha", "beta", "rows", "groups", "segments", "empties", "split"]
"""Arguments whose values and alignment do not matter: one compiled kernel serves all of them."""


@triton.jit
def _unsigned(array):
    """Read integers as unsigned ones, whose bits torch may hold as signed: it has few unsigned."""
    BITS: tl.constexpr = array.dtype.element_ty.primitive_bitwidth
    return array.to(tl.pointer_type(tl.uint16 if BITS == 16 else tl.uint32), bitcast=True)


@triton.jit
def _factor(bits, array):
    """Return alpha or beta in the type of the values."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True).to(array.dtype.element_ty)


@triton.jit
def _item(tile, K: tl.constexpr, PACK: tl.constexpr):
    """Return element K of each pack; a pack is loaded at once and taken apart in registers."""
    if PACK == 1:
        return tl.reshape(tile, [tile.shape[0], tile.shape[1]])
    else:
        if PACK == 4:
            even, odd = tl.split(tl.reshape(tile, [tile.shape[0], tile.shape[1], 2, 2]))
            tile = even if K % 2 == 0 else odd
        first, second = tl.split(tile)
        return first if K < PACK // 2 else second


@triton.jit
def _add_packs(
    sums, x, stride, col, val, pack, left,
    PACK: tl.constexpr, UNIFORM: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Add one pack of elements to each sum.

    ``x`` points to the base column of each group, ``val`` to the values or is the only one if
    UNIFORM, ``pack`` counts packs from the first element, and ``left`` is the number of elements a
    row still has: PACK or more of each row if FULL.

    Shapes: ``sums`` (tile, lanes, columns), ``x`` (tile, 1), ``pack`` and ``left`` (tile, lanes).
    """
    at = pack[:, :, None] * PACK + tl.arange(0, PACK)[None, None, :]
    j = tl.arange(0, sums.shape[2])[None, None, :]
    active = left[:, :, None] > 0
    # Offsets and values are read once: they bypass the first-level cache, which x needs.
    if FULL:
        offsets = tl.load(col + at, cache_modifier=".cg")
    else:
        offsets = tl.load(col + at, mask=active, other=0, cache_modifier=".cg")
    if UNIFORM:
        values = val
    elif FULL:
        values = tl.load(val + at, cache_modifier=".cg")
    else:
        values = tl.load(val + at, mask=active, other=0, cache_modifier=".cg")
    for k in tl.static_range(PACK):
        column = _item(offsets, k, PACK).to(tl.int64)
        from_x = (x + column * stride)[:, :, None] + j
        value = values if UNIFORM else _item(values, k, PACK)[:, :, None]
        if FULL:
            sums = tl.fma(tl.load(from_x), value, sums)
        else:  # the last pack of a row may hold padding, whose column is not followed
            there = left[:, :, None] > k
            value = tl.where(there, value, 0.0)
            sums = tl.fma(tl.load(from_x, mask=there, other=0.0), value, sums)
    return sums


@triton.jit
def _tree(sums):
    """Add the lanes in pairs, farthest first, like a butterfly of shuffles.

    Shapes: ``sums`` (tile, lanes, columns) -> (tile, 1, columns).
    """
    TILE: tl.constexpr = sums.shape[0]
    LANES: tl.constexpr = sums.shape[1]
    COLUMNS: tl.constexpr = sums.shape[2]
    for level in tl.static_range(5):
        if LANES >> level > 1:
            sums = tl.sum(tl.reshape(sums, [TILE, 2, LANES >> (level + 1), COLUMNS]), axis=1)
    return sums


@triton.jit
def _write_rows(y, stride, alpha, beta, row, sums, mask):
    """Write alpha * sums + beta * y; nothing is read where beta is 0.

    Shapes: ``sums`` (tile, lanes, columns), ``row`` and ``mask`` (tile, lanes, 1).
    """
    at = y + row * stride + tl.arange(0, sums.shape[2])[None, None, :]
    old = tl.load(at, mask=tl.where(mask, beta, 0.0) != 0.0, other=0.0)
    tl.store(at, tl.fma(sums, alpha, beta * old), mask=mask)


@triton.jit
def _store(y, partial, stride, rows, alpha, beta, target, sums):
    """Send each sum to a row of y or to a partial sum.

    Shapes: ``sums`` (tile, lanes, columns), ``target`` (tile, lanes).
    """
    target = target[:, :, None].to(tl.int64)
    _write_rows(y, stride, alpha, beta, target, sums, target < rows)
    at = partial + (target - rows) * stride + tl.arange(0, sums.shape[2])[None, None, :]
    tl.store(at, sums, mask=(target >= rows) & (target < NOWHERE))


@triton.jit
def _sum_groups(
    x, stride, col, val, start, length, group_base, group, groups,
    PACK: tl.constexpr, UNIFORM: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Return the sums of groups, one row a lane.

    Lengths descend from lane to lane, so the lanes that are active in a step are the first ones,
    and their packs are neighbours in memory.

    Shapes: ``length`` (tile, 32), ``group`` (tile, 1) -> (tile, 32, columns).
    """
    CHAINS: tl.constexpr = AHEAD // PACK // COLUMNS if PACK * COLUMNS < AHEAD else 1
    used = group < groups
    first_x = x + tl.load(group_base + group, mask=used, other=0).to(tl.int64) * stride
    pack = tl.load(start + group, mask=used, other=0) // PACK + tl.arange(0, WARP)[None, :]
    sums = tl.zeros([length.shape[0], WARP, COLUMNS], val.dtype.element_ty)
    val = tl.load(val) if UNIFORM else val
    whole = tl.min(length) // (CHAINS * PACK) * (CHAINS * PACK)
    for _step in range(0, whole, CHAINS * PACK):  # all lanes are active and all packs are full
        for _chain in tl.static_range(CHAINS):
            sums = _add_packs(sums, first_x, stride, col, val, pack, length, PACK, UNIFORM, True)
            pack += WARP
    for step in range(whole, tl.max(length), PACK):
        left = length - step
        sums = _add_packs(sums, first_x, stride, col, val, pack, left, PACK, UNIFORM, False)
        pack += tl.sum((left > 0).to(tl.int32), axis=1)[:, None]
    return sums


@triton.jit
def _sum_segments(
    x, stride, col, val, segment_start, segment_base, segment, segments,
    UNIFORM: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Return the sums of segments of long rows.

    Shapes: ``segment`` (tile, 1) -> (tile, 1, columns).
    """
    used = segment < segments
    begin = tl.load(segment_start + segment, mask=used, other=0)
    size = (tl.load(segment_start + segment + 1, mask=used, other=0) - begin).to(tl.int32)
    first_x = x + tl.load(segment_base + segment, mask=used, other=0).to(tl.int64) * stride
    lane = tl.arange(0, WARP)[None, :]
    sums = tl.zeros([segment.shape[0], WARP, COLUMNS], val.dtype.element_ty)
    val = tl.load(val) if UNIFORM else val
    for step in range(0, tl.max(size), AHEAD * WARP):
        for ahead in tl.static_range(AHEAD):
            there = lane + (step + ahead * WARP)
            sums = _add_packs(
                sums, first_x, stride, col, val, begin + there, size - there, 1, UNIFORM, False
            )
    return _tree(sums)


@triton.jit(do_not_specialize=VARYING)
def grouped_product(
    x, y, partial, alpha: tl.int64, beta: tl.int64, stride, rows, groups, segments, empties,
    start, lengths, targets, group_base, segment_start, segment_target, segment_base, empty_rows,
    col, val,
    PACK: tl.constexpr, UNIFORM: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Compute everything that needs no order, in one launch.

    The first programs take TILE groups, the next TILE segments, the last 32 TILE empty rows.
    """
    col, segment_target = _unsigned(col), _unsigned(segment_target)
    alpha, beta = _factor(alpha, val), _factor(beta, val)
    lane = tl.arange(0, WARP)[None, :]
    program = tl.program_id(0).to(tl.int64)
    segment_programs = tl.cdiv(groups, TILE)
    empty_programs = segment_programs + tl.cdiv(segments, TILE)
    if program < segment_programs:
        group = program * TILE + tl.arange(0, TILE)[:, None]
        slot, within = group * WARP + lane, group < groups
        length = tl.load(_unsigned(lengths) + slot, mask=within, other=0).to(tl.int32)
        of_groups = _sum_groups(
            x, stride, col, val, start, length, _unsigned(group_base), group, groups,
            PACK, UNIFORM, COLUMNS,
        )  # fmt: skip
        to = tl.load(_unsigned(targets) + slot, mask=within, other=NOWHERE)
        _store(y, partial, stride, rows, alpha, beta, to, of_groups)
    elif program < empty_programs:
        segment = (program - segment_programs) * TILE + tl.arange(0, TILE)[:, None]
        sums = _sum_segments(
            x, stride, col, val, segment_start, _unsigned(segment_base), segment, segments,
            UNIFORM, COLUMNS,
        )  # fmt: skip
        target = tl.load(segment_target + segment, mask=segment < segments, other=NOWHERE)
        _store(y, partial, stride, rows, alpha, beta, target, sums)
    else:
        place = ((program - empty_programs) * TILE + tl.arange(0, TILE)[:, None]) * WARP + lane
        used = place < empties
        row = tl.load(_unsigned(empty_rows) + place, mask=used, other=0).to(tl.int64)
        nothing = tl.zeros([TILE, WARP, COLUMNS], val.dtype.element_ty)
        _write_rows(y, stride, 0.0, beta, row[:, :, None], nothing, used[:, :, None])


@triton.jit(do_not_specialize=VARYING)
def combine_parts(
    y, partial, alpha: tl.int64, beta: tl.int64, stride, split, split_rows, split_start,
    LANES: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Add the parts of each split row: LANES chains, then a tree."""
    place = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)[:, None]
    used = place < split
    begin = tl.load(split_start + place, mask=used, other=0)
    size = (tl.load(split_start + place + 1, mask=used, other=0) - begin).to(tl.int32)
    lane, j = tl.arange(0, LANES)[None, :], tl.arange(0, COLUMNS)[None, None, :]
    sums = tl.zeros([TILE, LANES, COLUMNS], partial.dtype.element_ty)
    for step in range(0, tl.max(size), LANES):
        part = partial + (begin + (step + lane))[:, :, None] * stride + j
        sums += tl.load(part, mask=(step + lane < size)[:, :, None], other=0.0)
    row = tl.load(_unsigned(split_rows) + place, mask=used, other=0)[:, :, None].to(tl.int64)
    alpha, beta = _factor(alpha, partial), _factor(beta, partial)
    _write_rows(y, stride, alpha, beta, row, _tree(sums), used[:, :, None])


INTERPRETED = not isinstance(grouped_product, triton.runtime.JITFunction)
"""Whether the kernels run on the CPU, one program after another, instead of being compiled."""
