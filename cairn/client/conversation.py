"""Conversations whose turns are kept: each request names what was said before, and computes its own query alone.

    ask 1    system  documents  | query 1 |  --> answer 1, kept as turn 1 = query 1 + answer 1
    ask 2    system  documents    turn 1  | query 2 |  --> turn 2
    edit 1   system  documents  | other query 1 |      --> another turn 1, and what followed is gone

What was generated is never tokenised again: a turn is a chunk of the very tokens. Should the services have forgotten
one (NotFound), the same tokens are sent instead of its id, and the answer is the same.

This file has no network: ``Client.conversation`` and ``AsyncClient.conversation`` say how a request is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, Self, TypeVar, Unpack

from cairn.client.answers import Kept, Result
from cairn.client.calls import GenerateOptions
from cairn.client.chunks import ChunkRef
from cairn.client.errors import invalid
from cairn.client.generation import AsyncGeneration, Generation
from cairn.client.prompt import Message, Text, Tokens
from cairn.client.requests import Segment

StreamT = TypeVar("StreamT")
StreamT_co = TypeVar("StreamT_co", covariant=True)


@dataclass(frozen=True)
class Turn:
    """A question, as it was ``asked``, and the answer to it. ``kept`` names both together as a chunk."""

    asked: Segment
    result: Result
    kept: Kept

    @property
    def question(self) -> str:
        """Its words; "" for one of token ids or a chunk."""
        return _words(self.asked)

    @property
    def id(self) -> str:
        """Of the chunk."""
        return self.kept.id

    @property
    def answer(self) -> str:
        """Its text."""
        return self.result.text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Of the question as the model saw it and of the answer: those of the chunk."""
        return (*self.kept.query_token_ids, *self.result.token_ids)

    def segment(self, *, inline: bool) -> Segment:
        """The turn in a request: named by its id, or ``inline`` as its tokens."""
        return Tokens(self.token_ids, type="turn") if inline else ChunkRef(self.id)


class Send(Protocol[StreamT_co]):
    """Sends a request: its segments, the same without names of turns, what is told of the result, and options."""

    def __call__(
        self,
        segments: Sequence[Segment],
        whole: Sequence[Segment],
        finished: Callable[[Result], None],
        options: GenerateOptions,
    ) -> StreamT_co: ...


