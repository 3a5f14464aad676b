"""``AsyncClient``: the two services from an event loop.

What each call means is in ``cairn.client.calls``; this file only runs calls. ``cairn.client.client`` is its twin and
documents the arguments.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Any, Self, TypeVar, Unpack

from cairn.client import calls, replies
from cairn.client.answers import Explanation, Result
from cairn.client.calls import Call, ChatCallOptions, GenerateOptions, ListOptions, PrefillOptions
from cairn.client.chats import ChatMessageLike
from cairn.client.chunks import Chunk, Deleted, StoredChunk, StoreStats
from cairn.client.client import DEFAULT_DECODE, DEFAULT_PREFILL, DEFAULT_TIMEOUT_S
from cairn.client.conversation import AsyncConversation
from cairn.client.errors import CairnError, error_from_status
from cairn.client.generation import AsyncGeneration
from cairn.client.loads import Loads
from cairn.client.replicas import addresses_of
from cairn.client.requests import ChunkName, Segment
from cairn.client.transport import END, Attempts, CallFailed, Peer, Tls, error_from_rpc
from cairn.client.watching import ANSWER_S, LoopReplicas
from protos import decode_pb2

T = TypeVar("T")


class AsyncClient:
    """``Client`` for ``async with``. Connects on its first call and belongs to the event loop of that call."""

    def __init__(
        self,
        prefill: str = DEFAULT_PREFILL,
        decode: str | Sequence[str] = DEFAULT_DECODE,
        *,
        token: str | None = None,
        tls: Tls = None,
        salt: str = "",
        timeout_s: float = DEFAULT_TIMEOUT_S,
        wait_overloaded: bool = True,
    ) -> None:
        places = {"prefill": (prefill,), "decode": addresses_of(decode)}
        self._services = {
            name: LoopReplicas([Peer(name, address, tls, token) for address in addresses])
            for name, addresses in places.items()
        }
        self._salt = salt
        self._timeout_s = timeout_s
        self._wait_overloaded = wait_overloaded

    def with_token(self, token: str | None) -> Self:
        """The same client for another bearer token, over the same connections. Closing either closes both."""
        other = copy.copy(self)
        other._services = {name: services.with_token(token) for name, services in self._services.items()}
        return other

    async def prefill(
        self, content: Segment, *, timeout_s: float | None = None, **options: Unpack[PrefillOptions]
    ) -> Chunk:
        """Register text, token ids or a known chunk, and compute its KV after ``context``. See ``PrefillOptions``."""
        request = calls.prefill_request(content, {"salt": self._salt, **options})
        chunk = await self._run(calls.prefill(request), timeout_s)
        self._services["decode"].fleet.note([chunk])
        return chunk

    async def prefill_many(
        self, contents: Iterable[Segment], *, timeout_s: float | None = None, **options: Unpack[PrefillOptions]
    ) -> AsyncIterator[Chunk | CairnError]:
        """Prefill each of ``contents``, in order; one that failed is a ``CairnError`` value. See ``Client``."""
        sent = [calls.prefill_request(content, {"salt": self._salt, **options}) for content in contents]
        attempts = self._attempts(timeout_s, retry=False, calls=len(sent))
        peer = self._services["prefill"].peers[0].for_request()
        method = self._services["prefill"].stub(0).PrefillChunks
        call = method(iter(sent), timeout=attempts.remaining_s(), metadata=peer.metadata)
        try:
            for request in sent:
                reply = await call.read()
                if reply is END:
                    raise error_from_status(
                        "INTERNAL", "the stream ended with requests unanswered", peer.source, peer.request_id
                    )
                yield replies.parse_chunk_or_error(reply, request, peer.source, peer.request_id)
        except CallFailed as error:
            raise error_from_rpc(error, peer) from None
        finally:
            call.cancel()

    def generate(
        self, segments: Sequence[Segment], *, timeout_s: float | None = None, **options: Unpack[GenerateOptions]
    ) -> AsyncGeneration:
        """Stream an answer to ``segments``, the query last. Call it in the running loop. See ``GenerateOptions``."""
        self._services["decode"].fleet.note(segments)
        request = calls.generate_request(segments, {"salt": self._salt, **options})
        return self._generation([request], timeout_s, lambda _: None)

    def chat(
        self,
        messages: Sequence[ChatMessageLike],
        *,
        timeout_s: float | None = None,
        **options: Unpack[ChatCallOptions],
    ) -> AsyncGeneration:
        """Stream an answer to a chat. Call it in the running loop. See ``Client.chat``."""
        request = calls.chat_request(messages, {"salt": self._salt, **options})
        return self._generation([request], timeout_s, lambda _: None)

    def conversation(
        self,
        system: Segment | None = None,
        documents: Sequence[Segment] = (),
        *,
        role: str = "user",
        system_role: str = "system",
        document_role: str = "",
        timeout_s: float | None = None,
        **defaults: Unpack[GenerateOptions],
    ) -> AsyncConversation:
        """A conversation that keeps its turns: ``ask`` and ``async for delta in conversation.stream(...)``.

        See ``Client.conversation``.
        """

        def send(
            segments: Sequence[Segment],
            whole: Sequence[Segment],
            finished: Callable[[Result], None],
            options: GenerateOptions,
        ) -> AsyncGeneration:
            wordings = [segments] if segments is whole else [segments, whole]
            requests = [calls.generate_request(each, {"salt": self._salt, **options}) for each in wordings]
            return self._generation(requests, timeout_s, finished)

        roles = {"role": role, "system_role": system_role, "document_role": document_role}
        return AsyncConversation(send, system, documents, defaults, **roles)

    def _generation(
        self,
        requests: Sequence[decode_pb2.GenerateRequest],
        timeout_s: float | None,
        finished: Callable[[Result], None],
    ) -> AsyncGeneration:
        """Sends the first; the second, if there is one, when a chunk that the first names is gone."""
        decode, attempts = self._services["decode"], self._attempts(timeout_s, retry=True)
        route = decode.route(requests[0], requests[0].request_id)

        def call_of(request: decode_pb2.GenerateRequest) -> Callable[[float], Any]:
            def start(remaining_s: float) -> Any:
                sent = calls.sent_after(request, attempts.timeout_s - remaining_s)
                return decode.stub(route.go()).Generate(sent, timeout=remaining_s, metadata=route.peer.metadata)

            return start

        start, *instead = map(call_of, requests)
        answers, second = max(1, requests[0].sampling.n), instead[0] if instead else None
        known = None if decode.is_known else (lambda: decode.known(attempts.remaining_s()))
        return AsyncGeneration(start, route, attempts, answers=answers, known=known, instead=second, finished=finished)

    async def explain(
        self, segments: Sequence[Segment], *, timeout_s: float | None = None, **options: Unpack[GenerateOptions]
    ) -> Explanation:
        """What the same ``generate`` would reuse, compute and move; nothing is generated."""
        self._services["decode"].fleet.note(segments)
        request = calls.generate_request(segments, {"salt": self._salt, **options})
        return await self._run(calls.explain(request), timeout_s)

    async def explain_chat(
        self,
        messages: Sequence[ChatMessageLike],
        *,
        timeout_s: float | None = None,
        **options: Unpack[ChatCallOptions],
    ) -> Explanation:
        """What the same ``chat`` would reuse, compute and move; nothing is generated."""
        request = calls.chat_request(messages, {"salt": self._salt, **options})
        return await self._run(calls.explain(request), timeout_s)

    async def chunks(
        self, *, timeout_s: float | None = None, **options: Unpack[ListOptions]
    ) -> AsyncIterator[StoredChunk]:
        """All chunks that match, fetched page by page as they are read. See ``ListOptions``."""
        page_token = ""
        while True:
            found, page_token = await self.chunks_page(page_token, timeout_s=timeout_s, **options)
            for chunk in found:
                yield chunk
            if not page_token:
                return

    async def chunks_page(
        self, page_token: str = "", *, timeout_s: float | None = None, **options: Unpack[ListOptions]
    ) -> tuple[tuple[StoredChunk, ...], str]:
        """One page of ``chunks`` and the token of the next, "" on the last."""
        found, following = await self._run(calls.page(page_token, options), timeout_s)
        self._services["decode"].fleet.note(found)
        return found, following

    async def get(
        self, chunk: ChunkName, *, token_ids: bool = False, text: bool = False, timeout_s: float | None = None
    ) -> StoredChunk:
        """A chunk's record, with its token ids or its text if asked for. Raises ``NotFound``."""
        return await self._run(calls.get(chunk, token_ids, text), timeout_s)

    async def pin(self, chunk: ChunkName, *, timeout_s: float | None = None) -> StoredChunk:
        """Keep a chunk from being evicted. Raises ``NotFound``."""
        return await self._run(calls.pin(chunk), timeout_s)

    async def unpin(self, chunk: ChunkName, *, timeout_s: float | None = None) -> StoredChunk:
        """Let a pinned chunk be evicted again. Raises ``NotFound``."""
        return await self._run(calls.unpin(chunk), timeout_s)

    async def delete(self, chunk: ChunkName, *, timeout_s: float | None = None) -> Deleted:
        """Forget a chunk and its stored KV. Raises ``NotFound``."""
        return await self._run(calls.delete(chunk), timeout_s)

    async def stats(self, *, timeout_s: float | None = None) -> StoreStats:
        """What the chunk store holds."""
        return await self._run(calls.stats(), timeout_s)

    async def loads(self, *, timeout_s: float | None = None) -> Loads:
        """How busy the decode service is, what its model is, and what it allows; of several all of them."""
        decode, attempts, call = self._services["decode"], self._attempts(timeout_s, retry=True), calls.loads()
        if decode.fleet.alone:
            return await self._run(call, timeout_s)
        return decode.loads_of(await decode.ask_all("GetLoads", call.request, min(ANSWER_S, attempts.remaining_s())))

    async def abort(self, request_id: str, *, timeout_s: float | None = None) -> bool:
        """Abort a running or waiting generation, whichever replica has it. False: there is none of this id."""
        decode, attempts, call = (
            self._services["decode"],
            self._attempts(timeout_s, retry=True),
            calls.abort(request_id),
        )
        if decode.fleet.alone:
            return await self._run(call, timeout_s)
        return decode.aborted_of(await decode.ask_all("Abort", call.request, min(ANSWER_S, attempts.remaining_s())))

    async def aclose(self) -> None:
        """Close the connections; running streams are cancelled."""
        for services in self._services.values():
            await services.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    def _attempts(self, timeout_s: float | None, retry: bool, calls: int = 1) -> Attempts:
        seconds = (self._timeout_s if timeout_s is None else timeout_s) * max(1, calls)
        return Attempts(seconds, retry, self._wait_overloaded)

    async def _run(self, call: Call[T], timeout_s: float | None) -> T:
        services = self._services[call.service]
        call, attempts = calls.salted(call, self._salt), self._attempts(timeout_s, call.retry)
        await services.known(attempts.remaining_s())
        route = services.route(call.request, call.request_id)
        try:
            while True:
                method = getattr(services.stub(route.go()), call.method)
                try:
                    timeout_s = route.patience_s(attempts)
                    return call.parse(await method(call.request, timeout=timeout_s, metadata=route.peer.metadata))
                except CallFailed as error:
                    delay_s = route.delay_or_raise(error, attempts, late_elsewhere=True)
                await asyncio.sleep(delay_s)
        finally:
            route.over()
