"""``AsyncClient`` runs the same calls; here only what an event loop makes different."""

from __future__ import annotations

import asyncio
import gc
import inspect
from collections.abc import Awaitable, Callable

import grpc
import pytest

import cairn
from cairn import AsyncClient, Client
from tests.cairn.cairn_fakes import digits

UNAVAILABLE = (grpc.StatusCode.UNAVAILABLE, "draining")


def run(services, scenario: Callable[[AsyncClient], Awaitable[None]], **options) -> None:
    async def main() -> None:
        async with AsyncClient(services.address, services.address, **{"timeout_s": 10, **options}) as client:
            await scenario(client)

    asyncio.run(main())


def test_both_clients_offer_the_same():
    def names(kind: type) -> dict[str, list[str]]:
        methods = inspect.getmembers(kind, inspect.isfunction)
        return {name: list(inspect.signature(method).parameters) for name, method in methods if name[0] != "_"}

    twins = names(AsyncClient)
    twins["close"] = twins.pop("aclose")
    assert twins == names(Client)


def test_all_calls(services):
    async def scenario(client: AsyncClient) -> None:
        chunk = await client.prefill("hello", name="n")
        assert (chunk.id, chunk.name) == (digits("hello"), "n")
        many = [result async for result in client.prefill_many(["one", "bad"])]
        assert isinstance(many[0], cairn.Chunk)
        assert (many[0].id, type(many[1])) == (digits("one"), cairn.InvalidRequest)
        assert [found.name async for found in client.chunks(page_size=2)] == [f"doc-{n}" for n in range(5)]
        known = await client.get(digits("chunk 001"), text=True)
        assert known.text == "the text"
        assert (await client.pin(known)).pinned and not (await client.unpin(known)).pinned
        assert (await client.delete(known)).kv_entries == 2
        assert (await client.explain([known, "q"])).prompt_tokens == 9
        assert (await client.stats()).backend == "file"
        assert (await client.loads()).page_size == 16
        assert await client.abort("running")

    run(services, scenario)


def test_generate(services):
    async def scenario(client: AsyncClient) -> None:
        stream = client.generate(["a", "q"])
        assert [delta.text async for delta in stream] == ["Cairn ", "is ", "stone."]
        assert stream.result.text == "Cairn is stone."
        assert (await client.generate(["q"]).finish()).token_ids == (0, 1, 2)
        await asyncio.sleep(0.1)
        assert not services.script.cancelled.is_set()

    run(services, scenario)


@pytest.mark.parametrize("how", ["aclose", "with", "drop", "task"])
def test_an_abandoned_stream_is_cancelled(services, how):
    services.script.endless = True

    async def read_forever(stream: cairn.AsyncGeneration) -> None:
        async for _ in stream:
            pass

    async def scenario(client: AsyncClient) -> None:
        stream = client.generate(["q"])
        await anext(stream)
        if how == "aclose":
            await stream.aclose()
            assert [delta async for delta in stream] == []
        elif how == "with":
            async with stream:
                await anext(stream)
        elif how == "task":
            task = asyncio.create_task(read_forever(stream))
            await asyncio.sleep(0.1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            del task
        del stream
        gc.collect()
        assert await asyncio.to_thread(services.script.cancelled.wait, 60)

    run(services, scenario)


def test_aclose_from_another_task_ends_the_loop(services):
    services.script.endless = True
    services.script.delay_s = 60.0

    async def scenario(client: AsyncClient) -> None:
        stream = client.generate(["q"])

        async def read() -> int:
            return len([delta async for delta in stream])

        task = asyncio.create_task(read())
        await asyncio.sleep(0.1)
        await stream.aclose()
        assert await asyncio.wait_for(task, 50) == 0

    run(services, scenario)


def test_errors_retries_and_deadlines(services):
    async def scenario(client: AsyncClient) -> None:
        services.script.fail = [UNAVAILABLE] * 2
        assert (await client.stats()).backend == "file"
        services.script.fail = [UNAVAILABLE] * 2
        assert (await client.generate(["q"]).finish()).text == "Cairn is stone."
        services.script.fail = [(grpc.StatusCode.NOT_FOUND, "chunk_id: gone")] * 2
        with pytest.raises(cairn.NotFound, match="gone"):
            await client.explain(["q"])
        with pytest.raises(cairn.NotFound, match="gone"):
            await client.generate(["q"]).finish()
        services.script.omit_complete = True
        with pytest.raises(cairn.ServerError, match="final message"):
            await client.generate(["q"]).finish()
        services.script.delay_s = 60.0
        with pytest.raises(cairn.DeadlineExceeded):
            await client.stats(timeout_s=0.1)

    run(services, scenario)


def test_after_the_first_delta_nothing_is_retried(services):
    services.script.fail_after_words = UNAVAILABLE

    async def scenario(client: AsyncClient) -> None:
        with pytest.raises(cairn.Unavailable):
            await client.generate(["q"]).finish()
        assert len(services.script.requests) == 1

    run(services, scenario)


def test_many_streams_at_once(services):
    async def scenario(client: AsyncClient) -> None:
        results = await asyncio.gather(*(client.generate(["q"], request_id=str(n)).finish() for n in range(20)))
        assert [result.request_id for result in results] == [str(n) for n in range(20)]

    run(services, scenario)
