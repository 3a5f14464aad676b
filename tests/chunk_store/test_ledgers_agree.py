"""The two ledgers are two implementations of the same rules: the same calls in the same order, the same answers."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from contract import MODEL, Sample, blank, sample, views_of
from places import FilePlace, RedisPlace
from servers import Server, redis_url

from chunk_store.key import ModelIdentity
from chunk_store.shared_store import SharedStore
from chunk_store.store import Busy, Lease, RecordOrder, RecordQuery, Stored, StoreFull

STEPS = 250
OTHER_MODEL = ModelIdentity("model-2")


def entries() -> list[Sample]:
    """Some under others, some of another model, some salted: everything that the rules tell apart."""
    plain = [sample(number, tokens=1 + number % 4) for number in range(8)]
    under = [sample(number, context=[plain[number - 1].key]) for number in range(1, 5)]
    deep = [sample(5, context=[plain[0].key, under[0].key])]
    other = [sample(number, model=OTHER_MODEL) for number in range(2)]
    return [*plain, *under, *deep, *other, sample(3, salt="tenant")]


class Player:
    """Plays one random step at a time on one store and says what came of it, without times."""

    def __init__(self, store: SharedStore) -> None:
        self.store = store
        self.leases: list[Lease] = []

    def publish(self, entry: Sample) -> str:
        outcome = self.store.begin(entry.key)
        if isinstance(outcome, Stored | Busy):
            return type(outcome).__name__
        with outcome:
            try:
                outcome.write(entry.header, entry.views)
            except StoreFull:
                return "full"
            return str(outcome.commit().nbytes)

    def load(self, entry: Sample) -> str:
        return str(self.store.load(entry.key, entry.header.token_ids, views_of(blank(entry))))

    def register(self, entry: Sample, changes: dict[str, Any]) -> str:
        try:
            return str(self.store.put_records([entry.record(**changes)]))
        except StoreFull:
            return "full"

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
        pages = [
            [record.chunk_id for record in self.store.list_records(RecordQuery(order=order)).records]
            for order in RecordOrder
        ]
        records = sorted(
            (record.chunk_id, record.name, sorted(record.tags), record.pinned)
            for record in self.store.list_records(RecordQuery()).records
        )
        return (
            [info.key for info in self.store.list_entries()],
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
    flag, salt = chooser.random() < 0.5, chooser.choice(["", "digest of tenant"])
    steps: list[tuple[int, Callable[[Player], str]]] = [
        (30, lambda player: player.publish(entry)),
        (15, lambda player: player.load(entry)),
        (12, lambda player: player.register(entry, changes)),
        (6, lambda player: player.lease(some)),
        (7, lambda player: player.release()),
        (4, lambda player: str(player.store.set_pinned([one.chunk_id for one in some], flag))),
        (4, lambda player: str(player.store.delete_chunks([entry.chunk_id, entry.chunk_id]))),
        (1, lambda player: str(player.store.delete_model(OTHER_MODEL))),
        (4, lambda player: str(player.store.sweep())),
        (9, lambda player: str(player.store.miss_reason(entry.key, entry.chunk_id, MODEL, salt))),
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
