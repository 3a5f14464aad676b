"""One way of opening a channel, for threads and for event loops, in plain text and with TLS."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from serving.rpc.channel import MESSAGE_NBYTES_MAX, Target, call_metadata


class Echo(grpc.GenericRpcHandler):
    """Answers every call with its message."""

    def service(self, handler_call_details: Any) -> Any:
        return grpc.unary_unary_rpc_method_handler(lambda message, _: message)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """A key, and a certificate for 127.0.0.1 that it signs itself."""
    folder = tmp_path_factory.mktemp("tls")
    key, cert = folder / "key.pem", folder / "cert.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=cairn"
    command += f" -addext subjectAltName=IP:127.0.0.1 -keyout {key} -out {cert}"
    subprocess.run(command.split(), check=True, capture_output=True, timeout=60)
    return key.read_bytes(), cert.read_bytes()


@pytest.fixture
def addresses(certificate: tuple[bytes, bytes]) -> Iterator[tuple[str, str]]:
    """Of a server: without and with TLS."""
    server = grpc.server(ThreadPoolExecutor(2), options=[("grpc.max_receive_message_length", -1)])
    server.add_generic_rpc_handlers((Echo(),))
    plain = server.add_insecure_port("127.0.0.1:0")
    secured = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([certificate]))
    server.start()
    yield f"127.0.0.1:{plain}", f"127.0.0.1:{secured}"
    server.stop(None)


def echoed(target: Target, message: bytes = b"hello") -> bytes:
    with target.open() as channel:
        answer: bytes = channel.unary_unary("/a.B/C", None, None)(message, timeout=30)
        return answer


def echoed_async(target: Target) -> bytes:
    async def main() -> bytes:
        async with target.open_async() as channel:
            answer: bytes = await channel.unary_unary("/a.B/C", None, None)(b"hello", timeout=30)
            return answer

    return asyncio.run(main())


def test_plain_text_and_tls_for_threads_and_loops(addresses: tuple[str, str], certificate: tuple[bytes, bytes]) -> None:
    plain, secured = addresses
    for target in (Target(plain), Target(plain, False), Target(secured, certificate[1])):
        assert echoed(target) == echoed_async(target) == b"hello"


def test_a_certificate_that_nobody_trusts_is_refused(addresses: tuple[str, str]) -> None:
    for target in (Target(addresses[1], True), Target(addresses[1])):
        with pytest.raises(grpc.RpcError) as caught:
            echoed(target)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def test_messages_may_be_large_and_have_a_bound(addresses: tuple[str, str]) -> None:
    target = Target(addresses[0])
    assert len(echoed(target, bytes(5 * 2**20))) == 5 * 2**20  # gRPC's own bound is 4 MiB
    with pytest.raises(grpc.RpcError) as caught:
        echoed(target, bytes(MESSAGE_NBYTES_MAX + 1))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_proxy_is_not_asked_for_this_machine(addresses: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nobody there
    monkeypatch.delenv("no_proxy", raising=False)
    assert echoed(Target(addresses[0])) == b"hello"
    port = addresses[0].rpartition(":")[2]
    assert echoed(Target(f"localhost:{port}")) == b"hello"


def test_metadata_say_who_calls_and_for_which_request() -> None:
    assert call_metadata(None, "") == call_metadata("", "") == ()
    assert call_metadata("word", "a b\n") == (("authorization", "Bearer word"), ("x-request-id", "a_b_"))
