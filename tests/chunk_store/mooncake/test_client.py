"""A Mooncake cluster by its URL, and a master that is not there."""

from __future__ import annotations

import pytest

from cairn.local.processes import free_port
from chunk_store.errors import StoreUnavailable
from chunk_store.mooncake.client import connect, parse_mooncake_url
from chunk_store.open import open_store


@pytest.mark.parametrize(
    "url", ["mooncake://", "mooncake://h", "mooncake://h/x?redis=a", "mooncake://h?redis=a&x=1", "mooncake://h?redis=a"]
)
def test_an_unclear_mooncake_url_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="store URL"):
        open_store(url)


def test_mooncake_urls() -> None:
    found = parse_mooncake_url("mooncake://m.example?redis=redis%3A%2F%2Fr%3A7000&host=10.0.0.2&buffer_mib=64")
    assert (found.master, found.host) == ("m.example:50051", "10.0.0.2")
    assert (found.redis_url, found.buffer_nbytes) == ("redis://r:7000", 64 * 2**20)


def test_a_master_that_is_not_there_is_named_at_once() -> None:
    address = parse_mooncake_url(f"mooncake://127.0.0.1:{free_port('127.0.0.1')}?redis=redis%3A%2F%2Fr")
    with pytest.raises(StoreUnavailable, match=f"mooncake master at {address.master}"):
        connect(address, segment_nbytes=0)
