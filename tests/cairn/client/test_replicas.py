"""Both clients against several scripted services: who is asked, who is asked next, and what the caller is told."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

import cairn
from cairn import AsyncClient, Client
from cairn.client import watching
from cairn.client.replicas import addresses_of
from cairn.local.processes import free_port
from tests.cairn.cairn_fakes import FakeServices, digits

UNAVAILABLE = (grpc.StatusCode.UNAVAILABLE, "the service is shutting down; try another one")
DEADLINE_S = 60.0


@pytest.fixture
def three() -> Iterator[list[FakeServices]]:
    fakes = [FakeServices() for _ in range(3)]
    for each in fakes:
        each.script.alone = False
    yield fakes
    for each in fakes:
        each.script.endless = False
        each.stop()


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "POLL_S", 0.05)
    monkeypatch.setattr(watching, "ANSWER_S", 1.0)
    monkeypatch.setattr("cairn.client.transport.FIRST_DELAY_S", 0.001)


def addresses(fakes: list[FakeServices]) -> list[str]:
    return [each.address for each in fakes]


def open_client(fakes: list[FakeServices], **options: Any) -> Client:
    return Client(fakes[0].address, addresses(fakes), **{"timeout_s": DEADLINE_S, **options})


def run(fakes: list[FakeServices], scenario: Callable[[AsyncClient], Awaitable[None]], **options: Any) -> None:
    async def main() -> None:
        where = ",".join(addresses(fakes))
        async with AsyncClient(fakes[0].address, where, **{"timeout_s": DEADLINE_S, **options}) as client:
            await scenario(client)

    asyncio.run(main())


def asked(fakes: list[FakeServices]) -> list[int]:
    return [len(each.script.requests) for each in fakes]


def home(fakes: list[FakeServices], client: Client, parts: list[Any]) -> FakeServices:
    """Who gets a request of these parts."""
    before = asked(fakes)
    client.generate(parts).finish()
    return next(fake for fake, was, now in zip(fakes, before, asked(fakes), strict=True) if now > was)


def wait_until(holds: Callable[[], bool]) -> None:
    ends_at = time.monotonic() + DEADLINE_S
    while not holds():
        assert time.monotonic() < ends_at, "the condition did not come about"
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("a:1", ("a:1",)),
        ("a:1,b:2", ("a:1", "b:2")),
        (" a:1 , b:2,", ("a:1", "b:2")),
        (["a:1", "b:2"], ("a:1", "b:2")),
        (("a:1,b:2", "c:3"), ("a:1", "b:2", "c:3")),
        ("ipv4:10.0.0.1:1,10.0.0.2:1", ("ipv4:10.0.0.1:1,10.0.0.2:1",)),
    ],
)
def test_addresses(given: Any, found: tuple[str, ...]) -> None:
    assert addresses_of(given) == found


@pytest.mark.parametrize("given", ["", ",", [], ["a:1", "a:1"], "a:1,b:1,a:1", [1], [f"a:{n}" for n in range(65)]])
def test_addresses_that_cannot_be_meant(given: Any) -> None:
    with pytest.raises(cairn.InvalidRequest, match="INVALID_ARGUMENT: decode: "):
        Client("a:1", given)
    with pytest.raises(cairn.InvalidRequest, match="decode: "):
        AsyncClient("a:1", given)


def test_the_same_document_goes_to_the_same_service(three: list[FakeServices]) -> None:
    with open_client(three) as client:
        homes = {n: home(three, client, ["d" * 100 + str(n), "q"]).address for n in range(12)}
        assert {n: home(three, client, ["d" * 100 + str(n), "r"]).address for n in range(12)} == homes
        assert len(set(homes.values())) == 3
        assert client.explain(["d" * 100 + "0", "q"]).prompt_tokens == 9
    with open_client(three[::-1]) as client:
        assert {n: home(three, client, ["d" * 100 + str(n), "q"]).address for n in range(12)} == homes


def test_the_async_client_finds_the_same_place(three: list[FakeServices]) -> None:
    with open_client(three) as client:
        there = [home(three, client, [f"document {n} " * 9, "q"]) for n in range(6)]

    async def scenario(other: AsyncClient) -> None:
        for n in range(6):
            before = len(there[n].script.requests)
            await other.generate([f"document {n} " * 9, "q"]).finish()
            assert len(there[n].script.requests) == before + 1

    run(three, scenario)


@pytest.mark.parametrize("code", ["UNAVAILABLE", "CANCELLED"])
def test_what_had_no_token_goes_elsewhere(three: list[FakeServices], code: str) -> None:
    with open_client(three) as client:
        first = home(three, client, ["d" * 100, "q"])
        first.script.fail = [(grpc.StatusCode[code], "shutting down")]
        second = home([each for each in three if each is not first], client, ["d" * 100, "q"])
        assert second is not first and len(first.script.requests) == 2
        assert {request.request_id for request in (first.script.requests[-1], second.script.requests[-1])} == {""}
        ids = [each.script.metadata[-1]["x-request-id"] for each in (first, second)]
        assert ids[0] == ids[1], "it is one request to whoever reads the logs"


def test_what_had_no_token_goes_elsewhere_in_a_loop(three: list[FakeServices]) -> None:
    for each in three[:2]:
        each.script.fail = [UNAVAILABLE] * 9

    async def scenario(client: AsyncClient) -> None:
        for n in range(6):
            assert (await client.generate([f"d{n}" * 50, "q"]).finish()).text == "Cairn is stone."
        assert (await client.explain(["d" * 100, "q"])).prompt_tokens == 9

    run(three, scenario)
    assert len(three[2].script.requests) == 7


def test_after_a_token_it_goes_nowhere(three: list[FakeServices]) -> None:
    for each in three:
        each.script.fail_after_words = UNAVAILABLE

    async def scenario(client: AsyncClient) -> None:
        with pytest.raises(cairn.Unavailable, match="broke off after 3 tokens"):
            await client.generate(["d" * 100, "q"]).finish()

    with open_client(three) as client, pytest.raises(cairn.Unavailable, match="broke off after 3 tokens"):
        client.generate(["d" * 100, "q"]).finish()
    assert sum(asked(three)) == 1
    run(three, scenario)
    assert sum(asked(three)) == 2


def test_a_full_service_is_passed_over_and_when_all_are_full_that_is_said(three: list[FakeServices]) -> None:
    from serving.rpc.details import details_metadata

    full = grpc.StatusCode.RESOURCE_EXHAUSTED
    metadata = details_metadata(full, "full", retry_after_s=0.25)

    def refuse(fake: FakeServices) -> None:
        def enter(request: Any, context: Any) -> None:
            fake.script.requests.append(request)
            context.set_trailing_metadata(metadata)
            context.abort(full, "the line is full")

        fake.script.enter = enter

    refuse(three[0])
    refuse(three[1])
    with open_client(three) as client:
        for n in range(6):
            client.generate([f"d{n}" * 50, "q"]).finish()
        assert all(state == "up" for state, _ in client._services["decode"].fleet.router.known())
        refuse(three[2])
        with pytest.raises(cairn.Overloaded, match="no decode service takes it") as caught:
            client.generate(["d" * 100, "q"]).finish()
    assert caught.value.retry_after_s == 0.25
    assert all(each.address in caught.value.source and each.address not in caught.value.message for each in three)


def test_nobody_is_there_and_each_is_named() -> None:
    places = [f"127.0.0.1:{free_port('127.0.0.1')}" for _ in range(3)]

    async def scenario() -> None:
        async with AsyncClient(places[0], places, timeout_s=DEADLINE_S) as client:
            with pytest.raises(cairn.Unavailable, match="no decode service takes it") as caught:
                await client.generate(["d", "q"]).finish()
            assert all(place in str(caught.value) for place in places)

    with Client(places[0], places, timeout_s=DEADLINE_S) as client:
        for call in (lambda: client.generate(["d", "q"]).finish(), lambda: client.explain(["d", "q"])):
            with pytest.raises(cairn.Unavailable, match="no decode service takes it") as caught:
                call()
            assert all(place in str(caught.value) for place in places)
        with pytest.raises(cairn.Unavailable):
            client.loads()
        with pytest.raises(cairn.Unavailable):
            client.abort("r")
    asyncio.run(scenario())


def test_one_that_drains_gets_nothing_new_and_is_used_again_when_it_is_back(three: list[FakeServices]) -> None:
    with open_client(three) as client:
        first = home(three, client, ["d" * 100, "q"])
        first.script.away = UNAVAILABLE
        wait_until(lambda: ("away", UNAVAILABLE[1]) in client._services["decode"].fleet.router.known())
        before = len(first.script.requests)
        for n in range(12):
            client.generate([f"d{n}" * 50, "q"]).finish()
        assert len(first.script.requests) == before
        first.script.away = None
        wait_until(lambda: all(state == "up" for state, _ in client._services["decode"].fleet.router.known()))
        assert home(three, client, ["d" * 100, "q"]) is first


def hang(fake: FakeServices) -> None:
    fake.script.delay_s, fake.script.loads_hang = DEADLINE_S, True


def test_what_waits_where_nobody_answers_leaves(three: list[FakeServices]) -> None:
    with open_client(three) as client:
        first = home(three, client, ["d" * 100, "q"])
        running = client.generate(["d" * 100, "q"])
        next(running)
        hang(first)
        with ThreadPoolExecutor(4) as threads:
            waiting = [threads.submit(client.generate(["d" * 100, f"q{n}"]).finish) for n in range(3)]
            assert [each.result(DEADLINE_S).text for each in waiting] == ["Cairn is stone."] * 3
        assert running.finish().text == "Cairn is stone.", "what has begun stays"
        assert client._services["decode"].fleet.router._replicas[three.index(first)].own == 0


def test_what_waits_where_nobody_answers_leaves_in_a_loop(three: list[FakeServices]) -> None:
    async def scenario(client: AsyncClient) -> None:
        await client.generate(["d" * 100, "q"]).finish()
        first = next(each for each in three if each.script.requests)
        hang(first)
        streams = [client.generate(["d" * 100, f"q{n}"]) for n in range(3)]
        done = await asyncio.gather(*(stream.finish() for stream in streams))
        assert [each.text for each in done] == ["Cairn is stone."] * 3
        assert [each.own for each in client._services["decode"].fleet.router._replicas] == [0, 0, 0]

    run(three, scenario)


def test_a_deadline_holds_where_all_hang(three: list[FakeServices]) -> None:
    for each in three:
        hang(each)

    async def scenario(client: AsyncClient) -> None:
        with pytest.raises((cairn.DeadlineExceeded, cairn.Unavailable)):
            await client.generate(["d", "q"]).finish()

    with open_client(three, timeout_s=0.5) as client:
        with pytest.raises((cairn.DeadlineExceeded, cairn.Unavailable)):
            client.generate(["d", "q"]).finish()
        with pytest.raises(cairn.DeadlineExceeded):
            client.loads()
    run(three, scenario, timeout_s=0.5)


def test_abort_finds_it_wherever_it_is(three: list[FakeServices]) -> None:
    async def scenario(client: AsyncClient) -> None:
        assert await client.abort("running") and not await client.abort("gone")

    with open_client(three) as client:
        assert client.abort("running") and not client.abort("gone")
    run(three, scenario)
    three[0].stop()
    with open_client(three) as client:
        assert client.abort("running") and not client.abort("gone"), "the dead run nothing"


def test_loads_are_those_of_all(three: list[FakeServices]) -> None:
    three[1].script.away = UNAVAILABLE

    def check(loads: cairn.Loads) -> None:
        assert (loads.running, loads.pages_total, loads.page_size, loads.model_name) == (2, 200, 16, "fake")
        assert [each.address for each in loads.replicas] == addresses(three)
        assert [each.state for each in loads.replicas] == ["up", "away", "up"]
        assert loads.replicas[1].why == UNAVAILABLE[1] and loads.replicas[1].loads is None
        assert loads.replicas[0].loads.running == 1

    async def scenario(client: AsyncClient) -> None:
        check(await client.loads())

    with open_client(three) as client:
        check(client.loads())
    run(three, scenario)


def test_services_of_different_models_are_refused(three: list[FakeServices]) -> None:
    three[1].script.model = "another"

    async def scenario(client: AsyncClient) -> None:
        with pytest.raises(cairn.Unsupported, match="do not have the same model"):
            await client.generate(["q"]).finish()
        with pytest.raises(cairn.Unsupported, match="do not have the same model"):
            await client.explain(["q"])

    with open_client(three) as client:
        with pytest.raises(cairn.Unsupported, match=f"decode: .*{three[1].address} serves fake") as caught:
            client.generate(["q"])
        assert caught.value.code == "FAILED_PRECONDITION"
    run(three, scenario)
    assert asked(three) == [0, 0, 0]


@pytest.mark.parametrize("how", ["close", "drop", "read"])
def test_nothing_is_left_of_a_stream(three: list[FakeServices], how: str) -> None:
    for each in three:
        each.script.endless = how != "read"
    with open_client(three) as client:
        fleet = client._services["decode"].fleet
        stream = client.generate(["d" * 100, "q"])
        next(stream)
        assert sum(each.own for each in fleet.router._replicas) == 1
        if how == "close":
            stream.close()
        elif how == "read":
            stream.finish()
        del stream
        gc.collect()
        assert [each.own for each in fleet.router._replicas] == [0, 0, 0]
        assert not any(fleet._routes)


def test_kept_turns_go_where_the_conversation_is(three: list[FakeServices]) -> None:
    with open_client(three) as client:
        for number in range(6):
            before = asked(three)
            talk = client.conversation(f"system {number}")
            for question in ("one", "two", "three"):
                talk.ask(question)
            gained = [now - was for now, was in zip(asked(three), before, strict=True)]
            assert sorted(gained) == [0, 0, 3]


def test_what_goes_elsewhere_has_not_got_more_time_to_be_started(three: list[FakeServices]) -> None:
    """A request may wait so long in all, wherever it waits."""

    def slow(fake: FakeServices) -> None:
        def late(request: Any, context: Any) -> None:
            fake.script.requests.append(request)
            time.sleep(0.2)
            context.abort(*UNAVAILABLE)

        fake.script.enter = late

    def check() -> None:
        given = sorted((each.script.requests[0].start_within_s for each in three), reverse=True)
        assert given[0] > 99.9 and given[1] <= given[0] - 0.2 and given[2] <= given[1] - 0.2
        for each in three:
            each.script.requests.clear()

    async def scenario(client: AsyncClient) -> None:
        with pytest.raises(cairn.Unavailable):
            await client.generate(["q"], start_within_s=100.0).finish()

    for each in three:
        slow(each)
    with open_client(three) as client, pytest.raises(cairn.Unavailable):
        client.generate(["q"], start_within_s=100.0).finish()
    check()
    run(three, scenario)
    check()


def test_a_chat_stays_where_it_began_however_busy_that_is(three: list[FakeServices]) -> None:
    with open_client(three) as client:
        router = client._services["decode"].fleet.router

        def place_of(said: list[dict[str, str]]) -> int:
            before = asked(three)
            said.append({"role": "assistant", "content": client.chat(said).finish().text})
            return next(n for n, now in enumerate(asked(three)) if now > before[n])

        for number in range(6):
            said = [
                {"role": "system", "content": "Be terse. " * 40},
                {"role": "user", "content": f"Question {number}?"},
            ]
            began = place_of(said)
            router._replicas[began].own += 50
            for _ in range(2):
                said.append({"role": "user", "content": "And then?"})
                assert place_of(said) == began
            another = [said[0], {"role": "user", "content": f"Another question {number}?"}]
            assert place_of(another) != began
            router._replicas[began].own -= 50


def test_a_document_goes_to_one_place_in_full_and_by_its_id(three: list[FakeServices]) -> None:
    """The fakes call the first segment of every prompt by one id."""
    for number in range(4):
        with open_client(three) as client:
            there = home(three, client, [f"document {number} " * 20, "q"])
            assert home(three, client, [cairn.ChunkRef(digits("a")), "q"]) is there
