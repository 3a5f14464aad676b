"""What is asked: sessions of requests over shared documents. Knows nothing of time or of who answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Protocol, TypeAlias

FIRST_ID = 100  # the lowest ids are left out: special tokens live there
_WORDS = """
time year people way day man thing woman life child world school state family student group country problem hand
part place case week company system program question work night point home water room mother area money story
fact month lot right study book eye job word business issue side kind head house service friend father power hour
game line end member law car city name team minute idea kid body back parent face level office door health art
war history party result change morning reason research girl guy moment air teacher force
"""
WORDS = _WORDS.split()

TokenIds: TypeAlias = tuple[int, ...]
Content: TypeAlias = TokenIds | str


@dataclass(frozen=True)
class Request:
    """What is asked: documents by their place in the workload's, then the query, and how long the answer may get."""

    documents: tuple[int, ...]
    query: Content
    max_tokens: int


class Workload(Protocol):
    """Sessions by number, the same each time. Requests of one follow each other, each once the one before is answered.

    The first ``systems`` documents are system prompts. Two workloads of one ``key`` have the same documents.
    """

    @property
    def key(self) -> str: ...

    @property
    def systems(self) -> int: ...

    @property
    def documents(self) -> Sequence[Content]: ...

    def session(self, number: int) -> Sequence[Request]: ...


@dataclass(frozen=True)
class Lengths:
    """What a workload's parts measure: in tokens, or in words where it is made of words."""

    system: int = 64
    document: int = 512
    query: int = 32
    output: int = 64


@dataclass(frozen=True)
class Seeded:
    """A workload whose every session follows from its number and the seed; there is no last one.

    A request names the system prompt, if ``lengths.system`` is not 0, then ``picked`` of ``count`` documents: each
    drawn by Zipf's law with the exponent ``zipf``, in any order. The ``turns`` requests of a session name the same.
    ``vocabulary`` None: words, else ids below it.
    """

    name: str
    lengths: Lengths = Lengths()
    count: int = 0
    picked: int = 0
    zipf: float = 1.0
    turns: int = 1
    vocabulary: int | None = None
    seed: int = 0

    @property
    def key(self) -> str:
        lengths = self.lengths
        return f"{self.name} {self.seed} {self.count} {lengths.system} {lengths.document} {self.vocabulary}"

    @property
    def systems(self) -> int:
        return 1 if self.lengths.system else 0

    @property
    def documents(self) -> Sequence[Content]:
        sizes = [self.lengths.system] * self.systems + [self.lengths.document] * self.count
        return [self._content(self._random(f"document {place}"), size) for place, size in enumerate(sizes)]

    def session(self, number: int) -> Sequence[Request]:
        random = self._random(f"session {number}")
        named = (*range(self.systems), *(self.systems + place for place in self._drawn(random)))
        queries = [self._content(random, self.lengths.query) for _ in range(self.turns)]
        return [Request(named, query, self.lengths.output) for query in queries]

    def _drawn(self, random: Random) -> list[int]:
        places, weights = list(range(self.count)), [1 / (rank + 1) ** self.zipf for rank in range(self.count)]
        drawn = []
        for _ in range(min(self.picked, self.count)):
            at = random.choices(range(len(places)), weights)[0]
            drawn.append(places.pop(at))
            weights.pop(at)
        return drawn

    def _content(self, random: Random, size: int) -> Content:
        if self.vocabulary is None:
            return words(random, size)
        return tuple(random.randrange(FIRST_ID, self.vocabulary) for _ in range(size))

    def _random(self, of: str) -> Random:
        return Random(f"{self.name} {self.seed} {of}")


WORKLOADS: dict[str, Seeded] = {
    "shared": Seeded("shared", Lengths(system=0, document=2048), count=1, picked=1),
    "rag": Seeded("rag", count=32, picked=4),
    "conversations": Seeded("conversations", Lengths(system=512), turns=6),
    "unshared": Seeded("unshared", Lengths(system=0, query=1024)),
}


@dataclass(frozen=True)
class Listed:
    """A workload that is written out: a trace."""

    key: str
    documents: tuple[Content, ...]
    sessions: tuple[tuple[Request, ...], ...]
    systems: int = 0

    def session(self, number: int) -> Sequence[Request]:
        return self.sessions[number]


@dataclass(frozen=True)
class About:
    """A session for each document of another workload, about that document alone: then all of them are known."""

    other: Workload
    query: Content

    @property
    def key(self) -> str:
        return self.other.key

    @property
    def systems(self) -> int:
        return self.other.systems

    @property
    def documents(self) -> Sequence[Content]:
        return self.other.documents

    def session(self, number: int) -> Sequence[Request]:
        return [Request((number,), self.query, 1)]


def words(random: Random, count: int) -> str:
    """A line of so many words."""
    return " ".join(random.choices(WORDS, k=count)) + "\n"


def joined(contents: Sequence[Content]) -> Content:
    """One content of several of a kind."""
    if isinstance(contents[0], str):
        return "".join(str(each) for each in contents)
    return tuple(token for each in contents if not isinstance(each, str) for token in each)
