"""What one tenant may have: content, KV and pins in the store, requests and jobs in a service.

chunks=N   registered chunks          waiting=N   requests that wait (decode)
bytes=N    stored KV, for example 10GiB   running=N   requests that are answered at once (decode)
pins=N     pinned chunks              jobs=N      requests that wait or are computed (prefill)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields

from chunk_store.quantities import parse_nbytes
from chunk_store.tenant import SHARED_TENANT, Tenant, TenantLimits


@dataclass(frozen=True)
class Quotas:
    """Limits of one tenant; None is no limit of its own."""

    chunks: int | None = None
    bytes: int | None = None
    pins: int | None = None
    waiting: int | None = None
    running: int | None = None
    jobs: int | None = None

    @property
    def limits(self) -> TenantLimits:
        """What of it the store keeps."""
        return TenantLimits(records=self.chunks, pinned=self.pins, nbytes=self.bytes)

    def __str__(self) -> str:
        """The words that ``parse_quotas`` reads."""
        mine = {name: getattr(self, name) for name in NAMES}
        return " ".join(f"{name}={limit}" for name, limit in mine.items() if limit is not None)

    def over(self, other: Quotas) -> Quotas:
        """These limits, and where there is none those of ``other``."""
        mine = {part.name: getattr(self, part.name) for part in fields(self)}
        return Quotas(**{name: getattr(other, name) if limit is None else limit for name, limit in mine.items()})


NO_QUOTAS = Quotas()
NAMES = tuple(part.name for part in fields(Quotas))


def _quota(word: str) -> tuple[str, int]:
    """A quota's name and limit out of ``NAME=LIMIT``. Raises ``ValueError``."""
    name, separator, text = word.partition("=")
    if not separator or name not in NAMES:
        raise ValueError(f"{word!r} is not one of admin, {', '.join(f'{name}=N' for name in NAMES)}")
    try:
        limit = parse_nbytes(text) if name == "bytes" else int(text)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if limit < 0:
        raise ValueError(f"{name}: {limit} is negative")
    if limit == 0 and name in ("waiting", "running", "jobs"):
        raise ValueError(f"{name}: at least 1, or the tenant could ask for nothing")
    return name, limit


def parse_quotas(words: Iterable[str]) -> Quotas:
    """The quotas of words of the form ``NAME=LIMIT``. Raises ``ValueError``."""
    limits: dict[str, int] = {}
    for name, limit in map(_quota, words):
        if name in limits:
            raise ValueError(f"{name} stands there twice")
        limits[name] = limit
    return Quotas(**limits)


class TenantQuotas:
    """Quotas by tenant: each one's own, and for the rest ``default``. Shared content has none."""

    def __init__(self, own: Mapping[Tenant, Quotas] | None = None, default: Quotas = NO_QUOTAS) -> None:
        self._own = {tenant: quotas.over(default) for tenant, quotas in (own or {}).items()}
        self._default = default

    def of(self, tenant: Tenant) -> Quotas:
        return NO_QUOTAS if tenant == SHARED_TENANT else self._own.get(tenant, self._default)
