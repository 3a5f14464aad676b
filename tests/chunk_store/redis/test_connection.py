"""A Redis server by its URL: what is understood, what is refused, what is shown of a password."""

from __future__ import annotations

from pathlib import Path

import pytest

from chunk_store.errors import StoreUnavailable
from chunk_store.open import open_store
from chunk_store.redis.connection import parse_redis_url
from tests.chunk_store.servers import PASSWORD, Server


def test_a_wrong_password_is_told_apart_and_not_printed(shared_redis: Server) -> None:
    url = f"redis://:wrong-word@127.0.0.1:{shared_redis.port}/0"
    with pytest.raises(StoreUnavailable, match=r"(?i)password|auth") as caught:
        open_store(url)
    assert "wrong-word" not in str(caught.value)


def test_tls_refuses_a_certificate_it_does_not_know(shared_tls_redis: Server) -> None:
    with pytest.raises(StoreUnavailable, match=r"(?i)certificate"):
        open_store(f"rediss://:{PASSWORD}@localhost:{shared_tls_redis.port}/0")


@pytest.mark.parametrize("url", ["redis://", "redis:///0", "redis://host/x", "redis://u:word@h/0?prefx=a", "redis:x"])
def test_an_unclear_redis_url_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="store URL") as caught:
        open_store(url)
    assert "word" not in str(caught.value).replace("password", "")


def test_redis_urls() -> None:
    found = parse_redis_url("rediss://name:p%40ss@cache.example:6380/3?prefix=team&ca=/etc/ca.pem")
    assert (found.host, found.port, found.db, found.username, found.password) == (
        "cache.example",
        6380,
        3,
        "name",
        "p@ss",
    )
    assert (found.tls, found.ca_file, found.prefix) == (True, "/etc/ca.pem", "team")
    assert parse_redis_url("redis://h").port == 6379


def test_a_redis_password_may_stand_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("qu@rtz 7\n")
    found = parse_redis_url(f"redis://redis:6379/0?password-file={file}")
    assert found.password == "qu@rtz 7" and "qu@rtz" not in repr(found)
    with pytest.raises(ValueError, match="password-file; give one of them"):
        parse_redis_url(f"redis://:other@redis/0?password-file={file}")
    with pytest.raises(ValueError, match="password-file: cannot read"):
        parse_redis_url(f"redis://redis/0?password-file={tmp_path / 'none'}")
    file.write_text("\n")
    with pytest.raises(ValueError, match="empty line"):
        parse_redis_url(f"redis://redis/0?password-file={file}")
