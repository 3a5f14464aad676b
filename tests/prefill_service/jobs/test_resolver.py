"""From what a caller asks to a job: keys of content under context, and every refusal with its field."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chunk_store.key import ChunkType, TokenizerIdentity, chunk_id
from chunk_store.open import open_store
from chunk_store.record import ChunkRecord
from chunk_store.tenant import SHARED_SALT, SHARED_TENANT, tenant_of
from engine.reuse import ReuseMode
from prefill_service.jobs.resolver import ChunkRequest, PrefillJob, Resolver
from serving.errors import InvalidRequest, NotFound, PermissionDenied, RequestError, Unsupported
from serving.trace.stages import StageTimer
from tests.fakes import FakeServed, codec, small_pool


class Desk:
    """A resolver over a file store, a pool of 16 pages of 4 tokens and a model of 64 tokens."""

    def __init__(self, root: Path) -> None:
        self.served = FakeServed()
        self.store = open_store(f"file://{root}")
        self.resolver = Resolver(self.store, self.served, codec(), small_pool())  # type: ignore[arg-type]

    def register(self, *ids: int, **fields: Any) -> PrefillJob:
        if ids:
            fields["token_ids"] = ids
        return self.resolver.register(ChunkRequest(**fields), StageTimer())

    def record(self, job: PrefillJob, salt: str = "") -> ChunkRecord:
        (found,) = self.store.get_records([job.chunk_id], [tenant_of(salt)])
        assert found is not None
        return found


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    made = Desk(tmp_path)
    yield made
    made.store.close()


def test_content_is_registered_once_under_the_name_of_its_tokens(desk: Desk) -> None:
    job = desk.register(5, 6, 7, name="town", tags=("a",), pin=True, ttl_s=60.0)
    assert job.newly_registered and job.tokens == 3 and job.needed == (0,)
    assert job.chunk_id == chunk_id(codec().identity, ChunkType.CONTEXT, (5, 6, 7))
    record = desk.record(job)
    assert (record.name, record.tags, record.pinned, record.transient) == ("town", ("a",), True, False)
    assert record.expires_at is not None
    again = desk.register(5, 6, 7)
    assert not again.newly_registered and again.key == job.key
    assert desk.record(again).pinned and desk.record(again).expires_at is None


def test_text_and_its_tokens_are_the_same_chunk(desk: Desk) -> None:
    text = "A cairn is a heap of stones."
    by_text = desk.register(text=text)
    by_ids = desk.register(*codec().encode(text))
    assert by_text.key == by_ids.key and not by_ids.newly_registered
    assert desk.register(text=text, role="user").key != by_text.key


@pytest.mark.parametrize(
    ("mode", "needed", "key_moves"),
    [(ReuseMode.EXACT, (0, 1, 2), True), (ReuseMode.ANCHORED, (0, 2), True), (ReuseMode.INDEPENDENT, (2,), False)],
)
def test_a_job_needs_what_its_chunk_attends_to(
    desk: Desk, mode: ReuseMode, needed: tuple[int, ...], key_moves: bool
) -> None:
    context = tuple(desk.register(token, token).chunk_id for token in (11, 12))
    job = desk.register(13, context=context, mode=mode)
    assert job.needed == needed and len(job.chunks) == 3
    other = (desk.register(14, 14).chunk_id, context[1])
    assert (desk.register(13, context=other, mode=mode).key != job.key) == key_moves


def test_a_chunk_named_by_its_id_keeps_its_ttl_and_labels(desk: Desk) -> None:
    job = desk.register(5, 6, name="old", ttl_s=1000.0)
    expires = desk.record(job).expires_at
    named = desk.register(chunk_id=job.chunk_id)
    assert named.key == job.key and desk.record(named).name == "old"
    desk.register(chunk_id=job.chunk_id, name="new", pin=True)
    record = desk.record(job)
    assert (record.name, record.pinned, record.expires_at) == ("new", True, expires)


def test_tenants_have_records_of_their_own_and_share_what_is_published(desk: Desk) -> None:
    shared = desk.register(7, 7, salt=SHARED_SALT)
    mine = desk.register(7, 7, salt="mine")
    assert mine.key == shared.key and not mine.newly_registered and mine.owner(0) == SHARED_TENANT
    assert desk.store.get_records([mine.chunk_id], [tenant_of("mine")]) == [None], "not registered a second time"
    own = desk.register(8, salt="mine")
    assert own.key != desk.register(8, salt="yours").key and own.owner(0) == tenant_of("mine")
    with pytest.raises(NotFound, match="chunk_id: no chunk"):
        desk.register(chunk_id=own.chunk_id, salt="other")
    with pytest.raises(PermissionDenied, match="shared"):
        desk.register(chunk_id=shared.chunk_id, name="mine now", salt="mine")


REFUSED: dict[str, tuple[dict[str, Any], type[RequestError], str]] = {
    "empty text": ({"text": ""}, InvalidRequest, "^text: no tokens"),
    "no tokens": ({"token_ids": ()}, InvalidRequest, "^token_ids: no tokens"),
    "vocabulary": ({"token_ids": (1, 384)}, InvalidRequest, r"^token_ids: token id 384 .* 0\.\.383"),
    "tag": ({"token_ids": (1,), "tags": ("a", "")}, InvalidRequest, "^tags: an empty tag"),
    "ttl": ({"token_ids": (1,), "ttl_s": float("nan")}, InvalidRequest, "^ttl_s: nan"),
    "negative ttl": ({"token_ids": (1,), "ttl_s": -1.0}, InvalidRequest, "^ttl_s: -1"),
    "role of tokens": ({"token_ids": (1,), "role": "user"}, InvalidRequest, "^role: belongs to text"),
    "unknown id": ({"chunk_id": "feed"}, NotFound, "^chunk_id: no chunk 'feed'"),
    "unknown context": ({"token_ids": (1,), "context": ("feed",)}, NotFound, "^context_chunk_ids: no chunk 'feed'"),
    "too long": ({"token_ids": (1,) * 65}, InvalidRequest, "longer than the model's context, limited to 64"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_field_and_register_nothing(desk: Desk, name: str) -> None:
    fields, kind, words = REFUSED[name]
    with pytest.raises(kind, match=words):
        desk.register(**fields)
    assert desk.store.stats().records == 0


def test_what_the_pool_cannot_hold_is_refused_in_its_mode(desk: Desk) -> None:
    desk.resolver.pool = small_pool(pages=3)
    first = desk.register(*[9] * 8)
    with pytest.raises(Unsupported, match=r"needs 4 pages of 4 tokens, the pool has 3; raise --kv-pages"):
        desk.register(*[8] * 8, context=(first.chunk_id,))
    assert desk.register(*[8] * 8, context=(first.chunk_id,), mode=ReuseMode.INDEPENDENT).tokens == 8


def test_a_mode_that_does_not_hold_is_refused_with_its_reason(desk: Desk) -> None:
    desk.served.refusals[ReuseMode.INDEPENDENT] = "positions are learned"
    with pytest.raises(Unsupported, match=r"reuse_mode: independent is not offered .*positions are learned.*use exact"):
        desk.register(1, mode=ReuseMode.INDEPENDENT)


def test_a_chunk_of_another_tokenizer_is_refused_and_can_be_looked_at(desk: Desk) -> None:
    foreign = ChunkRecord(
        chunk_id(TokenizerIdentity("f" * 64), ChunkType.CONTEXT, (3,)),
        TokenizerIdentity("f" * 64),
        ChunkType.CONTEXT,
        (3,),
    )
    desk.store.put_records([foreign])
    with pytest.raises(Unsupported, match="registered under tokenizer ffff"):
        desk.register(chunk_id=foreign.chunk_id)
    assert desk.resolver.resolve_id(foreign.chunk_id, tenant_of("")).token_ids == (3,)
    with pytest.raises(NotFound):
        desk.resolver.resolve_id("feed", tenant_of(""))
