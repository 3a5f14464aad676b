"""Quotas as words of a token file, and which hold for whom."""

from __future__ import annotations

import pytest

from chunk_store.tenant import SHARED_TENANT, Tenant
from serving.tenancy.quotas import NO_QUOTAS, Quotas, TenantQuotas, parse_quotas

A, B = Tenant("a"), Tenant("b")


@pytest.mark.parametrize(
    ("word", "found"),
    [
        ("chunks=5", Quotas(chunks=5)),
        ("bytes=10KiB pins=0", Quotas(bytes=10240, pins=0)),
        ("waiting=3 running=2 jobs=1", Quotas(waiting=3, running=2, jobs=1)),
        ("", NO_QUOTAS),
    ],
)
def test_quotas_are_names_and_limits(word: str, found: Quotas) -> None:
    assert parse_quotas(word.split()) == found
    assert parse_quotas(str(found).split()) == found


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("chunks", "'chunks' is not one of admin, chunks=N"),
        ("doors=3", "'doors=3' is not one of"),
        ("chunks=many", "^chunks:"),
        ("bytes=10XB", "^bytes:"),
        ("chunks=-1", "chunks: -1 is negative"),
        ("running=0", "running: at least 1"),
        ("waiting=0", "waiting: at least 1"),
        ("jobs=0", "jobs: at least 1"),
        ("chunks=1 pins=2 chunks=1", "chunks stands there twice"),
    ],
)
def test_other_words_are_refused(word: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_quotas(word.split())


def test_a_tenants_own_limits_stand_over_the_default() -> None:
    quotas = TenantQuotas({A: Quotas(chunks=5, pins=0)}, Quotas(chunks=7, jobs=2))
    assert quotas.of(A) == Quotas(chunks=5, pins=0, jobs=2) and quotas.of(B) == Quotas(chunks=7, jobs=2)
    assert quotas.of(SHARED_TENANT) == NO_QUOTAS, "shared content has none"
    limits = quotas.of(A).limits
    assert (limits.records, limits.pinned, limits.nbytes) == (5, 0, None)
