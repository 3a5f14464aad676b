"""Each layer's attention kernels beside attention in float32, on the queries, keys and values that they were given.

How far a kernel may be from float32 depends on how large scores are, so the unit is the distance of the torch
backend in the served dtype. Both of these run over pools of their own; the torch backend is itself compared with the
model's own eager attention by the other parts of the start check.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from engine.attention import Attention, Scores
from engine.check.forwards import RunnerFactory
from engine.kv.pool import PagedKVPool
from engine.model.probe import Findings
from engine.plan import CascadePlan
from engine.run.eager.attention import TorchAttention
from engine.run.eager.step import TorchStep
from engine.run.protocol import WatchableRunner


@dataclass(frozen=True)
class WatchedStep:
    """A step prepared for the kernels and for both that they are compared with."""

    served: Any
    plan: CascadePlan
    exact: TorchStep
    rounded: TorchStep


LAYERS_APART, LAYERS_FEW = 5, 8


def looked_at(layer: int, step: int, layers: int) -> bool:
    """Whether a call of a packed step is compared: of a deep model every fifth, of the next step those before them.

    Layers of different kinds come by turns of two, three, four or six, so a step of thirty has some of every kind.
    """
    return layers <= LAYERS_FEW or (layer + step) % LAYERS_APART == 0


class WatchedAttention:
    """An ``AttentionWatch`` that compares calls, around a backend or after the calls of a runner without one.

    ``worst`` is the largest of those compared: rms(out - float32) / rms(torch backend - float32). Around a backend
    every call is, after a runner's those ``looked_at``.
    """

    def __init__(self, pool: PagedKVPool, findings: Findings) -> None:
        self.name = ""
        self.worst = 0.0
        self._attention: Attention[Any]
        self._pool = pool
        self._rotations = findings.rotations
        self._step = 0
        self._plan: CascadePlan | None = None
        self._exact = TorchAttention(_twin(pool, "float32"), findings.rotations, findings.windows)
        self._rounded = TorchAttention(_twin(pool, pool.layout.dtype), findings.rotations, findings.windows)

    def around(self, attention: Attention[Any]) -> WatchedAttention:
        self.name, self._attention = attention.name, attention
        return self

    def prepare(self, plan: CascadePlan, *, row_multiple: int = 1) -> WatchedStep:
        served = self._attention.prepare(plan, row_multiple=row_multiple)
        return WatchedStep(served, plan, self._exact.prepare(plan), self._rounded.prepare(plan))

    def attend(self, step: WatchedStep, layer: int, q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> Tensor:
        out = self._attention.attend(step.served, layer, q, k, v, scores)
        exact = self._exact.attend(step.exact, layer, q.float(), k.float(), v.float(), scores)
        rounded = self._rounded.attend(step.rounded, layer, q, k, v, scores)
        self._compare(step.plan, out, exact, rounded)
        return out

    def after(self, plan: CascadePlan, layer: int, q: Tensor, out: Tensor, scores: Scores, turned: bool) -> None:
        """K and V of the new tokens are in the pool."""
        if plan is not self._plan:
            self._step, self._plan = self._step + 1, plan
        if not looked_at(layer, self._step, len(self._rotations)):
            return
        rotation, at_position = self._rotations[layer], q.float()
        if rotation is not None and not turned:
            table = rotation.whole_table(-torch.tensor(plan.positions), q.device)
            at_position = rotation.turn_back(at_position, *table)
        results = []
        for attention, queries in ((self._exact, at_position), (self._rounded, at_position.to(q.dtype))):
            keys, values = attention.pool.keys[layer], attention.pool.values[layer]
            keys.copy_(self._pool.keys[layer])
            values.copy_(self._pool.values[layer])
            step = attention.prepare(plan)
            new = step.slots
            results.append(attention.attend(step, layer, queries, keys[new], values[new], scores))
        self._compare(plan, out, *results)

    def _compare(self, plan: CascadePlan, out: Tensor, exact: Tensor, rounded: Tensor) -> None:
        scratch = self._pool.scratch_page * self._pool.page_size
        rows = torch.tensor([row for row, slot in enumerate(plan.slots) if slot < scratch], device=out.device)
        if len(rows) == 0:
            return
        ours, theirs, unit = (x[rows].float() for x in (out, exact, rounded))
        ratio = float((ours - theirs).norm() / ((unit - theirs).norm() + 1e-30))
        self.worst = ratio if ratio != ratio else max(self.worst, ratio)  # NaN stays


def _twin(pool: PagedKVPool, dtype: str) -> PagedKVPool:
    layout = replace(pool.layout, dtype=dtype)
    return PagedKVPool(
        layout, pages=pool.pages, chunk_pages=pool.chunk_pages, page_size=pool.page_size, device=pool.device
    )


class KernelWatch:
    """Makes runners whose attention is watched; ``worst`` is that of the last one, None if there was none."""

    def __init__(self, findings: Findings) -> None:
        self._findings = findings
        self._watched: WatchedAttention | None = None

    @property
    def worst(self) -> float | None:
        return None if self._watched is None else self._watched.worst

    def over(self, make_runner: RunnerFactory) -> RunnerFactory:
        """The factory, with every attention call of its runners watched."""

        def make(pool: PagedKVPool) -> WatchableRunner:
            runner = make_runner(pool)
            self._watched = WatchedAttention(pool, self._findings)
            runner.watch_attention(self._watched)
            return runner

        return make
