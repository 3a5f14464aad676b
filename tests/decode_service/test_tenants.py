"""Two tenants at both services, on every kind of store: what another one has is as good as not there.

Each case asks twice as tenant B: about what tenant A has, and about what nobody has. Status, message, reply, trailing
metadata and what the services count must be the same.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

import cairn
from cairn import Client, Tokens
from chunk_store.errors import StoreUnavailable
from chunk_store.key import ChunkType, chunk_id
from protos import chunks_pb2, decode_pb2, decode_pb2_grpc, prefill_pb2, prefill_pb2_grpc
from tests.chunk_store.servers import mooncake, mooncake_url, need_mooncake, need_redis, redis_server, redis_url
from tests.decode_service.models import loaded, tokens
from tests.decode_service.pair import DEADLINE_S, Pair, pair, wait_until

TOKENS = "service\na salt-a\nb salt-b\nboss - admin\n"
LENGTH = 20
_seeds = itertools.count(1000)


@dataclass
class Tenants:
    """Both services, and a stub of each for every token."""

    services: Pair
    channels: list[grpc.Channel]

    def prefill(self, token: str, method: str, request: Any) -> Any:
        return self._call(prefill_pb2_grpc.PrefillServiceStub(self.channels[0]), token, method, request)

    def decode(self, token: str, method: str, request: Any) -> Any:
        return self._call(decode_pb2_grpc.DecodeServiceStub(self.channels[1]), token, method, request)

    def _call(self, stub: Any, token: str, method: str, request: Any) -> Any:
        metadata = (("authorization", f"Bearer {token}"),)
        sent = iter([request]) if method == "PrefillChunks" else request
        return getattr(stub, method)(sent, timeout=DEADLINE_S, metadata=metadata)

    def client(self, token: str) -> Client:
        return Client(self.services.prefill_address, self.services.decode_address, token=token, timeout_s=DEADLINE_S)

    def counters(self) -> dict[tuple[str, ...], float]:
        """Everything that is counted, of both services; not what depends on the time it took."""
        assert self.services.prefill_pool.publisher.flush(DEADLINE_S)
        return {
            (str(service), sample.name, *(f"{name}={value}" for name, value in sorted(sample.labels.items()))): (
                sample.value
            )
            for service in (self.services.prefill, self.services.decode)
            for family in service.registry.collect()
            for sample in family.samples
            if sample.name.endswith(("_total", "_count")) and "decode_bytes" not in sample.name
        }


@pytest.fixture(scope="module", params=["file", "redis", "mooncake"])
def tenants(
    request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Tenants]:
    root = tmp_path_factory.mktemp("tenants")
    (root / "tokens").write_text(TOKENS)
    ends: list[Callable[[], None]] = []
    store: Path | str = root / "store"
    if request.param != "file":
        need_redis()
        (root / "redis").mkdir()
        redis = redis_server(root / "redis")
        redis.start()
        ends.append(redis.kill)
        store = redis_url(redis)
    if request.param == "mooncake":
        need_mooncake()
        (root / "mooncake").mkdir()
        lent = mooncake(root / "mooncake", redis)
        lent.start()
        ends.append(lent.kill)
        store = mooncake_url(lent)
    try:
        with pair(loaded(folder, "prefill"), loaded(folder, "decode"), store, token_file=root / "tokens") as services:
            services.client.close()
            channels = [
                grpc.insecure_channel(address) for address in (services.prefill_address, services.decode_address)
            ]
            yield Tenants(services, channels)
            for channel in channels:
                channel.close()
            services.client = Client(
                services.prefill_address, services.decode_address, token="boss", timeout_s=DEADLINE_S
            )
            services.check_idle()
    finally:
        for end in reversed(ends):
            end()


def content() -> list[int]:
    return tokens(next(_seeds), LENGTH)


def ids(part: list[int]) -> chunks_pb2.TokenIds:
    return chunks_pb2.TokenIds(ids=part)


def chunk_id_of(tenants: Tenants, part: list[int]) -> str:
    """The id of content that need not be registered anywhere."""
    return chunk_id(tenants.services.decode.resolver.codec.identity, ChunkType.CONTEXT, part)


def generate(*parts: Any, **fields: Any) -> decode_pb2.GenerateRequest:
    segments = [
        decode_pb2.Segment(chunk_id=part) if isinstance(part, str) else decode_pb2.Segment(token_ids=ids(part))
        for part in parts
    ]
    sampling = decode_pb2.SamplingParams(max_tokens=3, ignore_eos=True, seed=1)
    return decode_pb2.GenerateRequest(segments=segments, sampling=sampling, **fields)


def chat(**chunk: str) -> decode_pb2.GenerateRequest:
    parts = [decode_pb2.ContentPart(**chunk), decode_pb2.ContentPart(text="Why?")]
    messages = [decode_pb2.ChatMessage(role="user", content=parts)]
    sampling = decode_pb2.SamplingParams(max_tokens=3, seed=1)
    return decode_pb2.GenerateRequest(chat=decode_pb2.Chat(messages=messages), sampling=sampling)


QUERY = [5, 6, 7]
P, D = "prefill", "decode"
CASES: dict[str, tuple[str, str, Callable[[str, list[int]], Any]]] = {
    "get": (P, "GetChunk", lambda name, part: prefill_pb2.GetChunkRequest(chunk_id=name)),
    "get text": (P, "GetChunk", lambda name, part: prefill_pb2.GetChunkRequest(chunk_id=name, include_text=True)),
    "list": (P, "ListChunks", lambda name, part: prefill_pb2.ListChunksRequest(name="secret")),
    "list by tag": (P, "ListChunks", lambda name, part: prefill_pb2.ListChunksRequest(tag="secret")),
    "pin": (P, "PinChunk", lambda name, part: prefill_pb2.PinChunkRequest(chunk_id=name)),
    "unpin": (P, "UnpinChunk", lambda name, part: prefill_pb2.UnpinChunkRequest(chunk_id=name)),
    "delete": (P, "DeleteChunk", lambda name, part: prefill_pb2.DeleteChunkRequest(chunk_id=name)),
    "stats": (P, "StoreStats", lambda name, part: prefill_pb2.StoreStatsRequest()),
    "prefill by id": (P, "PrefillChunk", lambda name, part: prefill_pb2.PrefillChunkRequest(chunk_id=name)),
    "rename": (P, "PrefillChunk", lambda name, part: prefill_pb2.PrefillChunkRequest(chunk_id=name, name="mine")),
    "expire": (P, "PrefillChunk", lambda name, part: prefill_pb2.PrefillChunkRequest(chunk_id=name, ttl_s=1.0)),
    "prefill after": (
        P,
        "PrefillChunk",
        lambda name, part: prefill_pb2.PrefillChunkRequest(token_ids=ids(QUERY), context_chunk_ids=[name]),
    ),
    "guess": (P, "PrefillChunk", lambda name, part: prefill_pb2.PrefillChunkRequest(token_ids=ids(part), name="x")),
    "stream by id": (P, "PrefillChunks", lambda name, part: prefill_pb2.PrefillChunkRequest(chunk_id=name)),
    "stream a guess": (P, "PrefillChunks", lambda name, part: prefill_pb2.PrefillChunkRequest(token_ids=ids(part))),
    "a composition by ids": (
        P,
        "PrefillComposition",
        lambda name, part: prefill_pb2.PrefillCompositionRequest(chunk_ids=[name], wanted=[0]),
    ),
    "generate by id": (D, "Generate", lambda name, part: generate(name, QUERY)),
    "generate with the id as query": (D, "Generate", lambda name, part: generate(QUERY, name)),
    "generate a guess": (D, "Generate", lambda name, part: generate(part, QUERY)),
    "generate a guess elsewhere": (D, "Generate", lambda name, part: generate(part[:5], part, QUERY, reuse_mode=3)),
    "generate without caches": (D, "Generate", lambda name, part: generate(part, QUERY, cache_use=2)),
    "chat by id": (D, "Generate", lambda name, part: chat(chunk_id=name)),
    "chat by name": (D, "Generate", lambda name, part: chat(chunk_name="secret")),
    "explain a chat by id": (D, "Explain", lambda name, part: chat(chunk_id=name)),
    "explain by id": (D, "Explain", lambda name, part: generate(name, QUERY)),
    "explain a guess": (D, "Explain", lambda name, part: generate(part, QUERY)),
    "explain a guess elsewhere": (D, "Explain", lambda name, part: generate(part[:5], part, QUERY)),
    "loads": (D, "GetLoads", lambda name, part: decode_pb2.GetLoadsRequest()),
    "abort": (D, "Abort", lambda name, part: decode_pb2.AbortRequest(request_id=name)),
}


@dataclass(frozen=True)
class Seen:
    """What a caller can tell of an answer, without what is the request's own: ids, keys, times, tokens."""

    code: str
    details: str
    replies: tuple[str, ...]
    trailing: tuple[str, ...]


