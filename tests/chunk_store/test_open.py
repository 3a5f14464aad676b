"""From a URL to a store: what is refused, what is shown of a URL, and where its password may stand."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from chunk_store.errors import StoreError, StoreUnavailable
from chunk_store.mooncake.client import parse_mooncake_url
from chunk_store.open import open_store, shown_url
from chunk_store.redis.connection import parse_redis_url
from tests.chunk_store.servers import PASSWORD, Mooncake, Server, mooncake_url, redis_url

SHOWN = {
    "redis://user:pw@host:1/0?prefix=p": "redis://host:1/0?prefix=p",
    "rediss://:pw@host/3?ca=/etc/ca.pem&prefix=p": "rediss://host/3?ca=/etc/ca.pem&prefix=p",
    "redis://host?password-file=/run/secrets/redis": "redis://host?password-file=/run/secrets/redis",
    "mooncake://host:1?redis=redis%3A%2F%2F%3Apw%40host&host=10.0.0.7": "mooncake://host:1?host=10.0.0.7&...",
    "mooncake://host:1?redis=redis%3A%2F%2F%3Apw%40host": "mooncake://host:1?...",
    "file:///var/tmp/cairn": "file:///var/tmp/cairn",
    "file:///home/me@work/store": "file:///home/me@work/store",
    "reddis://:pw@host": "reddis://host",
}

# A password that was not percent-encoded, a mistyped option, a mistyped scheme: what follows is never shown.
CARELESS = [
    "redis://:s3/cret@host:6379/0",
    "redis://user:s3/cret@host:6379/0",
    "redis://user:s3cret/x@host/0",
    "redis://:s3?cret@host/0",
    "redis://user:12?s3cret@host",
    "redis://user:12?s3cret&x@host",
    "redis://:s3#cret@host/0",
    "redis://:s3[cret@host/0",
    "redis://:s3cret\u2100@host/0",
    "redis://user:s3cret",
    "redis://host:s3cret/0",
    "redis://host?password=s3cret",
    "redis://host/0#s3cret",
    "redis:/:s3cret@host/0",
    "redis:s3cret@host",
    "s3cret@host",
    "http://user:s3cret@host/0",
    "file://user:s3cret@host/dir",
    "mooncake://m:1?redis=redis://:s3cret@host",
    "mooncake://:s3cret@m:1?redis=redis%3A%2F%2Fhost",
    "mooncake://m:s3cret?redis=redis%3A%2F%2Fhost",
    "mooncake://m:1?redis=redis%3A%2F%2Fu%3As3%2Fcret%40host",
    "mooncake://m:1?redis=redis%3A%2F%2Fhost&word=s3cret",
]


@pytest.mark.parametrize(("url", "shown"), SHOWN.items())
def test_a_url_is_shown_without_what_is_secret(url: str, shown: str) -> None:
    assert shown_url(url) == shown


@pytest.mark.parametrize("url", CARELESS)
def test_a_careless_url_shows_nothing_of_its_password(url: str) -> None:
    assert not _leaks(shown_url(url))
    with pytest.raises((ValueError, StoreError)) as caught:
        open_store(url)
    seen: BaseException | None = caught.value
    while seen is not None:  # a traceback shows these, too
        assert not _leaks(str(seen)) and not _leaks(repr(seen)), seen
        seen = None if seen.__suppress_context__ else seen.__context__


def _leaks(text: str) -> bool:
    return any(secret in text for secret in ("s3", "cret"))


@pytest.mark.parametrize(
    "url", ["", "x", "ftp://x/y", "/var/tmp/cairn", "file:", "file:dir", "file://store", "file://h/x", "file:///a?b"]
)
def test_a_url_of_no_store_is_refused_with_the_remedy(url: str) -> None:
    with pytest.raises(ValueError, match=r"store URL: .*file:///DIR"):
        open_store(url)


@pytest.mark.parametrize("setting", ["capacity_nbytes", "records_max", "quarantine_s"])
def test_a_limit_that_is_none_is_named(setting: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{setting}: -1 is "):
        open_store(f"file://{tmp_path}/store", **cast(Any, {setting: -1}))
    assert not (tmp_path / "store").exists()


def test_addresses_do_not_show_a_password() -> None:
    assert "s3cret" not in repr(parse_redis_url("redis://u:s3cret@host/0"))
    assert "s3cret" not in repr(parse_redis_url("redis://host/0", "s3cret"))
    assert "s3cret" not in repr(parse_mooncake_url("mooncake://m:1?redis=redis%3A%2F%2F%3As3cret%40host"))


def test_the_password_need_not_stand_in_the_url(shared_redis: Server) -> None:
    url = f"redis://127.0.0.1:{shared_redis.port}/0?prefix=bare"
    with pytest.raises(StoreUnavailable, match=r"(?i)auth"):
        open_store(url)
    store = open_store(url, password=PASSWORD)
    assert store.stats().entries == 0
    store.close()


def test_the_urls_own_password_goes_first(shared_redis: Server) -> None:
    open_store(redis_url(shared_redis, "own"), password="another one").close()
    assert parse_redis_url("redis://:own@host", "other").password == "own"


def test_mooncakes_metadata_take_the_password_too(shared_mooncake: Mooncake) -> None:
    bare = mooncake_url(shared_mooncake).replace(f"%3A{PASSWORD}%40", "")
    assert PASSWORD not in bare
    store = open_store(bare, password=PASSWORD)
    assert store.stats().backend == "mooncake"
    store.close()
