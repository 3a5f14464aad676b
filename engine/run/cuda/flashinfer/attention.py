"""FlashInferAttention: attention over plans with FlashInfer's fa2 kernels, where our own do not run.

    whole    (chunk, row) pairs, chunk by chunk, in one call without causality; the query gathered and turned
    causal   tails, and what of windows is causal                                                     (lists.py)
    merge    each row's results in the order of its composition, in fp32, with sinks as one more score (merge.py)

Three launches a layer whatever the number of levels. FlashInfer's own cascade wrapper picks kernels that do not split a
long shared chunk, and takes one query for all levels. Results are rounded to the served dtype before they are merged:
its kernels are compiled for no other. How it splits keys, and how high its tiles are, follows from all that is in a
step: a row has the same bits again in the same step, and in no other.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.attention import Scores
from engine.kv.pool import PagedKVPool
from engine.model.rotary import Rotation
from engine.plan import CascadePlan, Window
from engine.run.backends import AttentionRefused
from engine.run.cuda.flashinfer.calls import Call, Kind, Workspace
from engine.run.cuda.flashinfer.lists import CallLists, merge_order, requests_of

PACKAGE = "flashinfer-python"
REMEDY = "install flashinfer-jit-cache or the CUDA toolkit (nvcc), or give --attention torch"
PARTIALS_NBYTES_MAX = 512 << 20  # of the queries and results of a layer that wait to be merged
MERGED_AT_ONCE = 8


@dataclass(frozen=True)
class Batch:
    """Requests that are run, and merged, together: ``lists`` of the calls that have some, by causality."""

    lists: dict[bool, CallLists]
    unit: int
    rows: Tensor  # (query rows,) int64: the step's row of each
    offsets: Tensor | None  # (query rows,) on the CPU: how far each is turned back; None: not at all
    starts: Tensor  # of each row's results in ``order`` (rows + 1)
    order: Tensor

    @property
    def kinds(self) -> tuple[bool, ...]:
        return tuple(self.lists)


@dataclass
class Seen:
    """What layers with one window compute in a step.

    ``tables``: cos and sin of each batch's query rows by a rotation's id; ``planned``: calls by batch.
    """

    batches: list[Batch]
    tables: dict[int, list[tuple[Tensor, Tensor] | None]] = field(default_factory=dict)
    planned: dict[Kind, list[list[Call]]] = field(default_factory=dict)


@dataclass
class FlashInferStep:
    """A prepared step; what a window or a kind of layer needs is made when it is first met."""

    plan: CascadePlan
    slots: Tensor
    seen: dict[tuple[Hashable, ...], Seen] = field(default_factory=dict)


class FlashInferAttention:
    """Attention over ``pool``; ``rotations[layer]`` tells how that layer turns, None that it does not, and
    ``windows[layer]`` what its rows see, None that they see everything before them (as all do without ``windows``).

    One step at a time: planning the next replaces what ``attend`` reads. ``library`` is what has FlashInfer's wrappers,
    FlashInfer unless told otherwise; raises ``AttentionRefused`` where it cannot be imported.
    """

    name = "flashinfer-2"

    def __init__(
        self,
        pool: PagedKVPool,
        rotations: Sequence[Rotation | None],
        windows: Sequence[Window | None] | None = None,
        *,
        library: Any = None,
    ) -> None:
        self.pool = pool
        self.rotations = rotations
        self.windows = (None,) * len(rotations) if windows is None else windows
        self._library = flashinfer_library() if library is None else library
        self._workspace = Workspace(pool.device)
        self._calls: dict[tuple[Hashable, ...], Call] = {}

    @classmethod
    def full_name(cls) -> str:
        """The name in the model identity: another version of the library rounds otherwise."""
        return f"{cls.name} {importlib.metadata.version(PACKAGE)}"

    def prepare(self, plan: CascadePlan, *, row_multiple: int = 1) -> FlashInferStep:
        """``row_multiple`` is not needed: FlashInfer pads tiles itself."""
        return FlashInferStep(plan, torch.tensor(plan.slots, device=self.pool.device))

    def attend(self, step: FlashInferStep, layer: int, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
        keys, values = self.pool.keys[layer], self.pool.values[layer]
        keys.index_copy_(0, step.slots, k)
        values.index_copy_(0, step.slots, v)
        out = torch.empty(q.shape[0], q.shape[1], values.shape[-1], dtype=q.dtype, device=q.device)
        seen, calls = self.planned(step, layer, q, scores)
        turned = self.queries(seen, layer, q.contiguous())
        self.run(seen, calls, layer, turned, out, scores.sinks)
        return out

    # -- once a step --------------------------------------------------------------------------------
    def planned(self, step: FlashInferStep, layer: int, q: Tensor, scores: Scores) -> tuple[Seen, list[list[Call]]]:
        """The lists of what this layer's rows see, and the calls over them, by batch."""
        kind = Kind.of(q, self.pool.keys[layer], self.pool.values[layer], scores)
        window = self.windows[layer]
        rows_max = max(1, PARTIALS_NBYTES_MAX // (kind.heads * sum(kind.widths) * q.element_size()))
        key = window, kind.paged, rows_max
        seen = step.seen.get(key)
        if seen is None:
            seen = step.seen[key] = Seen(self._batches(step.plan.seen_through(window), kind.paged, rows_max))
        if kind not in seen.planned:
            calls = [
                [self._call(window, kind, index, causal) for causal in batch.kinds]
                for index, batch in enumerate(seen.batches)
            ]
            for batch, of_batch in zip(seen.batches, calls, strict=True):
                for call, lists in zip(of_batch, batch.lists.values(), strict=True):
                    call.plan(lists, batch.unit)
            seen.planned[kind] = calls
        return seen, seen.planned[kind]

    def _batches(self, plan: CascadePlan, paged: bool, rows_max: int) -> list[Batch]:
        device, found = self.pool.device, []
        for some in requests_of(plan, self.pool.page_size, by_slot=not paged).batches(rows_max):
            kinds = {False: some.whole, True: some.causal}
            lists = {causal: CallLists.of(each, some.unit) for causal, each in kinds.items() if each}
            rows, offsets = (np.concatenate([getattr(x, name) for x in lists.values()]) for name in ("rows", "offsets"))
            starts, order = merge_order(len(plan.slots), list(lists.values()))
            back = torch.from_numpy(offsets) if offsets.any() else None
            on_device = (torch.from_numpy(x).to(device) for x in (starts, order))
            found.append(Batch(lists, some.unit, torch.from_numpy(rows).to(device), back, *on_device))
        return found

    def _call(self, window: Window | None, kind: Kind, batch: int, causal: bool) -> Call:
        key = window, kind, batch, causal
        if key not in self._calls:
            self._calls[key] = Call(self._library, kind, self._workspace, causal=causal)
        return self._calls[key]

    # -- once a layer -------------------------------------------------------------------------------
    def queries(self, seen: Seen, layer: int, q: Tensor) -> list[Tensor]:
        """Of each batch its rows' queries (query rows, heads, k_dim), turned back to where the keys were computed."""
        gathered = [q.index_select(0, batch.rows) for batch in seen.batches]
        rotation = self.rotations[layer]
        if rotation is None:
            return gathered
        tables = seen.tables.get(id(rotation))
        if tables is None:
            offsets = [batch.offsets for batch in seen.batches]
            tables = [None if each is None else rotation.table(each, self.pool.device) for each in offsets]
            seen.tables[id(rotation)] = tables
        return [
            x if table is None else rotation.turn_back(x, *table) for x, table in zip(gathered, tables, strict=True)
        ]

    def run(
        self, seen: Seen, calls: list[list[Call]], layer: int, queries: list[Tensor], out: Tensor,
        sinks: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Of each batch the calls and their merge, the last one into ``out`` (rows, heads, v_dim) contiguous."""
        keys, values = self.pool.keys[layer], self.pool.values[layer]
        last = len(calls) - 1
        sums = Sums.of(out) if last else None
        for index, (of_batch, batch, q) in enumerate(zip(calls, seen.batches, queries, strict=True)):
            results = out.new_empty(len(q), out.shape[1], of_batch[0].kind.widths[1])
            lses = out.new_empty(len(q), out.shape[1], dtype=torch.float32)
            at = 0
            for call, lists in zip(of_batch, batch.lists.values(), strict=True):
                part = slice(at, at + len(lists.rows))
                call.run(q[part], keys, values, results[part], lses[part])
                at = part.stop
            _merge(
                results, lses, batch, sums, sinks if index == last else None, out, first=index == 0, last=index == last
            )


def flashinfer_library() -> Any:
    """FlashInfer. Raises ``AttentionRefused`` where it cannot be imported."""
    try:
        return importlib.import_module("flashinfer")
    except ImportError as error:
        raise AttentionRefused(f"attention: flashinfer cannot be imported ({error}); {REMEDY}") from error


@dataclass(frozen=True)
class Sums:
    """What batches so far gave: (rows, heads, v_dim) and, base 2, (rows, heads), both fp32."""

    out: Tensor
    lse: Tensor

    @classmethod
    def of(cls, out: Tensor) -> Sums:
        return cls(torch.empty_like(out, dtype=torch.float32), out.new_empty(out.shape[:2], dtype=torch.float32))


def _merge(
    results: Tensor, lses: Tensor, batch: Batch, sums: Sums | None, sinks: Tensor | None, out: Tensor,
    *, first: bool, last: bool,
) -> None:  # fmt: skip
    from engine.run.cuda.flashinfer.merge import merge_listed

    rows, heads, dim = out.shape
    sums = sums or Sums(lses, lses)  # something to point at
    merge_listed[(rows, heads)](
        results, lses, batch.starts, batch.order, sums.out, sums.lse, lses if sinks is None else sinks, out,
        HEADS=heads, D=dim, OUT_D=results.shape[-1], WIDTH=1 << (dim - 1).bit_length(), PARTS=MERGED_AT_ONCE,
        FIRST=first, LAST=last, SINKS=sinks is not None, num_warps=1,
    )  # fmt: skip
