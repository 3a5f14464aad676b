"""What stands in for kernels where there is no card: attention of packed steps in torch, greedy draws."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.attention import Scores
from engine.kv.pool import PagedKVPool
from engine.model.probe import Findings
from engine.plan import CascadePlan
from engine.run.cuda import borrowed as borrowed_module
from engine.run.cuda import steps as steps_module
from engine.run.cuda.borrowed import BorrowedForward, CapturedModel
from engine.run.cuda.cascade.tuning import Tuning
from engine.run.cuda.runner import PackedRunner
from engine.run.cuda.sampling.slots import DeviceSlots
from engine.run.eager.attention import TorchAttention


class TorchWorks:
    """``LayerWorks`` by the torch backend. Keys and values are in the pool already."""

    def __init__(
        self, findings: Findings, pool: PagedKVPool, windows: Any, *, heads: int, limits: Any, tuning: Tuning | None
    ) -> None:
        self.attention, self.pool = TorchAttention(pool, findings.rotations, windows), pool
        self.line = torch.zeros(limits.line, dtype=torch.int32)
        self.tuning = tuning or Tuning()
        self.every_class: tuple[int, ...] = ()

    def update(self, plan: CascadePlan, line: Any = None) -> tuple[int, ...]:
        if line is not None:
            self.line.copy_(torch.from_numpy(np.asarray(line)))
        self.step = self.attention.prepare(plan)
        return ()

    def launch(
        self, layer: int, q: Tensor, out: Tensor, *, rotation: Any, turned: bool, classes: Sequence[int], **scores: Any
    ) -> None:
        assert turned
        new = self.step.slots
        keys, values = self.pool.keys[layer][new], self.pool.values[layer][new]
        out.copy_(self.attention.attend(self.step, layer, q, keys, values, Scores(**scores)))


def draw_greedily(slots: DeviceSlots, logits: Tensor, kind: Any) -> None:
    tokens = logits.argmax(-1).int()
    draws = slots._launches.draws[: len(tokens)]
    slots._launches.chosen[: len(tokens)] = tokens
    slots.last[draws[:, 0].long()] = tokens


def packed_runner(
    monkeypatch: pytest.MonkeyPatch, model: CapturedModel, pool: PagedKVPool, **options: Any
) -> PackedRunner:
    """A runner of the model's own code, without a card and without graphs."""

    def works(*arguments: Any, **named: Any) -> TorchWorks:
        return TorchWorks(model.findings, *arguments, **named)

    monkeypatch.setattr(steps_module, "LayerWorks", works)
    monkeypatch.setattr(DeviceSlots, "launch", draw_greedily)
    monkeypatch.setattr(
        borrowed_module, "RotationTable", SimpleNamespace(of=lambda *arguments: None)
    )  # torch has its own
    monkeypatch.setattr(BorrowedForward, "piece_refusal", "there is no card")
    forward = BorrowedForward(model, pool, positions=model.findings.context_length_max)
    return PackedRunner(forward, graphs=False, **options)
