"""Places in a bounded line, shared between tenants, and whose turn it is. Knows no requests.

``Places`` refuses the tenant that floods, not the others; ``TenantPlaces`` adds the tenants' own quotas to a line whose
requests first wait and then run; ``Rotation`` says who is next.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence

from chunk_store.tenant import Tenant
from serving.tenancy.quotas import TenantQuotas
from serving.tenancy.waits import Waits

REMEMBERED_MAX = 4096  # tenants of which is known when they were served last


class PlacesFull(Exception):
    """There is no place for this tenant now. The message says which bound is reached, and what to do."""


def quota_full(quota: str, limit: int) -> PlacesFull:
    remedy = "wait for an answer or have the quota raised"
    return PlacesFull(f"quota {quota}: the tenant may have {limit}, and this would be more; {remedy}")


class Places:
    """``most`` places. Once they are taken, tenants that have less than an equal share still get in, up to twice as
    many places in all: a tenant without any is never refused for what another one does. Not thread-safe."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.taken = 0
        self._of: Counter[Tenant] = Counter()

    @property
    def tenants(self) -> int:
        """How many of them have a place."""
        return len(self._of)

    def of(self, tenant: Tenant) -> int:
        return self._of.get(tenant, 0)

    def take(self, tenant: Tenant) -> None:
        """Raises ``PlacesFull``."""
        if self.taken >= self.most:
            share = max(1, self.most // len({*self._of, tenant}))
            if self.of(tenant) >= share or self.taken >= 2 * self.most:
                raise PlacesFull(f"{self.taken} requests are waiting already, at most {self.most}; try again later")
        self.put(tenant)

    def put(self, tenant: Tenant) -> None:
        """Takes a place whether there is one or not."""
        self._of[tenant] += 1
        self.taken += 1

    def leave(self, tenant: Tenant) -> None:
        self._of[tenant] -= 1
        self.taken -= 1
        if not self._of[tenant]:
            del self._of[tenant]


class TenantPlaces:
    """Requests that wait, and those that run, by tenant. Thread-safe.

    Who would wait for longer than ``waiting_max_s`` (None: than is usual), by what ``waits`` has seen, is refused
    if another of its tenant waits: tenants take turns, so that none is refused for what another one does.
    """

    def __init__(
        self, waiting_max: int, quotas: TenantQuotas, waiting_max_s: float | None = None, waits: Waits | None = None
    ) -> None:
        self._quotas = quotas
        self._waiting_max_s = waiting_max_s
        self._waits = waits or Waits(1)
        self._waiting = Places(waiting_max)
        self._running: Counter[Tenant] = Counter()
        self._lock = threading.Lock()

    @property
    def waiting(self) -> int:
        return self._waiting.taken

    def of(self, tenant: Tenant) -> tuple[int, int]:
        """How many requests of a tenant run, and how many wait."""
        with self._lock:
            return self._running.get(tenant, 0), self._waiting.of(tenant)

    def most(self, tenant: Tenant) -> int:
        """How many requests a tenant can have at once, however little the others have."""
        quotas = self._quotas.of(tenant)
        if quotas.running is not None:
            return min(self._waiting.most, quotas.running + (quotas.waiting or 0))
        return min(self._waiting.most, quotas.waiting if quotas.waiting is not None else self._waiting.most)

    def take(self, tenant: Tenant, count: int = 1) -> None:
        """So many places to wait in, or none. Raises ``PlacesFull``."""
        with self._lock:
            for taken in range(count):
                try:
                    self._take_one(tenant)
                except PlacesFull:
                    for _ in range(taken):
                        self._waiting.leave(tenant)
                    raise

    def _take_one(self, tenant: Tenant) -> None:
        quotas = self._quotas.of(tenant)
        waiting, running = self._waiting.of(tenant), self._running.get(tenant, 0)
        if quotas.running is not None and waiting + running >= quotas.running + (quotas.waiting or 0):
            raise (
                quota_full("running", quotas.running) if not quotas.waiting else quota_full("waiting", quotas.waiting)
            )
        if quotas.running is None and quotas.waiting is not None and waiting >= quotas.waiting:
            raise quota_full("waiting", quotas.waiting)
        place = waiting * self._waiting.tenants
        if self._waits.too_many(place, self._waiting_max_s):
            bound = "soon enough" if self._waiting_max_s is None else f"within {self._waiting_max_s:g} s"
            raise PlacesFull(f"{waiting} requests wait already, and the turn of one more would not come {bound}")
        self._waiting.take(tenant)

    def may_run(self, tenant: Tenant) -> bool:
        """Whether one more of a tenant's requests may run."""
        limit = self._quotas.of(tenant).running
        return limit is None or self._running.get(tenant, 0) < limit

    def admit(self, tenant: Tenant) -> None:
        """One that waited runs."""
        with self._lock:
            self._waiting.leave(tenant)
            self._running[tenant] += 1
            self._waits.began()

    def put_back(self, tenant: Tenant) -> None:
        """One that ran waits again."""
        with self._lock:
            self._end(tenant)
            self._waits.put_back()
            self._waiting.put(tenant)

    def leave(self, tenant: Tenant) -> None:
        """One that waited has ended."""
        with self._lock:
            self._waiting.leave(tenant)

    def end(self, tenant: Tenant) -> None:
        """One that ran has ended."""
        with self._lock:
            self._end(tenant)
            self._waits.ended()

    def _end(self, tenant: Tenant) -> None:
        self._running[tenant] -= 1
        if not self._running[tenant]:
            del self._running[tenant]


class Rotation:
    """One of each tenant in turn: of those that wait, the one served longest ago goes first. Not thread-safe."""

    def __init__(self) -> None:
        self._served: dict[Tenant, int] = {}
        self._turn = 0

    def served(self, tenant: Tenant) -> None:
        self._turn += 1
        self._served.pop(tenant, None)
        self._served[tenant] = self._turn
        if len(self._served) > REMEMBERED_MAX:
            del self._served[next(iter(self._served))]

    def order(self, waiting: Sequence[Tenant]) -> list[int]:
        """The places of ``waiting``, which is in the order of arrival, in the order of turns."""
        ranks: Counter[Tenant] = Counter()
        turns = []
        for place, tenant in enumerate(waiting):
            turns.append((ranks[tenant], self._served.get(tenant, 0), place))
            ranks[tenant] += 1
        return list(range(len(waiting))) if len(ranks) < 2 else [place for _, _, place in sorted(turns)]
