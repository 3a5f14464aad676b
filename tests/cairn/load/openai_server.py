"""A small OpenAI-compatible server: streams words, and does what a test tells it to."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class OpenAI:
    """What it answers, and what it was asked."""

    refusals: list[tuple[int, dict[str, str], Any]] = field(default_factory=list)  # for the coming requests
    models: Any = field(default_factory=lambda: {"data": [{"id": "words"}]})
    done: bool = True  # whether streams end as they should
    raw: bytes = b""  # instead of events
    words_an_event: int = 1
    held: threading.Event | None = None  # awaited after the first word
    cached: int | None = 7
    requests: list[tuple[str, dict[str, Any], dict[str, str]]] = field(default_factory=list)

    def events(self, path: str, body: dict[str, Any]) -> Iterator[bytes]:
        chat, count, words = path.endswith("chat/completions"), body["max_tokens"], self.words_an_event
        if chat:
            yield _event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        for at in range(0, count, words):
            text = "".join(f" w{n}" for n in range(at, min(count, at + words)))
            choice = {"index": 0, "delta": {"content": text}} if chat else {"index": 0, "text": text}
            yield _event({"choices": [choice]})
            if self.held is not None and at == 0:
                self.held.wait(60)
        yield _event({"choices": [{"index": 0, "delta": {}, "text": "", "finish_reason": "length"}]})
        details = {} if self.cached is None else {"prompt_tokens_details": {"cached_tokens": self.cached}}
        yield _event({"choices": [], "usage": {"prompt_tokens": 20, "completion_tokens": count, **details}})
        if self.done:
            yield b"data: [DONE]\n\n"


def _event(value: Any) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


@contextmanager
def serving(service: OpenAI) -> Iterator[str]:
    """The server's URL, for as long as the block."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            status = 200 if self.path == "/v1/models" and service.models is not None else 404
            self._send(status, {}, service.models if status == 200 else {"error": {"message": "no such page"}})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            service.requests.append((self.path, body, dict(self.headers)))
            if service.refusals:
                return self._send(*service.refusals.pop(0))
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Connection", "close")
            self.end_headers()
            try:
                for event in [service.raw] if service.raw else service.events(self.path, body):
                    self.wfile.write(event)
                    self.wfile.flush()
            except OSError:  # the client has seen enough
                pass
            self.close_connection = True

        def _send(self, status: int, headers: dict[str, str], value: Any) -> None:
            body = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(status)
            for name, each in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, each)
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        if service.held is not None:
            service.held.set()
        server.shutdown()
        server.server_close()
        thread.join(10)
