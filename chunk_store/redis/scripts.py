"""The atomic steps of the Redis ledger, as Lua scripts that the server runs one at a time.

Each may run twice, when the connection broke before its answer came; the second run then answers like the first.

Time is the server's, so machines with different clocks agree. Every script gets the store's prefix as KEYS[1] and
builds the other names from it: one Redis server, not a cluster. What they share, and the names of things, is in
``redis_prelude.py``.
"""

# ARGV: records_max, a tenant's records and pins at most ("" for any number), then for each record: SID, tokenizer,
# type, token ids, name, tags (JSON), pinned, created, used, expires ("" for none), transient.
# Returns 'full', 'records' or 'pins' when there is no room for all, else 1 for new and 0 for known, one each.
PUT_RECORDS = r"""
local width, first, added, news, given = 11, 4, {}, {}, {}
local registry_max = setting('records_max') or tonumber(ARGV[1])
local records_max, pins_max = tonumber(ARGV[2]), tonumber(ARGV[3])
for at = first, #ARGV, width do
  given[ARGV[at]] = true
  if not is_live(ARGV[at]) and not news[ARGV[at]] then news[ARGV[at]] = true; added[#added + 1] = 1
  else added[#added + 1] = 0 end
end
-- How many rows there will be more, by tenant, and by how many that exceeds the registry.
local function needed()
  local more, sum = {}, 0
  for sid in pairs(news) do
    if redis.call('EXISTS', P..'record:'..sid) == 0 then
      more[tenant_of(sid)] = (more[tenant_of(sid)] or 0) + 1
      sum = sum + 1
    end
  end
  return more, sum == 0 and 0 or total('records') + sum - registry_max
end
-- Chooses up to `count` more records of content that only passed through, least recently used first; returns how many.
local chosen, chosen_of = {}, {}
local function choose(count, wanted)
  local got, start = 0, 0
  while got < count do
    local sids = redis.call('ZRANGE', P..'transient', start, start + 63)
    if #sids == 0 then break end
    for _, sid in ipairs(sids) do
      local tenant = tenant_of(sid)
      local free = not chosen[sid] and not given[sid] and not is_pinned(sid) and not has_lease(sid)
      if got < count and (wanted == nil or wanted == tenant) and free then
        chosen[sid] = true
        chosen_of[tenant] = (chosen_of[tenant] or 0) + 1
        got = got + 1
      end
    end
    start = start + 64
  end
  return got
end
local function left_of(tenant) return redis.call('ZCARD', of(tenant, 'records_created')) - (chosen_of[tenant] or 0) end
-- Whether the registry may be exceeded by `over` records; ChunkStore.put_records says when.
local function within_shares(more, over)
  local holders = 0
  for _ in pairs(more) do holders = holders + 1 end
  for _, tenant in ipairs(tenants()) do
    if not more[tenant] and left_of(tenant) > 0 then holders = holders + 1 end
  end
  local share = math.max(1, math.floor(registry_max / holders))
  for tenant, count in pairs(more) do
    if left_of(tenant) + count > share then return false end
  end
  return over <= registry_max
end
local more_records, extra = needed()
if extra > 0 then
  remove_expired()
  more_records, extra = needed()
end
if extra > 0 then
  local over = extra - choose(extra)
  if over > 0 and not within_shares(more_records, over) then return 'full' end
end
local more_pins, seen_pin = {}, {}
for at = first, #ARGV, width do
  local sid, tenant = ARGV[at], tenant_of(ARGV[at])
  if ARGV[at+6] == '1' and not is_pinned(sid) and not seen_pin[sid] then
    more_pins[tenant] = (more_pins[tenant] or 0) + 1
  end
  seen_pin[sid] = true
end
for tenant, more in pairs(more_records) do
  local beyond = records_max and left_of(tenant) + more - records_max or 0
  if beyond > 0 and choose(beyond, tenant) < beyond then return 'records' end
end
for tenant, more in pairs(more_pins) do
  if pins_max and redis.call('SCARD', of(tenant, 'pinned')) + more > pins_max then return 'pins' end
end
for sid in pairs(chosen) do drop_record(sid) end
local i = 0
local function put(at)
  i = i + 1
  local sid, name, tags, pin, expires = ARGV[at], ARGV[at+4], cjson.decode(ARGV[at+5]), ARGV[at+6], ARGV[at+9]
  local tenant, id = tenant_of(sid), bare(sid)
  local record, transient = P..'record:'..sid, ARGV[at+10]
  if added[i] == 0 and transient == '1' then
    redis.call('ZADD', of(tenant, 'records_used'), 'XX', 'GT', num(now), id)
    redis.call('ZADD', P..'transient', 'XX', 'GT', num(now), sid)
    return
  end
  note(tenant)
  local seen, merged = {}, {}
  if added[i] == 1 then
    drop_record(sid)
    local created = ARGV[at+7]
    if tonumber(created) == 0 then created = num(now) end
    local used = ARGV[at+8]
    if tonumber(used) == 0 then used = created end
    redis.call('HSET', record, 'tokenizer', ARGV[at+1], 'type', ARGV[at+2], 'tokens', ARGV[at+3], 'created', created)
    redis.call('ZADD', of(tenant, 'records_created'), created, id)
    redis.call('ZADD', of(tenant, 'records_used'), used, id)
    if transient == '1' then redis.call('ZADD', P..'transient', used, sid) end
    add('records', 1)
  else
    local old = redis.call('HMGET', record, 'name', 'tags')
    redis.call('ZREM', of(tenant, 'records_named'), old[1]..'\0'..id)
    redis.call('ZREM', P..'transient', sid)
    if name == '' then name = old[1] end
    for _, tag in ipairs(cjson.decode(old[2])) do seen[tag] = true; merged[#merged + 1] = tag end
  end
  for _, tag in ipairs(tags) do
    if not seen[tag] then seen[tag] = true; merged[#merged + 1] = tag end
    redis.call('SADD', of(tenant, 'tag')..':'..tag, id)
  end
  local text = #merged == 0 and '[]' or cjson.encode(merged)
  redis.call('HSET', record, 'name', name, 'tags', text, 'pinned', pin, 'expires', expires, 'transient', transient)
  redis.call('ZADD', of(tenant, 'records_named'), 0, name..'\0'..id)
  redis.call(pin == '1' and 'SADD' or 'SREM', of(tenant, 'pinned'), id)
  if expires == '' then redis.call('ZREM', P..'expiring', sid) else redis.call('ZADD', P..'expiring', expires, sid) end
end
for at = first, #ARGV, width do put(at) end
return added
"""

