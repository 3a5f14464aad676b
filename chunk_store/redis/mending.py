"""What the Redis ledger keeps beside its rows, made anew from them: the lists by use, time, name, tag, chunk and model.

The rows are the hashes ``entry:KEY`` and ``record:SID``. Lists that were lost (deleted by hand, a partial restore)
would hide rows that are there, or name rows that are not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from chunk_store.redis.connection import RedisConnection

STEP_NAMES = 500

# ARGV: 1 to correct, keys. Returns how many rows are cut or stand in too few lists.
_ENTRIES = r"""
local wrong = 0
for i = 2, #ARGV do
  local key = ARGV[i]
  local e = redis.call('HMGET', P..'entry:'..key, 'blob', 'chunk', 'model', 'created', 'needs', 'stored', 'nbytes')
  if e[1] then
    local whole = e[2] and e[3] and e[4] and e[5] and e[6] and e[7]
    local listed = whole and redis.call('ZSCORE', P..'used', key)
    local tenant = whole and tenant_of(e[2]) or ''
    listed = listed and redis.call('SISMEMBER', P..'chunk:'..e[2], key) == 1
    listed = listed and redis.call('SISMEMBER', P..'model:'..e[3], key) == 1
    listed = listed and (tenant == '' or redis.call('SISMEMBER', P..'tenants', tenant) == 1)
    for needed in string.gmatch(e[5] or '', '%S+') do
      listed = listed and redis.call('SISMEMBER', P..'needs:'..needed, key) == 1
    end
    if not listed then
      wrong = wrong + 1
      if ARGV[1] == '1' and not whole then redis.call('DEL', P..'entry:'..key) end
      if ARGV[1] == '1' and whole then
        redis.call('ZADD', P..'used', 'NX', e[4], key)
        redis.call('SADD', P..'chunk:'..e[2], key)
        redis.call('SADD', P..'model:'..e[3], key)
        for needed in string.gmatch(e[5], '%S+') do redis.call('SADD', P..'needs:'..needed, key) end
        note(tenant)
      end
    end
  end
end
return wrong
"""

# ARGV: 1 to correct, SIDs. Returns how many rows are cut or stand in too few lists.
_RECORDS = r"""
local wrong = 0
for i = 2, #ARGV do
  local sid = ARGV[i]
  local tenant, id = tenant_of(sid), bare(sid)
  local row = P..'record:'..sid
  local r = redis.call('HMGET', row, 'name', 'tags', 'pinned', 'expires', 'created', 'tokens', 'tokenizer', 'type')
  if redis.call('EXISTS', row) == 1 then
    local whole = r[1] and r[2] and r[3] and r[4] and r[5] and r[6] and r[7] and r[8]
    local listed = whole and redis.call('ZSCORE', of(tenant, 'records_created'), id)
    listed = listed and redis.call('ZSCORE', of(tenant, 'records_used'), id)
    listed = listed and redis.call('ZSCORE', of(tenant, 'records_named'), r[1]..'\0'..id)
    listed = listed and redis.call('SISMEMBER', of(tenant, 'pinned'), id) == (r[3] == '1' and 1 or 0)
    listed = listed and (r[4] == '' or redis.call('ZSCORE', P..'expiring', sid))
    listed = listed and (tenant == '' or redis.call('SISMEMBER', P..'tenants', tenant) == 1)
    local transient = redis.call('HGET', row, 'transient') == '1'
    listed = listed and (not transient or redis.call('ZSCORE', P..'transient', sid))
    for _, tag in ipairs(cjson.decode(r[2] or '[]')) do
      listed = listed and redis.call('SISMEMBER', of(tenant, 'tag')..':'..tag, id) == 1
    end
    if not listed then
      wrong = wrong + 1
      if ARGV[1] == '1' and not whole then redis.call('DEL', row) end
      if ARGV[1] == '1' and whole then
        redis.call('ZADD', of(tenant, 'records_created'), 'NX', r[5], id)
        redis.call('ZADD', of(tenant, 'records_used'), 'NX', r[5], id)
        redis.call('ZADD', of(tenant, 'records_named'), 0, r[1]..'\0'..id)
        redis.call(r[3] == '1' and 'SADD' or 'SREM', of(tenant, 'pinned'), id)
        if r[4] ~= '' then redis.call('ZADD', P..'expiring', r[4], sid) end
        if transient then redis.call('ZADD', P..'transient', 'NX', r[5], sid) end
        for _, tag in ipairs(cjson.decode(r[2])) do redis.call('SADD', of(tenant, 'tag')..':'..tag, id) end
        note(tenant)
      end
    end
  end
end
return wrong
"""

# ARGV: 1 to correct, sets of keys. Returns how many of their members have no row.
_SETS = r"""
local wrong = 0
for i = 2, #ARGV do
  for _, key in ipairs(redis.call('SMEMBERS', P..ARGV[i])) do
    if redis.call('EXISTS', P..'entry:'..key) == 0 then
      wrong = wrong + 1
      if ARGV[1] == '1' then redis.call('SREM', P..ARGV[i], key) end
    end
  end
end
return wrong
"""

# ARGV: 1 to correct. Returns how many members of the sorted sets have no row.
_ORDERS = r"""
local wrong = 0
for _, key in ipairs(redis.call('ZRANGE', P..'used', 0, -1)) do
  if redis.call('EXISTS', P..'entry:'..key) == 0 then
    wrong = wrong + 1
    if ARGV[1] == '1' then redis.call('ZREM', P..'used', key) end
  end
end
for _, tenant in ipairs(tenants()) do
  for _, id in ipairs(redis.call('ZRANGE', of(tenant, 'records_created'), 0, -1)) do
    if redis.call('EXISTS', P..'record:'..sid_of(tenant, id)) == 0 then
      wrong = wrong + 1
      if ARGV[1] == '1' then
        redis.call('ZREM', of(tenant, 'records_created'), id)
        redis.call('ZREM', of(tenant, 'records_used'), id)
      end
    end
  end
end
return wrong
"""

_BY_KIND = {"entry:": _ENTRIES, "record:": _RECORDS, "chunk:": _SETS, "model:": _SETS, "needs:": _SETS}


def disagreements(connection: RedisConnection, *, correct: bool) -> int:
    """How many rows and members of lists disagree; with ``correct`` they agree afterwards. Raises
    ``StoreUnavailable``."""
    wrong = 0
    waiting: dict[str, list[str]] = {kind: [] for kind in _BY_KIND}

    def check(kind: str) -> int:
        names, waiting[kind] = waiting[kind], []
        return int(connection.run(_BY_KIND[kind], int(correct), *names)) if names else 0

    for name in names_below(connection, ""):
        kind = name[: name.find(":") + 1]
        if kind in _BY_KIND:
            waiting[kind].append(name.removeprefix(kind) if kind in ("entry:", "record:") else name)
            if len(waiting[kind]) == STEP_NAMES:
                wrong += check(kind)
    wrong += sum(check(kind) for kind in _BY_KIND)
    return wrong + int(connection.run(_ORDERS, int(correct)))


def names_below(connection: RedisConnection, start: str) -> Iterator[str]:
    """The names of this store that begin with ``start``, without its prefix. Raises ``StoreUnavailable``."""
    pattern = re.sub(r"([*?\[\]\\])", r"\\\1", connection.name(start)) + "*"
    with connection.errors():
        for name in connection.client.scan_iter(match=pattern, count=1000):
            yield name.decode(errors="replace").removeprefix(connection.prefix)
