"""The two ledgers are two implementations of the same rules: the same calls in the same order, the same answers."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from chunk_store.errors import StoreFull
from chunk_store.key import ChunkId, ModelIdentity
from chunk_store.record import ChunkRecord, RecordOrder, RecordQuery
from chunk_store.shared_store import SharedStore
from chunk_store.store import Busy, Lease, Stored
from chunk_store.tenant import DEFAULT_TENANT, NO_LIMITS, Tenant, TenantLimits, tenant_of
from tests.chunk_store.contract import MODEL, Sample, blank, sample, views_of
from tests.chunk_store.places import FilePlace, RedisPlace
from tests.chunk_store.servers import Server, redis_url

STEPS = 250
TENANTS = (DEFAULT_TENANT, tenant_of("tenant"), tenant_of("b"))
OTHER_MODEL = ModelIdentity("model-2")
EVERYBODYS = RecordQuery(tenants=None)


def entries() -> list[Sample]:
    """Some under others, some of another model, some salted: everything that the rules tell apart."""
    plain = [sample(number, tokens=1 + number % 4) for number in range(8)]
    under = [sample(number, context=[plain[number - 1].key]) for number in range(1, 5)]
    deep = [sample(5, context=[plain[0].key, under[0].key])]
    other = [sample(number, model=OTHER_MODEL) for number in range(2)]
    first = sample(3, salt="tenant")
    return [*plain, *under, *deep, *other, first, sample(4, context=[first.key], salt="tenant"), sample(3, salt="b")]


class Player:
    """Plays one random step at a time on one store and says what came of it, without times."""

    def __init__(self, store: SharedStore) -> None:
        self.store = store
        self.leases: list[Lease] = []

    def publish(self, entry: Sample, limits: TenantLimits) -> str:
        outcome = self.store.begin(entry.key)
        if isinstance(outcome, Stored | Busy):
            return type(outcome).__name__
        with outcome:
            try:
                outcome.write(entry.header, entry.views, limits=limits)
            except StoreFull as error:
                return str(error)
            return str(outcome.commit().nbytes)

    def load(self, entry: Sample) -> str:
        return str(self.store.load(entry.key, entry.header.token_ids, views_of(blank(entry))))

    def register(self, entry: Sample, changes: dict[str, Any], limits: TenantLimits) -> str:
        try:
            return str(self.store.put_records([entry.record(**changes)], limits=limits))
        except StoreFull as error:
            return type(error).__name__

    def put(self, new: list[ChunkRecord]) -> str:
        try:
            self.store.put_records(new)
        except StoreFull as error:
            return type(error).__name__
        return "there is room"

    def pin(self, chunk_ids: list[ChunkId], pinned: bool, tenant: Tenant, limits: TenantLimits) -> str:
        try:
            return str(self.store.set_pinned(chunk_ids, pinned, tenant, limits=limits))
        except StoreFull as error:
            return str(error)

    def lease(self, chosen: list[Sample]) -> str:
        self.leases.append(self.store.lease([entry.key for entry in chosen], ttl_s=60))
        return "leased"

    def release(self) -> str:
        if self.leases:
            self.leases.pop(0).release()
        return "released"

    def view(self) -> tuple[object, ...]:
        """All that can be seen of a store, but for times."""
        stats = self.store.stats()
        queries = [RecordQuery(order=order, tenants=owners) for order in RecordOrder for owners in (TENANTS, None)]
        pages = [
            [(record.chunk_id, record.tenant) for record in self.store.list_records(query).records] for query in queries
        ]
        records = sorted(
            (record.tenant, record.chunk_id, record.name, sorted(record.tags), record.pinned)
            for record in self.store.list_records(RecordQuery(tenants=TENANTS)).records
        )
        return (
            [info.key for info in self.store.list_entries(tenants=None)],
            [[info.key for info in self.store.list_entries(tenants=[tenant])] for tenant in TENANTS],
            [self.store.usage(tenant) for tenant in TENANTS],
            self.store.ledger.upkeep.audit(),
            pages,
            records,
            (stats.records, stats.entries, stats.nbytes, stats.pinned_entries, stats.leased_entries, stats.evictions),
        )


def choose_step(chooser: random.Random, everything: list[Sample]) -> Callable[[Player], str]:
    entry, some = chooser.choice(everything), chooser.sample(everything, 3)
    changes = {
        "name": chooser.choice(["", "a", "b"]),
        "tags": tuple(chooser.sample(["x", "y", "z"], chooser.randrange(3))),
        "pinned": chooser.random() < 0.2,
        "expires_at": chooser.choice([None, None, 1.0]),
    }
    flag, tenant = chooser.random() < 0.5, chooser.choice(TENANTS)
    limits = chooser.choice([NO_LIMITS, NO_LIMITS, TenantLimits(records=2, pinned=1, nbytes=9000)])
    steps: list[tuple[int, Callable[[Player], str]]] = [
        (30, lambda player: player.publish(entry, limits)),
        (15, lambda player: player.load(entry)),
        (12, lambda player: player.register(entry, changes, limits)),
        (6, lambda player: player.lease(some)),
        (7, lambda player: player.release()),
        (4, lambda player: player.pin([one.chunk_id for one in some], flag, tenant, limits)),
        (4, lambda player: str(player.store.delete_chunks([entry.chunk_id, entry.chunk_id], [tenant]))),
        (1, lambda player: str(player.store.delete_model(OTHER_MODEL))),
        (4, lambda player: str(player.store.sweep())),
        (9, lambda player: str(player.store.miss_reason(entry.key, entry.chunk_id, MODEL, tenant))),
        (4, lambda player: str([info is not None for info in player.store.lookup([one.key for one in some])])),
    ]
    return chooser.choices([step for _, step in steps], [weight for weight, _ in steps])[0]


@pytest.mark.parametrize("seed", range(4))
def test_the_same_calls_have_the_same_answers(shared_redis: Server, tmp_path: Path, seed: int) -> None:
    chooser = random.Random(seed)
    everything = entries()
    with (
        closing(FilePlace(tmp_path / "store")) as file,
        closing(RedisPlace(redis_url(shared_redis, f"agree{seed}"))) as redis,
    ):
        players = [Player(place.open(capacity_nbytes=6 * 9000, records_max=6)) for place in (file, redis)]
        for number in range(STEPS):
            step = choose_step(chooser, everything)
            answers = [step(player) for player in players]
            assert answers[0] == answers[1], f"step {number}"
            views = [player.view() for player in players]
            assert views[0] == views[1], f"after step {number}, which answered {answers[0]}"
        assert players[0].store.stats().evictions > 2, "too little happened for this to prove anything"


def take(held: dict[tuple[Tenant, ChunkId], bool], new: list[ChunkRecord], most: int) -> bool:
    """The rule of ``ChunkStore.put_records`` on a registry of ``most``, told again; whether there was room.

    ``held`` is who has what and whether it is transient, the least recently used first.
    """
    places = [(record.tenant, record.chunk_id) for record in new]
    added = Counter(tenant for tenant, name in set(places) - held.keys())
    over = len(held) + added.total() - most if added else 0
    dropped = [place for place, transient in held.items() if transient and place not in places][: max(0, over)]
    stays = Counter(tenant for tenant, name in held.keys() - set(dropped))
    share = max(1, most // len({*stays, *added})) if added else 0
    fair = len(held) - len(dropped) + added.total() <= 2 * most
    fair = fair and all(stays[tenant] + count <= share for tenant, count in added.items())
    if over > len(dropped) and not fair:
        return False
    for place in dropped:
        del held[place]
    for place, record in zip(places, new, strict=True):
        held[place] = record.transient and held.pop(place, True)
    return True


@pytest.mark.parametrize("seed", range(3))
def test_shares_of_the_registry_against_the_rule(shared_redis: Server, tmp_path: Path, seed: int) -> None:
    chooser = random.Random(seed)
    most, owners, held, seen = 6, [*TENANTS, tenant_of("d")], dict[tuple[Tenant, ChunkId], bool](), set[str]()
    with (
        closing(FilePlace(tmp_path / "store")) as file,
        closing(RedisPlace(redis_url(shared_redis, f"shares{seed}"))) as redis,
    ):
        players = [Player(place.open(records_max=most)) for place in (file, redis)]
        for number in range(150):
            if chooser.random() < 0.12:
                owner, gone = chooser.choice(owners), [sample(one).chunk_id for one in chooser.sample(range(9), 5)]
                for player in players:
                    player.store.delete_chunks(gone, [owner])
                held = {place: kind for place, kind in held.items() if place[0] != owner or place[1] not in gone}
            else:
                transient = chooser.random() < 0.5
                batch = [
                    sample(one).record(tenant=chooser.choice(owners[: 1 + number // 20]), transient=transient)
                    for one in chooser.sample(range(9), 1 if transient else chooser.randrange(1, 4))
                ]
                over = len(held) > most
                wanted = "there is room" if take(held, batch, most) else "StoreFull"
                answers = [player.put(batch) for player in players]
                assert answers == [wanted] * 2, f"step {number}"
                seen.add(f"{wanted}, over: {over}")
            for player in players:
                there = {(one.tenant, one.chunk_id) for one in player.store.list_records(EVERYBODYS).records}
                assert there == held.keys(), f"after step {number}"
        assert len(seen) == 4, f"too little happened for this to prove anything: {seen}"