# ARGV: 1 or 0, the tenant, its pins at most ("" for any number), chunk ids.
# Returns 1 or 0 for each: known; or 'pins' when there would be too many.
SET_PINNED = r"""
local tenant, known, more = ARGV[2], {}, {}
local added = 0
for i = 4, #ARGV do
  local sid = sid_of(tenant, ARGV[i])
  known[i - 3] = is_live(sid) and 1 or 0
  if known[i - 3] == 1 and not is_pinned(sid) and not more[sid] then more[sid] = true; added = added + 1 end
end
local most = tonumber(ARGV[3])
local full = most and redis.call('SCARD', of(tenant, 'pinned')) + added > most
if ARGV[1] == '1' and added > 0 and full then return 'pins' end
for i = 4, #ARGV do
  if known[i - 3] == 1 then
    redis.call('HSET', P..'record:'..sid_of(tenant, ARGV[i]), 'pinned', ARGV[1])
    redis.call(ARGV[1] == '1' and 'SADD' or 'SREM', of(tenant, 'pinned'), ARGV[i])
  end
end
return known
"""

# ARGV: key, reader's token, seconds. Returns the blob, or 'EVICTED' / 'NOT_STORED' behind a 0.
BEGIN_READ = r"""
local key = ARGV[1]
local e = redis.call('HMGET', P..'entry:'..key, 'blob', 'chunk')
local readable = e[1] and (redis.call('SISMEMBER', P..'doomed', key) == 0 or leased(key))
if not readable then return {0, redis.call('HEXISTS', P..'buried', key) == 1 and 'EVICTED' or 'NOT_STORED'} end
redis.call('ZADD', P..'used', num(now), key)
if redis.call('EXISTS', P..'record:'..e[2]) == 1 then
  redis.call('ZADD', of(tenant_of(e[2]), 'records_used'), num(now), bare(e[2]))
  redis.call('ZADD', P..'transient', 'XX', num(now), e[2])
end
redis.call('ZADD', P..'leases:'..key, num(now + ARGV[3]), ARGV[2])
redis.call('ZADD', P..'leased', 'GT', num(now + ARGV[3]), key)
return {1, e[1]}
"""

# ARGV: lease, keys. Ends a lease on the given keys.
UNHOLD = r"""
for i = 2, #ARGV do
  local key = ARGV[i]
  redis.call('ZREM', P..'leases:'..key, ARGV[1])
  redis.call('ZREMRANGEBYSCORE', P..'leases:'..key, '-inf', num(now))
  if redis.call('ZCARD', P..'leases:'..key) == 0 then redis.call('ZREM', P..'leased', key) end
  drop_doomed(key)
end
return 1
"""

