"""Upkeep: swept, counted, brought up to date."""

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
