"""The tables of the embedded store's index. ``docs/store_format.md`` explains them; statements end with ``;;``.

``totals`` is kept by triggers, so that counts and sizes cost the same for ten entries and a hundred thousand, and
cannot drift from the rows they count.

A change of the tables is a new version: ``SCHEMA`` makes it, ``MIGRATIONS`` brings an older index to it, and a newer
index than this is refused.
"""

from collections.abc import Mapping

SCHEMA_VERSION = 1

MIGRATIONS: Mapping[int, str] = {}  # from this version to the next; statements end with ``;;``

SCHEMA = """
CREATE TABLE settings (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;;
CREATE TABLE totals (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;;
INSERT INTO totals VALUES
  ('records', 0), ('entries', 0), ('entry_nbytes', 0), ('claim_nbytes', 0), ('garbage_nbytes', 0),
  ('evictions', 0), ('quarantined', 0), ('tombstones', 0);;

CREATE TABLE records (
  chunk_id TEXT PRIMARY KEY, tokenizer TEXT NOT NULL, type TEXT NOT NULL, token_ids BLOB NOT NULL,
  name TEXT NOT NULL, tags TEXT NOT NULL, pinned INTEGER NOT NULL,
  created_at REAL NOT NULL, last_used_at REAL NOT NULL, expires_at REAL);;
CREATE INDEX records_created ON records (created_at, chunk_id);;
CREATE INDEX records_used ON records (last_used_at, chunk_id);;
CREATE INDEX records_named ON records (name, chunk_id);;
CREATE INDEX records_expiring ON records (expires_at) WHERE expires_at IS NOT NULL;;
CREATE INDEX records_pinned ON records (chunk_id) WHERE pinned;;
CREATE TABLE tags (tag TEXT NOT NULL, chunk_id TEXT NOT NULL, PRIMARY KEY (tag, chunk_id)) WITHOUT ROWID;;
CREATE INDEX tags_chunk ON tags (chunk_id);;

CREATE TABLE entries (
  key TEXT PRIMARY KEY, blob TEXT NOT NULL, chunk_id TEXT NOT NULL, model TEXT NOT NULL, salt_digest TEXT NOT NULL,
  tokens INTEGER NOT NULL, nbytes INTEGER NOT NULL, stored_nbytes INTEGER NOT NULL,
  created_at REAL NOT NULL, last_used_at REAL NOT NULL, doomed INTEGER NOT NULL DEFAULT 0);;
CREATE INDEX entries_used ON entries (last_used_at, key);;
CREATE INDEX entries_chunk ON entries (chunk_id, model);;
CREATE INDEX entries_model ON entries (model);;
CREATE INDEX entries_doomed ON entries (key) WHERE doomed;;
CREATE TABLE needs (
  chunk_id TEXT NOT NULL, key TEXT NOT NULL, PRIMARY KEY (chunk_id, key)) WITHOUT ROWID;;
CREATE INDEX needs_key ON needs (key);;

CREATE TABLE claims (
  key TEXT PRIMARY KEY, nonce TEXT NOT NULL, owner TEXT NOT NULL, expires_at REAL NOT NULL,
  reserved_nbytes INTEGER NOT NULL);;
CREATE TABLE leases (
  lease TEXT NOT NULL, key TEXT NOT NULL, expires_at REAL NOT NULL, PRIMARY KEY (key, lease)) WITHOUT ROWID;;
CREATE INDEX leases_expiring ON leases (expires_at);;
CREATE TABLE garbage (blob TEXT PRIMARY KEY, nbytes INTEGER NOT NULL) WITHOUT ROWID;;
CREATE TABLE tombstones (
  number INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT NOT NULL UNIQUE, chunk_id TEXT NOT NULL);;

CREATE TRIGGER records_in AFTER INSERT ON records BEGIN
  UPDATE totals SET value = value + 1 WHERE name = 'records'; END;;
CREATE TRIGGER records_out AFTER DELETE ON records BEGIN
  UPDATE totals SET value = value - 1 WHERE name = 'records'; DELETE FROM tags WHERE chunk_id = OLD.chunk_id; END;;
CREATE TRIGGER entries_in AFTER INSERT ON entries BEGIN
  UPDATE totals SET value = value + 1 WHERE name = 'entries';
  UPDATE totals SET value = value + NEW.stored_nbytes WHERE name = 'entry_nbytes'; END;;
CREATE TRIGGER entries_out AFTER DELETE ON entries BEGIN
  UPDATE totals SET value = value - 1 WHERE name = 'entries';
  UPDATE totals SET value = value - OLD.stored_nbytes WHERE name = 'entry_nbytes';
  INSERT OR IGNORE INTO garbage VALUES (OLD.blob, OLD.stored_nbytes);
  DELETE FROM needs WHERE key = OLD.key; DELETE FROM leases WHERE key = OLD.key; END;;
CREATE TRIGGER claims_in AFTER INSERT ON claims BEGIN
  UPDATE totals SET value = value + NEW.reserved_nbytes WHERE name = 'claim_nbytes'; END;;
CREATE TRIGGER claims_change AFTER UPDATE OF reserved_nbytes ON claims BEGIN
  UPDATE totals SET value = value + NEW.reserved_nbytes - OLD.reserved_nbytes WHERE name = 'claim_nbytes'; END;;
CREATE TRIGGER claims_out AFTER DELETE ON claims BEGIN
  UPDATE totals SET value = value - OLD.reserved_nbytes WHERE name = 'claim_nbytes'; END;;
CREATE TRIGGER garbage_in AFTER INSERT ON garbage BEGIN
  UPDATE totals SET value = value + NEW.nbytes WHERE name = 'garbage_nbytes'; END;;
CREATE TRIGGER garbage_out AFTER DELETE ON garbage BEGIN
  UPDATE totals SET value = value - OLD.nbytes WHERE name = 'garbage_nbytes'; END;;
CREATE TRIGGER tombstones_in AFTER INSERT ON tombstones BEGIN
  UPDATE totals SET value = value + 1 WHERE name = 'tombstones'; END;;
CREATE TRIGGER tombstones_out AFTER DELETE ON tombstones BEGIN
  UPDATE totals SET value = value - 1 WHERE name = 'tombstones'; END
"""

TOTALS = {
    "records": "SELECT COUNT(*) FROM records",
    "entries": "SELECT COUNT(*) FROM entries",
    "entry_nbytes": "SELECT COALESCE(SUM(stored_nbytes), 0) FROM entries",
    "claim_nbytes": "SELECT COALESCE(SUM(reserved_nbytes), 0) FROM claims",
    "garbage_nbytes": "SELECT COALESCE(SUM(nbytes), 0) FROM garbage",
    "tombstones": "SELECT COUNT(*) FROM tombstones",
}
