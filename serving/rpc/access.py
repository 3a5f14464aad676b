"""Who may call: bearer tokens, the tenant that a token stands for, and what it may do.

A token file has one token a line, ``TOKEN [SALT [OPTION ...]]``; empty lines and lines that begin with ``#`` are
skipped. A caller whose token has a salt always gets that one: tenants are kept apart by who they are, not by what they
ask for. A caller whose token has none (``-`` where options follow) is trusted to name a salt. Tokens are kept as
digests only. Options:

    admin           may publish and change shared content, and sees the whole store's numbers
    QUOTA=LIMIT     what the tenant may have, see ``serving.tenancy.quotas``

Without a token file everyone is let in, may name any salt and sees the whole store's numbers; nobody is an admin.
docs/tenants.md says what follows from it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from chunk_store.tenant import Tenant, tenant_of
from serving.errors import InvalidRequest, Unauthenticated
from serving.rpc.channel import TOKEN_KEY
from serving.rpc.token_file import NO_SALT, token_lines
from serving.tenancy.quotas import NO_QUOTAS, Quotas, parse_quotas

Metadata = Iterable[tuple[str, str | bytes]]
ADMIN = "admin"


@dataclass(frozen=True)
class Grant:
    """What one token stands for."""

    salt: str = field(default="", repr=False)
    admin: bool = False
    quotas: Quotas = NO_QUOTAS


@dataclass(frozen=True)
class Caller:
    """Who calls. ``owner`` is whose requests these are: the token's own tenant, whatever salt a call names."""

    salt: str = field(repr=False)
    admin: bool
    sees_all: bool  # the numbers of everybody together
    owner: Tenant

    @property
    def acts_for_all(self) -> bool:
        """Whether it may name any tenant: its token has no salt."""
        return self.owner == tenant_of("")

    @property
    def tenant(self) -> Tenant:
        """Whose content the call is about."""
        return tenant_of(self.salt)


@dataclass(frozen=True)
class Access:
    """The accepted tokens by digest; ``Access()`` lets everyone in."""

    grants: Mapping[str, Grant] | None = field(default=None, repr=False)

    @classmethod
    def from_file(cls, path: Path | None) -> Access:
        """Reads a token file; None lets everyone in. Raises ``ValueError`` for a line that is not one or no token."""
        if path is None:
            return cls()
        grants: dict[str, Grant] = {}
        limits: dict[str, Quotas] = {}
        for number, words in token_lines(path.read_text()):
            name = _digest(words[0])
            if name in grants:
                raise ValueError(f"{path}:{number}: the same token stands in two lines")
            try:
                grants[name] = grant = _grant(words[1:])
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from error
            if grant.quotas != NO_QUOTAS and limits.setdefault(grant.salt, grant.quotas) != grant.quotas:
                raise ValueError(f"{path}:{number}: other quotas for the same tenant in an earlier line")
        if not grants:
            raise ValueError(f"{path}: no token in it; without --token-file everyone is let in")
        return cls(grants)

    @property
    def quotas(self) -> dict[Tenant, Quotas]:
        """What each tenant may have that has quotas of its own."""
        grants = (self.grants or {}).values()
        return {tenant_of(grant.salt): grant.quotas for grant in grants if grant.quotas != NO_QUOTAS}

    def check(self, metadata: Metadata | None) -> str:
        """Who calls: the digest of the token, "" where none is asked for.

        Raises ``Unauthenticated`` unless the caller may call.
        """
        return self._token(metadata)

    def caller(self, metadata: Metadata | None, requested_salt: str = "") -> Caller:
        """Who calls and under which salt: the token's own, else the requested one.

        Raises ``Unauthenticated`` as ``check`` does, ``InvalidRequest`` for a salt that is none.
        """
        if not requested_salt.isprintable():
            raise InvalidRequest("has characters that cannot be printed", field="salt")
        token = self._token(metadata)
        if self.grants is None:
            return Caller(requested_salt, admin=False, sees_all=True, owner=tenant_of(""))
        grant = self.grants[token]
        return Caller(grant.salt or requested_salt, grant.admin, grant.admin, tenant_of(grant.salt))

    def _token(self, metadata: Metadata | None) -> str:
        if self.grants is None:
            return ""
        values = [value for name, value in metadata or () if name == TOKEN_KEY]
        if not values:
            raise Unauthenticated("missing", field=TOKEN_KEY, remedy="send the metadata `authorization: Bearer TOKEN`")
        text = values[-1] if isinstance(values[-1], str) else values[-1].decode(errors="replace")
        scheme, _, token = text.partition(" ")
        name = _digest(token.strip()) if scheme.lower() == "bearer" else ""
        if name not in self.grants:
            raise Unauthenticated("not a bearer token that is known here", field=TOKEN_KEY)
        return name


def _grant(words: Sequence[str]) -> Grant:
    """What stands behind a token. Raises ``ValueError``."""
    salt = "" if not words or words[0] == NO_SALT else words[0]
    if not salt.isprintable():
        raise ValueError("the salt has characters that cannot be printed")
    return Grant(salt, ADMIN in words[1:], parse_quotas(word for word in words[1:] if word != ADMIN))


def _digest(token: str) -> str:
    """Looking digests up takes a time that says nothing about the tokens."""
    return hashlib.sha256(token.encode()).hexdigest()
