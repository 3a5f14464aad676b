"""What all scripts of the Redis ledger begin with: the names of things, space, claims, eviction.

Names under the prefix:

    settings, totals                     hashes
    record:SID                           hash; expiring: sorted set of SIDs; transient: of SIDs by last use
    records_created, records_used,
    records_named, pinned, tag:TAG       of one tenant, of chunk ids: sorted sets and sets
    uses:SID                             hash tenant -> how often it used that record
    entry:KEY                            hash; used: sorted set (eviction order); chunk:SID, model:M, needs:SID: sets
    doomed                               set of keys that were deleted under a lease
    claim:KEY                            hash; claims: sorted set by expiry
    leases:KEY                           sorted set lease -> expiry; leased: sorted set of keys by expiry
    garbage                              hash blob -> bytes
    tombstones, buried                   sorted set and hash of evicted keys
    tenants                              set of the tenants that have anything, but the default one

A chunk of the default tenant is known by its id, of another by TENANT/ID: the SID above. The names of what belongs to
one tenant have @TENANT behind their first word, for the default tenant nothing; so the names of a store from before
there were tenants are those of the default tenant. ``totals`` has entries@TENANT and entry_nbytes@TENANT for all.
"""

from chunk_store.ledger import TOMBSTONES_MAX

PRELUDE = (
    "#!lua flags=allow-oom\n"  # metadata is small, and a full server must still be able to evict
    f"local TOMBSTONES_MAX = {TOMBSTONES_MAX}\n"
    + r"""
local P = KEYS[1]
local clock = redis.call('TIME')
local now = clock[1] + clock[2] / 1000000
local function num(x) return string.format('%.6f', x) end
local function int(x) return string.format('%d', x) end
local function total(name) return tonumber(redis.call('HGET', P..'totals', name) or 0) end
local function add(name, by) redis.call('HINCRBY', P..'totals', name, int(by)) end
local function setting(name) return tonumber(redis.call('HGET', P..'settings', name)) end
local function leased(key) return redis.call('ZCOUNT', P..'leases:'..key, '('..num(now), '+inf') > 0 end
local function tenant_of(sid) return string.match(sid, '^(.*)/') or '' end
local function bare(sid) return string.match(sid, '^.*/(.*)$') or sid end
local function sid_of(tenant, id) return tenant == '' and id or tenant..'/'..id end
local function of(tenant, name) return P..name..(tenant == '' and '' or '@'..tenant) end
local function has_lease(sid)
  for _, key in ipairs(redis.call('SMEMBERS', P..'chunk:'..sid)) do
    if leased(key) then return true end
  end
  return false
end
local function is_pinned(sid) return redis.call('SISMEMBER', of(tenant_of(sid), 'pinned'), bare(sid)) == 1 end
local function add_for(tenant, name, by) add(name, by); add(name..'@'..tenant, by) end
local function tenants()
  local all = redis.call('SMEMBERS', P..'tenants')
  all[#all + 1] = ''
  return all
end
local function note(tenant) if tenant ~= '' then redis.call('SADD', P..'tenants', tenant) end end
local function space() return total('entry_nbytes') + total('claim_nbytes') + total('garbage_nbytes') end
local function garbage() return redis.call('HKEYS', P..'garbage') end

local function trash(blob, nbytes)
  if redis.call('HSETNX', P..'garbage', blob, int(nbytes)) == 1 then add('garbage_nbytes', nbytes) end
end

local function unbury(key)
  redis.call('ZREM', P..'tombstones', key)
  redis.call('HDEL', P..'buried', key)
end

local function bury(key, chunk)
  redis.call('ZADD', P..'tombstones', redis.call('HINCRBY', P..'totals', 'tombstone_number', 1), key)
  redis.call('HSET', P..'buried', key, chunk)
  local over = redis.call('ZCARD', P..'tombstones') - TOMBSTONES_MAX
  if over > 0 then
    local old = redis.call('ZPOPMIN', P..'tombstones', over)
    for i = 1, #old, 2 do redis.call('HDEL', P..'buried', old[i]) end
  end
end

local function drop_entry(key)
  local e = redis.call('HMGET', P..'entry:'..key, 'blob', 'chunk', 'model', 'stored', 'nbytes', 'needs', 'salt')
  if not e[1] then return nil end
  for chunk in string.gmatch(e[6], '%S+') do redis.call('SREM', P..'needs:'..chunk, key) end
  redis.call('SREM', P..'chunk:'..e[2], key)
  redis.call('SREM', P..'model:'..e[3], key)
  redis.call('SREM', P..'doomed', key)
  redis.call('ZREM', P..'used', key)
  redis.call('ZREM', P..'leased', key)
  redis.call('DEL', P..'entry:'..key, P..'leases:'..key)
  add_for(e[7], 'entries', -1)
  add_for(e[7], 'entry_nbytes', -tonumber(e[4]))
  trash(e[1], tonumber(e[4]))
  return {chunk = e[2], stored = tonumber(e[4]), nbytes = tonumber(e[5])}
end

local function evict_entry(key)
  local e = drop_entry(key)
  if e then
    add('evictions', 1)
    bury(key, e.chunk)
  end
  return e
end

local function victims(nbytes)
  local found, freed, start = {}, 0, 0
  while freed < nbytes do
    local keys = redis.call('ZRANGE', P..'used', start, start + 63)
    if #keys == 0 then break end
    for _, key in ipairs(keys) do
      if freed < nbytes and not leased(key) then
        local e = redis.call('HMGET', P..'entry:'..key, 'chunk', 'stored')
        if not is_pinned(e[1]) then
          found[#found + 1] = key
          freed = freed + tonumber(e[2])
        end
      end
    end
    start = start + 64
  end
  return found, freed
end

local function evict(nbytes)
  local found, freed = victims(nbytes)
  for _, key in ipairs(found) do evict_entry(key) end
  return freed
end

local function drop_doomed(key)
  if redis.call('SISMEMBER', P..'doomed', key) == 1 and not leased(key) then drop_entry(key) end
end

local function discard(blob)
  local nbytes = redis.call('HGET', P..'garbage', blob)
  if nbytes then
    redis.call('HDEL', P..'garbage', blob)
    add('garbage_nbytes', -tonumber(nbytes))
  end
end

local function claim_is(key, nonce) return redis.call('HGET', P..'claim:'..key, 'nonce') == nonce end

local function end_claim(key)
  local reserved = redis.call('HGET', P..'claim:'..key, 'reserved')
  if reserved then add('claim_nbytes', -tonumber(reserved)) end
  redis.call('DEL', P..'claim:'..key)
  redis.call('ZREM', P..'claims', key)
end

local function break_claim(key)
  local c = redis.call('HMGET', P..'claim:'..key, 'nonce', 'reserved')
  if c[1] then
    end_claim(key)
    trash(key..'.'..c[1], tonumber(c[2]))
  end
end

local function drop_record(sid)
  local r = redis.call('HMGET', P..'record:'..sid, 'name', 'tags')
  if not r[1] then return 0 end
  local tenant, id = tenant_of(sid), bare(sid)
  for _, tag in ipairs(cjson.decode(r[2])) do redis.call('SREM', of(tenant, 'tag')..':'..tag, id) end
  redis.call('ZREM', of(tenant, 'records_created'), id)
  redis.call('ZREM', of(tenant, 'records_used'), id)
  redis.call('ZREM', of(tenant, 'records_named'), r[1]..'\0'..id)
  redis.call('SREM', of(tenant, 'pinned'), id)
  redis.call('ZREM', P..'expiring', sid)
  redis.call('ZREM', P..'transient', sid)
  redis.call('DEL', P..'record:'..sid, P..'uses:'..sid)
  add('records', -1)
  return 1
end

local function is_live(sid)
  local r = redis.call('HMGET', P..'record:'..sid, 'pinned', 'expires')
  if not r[1] then return false end
  return r[1] == '1' or r[2] == '' or tonumber(r[2]) > now
end

local function remove_expired()
  local removed = 0
  local expired = redis.call('ZRANGEBYSCORE', P..'expiring', '-inf', num(now))
  for _, id in ipairs(expired) do
    if not is_pinned(id) then
      for _, key in ipairs(redis.call('SMEMBERS', P..'chunk:'..id)) do
        if not leased(key) then evict_entry(key) end
      end
    end
  end
  for _, id in ipairs(expired) do  -- only now is it known what the entries of others still need
    if not is_pinned(id) then
      if redis.call('EXISTS', P..'chunk:'..id, P..'needs:'..id) == 0 then removed = removed + drop_record(id) end
    end
  end
  return removed
end

local function reserved_by(tenant, but)
  local sum = 0
  for _, key in ipairs(redis.call('ZRANGE', P..'claims', 0, -1)) do
    local c = redis.call('HMGET', P..'claim:'..key, 'reserved', 'tenant')
    if key ~= but and (c[2] or '') == tenant then sum = sum + tonumber(c[1] or 0) end
  end
  return sum
end

local function delete_entries(set)
  local count, nbytes = 0, 0
  for _, key in ipairs(redis.call('SMEMBERS', set)) do
    if redis.call('SADD', P..'doomed', key) == 1 then
      count = count + 1
      nbytes = nbytes + tonumber(redis.call('HGET', P..'entry:'..key, 'nbytes'))
    end
    drop_doomed(key)
  end
  return count, nbytes
end
"""
)
