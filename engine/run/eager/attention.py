"""The torch backend: the CPU's attention, and the reference for the others.

A chunk is read as a view of the pool, once for all rows that share it, with the group of query heads and
the rows folded into one dimension. Decode tails of similar length are gathered through their block tables
into one padded call. Every row's result is the same sum whatever else is in the step: a chunk is one partial,
and how far a tail is padded depends on its own length only. Where a window hides a part's beginning, reading begins
at a place that follows from the row's position alone, and rows that begin at one place read together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.attention import Scores
from engine.attention.partial import merge, merge_pair, partial_attention
from engine.kv.pool import TORCH_DTYPES, PagedKVPool
from engine.model.rotary import Rotation
from engine.plan import CascadePlan, Levels, Window
from engine.run.eager.step import (
    LongTail,
    Read,
    SeenStep,
    Tables,
    TailClass,
    TorchStep,
    alignment,
    is_aligned,
    prepare_long_tail,
    prepare_reads,
    prepare_tail_classes,
    turn_to_positions,
    without_gaps,
)

Partial = tuple[Tensor, Tensor]  # out (rows, heads, v_dim) in q's dtype, lse (rows, heads) fp32


class TorchAttention:
    """Attention over ``pool``. ``rotations[layer]`` tells how that layer turns, None that it does not, and
    ``windows[layer]`` what its rows see, None that they see everything before them.

    ``deferred``: queries and keys come unturned, and are turned here, to each place once.
    """

    name = "torch-2"

    def __init__(
        self,
        pool: PagedKVPool,
        rotations: Sequence[Rotation | None],
        windows: Sequence[Window | None],
        *,
        deferred: bool = False,
    ) -> None:
        self.pool = pool
        self.deferred = deferred
        self.rotations = rotations
        self.windows = windows
        self._distinct = list({id(r): r for r in rotations if r is not None}.values())
        self._prepared: dict[Window | None, tuple[Levels, int, int, tuple[Read, ...]]] = {}

    def prepare(self, plan: CascadePlan, *, row_multiple: int = 1) -> TorchStep:
        device, positions = self.pool.device, None
        own: Tables = {}
        if self.deferred:
            positions = torch.tensor(plan.positions)
            own = {id(rotation): rotation.whole_table(-positions, device) for rotation in self._distinct}
        through: dict[Window | None, SeenStep] = {}
        whole: SeenStep | None = None
        for window in dict.fromkeys(self.windows):
            seen = plan.seen_through(window)
            if seen is not plan:
                through[window] = self._see(seen, window, row_multiple, positions)
            else:  # all windows that hide nothing in this step are one
                whole = through[window] = whole or self._see(plan, None, row_multiple, positions)
        return TorchStep(len(plan.slots), torch.tensor(plan.slots, device=device), own, through)

    def _see(self, plan: CascadePlan, window: Window | None, row_multiple: int, positions: Tensor | None) -> SeenStep:
        """What layers with ``window`` compute of a step; ``plan`` is the step seen through it."""
        rows, page_size, device = len(plan.slots), self.pool.page_size, self.pool.device
        reads = self._prepare_reads(plan.levels, window, rows, row_multiple)
        if positions is not None:
            reads = tuple(turn_to_positions(read, positions, self._distinct, device) for read in reads)
        partials = len({place for read in plan.reads for place in read.places})
        dtype, align = TORCH_DTYPES[self.pool.layout.dtype], alignment(window)
        short = [tail for tail in plan.tails if tail.rows == 1]
        long = [tail for tail in plan.tails if tail.rows > 1]
        return SeenStep(
            partials=partials,
            reads=reads,
            tail_classes=prepare_tail_classes(short, rows, page_size, align, dtype, device),
            long_tails=tuple(prepare_long_tail(tail, page_size, device, align, dtype) for tail in long),
            aligned=is_aligned(partials, reads),
        )

    def _prepare_reads(self, levels: Levels, window: Window | None, rows: int, row_multiple: int) -> tuple[Read, ...]:
        """The reads of ``levels``; those of the last step again while its compositions did not change."""
        last = self._prepared.get(window)
        if last is not None and last[0] is levels and last[1:3] == (rows, row_multiple):
            return last[3]
        dtype, align = TORCH_DTYPES[self.pool.layout.dtype], alignment(window)
        every = without_gaps([read for level in levels for read in level])
        made = [
            part
            for read in every
            for part in prepare_reads(read, rows, row_multiple, align, self._distinct, dtype, self.pool.device)
        ]
        reads = tuple(sorted(made, key=lambda read: read.place))
        self._prepared[window] = (levels, rows, row_multiple, reads)
        return reads

    def attend(self, step: TorchStep, layer: int, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
        raw, rotation, seen = q, self.rotations[layer], step.through[self.windows[layer]]
        if step.own and rotation is not None:
            q, k = (rotation.turn_back(x, *step.own[id(rotation)]) for x in (q, k))
        self.pool.keys[layer].index_copy_(0, step.slots, k)
        self.pool.values[layer].index_copy_(0, step.slots, v)
        tail = self._attend_tails(seen, layer, q, scores)
        if not seen.reads and scores.sinks is None:
            return tail[0]
        if seen.aligned:
            partials = [tail, *(self._attend_chunk(read, layer, q, raw, scores) for read in seen.reads)]
        else:
            partials = [tail, *self._scatter_partials(seen, layer, q, raw, scores)]
        out = merge([out for out, _ in partials], [lse for _, lse in partials], scores.sinks)
        return out.to(q.dtype)

    # -- chunks -------------------------------------------------------------------------------------
    def _attend_chunk(self, read: Read, layer: int, q: Tensor, raw: Tensor, scores: Scores) -> Partial:
        """All pairs of a read over the chunk's slots, a view of the pool; what is turned is turned from ``raw``."""
        rotation = self.rotations[layer]
        turns = bool(read.tables) and rotation is not None
        q = raw if turns else q
        if read.padded_rows is not None:
            q = q.index_select(0, read.padded_rows)
        if turns and rotation is not None:
            q = rotation.turn_back(q, *read.tables[id(rotation)])
        k, v = self._views(read, layer)
        pairs, heads, width = q.shape
        if read.mask is not None:
            return self._attend_masked(q, k[0], v[0], read.mask, scores)
        kv_heads = k.shape[1]
        grouped = q.reshape(pairs, kv_heads, heads // kv_heads, width)
        if pairs == 1:
            out, lse = partial_attention(grouped, k, v, scaling=scores.scaling, softcap=scores.softcap)
            return out.reshape(1, heads, -1), lse.reshape(1, heads)
        folded = grouped.transpose(0, 1).reshape(1, kv_heads, -1, width)
        out, lse = partial_attention(folded, k, v, scaling=scores.scaling, softcap=scores.softcap)
        out = out.reshape(kv_heads, pairs, heads // kv_heads, -1).transpose(0, 1).reshape(pairs, heads, -1)
        lse = lse.reshape(kv_heads, pairs, heads // kv_heads).transpose(0, 1).reshape(pairs, heads)
        return out, lse

    def _attend_masked(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scores: Scores, *, causal: bool = False
    ) -> Partial:
        """Rows q (rows, heads, k_dim) over k, v (kv_heads, tokens, dim), each as its row of ``mask`` says.

        Query heads of one KV head become the batch, so that a mask and causality stay one row an index.
        """
        rows, heads, width = q.shape
        group = heads // k.shape[0]
        q = q.reshape(rows, k.shape[0], group, width).permute(1, 2, 0, 3)
        k, v = (x[:, None].expand(-1, group, -1, -1) for x in (k, v))
        scaling, cap = scores.scaling, scores.softcap
        out, lse = partial_attention(q, k, v, scaling=scaling, softcap=cap, causal=causal, mask=mask)
        return out.flatten(0, 1).transpose(0, 1), lse.flatten(0, 1).transpose(0, 1)

    def _views(self, read: Read, layer: int) -> tuple[Tensor, Tensor]:
        """A chunk's K and V (1, kv_heads, tokens, dim) in the pool; made once a layer and kept with the read."""
        views = read.views.get(layer)
        if views is None:
            end = read.first_slot + read.tokens
            k = self.pool.keys[layer][read.first_slot : end].transpose(0, 1)[None]
            v = self.pool.values[layer][read.first_slot : end].transpose(0, 1)[None]
            views = read.views[layer] = k, v
        return views

    def _scatter_partials(self, step: SeenStep, layer: int, q: Tensor, raw: Tensor, scores: Scores) -> list[Partial]:
        """Each row's partial results at their own places; those that a row does not have keep an lse of -inf."""
        rows, heads, _ = q.shape
        v_dim = self.pool.values[layer].shape[-1]
        outs = q.new_zeros(step.partials, rows, heads, v_dim)
        lses = torch.full((step.partials, rows, heads), float("-inf"), device=q.device)
        for read in step.reads:
            out, lse = self._attend_chunk(read, layer, q, raw, scores)
            if read.rows is None or read.places is None:
                outs[read.place], lses[read.place] = out, lse
            else:
                pairs = read.rows.shape[0]
                outs[read.places, read.rows] = out[:pairs]
                lses[read.places, read.rows] = lse[:pairs]
        return list(zip(outs.unbind(0), lses.unbind(0), strict=True))

    # -- tails --------------------------------------------------------------------------------------
    def _attend_tails(self, step: SeenStep, layer: int, q: Tensor, scores: Scores) -> Partial:
        if len(step.tail_classes) == 1 and step.tail_classes[0].rows is None:
            return self._attend_tail_class(step.tail_classes[0], layer, q, scores)
        if len(step.long_tails) == 1 and not step.tail_classes:
            return self._attend_long_tail(step.long_tails[0], layer, q, scores)
        out = q.new_empty(*q.shape[:2], self.pool.values[layer].shape[-1])
        lse = torch.empty(*q.shape[:2], device=q.device)
        for tails in step.tail_classes:
            assert tails.rows is not None
            out[tails.rows], lse[tails.rows] = self._attend_tail_class(tails, layer, q[tails.rows], scores)
        for tail in step.long_tails:
            rows = slice(tail.first_row, tail.first_row + tail.rows)
            out[rows], lse[rows] = self._attend_long_tail(tail, layer, q[rows], scores)
        return out, lse

    def _attend_tail_class(self, tails: TailClass, layer: int, q: Tensor, scores: Scores) -> Partial:
        """One row a tail: q (tails, heads, k_dim)."""
        count, heads, width = q.shape
        shape = (count, -1, *self.pool.keys[layer].shape[1:])
        k = self.pool.keys[layer].index_select(0, tails.slots).view(shape).transpose(1, 2)
        shape = (count, -1, *self.pool.values[layer].shape[1:])
        v = self.pool.values[layer].index_select(0, tails.slots).view(shape).transpose(1, 2)
        if scores.softcap is not None:  # products of a batch of one would be of other layouts, and sum in other orders
            k, v = k.contiguous(), v.contiguous()
        kv_heads = k.shape[1]
        grouped = q.reshape(count, kv_heads, heads // kv_heads, width)
        out, lse = partial_attention(grouped, k, v, scaling=scores.scaling, softcap=scores.softcap, mask=tails.mask)
        return out.reshape(count, heads, -1), lse.reshape(count, heads)

    def _attend_long_tail(self, tail: LongTail, layer: int, q: Tensor, scores: Scores) -> Partial:
        """Several rows of one tail, q (rows, heads, k_dim): what was there before, then causally themselves."""
        tokens = tail.tokens_before + tail.rows
        if tail.slots is None:
            k = self.pool.keys[layer][tail.first_slot : tail.first_slot + tokens]
            v = self.pool.values[layer][tail.first_slot : tail.first_slot + tokens]
        else:
            k, v = self.pool.keys[layer][tail.slots], self.pool.values[layer][tail.slots]
        k, v, before = k.transpose(0, 1), v.transpose(0, 1), tail.tokens_before
        own_k, own_v = k[:, before:], v[:, before:]
        # A window's mask hides later rows too.
        out, lse = self._attend_masked(q, own_k, own_v, tail.own_mask, scores, causal=tail.own_mask is None)
        if before == 0 or tail.seers == 0:
            return out, lse
        past = self._attend_masked(q[: tail.seers], k[:, :before], v[:, :before], tail.mask, scores)
        merged, merged_lse = merge_pair(out[: tail.seers], lse[: tail.seers], *past)
        merged = merged.to(q.dtype)
        if tail.seers == tail.rows:
            return merged, merged_lse
        return torch.cat((merged, out[tail.seers :])), torch.cat((merged_lse, lse[tail.seers :]))
