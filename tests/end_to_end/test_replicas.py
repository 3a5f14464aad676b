"""Three decode services over one store, as one: shared work, failures of every kind, conversations that stay."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

import cairn
from cairn import AsyncClient, AsyncGeneration, Client, Result
from cairn.client import watching
from tests.decode_service.models import model_dir, tokens
from tests.decode_service.pair import wait_until
from tests.end_to_end.processes import ROOT, Process, replicas

Fleet = tuple[Process, ...]
DEADLINE_S = 60.0
AT_ONCE = 2  # requests that a service runs; more wait there without a token


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    folder = model_dir(tmp_path_factory.mktemp("models") / "tiny")
    with replicas(folder, tmp_path_factory.mktemp("store"), 3, "--batch-max", str(AT_ONCE)) as everyone:
        yield everyone


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "POLL_S", 0.1)
    monkeypatch.setattr(watching, "ANSWER_S", 2.0)


@pytest.fixture
def client(running: Fleet) -> Iterator[Client]:
    with Client(running[0].address, places(running), timeout_s=DEADLINE_S) as opened:
        opened.loads()
        yield opened


def places(running: Fleet) -> list[str]:
    return [process.address for process in running[1:]]


def known(client: Client | AsyncClient) -> list[str]:
    return [state for state, _ in client._services["decode"].fleet.router.known()]


def ask(client: Client, parts: Sequence[Any], max_tokens: int = 4, **options: Any) -> Result:
    return client.generate(list(parts), max_tokens=max_tokens, ignore_eos=True, **options).finish()


def place_of(stream: Any) -> int:
    """Of which service it is, by number; -1 if of none."""
    return int(stream._route._at)


def computed_by(prefill: Process) -> float:
    """Tokens that the prefill service has computed."""
    with urllib.request.urlopen(f"http://127.0.0.1:{prefill.metrics_port}/metrics", timeout=DEADLINE_S) as reply:
        families = text_string_to_metric_families(reply.read().decode())
        return sum(
            sample.value
            for family in families
            for sample in family.samples
            if sample.name == "cairn_prefill_tokens_total" and sample.labels["source"] == "computed"
        )


@contextmanager
def each_alone(running: Fleet) -> Iterator[list[Client]]:
    clients = [Client(running[0].address, place, timeout_s=DEADLINE_S) for place in places(running)]
    try:
        yield clients
    finally:
        for each in clients:
            each.close()


def test_what_one_has_made_the_others_find(running: Fleet, client: Client) -> None:
    """Asked at once, a chunk is computed once (claims); afterwards it is resident, or in the store; answers agree."""
    document = tokens(1, 400)
    computed_before = computed_by(running[0])
    with each_alone(running) as clients, ThreadPoolExecutor(3) as threads:
        start = threading.Barrier(3)

        def together(one: Client) -> Result:
            start.wait(DEADLINE_S)
            return ask(one, [document, [5]])

        first = list(threads.map(together, clients))
        before = [one.token_ids for one in first]
        again = [ask(one, [document, [5]]) for one in clients]
        assert computed_by(running[0]) - computed_before == 400
        kept = ask(clients[0], [document, [7, 8]], keep=True).kept
        named = [cairn.ChunkRef(again[0].reuse.segments[0].chunk_id), cairn.ChunkRef(kept.id)]
        turns = [ask(one, [*named, [9]]) for one in clients]
    assert before == [first[0].token_ids] * 3 == [each.token_ids for each in again]
    assert {each.reuse.segments[0].source for each in again} <= {"device", "host"}
    assert [each.token_ids for each in turns] == [turns[0].token_ids] * 3
    identities = {(each.loads.model_identity, each.loads.tokenizer_identity) for each in client.loads().replicas}
    assert len(identities) == 1 and all(*identities)


def test_a_document_is_resident_where_it_is_asked_for(running: Fleet, client: Client) -> None:
    documents = [tokens(100 + n, 60) for n in range(12)]
    for document in documents:
        ask(client, [document, [5]])
    again = [ask(client, [document, [6]]) for document in documents]
    assert {each.reuse.segments[0].source for each in again} == {"device"}
    plans = [client.explain([document, [7]]) for document in documents]
    assert {plan.reuse.segments[0].source for plan in plans} == {"device"}
    counts = [loads.loads.chunks_resident for loads in client.loads().replicas]
    assert all(counts), "each has some of them"


def test_a_conversation_stays_where_it_is(running: Fleet, client: Client) -> None:
    for talk in (client.conversation(tokens(200 + n, 40), max_tokens=4, ignore_eos=True) for n in range(6)):
        for question in range(4):
            result = talk.ask(cairn.Tokens([5 + question]))
            assert question == 0 or {part.source for part in result.reuse.segments[:-1]} == {"device"}


def test_one_that_is_stopped_is_left(running: Fleet, client: Client) -> None:
    """SIGSTOP: it answers nobody and refuses nobody."""
    document = tokens(400, 30)
    ask(client, [document, [5]])
    stream = client.generate([document, [5]], max_tokens=2, ignore_eos=True)
    at = place_of(stream)
    stream.finish()
    running[1 + at].pause()
    try:
        with ThreadPoolExecutor(4) as threads:
            results = list(threads.map(lambda n: ask(client, [document, [6 + n]]), range(4)))
        assert all(len(each.token_ids) == 4 for each in results)
        wait_until(lambda: known(client)[at] == "hangs")
        with (
            Client(running[0].address, places(running)[at], timeout_s=1.0) as alone,
            pytest.raises(cairn.DeadlineExceeded),
        ):
            ask(alone, [document, [5]])
        assert not client.loads().replicas[at].loads
    finally:
        running[1 + at].resume()
    wait_until(lambda: known(client) == ["up"] * 3)
    again = client.generate([document, [99]], max_tokens=2, ignore_eos=True)
    assert place_of(again) == at and again.finish().token_ids


def test_one_that_drains_ends_what_it_has_and_gets_nothing_new(running: Fleet, client: Client) -> None:
    stream = client.generate([tokens(500, 30), [5]], max_tokens=600, ignore_eos=True)
    at = place_of(stream)
    next(stream)
    running[1 + at].child.terminate()
    wait_until(lambda: known(client)[at] == "away")
    others = [client.generate([tokens(500, 30), [6 + n]], max_tokens=2, ignore_eos=True) for n in range(4)]
    assert at not in {place_of(other) for other in others}
    assert all(other.finish().token_ids for other in others)
    assert len(stream.finish().token_ids) == 600
    assert running[1 + at].child.wait(30) == 0
    running[1 + at].revive()
    wait_until(lambda: [each.state for each in client.loads().replicas] == ["up"] * 3)
    back = client.generate([tokens(500, 30), [5]], max_tokens=2, ignore_eos=True)
    assert place_of(back) == at and back.finish().token_ids


def test_abort_and_loads_reach_all(running: Fleet, client: Client) -> None:
    streams = [
        client.generate([tokens(600 + n, 30), [5]], max_tokens=1500, ignore_eos=True, request_id=f"long {n}")
        for n in range(6)
    ]
    wait_until(lambda: client.loads().running + client.loads().waiting == 6)
    loads = client.loads()
    assert sum(each.loads.running + each.loads.waiting for each in loads.replicas) == 6
    with Client(running[0].address, places(running)[::-1], timeout_s=DEADLINE_S) as other:
        assert all(other.abort(f"long {n}") for n in range(6)) and not other.abort("nobody's")
    assert {stream.finish().finish_reason for stream in streams} == {"abort"}


def test_killed_in_the_middle_of_many_streams(running: Fleet, client: Client) -> None:
    """What has a token fails and says so; whatever has none is answered elsewhere, to the end."""

    async def scenario() -> None:
        async with AsyncClient(running[0].address, places(running), timeout_s=DEADLINE_S) as many:
            await many.loads()
            streams = [many.generate([tokens(300 + n, 30), [5]], max_tokens=150, ignore_eos=True) for n in range(18)]
            begun: set[int] = set()
            tasks = [asyncio.create_task(_read(stream, number, begun)) for number, stream in enumerate(streams)]
            victim = await _with_waiting(streams, begun)
            lost = {n for n in begun if place_of(streams[n]) == victim and streams[n]._open}
            waited = {n for n, each in enumerate(streams) if place_of(each) == victim} - lost
            running[1 + victim].kill()
            done = await asyncio.gather(*tasks, return_exceptions=True)
            failed = {n for n, each in enumerate(done) if isinstance(each, BaseException)}
            assert waited and lost
            for n in failed:
                assert isinstance(done[n], cairn.Unavailable), done[n]
                assert "the answer broke off after" in str(done[n]) and places(running)[victim] in str(done[n])
            assert failed <= lost | {n for n in waited if n in begun}
            assert len(failed) <= AT_ONCE + 1
            assert all(len(each.token_ids) == 150 for each in done if not isinstance(each, BaseException))
            assert [each.own for each in many._services["decode"].fleet.router._replicas] == [0, 0, 0]

    asyncio.run(scenario())
    wait_until(lambda: client.loads().running == 0)


async def _read(stream: AsyncGeneration, number: int, begun: set[int]) -> Result:
    async for _ in stream:
        begun.add(number)
    return stream.result


async def _with_waiting(streams: Sequence[AsyncGeneration], begun: set[int]) -> int:
    """The service where some streams have begun and some wait, once there is one."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            for replica in range(3):
                there = {n for n, stream in enumerate(streams) if place_of(stream) == replica}
                if there & begun and there - begun:
                    return replica
            await asyncio.sleep(0.005)


