"""Several answers to one prompt: sequences of one request that share its chunks and differ in their seeds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from decode_service.scheduling.sequence import Event, Sequence


def answers_to(first: Sequence, count: int, put: Callable[[list[Event], int], None]) -> list[Sequence]:
    """The sequences of ``count`` answers to the prompt of ``first``, which is one of them.

    Answer i draws with the seed of the first plus i, and is what a request with that seed alone is answered. Its events
    are ``put`` with its index.
    """
    return [first, *(_another(first, index, partial(_put_at, put, index)) for index in range(1, count))]


def _another(first: Sequence, index: int, deliver: Callable[[list[Event]], None]) -> Sequence:
    params = first.sampling.params
    return replace(
        first,
        answer=index,
        composition=first.composition.again(),
        sampling=replace(first.sampling, params=replace(params, seed=params.seed + index)),
        clock=replace(first.clock, measured_ns=dict(first.clock.measured_ns)),
        deliver=deliver,
        generated=[],
        told=set(),
    )


def _put_at(put: Callable[[list[Event], int], None], index: int, events: list[Event]) -> None:
    put(events, index)
