"""``Client``: the two services from ordinary threads.

What each call means is in ``cairn.client.calls``; this file only runs calls. ``cairn.client.async_client`` is its twin.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Self, TypeVar, Unpack

from cairn.client import calls, replies
from cairn.client.answers import Explanation, Result
from cairn.client.calls import Call, ChatCallOptions, GenerateOptions, ListOptions, PrefillOptions
from cairn.client.chats import ChatMessageLike
from cairn.client.chunks import Chunk, Deleted, StoredChunk, StoreStats
from cairn.client.conversation import Conversation
from cairn.client.errors import CairnError, error_from_status
from cairn.client.generation import Generation
from cairn.client.loads import Loads
from cairn.client.replicas import addresses_of
from cairn.client.requests import ChunkName, Segment
from cairn.client.transport import Attempts, CallFailed, Peer, Tls, error_from_rpc
from cairn.client.watching import ANSWER_S, ThreadReplicas
from protos import decode_pb2

T = TypeVar("T")

DEFAULT_PREFILL = "127.0.0.1:50071"
DEFAULT_DECODE = "127.0.0.1:50072"
DEFAULT_TIMEOUT_S = 300.0


class Client:
    """A connection to a prefill and a decode service. Thread-safe; use it in a ``with`` block or close it.

    ``token`` is sent as a bearer token; ``tls`` is True (the system's certificates) or a PEM file; ``salt`` goes
    with every request that has none of its own. Every call ends within ``timeout_s`` seconds, its own or the
    client's. Calls raise ``CairnError``; UNAVAILABLE, and an overload that says when to come again (unless
    ``wait_overloaded`` is False), are retried a few times where sending twice does no harm.
    """

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
            name: ThreadReplicas([Peer(name, address, tls, token) for address in addresses])
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

    def prefill(self, content: Segment, *, timeout_s: float | None = None, **options: Unpack[PrefillOptions]) -> Chunk:
        """Register text, token ids or a known chunk, and compute its KV after ``context``. See ``PrefillOptions``."""
        request = calls.prefill_request(content, {"salt": self._salt, **options})
        chunk = self._run(calls.prefill(request), timeout_s)
        self._services["decode"].fleet.note([chunk])
        return chunk

    def prefill_many(
        self, contents: Iterable[Segment], *, timeout_s: float | None = None, **options: Unpack[PrefillOptions]
    ) -> Iterator[Chunk | CairnError]:
        """Prefill each of ``contents`` with the same options, in one stream; results come in order.

        One that failed is a ``CairnError`` *value*, and the rest go on. Raises ``CairnError`` when the stream
        itself fails. The deadline is ``timeout_s`` for each item.
        """
        sent = [calls.prefill_request(content, {"salt": self._salt, **options}) for content in contents]
        attempts = self._attempts(timeout_s, retry=False, calls=len(sent))
        peer = self._services["prefill"].peers[0].for_request()
        method = self._services["prefill"].stubs[0].PrefillChunks
        call = method(iter(sent), timeout=attempts.remaining_s(), metadata=peer.metadata)
        return _in_order(call, sent, peer)

    def generate(
        self, segments: Sequence[Segment], *, timeout_s: float | None = None, **options: Unpack[GenerateOptions]
    ) -> Generation:
        """Stream an answer to ``segments`` (chunks, texts, token ids), the query last. See ``GenerateOptions``."""
        self._services["decode"].fleet.note(segments)
        request = calls.generate_request(segments, {"salt": self._salt, **options})
        return self._generation([request], timeout_s, lambda _: None)

    def chat(
        self,
        messages: Sequence[ChatMessageLike],
        *,
        timeout_s: float | None = None,
        **options: Unpack[ChatCallOptions],
    ) -> Generation:
        """Stream an answer to a chat, which the service renders with the model's template and cuts into chunks.

            reply = client.chat([{"role": "user", "content": "Who governs Wendolin?"}], keep=True).finish()

        ``messages`` are dictionaries as OpenAI's clients send them, or ``ChatMessage``; a part of their content may be
        a registered chunk (``{"type": "chunk", "id": ...}``, or its ``name``). ``tools`` are definitions as the
        template takes them, ``template_arguments`` further variables of it. ``continue_last_message``: the answer goes
        on from the end of the last message. ``parse``: reasoning and tool calls come apart from text. With ``keep`` the
        service remembers the answer as it was generated, and takes it for what it is when the chat goes on.
        """
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
    ) -> Conversation:
        """A conversation that keeps its turns, so that each question computes its own tokens alone.

            talk = client.conversation("Answer in one sentence.", [open("chronicle.txt").read()], max_tokens=64)
            print(talk.ask("Who governs Wendolin?").text)
            for delta in talk.stream("Since when?"):
                print(delta.text, end="")
            talk.retry(temperature=0.8)          # another answer to the last question
            talk.edit(0, "Who founded it?")      # another first question; what followed is gone
            other = talk.branch(-1)              # a conversation of its own, without the last turn

        ``system`` and ``documents`` are strings, chunks, ``Text`` or ``Tokens``. ``role``, ``system_role`` and
        ``document_role`` are those of the chat template in which strings are rendered; "" takes a text as it is, which
        a model without a chat template needs. ``timeout_s`` is for each question; ``defaults`` are options of
        ``generate`` for all of them. Turns are kept under the client's salt, and pass: what is not asked for makes
        room for other content, and is sent again when it is.
        """

        def send(
            segments: Sequence[Segment],
            whole: Sequence[Segment],
            finished: Callable[[Result], None],
            options: GenerateOptions,
        ) -> Generation:
            wordings = [segments] if segments is whole else [segments, whole]
            requests = [calls.generate_request(each, {"salt": self._salt, **options}) for each in wordings]
            return self._generation(requests, timeout_s, finished)

        roles = {"role": role, "system_role": system_role, "document_role": document_role}
        return Conversation(send, system, documents, defaults, **roles)

    def _generation(
        self,
        requests: Sequence[decode_pb2.GenerateRequest],
        timeout_s: float | None,
        finished: Callable[[Result], None],
    ) -> Generation:
        """Sends the first; the second, if there is one, when a chunk that the first names is gone."""
        decode = self._services["decode"]
        attempts = self._attempts(timeout_s, retry=True)
        decode.known(attempts.remaining_s())
        route = decode.route(requests[0], requests[0].request_id)

        def call_of(request: decode_pb2.GenerateRequest) -> Callable[[float], Any]:
            def start(remaining_s: float) -> Any:
                sent = calls.sent_after(request, attempts.timeout_s - remaining_s)
                return decode.stubs[route.go()].Generate(sent, timeout=remaining_s, metadata=route.peer.metadata)

            return start

        start, *instead = map(call_of, requests)
        answers, second = max(1, requests[0].sampling.n), instead[0] if instead else None
        return Generation(start, route, attempts, answers=answers, instead=second, finished=finished)

    def explain(
        self, segments: Sequence[Segment], *, timeout_s: float | None = None, **options: Unpack[GenerateOptions]
    ) -> Explanation:
        """What the same ``generate`` would reuse, compute and move; nothing is generated."""
        self._services["decode"].fleet.note(segments)
        request = calls.generate_request(segments, {"salt": self._salt, **options})
        return self._run(calls.explain(request), timeout_s)

    def explain_chat(
        self,
        messages: Sequence[ChatMessageLike],
        *,
        timeout_s: float | None = None,
        **options: Unpack[ChatCallOptions],
    ) -> Explanation:
        """What the same ``chat`` would reuse, compute and move; nothing is generated."""
        request = calls.chat_request(messages, {"salt": self._salt, **options})
        return self._run(calls.explain(request), timeout_s)

    def chunks(self, *, timeout_s: float | None = None, **options: Unpack[ListOptions]) -> Iterator[StoredChunk]:
        """All chunks that match, fetched page by page as they are read. See ``ListOptions``."""
        page_token = ""
        while True:
            found, page_token = self.chunks_page(page_token, timeout_s=timeout_s, **options)
            yield from found
            if not page_token:
                return

    def chunks_page(
        self, page_token: str = "", *, timeout_s: float | None = None, **options: Unpack[ListOptions]
    ) -> tuple[tuple[StoredChunk, ...], str]:
        """One page of ``chunks`` and the token of the next, "" on the last."""
        found, following = self._run(calls.page(page_token, options), timeout_s)
        self._services["decode"].fleet.note(found)
        return found, following

    def get(
        self, chunk: ChunkName, *, token_ids: bool = False, text: bool = False, timeout_s: float | None = None
    ) -> StoredChunk:
        """A chunk's record, with its token ids or its text if asked for. Raises ``NotFound``."""
        return self._run(calls.get(chunk, token_ids, text), timeout_s)

    def pin(self, chunk: ChunkName, *, timeout_s: float | None = None) -> StoredChunk:
        """Keep a chunk from being evicted. Raises ``NotFound``."""
        return self._run(calls.pin(chunk), timeout_s)

    def unpin(self, chunk: ChunkName, *, timeout_s: float | None = None) -> StoredChunk:
        """Let a pinned chunk be evicted again. Raises ``NotFound``."""
        return self._run(calls.unpin(chunk), timeout_s)

    def delete(self, chunk: ChunkName, *, timeout_s: float | None = None) -> Deleted:
        """Forget a chunk and its stored KV. Raises ``NotFound``."""
        return self._run(calls.delete(chunk), timeout_s)

    def stats(self, *, timeout_s: float | None = None) -> StoreStats:
        """What the chunk store holds."""
        return self._run(calls.stats(), timeout_s)

    def loads(self, *, timeout_s: float | None = None) -> Loads:
        """How busy the decode service is, what its model is, and what it allows; of several all of them."""
        decode, attempts = self._services["decode"], self._attempts(timeout_s, retry=True)
        if decode.fleet.alone:
            return self._run(calls.loads(), timeout_s)
        return decode.loads_of(decode.ask_all("GetLoads", calls.loads().request, min(ANSWER_S, attempts.remaining_s())))

    def abort(self, request_id: str, *, timeout_s: float | None = None) -> bool:
        """Abort a running or waiting generation, whichever replica has it. False: there is none of this id."""
        decode, attempts, call = (
            self._services["decode"],
            self._attempts(timeout_s, retry=True),
            calls.abort(request_id),
        )
        if decode.fleet.alone:
            return self._run(call, timeout_s)
        return decode.aborted_of(decode.ask_all("Abort", call.request, min(ANSWER_S, attempts.remaining_s())))

    def close(self) -> None:
        """Close the connections; running streams are cancelled."""
        for services in self._services.values():
            services.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _attempts(self, timeout_s: float | None, retry: bool, calls: int = 1) -> Attempts:
        seconds = (self._timeout_s if timeout_s is None else timeout_s) * max(1, calls)
        return Attempts(seconds, retry, self._wait_overloaded)

    def _run(self, call: Call[T], timeout_s: float | None) -> T:
        services = self._services[call.service]
        call, attempts = calls.salted(call, self._salt), self._attempts(timeout_s, call.retry)
        services.known(attempts.remaining_s())
        route = services.route(call.request, call.request_id)
        try:
            while True:
                method = getattr(services.stubs[route.go()], call.method)
                try:
                    timeout_s = route.patience_s(attempts)
                    return call.parse(method(call.request, timeout=timeout_s, metadata=route.peer.metadata))
                except CallFailed as error:
                    delay_s = route.delay_or_raise(error, attempts, late_elsewhere=True)
                time.sleep(delay_s)
        finally:
            route.over()


def _in_order(call: Any, sent: list[Any], peer: Peer) -> Iterator[Chunk | CairnError]:
    """One reply for each request; leaving early cancels the rest."""
    try:
        for request in sent:
            reply = next(call, None)
            if reply is None:
                raise error_from_status(
                    "INTERNAL", "the stream ended with requests unanswered", peer.source, peer.request_id
                )
            yield replies.parse_chunk_or_error(reply, request, peer.source, peer.request_id)
    except CallFailed as error:
        raise error_from_rpc(error, peer) from None
    finally:
        call.cancel()
