"""Numbers of an index: kept by triggers, whatever changes the rows."""

from __future__ import annotations

import pytest

from chunk_store.local import counts
from chunk_store.local.index import Index
from chunk_store.tenant import Tenant


def test_triggers_count_what_comes_and_goes(index: Index) -> None:
    with index.write() as connection:
        for key, tenant, nbytes in (("a", "t", 10), ("b", "t", 20), ("c", "u", 5)):
            connection.execute(
                "INSERT INTO entries VALUES (?, ?, 'c', 'm', ?, 1, 1, ?, 1, 1, 0)", (key, f"{key}.n", tenant, nbytes)
            )
        connection.execute("INSERT INTO claims VALUES ('d', 'n', 'o', 1, 7, '')")
        assert (counts.total(connection, "entries"), counts.space(connection)) == (3, 42)
        assert counts.tenant_counts(connection, Tenant("t")) == {"records": 0, "pinned": 0, "entries": 2, "nbytes": 30}
        connection.execute("DELETE FROM entries WHERE key = 'b'")
        assert counts.space(connection) == 42, "what was removed counts until its bytes are gone"
        connection.execute("DELETE FROM garbage")
        connection.execute("UPDATE claims SET reserved_nbytes = 0")
        assert (counts.total(connection, "entries"), counts.space(connection)) == (2, 15)


def test_what_nobody_set_is_an_error_and_nobody_has_nothing(index: Index) -> None:
    with index.read() as connection:
        assert counts.setting(connection, "records_max") == 3
        with pytest.raises(TypeError):
            counts.setting(connection, "no such setting")
        assert set(counts.tenant_counts(connection, Tenant("nobody")).values()) == {0}
        assert counts.held_entries(connection, 0.0) == (0, 0)
