"""What the gateway lets in, how requests end, and how it ends itself: over real services that can be held still."""

from __future__ import annotations

import json
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import httpx
import openai
import pytest

from cairn.local.processes import free_port
from tests.decode_service.models import loaded, model_dir
from tests.decode_service.pair import Pair, pair, wait_until
from tests.gateway.running import Running, gateway

BOUNDS = ["--requests-max", "3", "--body-max", "20000", "--connections-max", "12"]
MESSAGES = [{"role": "user", "content": "stones"}]


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = model_dir(tmp_path_factory.mktemp("models") / "tiny")
    with pair(loaded(folder, "p"), loaded(folder, "d"), tmp_path_factory.mktemp("s"), waiting_max=2) as running:
        yield running
        running.check_idle()


@pytest.fixture(scope="module")
def running(services: Pair) -> Iterator[Running]:
    with gateway(services.prefill_address, services.decode_address, *BOUNDS) as started:
        yield started


@pytest.fixture(scope="module")
def model(running: Running) -> str:
    return str(running.client().models.list().data[0].id)


def post(running: Running, body: bytes, **headers: str) -> tuple[int, dict[str, Any], Any]:
    """Status, JSON and headers of an answer to raw bytes."""
    given = {"content-type": "application/json", **headers}
    request = urllib.request.Request(f"{running.url}/v1/chat/completions", body, given, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, json.loads(reply.read()), reply.headers
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read()), error.headers


def test_bodies_that_are_no_request_are_refused(running: Running, model: str) -> None:
    whole = json.dumps({"model": model, "messages": MESSAGES, "max_tokens": 2}).encode()
    assert post(running, whole)[0] == 200
    refused = {
        b"": 400,
        b"[]": 400,
        b"{": 400,
        b'{"model": NaN}': 400,
        b'{"model": "\\ud800"}': 400,
        b"\xff\xfe": 400,
        b'{"a": ' + b"9" * 5000 + b"}": 400,
        b'{"a":' * 65 + b"1" + b"}" * 65: 400,
        b"[" * 9000 + b"]" * 9000: 400,
        b'{"a": "' + b"x" * 20000 + b'"}': 413,
    }
    for body, status in refused.items():
        found, said, _ = post(running, body)
        assert found == status and set(said["error"]) == {"message", "type", "param", "code"}, body[:40]
    assert post(running, whole, **{"content-type": "text/plain"})[0] == 415
    assert post(running, whole, **{"content-encoding": "gzip"})[0] == 415
    assert post(running, whole, host="elsewhere.example")[0] == 421
    assert post(running, whole)[2]["x-request-id"]


def test_paths_and_methods(running: Running) -> None:
    with httpx.Client(base_url=running.url, timeout=60) as http:
        assert http.get("/v1/nothing").json()["error"]["code"] == "not_found"
        assert http.get("/v1/chat/completions").status_code == 405
        assert http.get("/health").json() == {"status": "ok"}
        assert "cairn_gateway_requests_total" in http.get("/metrics").text
        assert http.get("/v1/models", headers={"authorization": "Basic eDp5"}).status_code == 401
    with httpx.Client(base_url=f"http://127.0.0.1:{running.metrics_port}", timeout=60) as http:
        assert 'cairn_gateway_requests_total{route="/health",status="200"}' in http.get("/metrics").text


@pytest.mark.parametrize("stream", [False, True])
def test_a_caller_that_goes_ends_its_request(services: Pair, running: Running, model: str, stream: bool) -> None:
    asked = {"model": model, "messages": MESSAGES, "max_tokens": 100, "ignore_eos": True, "stream": stream}
    with services.held_decode():
        connection = socket.create_connection(("127.0.0.1", running.port))
        body = json.dumps(asked).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n"
        connection.sendall(f"{head}content-type: application/json\r\n\r\n".encode() + body)
        wait_until(lambda: bool(services.decode.ids))
        connection.close()
        wait_until(lambda: not services.decode.ids, 30)  # before the device thread goes on by itself
    services.check_idle()


