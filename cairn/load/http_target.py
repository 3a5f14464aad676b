"""Any server that speaks OpenAI's HTTP as a target: completions of ids or text, or chat. Needs httpx."""

from __future__ import annotations

import json
import ssl
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from cairn.client.errors import CairnError, invalid
from cairn.load.answer import CUT, OK, Answer
from cairn.load.sse import EventReader
from cairn.load.target import Heard, Known, Sampling
from cairn.load.workload import Content, Request, Workload, joined

APIS = ("completions", "chat")
DONE = b"[DONE]"
CONNECT_S = 30.0
DETAIL_MAX = 300  # characters of an error that are kept
BODY_MAX = 64 << 10  # bytes of an error that are read


@dataclass(frozen=True)
class HttpTarget:
    """The server at ``url``, which is what stands before ``/completions``. ``more`` goes into every request's body."""

    url: str
    api: str = "chat"
    model: str = ""
    token: str | None = None
    tls: Path | None = None
    timeout_s: float = 300.0
    sampling: Sampling = field(default_factory=Sampling)
    more: Mapping[str, Any] = field(default_factory=dict)

    @asynccontextmanager
    async def open(self, workload: Workload, known: Known, heard: Heard) -> AsyncIterator[HttpCaller]:
        """Connections as they are needed. Raises ``CairnError`` if no model was named and the server names none."""
        headers = {} if self.token is None else {"Authorization": f"Bearer {self.token}"}
        async with httpx.AsyncClient(
            headers=headers,
            verify=True if self.tls is None else _trusting(self.tls),
            timeout=httpx.Timeout(self.timeout_s, connect=min(CONNECT_S, self.timeout_s), pool=None),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        ) as client:
            model = self.model or await self._first_model(client)
            yield HttpCaller(self, client, model, workload, heard)

    async def _first_model(self, client: httpx.AsyncClient) -> str:
        url = f"{self.url}/models"
        try:
            reply = await client.get(url)
            reply.raise_for_status()
            return str(reply.json()["data"][0]["id"])
        except httpx.HTTPStatusError as error:
            raise CairnError(f"{url} answers {error.response.status_code}: name a model", code="UNAVAILABLE") from error
        except httpx.HTTPError as error:
            words = str(error) or type(error).__name__
            raise CairnError(f"{url} cannot be reached: {words}", code="UNAVAILABLE") from error
        except (ValueError, LookupError, TypeError) as error:
            raise CairnError(f"{url} names no model: name one", code="UNAVAILABLE") from error


class HttpCaller:
    """Connections to a server."""

    def __init__(
        self, target: HttpTarget, client: httpx.AsyncClient, model: str, workload: Workload, heard: Heard
    ) -> None:
        self._target, self._client, self._model, self._heard = target, client, model, heard
        self.documents, self.systems = workload.documents, workload.systems

    def session(self, number: int, turns: int) -> HttpConversation:
        return HttpConversation(self, number, chat=self._target.api == "chat")

    async def stream(self, prompt: dict[str, Any], max_tokens: int, seed: int, answer: Answer) -> str:
        """Asks and fills ``answer``; its text."""
        path = "chat/completions" if "messages" in prompt else "completions"
        body = {"model": self._model, **prompt, **self._settings(max_tokens, seed), **self._target.more}
        said = _Said(answer, self._heard)
        try:
            async with self._client.stream("POST", f"{self._target.url}/{path}", json=body) as reply:
                if reply.status_code == 200:
                    await _receive(reply, said)
                else:
                    _refused(answer, reply, await _beginning(reply))
        except httpx.TimeoutException as error:
            answer.status, answer.detail = "TIMEOUT", type(error).__name__
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            answer.status, answer.detail = type(error).__name__, str(error)[:DETAIL_MAX]
        except (ValueError, LookupError, TypeError, AttributeError) as error:  # not what OpenAI's API says
            answer.status, answer.detail = "PROTOCOL", f"{type(error).__name__}: {error}"[:DETAIL_MAX]
        return "".join(said.text)

    def _settings(self, max_tokens: int, seed: int) -> dict[str, Any]:
        sampling = self._target.sampling
        settings = {"max_tokens": max_tokens, "stream": True, "stream_options": {"include_usage": True}}
        settings["temperature"] = sampling.temperature or 0.0
        if sampling.top_p is not None:
            settings["top_p"] = sampling.top_p
        if sampling.temperature:
            settings["seed"] = seed
        if sampling.ignore_eos:
            settings["ignore_eos"] = True  # not OpenAI's, but every open server's
        return settings