class BaseConversation(Generic[StreamT]):
    """What both kinds of conversation are. Has one question at a time; ``branch`` for more."""

    def __init__(
        self,
        send: Send[StreamT],
        system: Segment | None,
        documents: Sequence[Segment],
        defaults: GenerateOptions,
        *,
        role: str = "user",
        system_role: str = "system",
        document_role: str = "",
    ) -> None:
        if isinstance(documents, str | ChunkRef | Text | Tokens):
            raise invalid("documents", "give a list")
        if defaults.get("reuse", "exact") != "exact" or defaults.get("cache", "shared") != "shared":
            raise invalid("reuse", "a conversation is kept in reuse mode exact, with cache shared")
        self._send = send
        self._system = system
        self._role = role
        self._defaults = defaults
        self._given = [] if system is None else [_typed(system, "system_prompt", system_role)]
        self._given += [_typed(document, "context", document_role) for document in documents]
        self._named: list[Segment] | None = None  # the same, once their ids are known
        self._turns: tuple[Turn, ...] = ()

    @property
    def turns(self) -> tuple[Turn, ...]:
        """All turns, the first first."""
        return self._turns

    @property
    def messages(self) -> list[Message]:
        """What was said, as chat messages; documents are none."""
        system = _words(self._system)
        said: list[Message] = [{"role": "system", "content": system}] if system else []
        for turn in self._turns:
            said.append({"role": "user", "content": turn.question})
            said.append({"role": "assistant", "content": turn.answer})
        return said

    def branch(self, turns: int | None = None) -> Self:
        """Another conversation that goes on from here, or from behind the first ``turns`` turns; this one stays.

        A negative number leaves out as many of the last.
        """
        if turns is not None and not -len(self._turns) <= turns <= len(self._turns):
            raise invalid("turns", f"there are {len(self._turns)}, not {turns}")
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._given = list(self._given)
        other._turns = self._turns[:turns]
        return other

    def stream(self, question: Segment, **options: Unpack[GenerateOptions]) -> StreamT:
        """Asks, and gives the answer as it comes; read to its end it is the next turn.

        An answer that is left before its end, or fails, leaves the conversation as it is; so does one of no tokens. One
        that is aborted (``Client.abort``) is a turn as far as it came. Of ``n`` answers the first is the turn's.
        """
        return self._stream(self._turns, question, options)

    def stream_edit(self, turn: int, question: Segment, **options: Unpack[GenerateOptions]) -> StreamT:
        """Asks something else in a turn's place, the first is 0; once answered, what followed it is gone."""
        return self._stream(self._turns[: self._index(turn)], question, options)

    def stream_retry(self, **options: Unpack[GenerateOptions]) -> StreamT:
        """Asks the last question again, for another answer in its place: with another seed, for example."""
        last = self._turns[self._index(-1)]
        return self._stream(self._turns[:-1], last.asked, options)

    def _index(self, turn: int) -> int:
        if not -len(self._turns) <= turn < len(self._turns):
            raise invalid("turn", f"there are {len(self._turns)}, not one of number {turn}")
        return turn % len(self._turns)

    def _stream(self, before: tuple[Turn, ...], question: Segment, options: GenerateOptions) -> StreamT:
        query = _typed(question, "query", self._role)
        given: GenerateOptions = {**self._defaults, **options, "keep": True}
        if self._named is not None:
            given["order"] = "given"  # turns stand behind the order that was found first
        whole = [*self._given, *(turn.segment(inline=True) for turn in before), query]
        segments = whole
        if self._named is not None and all(turn.kept.registered for turn in before):
            segments = [*self._named, *(turn.segment(inline=False) for turn in before), query]

        def answered(result: Result) -> None:
            if result.kept is not None:
                self._adopt(result)
                self._turns = (*before, Turn(question, result, result.kept))

        return self._send(segments, whole, answered, given)

    def _adopt(self, result: Result) -> None:
        """Of the first turn: the ids of what stands before it, in the order in which it stood."""
        if self._named is not None or not result.kept or not result.kept.registered:
            return
        stood = result.reuse.segments[: len(self._given)]
        self._given = [self._given[segment.given_index] for segment in stood]
        self._named = [ChunkRef(segment.chunk_id) for segment in stood]


class Conversation(BaseConversation[Generation]):
    """A conversation with a model; see ``Client.conversation``."""

    def ask(self, question: Segment, **options: Unpack[GenerateOptions]) -> Result:
        """The answer, whole; the next turn. See ``stream`` for the answer as it comes."""
        return self.stream(question, **options).finish()

    def edit(self, turn: int, question: Segment, **options: Unpack[GenerateOptions]) -> Result:
        """Asks something else in a turn's place; what followed it is gone. See ``stream_edit``."""
        return self.stream_edit(turn, question, **options).finish()

    def retry(self, **options: Unpack[GenerateOptions]) -> Result:
        """Another answer to the last question, in place of the one there is. See ``stream_retry``."""
        return self.stream_retry(**options).finish()


class AsyncConversation(BaseConversation[AsyncGeneration]):
    """The same for an event loop; see ``AsyncClient.conversation``."""

    async def ask(self, question: Segment, **options: Unpack[GenerateOptions]) -> Result:
        """The answer, whole; the next turn."""
        return await self.stream(question, **options).finish()

    async def edit(self, turn: int, question: Segment, **options: Unpack[GenerateOptions]) -> Result:
        """Asks something else in a turn's place; what followed it is gone."""
        return await self.stream_edit(turn, question, **options).finish()

    async def retry(self, **options: Unpack[GenerateOptions]) -> Result:
        """Another answer to the last question, in place of the one there is."""
        return await self.stream_retry(**options).finish()


def _typed(segment: Segment, type: str, role: str) -> Segment:
    """A string as what it is here; all else says that itself."""
    return Text(segment, type=type, role=role) if isinstance(segment, str) else segment


def _words(segment: Segment | None) -> str:
    """What was given as a string or a text; else ""."""
    text = segment.text if isinstance(segment, Text) else segment
    return text if isinstance(text, str) else ""
