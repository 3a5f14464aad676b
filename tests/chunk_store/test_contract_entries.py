"""Entries: two-phase publication, claims, misses, capacity, leases, deletion."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import pytest

from chunk_store.entry import MissReason
from chunk_store.errors import ClaimLost, StoreError, StoreFull, StoreUnavailable
from chunk_store.format.header import header_nbytes
from chunk_store.key import ChunkKey, ModelIdentity
from chunk_store.layout import KVLayout, LayerLayout
from chunk_store.shared_store import SharedStore
from chunk_store.store import Busy, Publication, Stored
from chunk_store.tenant import DEFAULT_TENANT
from tests.chunk_store.contract import LAYOUT, MODEL, Place, blank, loads, publish, sample, views_of

STORED_NBYTES = header_nbytes(sample(1).header) + sample(1).header.nbytes


def claim(outcome: Publication | Stored | Busy) -> Publication:
    assert not isinstance(outcome, Stored | Busy), outcome
    return outcome


def expire(store: SharedStore, publication: Publication) -> None:
    """Lets its claim's time be over."""
    held = publication.claim
    assert held is not None
    assert store.ledger.claims.renew([(held.key, held.nonce)], 0.0) == [True]


def test_what_is_published_is_loaded_elsewhere(place: Place) -> None:
    writer, reader = place.open(), place.open()
    entry = sample(1)
    info = publish(writer, entry)
    assert (info.key, info.chunk_id, info.model) == (entry.key, entry.chunk_id, MODEL)
    assert (info.tokens, info.nbytes) == (5, LAYOUT.nbytes(5))
    assert abs(info.created_at - time.time()) < 60
    assert reader.lookup([entry.key, sample(2).key, entry.key]) == [info, None, info]
    assert loads(reader, entry)


@pytest.mark.parametrize("tokens", [1, 15, 16, 17])
def test_odd_sizes(place: Place, tokens: int) -> None:
    store = place.open()
    entry = sample(1, tokens=tokens)
    publish(store, entry)
    assert loads(store, entry)


def test_parts_larger_than_a_block(place: Place) -> None:
    store = place.open()
    layout = KVLayout("float32", (LayerLayout(8, 128, 64), LayerLayout(8, 128, 64)))
    entry = sample(1, tokens=700, layout=layout)
    publish(store, entry)
    assert loads(store, entry)
    assert loads(place.open(), entry)


def test_no_tokens_and_no_layers(place: Place) -> None:
    store = place.open()
    for entry in (sample(1, tokens=0), sample(2, layout=KVLayout("float32", (LayerLayout(0, 0, 0),)))):
        publish(store, entry)
        assert loads(store, entry)


def test_many_tokens_and_a_long_context(place: Place) -> None:
    store = place.open()
    context = [sample(number).key for number in range(300)]
    entry = sample(1, tokens=3000, context=context)
    publish(store, entry)
    assert loads(store, entry)


def test_nothing_is_readable_before_commit(place: Place) -> None:
    writer, reader = place.open(), place.open()
    entry = sample(1)
    with claim(writer.begin(entry.key)) as publication:
        for _ in range(2):
            assert reader.lookup([entry.key]) == [None]
            assert reader.list_entries() == []
            buffers = blank(entry)
            assert reader.load(entry.key, entry.header.token_ids, views_of(buffers)) is MissReason.NOT_STORED
            if publication:
                publication.write(entry.header, entry.views)
                publication = None
    assert reader.lookup([entry.key]) == [None], "leaving without commit aborts"


def test_one_live_claim_for_each_key(place: Place) -> None:
    first, second = place.open(), place.open()
    entry = sample(1)
    with claim(first.begin(entry.key)) as publication:
        busy = second.begin(entry.key)
        assert isinstance(busy, Busy) and 0 < busy.retry_after_s <= 1
        assert isinstance(first.begin(entry.key), Busy), "not even for the same store object"
        with claim(second.begin(sample(2).key)):
            pass
        publication.write(entry.header, entry.views)
        info = publication.commit()
    assert second.begin(entry.key) == Stored(info)


