"""Which replica a request goes to. Pure policy: no network and no clock, the same for both clients.

1. A turn of a conversation goes where the turns before it were answered: their KV is resident there.
2. Anything else has a key, of its most expensive chunk (``cairn.client.affinity``), and each key an order of all
   replicas: rendezvous hashing (Thaler and Ravishankar, 1998). Who dies leaves its keys to the next of each order, and
   nobody else's keys move. Clients that know nothing of each other find the same order.
3. It goes to the first in that order that has room: hashing with bounded loads (Mirrokni, Thorup and Zadimoghaddam,
   2018). Nobody is given more than ``BALANCE`` times the average, or ``LIGHT`` requests, whichever is more.
4. A key that more requests share than one replica may have decides nothing, for everybody will have its chunk: the
   next most expensive one does. Without any key the least busy replica is taken.

How busy a replica is: this client's own requests there, and those of others as it said when it was asked last.
"""

from __future__ import annotations

import hashlib
import math
import random
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from cairn.client.affinity import Affinity
from cairn.client.errors import Mismatch

BALANCE = 1.5  # keeps replicas as even as turns do (``bench.replicas``); with less, less is where it is looked for
LIGHT = 8  # requests that keep no replica busy, whatever the others have: they share its steps
HALVING = 256  # requests after which what was counted before counts half
USED_STEPS = 256  # a part of fewer than one in so many requests counts as not used
TURNS_MAX = 32_768  # conversations whose replica is known
MISSES_MAX = 2  # unanswered questions in a row after which what waits there for its first token leaves


class State(Enum):
    """What is known of a replica. ``UNKNOWN`` is used as ``UP`` is."""

    UNKNOWN = "unknown"
    UP = "up"
    AWAY = "away"  # takes nothing: starts, drains or is dead. What it has accepted may go on
    HANGS = "hangs"  # does not answer in time
    DIFFERS = "differs"  # has another model than those in use


USABLE = (State.UNKNOWN, State.UP)


@dataclass(frozen=True)
class Report:
    """What a replica said of itself; ``model``: the identities of its model and of its tokenizer."""

    requests: int
    model: tuple[str, str]
    model_name: str


@dataclass
class _Replica:
    address: str
    state: State = State.UNKNOWN
    why: str = ""
    own: int = 0  # requests of this client that are there now
    others: int = 0  # of anybody else, when it was asked last
    misses: int = 0  # how often in a row it did not answer
    seen: Report | None = None

    @property
    def load(self) -> int:
        return self.own + self.others


class Shares:
    """How large a part of the last requests had a key. Bounded: what was seen once and not again is forgotten."""

    def __init__(self) -> None:
        self._counts: dict[bytes, float] = {}
        self._total = 0.0

    def note(self, keys: Iterable[bytes]) -> None:
        """One more request, with these keys."""
        self._total += 1
        for key in keys:
            self._counts[key] = self._counts.get(key, 0.0) + 1
        if self._total >= 2 * HALVING:
            self._total /= 2
            self._counts = {key: count / 2 for key, count in self._counts.items() if count > 1}

    def of(self, key: bytes) -> float:
        """0..1."""
        return self._counts.get(key, 0.0) / max(1.0, self._total)


