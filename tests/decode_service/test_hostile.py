"""Random bytes and hostile fields to every RPC of both services: a status that names the caller's fault, and no trace.

What is looked for: INTERNAL or UNKNOWN, a traceback in the log, an error or a log line that echoes what was sent.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.descriptor import FieldDescriptor

from protos import chunks_pb2, decode_pb2, decode_pb2_grpc, prefill_pb2
from tests.decode_service.pair import Pair

Code = grpc.StatusCode
SERVICES = ("cairn.v1.PrefillService", "cairn.v1.DecodeService", "grpc.health.v1.Health")
METHODS = {
    f"/{service}/{method.name}": method
    for service in SERVICES
    for method in descriptor_pool.Default().FindServiceByName(service).methods
    if method.name != "Watch"
}
FAULTS_OF_OURS = (Code.INTERNAL, Code.UNKNOWN, Code.DATA_LOSS)
SECRET = "xyzzy-the-secret-prompt"
STRINGS = [
    *("", "a", "\n", "\x00", "x\r\nERROR forged [-] line", "\u2028", "\u202e", "\x1b[2J", "é" * 300, "\U0001f480" * 99),
    *("a" * 64, "0" * 128, "f" * 129, "x" * 100_000, "../../etc/passwd", "%s%n", "{0}", "' OR 1=1 --", "user"),
]
INTEGERS = [0, 1, 2, 3, 5, 100, 383, 384, 65_536, 2**31 - 1, 2**32 - 1]
FLOATS = [0.0, 1.0, -1.0, 0.5, 1e-45, 1e38, float("nan"), float("inf"), float("-inf")]


def hostile(kind: Any, rng: random.Random, depth: int = 0) -> Any:
    """A message of ``kind`` whose fields are set at random to values that somebody may not expect."""
    message = message_factory.GetMessageClass(kind)()
    for field in kind.fields:
        if rng.random() < 0.4:
            continue
        if field.is_repeated:
            few = rng.choice([0, 1, 2, 3, 70])
            entry = field.message_type is not None and field.message_type.GetOptions().map_entry
            for _ in range(min(few, 3) if field.message_type and not entry else few):
                if entry:
                    key, value = (scalar(field.message_type.fields_by_name[name], rng) for name in ("key", "value"))
                    getattr(message, field.name)[key] = value
                elif field.message_type:
                    getattr(message, field.name).append(hostile(field.message_type, rng, depth + 1))
                else:
                    getattr(message, field.name).append(scalar(field, rng))
        elif field.message_type:
            getattr(message, field.name).CopyFrom(hostile(field.message_type, rng, depth + 1))
        else:
            setattr(message, field.name, scalar(field, rng))
    return message


def scalar(field: Any, rng: random.Random) -> Any:
    if field.type == FieldDescriptor.TYPE_STRING:
        return rng.choice([SECRET, *STRINGS] if field.name in ("text", "stop") else STRINGS)
    if field.type in (FieldDescriptor.TYPE_DOUBLE, FieldDescriptor.TYPE_FLOAT):
        return rng.choice(FLOATS)
    if field.type == FieldDescriptor.TYPE_BOOL:
        return rng.random() < 0.5
    if field.type == FieldDescriptor.TYPE_ENUM:
        return rng.choice([0, 1, 2, 3, 9, 2**31 - 1])
    return rng.choice(INTEGERS[:-1] if field.type == FieldDescriptor.TYPE_INT32 else INTEGERS)


@pytest.fixture
def clean_log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """Everything is logged, and nothing of it is a traceback, several lines, or somebody's text."""
    caplog.set_level(logging.DEBUG)
    yield caplog
    for record in caplog.records:
        if record.name.startswith(("asyncio", "grpc", "hypothesis")) and record.levelno < logging.WARNING:
            continue
        assert not record.exc_info, record
        assert SECRET not in record.getMessage() and len(record.getMessage()) < 2000, record


def send(services: Pair, method: str, raw: bytes) -> tuple[Code, str]:
    """The status of a call with these bytes as its message; one that runs on is given up."""
    address = services.decode_address if "Decode" in method else services.prefill_address
    with grpc.insecure_channel(address, [("grpc.max_send_message_length", -1)]) as channel:
        try:
            if METHODS[method].client_streaming:
                list(channel.stream_stream(method, None, None)(iter([raw]), timeout=20))
            elif METHODS[method].server_streaming:
                for _ in channel.unary_stream(method, None, None)(raw, timeout=20):
                    break
            else:
                channel.unary_unary(method, None, None)(raw, timeout=20)
        except grpc.RpcError as error:
            return error.code(), error.details() or ""
    return Code.OK, ""


