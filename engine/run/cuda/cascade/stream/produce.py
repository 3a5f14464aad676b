"""The producer: one warp that copies what the warpgroups read into the ring, ahead of them."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.language.extra.cuda import gdc_wait

from engine.run.cuda.cascade import records
from engine.run.cuda.cascade.stream.items import grid_of, item_at, items_of, unit_at, units_of

AT_PAGES = gl.constexpr(records.AT_PAGES)


@gluon.jit
def produce(
    key_blocks, value_blocks, key_pages, value_pages, lists, dynamic, class_index,
    k_smem, v_smem, k_full, k_empty, v_full, v_empty,
    KV_HEADS: gl.constexpr, K_DIM: gl.constexpr, V_DIM: gl.constexpr, N: gl.constexpr, PAGE: gl.constexpr,
    STAGES: gl.constexpr, OVERLAP: gl.constexpr, BACKWARDS: gl.constexpr, WINDOW: gl.constexpr,
):  # fmt: skip
    """One warp: copies the blocks of every item of this program, as stages become empty."""
    pages_at = gl.load(lists + dynamic + AT_PAGES)
    step = 0
    static_items, items, static_at, dynamic_at = items_of(lists, dynamic, class_index)
    if OVERLAP:
        gdc_wait()
    units = units_of(items * KV_HEADS)
    for unit in range(units):
        index = unit_at(unit, units, BACKWARDS)
        item = item_at(index // KV_HEADS, lists, static_items, static_at, dynamic_at)
        k_column = index % KV_HEADS * K_DIM
        v_column = index % KV_HEADS * V_DIM
        source = gl.load(item + 3)
        begin = gl.load(item + 4)
        end = gl.load(item + 6)
        grid = grid_of(begin, N, WINDOW)
        blocks = (end - grid + N - 1) // N
        for back in range(1, blocks + 1):
            first = grid + (blocks - back) * N
            at = step % STAGES
            empty = (step // STAGES & 1) ^ 1
            if source >= 0:
                slot = source + first
                mbarrier.wait(k_empty.index(at), empty)
                mbarrier.expect(k_full.index(at), key_blocks.block_type.nbytes)
                tma.async_copy_global_to_shared(key_blocks, [slot, k_column], k_full.index(at), k_smem.index(at))
                mbarrier.wait(v_empty.index(at), empty)
                mbarrier.expect(v_full.index(at), value_blocks.block_type.nbytes)
                tma.async_copy_global_to_shared(value_blocks, [slot, v_column], v_full.index(at), v_smem.index(at))
            else:
                table = lists + pages_at + ~source
                _copy_pages(key_pages, table, first, begin, end, k_column, k_full.index(at), k_empty.index(at), empty,
                            k_smem.index(at), N, PAGE, WINDOW)  # fmt: skip
                _copy_pages(value_pages, table, first, begin, end, v_column, v_full.index(at), v_empty.index(at), empty,
                            v_smem.index(at), N, PAGE, WINDOW)  # fmt: skip
            step += 1


@gluon.jit
def _copy_pages(
    pages, table, first, begin, end, column, full, empty, phase, block, N: gl.constexpr, PAGE: gl.constexpr,
    WINDOW: gl.constexpr,
):  # fmt: skip
    """Pages of tokens ``first .. first + N - 1`` into a block; behind the last page, that page again.

    If WINDOW, pages before that of ``begin``, which may be another's by now, are that of ``begin``.
    """
    last = (end - 1) // PAGE
    mbarrier.wait(empty, phase)
    mbarrier.expect(full, pages.block_type.nbytes * (N // PAGE))
    for i in gl.static_range(N // PAGE):
        wanted = gl.minimum(first // PAGE + i, last)
        if WINDOW:
            wanted = gl.maximum(wanted, begin // PAGE)
        page = gl.load(table + wanted)
        tma.async_copy_global_to_shared(pages, [page * PAGE, column], full, block.slice(i * PAGE, PAGE))
