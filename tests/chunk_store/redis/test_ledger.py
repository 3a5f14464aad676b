"""A store on a Redis server is opened, brought up to date, or left alone."""

from __future__ import annotations

import pytest

from chunk_store.errors import StoreTooNew
from chunk_store.format.versions import REDIS_VERSION
from chunk_store.ledger import Ledger
from chunk_store.limits import StoreLimits
from chunk_store.redis.connection import RedisConnection
from chunk_store.redis.ledger import redis_ledger


def test_a_store_of_newer_software_is_left_alone(connection: RedisConnection, ledger: Ledger) -> None:
    connection.client.hset(connection.name("settings"), "version", REDIS_VERSION + 1)
    with pytest.raises(StoreTooNew, match=f"version {REDIS_VERSION + 1}.*use the newer one"):
        redis_ledger(connection, StoreLimits())
