"""Records: registered, pinned, deleted with their entries."""

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

# ARGV: for each: a tenant, its chunk's SID, the shared one's, how many uses. Counts them with the record that was used.
ADD_USES = r"""
for i = 1, #ARGV, 4 do
  for _, sid in ipairs({ARGV[i+1], ARGV[i+2]}) do
    if redis.call('EXISTS', P..'record:'..sid) == 1 then
      redis.call('HINCRBY', P..'uses:'..sid, ARGV[i], ARGV[i+3])
      break
    end
  end
end
return 1
"""
