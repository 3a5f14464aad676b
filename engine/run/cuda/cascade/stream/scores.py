"""A block's scores: capped, hidden from rows that do not see its tokens, and made weights."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from engine.run.cuda.cascade.stream.items import PAIR, ROWS


@gluon.jit
def ends_of(lists, pairs_at, row0, rows_end, begin, end, RATIO: gl.constexpr, S: gl.constexpr, CAUSAL: gl.constexpr):
    """Where, counted from ``begin``, the tokens of a split end that each row of a warpgroup sees."""
    if not CAUSAL:
        return gl.zeros([ROWS], gl.int32, gl.SliceLayout(1, S)) + (end - begin)
    packed = row0 + gl.arange(0, ROWS, gl.SliceLayout(1, S))
    limit = gl.load(lists + pairs_at + (packed // RATIO) * PAIR + 2, mask=packed < rows_end, other=0)
    return gl.minimum(limit, end) - begin


@gluon.jit
def begins_of(lists, pairs_at, row0, rows_end, begin, RATIO: gl.constexpr, S: gl.constexpr, WINDOW: gl.constexpr):
    """Where, counted from ``begin``, they begin."""
    if not WINDOW:
        return gl.zeros([ROWS], gl.int32, gl.SliceLayout(1, S))
    packed = row0 + gl.arange(0, ROWS, gl.SliceLayout(1, S))
    return gl.load(lists + pairs_at + (packed // RATIO) * PAIR + 4, mask=packed < rows_end, other=0) - begin


@gluon.jit
def masked_scores(scores, first, seen_from, seen_to, N: gl.constexpr, S: gl.constexpr, WINDOW: gl.constexpr):
    """Scores (rows, N) of the tokens from ``first`` on, -inf of those that a row does not see."""
    token = first + gl.arange(0, N, gl.SliceLayout(0, S))
    seen = token[None, :] < seen_to[:, None]
    if WINDOW:
        seen = seen & (token[None, :] >= seen_from[:, None])
    return gl.where(seen, scores, float("-inf"))


@gluon.jit
def hidden(
    scores, first, ends, begins, seen_from, seen_to,
    N: gl.constexpr, S: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr,
):  # fmt: skip
    """``masked_scores`` where what some row sees ``ends`` or ``begins`` in the block."""
    if CAUSAL:  # noqa: SIM102 (a compile-time condition around one of a value)
        if ends:
            scores = masked_scores(scores, first, seen_from, seen_to, N, S, WINDOW)
    if WINDOW:  # noqa: SIM102
        if begins:
            scores = masked_scores(scores, first, seen_from, seen_to, N, S, WINDOW)
    return scores


@gluon.jit
def capped(scores, squeeze, SOFTCAP: gl.constexpr):
    """As ``capped`` of the Triton kernel, if SOFTCAP."""
    if not SOFTCAP:
        return scores
    return 1.0 - 2.0 / (gl.exp2(scores * squeeze) + 1.0)


@gluon.jit
def softmax(scores, top, total, scale, CAUSAL: gl.constexpr, WINDOW: gl.constexpr):
    """One block of scores: p (fp32), the new maximum and sum, and what to multiply earlier results by.

    A row that has seen nothing yet, as there may be if CAUSAL, keeps a maximum of -inf and a sum of 0. If WINDOW, the
    factor of an unchanged maximum is 1, where a fused multiplication could round it.
    """
    new_top = gl.maximum(top, gl.max(scores, 1))
    scaled = new_top * scale
    if CAUSAL:
        scaled = gl.where(new_top == float("-inf"), 0.0, scaled)
    p = gl.exp2(scores * scale - scaled[:, None])
    keep = gl.exp2(top * scale - scaled)
    if WINDOW:
        keep = gl.where(new_top == top, 1.0, keep)
    return p, new_top, total * keep + gl.sum(p, 1), keep
