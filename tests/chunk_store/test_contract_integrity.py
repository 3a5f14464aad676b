"""A wrong byte is a miss with its reason, never an answer."""

from __future__ import annotations

import pytest

from chunk_store.entry import MissReason
from chunk_store.layout import KVLayout, LayerLayout
from chunk_store.tools.verify import Problem, repair, verify
from tests.chunk_store.contract import Damage, Place, blank, loads, publish, sample, views_of


@pytest.mark.parametrize("how", [Damage.FLIPPED_DATA, Damage.FLIPPED_HEADER, Damage.CUT, Damage.FOREIGN])
def test_a_damaged_entry_is_quarantined_and_can_be_stored_again(place: Place, how: Damage) -> None:
    store = place.open()
    entry = sample(1)
    publish(store, entry)
    publish(store, sample(2))
    place.damage(entry.key, how)
    assert store.lookup([entry.key])[0] is not None
    reason = store.load(entry.key, entry.header.token_ids, views_of(blank(entry)))
    assert reason is MissReason.VERIFY_FAILED
    assert store.lookup([entry.key]) == [None]
    assert store.stats().quarantined == 1
    assert store.stats().entries == 1
    publish(store, entry)
    assert loads(store, entry) and loads(store, sample(2))


@pytest.mark.parametrize("how", [Damage.OLDER_VERSION, Damage.NEWER_VERSION])
def test_an_entry_of_other_software_is_no_corruption(place: Place, how: Damage) -> None:
    """It is named as what it is, kept by a repair, and replaced when somebody wants it; never quarantined."""
    store = place.open()
    entry = sample(1)
    publish(store, entry)
    publish(store, sample(2))
    place.damage(entry.key, how)
    words = (
        "format version 0, written by older" if how is Damage.OLDER_VERSION else "format version 2, written by newer"
    )
    for report in (verify(store), repair(store).found, verify(store)):
        (finding,) = report.findings
        assert finding.problem is Problem.OTHER_VERSION and words in finding.detail
    assert store.load(entry.key, entry.header.token_ids, views_of(blank(entry))) is MissReason.FORMAT_DIFFERS
    assert (store.stats().quarantined, store.stats().entries) == (0, 1)
    assert verify(store).sound, "nothing is left behind"
    publish(store, entry)
    assert loads(store, entry)


def test_missing_data_is_a_failed_load(place: Place) -> None:
    store = place.open()
    entry = sample(1)
    publish(store, entry)
    place.damage(entry.key, Damage.MISSING)
    assert store.load(entry.key, entry.header.token_ids, views_of(blank(entry))) is MissReason.LOAD_FAILED
    assert store.lookup([entry.key]) == [None]
    assert store.stats().quarantined == 0
    publish(store, entry)
    assert loads(store, entry)


def test_another_entrys_data_under_this_key(place: Place) -> None:
    store = place.open()
    publish(store, sample(1))
    publish(store, sample(2))
    place.replace_data(sample(1).key, sample(2).key)
    entry = sample(1)
    assert store.load(entry.key, entry.header.token_ids, views_of(blank(entry))) is MissReason.VERIFY_FAILED


def test_other_tokens_than_the_stored_ones(place: Place) -> None:
    store = place.open()
    entry = sample(1)
    publish(store, entry)
    wrong = (*entry.header.token_ids[:-1], 7)
    assert store.load(entry.key, wrong, views_of(blank(entry))) is MissReason.VERIFY_FAILED


def test_another_layout_than_the_stored_one(place: Place) -> None:
    store = place.open()
    entry = sample(1)
    publish(store, entry)
    other = sample(1, layout=KVLayout("float32", (LayerLayout(2, 8, 8),)))
    assert store.load(entry.key, entry.header.token_ids, views_of(blank(other))) is MissReason.VERIFY_FAILED
