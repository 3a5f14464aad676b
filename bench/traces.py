"""Traffic for ``bench.serving``: seeded traces of token ids, the same for every engine that is compared.

A trace is sessions of requests. The requests of a session run one after the other, each once its predecessor is
answered; sessions do not wait for each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random

from cairn.load.workload import Content, Request, TokenIds

FIRST_ID, END_ID = 1000, 150_000  # ids are drawn from here; a smaller vocabulary folds them (``Trace.within``)
SPECIAL_IDS = 100  # the lowest ids, which folding leaves out: special tokens live there


@dataclass(frozen=True)
class Trace:
    """Sessions of requests over shared documents; ``concurrency`` sessions at a time is how the comparison runs it.

    The first ``systems`` documents are system prompts: they stay in front, whatever order the others may have.
    """

    name: str
    documents: tuple[TokenIds, ...]
    sessions: tuple[tuple[Request, ...], ...]
    concurrency: int
    sampled: bool = False
    variant: int = 0
    systems: int = 0

    @property
    def key(self) -> str:
        """What its documents are known by."""
        return f"{self.name} {self.variant}"

    def session(self, number: int) -> tuple[Request, ...]:
        return self.sessions[number]

    @property
    def warm_up(self) -> int:
        """The first so many sessions are asked for a few tokens each and are not counted."""
        return max(1, len(self.sessions) // 8)

    def within(self, vocabulary: int) -> Trace:
        """The same trace with ids below ``vocabulary``. Raises ``ValueError`` if that leaves no ids to speak of."""
        if vocabulary >= END_ID:
            return self
        if vocabulary < 2 * SPECIAL_IDS:
            raise ValueError(f"a vocabulary of {vocabulary} tokens is too small for traces: at least {2 * SPECIAL_IDS}")
        return self._mapped(lambda token: SPECIAL_IDS + token % (vocabulary - SPECIAL_IDS))

    def anew(self, variant: int) -> Trace:
        """The same trace of other tokens, which nothing is cached of; 0 is the trace itself."""
        moved, ids = variant * 7919, END_ID - FIRST_ID
        trace = self._mapped(lambda token: FIRST_ID + (token - FIRST_ID + moved) % ids) if variant else self
        return replace(trace, variant=variant)

    def about_each_document(self) -> Trace:
        """A session for each document alone, which is then known and, where context does not count, computed."""
        sessions = tuple((Request((n,), document[:8], 1),) for n, document in enumerate(self.documents))
        return replace(self, sessions=sessions)

    def _mapped(self, change: Callable[[int], int]) -> Trace:
        def changed(ids: Content) -> TokenIds:
            return tuple(change(token) for token in ids_of(ids))

        sessions = tuple(tuple(replace(each, query=changed(each.query)) for each in one) for one in self.sessions)
        return replace(self, documents=tuple(map(changed, self.documents)), sessions=sessions)


def doc_qa(scale: float = 1.0, counts: float | None = None, *, sampled: bool = False) -> Trace:
    """Questions about one long document."""
    document = _tokens(Random(1000), _scaled(32_768, scale))
    random, answer = Random(11 if sampled else 1), _scaled(128, scale)
    asked = [
        Request((0,), _tokens(random, _scaled(64, scale)), answer) for _ in range(_scaled(256, scale, counts=counts))
    ]
    name = "doc_qa_sampled" if sampled else "doc_qa"
    return Trace(name, (document,), _alone(asked), _scaled(64, scale, 4, counts), sampled)


def doc_qa_sampled(scale: float = 1.0, counts: float | None = None) -> Trace:
    """``doc_qa`` with other questions, drawn at a temperature."""
    return doc_qa(scale, counts, sampled=True)


def unshared(scale: float = 1.0, counts: float | None = None) -> Trace:
    """Prompts that have nothing in common."""
    random, answer = Random(3), _scaled(128, scale)
    asked = [
        Request((), _tokens(random, _scaled(1024, scale)), answer) for _ in range(_scaled(256, scale, counts=counts))
    ]
    return Trace("unshared", (), _alone(asked), _scaled(64, scale, 4, counts))


def agents(scale: float = 1.0, counts: float | None = None) -> Trace:
    """Conversations behind one system prompt; each turn has the turns before it as its history."""
    system = _tokens(Random(3000), _scaled(2048, scale))
    random, own, answer = Random(4), _scaled(256, scale), _scaled(128, scale)
    turns = _scaled(6, scale, 3, counts)
    conversations = [
        tuple(Request((0,), _tokens(random, own), answer) for _ in range(turns))
        for _ in range(_scaled(16, scale, counts=counts))
    ]
    return Trace("agents", (system,), tuple(conversations), _scaled(16, scale, 4, counts), systems=1)


def rag(scale: float = 1.0, counts: float | None = None) -> Trace:
    """A system prompt, then 4 of 32 documents in any order, the first ones by far the most often (Zipf)."""
    random, base = Random(2), Random(2000)
    documents = [_tokens(base, _scaled(512, scale))]
    documents += [_tokens(base, _scaled(2048, scale)) for _ in range(32)]
    weights = [1 / (rank + 1) for rank in range(32)]
    asked = []
    for _ in range(_scaled(128, scale, counts=counts)):
        picked = [0]
        while len(picked) < 5:
            document = 1 + random.choices(range(32), weights)[0]
            if document not in picked:
                picked.append(document)
        asked.append(Request(tuple(picked), _tokens(random, _scaled(64, scale)), _scaled(128, scale)))
    return Trace("rag", tuple(documents), _alone(asked), _scaled(64, scale, 4, counts), systems=1)


def cold(scale: float = 1.0, counts: float | None = None) -> Trace:
    """One request at a time over 4 documents that nobody has seen."""
    random, documents, asked = Random(5), [], []
    for number in range(_scaled(24, scale, counts=counts)):
        documents += [_tokens(random, _scaled(2048, scale)) for _ in range(4)]
        places = tuple(range(4 * number, 4 * number + 4))
        asked.append(Request(places, _tokens(random, _scaled(64, scale)), 8))
    return Trace("cold", tuple(documents), _alone(asked), 1)


def busy_prefill(scale: float = 1.0, counts: float | None = None) -> Trace:
    """``doc_qa``'s streams with other questions: once undisturbed, once while the prefill service computes."""
    document = _tokens(Random(1000), _scaled(32_768, scale))
    random, answer = Random(12), _scaled(128, scale)
    asked = [
        Request((0,), _tokens(random, _scaled(64, scale)), answer) for _ in range(_scaled(256, scale, counts=counts))
    ]
    return Trace("busy_prefill", (document,), _alone(asked), _scaled(64, scale, 4, counts))


TRACES: dict[str, Callable[..., Trace]] = {
    each.__name__: each for each in (doc_qa, doc_qa_sampled, unshared, agents, rag, cold, busy_prefill)
}


def _tokens(random: Random, count: int) -> TokenIds:
    return tuple(random.randrange(FIRST_ID, END_ID) for _ in range(count))


def ids_of(content: Content) -> TokenIds:
    """What a trace says: token ids, never words."""
    return tuple(map(int, content))


def _alone(requests: Sequence[Request]) -> tuple[tuple[Request, ...], ...]:
    return tuple((each,) for each in requests)


def _scaled(count: int, scale: float, least: int = 8, counts: float | None = None) -> int:
    """``counts`` instead of ``scale`` for what is no length, if it is given."""
    factor = scale if counts is None else counts
    return count if factor == 1.0 else max(least, round(count * factor))