class Router:
    """Chooses, for requests of many threads at once. A replica is its place among ``addresses``."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._replicas = [_Replica(address) for address in addresses]
        self._lock = threading.RLock()  # a collected generation leaves in whatever a thread does
        self._shares = Shares()
        self._turns: OrderedDict[bytes, int] = OrderedDict()
        self._model: tuple[str, str] | None = None  # of all that are used

    # -- requests -----------------------------------------------------------------------------------
    def choose(self, affinity: Affinity, tried: Collection[int] = ()) -> int:
        """The replica for a request, none of ``tried``; -1 if there is no other. It is busier by it until ``ended``.

        Raises ``Mismatch`` where replicas have different models and it is not known which is meant.
        """
        with self._lock:
            self._check_models()
            if not tried:
                self._shares.note({*affinity.keys, *affinity.parts})
            left = [n for n, each in enumerate(self._replicas) if n not in tried and each.state is not State.DIFFERS]
            # Of those that nothing good is known of any may be back: better asked than not.
            usable = [n for n in left if self._replicas[n].state in USABLE]
            chosen = self._best(usable or left, affinity) if left else -1
            if chosen >= 0:
                self._replicas[chosen].own += 1
            return chosen

    def used(self, part: bytes) -> int:
        """How much of the last requests had this part, coarsely: doubles with each step."""
        with self._lock:
            return int(self._shares.of(part) * USED_STEPS).bit_length()

    def ended(self, replica: int) -> None:
        """A request that it was chosen for is over, or goes elsewhere."""
        with self._lock:
            self._replicas[replica].own -= 1

    def answered(self, replica: int, names: Iterable[bytes]) -> None:
        """It has answered a turn of the conversations of these names: the next ones are to go there."""
        with self._lock:
            for name in names:
                self._turns[name] = replica
                self._turns.move_to_end(name)
            while len(self._turns) > TURNS_MAX:
                self._turns.popitem(last=False)

    def _best(self, candidates: Sequence[int], affinity: Affinity) -> int:
        if len(candidates) == 1:
            return candidates[0]
        for name in affinity.turns:
            if (there := self._turns.get(name, -1)) in candidates:
                self._turns.move_to_end(name)
                return there
        total = 1 + sum(self._replicas[n].load for n in candidates)
        bound = max(LIGHT, math.ceil(BALANCE * total / len(candidates)))
        keys = affinity.keys
        if keys:
            key = next((key for key in keys if self._shares.of(key) * total < bound), keys[0])
            for n in sorted(candidates, key=lambda n: _score(key, self._replicas[n].address), reverse=True):
                if self._replicas[n].load < bound:
                    return n
        return min(candidates, key=lambda n: (self._replicas[n].load, random.random()))

    # -- what is known of replicas ------------------------------------------------------------------
    def heard(self, replica: int, seen: Report | None) -> None:
        """It answers; with ``seen``, what it says. Others' requests there are all but ours."""
        with self._lock:
            each = self._replicas[replica]
            each.misses = 0
            if seen is not None or each.state is not State.DIFFERS:
                each.state, each.why = State.UP, ""
            if seen is not None:
                each.seen, each.others = seen, max(0, seen.requests - each.own)
                self._compare_models()

    def away(self, replica: int, why: str) -> None:
        """It takes no requests, and says or shows why."""
        self._is(replica, State.AWAY, why)

    def missed(self, replica: int, why: str) -> bool:
        """It did not answer in time; whether it has not for so long that what waits there should leave."""
        self._is(replica, State.HANGS, why)
        with self._lock:
            self._replicas[replica].misses += 1
            return self._replicas[replica].misses >= MISSES_MAX

    def _is(self, replica: int, state: State, why: str) -> None:
        with self._lock:
            each = self._replicas[replica]
            each.state, each.why, each.others = state, why, 0

    def known(self) -> list[tuple[str, str]]:
        """Of each replica its state, and why."""
        with self._lock:
            return [(each.state.value, each.why) for each in self._replicas]

    # -- models -------------------------------------------------------------------------------------
    def _compare_models(self) -> None:
        """One model is in use until nobody has it any more: then it is the one that all others have.

        It is the first one once all were asked, not that of who was the first to answer.
        """
        if any(each.state is State.UNKNOWN for each in self._replicas):
            return
        up = [each for each in self._replicas if each.seen and each.state in (State.UP, State.DIFFERS)]
        models = {each.seen.model for each in up if each.seen}
        if self._model not in models:
            self._model = models.pop() if len(models) == 1 else None
        for each in up:
            differs = self._model is not None and each.seen is not None and each.seen.model != self._model
            each.state, each.why = (State.DIFFERS, self._difference(each)) if differs else (State.UP, "")

    def _difference(self, other: _Replica) -> str:
        ours = next(each for each in self._replicas if each.seen and each.seen.model == self._model)
        assert ours.seen is not None and other.seen is not None
        what = "tokenizer" if ours.seen.model[0] == other.seen.model[0] else "model"
        return f"{_told(other)}, and {_told(ours)}: not the same {what}"

    def _check_models(self) -> None:
        if self._model is not None:
            return
        up = [each for each in self._replicas if each.seen and each.state is State.UP]
        if len({each.seen.model for each in up if each.seen}) > 1:
            words = "; ".join(map(_told, up))
            raise Mismatch(
                f"decode: the services do not have the same model and tokenizer ({words}); name those of one model",
                code="FAILED_PRECONDITION",
                source="client",
            )


def _told(replica: _Replica) -> str:
    assert replica.seen is not None
    model, tokenizer = replica.seen.model
    tokens = f", tokenizer {tokenizer[:12]}" if tokenizer else ""
    return f"{replica.address} serves {replica.seen.model_name} ({model[:12]}{tokens})"


def _score(key: bytes, address: str) -> bytes:
    return hashlib.blake2b(address.encode(), key=key, digest_size=8).digest()
