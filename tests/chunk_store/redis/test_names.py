"""How the scripts know a tenant's things."""

from __future__ import annotations

from chunk_store.key import ChunkId
from chunk_store.redis.connection import RedisConnection, parse_redis_url
from chunk_store.redis.names import index_name, named, number, sid
from chunk_store.tenant import DEFAULT_TENANT, Tenant

NOWHERE = RedisConnection(parse_redis_url("redis://127.0.0.1:1?prefix=p"))  # connects when it is asked something


def test_the_default_tenants_names_are_those_of_before_there_were_tenants() -> None:
    assert sid(DEFAULT_TENANT, ChunkId("id")) == "id" and sid(Tenant("t"), ChunkId("id")) == "t/id"
    assert index_name(NOWHERE, DEFAULT_TENANT, "pinned") == "p:pinned"
    assert index_name(NOWHERE, Tenant("t"), "pinned") == "p:pinned@t"


def test_tenants_that_are_given_need_no_server() -> None:
    assert named(NOWHERE, [Tenant("b"), Tenant("a")]) == ["b", "a"]


def test_no_limit_is_an_empty_text() -> None:
    assert (number(None), number(0), number(7)) == ("", "0", "7")
