"""What is lent, and what may keep a borrower from using it. Whatever that is, the store has the same bytes."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


@dataclass(frozen=True)
class Lent:
    """A chunk's KV in the pool of the lender named ``pool``; ``lease`` 0: it is not lent to this borrower."""

    pool: str
    lease: int
    first_slot: int
    tokens: int


@dataclass(frozen=True)
class Offer:
    """Where a lender can be reached on its host, and the ticket that it lets a borrower in with, once, soon."""

    pool: str
    socket: str
    ticket: str


class Refusal(StrEnum):
    """Why a chunk was not taken from its lender."""

    NO_SESSION = "no_session"  # none with that lender, or none yet
    NOT_LENT = "not_lent"  # by the lender: it knows no session, or has lent as much as it does
    LEASE_LOST = "lease_lost"  # it ran out, or was called back, before the copy was over
    PEER_GONE = "peer_gone"
    NO_ANSWER = "no_answer"  # in time
    NOT_COPIED = "not_copied"  # what was lent is not where it was said to be, or CUDA failed


class NoSession(StrEnum):
    """Why a borrower could not open a session."""

    OFF = "off"  # the service hands nothing over
    NOT_ALLOWED = "not_allowed"  # its token may not act for every tenant, or is none of the service's
    UNREACHABLE = "unreachable"  # no such socket here: another host, another container
    OTHER_USER = "other_user"
    TURNED_AWAY = "turned_away"  # at the socket: user, ticket, or too many
    NO_ANSWER = "no_answer"  # in time
    NOT_READABLE = "not_readable"  # another layout, another kind of memory, a card that is not seen