def test_threads_that_race_for_a_key_compute_it_once(place: Place) -> None:
    store = place.open()
    entry = sample(1)
    computed: list[int] = []

    def work(number: int) -> None:
        while True:
            outcome = store.begin(entry.key)
            if isinstance(outcome, Stored):
                return
            if isinstance(outcome, Busy):
                time.sleep(outcome.retry_after_s)
                continue
            with outcome:
                computed.append(number)
                outcome.write(entry.header, entry.views)
                outcome.commit()
            return

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(computed) == 1
    assert loads(store, entry)


def test_abort_frees_the_claim_and_the_space(place: Place) -> None:
    store = place.open()
    entry = sample(1)
    publication = claim(store.begin(entry.key))
    publication.write(entry.header, entry.views)
    publication.abort()
    publication.abort()
    assert store.stats().nbytes == 0
    with pytest.raises(ClaimLost):
        publication.commit()
    publish(store, entry)
    assert loads(store, entry)


def test_abort_after_commit_is_harmless(place: Place) -> None:
    store = place.open()
    entry = sample(1)
    with claim(store.begin(entry.key)) as publication:
        publication.write(entry.header, entry.views)
        publication.commit()
        publication.abort()
    assert loads(store, entry)


def test_an_expired_claim_can_be_taken(place: Place) -> None:
    slow, quick = place.open(), place.open()
    entry = sample(1)
    late = claim(slow.begin(entry.key, ttl_s=0.1))
    time.sleep(0.15)
    publish(quick, entry)
    for step in (late.renew, late.commit):
        with pytest.raises((ClaimLost, StoreError)):
            step()
    with pytest.raises(ClaimLost):
        late.write(entry.header, entry.views)
    late.abort()
    assert loads(slow, entry), "the loser's abort leaves the winner's entry alone"


def test_a_claim_taken_between_write_and_commit(place: Place) -> None:
    slow, quick = place.open(), place.open()
    entry = sample(1)
    late = claim(slow.begin(entry.key, ttl_s=30))
    late.write(entry.header, entry.views)
    expire(slow, late)
    publish(quick, entry)
    with pytest.raises(ClaimLost):
        late.commit()
    late.abort()
    assert loads(quick, entry)


def test_renewing_keeps_a_claim(place: Place) -> None:
    first, second = place.open(), place.open()
    entry = sample(1)
    with claim(first.begin(entry.key, ttl_s=30)) as publication:
        expire(first, publication)
        publication.renew()
        assert isinstance(second.begin(entry.key), Busy)


