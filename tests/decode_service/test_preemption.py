"""Answers whose pages run out under them are those of a pool that is large enough, token by token.

The runner's tokens are a function of all that their rows can see, so KV that was lost or moved shows.
"""

from __future__ import annotations

import random
from typing import Any

import pytest

from decode_service.scheduling.sequence import Event, Finished, FinishReason
from tests.decode_service.content import content_request
from tests.decode_service.scheduling.scheduled import PAGE, Scheduled, request
from tests.decode_service.test_packed import Served, served

WAYS = [
    {"packs": True, "runs_ahead": True},
    {"packs": True, "runs_ahead": False},
    {"packs": False, "runs_ahead": True},
    {"packs": False, "runs_ahead": False},
]


def ask(it: Served, seed: int, count: int) -> None:
    rng = random.Random(seed)
    for n in range(count):
        made = content_request(f"{n}", rng, max_tokens=rng.choice((2, 25, 40, 60)))
        made.priority = rng.choice((0, 0, 9))
        it.submit(made)


def answers(it: Served, count: int) -> list[tuple[list[int], Event]]:
    return [it.answer(f"{n}") for n in range(count)]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("aside", [0, 12, 1000], ids=lambda pages: f"{pages} pages aside")
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_answers_are_those_of_a_large_pool(way: dict[str, Any], aside: int, seed: int) -> None:
    count = 24
    with served(pages=400, chunk_pages=40, batch_max=8, **way) as large:
        ask(large, seed, count)
        expected = answers(large, count)
        assert large.counted("preemptions_total", reason="growth") == 0
        large.check_idle()
    with served(pages=40 + 30, chunk_pages=40, batch_max=8, aside_pages=aside, **way) as small:
        ask(small, seed, count)
        assert answers(small, count) == expected
        assert all(isinstance(end, Finished) for _, end in expected)
        assert small.counted("preemptions_total", reason="growth") > 3
        small.check_idle()


def at_once(max_tokens: int, *, tail_pages: int) -> int:
    """How many of 128 requests run together at most, of which each stops after 50 tokens."""
    on = Scheduled(tail_pages=tail_pages, batch_max=128)
    on.submit(*(request(f"{n}", tail=8, max_tokens=max_tokens) for n in range(128)))
    most = 0
    while on.scheduler.everyone:
        plan = on.plan()
        most = max(most, on.scheduler.running)
        on.run(plan)
        for sequence in on.sequences:
            if len(sequence.generated) == 50 and not sequence.done:
                on.scheduler.finish(sequence, FinishReason.STOP, 10**6)
    on.check_idle()
    return most


def test_requests_that_stop_early_do_not_keep_pages_for_what_they_might_have_said() -> None:
    """Reserved for ``max_tokens``, 7 of these would run at once."""
    of_one = -(-(8 + 4096 - 1) // PAGE)
    assert at_once(4096, tail_pages=7 * of_one) >= 5 * 7
