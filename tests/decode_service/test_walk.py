"""One request, one walk: all missing chunks in one call, each brought in as it is made, whatever else happens."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cairn import Result
from chunk_store.key import ChunkKey
from chunk_store.open import open_store
from chunk_store.store import Busy, Stored
from engine.reuse import ReuseMode, key_composition
from tests.decode_service.models import loaded, tokens
from tests.decode_service.pair import Pair, pair, wait_until
from tests.decode_service.test_prefill_peers import IMPATIENT, Frozen, hung_up, through
from tests.decode_service.test_pressure import asking, later

Mode = Literal["exact", "anchored", "independent"]
MODES: tuple[Mode, ...] = ("exact", "anchored", "independent")
QUERY = [5, 6, 7]


@contextmanager
def computed_only_when_freed(services: Pair, *held: Sequence[int]) -> Iterator[dict[tuple[int, ...], threading.Event]]:
    """The prefill service stops before it computes one of the ``held`` contents, until its event is set."""
    runner = services.prefill_pool.runner
    begin, free = runner.begin, {tuple(content): threading.Event() for content in held}

    def slow(batch: Sequence[Any]) -> Any:
        for content, event in free.items():
            if tuple(batch[0].sources) == content[: len(batch[0].sources)]:
                assert event.wait(60)
        return begin(batch)

    runner.begin = slow
    try:
        yield free
    finally:
        for event in free.values():
            event.set()
        runner.begin = begin


def keys(services: Pair, contents: Sequence[Sequence[int]], mode: Mode) -> list[ChunkKey]:
    identity = services.decode.worker.model
    return [key.key for key in key_composition(identity, [tuple(each) for each in contents], ReuseMode(mode))]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stored", [(), (0,), (1,), (0, 2)])
def test_all_that_is_missing_is_one_call(services: Pair, mode: Mode, stored: Sequence[int]) -> None:
    """Where a chunk has KV already it is not asked for; in EXACT it has under the chunks before it only."""
    seed = 1000 + 100 * MODES.index(mode) + 10 * sum(1 << index for index in stored)
    documents = [tokens(seed + index, 20 + index) for index in range(4)]
    for index in stored:
        services.generate([*documents[: index + 1], QUERY], reuse=mode)
    services.forget()
    there = [info is not None for info in services.decode.store.lookup(keys(services, documents, mode))]
    with asking(services) as asked:
        result = services.generate([*documents, QUERY], reuse=mode)
    assert [list(indices) for indices in asked] == [[index for index in range(4) if not there[index]]]
    sources = [segment.source for segment in result.reuse.segments[:4]]
    assert sources == ["store" if each else "computed" for each in there]
    assert result.token_ids == services.generate([*documents, QUERY], reuse=mode, cache="bypass").token_ids
    assert result.timings.prefill_s > 0.0


@pytest.mark.parametrize("mode", MODES)
def test_a_chunk_can_be_read_while_the_next_one_is_computed(services: Pair, mode: Mode) -> None:
    """Who waits for the first chunk alone is answered while the second is not even begun."""
    first, second = (tokens(1500 + 10 * MODES.index(mode) + number, 30) for number in range(2))
    with computed_only_when_freed(services, second) as free:
        both = later(services, [first, second, QUERY], reuse=mode)
        wait_until(lambda: services.client.loads().running == 1)
        joined = services.generate([first, [8]], reuse=mode)
        assert joined.reuse.segments[0].source == "device" and not both.done()
        free[tuple(second)].set()
        assert [segment.source for segment in both.result(60).reuse.segments[:2]] == ["computed", "computed"]


def test_what_is_stored_is_read_while_the_rest_is_computed(services: Pair) -> None:
    stored, missing = tokens(1600, 30), tokens(1601, 30)
    services.generate([stored, QUERY], reuse="independent")
    services.forget()
    with computed_only_when_freed(services, missing) as free:
        both = later(services, [missing, stored, QUERY], reuse="independent")
        wait_until(lambda: services.client.loads().running == 1)
        joined = services.generate([stored, [8]], reuse="independent")
        assert joined.reuse.segments[0].source == "device" and not both.done()
        free[tuple(missing)].set()
        assert [segment.source for segment in both.result(60).reuse.segments[:2]] == ["computed", "store"]


def test_a_connection_that_hangs_in_the_middle_costs_what_was_not_answered_for(
    services: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first chunk came; the second is asked for again, alone, on a new connection."""
    # What is lent in a reply that is lost is given back when its lease runs out: not waited for here.
    monkeypatch.setattr(services.decode.worker.loader.source, "borrower", None)
    first, second = tokens(1650, 30), tokens(1651, 30)
    jobs = services.prefill.jobs
    compose, wanted = jobs.compose, []

    def noted(request: Any, timer: Any) -> Any:
        wanted.append(request.wanted)
        return compose(request, timer)

    jobs.compose = noted
    proxy = Frozen(services.prefill_address)
    try:
        with through(services, proxy.address, **IMPATIENT), computed_only_when_freed(services, second) as free:
            both = later(services, [first, second, QUERY], timeout_s=60)
            wait_until(lambda: services.client.loads().running == 1)
            assert services.generate([first, [8]]).reuse.segments[0].source == "device"
            proxy.flows.clear()
            wait_until(lambda: len(proxy._sockets) > 2 or hung_up(proxy._sockets[0]))
            proxy.flows.set()
            wait_until(lambda: len(wanted) > 1)
            free[tuple(second)].set()
            assert both.result(60).reuse.segments[1].source == "computed"
    finally:
        jobs.compose = compose
        proxy.close()
    assert wanted == [(0, 1), (1,)]