@contextmanager
def gateway(running: Fleet) -> Iterator[openai.OpenAI]:
    """A gateway over all three, as OpenAI's client has it."""
    argv = [sys.executable, "-m", "gateway", "--prefill", running[0].address, "--decode", ",".join(places(running))]
    child = subprocess.Popen([*argv, "--http-port", "0"], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        port = json.loads(child.stdout.readline())["port"]
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="x", max_retries=0, timeout=60) as client:
            yield client
    finally:
        child.terminate()
        assert child.wait(30) == 0


def test_the_gateway_passes_over_the_dead(running: Fleet, client: Client) -> None:
    assert "away" in [each.state for each in client.loads().replicas]
    with gateway(running) as http:
        model = http.models.list().data[0].id
        for number in range(6):
            document = {"text": f"document {number} " * 3}
            given: Any = {"model": model, "prompt": "a question", "max_tokens": 4, "temperature": 0}
            asked = [
                http.completions.create(**given, extra_body={"cairn": {"documents": [document]}}) for _ in range(2)
            ]
            assert asked[0].choices[0].text == asked[1].choices[0].text
            assert asked[1].usage.prompt_tokens_details.cached_tokens > 0
        told = http.get("/cairn/loads", cast_to=httpx.Response).text
        assert not any(place in told for place in places(running))


def test_a_conversation_outlives_its_service(running: Fleet, client: Client) -> None:
    wait_until(lambda: "unknown" not in known(client))
    talk = client.conversation(tokens(250, 40), max_tokens=4, ignore_eos=True)
    talk.ask(cairn.Tokens([5]))
    stream = talk.stream(cairn.Tokens([6]))
    at = place_of(stream)
    stream.finish()
    branch = talk.branch()
    before = talk.ask(cairn.Tokens([7])).token_ids
    running[1 + at].kill()
    result = branch.ask(cairn.Tokens([7]))
    assert result.token_ids == before
    assert {part.source for part in result.reuse.segments[:-1]} <= {"store", "computed"}
    later = branch.ask(cairn.Tokens([8]))
    assert {part.source for part in later.reuse.segments[:-1]} == {"device"}


def test_nobody_is_left(running: Fleet, client: Client) -> None:
    for process in running[1:]:
        if process.child.poll() is None:
            process.kill()
    with pytest.raises(cairn.Unavailable, match="no decode service takes it") as caught:
        ask(client, [tokens(700, 20), [5]])
    assert all(place in str(caught.value) for place in places(running))