class HttpConversation:
    """One session: everything that was said goes with every request."""

    def __init__(self, caller: HttpCaller, number: int, *, chat: bool) -> None:
        self._caller, self._number, self._chat = caller, number, chat
        self._said: list[tuple[Content, str]] = []

    async def ask(self, request: Request, max_tokens: int, answer: Answer) -> None:
        """See ``Conversation``."""
        prompt = {"messages": self._messages(request)} if self._chat else {"prompt": self._prompt(request)}
        text = await self._caller.stream(prompt, max_tokens, self._number * 1000 + len(self._said), answer)
        if answer.status == OK:
            self._said.append((request.query, text))

    def _messages(self, request: Request) -> list[dict[str, Any]]:
        """System prompts, then the documents as parts of the first question."""
        documents, systems = self._caller.documents, self._caller.systems
        messages: list[dict[str, Any]] = [
            {"role": "system", "content": documents[place]} for place in request.documents if place < systems
        ]
        parts = [documents[place] for place in request.documents if place >= systems]
        for query, said in self._said:
            messages += [_question(parts, query), {"role": "assistant", "content": said}]
            parts = []
        return [*messages, _question(parts, request.query)]

    def _prompt(self, request: Request) -> str | list[int]:
        documents = [self._caller.documents[place] for place in request.documents]
        whole = joined([*documents, *(each for turn in self._said for each in turn), request.query])
        return whole if isinstance(whole, str) else list(whole)


class _Said:
    """What an answer's events say, put into the answer."""

    def __init__(self, answer: Answer, heard: Heard) -> None:
        self.text: list[str] = []
        self.whole = False
        self._answer, self._heard = answer, heard

    def add(self, event: bytes, at: float) -> None:
        """One event. Raises what comes of one that is not OpenAI's."""
        if event == DONE:
            self.whole = True
            return
        said = json.loads(event)
        if error := said.get("error"):
            known = error if isinstance(error, dict) else {"message": error}
            self._answer.status = f"ERROR {known.get('code') or known.get('type') or ''}".strip()
            self._answer.detail = str(known.get("message"))[:DETAIL_MAX]
        for choice in said.get("choices") or ():
            self._choice(choice, at)
        if usage := said.get("usage"):
            self._usage(usage)

    def end(self) -> None:
        """The stream is over. Raises ``ValueError`` if it has no end."""
        if self._answer.status == CUT:
            if not self.whole:
                raise ValueError("the stream ended before [DONE]")
            self._answer.status = OK

    def _choice(self, choice: dict[str, Any], at: float) -> None:
        answer, delta = self._answer, choice.get("delta") or {}
        text = choice.get("text") or delta.get("content") or ""
        self.text.append(text)
        if text or delta.get("reasoning_content") or delta.get("reasoning") or delta.get("tool_calls"):
            answer.times.append(at)
            answer.counts.append(1)
            self._heard(answer, 1)
        answer.finish_reason = choice.get("finish_reason") or answer.finish_reason

    def _usage(self, usage: dict[str, Any]) -> None:
        answer = self._answer
        answer.prompt_tokens = int(usage.get("prompt_tokens") or 0)
        answer.tokens = int(usage.get("completion_tokens") or 0) or None
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        if cached is not None:
            answer.reused = {"cached": int(cached), "computed": answer.prompt_tokens - int(cached)}


async def _receive(reply: httpx.Response, said: _Said) -> None:
    """Reads an answer to its end. Raises ``ValueError`` if that is missing."""
    reader = EventReader()
    async for piece in reply.aiter_bytes():
        at = time.monotonic()
        for event in reader.feed(piece):
            said.add(event, at)
    said.end()


async def _beginning(reply: httpx.Response) -> bytes:
    """Of an error's body: enough to say what it is."""
    body = b""
    async for piece in reply.aiter_bytes():
        body += piece
        if len(body) > BODY_MAX:
            break
    return body


def _refused(answer: Answer, reply: httpx.Response, body: bytes) -> None:
    """An error in OpenAI's shape, or any other."""
    answer.status, answer.detail = f"HTTP {reply.status_code}", body.decode(errors="replace")[:DETAIL_MAX]
    with suppress(ValueError, TypeError, AttributeError, LookupError):
        answer.detail = str(json.loads(body)["error"]["message"])[:DETAIL_MAX]
    with suppress(KeyError, ValueError):
        answer.retry_after_s = float(reply.headers["Retry-After"])


def _question(parts: list[Content], query: Content) -> dict[str, Any]:
    if not parts:
        return {"role": "user", "content": query}
    return {"role": "user", "content": [{"type": "text", "text": each} for each in (*parts, query)]}


def _trusting(authorities: Path) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=str(authorities))
    except OSError as error:
        raise invalid("tls", f"cannot read {authorities}: {error}") from error
