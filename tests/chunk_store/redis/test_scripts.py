"""Every script is one that the server compiles, and no two objects run the same one."""

from __future__ import annotations

import pytest

from chunk_store.redis.connection import RedisConnection, parse_redis_url
from chunk_store.redis.scripts import claims, entries, leases, records, upkeep
from chunk_store.redis.scripts.prelude import PRELUDE
from tests.chunk_store.servers import Server, redis_url

SCRIPTS = {
    f"{module.__name__.rpartition('.')[2]}.{name}": script
    for module in (claims, entries, leases, records, upkeep)
    for name, script in vars(module).items()
    if name.isupper()
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_compiles_and_changes_nothing_by_being_loaded(name: str, shared_redis: Server) -> None:
    client = RedisConnection(parse_redis_url(redis_url(shared_redis, "scripts"))).client
    assert len(client.script_load(PRELUDE + SCRIPTS[name])) == 40
    assert not list(client.scan_iter(match="scripts:*"))
    client.close()


def test_a_script_is_written_once() -> None:
    whole = [script for name, script in SCRIPTS.items() if not name.endswith("PUT_ENTRY")]  # a part of two others
    assert len(set(whole)) == len(whole) >= 18