# ARGV: lease, seconds, keys.
HOLD = r"""
local until_ = num(now + ARGV[2])
for i = 3, #ARGV do
  local key = ARGV[i]
  local mine = redis.call('ZSCORE', P..'leases:'..key, ARGV[1])
  local there = redis.call('EXISTS', P..'entry:'..key) == 1
  if there and (mine or redis.call('SISMEMBER', P..'doomed', key) == 0) then
    redis.call('ZADD', P..'leases:'..key, until_, ARGV[1])
    redis.call('ZADD', P..'leased', 'GT', until_, key)
  end
end
return 1
"""

# ARGV: key, blob, 1 if bad. Returns 1 if the entry had this blob.
FORGET = r"""
if redis.call('HGET', P..'entry:'..ARGV[1], 'blob') ~= ARGV[2] then return 0 end
drop_entry(ARGV[1])
if ARGV[3] == '1' then add('quarantined', 1) end
return 1
"""

# ARGV: key, nonce, owner, seconds. Returns {'claimed'}, {'stored'} or {'busy', seconds left, owner, nonce}.
CLAIM = r"""
local key = ARGV[1]
if redis.call('EXISTS', P..'entry:'..key) == 1 and redis.call('SISMEMBER', P..'doomed', key) == 0 then
  return {'stored'}
end
local c = redis.call('HMGET', P..'claim:'..key, 'nonce', 'owner', 'expires')
if c[1] == ARGV[2] then return {'claimed'} end
if c[1] and tonumber(c[3]) > now then return {'busy', num(tonumber(c[3]) - now), c[2], c[1]} end
break_claim(key)
local expires = num(now + ARGV[4])
redis.call('HSET', P..'claim:'..key, 'nonce', ARGV[2], 'owner', ARGV[3], 'expires', expires, 'reserved', '0')
redis.call('ZADD', P..'claims', expires, key)
return {'claimed'}
"""

# ARGV: key, nonce, seconds. Returns 0 when the claim is lost.
RENEW_CLAIM = r"""
if not claim_is(ARGV[1], ARGV[2]) then return 0 end
redis.call('HSET', P..'claim:'..ARGV[1], 'expires', num(now + ARGV[3]))
redis.call('ZADD', P..'claims', num(now + ARGV[3]), ARGV[1])
return 1
"""

# ARGV: key, nonce, bytes, seconds, capacity if none is set, the tenant, its bytes at most ("" for any number),
# blobs that are gone...
# Returns {'lost'}, {'quota'}, {'large', capacity}, {'full'}, {'reserved'}, or {'garbage', blobs...}.
RESERVE = r"""
local key, nbytes, capacity = ARGV[1], tonumber(ARGV[3]), setting('capacity_nbytes') or tonumber(ARGV[5])
local tenant, most = ARGV[6], tonumber(ARGV[7])
for i = 8, #ARGV do discard(ARGV[i]) end
if not claim_is(key, ARGV[2]) then return {'lost'} end
if most and total('entry_nbytes@'..tenant) + reserved_by(tenant, key) + nbytes > most then return {'quota'} end
if nbytes > capacity then return {'large', int(capacity)} end
local over = space() + nbytes - capacity
if over > 0 then
  local more = over - total('garbage_nbytes')
  if more > 0 then
    local found, freed = victims(more)
    if freed < more then return {'full'} end
    for _, victim in ipairs(found) do evict_entry(victim) end
  end
  local answer = garbage()
  table.insert(answer, 1, 'garbage')
  return answer
end
add('claim_nbytes', nbytes - tonumber(redis.call('HGET', P..'claim:'..key, 'reserved')))
local expires = math.max(tonumber(redis.call('HGET', P..'claim:'..key, 'expires')), now + ARGV[4])
redis.call('HSET', P..'claim:'..key, 'reserved', int(nbytes), 'expires', num(expires), 'tenant', tenant)
redis.call('ZADD', P..'claims', num(expires), key)
return {'reserved'}
"""

# ARGV: bytes. Evicts whatever the capacity; returns the garbage.
EVICT = r"""
evict(tonumber(ARGV[1]))
return garbage()
"""