def seen(call: Any, streams: bool) -> Seen:
    code, details = "OK", ""
    trailing: tuple[str, ...] = ()
    try:
        replies = [reply for reply in call if not _is_delta(reply)] if streams else [call]
    except grpc.RpcError as error:
        replies, code, details = [], error.code().name, error.details() or ""
        metadata: Any = error.trailing_metadata() or ()
        trailing = tuple(f"{name}={value!r}" for name, value in metadata)
    return Seen(code, hidden(details), tuple(hidden(str(reply)) for reply in replies), tuple(map(hidden, trailing)))


def _is_delta(reply: Any) -> bool:
    """The answer itself depends on the content."""
    return isinstance(reply, decode_pb2.GenerateResponse) and reply.WhichOneof("event") == "delta"


def hidden(text: str) -> str:
    text = re.sub(r"[0-9a-f]{32,}", "HEX", text)
    text = re.sub(r"timings \{[^}]*\}", "timings", text)
    text = re.sub(r" *durable: true\n", "", text)  # whether it is written already is a matter of time
    return re.sub(r"(token_ids|text|request_id|key): .*", r"\1", text)


@pytest.mark.parametrize("case", CASES)
def test_what_another_tenant_has_is_not_there(tenants: Tenants, case: str) -> None:
    service, method, request = CASES[case]
    theirs, nobodys = content(), content()
    names = [chunk_id_of(tenants, part) for part in (theirs, nobodys)]
    with tenants.client("a") as client:
        known = client.prefill(Tokens(theirs), name="secret", tags=["secret"], pin=case == "unpin", durable=True)
        assert known.id == names[0]
        client.generate([known, Tokens(QUERY)], max_tokens=2).finish()
        before = client.get(known, text=True)
        found, counted = [], []
        for name, part in zip(names, (theirs, nobodys), strict=True):
            at = tenants.counters()
            call = tenants.prefill if service == P else tenants.decode

            def ask(name: str = name, part: list[int] = part, call: Any = call) -> Any:
                return call("b", method, request(name, part))

            streams = method in ("Generate", "PrefillChunks", "PrefillComposition")
            try:
                found.append(seen(ask(), streams))
            except grpc.RpcError as error:
                found.append(seen(_raises(error), True))
            tenants.services.decode.worker.call(lambda: None)
            wait_until(lambda: tenants.services.decode.worker.occupancy().running == 0)
            counted.append({key: value - at.get(key, 0.0) for key, value in tenants.counters().items()})
        assert found[0] == found[1]
        assert {key for key in counted[0] if counted[0][key] != counted[1].get(key)} == set()
        after = client.get(known, text=True)
        assert (after.name, after.tags, after.pinned, after.expires_unix_s, after.kv_entries, after.text) == (
            *(before.name, before.tags, before.pinned, before.expires_unix_s, before.kv_entries, before.text),
        )


