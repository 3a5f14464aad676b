"""The ``place`` fixture: each contract test runs once for each backend, against the real thing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from chunk_store.mooncake.client import connect, parse_mooncake_url
from tests.chunk_store.contract import Place
from tests.chunk_store.places import FilePlace, MooncakePlace, RedisPlace
from tests.chunk_store.servers import (
    Mooncake,
    Server,
    mooncake,
    mooncake_url,
    need_mooncake,
    need_redis,
    redis_server,
    redis_url,
    running,
    tls_server,
    tls_url,
)

BACKENDS = ("file", "redis", "rediss", "mooncake")


@pytest.fixture(scope="session")
def shared_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    need_redis()
    yield from running(redis_server(tmp_path_factory.mktemp("redis")))


@pytest.fixture(scope="session")
def shared_tls_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    need_redis()
    yield from running(tls_server(tmp_path_factory.mktemp("rediss")))


@pytest.fixture(scope="session")
def shared_mooncake(tmp_path_factory: pytest.TempPathFactory, shared_redis: Server) -> Iterator[Mooncake]:
    need_mooncake()
    cluster = mooncake(tmp_path_factory.mktemp("mooncake"), shared_redis)
    cluster.start()
    yield cluster
    cluster.kill()


@pytest.fixture(scope="session")
def mooncake_client(shared_mooncake: Mooncake) -> Iterator[Any]:
    client = connect(parse_mooncake_url(mooncake_url(shared_mooncake)), segment_nbytes=0)
    yield client
    client.close()


@pytest.fixture(params=BACKENDS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    makers: dict[str, Callable[[], FilePlace | RedisPlace | MooncakePlace]] = {
        "file": lambda: FilePlace(tmp_path / "store"),
        "redis": lambda: RedisPlace(redis_url(request.getfixturevalue("shared_redis"))),
        "mooncake": lambda: MooncakePlace(
            mooncake_url(request.getfixturevalue("shared_mooncake")), request.getfixturevalue("mooncake_client")
        ),
        "rediss": lambda: RedisPlace(tls_url(request.getfixturevalue("shared_tls_redis"))),
    }
    with closing(makers[request.param]()) as opened:
        yield opened


@pytest.fixture
def file_place(tmp_path: Path) -> Iterator[FilePlace]:
    with closing(FilePlace(tmp_path / "store")) as opened:
        yield opened


@pytest.fixture
def file_place_2(tmp_path: Path) -> Iterator[FilePlace]:
    """A second installation, to move things to."""
    with closing(FilePlace(tmp_path / "second store")) as opened:
        yield opened
