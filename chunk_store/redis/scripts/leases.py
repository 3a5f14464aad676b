"""Leases, of those who hold entries and of those who read one."""

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