# Makes a blob the entry of its key. Local function of COMMIT and ADOPT.
# ARGV from 3 on: blob, chunk (SID), model, tenant, tokens, bytes, bytes stored, context keys...
PUT_ENTRY = r"""
local function put_entry(key)
  local blob, chunk, model = ARGV[3], ARGV[4], ARGV[5]
  local old = redis.call('HMGET', P..'entry:'..key, 'blob', 'stored')
  if old[1] then
    redis.call('HSET', P..'entry:'..key, 'blob', blob)
    redis.call('SREM', P..'doomed', key)
    trash(old[1], tonumber(old[2]))
  else
    local needs = {}
    for i = 10, #ARGV do
      local needed = redis.call('HGET', P..'entry:'..ARGV[i], 'chunk') or redis.call('HGET', P..'buried', ARGV[i])
      if needed then
        needs[#needs + 1] = needed
        redis.call('SADD', P..'needs:'..needed, key)
      end
    end
    redis.call('HSET', P..'entry:'..key, 'blob', blob, 'chunk', chunk, 'model', model, 'salt', ARGV[6],
      'tokens', ARGV[7], 'nbytes', ARGV[8], 'stored', ARGV[9], 'created', num(now), 'needs', table.concat(needs, ' '))
    redis.call('ZADD', P..'used', num(now), key)
    redis.call('SADD', P..'chunk:'..chunk, key)
    redis.call('SADD', P..'model:'..model, key)
    note(ARGV[6])
    add_for(ARGV[6], 'entries', 1)
    add_for(ARGV[6], 'entry_nbytes', tonumber(ARGV[9]))
  end
  unbury(key)
end
"""

# ARGV: key, nonce, then as PUT_ENTRY. Returns when it was created and used; nothing when the claim is lost.
COMMIT = (
    PUT_ENTRY
    + r"""
local key = ARGV[1]
if redis.call('HGET', P..'entry:'..key, 'blob') ~= ARGV[3] then
  if not claim_is(key, ARGV[2]) then return {} end
  end_claim(key)
  put_entry(key)
end
return {redis.call('HGET', P..'entry:'..key, 'created'), redis.call('ZSCORE', P..'used', key)}
"""
)

# ARGV: key, nothing, then as PUT_ENTRY. Returns 0 when the key has an entry or a claim.
ADOPT = (
    PUT_ENTRY
    + r"""
local key = ARGV[1]
if redis.call('EXISTS', P..'claim:'..key) == 1 then return 0 end
if redis.call('EXISTS', P..'entry:'..key) == 1 and redis.call('SISMEMBER', P..'doomed', key) == 0 then return 0 end
put_entry(key)
return 1
"""
)

# ARGV: key, nonce. Ends a claim, its blob becomes garbage. Returns 0 when it was lost.
DROP_CLAIM = r"""
if not claim_is(ARGV[1], ARGV[2]) then return 0 end
break_claim(ARGV[1])
return 1
"""

# ARGV: SIDs. Returns records, entries, bytes.
DELETE_CHUNKS = r"""
local records, entries, nbytes = 0, 0, 0
for _, id in ipairs(ARGV) do
  records = records + drop_record(id)
  local e, n = delete_entries(P..'chunk:'..id)
  entries, nbytes = entries + e, nbytes + n
end
return {records, entries, int(nbytes)}
"""

# ARGV: model. Returns entries, bytes.
DELETE_MODEL = r"""
local entries, nbytes = delete_entries(P..'model:'..ARGV[1])
return {entries, int(nbytes)}
"""

# ARGV: capacity if none is set. Returns claims, records, entries, bytes.
SWEEP = r"""
local entries, nbytes = total('entries'), total('entry_nbytes')
local dead = redis.call('ZRANGEBYSCORE', P..'claims', '-inf', num(now))
for _, key in ipairs(dead) do break_claim(key) end
for _, key in ipairs(redis.call('ZRANGEBYSCORE', P..'leased', '-inf', num(now))) do
  redis.call('ZREM', P..'leased', key)
  redis.call('ZREMRANGEBYSCORE', P..'leases:'..key, '-inf', num(now))
end
for _, key in ipairs(redis.call('SMEMBERS', P..'doomed')) do drop_doomed(key) end
local records = remove_expired()
for _, tenant in ipairs(redis.call('SMEMBERS', P..'tenants')) do
  if redis.call('EXISTS', of(tenant, 'records_created')) == 0 and total('entries@'..tenant) == 0 then
    redis.call('SREM', P..'tenants', tenant)
    redis.call('HDEL', P..'totals', 'entries@'..tenant, 'entry_nbytes@'..tenant)
  end
end
local over = total('entry_nbytes') + total('claim_nbytes') - (setting('capacity_nbytes') or tonumber(ARGV[1]))
if over > 0 then evict(over) end
return {#dead, records, entries - total('entries'), int(nbytes - total('entry_nbytes'))}
"""

