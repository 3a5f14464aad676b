"""Whose content it is: the tenant that stands in every record and every entry.

A tenant is known by a digest of its salt; content without a salt belongs to the default tenant. What is published for
everybody belongs to ``SHARED_TENANT``, whose KV has a salt of its own that no caller can name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NewType

from chunk_store.key import digest

Tenant = NewType("Tenant", str)

DEFAULT_TENANT = Tenant("")
SHARED_TENANT = Tenant("shared")
SHARED_SALT = "\0shared"  # a caller's salt has no control characters

Tenants = Sequence[Tenant] | None
"""Whose content a call is about, the first first; None is everybody's, for the operator of the store."""

DEFAULT_ONLY = (DEFAULT_TENANT,)


def tenant_of(salt: str) -> Tenant:
    """The tenant of what is registered under ``salt``: a digest, enough to compare, not enough to forge a key."""
    if salt == SHARED_SALT:
        return SHARED_TENANT
    return Tenant(digest("cairn.salt.v1", [salt.encode()])) if salt else DEFAULT_TENANT


def visible_to(tenant: Tenant) -> tuple[Tenant, ...]:
    """Whose content ``tenant`` may use: its own, then what is shared."""
    return (tenant,) if tenant == SHARED_TENANT else (tenant, SHARED_TENANT)


@dataclass(frozen=True)
class TenantLimits:
    """What one tenant may keep in a store; None is no limit. ``nbytes`` counts entries with their headers."""

    records: int | None = None
    pinned: int | None = None
    nbytes: int | None = None


NO_LIMITS = TenantLimits()


@dataclass(frozen=True)
class TenantUsage:
    """What one tenant keeps in a store now. ``nbytes`` is entries with headers, ``leased`` and ``pinned_entries`` count
    entries, ``pinned`` counts records."""

    records: int = 0
    pinned: int = 0
    entries: int = 0
    nbytes: int = 0
    pinned_entries: int = 0
    leased_entries: int = 0
