"""What requests leave in the registry: nothing when they are refused, and what makes room when they are not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cairn import CairnError
from chunk_store.open import open_store
from chunk_store.record import RecordQuery
from protos import chunks_pb2, decode_pb2
from tests.decode_service.models import loaded, tokens
from tests.decode_service.pair import Pair, pair, raw_status

REGISTRY_MAX = 8
TEXT = "all of this is sent with the request " * 4


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def small(folder: Path, store: Path) -> Iterator[Pair]:
    """Both services on a registry of eight chunks."""
    open_store(f"file://{store}", records_max=REGISTRY_MAX).close()
    with pair(
        loaded(folder, "prefill"), loaded(folder, "decode"), store, waiting_max=1, batch_max=1, kv_pages=64
    ) as services:
        yield services
        services.check_idle()


def inline(*parts: decode_pb2.Segment, **fields: Any) -> decode_pb2.GenerateRequest:
    """A request with content of its own, then ``parts``, then a query."""
    ids = chunks_pb2.TokenIds(ids=tokens(1, 40))
    mine = [decode_pb2.Segment(token_ids=ids), decode_pb2.Segment(text=TEXT)]
    query = decode_pb2.Segment(token_ids=chunks_pb2.TokenIds(ids=[5]))
    sampling = fields.pop("sampling", decode_pb2.SamplingParams(max_tokens=4))
    return decode_pb2.GenerateRequest(segments=[*mine, *parts, query], sampling=sampling, **fields)


REFUSED = {
    "an unknown chunk later on": lambda: inline(decode_pb2.Segment(chunk_id="f" * 64)),
    "an empty segment later on": lambda: inline(decode_pb2.Segment(text="")),
    "a token outside the vocabulary": lambda: inline(
        decode_pb2.Segment(token_ids=chunks_pb2.TokenIds(ids=[2**31])),
    ),
    "more than the context": lambda: inline(decode_pb2.Segment(token_ids=chunks_pb2.TokenIds(ids=[7] * 100_000))),
    "an answer that does not fit": lambda: inline(sampling=decode_pb2.SamplingParams(max_tokens=10_000_000)),
    "sampling": lambda: inline(sampling=decode_pb2.SamplingParams(max_tokens=4, temperature=-1)),
    "a mode that there is not": lambda: inline(reuse_mode=99),
    "a long salt": lambda: inline(salt="x" * 10_000),
    "more than the pool": lambda: inline(
        *(decode_pb2.Segment(token_ids=chunks_pb2.TokenIds(ids=tokens(9 + n, 200))) for n in range(4)),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_request_leaves_nothing(small: Pair, store: Path, name: str) -> None:
    before = small.decode.store.stats()
    code, _ = raw_status(small, REFUSED[name]())
    assert code is not None
    assert small.decode.store.stats() == before
    assert small.decode.store.list_records(RecordQuery(tenants=None)).records == ()


def test_an_overload_and_a_deadline_leave_nothing(small: Pair) -> None:
    """One request runs and holds the device, one waits; the third is refused, the waiting one runs out of time."""
    with small.held_decode(), small.client.generate([tokens(50, 20), [5]], max_tokens=2) as running:
        with pytest.raises(CairnError):
            small.client.generate([tokens(51, 20), [5]], max_tokens=2, timeout_s=0.5).finish()
        with pytest.raises(CairnError):
            small.client.generate([tokens(52, 20), [5]], max_tokens=2, timeout_s=0.5).finish()
        running.cancel() if hasattr(running, "cancel") else None
    assert small.decode.store.stats().records <= 1


def test_request_nine_of_eight_is_stored_too(small: Pair) -> None:
    """Each with content of its own: the registry keeps the latest, and every one finds its KV again."""
    kept = small.client.prefill(tokens(90, 30), name="kept")
    for number in range(1, 13):
        first = small.generate([kept, tokens(number, 30), [5]], reuse="independent")
        assert first.reuse.segments[1].source == "computed"
        small.forget()
        again = small.generate([kept, tokens(number, 30), [5]], reuse="independent")
        assert [part.source for part in again.reuse.segments[:2]] == ["store", "store"], number
        assert again.token_ids == first.token_ids
    stats = small.decode.store.stats()
    assert (stats.records, stats.entries) == (REGISTRY_MAX, 13)
    names = {record.name for record in small.decode.store.list_records(RecordQuery()).records}
    assert "kept" in names
    small.forget()
    first = small.generate([kept, tokens(1, 30), [5]], reuse="independent")
    assert first.reuse.segments[1].source == "store", "its KV outlived its record"


def test_many_at_once_displace_each_other_and_are_answered(folder: Path, store: Path) -> None:
    """Thirty contents through a registry of three, eight at a time: displaced content is registered again."""
    open_store(f"file://{store}", records_max=3).close()
    with pair(loaded(folder, "prefill"), loaded(folder, "decode"), store) as services:
        requests = [[tokens(100 + number, 20), [5]] for number in range(30)]
        answers = [answer for at in range(0, 30, 10) for answer in services.together(requests[at : at + 10])]
        alone = services.generate(requests[0], cache="bypass")
        assert answers[0].token_ids == alone.token_ids
        assert services.decode.store.stats().records <= 3

        services.check_idle()
