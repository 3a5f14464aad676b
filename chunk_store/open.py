"""From a URL to a store. The only place that knows which backends exist."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from chunk_store.file_blobs import Durability, FileBlobs
from chunk_store.ledger import CAPACITY_NBYTES_DEFAULT, RECORDS_MAX_DEFAULT
from chunk_store.shared_store import SharedStore
from chunk_store.sqlite_ledger import SqliteLedger

SCHEMES = ("file",)


def open_store(
    url: str,
    *,
    capacity_nbytes: int | None = None,
    records_max: int | None = None,
    durability: Durability = Durability.PROCESS,
) -> SharedStore:
    """The store at ``url``: ``file:///DIR`` (created if it is not there).

    ``capacity_nbytes`` (bytes, headers included) and ``records_max`` are properties of the store, shared by every
    process: given, they are set; None keeps what the store has (16 GiB and 100 000 when it is new). What a commit
    survives is ``durability``. Raises ``ValueError`` for a URL it does not know, ``StoreUnavailable`` when the
    store cannot be reached or written.
    """
    for name, value in (("capacity_nbytes", capacity_nbytes), ("records_max", records_max)):
        if value is not None and value <= 0:
            raise ValueError(f"{name}: {value} is not positive")
    parts = urlsplit(url)
    if parts.scheme == "file":
        return _open_file(url, capacity_nbytes, records_max, durability)
    known = ", ".join(f"{scheme}://" for scheme in SCHEMES)
    raise ValueError(f"store URL: {url!r} starts with none of {known}; for a directory write file:///DIR")


def _open_file(url: str, capacity_nbytes: int | None, records_max: int | None, durability: Durability) -> SharedStore:
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/") or parts.query or parts.fragment:
        raise ValueError(f"store URL: {url!r} must be file:///DIR with an absolute path (three slashes)")
    root = Path(unquote(parts.path))
    ledger = SqliteLedger(
        root / "index.sqlite",
        capacity_nbytes=capacity_nbytes or CAPACITY_NBYTES_DEFAULT,
        records_max=records_max or RECORDS_MAX_DEFAULT,
        synchronous="FULL" if durability is Durability.POWER else "NORMAL",
    )
    ledger.set_limits(capacity_nbytes=capacity_nbytes, records_max=records_max)
    return SharedStore(ledger, FileBlobs(root, durability))