def _raises(error: grpc.RpcError) -> Iterator[Any]:
    raise error
    yield


def test_counts_are_a_tenants_own(tenants: Tenants) -> None:
    with tenants.client("b") as client, tenants.client("a") as other, tenants.client("boss") as boss:
        before, whole = client.stats(), boss.stats()
        mine = [client.prefill(Tokens(content()), durable=True) for _ in range(2)]
        other.prefill(Tokens(content()), pin=True, durable=True)
        after = client.stats()
        assert (after.chunks - before.chunks, after.kv_entries - before.kv_entries) == (2, 2)
        assert after.evictions == after.quarantined == 0
        assert boss.stats().chunks - whole.chunks == 3
        assert {chunk.id for chunk in mine} <= {chunk.id for chunk in client.chunks()}
        client.delete(mine[0])
        assert client.stats().chunks == after.chunks - 1


def test_request_ids_and_loads_are_a_tenants_own(tenants: Tenants) -> None:
    with (
        tenants.client("a") as one,
        tenants.client("b") as other,
        tenants.client("boss") as boss,
        one.generate([Tokens(QUERY)], max_tokens=1500, ignore_eos=True, request_id="r") as stream,
    ):
        next(iter(stream))
        loads = other.loads()
        assert (loads.running, loads.waiting, loads.pages_tails, loads.chunks_resident) == (0, 0, 0, 0)
        assert one.loads().running == 1 and boss.loads().running == 1 and boss.loads().pages_tails
        assert other.generate([Tokens(QUERY)], max_tokens=2, request_id="r").finish().request_id == "r"
        assert not other.abort("r")
        assert one.loads().running == 1, "it goes on"
        assert one.abort("r")


