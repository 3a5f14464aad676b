"""A ledger of its own on the shared server for each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from chunk_store.ledger import Ledger
from chunk_store.limits import StoreLimits
from chunk_store.redis.connection import RedisConnection, parse_redis_url
from chunk_store.redis.ledger import redis_ledger
from tests.chunk_store.local.conftest import STORED_NBYTES
from tests.chunk_store.servers import Server, redis_url


@pytest.fixture
def connection(shared_redis: Server, tmp_path: Path) -> Iterator[RedisConnection]:
    opened = RedisConnection(parse_redis_url(redis_url(shared_redis, f"ledger-{tmp_path.name}")))
    yield opened
    opened.close()


@pytest.fixture
def ledger(connection: RedisConnection) -> Ledger:
    return redis_ledger(connection, StoreLimits(3 * STORED_NBYTES, 3))
