"""Every RPC of the two services as a value: where it goes, what is sent, how the reply is read.

The two clients only differ in how they run a ``Call``; what it means is written here once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypedDict, TypeVar

from cairn.client import replies, requests
from cairn.client.answers import Explanation
from cairn.client.chats import ChatMessageLike, chat_field
from cairn.client.chunks import Chunk, Deleted, StoredChunk, StoreStats
from cairn.client.loads import Loads
from cairn.client.prompt import Grammar
from cairn.client.requests import ChunkName, Segment
from cairn.client.sampling import SamplingOptions
from protos import decode_pb2, decode_pb2_grpc, prefill_pb2, prefill_pb2_grpc

T = TypeVar("T")

WAITED_S_MIN = 0.001  # less is no waiting; nor does a service that has less time start anything


class PrefillOptions(TypedDict, total=False):
    """Keyword arguments of ``prefill``: the type and the ordered context decide what is computed, the rest is
    what people say about the chunk. ``ttl_s`` is in seconds; ``shared`` publishes for every tenant (admin tokens);
    ``durable`` has the answer wait until the KV is stored, and fail where the store does not take it."""

    type: str
    context: Sequence[ChunkName]
    reuse: str
    name: str
    tags: Sequence[str]
    ttl_s: float | None
    pin: bool
    role: str
    salt: str
    request_id: str
    shared: bool
    durable: bool


class GenerateOptions(SamplingOptions, total=False):
    """Keyword arguments of ``generate`` and ``explain``, beside those of sampling. What is left out is left to the
    service.

    ``order="canonical"``: the service may sort neighbouring chunks of one type, so that prompts begin alike.
    ``keep`` makes the query and its answer a chunk, ``Result.kept``, for the next turn of a conversation.
    ``grammar``: what the answer must be, such as ``Grammar.json_schema({...})``.
    ``priority``: 0..9, the higher goes before the caller's other requests; those of others are not concerned.
    ``start_within_s``: a request that was not begun within so many seconds fails with ``DeadlineExceeded``.
    """

    reuse: str
    cache: str
    order: str
    salt: str
    request_id: str | None
    keep: bool
    grammar: Grammar | None
    priority: int
    start_within_s: float | None


class ChatOptions(TypedDict, total=False):
    """What a chat has beside its messages and the options of ``generate``; see ``Client.chat``."""

    tools: Sequence[Mapping[str, Any]]
    tool_choice: str
    template_arguments: Mapping[str, Any] | None
    continue_last_message: bool
    parse: bool
    parallel_tool_calls: bool


class ChatCallOptions(ChatOptions, GenerateOptions, total=False):
    """Keyword arguments of ``chat`` and ``explain_chat``."""


class ListOptions(TypedDict, total=False):
    """Keyword arguments of ``chunks``: filters, the order, and how many a page brings (1..1000)."""

    type: str
    tag: str
    name: str
    order: str
    page_size: int


@dataclass(frozen=True)
class Call(Generic[T]):
    """One unary RPC. ``retry``: sending it twice does no harm."""

    service: str
    method: str
    request: Any
    parse: Callable[[Any], T]
    retry: bool = True
    request_id: str = ""  # the caller's; "" for a new one


def salted(call: Call[T], salt: str) -> Call[T]:
    """The call under the client's salt, where its request can name one and names none."""
    if salt and "salt" in call.request.DESCRIPTOR.fields_by_name and not call.request.salt:
        call.request.salt = salt
    return call


def stub(service: str, channel: Any) -> Any:
    """The generated stub of ``"prefill"`` or ``"decode"`` on a channel of either kind."""
    stubs = {"prefill": prefill_pb2_grpc.PrefillServiceStub, "decode": decode_pb2_grpc.DecodeServiceStub}
    return stubs[service](channel)


def prefill(request: prefill_pb2.PrefillChunkRequest) -> Call[Chunk]:
    return Call(
        "prefill",
        "PrefillChunk",
        request,
        lambda reply: replies.parse_chunk(reply, request),
        request_id=request.request_id,
    )


def get(chunk: ChunkName, token_ids: bool, text: bool) -> Call[StoredChunk]:
    request = prefill_pb2.GetChunkRequest(
        chunk_id=requests.chunk_id_of(chunk), include_token_ids=token_ids, include_text=text
    )
    return Call("prefill", "GetChunk", request, replies.parse_stored_chunk)


def page(page_token: str, options: ListOptions) -> Call[tuple[tuple[StoredChunk, ...], str]]:
    request = requests.list_request(page_token=page_token, **options)
    return Call("prefill", "ListChunks", request, replies.parse_page)


def pin(chunk: ChunkName) -> Call[StoredChunk]:
    request = prefill_pb2.PinChunkRequest(chunk_id=requests.chunk_id_of(chunk))
    return Call("prefill", "PinChunk", request, replies.parse_stored_chunk)


def unpin(chunk: ChunkName) -> Call[StoredChunk]:
    request = prefill_pb2.UnpinChunkRequest(chunk_id=requests.chunk_id_of(chunk))
    return Call("prefill", "UnpinChunk", request, replies.parse_stored_chunk)


def delete(chunk: ChunkName) -> Call[Deleted]:
    """Not sent twice: a retry after a lost reply would say NOT_FOUND about a chunk that it deleted itself."""
    request = prefill_pb2.DeleteChunkRequest(chunk_id=requests.chunk_id_of(chunk))
    return Call("prefill", "DeleteChunk", request, replies.parse_deleted, retry=False)


def stats() -> Call[StoreStats]:
    return Call("prefill", "StoreStats", prefill_pb2.StoreStatsRequest(), replies.parse_stats)


def loads() -> Call[Loads]:
    return Call("decode", "GetLoads", decode_pb2.GetLoadsRequest(), replies.parse_loads)


def explain(request: decode_pb2.GenerateRequest) -> Call[Explanation]:
    return Call("decode", "Explain", request, replies.parse_explanation, request_id=request.request_id)


def abort(request_id: str) -> Call[bool]:
    return Call("decode", "Abort", decode_pb2.AbortRequest(request_id=request_id), replies.parse_aborted)


def prefill_request(content: Segment, options: PrefillOptions) -> prefill_pb2.PrefillChunkRequest:
    """A request for ``PrefillChunk`` or ``PrefillChunks``."""
    return requests.prefill_request(content, **options)


def chat_request(messages: Sequence[ChatMessageLike], options: ChatCallOptions) -> decode_pb2.GenerateRequest:
    """A request for ``Generate`` or ``Explain`` of a chat."""
    rest: Any = dict(options)
    own: Any = {name: rest.pop(name) for name in ChatOptions.__annotations__ if name in rest}
    return requests.generate_request(chat_field(messages, **own), **rest)


def generate_request(segments: Sequence[Segment], options: GenerateOptions) -> decode_pb2.GenerateRequest:
    """A request for ``Generate`` or ``Explain``."""
    return requests.generate_request(segments, **options)


def sent_after(request: decode_pb2.GenerateRequest, waited_s: float) -> decode_pb2.GenerateRequest:
    """The request as it is sent when the caller has waited so long already, for another service that failed."""
    if not request.start_within_s or waited_s < WAITED_S_MIN:
        return request
    sent = decode_pb2.GenerateRequest()
    sent.CopyFrom(request)
    sent.start_within_s = max(WAITED_S_MIN, request.start_within_s - waited_s)
    return sent
