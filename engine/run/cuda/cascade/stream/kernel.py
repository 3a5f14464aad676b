"""The chunk kernel for Hopper, in Gluon: keys and values stream through the bulk copy engine ahead of the arithmetic.

    one producer warp        waits for empty -> copies K, V blocks of item after item into a ring of stages
    1 or 2 warpgroups        64 packed rows each, sharing the ring; per block, asynchronously:

        tensor cores   S1 = Q K1'  O += P0 V0   S2 = Q K2'  O += P1 V1
        the rest           softmax(S1) -> P1        softmax(S2) -> P2        (while O += P V runs)

The producer runs on into the next item while the last one is finished. Blocks of an item go from its last, the only
one that may be ragged, to its first: the mask stays out of the loop. Behind a ragged end, values are overwritten by
zeros in shared memory, so that nothing beyond a chunk is ever summed. Items are splits of chunks (neighbouring slots,
one copy a block) and of tails (one copy a page, where their slots are no neighbours).

``CAUSAL``: rows of a tail with several new ones see a part each of what their tile reads. Blocks that a row does not
see come before its own last block, and leave its maximum, sum and output as they were (-inf, 0, 0): it has the bits
that it has as the only new row of its tail, which needs no mask per row and takes the loop without one.

``WINDOW``: rows do not see what comes before their first token. Blocks lie where they lie without, and an item's first
is the one that holds the first token that a row of its tile sees; what lies before that in it becomes zeros in shared
memory too. Blocks before a row's own first come behind its others and leave its results as they are, to the bit.

Heads whose width is no power of two are padded: a copy brings some of the next head along (zeros behind the last
one), which zeros in the queries take out of the scores, and which is not stored.

Importing this module needs Triton with Gluon; running it, compute capability 9.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.language.extra.cuda import gdc_launch_dependents

from engine.run.cuda.cascade.stream.consume import consume
from engine.run.cuda.cascade.stream.items import ROWS
from engine.run.cuda.cascade.stream.produce import produce

PRODUCER_REGISTERS = gl.constexpr(40)
CONSUMER_REGISTERS = gl.constexpr(232)  # two warpgroups; a single one gets what is left


@gluon.jit(do_not_specialize=["class_index"])
def stream(
    q, q_stride, key_blocks, value_blocks, key_pages, value_pages, lists, dynamic, class_index, cos, sin,
    partial_out, partial_lse, scale, squeeze,
    TURN: gl.constexpr, RATIO: gl.constexpr, KV_HEADS: gl.constexpr, K_DIM: gl.constexpr, V_DIM: gl.constexpr,
    K_BLOCK: gl.constexpr, V_BLOCK: gl.constexpr, FIRST: gl.constexpr, TURN_PAIRS: gl.constexpr,
    INTERLEAVED: gl.constexpr, GROUPS: gl.constexpr, N: gl.constexpr, PAGE: gl.constexpr, STAGES: gl.constexpr,
    OVERLAP: gl.constexpr, BACKWARDS: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, SOFTCAP: gl.constexpr,
):  # fmt: skip
    """All items of one tile class, of 64 * GROUPS packed rows, GROUPS 1 or 2. 4 warps."""
    if OVERLAP:
        gdc_launch_dependents()
    k_smem = gl.allocate_shared_memory(key_blocks.dtype, [STAGES, N, K_BLOCK], key_blocks.layout)
    v_smem = gl.allocate_shared_memory(value_blocks.dtype, [STAGES, N, V_BLOCK], value_blocks.layout)
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, K_BLOCK], key_blocks.dtype)
    q_smem = gl.allocate_shared_memory(key_blocks.dtype, [GROUPS, ROWS, K_BLOCK], q_layout)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=GROUPS)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=GROUPS)
    fence_async_shared()
    # The tuples stand inside the calls: assigned to a name, their compile-time constants would become values.
    if GROUPS == 1:
        gl.warp_specialize([
            (consume, (
                q, q_stride, lists, dynamic, class_index, cos, sin, partial_out, partial_lse, scale, squeeze,
                q_smem.index(0), k_smem, v_smem, k_full, k_empty, v_full, v_empty, 0,
                TURN, RATIO, KV_HEADS, K_DIM, V_DIM, K_BLOCK, V_BLOCK, FIRST, TURN_PAIRS, INTERLEAVED, N, STAGES,
                OVERLAP, BACKWARDS, CAUSAL, WINDOW, SOFTCAP,
            )),
            (produce, (
                key_blocks, value_blocks, key_pages, value_pages, lists, dynamic, class_index,
                k_smem, v_smem, k_full, k_empty, v_full, v_empty, KV_HEADS, K_DIM, V_DIM, N, PAGE, STAGES, OVERLAP,
                BACKWARDS, WINDOW,
            )),
        ], [1], [PRODUCER_REGISTERS])  # fmt: skip
    else:
        gl.warp_specialize([
            (consume, (
                q, q_stride, lists, dynamic, class_index, cos, sin, partial_out, partial_lse, scale, squeeze,
                q_smem.index(0), k_smem, v_smem, k_full, k_empty, v_full, v_empty, 0,
                TURN, RATIO, KV_HEADS, K_DIM, V_DIM, K_BLOCK, V_BLOCK, FIRST, TURN_PAIRS, INTERLEAVED, N, STAGES,
                OVERLAP, BACKWARDS, CAUSAL, WINDOW, SOFTCAP,
            )),
            (consume, (
                q, q_stride, lists, dynamic, class_index, cos, sin, partial_out, partial_lse, scale, squeeze,
                q_smem.index(1), k_smem, v_smem, k_full, k_empty, v_full, v_empty, 1,
                TURN, RATIO, KV_HEADS, K_DIM, V_DIM, K_BLOCK, V_BLOCK, FIRST, TURN_PAIRS, INTERLEAVED, N, STAGES,
                OVERLAP, BACKWARDS, CAUSAL, WINDOW, SOFTCAP,
            )),
            (produce, (
                key_blocks, value_blocks, key_pages, value_pages, lists, dynamic, class_index,
                k_smem, v_smem, k_full, k_empty, v_full, v_empty, KV_HEADS, K_DIM, V_DIM, N, PAGE, STAGES, OVERLAP,
                BACKWARDS, WINDOW,
            )),
        ], [4, 1], [CONSUMER_REGISTERS, PRODUCER_REGISTERS])  # fmt: skip
