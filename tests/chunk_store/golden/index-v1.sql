BEGIN TRANSACTION;
CREATE TABLE claims (
  key TEXT PRIMARY KEY, nonce TEXT NOT NULL, owner TEXT NOT NULL, expires_at REAL NOT NULL,
  reserved_nbytes INTEGER NOT NULL);
INSERT INTO "claims" VALUES('ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff','n','somebody',4000000000.0,1000);
CREATE TABLE entries (
  key TEXT PRIMARY KEY, blob TEXT NOT NULL, chunk_id TEXT NOT NULL, model TEXT NOT NULL, salt_digest TEXT NOT NULL,
  tokens INTEGER NOT NULL, nbytes INTEGER NOT NULL, stored_nbytes INTEGER NOT NULL,
  created_at REAL NOT NULL, last_used_at REAL NOT NULL, doomed INTEGER NOT NULL DEFAULT 0);
INSERT INTO "entries" VALUES('403068585bd1e3cc5f99e5574aae187c025e758301c758f2f9ad8f83ab5ef839','403068585bd1e3cc5f99e5574aae187c025e758301c758f2f9ad8f83ab5ef839.95524355441f9908','fdc7ec0a2a9edba6a9dfb45fb702972629993db56858706f3869a467bde5f351','model-1','',5,1120,5216,500.0,500.0,0);
INSERT INTO "entries" VALUES('9cb3afaac96e37a28df18ff5c98989291de329f8c60c605a9a72b494b9e5dcee','9cb3afaac96e37a28df18ff5c98989291de329f8c60c605a9a72b494b9e5dcee.96728d9373a0a5ed','fdc7ec0a2a9edba6a9dfb45fb702972629993db56858706f3869a467bde5f351','model-1','5ca70f8945fb171350b72b23a6406266fe68864801a59b0b2f5508bb9a2967c8',5,1120,5216,500.0,500.0,0);
INSERT INTO "entries" VALUES('31ab04a6c06999276a8d72c733ee8d55cb3830e5eadcce7ce7dad62770464258','31ab04a6c06999276a8d72c733ee8d55cb3830e5eadcce7ce7dad62770464258.1d8f16ae9a9e6375','352835f543f702b156b23a3cd67498907d9ba2f78f961034d523084d13ce032f','model-1','5ca70f8945fb171350b72b23a6406266fe68864801a59b0b2f5508bb9a2967c8',5,1120,5216,500.0,500.0,0);
INSERT INTO "entries" VALUES('e00ce0ab675a43bf5fc374b90162901fe7385a02615d7e582d0ade3621029716','e00ce0ab675a43bf5fc374b90162901fe7385a02615d7e582d0ade3621029716.5fbebce7eefc4efb','d5654410493f66e20a3564605b490b50f73cd631183da7cdc9011416e07daebd','model-1','',5,1120,5216,500.0,500.0,0);
CREATE TABLE garbage (blob TEXT PRIMARY KEY, nbytes INTEGER NOT NULL) WITHOUT ROWID;
INSERT INTO "garbage" VALUES('5a2d8d32afcbf05cc0a380fc89d5d92c32fca57b181823b815f1dc6c0bb3fd5d.18b7f8b8e5bf7582',5216);
CREATE TABLE leases (
  lease TEXT NOT NULL, key TEXT NOT NULL, expires_at REAL NOT NULL, PRIMARY KEY (key, lease)) WITHOUT ROWID;
INSERT INTO "leases" VALUES('l','5a2d8d32afcbf05cc0a380fc89d5d92c32fca57b181823b815f1dc6c0bb3fd5d',4000000000.0);
CREATE TABLE needs (
  chunk_id TEXT NOT NULL, key TEXT NOT NULL, PRIMARY KEY (chunk_id, key)) WITHOUT ROWID;
INSERT INTO "needs" VALUES('fdc7ec0a2a9edba6a9dfb45fb702972629993db56858706f3869a467bde5f351','31ab04a6c06999276a8d72c733ee8d55cb3830e5eadcce7ce7dad62770464258');
CREATE TABLE records (
  chunk_id TEXT PRIMARY KEY, tokenizer TEXT NOT NULL, type TEXT NOT NULL, token_ids BLOB NOT NULL,
  name TEXT NOT NULL, tags TEXT NOT NULL, pinned INTEGER NOT NULL,
  created_at REAL NOT NULL, last_used_at REAL NOT NULL, expires_at REAL);