def test_many_claims_are_renewed_in_one_step_which_names_those_that_are_lost(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = place.open(), place.open()
    entries = [sample(number) for number in range(300)]
    held = [claim(first.begin(entry.key)) for entry in entries]
    for publication in held[:-1]:
        expire(first, publication)
    taken = claim(second.begin(entries[7].key))
    held[3].abort()
    steps: list[int] = []
    renew = first.ledger.claims.renew

    def counted(held: Sequence[tuple[ChunkKey, str]], ttl_s: float) -> list[bool]:
        steps.append(len(held))
        return renew(held, ttl_s)

    monkeypatch.setattr(first.ledger.claims, "renew", counted)
    assert first.renew(held) == [held[7]] and steps == [299]
    assert first.renew([held[3]]) == [] == first.renew([]) and len(steps) == 1, "nothing is asked for nobody"
    answers = [second.begin(entry.key) for entry in entries]
    assert [number for number, answer in enumerate(answers) if not isinstance(answer, Busy)] == [3]
    assert second.renew([taken]) == []


@pytest.mark.parametrize("end", ["commit", "abort"])
def test_a_publication_that_ends_before_its_renewal_is_not_lost(
    place: Place, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    store = place.open()
    entry = sample(1)
    publication, beside = claim(store.begin(entry.key)), claim(store.begin(sample(2).key))
    publication.write(entry.header, entry.views)
    renew = store.ledger.claims.renew

    def late(held: Sequence[tuple[ChunkKey, str]], ttl_s: float) -> list[bool]:
        getattr(publication, end)()
        return renew(held, ttl_s)

    monkeypatch.setattr(store.ledger.claims, "renew", late)
    assert store.renew([publication, beside]) == [] and loads(store, entry) is (end == "commit")


@pytest.mark.parametrize("end, step", [("commit", "commit"), ("abort", "drop")])
def test_a_publication_that_is_ending_while_others_are_renewed_is_not_lost(
    place: Place, monkeypatch: pytest.MonkeyPatch, end: str, step: str
) -> None:
    """The ledger has ended the claim, and its writer has not come back yet."""
    store = place.open()
    entry = sample(1)
    publication, beside = claim(store.begin(entry.key)), claim(store.begin(sample(2).key))
    publication.write(entry.header, entry.views)
    lost: list[Publication] = []
    seen: list[object] = []
    real = getattr(store.ledger.claims, step)

    def slow(*given: object) -> object:
        answer = real(*given)
        lost.extend(store.renew([publication, beside]))
        seen.append(publication.claim)
        return answer

    monkeypatch.setattr(store.ledger.claims, step, slow)
    getattr(publication, end)()
    assert lost == [] and seen == [None]


def test_a_commit_that_failed_leaves_its_claim_to_be_renewed(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    store = place.open()
    entry = sample(1)
    publication = claim(store.begin(entry.key))
    publication.write(entry.header, entry.views)
    with monkeypatch.context() as away:
        away.setattr(store.ledger.claims, "commit", lambda *_: (_ for _ in ()).throw(StoreUnavailable("away")))
        with pytest.raises(StoreUnavailable):
            publication.commit()
    expire(store, publication)
    assert store.renew([publication]) == [] and isinstance(store.begin(entry.key), Busy)
    publication.commit()
    assert publication.claim is None and loads(store, entry)


def test_sweep_ends_expired_claims_and_frees_their_space(place: Place) -> None:
    store, other = place.open(), place.open()
    entry = sample(1)
    publication = claim(store.begin(entry.key, ttl_s=30))
    publication.write(entry.header, entry.views)
    assert store.stats().nbytes == STORED_NBYTES
    expire(store, publication)
    assert other.sweep().claims == 1
    assert store.stats().nbytes == 0
    assert list(store.blobs.names()) == []


def test_closing_a_store_aborts_its_claims(place: Place) -> None:
    first, second = place.open(), place.open()
    publication = claim(first.begin(sample(1).key))
    first.close()
    publish(second, sample(1))
    with pytest.raises(ClaimLost):
        publication.renew()


def test_wrong_use_is_refused_and_leaves_nothing(place: Place) -> None:
    store = place.open()
    entry, other = sample(1), sample(2)
    with pytest.raises(ValueError, match="key"):
        store.begin(ChunkKey("../../etc/passwd"))
    with claim(store.begin(entry.key)) as publication:
        with pytest.raises(ValueError, match="key"):
            publication.write(other.header, other.views)
        with pytest.raises(ValueError, match="buffers"):
            publication.write(entry.header, entry.views[:-1])
        with pytest.raises(ValueError, match="buffers"):
            publication.write(entry.header, [view[:-1] for view in entry.views])
        with pytest.raises(StoreError, match="write"):
            publication.commit()
        publication.write(entry.header, entry.views)
        with pytest.raises(StoreError, match="write"):
            publication.write(entry.header, entry.views)
    assert store.stats().entries == 0
    assert store.stats().nbytes == 0


# -- misses ---------------------------------------------------------------------------------------------


def test_miss_reasons(place: Place) -> None:
    store = place.open()
    parent = sample(1)
    under_parent, alone = sample(2, context=[parent.key]), sample(2)

    def reason(entry_key: ChunkKey, model: ModelIdentity = MODEL) -> MissReason:
        return store.miss_reason(entry_key, alone.chunk_id, model, DEFAULT_TENANT)

    assert reason(alone.key) is MissReason.NOT_STORED
    publish(store, under_parent)
    assert reason(alone.key) is MissReason.CONTEXT_DIFFERS
    assert reason(alone.key, model=ModelIdentity("another")) is MissReason.NOT_STORED


def test_an_evicted_entry_is_remembered_until_it_is_stored_again(place: Place) -> None:
    store = place.open(capacity_nbytes=2 * STORED_NBYTES)
    for number in range(3):
        publish(store, sample(number))
    gone = sample(0)
    assert store.miss_reason(gone.key, gone.chunk_id, MODEL, DEFAULT_TENANT) is MissReason.EVICTED
    assert store.load(gone.key, gone.header.token_ids, views_of(blank(gone))) is MissReason.EVICTED
    publish(store, gone)
    assert loads(store, gone)
    store.delete_chunks([gone.chunk_id])
    assert store.load(gone.key, gone.header.token_ids, views_of(blank(gone))) is MissReason.NOT_STORED


# -- capacity -------------------------------------------------------------------------------------------


def test_the_least_recently_used_goes_first(place: Place) -> None:
    store = place.open(capacity_nbytes=3 * STORED_NBYTES)
    entries = [sample(number) for number in range(4)]
    for entry in entries[:3]:
        publish(store, entry)
    assert loads(store, entries[0])
    assert store.lookup([entries[1].key])[0] is not None, "a lookup does not count as use"
    assert [info.key for info in store.list_entries()] == [entries[1].key, entries[2].key, entries[0].key]
    publish(store, entries[3])
    assert [info is not None for info in store.lookup([entry.key for entry in entries])] == [True, False, True, True]
    assert store.stats().evictions == 1
    assert store.stats().nbytes == 3 * STORED_NBYTES
    assert sum(nbytes for _, nbytes in store.blobs.names()) == 3 * STORED_NBYTES


def test_capacity_is_a_property_of_the_store(place: Place) -> None:
    first = place.open(capacity_nbytes=5 * STORED_NBYTES)
    second = place.open()
    assert second.stats().capacity_nbytes == 5 * STORED_NBYTES
    for number in range(4):
        publish(second, sample(number))
    place.open(capacity_nbytes=2 * STORED_NBYTES)
    report = first.sweep()
    assert (report.entries, report.nbytes) == (2, 2 * STORED_NBYTES)
    assert [info.key for info in first.list_entries()] == [sample(2).key, sample(3).key]


def test_pinned_and_leased_entries_are_never_evicted(place: Place) -> None:
    store, other = place.open(capacity_nbytes=2 * STORED_NBYTES), place.open()
    pinned, leased, third = (sample(number) for number in range(3))
    store.put_records([pinned.record(pinned=True)])
    publish(store, pinned)
    publish(store, leased)
    lease = other.lease([leased.key, third.key])
    stats = store.stats()
    assert (stats.pinned_entries, stats.leased_entries) == (1, 1)
    with claim(store.begin(third.key)) as publication, pytest.raises(StoreFull):
        publication.write(third.header, third.views)
    assert loads(store, pinned) and loads(store, leased)
    lease.release()
    lease.release()
    publish(store, third)
    assert loads(store, pinned) and loads(store, third) and not loads(store, leased)
    store.set_pinned([pinned.chunk_id], False)
    publish(store, sample(4))
    assert store.stats().entries == 2


def test_an_entry_larger_than_the_store_evicts_nothing(place: Place) -> None:
    store = place.open(capacity_nbytes=2 * STORED_NBYTES)
    publish(store, sample(1))
    large = sample(2, tokens=5000)
    with claim(store.begin(large.key)) as publication, pytest.raises(StoreFull, match="capacity"):
        publication.write(large.header, large.views)
    assert loads(store, sample(1))


def test_evicting_a_context_leaves_what_was_computed_under_it(place: Place) -> None:
    store = place.open(capacity_nbytes=2 * STORED_NBYTES)
    parent = sample(1)
    child = sample(2, context=[parent.key])
    publish(store, parent)
    publish(store, child)
    publish(store, sample(3))
    assert not loads(store, parent)
    assert loads(store, child)


# -- leases ---------------------------------------------------------------------------------------------


def test_a_lease_runs_out_and_is_taken_again(place: Place) -> None:
    store, other = place.open(capacity_nbytes=2 * STORED_NBYTES), place.open()
    publish(store, sample(1))
    lease = other.lease([sample(1).key], ttl_s=1.0)
    assert store.stats().leased_entries == 1
    ends_at = time.monotonic() + 60
    while store.stats().leased_entries:
        assert time.monotonic() < ends_at
        time.sleep(0.05)
    lease.renew()
    assert store.stats().leased_entries == 1
    lease.release()
    assert store.stats().leased_entries == 0
    with pytest.raises(StoreError):
        lease.renew()


def test_two_leases_on_one_entry(place: Place) -> None:
    store = place.open(capacity_nbytes=STORED_NBYTES)
    publish(store, sample(1))
    with store.lease([sample(1).key]):
        with store.lease([sample(1).key]):
            pass
        with claim(store.begin(sample(2).key)) as publication, pytest.raises(StoreFull):
            publication.write(sample(2).header, sample(2).views)


def test_a_deleted_entry_stays_for_those_who_leased_it(place: Place) -> None:
    store, reader = place.open(), place.open()
    entry = sample(1)
    store.put_records([entry.record()])
    publish(store, entry)
    with reader.lease([entry.key]) as lease:
        report = store.delete_chunks([entry.chunk_id])
        assert (report.records, report.entries, report.nbytes) == (1, 1, entry.header.nbytes)
        assert store.lookup([entry.key]) == [None]
        assert store.list_entries() == []
        assert loads(reader, entry)
        lease.renew()
        assert loads(reader, entry)
        store.lease([entry.key]).release()
        assert loads(reader, entry), "a lease taken after the deletion holds nothing"
    assert not loads(reader, entry)
    store.sweep()
    assert store.stats().nbytes == 0
    assert list(store.blobs.names()) == []


def test_a_deleted_entry_under_lease_can_be_published_again(place: Place) -> None:
    store, reader = place.open(), place.open()
    entry = sample(1)
    publish(store, entry)
    with reader.lease([entry.key]):
        store.delete_chunks([entry.chunk_id])
        publish(store, entry)
        assert loads(reader, entry)
    assert loads(reader, entry), "the new publication is not touched by the old deletion"
    store.sweep()
    assert len(list(store.blobs.names())) == 1
    assert store.stats().nbytes == STORED_NBYTES


# -- deletion -------------------------------------------------------------------------------------------


def test_delete_chunks_removes_every_entry_of_a_chunk(place: Place) -> None:
    store = place.open()
    alone, under = sample(1), sample(1, context=[sample(2).key])
    other = sample(3)
    store.put_records([alone.record(), other.record()])
    for entry in (alone, under, other):
        publish(store, entry)
    report = store.delete_chunks([alone.chunk_id, sample(9).chunk_id])
    assert (report.records, report.entries) == (1, 2)
    assert report.nbytes == alone.header.nbytes + under.header.nbytes
    assert [info.key for info in store.list_entries()] == [other.key]
    assert [info.key for info in store.list_entries([other.chunk_id])] == [other.key]
    assert store.get_records([alone.chunk_id]) == [None]
    assert len(list(store.blobs.names())) == 1


def test_delete_model_leaves_records_and_other_models(place: Place) -> None:
    store = place.open()
    mine, theirs = sample(1), sample(1, model=ModelIdentity("model-2"))
    store.put_records([mine.record()])
    publish(store, mine)
    publish(store, theirs)
    report = store.delete_model(MODEL)
    assert (report.records, report.entries, report.nbytes) == (0, 1, mine.header.nbytes)
    assert not loads(store, mine)
    assert loads(store, theirs)
    assert store.get_records([mine.chunk_id])[0] is not None


def test_a_commit_whose_answer_got_lost(place: Place) -> None:
    """The caller sees an error and aborts; the entry that was committed stays whole."""
    store = place.open()
    entry = sample(1)
    publication = claim(store.begin(entry.key))
    publication.write(entry.header, entry.views)
    nonce = publication._nonce  # type: ignore[attr-defined]
    store.ledger.claims.commit(entry.key, nonce, entry.header)
    publication.abort()
    assert loads(store, entry)
    assert store.stats().nbytes == STORED_NBYTES
