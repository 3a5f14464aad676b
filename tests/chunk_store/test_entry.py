"""What a header says beside its fields."""

from __future__ import annotations

from dataclasses import replace

from chunk_store.entry import MissReason
from chunk_store.tenant import DEFAULT_TENANT, tenant_of
from tests.chunk_store.contract import sample


def test_a_header_knows_its_tenant_and_the_bytes_of_its_data() -> None:
    assert sample(1).header.tenant == DEFAULT_TENANT and sample(1, salt="a").header.tenant == tenant_of("a")
    assert sample(1).header.nbytes == sum(map(len, sample(1).data)) > 0
    assert replace(sample(1).header, token_ids=()).nbytes == 0


def test_reasons_are_the_words_of_the_wire_and_the_metrics() -> None:
    assert {reason.value for reason in MissReason} == {
        *("not_stored", "context_differs", "evicted", "load_failed", "verify_failed", "format_differs")
    }
