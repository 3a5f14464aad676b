"""Who calls: the bearer token of a request, which goes on to the services as it is, and what it may take here.

The services know what a token stands for. Where the gateway has their token file, whoever is not in it goes no further.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from gateway.errors import overloaded, unauthorized
from serving.rpc.token_file import token_lines

TOKEN_CHARACTERS_MAX = 4096
ADMIN = "admin"


@dataclass(frozen=True)
class Caller:
    """``name`` is a digest of the token, "" without one. ``admin`` is known only with a token file."""

    token: str | None = field(default=None, repr=False)
    name: str = ""
    admin: bool = False


class Callers:
    """The tokens that are let in (all without a file), and how many requests each has here."""

    def __init__(self, token_file: Path | None, requests_max: int) -> None:
        """Raises ``OSError``, or ``ValueError`` for a file without a token."""
        self.known: dict[str, bool] | None = None
        if token_file is not None:
            lines = token_lines(token_file.read_text())
            self.known = {_digest(words[0]): ADMIN in words[2:] for _, words in lines}
            if not self.known:
                raise ValueError(f"{token_file}: no token in it; without --token-file the services say who may call")
        self._most = requests_max
        self._most_each = requests_max if self.known is None or len(self.known) < 2 else max(1, requests_max // 2)
        self._running: dict[str, int] = {}
        self.running = 0

    def caller(self, authorization: str | None) -> Caller:
        """Who bears this header. Raises ``HttpError`` for one that is none, and for a token that is not known."""
        if authorization is None:
            if self.known is not None:
                raise unauthorized("no bearer token (API key) was sent: authorization: Bearer TOKEN")
            return Caller()
        scheme, _, token = authorization.partition(" ")
        token = token.strip()
        fits = 0 < len(token) <= TOKEN_CHARACTERS_MAX and token.isascii() and token.isprintable()
        if scheme.lower() != "bearer" or not fits or " " in token:
            raise unauthorized("the authorization is not a bearer token (API key)")
        name = _digest(token)
        if self.known is not None and name not in self.known:
            raise unauthorized("the bearer token (API key) is not known here")
        return Caller(token, name, admin=bool(self.known and self.known[name]))

    def enter(self, caller: Caller) -> None:
        """Counts a request in. Raises ``HttpError`` where there is no room for it."""
        if self.running >= self._most:
            raise overloaded(f"{self._most} requests are being answered, and no more may be; try again later")
        if self._running.get(caller.name, 0) >= self._most_each:
            raise overloaded(f"{self._most_each} requests with this token are being answered; try again later")
        self.running += 1
        self._running[caller.name] = self._running.get(caller.name, 0) + 1

    def leave(self, caller: Caller) -> None:
        self.running -= 1
        self._running[caller.name] -= 1
        if not self._running[caller.name]:
            del self._running[caller.name]


def _digest(token: str) -> str:
    """Looking digests up takes a time that says nothing about the tokens."""
    return hashlib.sha256(token.encode()).hexdigest()
