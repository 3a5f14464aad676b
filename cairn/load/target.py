"""Whom a load generator asks, as the rest of it sees that: somebody with whom sessions are held."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from cairn.load.answer import Answer
from cairn.load.workload import Request, Workload

DocumentKey: TypeAlias = tuple[str, int]  # a workload's key, and the document's place in it
Known: TypeAlias = dict[DocumentKey, str]  # the ids under which documents are registered
Heard: TypeAlias = Callable[[Answer, int], None]


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn; None is left to the service. ``ignore_eos``: each is as long as it was asked to be."""

    temperature: float | None = None
    top_p: float | None = None
    ignore_eos: bool = True


class Conversation(Protocol):
    """One session: it knows what was said."""

    async def ask(self, request: Request, max_tokens: int, answer: Answer) -> None:
        """Sends a request, fills ``answer`` in as its tokens come, and returns when it is over; raises nothing but
        ``CancelledError``."""


class Caller(Protocol):
    """A connection."""

    def session(self, number: int, turns: int) -> Conversation: ...


class Target(Protocol):
    """Where to connect, and how to say things there. Goes to other processes."""

    def open(self, workload: Workload, known: Known, heard: Heard) -> AbstractAsyncContextManager[Caller]:
        """A connection. ``heard`` is called as tokens come; ``known`` grows by what is learnt."""
