"""The ``place`` fixture: each contract test runs once for each backend, against the real thing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from contract import Place
from places import FilePlace, RedisPlace
from servers import Server, redis_server, redis_url, tls_server, tls_url

BACKENDS = ("file", "redis", "rediss")


@pytest.fixture(scope="session")
def shared_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    yield from running(redis_server(tmp_path_factory.mktemp("redis")))


@pytest.fixture(scope="session")
def shared_tls_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    yield from running(tls_server(tmp_path_factory.mktemp("rediss")))


def running(server: Server) -> Iterator[Server]:
    server.start()
    yield server
    server.kill()


@pytest.fixture(params=BACKENDS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    makers: dict[str, Callable[[], FilePlace | RedisPlace]] = {
        "file": lambda: FilePlace(tmp_path / "store"),
        "redis": lambda: RedisPlace(redis_url(request.getfixturevalue("shared_redis"))),
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