def check(found: tuple[Code, str], sent: object) -> None:
    code, details = found
    assert code not in FAULTS_OF_OURS and code is not Code.DEADLINE_EXCEEDED, (found, sent)
    assert len(details) < 1300 and details.isprintable() and SECRET not in details, (found, sent)


@pytest.mark.parametrize("method", METHODS)
def test_random_bytes(services: Pair, method: str, clean_log: Any) -> None:
    rng = random.Random(method)
    for _ in range(25):
        raw = rng.randbytes(rng.choice([1, 2, 5, 30, 3000]))
        check(send(services, method, raw), raw[:50])


@pytest.mark.parametrize("method", METHODS)
def test_hostile_fields(services: Pair, method: str, clean_log: Any) -> None:
    rng = random.Random(method)
    for _ in range(30):
        message = hostile(METHODS[method].input_type, rng)
        if method.endswith("PrefillChunks"):
            message.request_id = ""
        check(send(services, method, message.SerializeToString()), str(message)[:2000])


def segment(**fields: Any) -> decode_pb2.Segment:
    return decode_pb2.Segment(**fields)


LONG = "n" * 400_000
ECHOES: dict[str, tuple[str, Any]] = {
    "request id": ("Generate", decode_pb2.GenerateRequest(request_id=LONG, segments=[segment(text="x")])),
    "forged line": ("Generate", decode_pb2.GenerateRequest(request_id="a\nERROR", segments=[segment(text="x")])),
    "chunk id": ("Generate", decode_pb2.GenerateRequest(segments=[segment(chunk_id=LONG)])),
    "role": ("Explain", decode_pb2.GenerateRequest(segments=[segment(text="x", role=LONG)])),
    "salt": ("Explain", decode_pb2.GenerateRequest(segments=[segment(text="x")], salt=LONG)),
    "text": ("Generate", decode_pb2.GenerateRequest(segments=[segment(text=SECRET * 9000)])),
    "refused role": ("Generate", decode_pb2.GenerateRequest(segments=[segment(text=SECRET, role="wizard")])),
    "stop": (
        "Generate",
        decode_pb2.GenerateRequest(
            segments=[segment(text="x")], sampling=decode_pb2.SamplingParams(stop=[SECRET] * 17)
        ),
    ),
    "long stop": (
        "Generate",
        decode_pb2.GenerateRequest(segments=[segment(text="x")], sampling=decode_pb2.SamplingParams(stop=[LONG])),
    ),
    "stop ids": (
        "Generate",
        decode_pb2.GenerateRequest(sampling=decode_pb2.SamplingParams(stop_token_ids=[1] * 100_000)),
    ),
    "abort": ("Abort", decode_pb2.AbortRequest(request_id=LONG)),
    "get": ("GetChunk", prefill_pb2.GetChunkRequest(chunk_id=LONG)),
    "delete": ("DeleteChunk", prefill_pb2.DeleteChunkRequest(chunk_id=LONG)),
    "page token": ("ListChunks", prefill_pb2.ListChunksRequest(page_token=LONG)),
    "context": ("PrefillChunk", prefill_pb2.PrefillChunkRequest(text="x", context_chunk_ids=[LONG])),
    "tag": ("PrefillChunk", prefill_pb2.PrefillChunkRequest(text="x", tags=[LONG])),
    "tokens": ("PrefillChunk", prefill_pb2.PrefillChunkRequest(token_ids=chunks_pb2.TokenIds(ids=[1] * 100_000))),
}


@pytest.mark.parametrize("name", ECHOES)
def test_nothing_long_or_private_is_echoed(services: Pair, name: str, clean_log: Any) -> None:
    method, message = ECHOES[name]
    service = "Decode" if method in ("Generate", "Explain", "Abort") else "Prefill"
    found = send(services, f"/cairn.v1.{service}Service/{method}", message.SerializeToString())
    check(found, name)
    assert found[0] is Code.INVALID_ARGUMENT and len(found[1]) < 400, found


def test_text_becomes_tokens_off_the_event_loop(services: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: set[str] = set()

    def watched(codec: Any, encode: Callable[..., Any]) -> Callable[..., Any]:
        def watching(*args: Any, **options: Any) -> Any:
            threads.add(threading.current_thread().name)
            return encode(*args, **options)

        return watching

    for codec in (services.decode.resolver.codec, services.prefill.jobs.resolver.codec):
        monkeypatch.setattr(codec, "encode", watched(codec, codec.encode))
    services.client.prefill("Some text that becomes tokens.")
    services.generate(["More text that becomes tokens.", "And a question?"])
    with grpc.insecure_channel(services.decode_address) as channel:
        decode_pb2_grpc.DecodeServiceStub(channel).Explain(
            decode_pb2.GenerateRequest(segments=[segment(text="x")]), timeout=20
        )
    assert threads and "servers" not in threads, threads
