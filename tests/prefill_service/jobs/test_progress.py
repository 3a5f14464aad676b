"""What a job is told of its chunks: once each, when they are stored or computed, as it asked for."""

from __future__ import annotations

import pytest

from chunk_store.entry import EntryInfo
from chunk_store.errors import StoreFull
from chunk_store.key import ChunkId, ChunkKey
from engine.kv.source import KVSource
from prefill_service.jobs.progress import ChunkMade, JobProgress
from serving.publishing.item import Publishing
from serving.trace.stages import StageTimer
from tests.fakes import MODEL

INFO = EntryInfo(ChunkKey("k"), ChunkId("c"), MODEL, 1, 1, 0.0, 0.0)


def progress(*, durable: bool) -> tuple[JobProgress, list[ChunkMade]]:
    told: list[ChunkMade] = []
    made = JobProgress(StageTimer(), told.append, durable=durable)
    made.note(0, KVSource.COMPUTED)
    return made, told


def test_computed_is_enough_where_nobody_asked_for_more() -> None:
    made, told = progress(durable=False)
    publishing = Publishing()
    made.handed_on(0, publishing)
    assert not told and not made.all_stored, "launched is not computed"
    publishing.computed.set_result(None)
    assert told == [ChunkMade(0, KVSource.COMPUTED, durable=False)]
    publishing.set_result(INFO)
    made.stored(0)
    assert len(told) == 1 and made.all_stored


def test_who_asked_for_more_is_told_when_it_is_stored() -> None:
    made, told = progress(durable=True)
    publishing = Publishing()
    made.handed_on(0, publishing)
    publishing.computed.set_result(None)
    assert not told
    publishing.set_result(INFO)
    assert told == [ChunkMade(0, KVSource.COMPUTED, durable=True)]


@pytest.mark.parametrize("durable", [False, True])
def test_what_fails_is_not_told_of_until_it_is_known_what_becomes_of_it(durable: bool) -> None:
    made, told = progress(durable=durable)
    publishing, error = Publishing(), StoreFull("full")
    made.handed_on(0, publishing)
    publishing.computed.set_exception(error)
    publishing.set_exception(error)
    assert not told and not made.all_stored
    made.refused(0, error)
    assert told == [ChunkMade(0, KVSource.COMPUTED, durable=False, unpublished=error)]


def test_what_was_computed_stays_so() -> None:
    made, _ = progress(durable=False)
    made.note(0, KVSource.DEVICE)
    assert made.sources == {0: KVSource.COMPUTED}