# ARGV: blobs that are gone from the medium.
DISCARD = r"""
for _, blob in ipairs(ARGV) do discard(blob) end
return 1
"""

# ARGV: tenants, or none for all. Returns pinned entries, leased entries.
COUNTS = r"""
local pinned, held, wanted = 0, 0, {}
for _, tenant in ipairs(#ARGV == 0 and tenants() or ARGV) do
  wanted[tenant] = true
  for _, id in ipairs(redis.call('SMEMBERS', of(tenant, 'pinned'))) do
    pinned = pinned + redis.call('SCARD', P..'chunk:'..sid_of(tenant, id))
  end
end
for _, key in ipairs(redis.call('ZRANGEBYSCORE', P..'leased', '('..num(now), '+inf')) do
  local tenant = redis.call('HGET', P..'entry:'..key, 'salt')
  if tenant and wanted[tenant] then held = held + 1 end
end
return {pinned, held}
"""

# ARGV: 1 to correct. Returns name, stored, counted for each total that does not add up.
RECOUNT = r"""
local counted = {records = 0, entries = redis.call('ZCARD', P..'used')}
local sums = {entry_nbytes = 0, claim_nbytes = 0, garbage_nbytes = 0}
for _, tenant in ipairs(tenants()) do
  counted.records = counted.records + redis.call('ZCARD', of(tenant, 'records_created'))
  sums['entries@'..tenant], sums['entry_nbytes@'..tenant] = 0, 0
end
for _, key in ipairs(redis.call('ZRANGE', P..'used', 0, -1)) do
  local e = redis.call('HMGET', P..'entry:'..key, 'stored', 'salt')
  local stored, tenant = tonumber(e[1] or 0), e[2] or ''
  sums.entry_nbytes = sums.entry_nbytes + stored
  sums['entries@'..tenant] = (sums['entries@'..tenant] or 0) + 1
  sums['entry_nbytes@'..tenant] = (sums['entry_nbytes@'..tenant] or 0) + stored
end
for _, key in ipairs(redis.call('ZRANGE', P..'claims', 0, -1)) do
  sums.claim_nbytes = sums.claim_nbytes + tonumber(redis.call('HGET', P..'claim:'..key, 'reserved') or 0)
end
for _, nbytes in ipairs(redis.call('HVALS', P..'garbage')) do
  sums.garbage_nbytes = sums.garbage_nbytes + tonumber(nbytes)
end
for name, value in pairs(sums) do counted[name] = value end
local wrong = {}
for name, value in pairs(counted) do
  if total(name) ~= value then
    wrong[#wrong + 1] = name
    wrong[#wrong + 1] = int(total(name))
    wrong[#wrong + 1] = int(value)
    if ARGV[1] == '1' then redis.call('HSET', P..'totals', name, int(value)) end
  end
end
return wrong
"""

# ARGV: version. Brings a store of before tenants (no version) to this one: entries under a salt go from their chunk's
# sets to those of their tenant's chunk, and each tenant's entries are counted. Returns the version that was there.
UPGRADE = r"""
local version = redis.call('HGET', P..'settings', 'version')
if version then return tonumber(version) end
local counts, sizes = {}, {}
for _, key in ipairs(redis.call('ZRANGE', P..'used', 0, -1)) do
  local e = redis.call('HMGET', P..'entry:'..key, 'chunk', 'salt', 'stored', 'needs')
  local tenant = e[2]
  if tenant ~= '' and not string.find(e[1], '/', 1, true) then
    note(tenant)
    redis.call('SREM', P..'chunk:'..e[1], key)
    redis.call('SADD', P..'chunk:'..sid_of(tenant, e[1]), key)
    local needs = {}
    for id in string.gmatch(e[4], '%S+') do
      redis.call('SREM', P..'needs:'..id, key)
      redis.call('SADD', P..'needs:'..sid_of(tenant, id), key)
      needs[#needs + 1] = sid_of(tenant, id)
    end
    redis.call('HSET', P..'entry:'..key, 'chunk', sid_of(tenant, e[1]), 'needs', table.concat(needs, ' '))
  end
  counts[tenant] = (counts[tenant] or 0) + 1
  sizes[tenant] = (sizes[tenant] or 0) + tonumber(e[3])
end
for tenant, count in pairs(counts) do
  redis.call('HSET', P..'totals', 'entries@'..tenant, int(count), 'entry_nbytes@'..tenant, int(sizes[tenant]))
end
redis.call('HSET', P..'settings', 'version', ARGV[1])
return tonumber(ARGV[1])
"""
