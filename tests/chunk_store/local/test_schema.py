"""The tables: made in one go, and the audit's queries count what the triggers count."""

from __future__ import annotations

import sqlite3
from contextlib import closing

from chunk_store.local.schema import SCHEMA, TENANTS, TOTALS


def test_totals_of_an_empty_index_agree_with_its_rows() -> None:
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        for statement in SCHEMA.split(";;"):
            connection.execute(statement)
        kept = dict(connection.execute("SELECT name, value FROM totals"))
        assert {name: connection.execute(query).fetchone()[0] for name, query in TOTALS.items()} == {
            name: kept[name] for name in TOTALS
        }
        assert set(kept) - set(TOTALS) == {"evictions", "quarantined"}, "these are counted, not derived"
        assert connection.execute(TENANTS).fetchall() == []