def test_a_stream_that_is_left_ends_its_request(services: Pair, running: Running, model: str) -> None:
    asked: Any = {"model": model, "messages": MESSAGES, "max_tokens": 400, "extra_body": {"ignore_eos": True}}
    with running.client().chat.completions.create(**asked, stream=True) as stream:
        next(iter(stream))
        assert services.decode.ids
    services.check_idle()


def test_more_than_may_be_at_once_is_refused_with_when_to_come_again(
    services: Pair, running: Running, model: str
) -> None:
    asked: Any = {"model": model, "messages": MESSAGES, "max_tokens": 3}
    with services.held_decode():
        threads = [threading.Thread(target=lambda: running.client().chat.completions.create(**asked)) for _ in range(2)]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(services.decode.ids) == 2)
        with pytest.raises(openai.RateLimitError) as full:  # the services have two waiting
            running.client().chat.completions.create(**asked)
        assert full.value.code == "rate_limit_exceeded" and int(full.value.response.headers["retry-after"]) >= 1
    for thread in threads:
        thread.join(60)
    assert running.client(max_retries=2).chat.completions.create(**asked).choices[0].finish_reason == "length"


def test_the_gateways_own_bound_of_requests(running: Running) -> None:
    """Requests whose bodies do not come take room, too; it comes back when they go."""
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    slow = [socket.create_connection(("127.0.0.1", running.port)) for _ in range(3)]
    for connection in slow:
        connection.sendall(head + b"content-length: 10\r\n\r\n{")

    def refused() -> bool:
        status, said, headers = post(running, b"{}")
        return status == 429 and "3 requests" in said["error"]["message"] and headers["retry-after"] == "1"

    wait_until(refused)
    for connection in slow:
        connection.close()
    wait_until(lambda: not refused())


def test_connections_that_ask_nothing_make_room(running: Running) -> None:
    idle = [socket.create_connection(("127.0.0.1", running.port)) for _ in range(20)]
    with httpx.Client(base_url=running.url, timeout=60) as http:
        assert http.get("/health").status_code == 200
    idle[0].settimeout(60)
    with suppress(ConnectionResetError):
        assert idle[0].recv(1) == b"", "the longest idle was closed"
    for connection in idle:
        connection.close()
    long = socket.create_connection(("127.0.0.1", running.port))
    long.settimeout(60)
    with suppress(ConnectionResetError, BrokenPipeError):
        long.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: " + b"a" * 100_000)
        assert long.recv(100).startswith(b"HTTP/1.1 400")
    long.close()


def test_a_gateway_that_is_told_to_stop_answers_what_it_has_begun(services: Pair, model: str) -> None:
    asked: Any = {"model": model, "messages": MESSAGES, "max_tokens": 30, "extra_body": {"ignore_eos": True}}
    with gateway(services.prefill_address, services.decode_address) as stopped:
        with services.held_decode():
            answers: list[Any] = []
            client = stopped.client()
            thread = threading.Thread(target=lambda: answers.append(client.chat.completions.create(**asked)))
            thread.start()
            wait_until(lambda: bool(services.decode.ids))
            stopped.process.terminate()
            wait_until(lambda: not reachable(stopped.port))
        thread.join(60)
        assert answers[0].usage.completion_tokens == 30
        assert stopped.process.wait(60) == 0
        assert "stones" not in stopped.said()


def reachable(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def test_services_that_are_not_there() -> None:
    nowhere = f"127.0.0.1:{free_port('127.0.0.1')}"
    with gateway(nowhere, nowhere, "--request-timeout-s", "20") as alone:
        with pytest.raises(openai.InternalServerError) as gone:
            alone.client().models.list()
        assert gone.value.status_code == 503 and nowhere not in str(gone.value.body)
        assert gone.value.response.headers["retry-after"] == "1"
        with httpx.Client(base_url=alone.url, timeout=60) as http:
            assert http.get("/health").status_code == 503
