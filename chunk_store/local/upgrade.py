"""From each older version of the embedded index to the present one; statements end with ``;;``.

Version 1 knew no tenants. Its records become the default tenant's; its entries know by their salt whose they are.
Version 2 did not know which content only passed through a request, nor what the quarantine holds; version 3 not how
often who used a chunk.
"""

from collections.abc import Mapping, Sequence

from chunk_store.local.schema import SCHEMA

_TABLES_1 = ("settings", "totals", "records", "tags", "entries", "needs", "claims", "leases", "garbage", "tombstones")
_INDEXES_1 = (
    *("records_created", "records_used", "records_named", "records_expiring", "records_pinned", "tags_chunk"),
    *("entries_used", "entries_chunk", "entries_model", "entries_doomed", "needs_key", "leases_expiring"),
)
_TRIGGERS_1 = (
    *("records_in", "records_out", "entries_in", "entries_out", "claims_in", "claims_change", "claims_out"),
    *("garbage_in", "garbage_out", "tombstones_in", "tombstones_out"),
)
_COPY_1 = """
INSERT INTO settings SELECT * FROM old_settings;;
INSERT INTO records (tenant, chunk_id, tokenizer, type, token_ids, name, tags, pinned, created_at, last_used_at,
  expires_at) SELECT '', chunk_id, tokenizer, type, token_ids, name, tags, pinned, created_at, last_used_at,
  expires_at FROM old_records;;
INSERT INTO tags (tenant, tag, chunk_id) SELECT '', tag, chunk_id FROM old_tags;;
INSERT INTO entries (key, blob, chunk_id, model, tenant, tokens, nbytes, stored_nbytes, created_at, last_used_at,
  doomed) SELECT key, blob, chunk_id, model, salt_digest, tokens, nbytes, stored_nbytes, created_at, last_used_at,
  doomed FROM old_entries;;
INSERT INTO needs (tenant, chunk_id, key) SELECT entries.tenant, old_needs.chunk_id, old_needs.key
  FROM old_needs JOIN entries USING (key);;
INSERT INTO claims (key, nonce, owner, expires_at, reserved_nbytes) SELECT * FROM old_claims;;
INSERT INTO leases SELECT * FROM old_leases;;
INSERT INTO garbage SELECT * FROM old_garbage;;
INSERT INTO tombstones (number, key, tenant, chunk_id) SELECT number, key, '', chunk_id FROM old_tombstones;;
UPDATE totals SET value = (SELECT value FROM old_totals WHERE old_totals.name = totals.name)
  WHERE name IN ('evictions', 'quarantined')
"""

# The old tables are put aside, the new ones made and filled; triggers count what comes in.
_FROM_1 = ";;\n".join(
    (
        *(f"DROP TRIGGER IF EXISTS {name}" for name in _TRIGGERS_1),
        *(f"DROP INDEX IF EXISTS {name}" for name in _INDEXES_1),
        *(f"ALTER TABLE {name} RENAME TO old_{name}" for name in _TABLES_1),
        SCHEMA,
        _COPY_1,
        *(f"DROP TABLE old_{name}" for name in _TABLES_1),
    )
)

_NEW_IN_3 = ("records_transient", "TABLE quarantine", "quarantine_in", "quarantine_out")
_NEW_IN_4 = ("TABLE uses", "uses_out")


def _statements(names: Sequence[str]) -> list[str]:
    return [statement for statement in SCHEMA.split(";;") if any(name in statement for name in names)]


_FROM_3 = ";;\n".join(_statements(_NEW_IN_4))
_FROM_2 = ";;\n".join(
    (
        "ALTER TABLE records ADD COLUMN transient INTEGER NOT NULL DEFAULT 0",
        "INSERT INTO totals VALUES ('quarantine_nbytes', 0)",
        *_statements(_NEW_IN_3),
        _FROM_3,
    )
)

MIGRATIONS: Mapping[int, str] = {1: _FROM_1, 2: _FROM_2, 3: _FROM_3}
