"""The merge of partial results that lie anywhere, in Triton. Importing this module needs Triton."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def merge_listed(
    outs, lses, starts, order, sum_out, sum_lse, sinks, out,
    HEADS: tl.constexpr, D: tl.constexpr, OUT_D: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr,
    FIRST: tl.constexpr, LAST: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """Programs (row, head): the row's results, PARTS at a time, in the order of ``order[starts[row]:starts[row + 1]]``.

    ``outs`` (results, HEADS, OUT_D) of which D dimensions count, ``lses`` (results, HEADS) fp32 base 2. Unless
    ``FIRST``, what ``sum_out`` (rows, HEADS, D) fp32 and ``sum_lse`` hold goes first; unless ``LAST``, the sum goes
    there instead of to ``out`` (rows, HEADS, D). ``SINKS``: (HEADS,) fp32, natural, scores of a key without a value.
    """
    row = tl.program_id(0)
    head = tl.program_id(1)
    dim = tl.arange(0, WIDTH)
    inside = dim < D
    mine = row * HEADS + head
    top = float("-inf")
    total = 0.0
    acc = tl.zeros([WIDTH], tl.float32)
    if not FIRST:
        top = tl.load(sum_lse + mine)
        total = tl.where(top == float("-inf"), 0.0, 1.0)
        acc = tl.load(sum_out + mine.to(tl.int64) * D + dim, mask=inside, other=0.0)
    begin = tl.load(starts + row)
    end = tl.load(starts + row + 1)
    for at in range(begin, end, PARTS):
        part = at + tl.arange(0, PARTS)
        known = part < end
        from_ = tl.load(order + part, mask=known, other=0) * HEADS + head
        lse = tl.load(lses + from_, mask=known, other=float("-inf"))
        seen = lse > float("-inf")  # a result over no key has none, and its values are not to be looked at
        x = tl.load(
            outs + from_.to(tl.int64)[:, None] * OUT_D + dim[None, :], mask=seen[:, None] & inside[None, :], other=0.0
        )
        new_top = tl.maximum(top, tl.max(lse, 0))
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        weight = tl.exp2(lse - safe)
        keep = tl.exp2(top - safe)
        total = total * keep + tl.sum(weight, 0)
        acc = acc * keep + tl.sum(x.to(tl.float32) * weight[:, None], 0)
        top = new_top
    if SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2_E
        new_top = tl.maximum(top, sink)
        keep = tl.exp2(top - new_top)
        total = total * keep + tl.exp2(sink - new_top)
        acc = acc * keep
    acc = acc / tl.where(total > 0, total, 1.0)
    if LAST:
        tl.store(out + mine.to(tl.int64) * D + dim, acc.to(out.dtype.element_ty), mask=inside)
    else:
        tl.store(sum_out + mine.to(tl.int64) * D + dim, acc, mask=inside)
        tl.store(sum_lse + mine, tl.where(total > 0, top + tl.log2(tl.where(total > 0, total, 1.0)), float("-inf")))
