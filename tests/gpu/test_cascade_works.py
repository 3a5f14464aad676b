"""The lists and launches of layers that see by different windows, as the host makes them; no device."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from chunk_store.layout import KVLayout, LayerLayout
from engine.kv.pool import PagedKVPool
from engine.plan import StepSequence, Window, behind_each_other, plan_levels, plan_step
from engine.run.cuda.cascade import lists
from engine.run.cuda.cascade.launch import CascadeWork
from engine.run.cuda.cascade.reads import Ints
from engine.run.cuda.cascade.records import CLASSES_MAX, Limits
from engine.run.cuda.cascade.tails import tail_lists
from engine.run.cuda.cascade.tuning import Tuning
from engine.run.cuda.cascade.works import LayerWorks
from tests.gpu.cascade_cases import random_sequences

LIMITS = Limits(rows=64, pairs=512, items=1024, pages=2048, partials=2048, line=5)


def pool_of(*layers: LayerLayout) -> PagedKVPool:
    return PagedKVPool(KVLayout("bfloat16", layers), pages=4, chunk_pages=2)


def test_a_layer_launches_what_the_update_of_its_window_found(monkeypatch: pytest.MonkeyPatch) -> None:
    works = LayerWorks(pool_of(*[LayerLayout(2, 64, 64)] * 2), [None, None], heads=8, limits=LIMITS, tuning=Tuning())
    line = np.arange(5, dtype=np.int32)
    classes = works.update(random_sequences(1, 12, rows=(1, 3)).plan(), line)
    assert works.line.tolist() == line.tolist()
    assert classes and set(classes) <= set(works.every_class)
    assert {works.layer_of(number) for number in works.every_class} == {0}
    launched: list[tuple[int, ...]] = []
    monkeypatch.setattr(CascadeWork, "launch", lambda *_, classes, **__: launched.append(classes))
    q: Any = torch.empty(0)
    for layer in range(2):
        works.launch(layer, q, q, scaling=1.0)
        works.launch(layer, q, q, scaling=1.0, classes=classes[:1])
    assert launched == [classes, classes[:1]] * 2


def test_each_window_has_lists_of_its_own_and_what_is_alike_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[bool] = []
    launched: list[tuple[bool, tuple[int, ...]]] = []

    def noted(*args: Any) -> Ints:
        made.append(args[4] is not None)
        return tail_lists(*args)

    def launch(work: CascadeWork, *_: Any, classes: tuple[int, ...], **__: Any) -> None:
        launched.append((work.window is not None, classes))

    monkeypatch.setattr(lists, "tail_lists", noted)
    monkeypatch.setattr(CascadeWork, "launch", launch)
    windows = (Window(100), None, Window(100), Window(10**6))
    works = LayerWorks(pool_of(*[LayerLayout(2, 64, 32)] * 4), windows, heads=8, limits=LIMITS, tuning=Tuning())
    assert works.windows == (Window(100), None, Window(10**6))
    assert len({work.partials.out.data_ptr() for work in works.works}) == 1
    plan = random_sequences(2, 6, rows=(1, 3)).plan()
    classes = works.update(plan, np.zeros(5, np.int32))
    assert made == [True, False], "the window that hides nothing has the lists of none"
    sent = [work.lists[LIMITS.static_ints :].tolist() for work in works.works]
    assert sent[1] == sent[2] != sent[0]
    assert [works.layer_of(number) for number in works.every_class] == [0, 0, 0, 1, 1, 1, 3, 3, 3]
    q: Any = torch.empty(0)
    for layer in range(4):
        works.launch(layer, q, q, scaling=1.0)
    assert launched[0] == launched[2] and [windowed for windowed, _ in launched] == [True, False, True, True]
    assert launched[1][1] == launched[3][1] == tuple(number - 8 for number in classes if 8 <= number < 16)


def test_tiles_are_narrow_or_wide_in_all_windows_of_a_step() -> None:
    """So that there are as many sets of classes, each a graph, with windows as without."""
    works = LayerWorks(pool_of(*[LayerLayout(2, 64, 64)] * 2), [None, Window(20)], heads=8, tuning=Tuning())
    for shared, index in ((5000, 2), (0, 1)):  # of Tuning's classes: wide, narrow
        chunks = behind_each_other([(0, shared, 0)] if shared else [])
        sequences = [StepSequence(chunks, (400 + row,), 9, 1, shared + 9) for row in range(40)]
        plan = plan_step(sequences, plan_levels(sequences, max_cascade_levels=3), page_size=16)
        assert works.update(plan) == (index, CLASSES_MAX + index)


def test_layers_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="of 2 forms"):
        LayerWorks(pool_of(LayerLayout(2, 64, 64), LayerLayout(1, 64, 64)), [None, None], heads=8)
    with pytest.raises(ValueError, match="1 for 2 layers"):
        LayerWorks(pool_of(*[LayerLayout(2, 64, 64)] * 2), [None], heads=8)
