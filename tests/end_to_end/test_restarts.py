"""Processes that die in the middle of their work: the other one goes on, and nobody waits for ever."""

from __future__ import annotations

import platform
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

import cairn
from cairn import Client, Result
from cairn.client.requests import generate_request
from tests.decode_service.models import tokens
from tests.decode_service.pair import wait_until
from tests.end_to_end.processes import Process
from tests.nursery import nursery

LONG = 1800  # tokens of a chunk that takes the prefill service some seconds: eight tokens a forward


@pytest.fixture
def client(running: tuple[Process, Process]) -> Iterator[Client]:
    prefill, decode = running
    for process in running:
        process.revive()
    with Client(prefill.address, decode.address, timeout_s=60) as opened:
        yield opened


def later(client: Client, parts: list[list[int]], **options: Any) -> Future[Result]:
    threads = ThreadPoolExecutor(1)
    future = threads.submit(lambda: client.generate(parts, max_tokens=4, ignore_eos=True, **options).finish())
    threads.shutdown(wait=False)
    return future


def test_prefill_is_killed_while_it_computes(running: tuple[Process, Process], client: Client) -> None:
    prefill, _ = running
    warm = client.generate([tokens(1, 40), [5]], max_tokens=4, ignore_eos=True).finish()
    waits = later(client, [tokens(2, LONG), [5]])
    wait_until(lambda: client.loads().running == 1)
    time.sleep(0.2)
    prefill.kill()
    again = client.generate([tokens(1, 40), [5]], max_tokens=4, ignore_eos=True).finish()
    assert again.token_ids == warm.token_ids and again.usage.computed_tokens == 1
    assert not waits.done()
    prefill.launch()
    prefill.wait_ready()
    result = waits.result(60)
    assert result.reuse.segments[0].source == "computed"
    bypass = client.generate([tokens(2, LONG), [5]], max_tokens=4, ignore_eos=True, cache="bypass").finish()
    assert bypass.token_ids == result.token_ids


def test_prefill_stays_away(running: tuple[Process, Process], client: Client) -> None:
    """It is waited for as long as the callers have time, and they are told before that is over."""
    prefill, _ = running
    stored = client.generate([tokens(3, 40), [5]], max_tokens=4, ignore_eos=True).finish()
    prefill.kill()
    stub = client._services["decode"].stubs[0]  # the client would try again
    waiting = [stub.Generate(generate_request([tokens(4, 40), [5 + n]]), timeout=10) for n in range(3)]
    wait_until(lambda: client.loads().running == 3)
    assert client.generate([tokens(3, 40), [5]], max_tokens=4, ignore_eos=True).finish().token_ids == stored.token_ids
    assert client.explain([tokens(4, 40), [5]]).prompt_tokens == 41
    failures = [call.exception() for call in waiting]
    for failure in failures:
        if failure.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:  # on a busy machine the word may come too late
            assert failure.code() is grpc.StatusCode.UNAVAILABLE
            assert "prefill service" in failure.details() and "was not there for" in failure.details()
    wait_until(lambda: client.loads().running == 0)  # of a caller whose own deadline came first it is told later
    prefill.launch()
    prefill.wait_ready()
    assert later(client, [tokens(4, 40), [5]]).result(30).token_ids


def test_prefill_hangs(running: tuple[Process, Process], client: Client) -> None:
    """Stopped, not dead: the caller's own deadline ends the request, warm requests go on, and it recovers."""
    prefill, _ = running
    client.generate([tokens(5, 40), [5]], max_tokens=4).finish()
    prefill.pause()
    waits = later(client, [tokens(6, 40), [5]], timeout_s=1.0)
    assert client.generate([tokens(5, 40), [6]], max_tokens=4).finish().usage.computed_tokens == 1
    with pytest.raises(cairn.DeadlineExceeded):
        waits.result(20)
    wait_until(lambda: client.loads().running == 0 and client.loads().pages_tails == 0)
    prefill.resume()
    assert later(client, [tokens(6, 40), [5]]).result(30).token_ids


def test_decode_is_killed_and_finds_everything_in_the_store(running: tuple[Process, Process], client: Client) -> None:
    _, decode = running
    parts = [tokens(7, 40), tokens(8, 30), [5]]
    before = client.generate(parts, max_tokens=4, ignore_eos=True).finish()
    stream = client.generate(parts, max_tokens=1500, ignore_eos=True)
    next(stream)
    decode.kill()
    with pytest.raises(cairn.Unavailable):
        stream.finish()
    decode.launch()
    decode.wait_ready()
    after = later(client, parts).result(60)
    assert after.token_ids == before.token_ids
    assert [segment.source for segment in after.reuse.segments] == ["store", "store", "computed"]


def test_both_end_when_they_are_asked_to(running: tuple[Process, Process], client: Client) -> None:
    client.close()
    assert [process.end() for process in reversed(running)] == [0, 0]


@pytest.mark.slow
def test_a_conversation_goes_on_whoever_was_killed(running: tuple[Process, Process], client: Client) -> None:
    """Right behind an answer, while its turn is computed, registered or written; and while nobody computes."""
    prefill, decode = running
    opening = [tokens(60, 40)]
    talk = client.conversation(None, opening, max_tokens=5, ignore_eos=True)
    talk.ask(tokens(61, 9))
    decode.kill()
    decode.launch()
    decode.wait_ready()
    talk.ask(tokens(62, 9))
    prefill.kill()
    other = talk.branch(1)  # all of this was computed before
    other.ask(tokens(63, 9))
    prefill.launch()
    prefill.wait_ready()
    talk.ask(tokens(64, 9))
    other.ask(tokens(65, 9))
    for each in (talk, other):
        before: list[Any] = list(opening)
        for turn in each.turns:
            parts = [*before, list(turn.kept.query_token_ids)]
            anew = client.generate(parts, max_tokens=5, ignore_eos=True, cache="bypass").finish()
            assert anew.token_ids == turn.result.token_ids
            before.append(cairn.Tokens(turn.token_ids, type="turn"))


def test_forked_services_are_processes(tmp_path: Path) -> None:
    """Words, exit status and signals of what the tests of this folder start."""
    said = (tmp_path / "said").open("w")
    with said:
        ended = nursery().start("platform", ["terse"], said.fileno())
        missing = nursery().start("no_such_module_of_ours", [], said.fileno())
        assert ended.stdout.read().strip() == platform.platform(terse=True) and ended.wait(60) == 0
        assert missing.wait(60) == 1 and missing.poll() == 1
        asleep = nursery().start("http.server", ["0", "--bind", "127.0.0.1"], said.fileno(), PYTHONUNBUFFERED="1")
        assert asleep.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            asleep.wait(0.01)
        asleep.kill()
        assert asleep.wait(60) == -signal.SIGKILL
    assert "No module named no_such_module_of_ours" in (tmp_path / "said").read_text()