INSERT INTO "records" VALUES('fdc7ec0a2a9edba6a9dfb45fb702972629993db56858706f3869a467bde5f351','tokenizer-1','context',X'E8030000E9030000EA030000EB030000EC030000','old','["t", "u"]',1,100.0,100.0,NULL);
INSERT INTO "records" VALUES('996e797bc3b37b44701897baa928fea6ebb96346a5c10af7dbaadb15fa399211','tokenizer-1','context',X'D0070000D1070000D2070000D3070000D4070000','child','[]',0,200.0,200.0,4000000000.0);
INSERT INTO "records" VALUES('d5654410493f66e20a3564605b490b50f73cd631183da7cdc9011416e07daebd','tokenizer-1','context',X'B80B0000B90B0000BA0B0000BB0B0000BC0B0000','','[]',0,300.0,300.0,NULL);
CREATE TABLE settings (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
INSERT INTO "settings" VALUES('capacity_nbytes',12345678);
INSERT INTO "settings" VALUES('records_max',77);
CREATE TABLE tags (tag TEXT NOT NULL, chunk_id TEXT NOT NULL, PRIMARY KEY (tag, chunk_id)) WITHOUT ROWID;
INSERT INTO "tags" VALUES('t','fdc7ec0a2a9edba6a9dfb45fb702972629993db56858706f3869a467bde5f351');
INSERT INTO "tags" VALUES('u','fdc7ec0a2a9edba6a9dfb45fb702972629993db56858706f3869a467bde5f351');
CREATE TABLE tombstones (
  number INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT NOT NULL UNIQUE, chunk_id TEXT NOT NULL);
INSERT INTO "tombstones" VALUES(1,'5a2d8d32afcbf05cc0a380fc89d5d92c32fca57b181823b815f1dc6c0bb3fd5d','996e797bc3b37b44701897baa928fea6ebb96346a5c10af7dbaadb15fa399211');
CREATE TABLE totals (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
INSERT INTO "totals" VALUES('claim_nbytes',1000);
INSERT INTO "totals" VALUES('entries',4);
INSERT INTO "totals" VALUES('entry_nbytes',20864);
INSERT INTO "totals" VALUES('evictions',1);
INSERT INTO "totals" VALUES('garbage_nbytes',5216);
INSERT INTO "totals" VALUES('quarantined',0);
INSERT INTO "totals" VALUES('records',3);
INSERT INTO "totals" VALUES('tombstones',1);
CREATE INDEX records_created ON records (created_at, chunk_id);
CREATE INDEX records_used ON records (last_used_at, chunk_id);
CREATE INDEX records_named ON records (name, chunk_id);
CREATE INDEX records_expiring ON records (expires_at) WHERE expires_at IS NOT NULL;
CREATE INDEX records_pinned ON records (chunk_id) WHERE pinned;
CREATE INDEX tags_chunk ON tags (chunk_id);
CREATE INDEX entries_used ON entries (last_used_at, key);
CREATE INDEX entries_chunk ON entries (chunk_id, model);
CREATE INDEX entries_model ON entries (model);
CREATE INDEX entries_doomed ON entries (key) WHERE doomed;
CREATE INDEX needs_key ON needs (key);
CREATE INDEX leases_expiring ON leases (expires_at);
CREATE TRIGGER records_in AFTER INSERT ON records BEGIN
  UPDATE totals SET value = value + 1 WHERE name = 'records'; END;
CREATE TRIGGER records_out AFTER DELETE ON records BEGIN
  UPDATE totals SET value = value - 1 WHERE name = 'records'; DELETE FROM tags WHERE chunk_id = OLD.chunk_id; END;
CREATE TRIGGER entries_in AFTER INSERT ON entries BEGIN
  UPDATE totals SET value = value + 1 WHERE name = 'entries';
  UPDATE totals SET value = value + NEW.stored_nbytes WHERE name = 'entry_nbytes'; END;
CREATE TRIGGER entries_out AFTER DELETE ON entries BEGIN
  UPDATE totals SET value = value - 1 WHERE name = 'entries';
  UPDATE totals SET value = value - OLD.stored_nbytes WHERE name = 'entry_nbytes';
  INSERT OR IGNORE INTO garbage VALUES (OLD.blob, OLD.stored_nbytes);
  DELETE FROM needs WHERE key = OLD.key; DELETE FROM leases WHERE key = OLD.key; END;
CREATE TRIGGER claims_in AFTER INSERT ON claims BEGIN
  UPDATE totals SET value = value + NEW.reserved_nbytes WHERE name = 'claim_nbytes'; END;
CREATE TRIGGER claims_change AFTER UPDATE OF reserved_nbytes ON claims BEGIN
  UPDATE totals SET value = value + NEW.reserved_nbytes - OLD.reserved_nbytes WHERE name = 'claim_nbytes'; END;
CREATE TRIGGER claims_out AFTER DELETE ON claims BEGIN
  UPDATE totals SET value = value - OLD.reserved_nbytes WHERE name = 'claim_nbytes'; END;
CREATE TRIGGER garbage_in AFTER INSERT ON garbage BEGIN
  UPDATE totals SET value = value + NEW.nbytes WHERE name = 'garbage_nbytes'; END;
CREATE TRIGGER garbage_out AFTER DELETE ON garbage BEGIN
  UPDATE totals SET value = value - OLD.nbytes WHERE name = 'garbage_nbytes'; END;
CREATE TRIGGER tombstones_in AFTER INSERT ON tombstones BEGIN
  UPDATE totals SET value = value + 1 WHERE name = 'tombstones'; END;
CREATE TRIGGER tombstones_out AFTER DELETE ON tombstones BEGIN
  UPDATE totals SET value = value - 1 WHERE name = 'tombstones'; END;
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('tombstones',1);
COMMIT;
PRAGMA user_version = 1;
