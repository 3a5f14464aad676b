"""Claims: taken, renewed, given space, committed."""

from chunk_store.redis.scripts.entries import PUT_ENTRY

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

# ARGV: seconds, then a key and a nonce for each claim. Returns for each 0 when it is lost.
RENEW_CLAIMS = r"""
local held, expires = {}, num(now + ARGV[1])
for i = 2, #ARGV, 2 do
  if claim_is(ARGV[i], ARGV[i + 1]) then
    redis.call('HSET', P..'claim:'..ARGV[i], 'expires', expires)
    redis.call('ZADD', P..'claims', expires, ARGV[i])
    table.insert(held, 1)
  else
    table.insert(held, 0)
  end
end
return held
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

# ARGV: key, nonce. Ends a claim, its blob becomes garbage. Returns 0 when it was lost.
DROP_CLAIM = r"""
if not claim_is(ARGV[1], ARGV[2]) then return 0 end
break_claim(ARGV[1])
return 1
"""
