"""The tables of the embedded store's index. ``docs/store_format.md`` explains them; statements end with ``;;``.

``totals`` and ``tenants`` are kept by triggers, so that counts and sizes cost the same for ten entries and a hundred
thousand, and cannot drift from the rows they count.

A change of the tables is a new ``INDEX_VERSION``: ``SCHEMA`` makes it, ``upgrade.py`` brings an older index to it, and
a newer index than this is refused.
"""

SCHEMA = """
CREATE TABLE settings (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;;
CREATE TABLE totals (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;;
INSERT INTO totals VALUES
  ('records', 0), ('entries', 0), ('entry_nbytes', 0), ('claim_nbytes', 0), ('garbage_nbytes', 0),
  ('evictions', 0), ('quarantined', 0), ('tombstones', 0), ('quarantine_nbytes', 0);;
CREATE TABLE tenants (
  tenant TEXT PRIMARY KEY, records INTEGER NOT NULL DEFAULT 0, pinned INTEGER NOT NULL DEFAULT 0,
  entries INTEGER NOT NULL DEFAULT 0, nbytes INTEGER NOT NULL DEFAULT 0) WITHOUT ROWID;;

CREATE TABLE records (
  tenant TEXT NOT NULL, chunk_id TEXT NOT NULL, tokenizer TEXT NOT NULL, type TEXT NOT NULL, token_ids BLOB NOT NULL,
  name TEXT NOT NULL, tags TEXT NOT NULL, pinned INTEGER NOT NULL,
  created_at REAL NOT NULL, last_used_at REAL NOT NULL, expires_at REAL,
  transient INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (tenant, chunk_id));;
CREATE INDEX records_created ON records (tenant, created_at, chunk_id);;
CREATE INDEX records_used ON records (tenant, last_used_at, chunk_id);;
CREATE INDEX records_named ON records (tenant, name, chunk_id);;
CREATE INDEX records_expiring ON records (expires_at) WHERE expires_at IS NOT NULL;;
CREATE INDEX records_pinned ON records (tenant, chunk_id) WHERE pinned;;
CREATE INDEX records_transient ON records (last_used_at, chunk_id) WHERE transient AND NOT pinned;;
CREATE TABLE tags (
  tenant TEXT NOT NULL, tag TEXT NOT NULL, chunk_id TEXT NOT NULL, PRIMARY KEY (tenant, tag, chunk_id)) WITHOUT ROWID;;
CREATE INDEX tags_chunk ON tags (tenant, chunk_id);;
CREATE TABLE uses (
  tenant TEXT NOT NULL, chunk_id TEXT NOT NULL, user TEXT NOT NULL, count INTEGER NOT NULL,
  PRIMARY KEY (tenant, chunk_id, user)) WITHOUT ROWID;;

CREATE TABLE entries (
  key TEXT PRIMARY KEY, blob TEXT NOT NULL, chunk_id TEXT NOT NULL, model TEXT NOT NULL, tenant TEXT NOT NULL,
  tokens INTEGER NOT NULL, nbytes INTEGER NOT NULL, stored_nbytes INTEGER NOT NULL,
  created_at REAL NOT NULL, last_used_at REAL NOT NULL, doomed INTEGER NOT NULL DEFAULT 0);;
CREATE INDEX entries_used ON entries (last_used_at, key);;
CREATE INDEX entries_chunk ON entries (tenant, chunk_id, model);;
CREATE INDEX entries_model ON entries (model);;
CREATE INDEX entries_doomed ON entries (key) WHERE doomed;;
CREATE TABLE needs (
  tenant TEXT NOT NULL, chunk_id TEXT NOT NULL, key TEXT NOT NULL, PRIMARY KEY (tenant, chunk_id, key)) WITHOUT ROWID;;
CREATE INDEX needs_key ON needs (key);;

CREATE TABLE claims (
  key TEXT PRIMARY KEY, nonce TEXT NOT NULL, owner TEXT NOT NULL, expires_at REAL NOT NULL,
  reserved_nbytes INTEGER NOT NULL, tenant TEXT NOT NULL DEFAULT '');;
CREATE TABLE leases (
  lease TEXT NOT NULL, key TEXT NOT NULL, expires_at REAL NOT NULL, PRIMARY KEY (key, lease)) WITHOUT ROWID;;
CREATE INDEX leases_expiring ON leases (expires_at);;
CREATE TABLE garbage (blob TEXT PRIMARY KEY, nbytes INTEGER NOT NULL) WITHOUT ROWID;;
CREATE TABLE quarantine (blob TEXT PRIMARY KEY, nbytes INTEGER NOT NULL, since REAL NOT NULL) WITHOUT ROWID;;
CREATE TABLE tombstones (
  number INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT NOT NULL UNIQUE, tenant TEXT NOT NULL, chunk_id TEXT NOT NULL);;

CREATE TRIGGER records_in AFTER INSERT ON records BEGIN
  UPDATE totals SET value = value + 1 WHERE name = 'records';
  INSERT INTO tenants (tenant) SELECT NEW.tenant WHERE NOT EXISTS (SELECT 1 FROM tenants WHERE tenant = NEW.tenant);
  UPDATE tenants SET records = records + 1, pinned = pinned + NEW.pinned WHERE tenant = NEW.tenant; END;;
CREATE TRIGGER records_pin AFTER UPDATE OF pinned ON records BEGIN
  UPDATE tenants SET pinned = pinned + NEW.pinned - OLD.pinned WHERE tenant = NEW.tenant; END;;
CREATE TRIGGER records_out AFTER DELETE ON records BEGIN
  UPDATE totals SET value = value - 1 WHERE name = 'records';
  UPDATE tenants SET records = records - 1, pinned = pinned - OLD.pinned WHERE tenant = OLD.tenant;
  DELETE FROM tags WHERE tenant = OLD.tenant AND chunk_id = OLD.chunk_id; END;;
CREATE TRIGGER uses_out AFTER DELETE ON records BEGIN
  DELETE FROM uses WHERE tenant = OLD.tenant AND chunk_id = OLD.chunk_id; END;;
CREATE TRIGGER entries_in AFTER INSERT ON entries BEGIN
  UPDATE totals SET value = value + 1 WHERE name = 'entries';
  UPDATE totals SET value = value + NEW.stored_nbytes WHERE name = 'entry_nbytes';
  INSERT INTO tenants (tenant) SELECT NEW.tenant WHERE NOT EXISTS (SELECT 1 FROM tenants WHERE tenant = NEW.tenant);
  UPDATE tenants SET entries = entries + 1, nbytes = nbytes + NEW.stored_nbytes WHERE tenant = NEW.tenant; END;;
CREATE TRIGGER entries_out AFTER DELETE ON entries BEGIN
  UPDATE totals SET value = value - 1 WHERE name = 'entries';
  UPDATE totals SET value = value - OLD.stored_nbytes WHERE name = 'entry_nbytes';
  UPDATE tenants SET entries = entries - 1, nbytes = nbytes - OLD.stored_nbytes WHERE tenant = OLD.tenant;
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
CREATE TRIGGER quarantine_in AFTER INSERT ON quarantine BEGIN
  UPDATE totals SET value = value + NEW.nbytes WHERE name = 'quarantine_nbytes'; END;;
CREATE TRIGGER quarantine_out AFTER DELETE ON quarantine BEGIN
  UPDATE totals SET value = value - OLD.nbytes WHERE name = 'quarantine_nbytes'; END;;
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
    "quarantine_nbytes": "SELECT COALESCE(SUM(nbytes), 0) FROM quarantine",
    "tombstones": "SELECT COUNT(*) FROM tombstones",
}

TENANTS = """
SELECT tenant, SUM(records), SUM(pinned), SUM(entries), SUM(nbytes) FROM (
  SELECT tenant, COUNT(*) AS records, SUM(pinned) AS pinned, 0 AS entries, 0 AS nbytes FROM records GROUP BY tenant
  UNION ALL SELECT tenant, 0, 0, COUNT(*), SUM(stored_nbytes) FROM entries GROUP BY tenant)
GROUP BY tenant
"""