def test_shared_content(tenants: Tenants) -> None:
    """Published by an admin, used by all, changed by nobody else; its KV is one for all where its context is shared."""
    system, document, private = content(), content(), content()
    with tenants.client("a") as one, tenants.client("b") as other, tenants.client("boss") as boss:
        for client in (one, tenants.client("service")):
            with pytest.raises(cairn.CairnError, match="shared: only a token marked admin") as caught:
                client.prefill(Tokens(system), shared=True)
            assert caught.value.code == "PERMISSION_DENIED"
        everybodys = boss.prefill(Tokens(system), shared=True, name="rules", tags=["t"], durable=True)
        second = boss.prefill(Tokens(document), shared=True, context=[everybodys], durable=True)
        own = one.prefill(Tokens(private), durable=True)
        assert other.get(everybodys).name == "rules" and other.get(everybodys, text=True).text
        assert everybodys.id in {chunk.id for chunk in other.chunks(name="rules")}
        again = other.prefill(Tokens(system), durable=True)
        assert (again.outcome, again.newly_registered, again.key) == ("already_stored", False, everybodys.key)
        first = one.generate([everybodys, second, own, Tokens(QUERY)], max_tokens=3, ignore_eos=True).finish()
        assert [part.source for part in first.reuse.segments[:2]] == ["store", "store"]
        inline = other.generate([Tokens(system), Tokens(document), Tokens(QUERY)], max_tokens=3).finish()
        assert [part.source for part in inline.reuse.segments[:2]] == ["device", "device"], "one copy for everybody"
        plain = one.generate(
            [Tokens(system), Tokens(document), Tokens(private), Tokens(QUERY)],
            max_tokens=3,
            ignore_eos=True,
            cache="bypass",
        ).finish()
        assert plain.token_ids == first.token_ids
        assert second.key != other.prefill(Tokens(document), context=[other.prefill(Tokens(private))]).key
        for change in (one.pin, one.unpin, one.delete, lambda chunk: one.prefill(chunk, name="mine")):
            with pytest.raises(cairn.CairnError, match="is shared; only a token marked admin may change it"):
                change(everybodys)
        with pytest.raises(cairn.NotFound):
            boss.prefill(Tokens(private), shared=True, context=[own])
        assert boss.pin(everybodys).pinned and not boss.unpin(everybodys).pinned
        assert boss.delete(everybodys).kv_entries == 1
        with pytest.raises(cairn.NotFound):
            other.get(everybodys)


def test_a_trusted_caller_names_the_tenant(tenants: Tenants) -> None:
    part = content()
    with tenants.client("service") as trusted, tenants.client("a") as one:
        chunk = trusted.prefill(Tokens(part), salt="salt-a", name="by the gateway", durable=True)
        assert one.get(chunk).name == "by the gateway"
        with pytest.raises(cairn.NotFound):
            trusted.get(chunk)
        with Client(
            tenants.services.prefill_address, tenants.services.decode_address, token="service", salt="salt-a"
        ) as gateway:
            assert gateway.get(chunk).name == "by the gateway" and gateway.delete(chunk).kv_entries == 1
        with pytest.raises(cairn.InvalidRequest, match="salt: has characters that cannot be printed"):
            trusted.prefill(Tokens(part), salt="\0shared")


def test_what_is_remembered_without_the_store_is_a_tenants_own(
    tenants: Tenants, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tenants.client("a") as one:
        chunk = one.prefill(Tokens(content()), durable=True)
        expected = one.generate([chunk, Tokens(QUERY)], max_tokens=2, ignore_eos=True).finish()
        requests = [generate(name, QUERY) for name in (chunk.id, "0" * 64)]

        def away(*_: Any, **__: Any) -> Any:
            raise StoreUnavailable("gone")

        monkeypatch.setattr(tenants.services.decode.resolver.store, "get_records", away)
        again = one.generate([chunk, Tokens(QUERY)], max_tokens=2, ignore_eos=True).finish()
        assert again.token_ids == expected.token_ids
        theirs, nobodys = (seen(tenants.decode("b", "Generate", request), True) for request in requests)
        assert theirs == nobodys and theirs.code == "UNAVAILABLE"
