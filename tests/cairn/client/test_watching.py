"""Who asks the services how busy they are, when, and until when."""

from __future__ import annotations

import asyncio
import gc
import threading

import pytest

from cairn import AsyncClient
from cairn.client import watching
from tests.cairn.cairn_fakes import FakeServices
from tests.cairn.client.test_replicas import UNAVAILABLE, asked, open_client, run, soon, three, wait_until

__all__ = ["soon", "three"]  # fixtures


def watchers() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name == "cairn-replicas"]


def test_one_service_is_asked_nothing_in_the_background(three: list[FakeServices]) -> None:
    three[0].script.alone = True
    with open_client(three[:1]) as client:
        for _ in range(3):
            client.generate(["d", "q"]).finish()
    assert asked(three) == [3, 0, 0]
    assert not [each for each in threading.enumerate() if each.name == "cairn-replicas"]


def test_the_thread_that_watches_ends_with_its_client(three: list[FakeServices]) -> None:
    def watching_now() -> bool:
        return any(each.name == "cairn-replicas" for each in threading.enumerate())

    with open_client(three) as client:
        client.generate(["q"]).finish()
        assert watching_now()
    wait_until(lambda: not watching_now())
    client = open_client(three)
    client.generate(["q"]).finish()
    del client
    gc.collect()
    wait_until(lambda: not watching_now())


def test_nobody_is_asked_while_nothing_is_wanted(three: list[FakeServices], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "IDLE_S", 0.1)
    with open_client(three) as client:
        client.generate(["q"]).finish()
        wait_until(lambda: not any(each.name == "cairn-replicas" for each in threading.enumerate()))
        assert client.generate(["q"]).finish().text == "Cairn is stone."


def test_a_look_is_old_once_nothing_was_wanted_for_a_while(three, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first request afterwards is not sent where nobody is any more, and knows who has come back."""
    monkeypatch.setattr(watching, "IDLE_S", 0.1)
    three[0].script.away = UNAVAILABLE

    async def scenario(client: AsyncClient) -> None:
        def states() -> list[str]:
            return [state for state, _ in client._services["decode"].fleet.router.known()]

        await client.generate(["q"]).finish()
        assert states() == ["away", "up", "up"]
        task = client._services["decode"]._shared.task
        await asyncio.wait_for(task, 60)
        assert not client._services["decode"]._shared.looked.is_set()
        three[0].script.away = None
        await client.generate(["q"]).finish()
        assert states() == ["up"] * 3

    with open_client(three) as client:
        router = client._services["decode"].fleet.router
        client.generate(["q"]).finish()
        wait_until(lambda: not watchers())
        assert not client._services["decode"]._watch.looked.is_set()
        assert [state for state, _ in router.known()] == ["away", "up", "up"]
        three[0].script.away = None
        client.generate(["q"]).finish()
        assert [state for state, _ in router.known()] == ["up"] * 3
    three[0].script.away = UNAVAILABLE
    run(three, scenario)


def test_a_loop_that_ends_leaves_no_task(three) -> None:
    async def scenario(client: AsyncClient) -> None:
        await client.generate(["q"]).finish()
        other = client.with_token("another")
        await other.generate(["q"]).finish()
        assert len([task for task in asyncio.all_tasks() if task.get_name() == "cairn-replicas"]) == 1
        await client.aclose()
        assert not [task for task in asyncio.all_tasks() if task.get_name() == "cairn-replicas"]

    run(three, scenario)
    assert {each.script.metadata[-1].get("authorization") for each in three if each.script.metadata} <= {
        None,
        "Bearer another",
    }