def test_an_aborted_request_leaves_what_others_wait_for_and_no_more(services: Pair) -> None:
    """It waits for three chunks, another request for the second; the third is not computed for nobody."""
    documents = [tokens(1700 + number, 30) for number in range(3)]
    with computed_only_when_freed(services, documents[1]) as free:
        one = later(services, [*documents, QUERY], reuse="independent", request_id="walks")
        wait_until(lambda: services.client.loads().running == 1)
        other = later(services, [documents[1], QUERY], reuse="independent")
        wait_until(lambda: services.client.loads().running == 2)
        assert services.client.abort("walks")
        assert one.result(60).finish_reason == "abort"
        free[tuple(documents[1])].set()
        assert other.result(60).token_ids
    services.check_idle()


@dataclass(frozen=True)
class World:
    """What had happened to each of four documents before they are asked for: see ``prepare``."""

    mode: Mode
    before: tuple[str, ...]
    order: tuple[int, ...]
    second: tuple[int, ...]  # of another request at the same time


STATES = ("cold", "stored", "resident", "evicted", "claimed", "given up")
worlds = st.builds(
    World,
    mode=st.sampled_from(MODES),
    before=st.tuples(*[st.sampled_from(STATES)] * 4),
    order=st.lists(st.integers(0, 3), min_size=1, max_size=5).map(tuple),
    second=st.lists(st.integers(0, 3), min_size=1, max_size=3).map(tuple),
)


@dataclass
class Two:
    """Two decode services and a prefill service each, on one store; the first borrows what its prefill service has."""

    pairs: list[Pair]
    store: Path
    seed: int = 5000


@pytest.fixture(scope="module")
def two(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Two]:
    store = tmp_path_factory.mktemp("walks")
    with (
        pair(loaded(folder, "prefill"), loaded(folder, "decode"), store) as one,
        pair(loaded(folder, "prefill 2"), loaded(folder, "decode 2"), store, hand_over=False) as other,
    ):
        yield Two([one, other], store)
        one.check_idle()
        other.check_idle()


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(world=worlds)
def test_whatever_happened_before_or_meanwhile_the_answer_is_that_of_plain_computing(two: Two, world: World) -> None:
    two.seed += 10
    documents = [tokens(two.seed + index, 12 + 7 * index) for index in range(4)]
    one, other = two.pairs
    prompts = [[documents[index] for index in order] for order in (world.order, world.second)]
    expected = [one.generate([*prompt, QUERY], reuse=world.mode, cache="bypass") for prompt in prompts]
    claims = prepare(two, world, prompts[0])
    with ThreadPoolExecutor(3) as threads:
        running = [
            threads.submit(services.generate, [*prompt, QUERY], reuse=world.mode)
            for services, prompt in ((one, prompts[0]), (other, prompts[0]), (other, prompts[1]))
        ]
        for claim in claims:
            claim.abort()
        results = [each.result(60) for each in running]
    for result, wanted in zip(results, (expected[0], expected[0], expected[1]), strict=True):
        assert result.token_ids == wanted.token_ids
        check_report(result)


def prepare(two: Two, world: World, prompt: Sequence[list[int]]) -> list[Any]:
    """Brings each place of the prompt about, by its document; claims that others seem to hold, and give up."""
    one, claims = two.pairs[0], []
    chunks = keys(one, prompt, world.mode)
    opened: Any = open_store(f"file://{two.store}")
    for place, index in enumerate(world.order):
        state = world.before[index]
        if state in ("stored", "resident", "evicted"):
            one.generate([*prompt[: place + 1], QUERY], reuse=world.mode)
        if state in ("stored", "evicted"):
            one.forget()
        if state == "evicted":
            opened.ledger.claims.evict(1 << 40)
    for place, index in enumerate(world.order):
        state, key = world.before[index], chunks[place]
        if state in ("claimed", "given up"):
            claim = opened.begin(key)
            if isinstance(claim, Stored | Busy):
                continue
            if state == "given up":
                claim.abort()
            else:
                claims.append(claim)
    return claims


def check_report(result: Result) -> None:
    usage, segments = result.usage, result.reuse.segments
    assert usage.cached_tokens + usage.computed_tokens == usage.prompt_tokens
    assert usage.cached_tokens == sum(segment.cached_tokens for segment in segments)
    for segment in segments[:-1]:
        assert bool(segment.miss_reason) == (segment.source == "computed") and not segment.unpublished
