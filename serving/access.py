"""Who may call: bearer tokens, and the salt that belongs to a token.

A token file has one token a line, ``TOKEN [SALT]``; empty lines and lines that begin with ``#`` are skipped. A
caller whose token has a salt always gets that one: tenants are kept apart by who they are, not by what they
ask for. A caller whose token has none is trusted to name a salt. Tokens are kept as digests only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from grpc import StatusCode

from serving.errors import RequestError

Metadata = Iterable[tuple[str, str | bytes]]


@dataclass(frozen=True)
class Access:
    """The accepted tokens (by digest) with their salts; ``Access()`` lets everyone in."""

    salts: Mapping[str, str] | None = field(default=None, repr=False)

    @classmethod
    def from_file(cls, path: Path) -> Access:
        """Reads a token file. Raises ``ValueError`` for a line that is not one, or if there is no token."""
        salts: dict[str, str] = {}
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            words = line.split()
            if not words or words[0].startswith("#"):
                continue
            if len(words) > 2:
                raise ValueError(f"{path}:{number}: a line is TOKEN [SALT], found {len(words)} words")
            name = _digest(words[0])
            if name in salts:
                raise ValueError(f"{path}:{number}: the same token stands in two lines")
            salts[name] = words[1] if len(words) == 2 else ""
        if not salts:
            raise ValueError(f"{path}: no token in it; without --token-file everyone is let in")
        return cls(salts)

    def check(self, metadata: Metadata | None) -> str:
        """Who calls: the digest of the token, "" where none is asked for.

        Raises ``RequestError`` (UNAUTHENTICATED) unless the caller may call.
        """
        return self._caller(metadata)

    def salt_for(self, metadata: Metadata | None, requested: str) -> str:
        """The salt that a call uses: the token's own, else the ``requested`` one.

        Raises ``RequestError`` (UNAUTHENTICATED) as ``check`` does.
        """
        caller = self._caller(metadata)
        return (self.salts[caller] if self.salts else "") or requested

    def _caller(self, metadata: Metadata | None) -> str:
        if self.salts is None:
            return ""
        values = [value for name, value in metadata or () if name == "authorization"]
        if not values:
            raise RequestError(
                StatusCode.UNAUTHENTICATED, "authorization: missing; send the metadata `authorization: Bearer TOKEN`"
            )
        text = values[-1] if isinstance(values[-1], str) else values[-1].decode(errors="replace")
        scheme, _, token = text.partition(" ")
        name = _digest(token.strip()) if scheme.lower() == "bearer" else ""
        if name not in self.salts:
            raise RequestError(StatusCode.UNAUTHENTICATED, "authorization: not a bearer token that is known here")
        return name


def _digest(token: str) -> str:
    """Looking digests up takes a time that says nothing about the tokens."""
    return hashlib.sha256(token.encode()).hexdigest()
